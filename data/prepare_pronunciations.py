"""Make data/train.tsv, valid.tsv and test.tsv from one of WikiPron's lists of pronunciations.

    python -m data.prepare_pronunciations --language eng_latn_us_broad  download US English (2 MB)
    python -m data.prepare_pronunciations --language por_latn_po_broad --output_dir data/portuguese
    python -m data.prepare_pronunciations --tsv my_words.tsv            from your own list
    python -m data.prepare_pronunciations --tsv us.tsv --train all --keep data --output_dir us

Each line of a list is a spelling, TAB, phonemes separated by spaces. No spelling occurs in two
splits. --keep makes a larger training set for the validation and test words of another split.
"""

import argparse
import collections
import contextlib
import re
from pathlib import Path

import numpy as np

import data
import utils
from utils import UserError

URL = (
    "https://raw.githubusercontent.com/CUNY-CL/wikipron/"
    "185dfcf514fe37fe4cfddddeacff1eda3afdca55/data/scrape/tsv/{language}.tsv"
)
SPLITS = ("train", "valid", "test")  # the names of the files

# ----------------------------------------------------------------------------------------------
# splits

Pair = tuple[str, str]  # phonemes separated by spaces, spelling


def split_by_spelling(
    pairs: list[Pair], sizes: dict[str, int | None], seed: int
) -> dict[str, list[Pair]]:
    """Split pairs at random so that no spelling occurs in two splits.

    sizes: {split: number of pairs, or None for all that remain}, filled in this order. Repeated
    pairs count once. Raises UserError if there are too few.
    """
    by_spelling = collections.defaultdict(list)
    for phonemes, spelling in dict.fromkeys(pairs):
        by_spelling[spelling].append((phonemes, spelling))
    words = sorted(by_spelling)
    remaining = [words[i] for i in np.random.default_rng(seed).permutation(len(words))]
    splits = {}
    for split, size in sizes.items():
        chosen, skipped = [], []
        for word in remaining:
            if size is None or len(chosen) + len(by_spelling[word]) <= size:
                chosen += by_spelling[word]
            else:
                skipped.append(word)
        if not chosen or (size and len(chosen) < size):
            raise UserError(
                f"too few pronunciations: {split} needs {size or 'at least 1'}, has {len(chosen)}"
            )
        splits[split], remaining = chosen, skipped
    return splits


def extend_split(
    pairs: list[Pair], folder: Path, size: int | None, seed: int
) -> dict[str, list[Pair]]:
    """The validation and test pairs of the split in `folder`, with `size` training pairs (None:
    all) that have none of their spellings. Raises UserError."""
    splits = {split: utils.read_tsv(folder / f"{split}.tsv") for split in ("test", "valid")}
    held_out = {spelling for kept in splits.values() for _, spelling in kept}
    pairs = [(phonemes, spelling) for phonemes, spelling in pairs if spelling not in held_out]
    return splits | split_by_spelling(pairs, {"train": size}, seed)


def write_splits(folder: Path, splits: dict[str, list[Pair]], replace: bool) -> None:
    """Write the three files under temporary names, then rename them: a full disk leaves no mixture
    of old and new files. Raises UserError if a file has other words, unless `replace`."""
    contents = {}
    for split in SPLITS:
        path, lines = folder / f"{split}.tsv", [f"{a}\t{b}\n" for a, b in splits[split]]
        contents[path] = "".join(lines).encode()
        if not replace and path.is_file() and path.read_bytes() != contents[path]:
            raise UserError(f"{path}: has other words; give --replace or another --output_dir")
    parts = {path: folder / f".{path.stem}.part.tsv" for path in contents}
    try:
        for path, part in parts.items():
            utils.write_file(part, lambda file, path=path: file.write_bytes(contents[path]))
        for path, part in parts.items():
            utils.write_file(path, part.replace)
            print(f"Wrote {len(splits[path.stem]):,} pairs to {path}")
    finally:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink()


# ----------------------------------------------------------------------------------------------
# main


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Raises UserError."""
    parser = utils.Parser("python -m data.prepare_pronunciations", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    language = "the list to download, such as eng_latn_us_broad"
    source.add_argument("--language", type=_list_name, metavar="NAME", help=language)
    source.add_argument("--tsv", type=Path, metavar="FILE", help="a list in the same format")
    add, size = parser.add_argument, utils.number(int, 1, 10**7)
    add("--url", default=URL, help="where to download the list from (default: WikiPron)")
    train = "number of training pairs, or all that remain (default: %(default)s)"
    add("--train", type=lambda text: None if text == "all" else size(text), default=10_000,
        metavar="N|all", help=train)  # fmt: skip
    add("--valid", type=size, metavar="N", help="number of validation pairs (default: 1000)")
    add("--test", type=size, metavar="N", help="number of test pairs (default: 1000)")
    seed = "random seed of the split (default: %(default)s)"
    add("--seed", type=utils.number(int, 0, 2**32 - 1), default=42, help=seed)
    keep = "keep the valid.tsv and test.tsv of this folder and train on none of their spellings"
    add("--keep", type=Path, metavar="DIR", help=keep)
    output_dir = "where the three files are written (default: data/)"
    add("--output_dir", type=Path, default=utils.ROOT / "data", metavar="DIR", help=output_dir)
    add("--replace", action="store_true", help="replace files that have other words")
    args = parser.parse_args(argv)
    outputs = [(args.output_dir / f"{split}.tsv").resolve() for split in SPLITS]
    if args.tsv and args.tsv.resolve() in outputs:
        raise UserError(f"--tsv {args.tsv} would be overwritten; give another --output_dir")
    if args.keep and (args.valid or args.test):
        raise UserError("--keep keeps the validation and test pairs: leave out --valid and --test")
    if args.keep and args.keep.resolve() == args.output_dir.resolve():
        raise UserError("--keep would overwrite its own training pairs; give another --output_dir")
    return args


def _list_name(text: str) -> str:
    if not re.fullmatch(r"\w+", text):  # it becomes part of an address and of a path
        raise argparse.ArgumentTypeError(f"{text!r} is not a name such as eng_latn_us_broad")
    return text


def main(argv: list[str] | None = None) -> None:
    """Do what the command line says."""
    args = parse_args(argv)
    path = args.tsv or args.output_dir / f"wikipron-{args.language}.tsv"
    if args.language and not path.exists():
        data.download(args.url.replace("{language}", args.language), path)
    try:
        pairs = [(phonemes, spelling) for spelling, phonemes in utils.read_tsv(path)]
    except UserError:
        if args.language:  # not a list: the next call downloads it again
            path.unlink(missing_ok=True)
        raise
    if args.keep:
        splits = extend_split(pairs, args.keep, args.train, args.seed)
    else:
        sizes = {"test": args.test or 1000, "valid": args.valid or 1000, "train": args.train}
        splits = split_by_spelling(pairs, sizes, args.seed)
    write_splits(args.output_dir, splits, args.replace)


if __name__ == "__main__":
    utils.run_script(main)
