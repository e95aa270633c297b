"""Image files as people have them: formats, transparency, sizes, folders.

images | formats | folders
"""

import contextlib
import functools
import glob
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from utils import SIZE, UserError, one_line, printable, user_errors

IMAGE_FORMATS = (
    "JPEG", "MPO", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF", "HEIF"
)  # fmt: skip
OTHER_SUFFIXES = (  # of images that are not read; HEIC is read if pillow-heif is installed
    ".heic .heif .hif .jxl .svg .psd .xcf .exr .ico .tga .raw .dng .cr2 .cr3 .crw .nef .nrw .arw "
    ".srf .sr2 .orf .rw2 .raf .pef .srw .x3f .3fr .iiq .rwl .erf .kdc .mrw .mos .gpr "
    ".icns .cur .pcx .qoi .dds .jxr .eps .wmf .emf"
)
CONVERT = "convert to JPEG; for HEIC, `pip install pillow-heif` is enough"
ORDINARY_PIXELS = 2**30 // 12  # 89 million; a larger JPEG is decoded at an eighth of its size
MAX_PIXELS = 2 * ORDINARY_PIXELS  # decoded in 1.4 GB: RGBA and RGB, 4 bytes a pixel each
MAX_JPEG_PIXELS = 400 * 10**6  # as the largest cameras have; a progressive one takes 1.2 to 2.4 GB
Image.MAX_IMAGE_PIXELS = MAX_JPEG_PIXELS // 2  # Pillow refuses what has more than twice as many


# ----------------------------------------------------------------------------------------------
# images


def read_image(file: Any) -> Tensor:
    """The image in `file` (a path or a binary file), of any size and mode, as uint8 (3, 48, 48);
    of an animation the first frame; what is transparent over white. Raises UserError if it cannot
    be read or has more than 178 million pixels, a JPEG 400 million."""
    if not hasattr(file, "read") and not os.path.isfile(file):  # opening a pipe could block
        raise UserError(f"{file}: {'not a file' if os.path.exists(file) else 'no such file'}")
    with user_errors(f"{file}: not a readable image"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata and many pixels
        with _open_image(file) as image:
            ImageOps.exif_transpose(image, in_place=True)
            rgb = _to_rgb(image)
            if rgb.size != (SIZE, SIZE):
                rgb = rgb.resize((SIZE, SIZE), Image.Resampling.BICUBIC)  # antialiased
            return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


def _open_image(file: Any) -> Image.Image:
    """Open an image, not yet decoded, whose size is within the limits; a large JPEG at an eighth
    of its size, so its memory stays small."""
    _register_formats()
    formats = [name for name in IMAGE_FORMATS if name in Image.OPEN]  # those this Pillow has
    limit = MAX_JPEG_PIXELS
    try:
        image = Image.open(file, formats=formats)
        limit = limit if image.format in ("JPEG", "MPO") else MAX_PIXELS
        if image.width * image.height > limit:
            image.close()
            raise Image.DecompressionBombError
    except Image.DecompressionBombError:
        raise ValueError(f"more than {limit // 10**6} million pixels; shrink it")
    except UnidentifiedImageError:
        raise ValueError(f"damaged, or of a format that is not read here; {CONVERT}")
    if image.width * image.height > ORDINARY_PIXELS:
        image.draft(None, (SIZE, SIZE))  # which only JPEG has
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """`image` in mode RGB, in 8 bits, what is transparent over white. An image can have 0.7 GB: it
    is copied only where its mode changes."""
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        kind = "floats" if image.mode == "F" else "integers"  # 0..1 and 0..255 would become black
        raise ValueError(f"its pixels are {kind} of unknown range")
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
        levels = np.asarray(image)
        opaque = levels != image.info.get("transparency", -1)
        levels = np.where(opaque, levels // 257, 255).clip(0, 255)
        image = Image.fromarray(levels.astype(np.uint8))
    if image.has_transparency_data:
        drawn = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(drawn, mask=drawn)
    return image if image.mode == "RGB" else image.convert("RGB")


# ----------------------------------------------------------------------------------------------
# formats


@functools.cache
def _register_formats() -> None:
    """Load Pillow's formats, and HEIC's where its plugin is installed."""
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()


def image_suffixes() -> set[str]:
    """The file name suffixes, such as '.jpg', of the formats that `read_image` reads."""
    _register_formats()
    return {suffix for suffix, f in Image.registered_extensions().items() if f in IMAGE_FORMATS}


def is_image_name(name: str) -> bool:
    """Whether a file's suffix, in upper or lower case, is that of a format that is read."""
    return PurePath(name).suffix.lower() in image_suffixes()


def report_other_formats(where: Any, names: Iterable[str]) -> None:
    """Print how many of the files called `names` are images of formats that are not read."""
    other = {*OTHER_SUFFIXES.split()} - image_suffixes()
    counts = Counter(suffix for name in names if (suffix := PurePath(name).suffix.lower()) in other)
    if counts:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))
        line = f"{where}: skipping {kinds}, formats that are not read here; {CONVERT}"
        print(printable(line), file=sys.stderr)


# ----------------------------------------------------------------------------------------------
# folders


def expand_pattern(path: Path) -> list[Path]:
    """The paths that match a pattern such as *.jpg, which some shells leave as it is; without any,
    or if a file has that very name, `path` itself."""
    matches = [] if os.path.lexists(path) else sorted(glob.glob(str(path)))
    return [Path(match) for match in matches] or [path]


def find_images(folder: Path) -> list[Path]:
    """The image files below a folder. How many have another format is printed."""
    files = files_below(folder)
    report_other_formats(folder, map(str, files))
    return [file for file in files if is_image_name(file.name)]


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or a Mac's companion to an archive."""
    return name.startswith(".") or name == "__MACOSX"


def files_below(folder: Path) -> list[Path]:
    """The files below a folder, sorted, but for hidden ones, pipes and devices. Links to folders
    are followed; no folder is entered twice. Folders that cannot be read are named on stderr."""

    def report(error):
        print(printable(f"Skipping {error.filename}: {one_line(error)}"), file=sys.stderr)

    starts, entered, files = [folder], set(), []
    for start in starts:  # links are added to its end, so a folder inside keeps its own path
        for parent, folders, names in os.walk(start, onerror=report):
            if (real := os.path.realpath(parent)) in entered:
                folders.clear()
                continue
            entered.add(real)
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            paths = (Path(parent, name) for name in folders)
            starts += [path for path in paths if path.is_symlink()]
            files += [Path(parent, name) for name in names if not is_hidden(name)]
    # Broken links are left, to be named.
    return sorted(path for path in files if os.path.isfile(path) or not os.path.exists(path))
