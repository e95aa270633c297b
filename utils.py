"""What both questions share.

errors, command line | seeding, devices | loading data | records, checkpoints | runs side by side |
plotting
"""

import argparse
import contextlib
import datetime
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import unicodedata
import urllib.request
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import URLError

os.environ["MPLBACKEND"] = "agg"  # figures go to files; a notebook's backend may not be there

import filelock
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
SPLITS = ("train", "val", "test")

# ----------------------------------------------------------------------------------------------
# errors and the command line


class UserError(Exception):
    """An error caused by user input. Its text is one line: what is wrong, where, how to fix it."""

    def __init__(self, text: str):
        super().__init__(printable(text))


def printable(text: str, limit: int = 500) -> str:
    """`text` on one line of at most `limit` characters, control characters escaped."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return line if len(line) <= limit else f"{line[: limit - 4]} ..."


def one_line(error: BaseException) -> str:
    """An exception's text on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are a `UserError`; --options cannot be abbreviated."""

    def __init__(self, prog: str, usage: str = "%(prog)s [options]", **kwargs: Any):
        layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(prog, usage, **layout, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (-h lists the options)")


class OneOrMore(argparse.Action):
    """Stores one value as it is, several as a list without duplicates; for nargs='+'."""

    def __call__(self, parser, namespace, values, option_string=None):
        values = list(dict.fromkeys(values))
        setattr(namespace, self.dest, values if len(values) > 1 else values[0])


def expand(args: Namespace, *names: str) -> list[Namespace]:
    """One namespace for each combination of the values of the arguments called `names`."""
    values = (getattr(args, name) for name in names)
    lists = [value if isinstance(value, list) else [value] for value in values]
    return [
        Namespace(**vars(args) | dict(zip(names, combination)))
        for combination in itertools.product(*lists)
    ]


def number(
    kind: type, low: float, high: float, low_open: bool = False, high_open: bool = False
) -> Callable[[str], Any]:
    """An argparse type: a finite `kind` (int or float) between `low` and `high`."""
    left, right = "(" if low_open else "[", ")" if high_open else "]"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        above = low < value if low_open else low <= value
        below = value < high if high_open else value <= high
        if not (above and below and math.isfinite(value)):
            name = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {name} in {left}{low}, {high}{right}"
            )
        return value

    return parse


probability = number(float, 0, 1, high_open=True)  # an argparse type


# fmt: off
def add_training_options(add: Callable, dash: str, presets: dict[str, dict]) -> None:
    """Add the training options that both scripts have. presets: {name: {argument: value}}."""
    add(f"{dash}schedule", choices=("constant", "one_cycle"), default="constant",
        help="learning rate: constant, or one cycle of linear warm-up and cosine decay to 0 "
        "(default: %(default)s)")
    add(f"{dash}label_smoothing", type=probability, default=0.0,
        help="probability mass spread over all outputs (default: %(default)s)")
    best = " ".join(to_argv(dash, presets["best"]))
    add(f"{dash}recipe", choices=presets, default="report",
        help=f"preset: report, the original's, or best: {best} (default: %(default)s)")


def add_runtime_options(parser: Parser, dash: str, threads: str) -> None:
    """Add the options that say where and how runs are made. threads: default of the help text."""
    add = parser.add_argument_group("seed, machine and folders").add_argument
    count = number(int, 1, 1024)
    add(f"{dash}seed", type=number(int, 0, 2**32 - 1), default=42, nargs="+", action=OneOrMore,
        help="random seed; several seeds: one run each, side by side (default: %(default)s)")
    mps = ", mps" if mps_works() else ""
    add(f"{dash}device", help=f"cpu, cuda, cuda:1{mps} (default: cuda if available, else cpu)")
    add(f"{dash}threads", type=count, help=f"CPU threads per run (default: {threads})")
    add(f"{dash}jobs", type=count,
        help="number of runs at once (default: one per core; on a GPU, one)")
    add(f"{dash}scheduler", metavar="ADDRESS",
        help="send runs to the workers of this Dask scheduler, tcp://HOST:PORT")
    add(f"{dash}restart", action="store_true", help="discard the checkpoint: train from scratch")
    add(f"{dash}output_dir", type=Path, default=ROOT, metavar="DIR",
        help="where checkpoints/ and figures/ are written (default: beside the scripts)")
# fmt: on


def parse_with_presets(
    make_parser: Callable[[], Parser], presets: dict[str, dict], argv: list[str] | None
) -> Namespace:
    """Parse the command line, the preset's values as defaults. Raises UserError."""
    parser = make_parser()
    parser.set_defaults(**presets[parser.parse_intermixed_args(argv).recipe])
    args = parser.parse_intermixed_args(argv)
    del args.recipe  # its values are in the other arguments now
    return args


def overrides(args: Namespace, defaults: Namespace, without: Iterable[str] = ()) -> dict[str, Any]:
    """The arguments, but for those called `without`, that differ from the defaults."""
    return {
        name: value
        for name, value in vars(args).items()
        if name not in without and value != getattr(defaults, name)
    }


def to_argv(dash: str, arguments: dict[str, Any]) -> list[str]:
    """Command-line words for arguments: False becomes -no_NAME, True -NAME; None is left out."""
    words = []
    for name, value in arguments.items():
        if isinstance(value, bool):
            words.append(f"{dash}{name}" if value else f"{dash}no_{name}")
        elif value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"{dash}{name}", *map(str, values)]
    return words


def run_script(main: Callable[[], None]) -> None:
    """Run `main()`. A user's error ends with one line and status 2, an interrupt with 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and not stream.isatty():  # None if closed
            encoding = "utf-8-sig" if stream is sys.stdin else "utf-8"
            stream.reconfigure(encoding=encoding, errors="backslashreplace")
    try:
        main()
        print(end="", flush=True)
    except UserError as error:
        _exit(f"error: {error}", 2)
    except KeyboardInterrupt:
        _exit("interrupted; run the same command again, without restarting, to resume", 130)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _exit(f"error: out of memory; reduce batch size or network ({one_line(error)})", 2)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        if error.errno == errno.EPIPE:  # as in `... | head`
            sys.exit(1)
        _exit(f"error: cannot write the output ({one_line(error)})", 2)


def _exit(line: str, status: int) -> None:
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(status)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the processor's or the GPU's memory is exhausted."""
    signs = "can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED"
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


# ----------------------------------------------------------------------------------------------
# seeding and devices


def seed_everything(seed: int, epoch: int = 0) -> None:
    """Seed torch on every device from (seed, epoch); epoch 0 is the initialisation.

    Each epoch has its own seed, so a resumed run draws the same random numbers as an uninterrupted
    one, and no random state is saved.
    """
    sequence = np.random.SeedSequence([seed, epoch])
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))


def prepare_device(name: str | None = None, threads: int | None = None) -> torch.device:
    """The device called `name` (default: cuda if available, else cpu), set to deterministic
    algorithms; `threads` CPU threads (default: one per core). Raises UserError if it is missing."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        x = torch.zeros(1, device=name)
        x.item()
        device = x.device  # 'cpu' for 'cpu:0'
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UserError(f"device {name!r} cannot be used ({one_line(error)}); try cpu")
    if device.type == "mps" and not mps_works():
        raise UserError("device 'mps' lacks operations that this project needs; try cpu")
    torch.set_num_threads(threads or cpu_count())
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # or float32 convolutions have 10 bits for 23
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Only warn: max pooling's backward pass adds atomically, but its windows do not overlap.
        torch.use_deterministic_algorithms(True, warn_only=True)
    return device


@functools.cache
def mps_works() -> bool:
    """Whether Apple's GPU is there and has the operations that older versions of torch lack."""
    if not torch.backends.mps.is_available():
        return False
    try:
        x, indices = torch.ones(2, 2, device="mps"), torch.zeros(2, dtype=torch.long, device="mps")
        offsets = {"offsets": indices[:1], "mode": "sum"}
        F.embedding_bag(indices, x, **offsets, per_sample_weights=x[0]).cpu()
        F.interpolate(x[None, None], (1, 1), mode="bilinear", antialias=True).cpu()
        with torch.autocast("mps", torch.bfloat16):
            (x @ x).cpu()
    except (RuntimeError, NotImplementedError):
        return False
    return True


@functools.cache
def bfloat16_is_faster() -> bool:
    """Whether this processor computes convolutions faster in bfloat16 than in float32, by a probe
    of some 50 ms: processors without bfloat16 instructions emulate them."""
    conv, x = nn.Conv2d(64, 64, 3, padding=1), torch.rand(8, 64, 24, 24)
    seconds = {False: [], True: []}
    with torch.inference_mode():
        for enabled in (False, True) * 6:
            with torch.autocast("cpu", torch.bfloat16, enabled):
                started = time.perf_counter()
                conv(x)
                seconds[enabled].append(time.perf_counter() - started)
    return min(seconds[True]) < min(seconds[False])


def cpu_count() -> int:
    """The number of CPU cores this process may use: its affinity and its container's quota."""
    has_affinity = hasattr(os, "sched_getaffinity")  # Linux only
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, cpu_quota())))


def cpu_quota(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """The CPU time per second that a container's control group allows (version 2, or 1), or inf."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (cgroup / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota = int((cgroup / "cpu/cpu.cfs_quota_us").read_text())
        period = int((cgroup / "cpu/cpu.cfs_period_us").read_text())
        return quota / period if quota > 0 else math.inf
    return math.inf


class FastDropout(nn.Dropout):
    """nn.Dropout with its mask from torch.rand: on a CPU, Bernoulli numbers take twice as long."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        mask = torch.rand_like(x, dtype=torch.float32)  # bfloat16 has too few numbers below 1
        return (x * mask.ge_(self.p).div_(1 - self.p)).to(x.dtype)


def learning_rate(schedule: str, peak: float, step: int, steps: int, warm_up: float = 0.3) -> float:
    """The learning rate of step 0..steps-1: `peak`, or, of schedule 'one_cycle' (Smith and Topin
    2018, section 3), linear warm-up to `peak`, then cosine decay to 0 as in torch's OneCycleLR."""
    if schedule == "constant":
        return peak
    progress = (step + 0.5) / steps
    if progress < warm_up:
        return peak * (progress / warm_up)
    return peak * ((1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up))) / 2)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


# ----------------------------------------------------------------------------------------------
# loading data

CLASSES = ("buildings", "forest", "glacier", "mountain", "sea", "street")
SIZE = 48  # pixels, height and width of every image
MAX_DATA_BYTES = 4 * 2**30  # unpacked; the course's file has .1 GiB, in float64 .9
MAX_TEXT_BYTES = 2**28  # WikiPron's lists have 2 MiB
MAX_SYMBOLS = 1000  # of a pronunciation or a spelling
IMAGE_FORMATS = "JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF"
BIDIRECTIONAL = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass
class Landscapes:
    """Images of the six classes.

    splits: for 'train', 'val' and 'test', uint8 images (N, 3, 48, 48) and int64 labels (N,)
    name: 'photographs' or 'sample'
    """

    splits: dict[str, tuple[Tensor, Tensor]]
    name: str = "photographs"

    @functools.cached_property
    def fingerprint(self) -> str:
        """12 hexadecimal digits that depend on every pixel and label."""
        digest = hashlib.sha256()
        for split in SPLITS:
            for tensor in self.splits[split]:
                for part in tensor.split(1000):  # one copy of the whole would take much memory
                    digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()[:12]


def load_landscapes(path: Path) -> Landscapes:
    """Read the course's .npz file (keys train_images, train_labels, val_..., test_...).

    Images: (N, 48, 48, 3), (N, 3, 48, 48) or (N, 6912), read as channels last; uint8, or floats in
    0..1 or 0..255. Labels: (N,) or (N, 1). Raises UserError, naming file and key, otherwise.
    """
    arrays = _read_npz(path, [f"{s}_{kind}" for s in SPLITS for kind in ("images", "labels")])
    splits = {}
    for split in SPLITS:
        images = _as_images(arrays[f"{split}_images"], f"{path}: {split}_images")
        labels = _as_labels(arrays[f"{split}_labels"], f"{path}: {split}_labels")
        if len(images) != len(labels):
            raise UserError(
                f"{path}: {len(images)} {split}_images but {len(labels)} {split}_labels"
            )
        splits[split] = torch.from_numpy(images), torch.from_numpy(labels)
    return Landscapes(splits)


def _read_npz(path: Path, keys: list[str]) -> dict[str, np.ndarray]:
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise UserError(f"{path}: not an .npz file, but a single array")
        with file:
            size = sum(entry.file_size for entry in file.zip.infolist())
            if size > MAX_DATA_BYTES:
                raise UserError(f"{path}: refused, it unpacks to {size / 2**30:.1f} GiB")
            if missing := [key for key in keys if key not in file]:
                raise UserError(f"{path}: has no {', '.join(missing)}; found: {', '.join(file)}")
            return {key: file[key] for key in keys}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; data/README.md says how to get the data")
    except UserError:
        raise
    except Exception as error:  # damaged zip files and headers raise exceptions of any type
        raise UserError(f"{path}: not a readable .npz file ({one_line(error)}); prepare it again")


def _as_images(array: np.ndarray, where: str) -> np.ndarray:
    """`array` in any accepted layout as uint8 (N, 3, 48, 48); a view of it if it is uint8."""
    if not (isinstance(array, np.ndarray) and (array.dtype == np.uint8 or array.dtype.kind == "f")):
        raise UserError(f"{where}: type {getattr(array, 'dtype', 'unknown')}, not uint8 or floats")
    if array.shape[1:] == (SIZE * SIZE * 3,):
        array = array.reshape(-1, SIZE, SIZE, 3)
    if array.shape[1:] == (SIZE, SIZE, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.shape[1:] != (3, SIZE, SIZE):
        raise UserError(
            f"{where}: shape {array.shape}; expected (N, {SIZE}, {SIZE}, 3), "
            f"(N, 3, {SIZE}, {SIZE}) or (N, {SIZE * SIZE * 3})"
        )
    if len(array) == 0:
        raise UserError(f"{where}: no images")
    if array.dtype.kind == "f":
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 255):  # also for NaN
            raise UserError(
                f"{where}: values from {low:g} to {high:g}; expected 0 to 1 or 0 to 255"
            )
        array = np.rint(array * (255 if high <= 1 else 1)).astype(np.uint8)
    return array


def _as_labels(array: np.ndarray, where: str) -> np.ndarray:
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        raise UserError(f"{where}: type {getattr(array, 'dtype', 'unknown')}, not integers")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise UserError(f"{where}: shape {array.shape}; expected (N,) or (N, 1)")
    if len(array) and not (array.min() >= 0 and array.max() < len(CLASSES)):
        raise UserError(f"{where}: labels {array.min()} to {array.max()}; expected 0 to 5")
    return array.astype(np.int64)


def read_image(file: Any) -> Tensor:
    """The image in `file` (a path or a binary file), of any size and mode, as uint8 (3, 48, 48);
    of an animation the first frame. Raises UserError if Pillow cannot read it or it has more than
    89 million pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning)  # about odd metadata
            with Image.open(file, formats=[f for f in IMAGE_FORMATS if f in _decoders()]) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode == "F":  # convert() would turn 0..1 into black
                    raise ValueError("its pixels are floats of unknown range")
                if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
                    levels = np.asarray(image) // 257
                    image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
                image = image.convert("RGB")
        if image.size != (SIZE, SIZE):
            image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)  # antialiased
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged images raise exceptions of any type
        raise UserError(f"{file}: not a readable image ({one_line(error)})")


@functools.cache
def _decoders() -> set[str]:
    Image.init()
    return set(Image.OPEN)


def image_suffixes() -> set[str]:
    """The file name suffixes, such as '.jpg', of the formats that `read_image` reads."""
    return {suffix for suffix, f in Image.registered_extensions().items() if f in IMAGE_FORMATS}


@dataclass
class Pronunciations:
    """Words and their pronunciations.

    splits: for 'train', 'val' and 'test', a list of (phonemes, spelling): a tuple of symbols such
    as ('k', 'æ', 't') and a string
    name: 'pronunciations', 'sample', or that of a folder in data/
    """

    splits: dict[str, list[tuple[tuple[str, ...], str]]]
    name: str = "pronunciations"

    @property
    def fingerprint(self) -> str:
        """12 hexadecimal digits that depend on every symbol."""
        text = json.dumps([self.splits[split] for split in SPLITS])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def load_pronunciations(folder: Path) -> Pronunciations:
    """Read train.tsv, valid.tsv and test.tsv in `folder`.

    Each line is phonemes separated by spaces, TAB, spelling; UTF-8 with or without a byte order
    mark, LF or CRLF; text is normalised to NFC. Raises UserError, naming file and line, otherwise.
    """
    files = {"train": "train.tsv", "val": "valid.tsv", "test": "test.tsv"}
    pairs = {split: read_tsv(Path(folder) / name) for split, name in files.items()}
    return Pronunciations(
        {split: [(tuple(a.split()), b) for a, b in rows] for split, rows in pairs.items()}
    )


def read_tsv(path: Path) -> list[tuple[str, str]]:
    """The lines of a file as pairs of NFC strings. Raises UserError, naming file and line."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1)
        if len(content) > MAX_TEXT_BYTES:
            raise UserError(f"{path}: refused, larger than {MAX_TEXT_BYTES / 2**20:.0f} MiB")
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; data/README.md says how to get the data")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8")
    lines = text.replace("\r\n", "\n").split("\n")
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise UserError(f"{path}: is empty")
    return [_parse_pair(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _parse_pair(line: str, where: str) -> tuple[str, str]:
    fields = [field.strip() for field in line.split("\t")]
    if len(fields) != 2:
        raise UserError(f"{where}: {len(fields)} fields separated by tabs, expected 2")
    if not all(fields):
        raise UserError(f"{where}: an empty field")
    if max(map(len, fields)) > MAX_SYMBOLS:
        raise UserError(f"{where}: a field of more than {MAX_SYMBOLS:,} characters")
    if any(unicodedata.category(c) == "Cc" or c in BIDIRECTIONAL for c in "".join(fields)):
        raise UserError(f"{where}: a control character")
    return tuple(unicodedata.normalize("NFC", field) for field in fields)


def download(url: str, path: Path) -> None:
    """Download `url` to `path`, whole or not at all. Raises UserError."""
    print(f"Downloading {url}")
    write_file(path, lambda part: _fetch(url, part))


def _fetch(url: str, path: Path) -> None:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "hw2"})
        with urllib.request.urlopen(request, timeout=60) as response, open(path, "wb") as output:
            size = int(response.headers.get("Content-Length", 0)) or None
            bar = {"total": size, "desc": "download", "leave": False, "disable": None}
            with tqdm.wrapattr(output, "write", **bar) as output:
                shutil.copyfileobj(response, output)
        if size not in (None, path.stat().st_size):
            raise ConnectionError(f"only {path.stat().st_size:,} of {size:,} bytes arrived")
    except (URLError, ConnectionError, TimeoutError, HTTPException, ValueError) as error:
        raise UserError(f"{url}: {one_line(error)}; data/README.md names other ways")


# ----------------------------------------------------------------------------------------------
# records and checkpoints


@dataclass(frozen=True)
class Run:
    """One training run and its files.

    Its identity, of which its name has a hash, is all that can change its result but for device
    and threads: the arguments that differ from the defaults (seed included), name and fingerprint
    of its data, and the question's TRAINING_VERSION.
    """

    title: str  # the readable part of its name, such as 'q2-bn-gap-lr0.01-seed42-sample'
    command: str  # such as 'python hw2_q2.py -learning_rate 0.1'
    arguments: dict[str, Any]  # those that differ from the defaults
    data: dict[str, str]  # name, fingerprint
    training_version: int
    epochs: int
    folder: Path = ROOT
    checkpoint_file: Path | None = None  # default: the run's name in checkpoints/

    @property
    def identity(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("arguments", "data", "training_version")}

    @property
    def name(self) -> str:
        text = json.dumps(self.identity, sort_keys=True)
        return f"{self.title}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def checkpoint(self) -> Path:
        return self.checkpoint_file or self.folder / "checkpoints" / f"{self.name}.pt"

    @property
    def record(self) -> Path:
        return self.folder / "figures" / "runs" / f"{self.name}.json"

    @property
    def figures(self) -> Path:
        return self.folder / "figures" / self.name


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary path)`, then rename the result to `path`: whole or not at all.

    The temporary name is fixed, so the next write replaces what a killed process left. Raises
    UserError if the file cannot be written; what stood at `path` stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # before the rename, or a power cut could leave an empty file
        _replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        raise UserError(f"{path}: cannot be written ({one_line(error)})")
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _replace(source: Path, path: Path, tries: int = 20) -> None:
    """os.replace, which Windows denies for the moment that another process reads `path`."""
    for left in reversed(range(tries)):
        try:
            return os.replace(source, path)
        except PermissionError:
            if os.name != "nt" or left == 0:
                raise
            time.sleep(0.1)


def save_record(path: Path, record: dict[str, Any]) -> None:
    """Write a run record as JSON, one line per top-level key."""
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    write_file(path, lambda file: file.write_text(text, encoding="utf-8"))


def load_record(path: Path) -> dict[str, Any]:
    """Read a run record; {} if there is none. Raises UserError if it cannot be read."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable run record ({one_line(error)}); delete it")
    kinds = {"command": str, "arguments": dict, "data": dict, "history": dict, "measured": dict}
    if not isinstance(record, dict) or not all(
        isinstance(record.get(name), kind) for name, kind in kinds.items()
    ):
        raise UserError(f"{path}: not a run record; delete it")
    return record


def save_checkpoint(
    run: Run,
    model: nn.Module,
    optimizer: Optimizer,
    history: dict[str, list[float]],
    seconds: list[float],
    **more: Any,
) -> None:
    """Write the run's state after an epoch, from which `resume` continues; `more` is kept with it.

    history: {column: one value per epoch}; seconds: one value per epoch.
    """
    content = run.identity | {"command": run.command, "history": history, "seconds": seconds}
    content |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()} | more
    write_file(run.checkpoint, lambda file: torch.save(content, file))


def load_checkpoint(path: Path, device: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint without running code from it. Raises UserError if it is missing, damaged
    or not one of this project's."""
    try:
        with zipfile.ZipFile(path) as file:
            if part := file.testzip():  # torch.load does not compare checksums
                raise ValueError(f"wrong checksum of {part}")
        with warnings.catch_warnings():  # about odd files, which are refused below
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})")
    except Exception as error:  # the unpickler of a damaged file raises exceptions of any type
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path}: not a readable checkpoint ({one_line(error)}); delete it")
    kinds = {"command": str, "arguments": dict, "data": dict, "training_version": int}
    kinds |= {"history": dict, "seconds": list, "model": dict, "optimizer": dict}
    if not isinstance(content, dict) or not all(
        isinstance(content.get(name), kind) for name, kind in kinds.items()
    ):
        raise UserError(f"{path}: not a checkpoint of this project")
    return content


CONTENT_ERRORS = RuntimeError, ValueError, LookupError, TypeError, AttributeError


@contextlib.contextmanager
def checkpoint_errors(what: str) -> Iterator[None]:
    """Raise UserError, `what` and why, if a checkpoint's content does not fit its use."""
    try:
        yield
    except (*CONTENT_ERRORS, UserError, SystemExit) as error:  # the last by -h in a command
        if is_out_of_memory(error):
            raise
        raise UserError(f"{what} ({one_line(error)})")


def resume(run: Run, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Load the run's last finished epoch into `model` and `optimizer`, if there is one.

    Returns the checkpoint's content, or empty 'history' and 'seconds'. Raises UserError.
    """
    if not run.checkpoint.exists():
        return {"history": {}, "seconds": []}
    saved = load_checkpoint(run.checkpoint, next(model.parameters()).device)
    if any(saved[name] != value for name, value in run.identity.items()):
        raise UserError(f"{run.checkpoint}: belongs to another run; delete it")
    with checkpoint_errors(f"{run.checkpoint}: does not fit the network; delete it"):
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        for weight, state in optimizer.state.items():  # fused steps do not compare shapes
            for name, value in state.items():
                if torch.is_tensor(value) and name != "step" and value.shape != weight.shape:
                    raise ValueError("optimizer state of another shape")
    if 0 < len(saved["seconds"]) < run.epochs:
        print(f"Resuming after epoch {len(saved['seconds'])}")
    return saved


def is_trained(run: Run) -> bool:
    """Whether the run's checkpoint has all its epochs."""
    if not run.checkpoint.exists():
        return False
    saved = load_checkpoint(run.checkpoint)
    is_same = all(saved[name] == value for name, value in run.identity.items())
    return is_same and len(saved["seconds"]) == run.epochs


def finished_record(run: Run) -> dict[str, Any]:
    """The record of a run that has final scores and a checkpoint of all its epochs, or {}."""
    record = load_record(run.record)
    return record if "final" in record and is_trained(run) else {}


def store_record(run: Run, record: dict[str, Any]) -> str:
    """Write a run's record. If one is there with the same history, it is completed: it keeps the
    report's analysis and scores of other decoding. Returns a line that says so."""
    old, note = load_record(run.record), ""
    if old and old["history"] == record["history"]:
        note = " (training had the same numbers before)"
        final, old_final = record.get("final", {}), old.get("final", {})
        if final.get("max_len") == old_final.get("max_len"):
            final = old_final | final
        record = old | ({"final": final} if final else {})
    elif old:
        note = " (training had other numbers before, which are replaced)"
    save_record(run.record, record)
    return f"Record: {run.record}{note}"


@contextlib.contextmanager
def recording_divergence(
    run: Run, model: nn.Module, history: dict, seconds: list[float]
) -> Iterator[None]:
    """Write the record of a run that raises Diverged inside."""
    try:
        yield
    except Diverged as error:
        diverged = {"diverged_in_epoch": error.epoch, "diverged_in_batch": error.batch}
        save_record(run.record, new_record(run, model, history, seconds) | diverged)
        raise


@contextlib.contextmanager
def run_lock(run: Run) -> Iterator[None]:
    """Keep other processes from training `run`. The lock ends with its process, its empty file
    stays. Raises UserError if another process holds it."""
    commit()  # of the code that trains; files may change meanwhile
    path = run.checkpoint.with_name(f"{run.checkpoint.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path).acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{run.name}: another process is training this run")
    except (OSError, NotImplementedError) as error:
        raise UserError(f"{path}: cannot be written ({one_line(error)})")
    with lock:
        yield


def best_checkpoint(folder: Path, prefix: str, score: Callable[[dict], Any]) -> Path:
    """The checkpoint prefix*.pt in `folder` with the highest score(content); None excludes one.
    Raises UserError if there is none."""
    scored = []
    for path in sorted(folder.glob(f"{prefix}*.pt")):
        try:
            with checkpoint_errors(f"{path}: not usable"):
                value = score(load_checkpoint(path))
        except UserError as error:
            print(f"Skipping {error}", file=sys.stderr)
            continue
        if value is not None:
            scored.append((value, path))
    if not scored:
        raise UserError(f"{folder}: no trained network there yet; train one first")
    return max(scored)[-1]


class Diverged(UserError):
    """The training loss is no finite number any more."""

    def __init__(self, epoch: int, batch: int):
        super().__init__(
            f"training stopped: the loss was no longer a finite number in epoch {epoch}, "
            f"batch {batch}; try a lower learning rate"
        )
        self.epoch, self.batch = epoch, batch


CHECK_EVERY = 100  # batches; reading a number back makes a GPU wait


def check_divergence(running_sums: Tensor, epoch: int, batch: int, batches: int) -> None:
    """Raise Diverged if the summed loss, running_sums[0], is not finite after batch 1..batches;
    running_sums[-1] counts the batches of finite loss."""
    is_due = running_sums.device.type == "cpu" or batch % CHECK_EVERY == 0 or batch == batches
    if is_due and not math.isfinite(running_sums[0].item()):
        raise Diverged(epoch, int(running_sums[-1].item()) + 1)


def new_record(run: Run, model: nn.Module, history: dict, seconds: list[float]) -> dict[str, Any]:
    """A run's record, as yet without scores."""
    return {
        "command": run.command,
        **run.identity,
        "parameters": count_parameters(model),
        "history": history,
        "measured": measured(next(model.parameters()).device, seconds),
    }


def count_parameters(model: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def measured(device: torch.device, seconds: list[float]) -> dict[str, Any]:
    """What differs between repetitions of a run: time, machine, versions and date."""
    return {
        "seconds": [round(s, 3) for s in seconds],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": _processor(),
        "cores": cpu_count(),
        "threads": torch.get_num_threads(),
        "peak_memory_mib": _peak_memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


@functools.cache
def commit() -> str | None:
    """The commit of the code at the first call, '-dirty' behind it if a script was changed since;
    None without one."""
    if not (ROOT / ".git").exists():  # a folder above this may have commits
        return None
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    try:
        name = git(["git", "describe", "--always", "--exclude=*"], check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    changed = git(["git", "diff", "--quiet", "HEAD", "--", "*.py"]).returncode
    return f"{name}-dirty" if changed else name


def _peak_memory() -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) // 1024
    except (OSError, ValueError, IndexError):  # not Linux
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


# ----------------------------------------------------------------------------------------------
# runs side by side


def train_side_by_side(
    script: ModuleType,
    configs: list[Namespace],
    is_finished: Callable = lambda run, args: finished_record(run),
) -> None:
    """Train the runs that several sets of arguments describe, each in a process of its own.

    script: the question's module; is_finished(run, arguments): the record of a finished run, or {}.
    Finished runs are skipped, so the same command again trains what is left; `restart` retrains
    them. A run that fails does not stop the others; at the end UserError says how many failed.
    """
    args, data = configs[0], script.load_data(configs[0])
    runs, before = {}, {}
    for config in configs:
        run = script.make_run(config, data)
        if not args.restart and (record := is_finished(run, config)):
            print(
                f"{run.name}: {script.summary(record)} (finished; {script.DASH}restart retrains it)"
            )
            continue
        command = process_command(script, config)
        runs[command], before[command] = run, load_record(run.record)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    at_once = cpu_count() // (args.threads or 1) if device.startswith("cpu") else 1
    jobs = args.jobs or max(1, at_once)
    results, failures = run_processes(list(runs), jobs, args.scheduler), 0
    for result in tqdm(results, total=len(runs), unit="run", disable=None if runs else True):
        run, old = runs[tuple(result.args)], before[tuple(result.args)]
        record = load_record(run.record)
        has_diverged = "diverged_in_epoch" in record and record != old
        if (result.returncode == 0 and record) or has_diverged:
            line = script.summary(record)
        else:
            failures += 1
            line = (result.stderr.strip().splitlines() or [f"status {result.returncode}"])[-1]
        tqdm.write(f"{run.name}: {line}")
    if failures:
        raise UserError(f"{failures} of {len(configs)} runs failed; run the same command to retry")


def process_command(script: ModuleType, args: Namespace) -> tuple[str, ...]:
    """The command of a process that trains one run, on one thread if the arguments do not say."""
    arguments = script.overrides(args, ("jobs", "scheduler"))
    arguments["threads"] = args.threads or 1
    path = str(Path(script.__file__).resolve())
    return sys.executable, path, *to_argv(script.DASH, arguments)


def run_processes(
    commands: list[tuple[str, ...]], jobs: int, scheduler: str | None = None
) -> Iterator[subprocess.CompletedProcess]:
    """Run commands, `jobs` at once or on the workers of a Dask scheduler; yield each one's result
    as it ends. Leaving early cancels the others and terminates those that run here."""
    how = {"cwd": os.getcwd(), "stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    how |= {"stderr": subprocess.PIPE, "encoding": "utf-8", "errors": "replace"}
    children, leaving = [], threading.Event()

    def run_here(command, **how):
        with subprocess.Popen(command, **how) as child:
            children.append(child)
            if leaving.is_set():  # started while the others were terminated
                child.terminate()
            errors = child.communicate()[1]
        return subprocess.CompletedProcess(command, child.returncode, stderr=errors)

    with contextlib.ExitStack() as stack:
        if scheduler:
            pool = stack.enter_context(dask_client(scheduler)).get_executor()
        else:
            pool = stack.enter_context(ThreadPoolExecutor(jobs))
        run = subprocess.run if scheduler else run_here
        futures = [pool.submit(run, list(command), **how) for command in commands]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            leaving.set()
            for future in futures:
                future.cancel()
            for child in children:
                child.terminate()


def dask_client(address: str) -> Any:
    """A client of the Dask scheduler at `address`. Raises UserError."""
    try:
        from distributed import Client
    except ImportError:
        raise UserError("Dask is not installed; pip install distributed")
    try:
        return Client(address, timeout=10)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"no Dask scheduler at {address} ({one_line(error)})")


# ----------------------------------------------------------------------------------------------
# plotting

# Okabe and Ito's colours, which colour-blind readers can distinguish.
BLUE, VERMILION, GREEN, PURPLE, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
SKY = "#56B4E9"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "savefig.dpi": 200,
    "svg.hashsalt": "hw2",
}


def new_figure(
    width: float = 4.2, height: float = 2.9, rows: int = 1, columns: int = 1, **kwargs: Any
) -> tuple[Figure, Any]:
    """A figure of `width` x `height` inches and its axes, in the style of all figures."""
    matplotlib.rcParams.update(STYLE)  # titles and labels look here when they are set, not before
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(rows, columns, **kwargs)


def save_figure(path: Path, fig: Figure) -> None:
    """Write `fig` in the format of the path's suffix, without the date: the same bytes again."""
    date = {".pdf": "CreationDate", ".svg": "Date"}.get(Path(path).suffix)
    write_file(path, lambda file: fig.savefig(file, metadata={date: None} if date else None))


def plot_curve(path: Path, title: str, ylabel: str, values: list[float]) -> None:
    """Plot one value per epoch."""
    fig, axes = new_figure()
    axes.plot(range(1, len(values) + 1), values, color=BLUE, marker=".", markersize=4)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title=title, xlabel="Epoch", ylabel=ylabel)
    save_figure(path, fig)
