"""Make data/intel_landscapes.v2.npz from the photographs of "Intel Image Classification".

    python -m data.prepare_landscapes --download             fetch them (350 MB), no account needed
    python -m data.prepare_landscapes --archive archive.zip  from Kaggle's archive
    python -m data.prepare_landscapes --folder photographs/  from the unpacked archive

Every picture is shrunk to 48x48. Kaggle's training pictures become the training and validation
sets, its test pictures the test set.
"""

import collections
import hashlib
import io
import math
import stat
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from tqdm import tqdm

import utils
from utils import CLASSES, UserError

URL = "https://www.kaggle.com/api/v1/datasets/download/puneet6060/intel-image-classification"
OUTPUT = utils.ROOT / "data" / "intel_landscapes.v2.npz"
FOLDERS = {"seg_train": "train", "seg_test": "test"}
MAX_PICTURE = 64 * 2**20  # bytes; the largest real one has 30 KB


def parse_options(argv=None):
    """The command line as a namespace."""
    parser = utils.Parser(prog="python -m data.prepare_landscapes", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--archive", type=Path, help="Kaggle's archive")
    source.add_argument("--folder", type=Path, help="the unpacked archive")
    source.add_argument("--download", action="store_true", help="download the archive first")
    parser.add_argument("--url", default=URL, help="where --download finds the archive")
    output = "the file to write (default: data/intel_landscapes.v2.npz)"
    parser.add_argument("--output", type=Path, default=OUTPUT, help=output)
    seed = utils.number(int, 0, 2**32 - 1)
    parser.add_argument("--seed", type=seed, default=42, help="seed of the validation split")
    drop = "leave out training pictures that stand twice, under two labels, or in the test set"
    parser.add_argument("--drop_duplicates", action="store_true", help=drop)
    options = parser.parse_args(argv)
    if not options.output.name or options.output.is_dir():
        parser.error(f"--output {options.output} is a folder, not the name of a file")
    return options


# ----------------------------------------------------------------------------------------------
# finding pictures: functions that yield (split, class, name, read), read() giving the bytes


def in_folder(folder):
    """The pictures below `folder`. Raises UserError if it is not a folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    for path in sorted(folder.rglob("*")):
        place = _place(path.relative_to(folder.parent).parts)
        if place and path.is_file():
            yield *place, path.name, path.read_bytes


def in_archive(archive):
    """The pictures in an open zip archive, read in place: nothing is unpacked to disk.

    Raises UserError if an entry has an absolute path, '..', a link or an absurd size.
    """
    for entry in sorted(archive.infolist(), key=lambda entry: entry.filename):
        parts = PurePosixPath(entry.filename.replace("\\", "/")).parts
        if ".." in parts or (parts and (parts[0] == "/" or ":" in parts[0])):
            raise UserError(f"{archive.filename}: refused, for it has the path {entry.filename!r}")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise UserError(f"{archive.filename}: refused, for {entry.filename!r} is a link")
        if entry.file_size > MAX_PICTURE:
            size = entry.file_size / 2**20
            raise UserError(
                f"{archive.filename}: refused, {entry.filename!r} unpacks to {size:,.0f} MiB"
            )
        place = _place(parts)
        if place and not entry.is_dir():
            yield *place, parts[-1], lambda entry=entry: archive.read(entry)


def _place(parts):
    """(split, label) of a path '.../seg_train/.../<class>/<picture>', or None of any other."""
    split = next((FOLDERS[part] for part in reversed(parts) if part in FOLDERS), None)
    ending = PurePosixPath(parts[-1]).suffix.lower() if parts else ""
    if split and len(parts) > 1 and parts[-2] in CLASSES and ending in utils.picture_endings():
        return split, CLASSES.index(parts[-2])
    return None


def read_pictures(found):
    """Read what `in_folder` or `in_archive` found.

    Returns {split: (images uint8 (N, 3, 48, 48), labels int64 (N,), names [N])} and the names of
    the broken pictures, which are left out.
    """
    rows, broken = {split: [] for split in FOLDERS.values()}, []
    for split, label, name, read in tqdm(list(found), unit="picture", leave=False, disable=None):
        name = f"{split}/{CLASSES[label]}/{name}"
        try:
            rows[split].append((utils.read_picture(io.BytesIO(read())), label, name))
        except MemoryError:
            raise
        except Exception:  # what unpacks and decodes damaged files raises whatever it likes
            broken.append(name)
    for split, found in rows.items():
        if not found:
            folders = "seg_train/<class>/ and seg_test/<class>/"
            raise UserError(f"no {split} pictures found; they are looked for in {folders}")
    return {split: _stack(found) for split, found in rows.items()}, broken


def _stack(rows):
    images, labels, names = zip(*rows)
    return torch.stack(images), torch.tensor(labels), list(names)


# ----------------------------------------------------------------------------------------------
# splitting and auditing


def split_validation(labels, seed, share=0.1):
    """A boolean mask (N,) of ceil(share N) pictures, shared to the classes by largest remainder."""
    total = math.ceil(share * len(labels))
    counts = torch.bincount(labels, minlength=len(CLASSES))
    quotas = counts * total / len(labels)
    sizes = quotas.floor().long()
    largest = torch.argsort(quotas - sizes, descending=True, stable=True)
    sizes[largest[: total - sizes.sum()]] += 1
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label, size in enumerate(sizes.tolist()):
        of_class = (labels == label).nonzero()[:, 0]
        mask[of_class[torch.randperm(len(of_class), generator=generator)[:size]]] = True
    return mask


def find_duplicates(pictures):
    """Groups of equal pictures: lists of (split, index), one for each picture that stands twice."""
    groups = collections.defaultdict(list)
    for split, (images, _, _) in pictures.items():
        for index, image in enumerate(images.numpy()):
            groups[hashlib.sha256(image.tobytes()).digest()].append((split, index))
    return [group for group in groups.values() if len(group) > 1]


def audit(pictures, groups):
    """Print, by name, the pictures that stand twice, under two labels, or in training and test.

    Returns the indices of the training pictures to drop: all copies of one that is also a test
    picture or has two labels, and all but the first copy of any other.
    """
    drop, counts = set(), collections.Counter()
    for group in groups:
        labels = {int(pictures[split][1][index]) for split, index in group}
        training = [index for split, index in group if split == "train"]
        tested = len(training) < len(group)
        kind = "in training and test" if tested and training else "twice"
        kind += ", under two labels" if len(labels) > 1 else ""
        counts[kind] += 1
        print(f"  {kind}: " + " = ".join(pictures[split][2][index] for split, index in group))
        drop.update(training if tested or len(labels) > 1 else training[1:])
    print(
        "Audit: "
        + ("; ".join(f"{n} {kind}" for kind, n in counts.items()) or "no picture stands twice")
    )
    return drop


# ----------------------------------------------------------------------------------------------
# main


def download(url, path):
    """Fetch `url` to `path` unless a whole archive is there already. Raises UserError."""
    if path.exists() and _is_whole(path):
        print(f"{path} is there already")
        return
    utils.download(url, path)
    if not _is_whole(path):
        path.unlink()
        raise UserError(f"{url}: what arrived is not a whole zip archive; try again")


def _is_whole(path):
    """Whether `path` is a zip archive all of whose members have the right checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # damaged archives raise whatever they like
        return False


def prepare(found, output, seed, drop_duplicates):
    """Read the pictures `found`, audit them, split off validation and write `output`."""
    pictures, broken = read_pictures(found)
    for name in broken:
        print(f"  broken, left out: {name}")
    if broken:
        print(f"{len(broken)} broken pictures left out")
    drop = audit(pictures, find_duplicates(pictures))
    images, labels, _ = pictures["train"]
    if drop_duplicates:
        keep = torch.tensor([index not in drop for index in range(len(labels))])
        images, labels = images[keep], labels[keep]
        print(f"{len(drop)} training pictures left out")
    valid = split_validation(labels, seed)
    if valid.all():
        raise UserError(f"{len(labels)} training pictures are too few to split off validation")
    splits = {
        "train": (images[~valid], labels[~valid]),
        "val": (images[valid], labels[valid]),
        "test": pictures["test"][:2],
    }
    write_npz(output, splits)
    print_counts(splits)
    print(f"Wrote {output}")


def write_npz(path, splits):
    """Write {split: (images (N, 3, 48, 48), labels)} with the course's keys, channels last."""
    arrays = {}
    for split, (images, labels) in splits.items():
        arrays[f"{split}_images"] = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
        arrays[f"{split}_labels"] = labels.numpy()

    def write(part):
        with open(part, "wb") as file:  # given a name, savez would add an ending to it
            np.savez(file, **arrays)

    utils.write_file(path, write)


def print_counts(splits):
    """Print how many pictures of each class each split has."""
    print(f"{'':12}" + "".join(f"{split:>8}" for split in splits))
    rows = {
        split: torch.bincount(labels, minlength=len(CLASSES))
        for split, (_, labels) in splits.items()
    }
    for label, name in enumerate(CLASSES):
        print(f"{name:12}" + "".join(f"{int(row[label]):8,}" for row in rows.values()))
    print(f"{'all':12}" + "".join(f"{int(row.sum()):8,}" for row in rows.values()))


def main(argv=None):
    """Do what the command line asks for."""
    options = parse_options(argv)
    if options.folder:
        prepare(in_folder(options.folder), options.output, options.seed, options.drop_duplicates)
        return
    archive = options.archive or options.output.with_name("intel-image-classification.zip")
    if options.download:
        download(options.url, archive)
    try:
        file = zipfile.ZipFile(archive)
    except Exception as error:  # damaged archives raise whatever they like
        raise UserError(f"{archive}: not a readable zip archive ({utils.one_line(error)})")
    with file:
        prepare(in_archive(file), options.output, options.seed, options.drop_duplicates)


if __name__ == "__main__":
    utils.run_script(main)
