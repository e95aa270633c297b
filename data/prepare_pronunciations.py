"""Make data/train.tsv, valid.tsv and test.tsv from one of WikiPron's lists of pronunciations.

    python -m data.prepare_pronunciations --language eng_latn_us_broad   fetch US English (2 MB)
    python -m data.prepare_pronunciations --language por_latn_po_broad --output_dir data/portuguese
    python -m data.prepare_pronunciations --tsv my_words.tsv             from a file you have
    python -m data.prepare_pronunciations --tsv us.tsv --train all --keep data --output_dir us

Lines of WikiPron's files are a spelling, TAB, phonemes separated by spaces. The splits are by
spelling: all pronunciations of a word stand on one side. --keep makes more to train on for the
validation and test words of a split that is there already.
"""

import argparse
import collections
import re
from pathlib import Path

import numpy as np

import utils
from utils import UserError

URL = (
    "https://raw.githubusercontent.com/CUNY-CL/wikipron/"
    "185dfcf514fe37fe4cfddddeacff1eda3afdca55/data/scrape/tsv/{language}.tsv"
)


def _name(text):
    if not re.fullmatch(r"\w+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name such as eng_latn_us_broad")
    return text


def parse_options(argv=None):
    """The command line as a namespace."""
    parser = utils.Parser(prog="python -m data.prepare_pronunciations", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--language", type=_name, metavar="NAME", help="the WikiPron file to download"
    )
    source.add_argument("--tsv", type=Path, metavar="FILE", help="a file of that form")
    parser.add_argument("--url", default=URL, help="where --language finds its file")
    size = utils.number(int, 1, 10**7)
    train = "pairs to train on, or 'all' that are left"
    parser.add_argument(
        "--train", type=lambda s: s if s == "all" else size(s), default=10000, help=train
    )
    parser.add_argument("--valid", type=size, help="pairs to validate on (default: 1000)")
    parser.add_argument("--test", type=size, help="pairs to test on (default: 1000)")
    parser.add_argument(
        "--seed", type=utils.number(int, 0, 2**32 - 1), default=42, help="random seed"
    )
    keep = "keep the valid.tsv and test.tsv of this folder; none of their spellings is trained on"
    parser.add_argument("--keep", type=Path, metavar="DIR", help=keep)
    folder = "where the three files are written (default: data/)"
    parser.add_argument("--output_dir", type=Path, default=utils.ROOT / "data", help=folder)
    replace = "replace files that are there and have other words"
    parser.add_argument("--replace", action="store_true", help=replace)
    options = parser.parse_args(argv)
    outputs = [options.output_dir / f"{split}.tsv" for split in ("train", "valid", "test")]
    if options.tsv and options.tsv.resolve() in [path.resolve() for path in outputs]:
        parser.error(f"--tsv {options.tsv} would be overwritten; give another --output_dir")
    if options.keep and (options.valid or options.test):
        parser.error("--keep keeps the validation and test pairs: neither --valid nor --test")
    if options.keep and options.keep.resolve() == options.output_dir.resolve():
        parser.error("--keep needs another folder as --output_dir, or it loses its training pairs")
    return options


def split_by_spelling(pairs, sizes, seed):
    """Share pairs (phonemes, spelling) out so that no spelling is on two sides.

    sizes: {split: number of pairs, or 'all' that are left}, filled in this order. Pairs that occur
    twice count once. Raises UserError if there are too few.
    """
    groups = collections.defaultdict(list)
    for phonemes, spelling in dict.fromkeys(pairs):
        groups[spelling].append((phonemes, spelling))
    words = sorted(groups)
    left = [words[i] for i in np.random.default_rng(seed).permutation(len(words))]
    splits = {}
    for split, size in sizes.items():
        room = sum(map(len, groups.values())) if size == "all" else size
        splits[split], skipped = [], []
        for word in left:
            fits = len(groups[word]) <= room - len(splits[split])
            splits[split].extend(groups[word]) if fits else skipped.append(word)
        left = skipped
        if not splits[split] or (size != "all" and len(splits[split]) < size):
            raise UserError(
                f"too few pronunciations: {size} wanted for {split}, {len(splits[split])} left"
            )
    return splits


def split_beside(pairs, folder, size, seed):
    """Pairs to train on, `size` or 'all', beside the validation and test pairs of `folder`: with
    none of their spellings. Raises UserError."""
    splits = {split: utils.read_tsv(folder / f"{split}.tsv") for split in ("test", "valid")}
    held_out = {spelling for kept in splits.values() for _, spelling in kept}
    left = [pair for pair in pairs if pair[1] not in held_out]
    return splits | split_by_spelling(left, {"train": size}, seed)


def write_splits(folder, splits, replace):
    """Write the three files, all before any takes its name: old and new ones must not mix. Raises
    UserError where one is there that says something else, but for `replace`."""
    contents = {
        split: "".join(f"{phonemes}\t{spelling}\n" for phonemes, spelling in splits[split]).encode()
        for split in ("train", "valid", "test")
    }
    for split, content in contents.items():
        path = folder / f"{split}.tsv"
        if not replace and path.exists() and path.read_bytes() != content:
            raise UserError(f"{path}: has other words; --replace, or another --output_dir")
    parts = {split: folder / f".{split}.part.tsv" for split in contents}
    try:
        for split, part in parts.items():
            utils.write_file(part, lambda file, split=split: file.write_bytes(contents[split]))
        for split, part in parts.items():
            part.replace(folder / f"{split}.tsv")
            print(f"Wrote {len(splits[split]):,} pairs to {folder / f'{split}.tsv'}")
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def main(argv=None):
    """Do what the command line asks for."""
    options = parse_options(argv)
    path = options.tsv
    if options.language:
        path = options.output_dir / f"wikipron-{Path(options.language).name}.tsv"
        if not path.exists():
            utils.download(options.url.replace("{language}", options.language), path)
    pairs = [(phonemes, spelling) for spelling, phonemes in utils.read_tsv(path)]
    if options.keep:
        splits = split_beside(pairs, options.keep, options.train, options.seed)
    else:
        test, valid = options.test or 1000, options.valid or 1000
        sizes = {"test": test, "valid": valid, "train": options.train}
        splits = split_by_spelling(pairs, sizes, options.seed)
    write_splits(options.output_dir, splits, options.replace)


if __name__ == "__main__":
    utils.run_script(main)
