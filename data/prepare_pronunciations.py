"""Make data/train.tsv, valid.tsv and test.tsv from one of WikiPron's lists of pronunciations.

    python -m data.prepare_pronunciations --language eng_latn_us_broad  download US English (2 MB)
    python -m data.prepare_pronunciations --language por_latn_po_broad --output_dir data/portuguese
    python -m data.prepare_pronunciations --tsv my_words.tsv            from your own list
    python -m data.prepare_pronunciations --tsv en_US.txt --segment     from one of ipa-dict's
    python -m data.prepare_pronunciations --tsv us.tsv --train all --keep data --output_dir us

Each line of a list is a spelling, TAB, phonemes separated by spaces; data/README.md describes the
other formats. No spelling occurs in two splits. --keep makes a larger training set for the
validation and test words of another split.
"""

import argparse
import collections
import contextlib
import csv
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

import data
import utils
from utils import UserError

COMMIT = "185dfcf514fe37fe4cfddddeacff1eda3afdca55"  # of WikiPron
URL = (
    f"https://raw.githubusercontent.com/CUNY-CL/wikipron/{COMMIT}/data/scrape/tsv/{{language}}.tsv"
)
LISTS = f"https://github.com/CUNY-CL/wikipron/tree/{COMMIT}/data/scrape/tsv"
SPLITS = ("train", "valid", "test")  # the names of the files
Pair = tuple[str, str]  # phonemes separated by spaces, spelling

# ----------------------------------------------------------------------------------------------
# lists

HEADER = re.compile(
    "words?|spelling|orthography|graphemes?|headword|term|"
    "ipa|phonemes?|phones|pronunciations?|transcription",
    re.IGNORECASE,
)
CMUDICT = re.compile(r"(\S+) +([A-Z]{1,2}[0-2]?(?: [A-Z]{1,2}[0-2]?)*)(?: +#.*)?")
PHONEMES = re.compile(r"[/\[].*[/\]]|\S{1,4}( \S{1,4})+")  # what spellings seldom look like
DELIMITED = re.compile(r"[/\[]([^/\[\]]+)[/\]]")
MARKUP = re.compile(r"</?\w+|&\w+;|\[sound:")  # of web pages and Anki
COMMA = re.compile(r"(?<=\S)[,;]\s+")  # between two pronunciations
PROSODY = re.compile("[ˈˌ'.‿()\u200c\u200d-]")  # stress, syllables, parentheses, joiners


def parse_list(text: str, name: str, is_segmented: bool = True) -> list[Pair]:
    """The pairs of a list in a format that data/README.md describes. is_segmented: spaces separate
    the phonemes. Raises UserError, with the name and the line."""
    numbers, spellings, pronunciations = zip(*split_rows(text, name))
    has_phonemes = (" " in field or PHONEMES.fullmatch(field) for field in pronunciations)
    if is_most(map(PHONEMES.fullmatch, spellings)) and not is_most(has_phonemes):
        print(f"{name}: the pronunciations are in the first column")
        spellings, pronunciations = pronunciations, spellings
    if is_segmented and is_most(map(has_long_phonemes, pronunciations)):
        raise UserError(f"{name}: no spaces between the phonemes; --segment separates them")
    pairs = []
    for number, spelling, pronunciation in zip(numbers, spellings, pronunciations):
        where = f"{name}, line {number}"
        spelling = re.sub(r"\(\d+\)$", "", spelling)  # CMUdict's second pronunciation: cat(2)
        if pronunciation[0] in "/[":
            pronunciation = ", ".join(DELIMITED.findall(pronunciation) or [pronunciation[1:]])
        for phonemes in COMMA.split(pronunciation.strip(" ,;")):
            phonemes = phonemes if is_segmented else segment(phonemes, where)
            pairs.append(utils.parse_pair([phonemes, spelling], where))
    return pairs


def split_rows(text: str, name: str) -> list[tuple[int, str, str]]:
    """(line number, first field, second field) of each line that is not blank, a comment or a
    header. Raises UserError."""
    lines = [(i, s) for i, s in enumerate(re.split("\r\n|\r|\n", text), 1) if s.strip()]
    words = [(i, line) for i, line in lines if not line.startswith(("#", ";;;"))]
    if len(words) < len(lines):
        print(f"{name}: comment lines skipped: {len(lines) - len(words):,}")
    separator = next((c for c in "\t;," if is_most(c in line for _, line in words)), None)
    rows = [(i, *split_line(line, separator, f"{name}, line {i}")) for i, line in words]
    if rows and all(map(HEADER.fullmatch, rows[0][1:])):
        rows = rows[1:]
    if not rows:
        raise UserError(f"{name}: has no words")
    return rows


def split_line(line: str, separator: str | None, where: str) -> tuple[str, str]:
    """The two fields of a line; separator: None in CMUdict. Raises UserError."""
    entry = CMUDICT.fullmatch(line.rstrip()) if separator is None else None
    try:
        reader = csv.reader([line], delimiter=separator or "\t", skipinitialspace=True, strict=True)
        fields = list(entry.groups()) if entry else next(reader)
    except csv.Error:  # a quotation mark that is part of a field
        fields = line.split("\t")
    while len(fields) > 2 and not fields[-1].strip():
        fields.pop()  # an empty cell of a spreadsheet
    if len(fields) != 2:
        columns = "two columns: the spelling, a TAB, the phonemes separated by spaces"
        raise UserError(f"{where}: expected {columns}; found {len(fields)}")
    if match := MARKUP.search(line):
        raise UserError(f"{where}: contains {match[0]}; export the list as plain text")
    return utils.parse_pair(fields, where)


def has_long_phonemes(text: str) -> bool:
    """Whether a pronunciation has words or syllables where phonemes are expected: one token or, in
    slashes, several, of more than two letters on average."""
    is_word = text.startswith(("/", "[")) or " " not in text
    return is_word and sum(map(str.isalpha, text)) > 2 * len(text.split())


def segment(text: str, where: str) -> str:
    """IPA as phonemes separated by spaces, as WikiPron does it, without stress and syllable
    boundaries. Raises UserError."""
    with utils.user_errors("--segment needs the package segments; pip install segments"):
        import segments
    try:
        return segments.Tokenizer()(PROSODY.sub("", text), ipa=True, separator=" ")
    except IndexError:  # such as a tie bar without a second letter
        raise UserError(f"{where}: {text} cannot be separated into phonemes")


def is_most(values: Iterable) -> bool:
    """Whether more than half of the values are true."""
    values = list(map(bool, values))
    return 2 * sum(values) > len(values)


# ----------------------------------------------------------------------------------------------
# splits


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


def proposal(pairs: list[Pair], seed: int) -> str:
    """What a list is enough for, in words."""
    total = len(set(pairs))
    tenth = min(max(1, total // 10), 1000)
    for size in (*range(tenth, 0, -1), *range(tenth + 1, total // 3 + 1)):
        with contextlib.suppress(UserError):  # the pronunciations of a word cannot be split
            split_by_spelling(pairs, {"test": size, "valid": size, "train": None}, seed)
            return f"the list has {total:,}, enough for --train all --valid {size} --test {size}"
    return f"the list has {total:,}, each split needs a word"


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
    finally:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink()
    for path in contents:
        print(f"Wrote {len(splits[path.stem]):,} pairs to {path}")


# ----------------------------------------------------------------------------------------------
# main


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Raises UserError."""
    parser = utils.Parser("python -m data.prepare_pronunciations", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    language = "the list to download, such as eng_latn_us_broad"
    source.add_argument("--language", type=_list_name, metavar="NAME", help=language)
    source.add_argument("--tsv", type=Path, metavar="FILE", help="your own list")
    add, size = parser.add_argument, utils.number(int, 1, 10**7)
    add("--url", default=URL, help="where to download the list from (default: WikiPron)")
    separate = "split the pronunciations into phonemes (needs the package segments)"
    add("--segment", action="store_true", help=separate)
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


def download_list(args: argparse.Namespace, path: Path) -> None:
    """Download one of WikiPron's lists. Raises UserError."""
    try:
        data.download(args.url.replace("{language}", args.language), path)
    except UserError as error:
        hint = f"; the names of the lists are at {LISTS}" if "Error 404" in str(error) else ""
        raise UserError(f"{error}{hint}")


def main(argv: list[str] | None = None) -> None:
    """Do what the command line says."""
    args = parse_args(argv)
    path = args.tsv or args.output_dir / f"wikipron-{args.language}.tsv"
    is_new = args.language and not path.exists()
    if is_new:
        download_list(args, path)
    try:
        text = utils.read_text(path)
        if args.language:  # a few of the lists have zero-width spaces, places to break a line
            text = text.replace("\u200b", "")
        pairs = parse_list(text, str(path), not args.segment)
    except UserError:
        if is_new:  # not a list: the next call downloads it again
            path.unlink(missing_ok=True)
        raise
    if args.keep:
        splits = extend_split(pairs, args.keep, args.train, args.seed)
    else:
        sizes = {"test": args.test or 1000, "valid": args.valid or 1000, "train": args.train}
        try:
            splits = split_by_spelling(pairs, sizes, args.seed)
        except UserError as error:
            raise UserError(f"{error}; {proposal(pairs, args.seed)}")
    write_splits(args.output_dir, splits, args.replace)


if __name__ == "__main__":
    utils.run_script(main)
