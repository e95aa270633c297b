"""Make data/intel_landscapes.v2.npz from the photographs of "Intel Image Classification".

    python -m data.prepare_landscapes --download             download them (350 MB), no account
    python -m data.prepare_landscapes --archive archive.zip  from Kaggle's archive
    python -m data.prepare_landscapes --folder photographs/  from the unpacked archive

All images are resized to 48x48. A tenth of Kaggle's training images becomes the validation set.

files | images | splits | main
"""

import argparse
import functools
import hashlib
import io
import math
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data
import utils
from data import image_files
from utils import CLASSES, UserError

URL = "https://www.kaggle.com/api/v1/datasets/download/puneet6060/intel-image-classification"
OUTPUT = utils.ROOT / "data" / "intel_landscapes.v2.npz"
FOLDERS = {"seg_train": "train", "seg_test": "test"}
MAX_ENTRY_BYTES = 64 * 2**20  # unpacked; the largest photograph has 30 KB

# ----------------------------------------------------------------------------------------------
# files

File = tuple[tuple[str, ...], Callable[[], bytes]]  # the parts of its path; reads its content


def files_in_folder(folder: Path) -> Iterator[File]:
    """All files below a folder, its name included, but for hidden ones. Raises UserError if there
    is no such folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    for path in image_files.files_below(folder):
        yield path.relative_to(folder.parent).parts, path.read_bytes


def files_in_archive(archive: zipfile.ZipFile) -> Iterator[File]:
    """All files of a zip archive, but for hidden ones, to be read in place: nothing is unpacked to
    the disk. Raises UserError if an entry has a huge size."""
    for entry in sorted(archive.infolist(), key=lambda entry: entry.filename):
        if entry.file_size > MAX_ENTRY_BYTES:
            size = f"{entry.file_size / 2**20:,.0f} MiB"
            raise UserError(f"{archive.filename}: refused, {entry.filename!r} unpacks to {size}")
        parts = PurePosixPath(entry.filename.replace("\\", "/")).parts
        is_file = not entry.filename.endswith("/")  # is_dir() fails where there is no name
        if is_file and not any(image_files.is_hidden(part) for part in parts if part != ".."):
            yield parts, functools.partial(archive.read, entry)


def open_archive(path: Path) -> zipfile.ZipFile:
    """Open a zip archive. Raises UserError."""
    with utils.user_errors(f"{path}: not a readable zip archive"):
        return zipfile.ZipFile(path)


def download(url: str, path: Path) -> None:
    """Download the archive, unless it is there and undamaged. Raises UserError."""
    if path.exists() and _is_intact(path):
        print(f"{path} is already there")
        return
    data.download(url, path)
    if not _is_intact(path):
        path.unlink()
        raise UserError(f"{url}: not an intact zip archive; try again")


def _is_intact(path: Path) -> bool:
    """Whether `path` is a zip archive in which every entry has the right checksum."""
    try:
        with open_archive(path) as archive:
            return archive.testzip() is None
    except Exception:  # damaged archives raise exceptions of any type
        return False


# ----------------------------------------------------------------------------------------------
# images


class Images(NamedTuple):
    """The images of a split."""

    pixels: torch.Tensor  # uint8 (N, 3, 48, 48)
    labels: torch.Tensor  # int64 (N,)
    names: tuple[str, ...]  # such as 'train/sea/7.jpg'


def split_and_label(parts: tuple[str, ...]) -> tuple[str, int] | None:
    """('train' or 'test', label) of an image file '.../seg_train/.../<class>/<name>' or
    '.../seg_test/.../<class>/<name>', in lower or upper case; None for other files. Raises
    UserError if no folder has the name of a class."""
    folders = [part.lower() for part in parts[:-1]]
    splits = [i for i, name in enumerate(folders) if name in FOLDERS]
    if not splits or not image_files.is_image_name(parts[-1]):
        return None
    classes = [name for name in folders[splits[-1] :] if name in CLASSES]
    if not classes:
        raise UserError(f"{'/'.join(parts)}: in no folder of a class: {', '.join(CLASSES)}")
    return FOLDERS[folders[splits[-1]]], CLASSES.index(classes[-1])


def read_images(files: Iterable[File]) -> dict[str, Images]:
    """Read the images of each split in FOLDERS. Those that cannot be read are left out, and their
    names are printed. Raises UserError if a split has none of a class."""
    files = list(files)
    image_files.report_other_formats("these folders", (parts[-1] for parts, _ in files if parts))
    images = [(*key, parts[-1], read) for parts, read in files if (key := split_and_label(parts))]
    rows, broken = {split: [] for split in FOLDERS.values()}, []
    for split, label, name, read in tqdm(images, unit="image", leave=False, disable=None):
        name = f"{split}/{CLASSES[label]}/{name}"
        try:
            with utils.user_errors(name):  # damaged entries raise exceptions of any type
                rows[split].append((image_files.read_image(io.BytesIO(read())), label, name))
        except UserError:
            broken.append(name)
    for name in broken:
        print(utils.printable(f"  broken, left out: {name}"))
    if broken:
        print(f"{len(broken)} broken images left out")
    splits = {}
    for folder, split in FOLDERS.items():
        labels = {label for _, label, _ in rows[split]}
        if missing := [name for i, name in enumerate(CLASSES) if i not in labels]:
            classes = f"{folder}/<class>/, <class> being {', '.join(CLASSES)}"
            raise UserError(f"no {split} images of {', '.join(missing)}; expected in {classes}")
        pixels, labels, names = zip(*rows[split])
        splits[split] = Images(torch.stack(pixels), torch.tensor(labels), names)
    return splits


def find_duplicates(images: dict[str, Images]) -> list[list[tuple[str, int]]]:
    """Groups of equal images, each a list of (split, index)."""
    groups = defaultdict(list)
    for split, (pixels, _, _) in images.items():
        for index, image in enumerate(pixels.numpy()):
            groups[hashlib.sha256(image.tobytes()).digest()].append((split, index))
    return [group for group in groups.values() if len(group) > 1]


def audit(images: dict[str, Images]) -> set[int]:
    """Print the names of duplicate images.

    Returns the indices of the training images that --drop_duplicates leaves out: all copies of a
    test image or of an image under two labels, and all but the first copy of others.
    """
    dropped, counts = set(), Counter()
    for group in find_duplicates(images):
        train = [index for split, index in group if split == "train"]
        is_in_test = len(train) < len(group)
        has_conflict = len({int(images[split].labels[index]) for split, index in group}) > 1
        kind = "in training and test" if is_in_test and train else "in one split"
        kind += ", under two labels" if has_conflict else ""
        counts[kind] += 1
        names = " = ".join(images[split].names[index] for split, index in group)
        print(utils.printable(f"  {kind}: {names}", 10**4))
        dropped.update(train if is_in_test or has_conflict else train[1:])
    kinds = "; ".join(f"{count} {kind}" for kind, count in counts.items())
    print(f"Duplicate images: {kinds or 'none'}")
    return dropped


# ----------------------------------------------------------------------------------------------
# splits


def split_validation(labels: torch.Tensor, seed: int, fraction: float = 0.1) -> torch.Tensor:
    """A boolean mask of ceil(fraction N) random images. The classes get numbers proportional to
    their sizes, rounded by the largest remainder method."""
    total = math.ceil(fraction * len(labels))
    quotas = torch.bincount(labels, minlength=len(CLASSES)) * total / len(labels)
    sizes = quotas.floor().long()
    by_remainder = torch.argsort(quotas - sizes, descending=True, stable=True)
    sizes[by_remainder[: total - sizes.sum()]] += 1
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label, size in enumerate(sizes.tolist()):
        indices = (labels == label).nonzero()[:, 0]
        mask[indices[torch.randperm(len(indices), generator=generator)[:size]]] = True
    return mask


def write_npz(path: Path, splits: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Write {split: (images (N, 3, 48, 48), labels (N,))} with the course's keys, channels last."""
    arrays = {}
    for split, (images, labels) in splits.items():
        arrays[f"{split}_images"] = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
        arrays[f"{split}_labels"] = labels.numpy()
    utils.write_file(path, lambda file: np.savez(file, **arrays))


def print_counts(splits: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Print a table of the number of images in each class and split."""
    columns = [torch.bincount(labels, minlength=len(CLASSES)) for _, labels in splits.values()]
    rows = dict(zip(CLASSES, torch.stack(columns, 1).tolist()))
    rows["all"] = [int(column.sum()) for column in columns]
    print(f"{'':12}" + "".join(f"{split:>8}" for split in splits))
    for name, counts in rows.items():
        print(f"{name:12}" + "".join(f"{count:8,}" for count in counts))


# ----------------------------------------------------------------------------------------------
# main


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Raises UserError."""
    description = __doc__.rpartition("\n\n")[0]
    parser = utils.Parser("python -m data.prepare_landscapes", description=description)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--archive", type=Path, help="Kaggle's archive")
    source.add_argument("--folder", type=Path, help="the unpacked archive")
    source.add_argument("--download", action="store_true", help="download the archive first")
    add = parser.add_argument
    add("--url", default=URL, help="where to download the archive from (default: Kaggle)")
    output = "the .npz file to write (default: data/intel_landscapes.v2.npz)"
    add("--output", type=Path, default=OUTPUT, metavar="FILE", help=output)
    seed = "random seed of the validation split (default: %(default)s)"
    add("--seed", type=utils.number(int, 0, 2**32 - 1), default=42, help=seed)
    drop = "leave out training images that are duplicates, have two labels or are in the test set"
    add("--drop_duplicates", action="store_true", help=drop)
    args = parser.parse_args(argv)
    if args.output.suffix != ".npz" or args.output.is_dir():
        raise UserError(f"--output {args.output}: not a file name that ends in .npz")
    return args


def prepare(files: Iterable[File], args: argparse.Namespace) -> None:
    """Read the images, print their duplicates, split off the validation set, write the file."""
    images = read_images(files)
    dropped = audit(images)
    pixels, labels, _ = images["train"]
    if args.drop_duplicates:
        kept = torch.tensor([index not in dropped for index in range(len(labels))])
        pixels, labels = pixels[kept], labels[kept]
        print(f"{len(dropped)} training images left out")
    if len(labels) < 2:
        raise UserError(f"too few training images for a validation set: {len(labels)}")
    is_val = split_validation(labels, args.seed)
    if missing := [name for i, name in enumerate(CLASSES) if i not in labels[~is_val]]:
        raise UserError(f"too few training images: none is left of {', '.join(missing)}")
    splits = {
        "train": (pixels[~is_val], labels[~is_val]),
        "val": (pixels[is_val], labels[is_val]),
        "test": (images["test"].pixels, images["test"].labels),
    }
    write_npz(args.output, splits)
    print_counts(splits)
    print(f"Wrote {args.output}")


def main(argv: list[str] | None = None) -> None:
    """Do what the command line says."""
    args = parse_args(argv)
    if args.folder:
        prepare(files_in_folder(args.folder), args)
        return
    path = args.archive or args.output.with_name("intel-image-classification.zip")
    if args.download:
        download(args.url, path)
    with open_archive(path) as archive:
        prepare(files_in_archive(archive), args)


if __name__ == "__main__":
    utils.run_script(main)
