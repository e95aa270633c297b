"""Utilities that both questions share.

errors, options | seeding, devices | training | data | records, checkpoints | runs side by side |
plotting
"""

import argparse
import codecs
import contextlib
import datetime
import errno
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import timeit
import unicodedata
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["MPLBACKEND"] = "agg"  # figures go to files; a notebook's backend may not be there

import filelock
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
SPLITS = ("train", "val", "test")

# ----------------------------------------------------------------------------------------------
# errors and options


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the processor's or the GPU's memory is exhausted."""
    signs = "can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED"
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


@contextlib.contextmanager
def user_errors(text: str) -> Iterator[None]:
    """Turn an exception into a UserError, `text` and the reason; not if memory is exhausted."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{text} ({one_line(error)})")


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
    values = [getattr(args, name) for name in names]
    lists = [value if isinstance(value, list) else [value] for value in values]
    combinations = [dict(zip(names, values)) for values in itertools.product(*lists)]
    return [Namespace(**vars(args) | combination) for combination in combinations]


def number(
    kind: type, low: float, high: float, low_open: bool = False, high_open: bool = False
) -> Callable[[str], Any]:
    """An argparse type: an int or a float, as `kind` says, between the finite `low` and `high`."""
    noun = "an integer" if kind is int else "a number"
    interval = f"{'(' if low_open else '['}{low}, {high}{')' if high_open else ']'}"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # which is in no interval
        is_open_end = (low_open and value == low) or (high_open and value == high)
        if is_open_end or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun} in {interval}")
        return value

    return parse


probability = number(float, 0, 1, high_open=True)  # an argparse type


# fmt: off
def add_training_options(add: Callable, dash: str, presets: dict[str, dict]) -> None:
    """Add the training options that both scripts have. presets: {name: {argument: value}}."""
    add(f"{dash}schedule", choices=("constant", "one_cycle"), default="constant",
        help="learning-rate schedule: constant, or one cycle of linear warm-up and cosine decay "
        "(default: %(default)s)")
    add(f"{dash}label_smoothing", type=probability, default=0.0,
        help="label smoothing: target probability spread over all classes (default: %(default)s)")
    best = " ".join(to_argv(dash, presets["best"]))
    add(f"{dash}recipe", choices=presets, default="assignment",
        help=f"preset: assignment (its settings) or best: {best} (default: %(default)s)")


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
        help="number of runs at once (default: cores / threads; on a GPU, one)")
    add(f"{dash}scheduler", metavar="ADDRESS",
        help="train several runs on the workers of this Dask scheduler, tcp://HOST:PORT, in a "
        "shared folder")
    add(f"{dash}restart", action="store_true", help="discard the checkpoint: train from scratch")
    add(f"{dash}output_dir", type=Path, default=ROOT, metavar="DIR",
        help="folder of checkpoints/ and figures/ (default: the scripts' folder)")
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
    """The arguments that differ from the defaults, except those called `without`."""
    items = ((name, value) for name, value in vars(args).items() if name not in without)
    return {name: value for name, value in items if value != getattr(defaults, name)}


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


OUTPUT_ERRNOS = errno.EPIPE, errno.ENOSPC, errno.EFBIG, errno.EIO
USER_ERRNOS = (*OUTPUT_ERRNOS, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS)


def run_script(main: Callable[[], None]) -> None:
    """Run `main()`. A user's error ends with one line and status 2, an interrupt with 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, signal.default_int_handler)  # unless nohup ignores it
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and not stream.isatty():
            encoding = "utf-8-sig" if stream is sys.stdin else "utf-8"
            stream.reconfigure(encoding=encoding, errors="backslashreplace")
    try:
        main()
        print(end="", flush=True)
        return
    except UserError as error:
        message, status = f"error: {error}", 2
    except KeyboardInterrupt:
        message = "interrupted; if it was training, the same command without restart resumes it"
        status = 130
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = f"error: out of memory; reduce batch size or network ({one_line(error)})"
        status = 2
    except OSError as error:
        if error.errno not in USER_ERRNOS:
            raise
        if error.errno in OUTPUT_ERRNOS:  # the output is flushed again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:  # as in `... | head`
            sys.exit(1)
        where = error.filename or "cannot write the output"
        message, status = f"error: {where} ({one_line(error)})", 2
    print(f"{Path(sys.argv[0]).name}: {printable(message)}", file=sys.stderr)
    sys.exit(status)


# ----------------------------------------------------------------------------------------------
# seeding and devices


def seed_everything(seed: int, epoch: int = 0) -> None:
    """Seed torch on every device from (seed, epoch), so a resumed run draws the same random numbers
    as an uninterrupted one, and no random state is saved. Epoch 0 is the initialisation."""
    sequence = np.random.SeedSequence([seed, epoch])
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))


def default_device() -> str:
    """The name of the device that is used unless another is given."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def prepare_device(name: str | None = None, threads: int | None = None) -> torch.device:
    """The device called `name` (default: `default_device`), set to deterministic algorithms;
    `threads` CPU threads (default: one per core). Raises UserError if it is missing."""
    name = name or default_device()
    with user_errors(f"device {name!r} cannot be used; try cpu"):
        x = torch.zeros(1, device=name)
        x.item()
        device = x.device  # 'cpu' for 'cpu:0'
    if device.type == "mps" and not mps_works():
        raise UserError("device 'mps' lacks operations that this project needs; try cpu")
    torch.set_num_threads(threads or cpu_count())
    if device.type == "cuda":
        torch.cuda.set_device(device)  # graphs are captured on the current one
        torch.backends.cudnn.allow_tf32 = False  # TF32 keeps 10 of float32's 23 bits of mantissa
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Only warn: torch has no deterministic version of average pooling's backward pass, though
        # windows that do not overlap need none.
        torch.use_deterministic_algorithms(True, warn_only=True)
    return device


@functools.cache
def mps_works() -> bool:
    """Whether Apple's GPU is there and has the operations that older versions of torch lack."""
    if not torch.backends.mps.is_available():
        return False
    try:
        x, indices = torch.ones(2, 2, device="mps"), torch.zeros(2, dtype=torch.long, device="mps")
        F.embedding_bag(indices, x, indices[:1], mode="sum", per_sample_weights=x[0]).cpu()
        F.interpolate(x[None, None], (1, 1), mode="bilinear", antialias=True).cpu()
        with torch.autocast("mps", torch.bfloat16):
            (x @ x).cpu()
        return True
    except RuntimeError:  # NotImplementedError is one
        return False


@functools.cache
def bfloat16_is_faster() -> bool:
    """Whether this processor's convolutions are faster in bfloat16 than in float32, measured in
    some 50 ms: processors without bfloat16 instructions emulate them."""
    conv, x = nn.Conv2d(64, 64, 3, padding=1), torch.rand(8, 64, 24, 24)
    seconds = {False: [], True: []}
    with torch.inference_mode():
        for enabled in (False, True) * 6:  # in turns, for a busy machine slows both
            with torch.autocast("cpu", torch.bfloat16, enabled):
                seconds[enabled].append(timeit.timeit(lambda: conv(x), number=1))
    return min(seconds[True]) < min(seconds[False])


def cpu_count() -> int:
    """The number of CPU cores this process may use: its affinity and its container's quota."""
    is_linux = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if is_linux else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, cpu_quota())))


def cpu_quota(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """The CPU time per second that a container's control group allows, or inf."""
    version_1 = "cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"
    for names in (["cpu.max"], version_1):
        with contextlib.suppress(OSError, ValueError):
            quota, period = " ".join((cgroup / name).read_text() for name in names).split()
            return math.inf if quota in ("max", "-1") else int(quota) / int(period)
    return math.inf


# ----------------------------------------------------------------------------------------------
# training


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
# data

CLASSES = ("buildings", "forest", "glacier", "mountain", "sea", "street")
SIZE = 48  # pixels, height and width of every image
MAX_SYMBOLS = 1000  # of a pronunciation or a spelling
INVISIBLE = {  # Unicode categories
    "Cc": "CONTROL CHARACTER", "Cf": "FORMAT CHARACTER", "Zl": "LINE SEPARATOR",
    "Zp": "PARAGRAPH SEPARATOR", "Cs": "SURROGATE", "Co": "PRIVATE USE CHARACTER",
    "Cn": "UNASSIGNED CHARACTER",
}  # fmt: skip
JOINERS = "\u200c\u200d"  # zero-width, but letters of some scripts


@dataclass
class Landscapes:
    """Images of the six classes."""

    splits: dict[str, tuple[Tensor, Tensor]]  # uint8 images (N, 3, 48, 48), int64 labels (N,)
    name: str = "photographs"  # or 'sample'

    @functools.cached_property
    def fingerprint(self) -> str:
        """12 hexadecimal digits that depend on every pixel and label."""
        digest = hashlib.sha256()
        for split in SPLITS:
            for tensor in self.splits[split]:
                digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()[:12]


def load_landscapes(path: Path) -> Landscapes:
    """Read the course's .npz file (keys train_images, train_labels, val_..., test_...).

    Images: (N, 48, 48, 3), (N, 3, 48, 48) or (N, 6912), read as channels last; integers in 0..255,
    or floats in 0..1 or 0..255. Labels: (N,) or (N, 1). Raises UserError, naming file and key,
    otherwise.
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
    with user_errors(f"{path}: not a readable .npz file; prepare it again"):
        if not path.exists():
            raise UserError(f"{path}: no such file; data/README.md says how to get the data")
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        with file:
            size = sum(entry.file_size for entry in file.zip.infolist())
            if size > 4 * 2**30:  # the course's file has 0.1 GiB, in float64 0.9
                raise UserError(f"{path}: refused, it unpacks to {size / 2**30:.1f} GiB")
            if missing := [key for key in keys if key not in file]:
                raise UserError(f"{path}: has no {', '.join(missing)}; found: {', '.join(file)}")
            return {key: np.asarray(file[key]) for key in keys}  # not an array: bytes


def _as_images(array: np.ndarray, where: str) -> np.ndarray:
    """`array` in any accepted layout as uint8 (N, 3, 48, 48); a view of it if it is uint8."""
    if array.dtype.kind not in "uif":
        raise UserError(f"{where}: type {array.dtype}, not integers or floats")
    if array.shape[1:] == (SIZE * SIZE * 3,):
        array = array.reshape(-1, SIZE, SIZE, 3)
    if array.shape[1:] == (SIZE, SIZE, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.shape[1:] != (3, SIZE, SIZE):
        accepted = "(N, 48, 48, 3), (N, 3, 48, 48) or (N, 6912)"
        raise UserError(f"{where}: shape {array.shape}; expected {accepted}")
    if len(array) == 0:
        raise UserError(f"{where}: no images")
    if array.dtype != np.uint8:
        low, high, is_float = array.min(), array.max(), array.dtype.kind == "f"
        if not (low >= 0 and high <= 255):  # also for NaN
            expected = "0 to 1 or 255" if is_float else "0 to 255"
            raise UserError(f"{where}: values from {low:g} to {high:g}; expected {expected}")
        if is_float:
            array = np.rint(array * (255 if high <= 1 else 1))
        array = array.astype(np.uint8)
    return array


def _as_labels(array: np.ndarray, where: str) -> np.ndarray:
    if array.dtype.kind not in "iu":
        raise UserError(f"{where}: type {array.dtype}, not integers")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise UserError(f"{where}: shape {array.shape}; expected (N,) or (N, 1)")
    if len(array) and not (array.min() >= 0 and array.max() < len(CLASSES)):
        raise UserError(f"{where}: labels {array.min()} to {array.max()}; expected 0 to 5")
    return array.astype(np.int64)


@dataclass
class Pronunciations:
    """Words and their pronunciations."""

    splits: dict[str, list[tuple[tuple[str, ...], str]]]  # such as (('k', 'æ', 't'), 'cat')
    name: str = "pronunciations"  # or 'sample', or the name of a folder in data/

    @functools.cached_property
    def fingerprint(self) -> str:
        """12 hexadecimal digits that depend on every symbol."""
        text = json.dumps([self.splits[split] for split in SPLITS])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def load_pronunciations(folder: Path) -> Pronunciations:
    """Read train.tsv, valid.tsv and test.tsv in `folder`. Each line is phonemes separated by
    spaces, TAB, spelling. Raises UserError, naming file and line, otherwise."""
    splits = {}
    for split, name in (("train", "train.tsv"), ("val", "valid.tsv"), ("test", "test.tsv")):
        pairs = read_tsv(path := folder / name)
        swapped = [" " not in first and len(first) > 3 and " " in second for first, second in pairs]
        if 2 * sum(swapped) > len(pairs):
            raise UserError(f"{path}: phonemes come first, then the spelling; swap the columns")
        splits[split] = [(tuple(phonemes.split()), spelling) for phonemes, spelling in pairs]
    return Pronunciations(splits)


def read_tsv(path: Path) -> list[tuple[str, str]]:
    """The lines of a text file, LF or CRLF, as pairs of NFC strings. Raises UserError, naming file
    and line."""
    lines = read_text(path).removesuffix("\n").split("\n")
    return [parse_pair(line.split("\t"), f"{path}, line {i}") for i, line in enumerate(lines, 1)]


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark, or in UTF-16 with one. Raises
    UserError, naming file and line; also if the file is empty."""
    with user_errors(f"{path}: cannot be read"):
        if not path.exists():
            raise UserError(f"{path}: no such file; data/README.md says how to get the data")
        content = path.read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8; unpack it if it is packed, or save it as UTF-8 text"
        )
    if not text.removesuffix("\n"):
        raise UserError(f"{path}: is empty")
    return text


def parse_pair(fields: list[str], where: str) -> tuple[str, str]:
    """Two fields of a line as NFC strings, without spaces around them. Raises UserError."""
    fields = [field.strip() for field in fields]
    problem = None
    if len(fields) != 2:
        problem = f"{len(fields)} fields separated by tabs, expected 2"
    elif not all(fields):
        problem = "an empty field"
    elif max(map(len, fields)) > MAX_SYMBOLS:
        problem = f"a field of more than {MAX_SYMBOLS:,} characters"
    elif character := first_invisible("".join(fields)):
        name = unicodedata.name(character, INVISIBLE[unicodedata.category(character)])
        problem = f"contains U+{ord(character):04X} {name}; delete it"
    if problem:
        raise UserError(f"{where}: {problem}")
    return tuple(unicodedata.normalize("NFC", field) for field in fields)


def first_invisible(text: str) -> str | None:
    """The first character that cannot be seen, the joiners of some scripts excepted."""
    if text.isprintable():  # no need to look at each character
        return None
    invisible = (c for c in text if unicodedata.category(c) in INVISIBLE and c not in JOINERS)
    return next(invisible, None)


# ----------------------------------------------------------------------------------------------
# records and checkpoints

History = dict[str, list[float]]  # {column: one value per epoch}


@dataclass(frozen=True)
class Run:
    """One training run and its files. Two commands describe the same run if they have the same
    arguments, data and training version. The run's name ends with a hash of these three. The device
    and the number of threads are not part of them, though they change the last bits."""

    title: str  # the readable part of its name, such as 'q2-bn-gap-lr0.01-seed42-sample'
    command: str  # such as 'python hw2_q2.py -learning_rate 0.1'
    arguments: dict[str, Any]  # of training, those that differ from the defaults
    data: dict[str, str]  # name, fingerprint
    training_version: int  # the question's TRAINING_VERSION
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
    """Call `write(temporary path)`, then rename the result to `path`: whole or not at all. The
    temporary name is fixed: the next write replaces what a killed process left. Raises UserError.
    """
    temporary = path.with_name(f".{path.name}.part{path.suffix}")
    try:
        if path.exists() and not path.is_file():  # such as /dev/null, which would be replaced
            raise UserError(f"{path}: cannot be written (not a file)")
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
    for tries_left in reversed(range(tries)):
        try:
            return os.replace(source, path)
        except PermissionError:
            if os.name != "nt" or not tries_left:
                raise
            time.sleep(0.1)


def save_record(path: Path, record: dict[str, Any]) -> None:
    """Write a run record as JSON, one line per top-level key."""
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    write_file(path, lambda file: file.write_text(text, encoding="utf-8"))


def load_record(path: Path) -> dict[str, Any]:
    """Read a run record; {} if there is none. Raises UserError if it cannot be read."""
    with user_errors(f"{path}: not a readable run record; delete it"):
        if not path.exists():
            return {}
        record = json.loads(path.read_text(encoding="utf-8"))
        _check_parts(record, command=str, arguments=dict, data=dict, history=dict, measured=dict)
        return record


def _check_parts(content: Any, /, **kinds: type) -> None:
    """Raise ValueError unless a record or checkpoint has parts of these types."""
    if not isinstance(content, dict) or not all(
        isinstance(content.get(name), kind) for name, kind in kinds.items()
    ):
        raise ValueError("parts are missing")
    final, seconds = content.get("final", {}), content.get("measured", {}).get("seconds", [])
    if not isinstance(final, dict) or not isinstance(seconds, list):
        raise ValueError("its scores or times have another form")
    data = content["data"]
    if data.keys() != {"name", "fingerprint"} or not all(map(str.isprintable, data.values())):
        raise ValueError("its data are not named")
    if len(set(map(len, content["history"].values()))) > 1:
        raise ValueError("its history is incomplete")


def new_record(
    run: Run, model: nn.Module, history: History, seconds: list[float]
) -> dict[str, Any]:
    """A run's record, as yet without scores."""
    about = {"command": run.command, **run.identity, "parameters": count_parameters(model)}
    device = next(model.parameters()).device
    return about | {"history": history, "measured": measured(device, seconds)}


def count_parameters(model: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def measured(device: torch.device, seconds: list[float]) -> dict[str, Any]:
    """What differs between repetitions of a run: time, machine, versions and date."""
    memory = _from_proc("self/status", "VmHWM")  # such as '900000 kB'
    return {
        "seconds": [round(s, 3) for s in seconds],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": _from_proc("cpuinfo", "model name") or platform.processor(),
        "cores": cpu_count(),
        "threads": torch.get_num_threads(),
        "peak_memory_mib": int(memory.split()[0]) // 1024 if memory else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


@functools.cache
def commit() -> str | None:
    """The code's commit at the first call, with '-dirty' if a script differs from it, or None."""
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    if not (ROOT / ".git").exists():  # a folder above this may have commits
        return None
    try:
        name = git(["git", "rev-parse", "--short", "HEAD"], check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    code = ":(glob)*.py", "data/*.py"  # not the tests, nor the report's
    has_changed = git(["git", "diff", "--quiet", "HEAD", "--", *code]).returncode != 0
    return f"{name}-dirty" if has_changed else name


def _from_proc(file: str, name: str) -> str | None:
    """The first value called `name` in a file of Linux's /proc; None without one."""
    with contextlib.suppress(OSError):
        for line in Path("/proc", file).read_text().splitlines():
            if line.startswith(name):
                return line.partition(":")[2].strip()
    return None


def store_record(run: Run, record: dict[str, Any]) -> str:
    """Write a run's record. If the old one has the same training history, its analysis and its
    scores of other decoding are kept. Returns a line that says which file was written."""
    old, note = load_record(run.record), ""
    final, old_final = record.get("final", {}), old.get("final", {})
    is_same = bool(old) and old["history"] == record["history"]
    if is_same and not old["history"]:  # an ensemble's
        is_same = old_final.get("greedy") == final.get("greedy")
    if is_same:
        note = " (the old record had the same numbers)"
        if final.get("max_len") == old_final.get("max_len"):
            final = old_final | final
        elif final and old_final:
            note += " (scores with another --max_len are dropped)"
        record = old | ({"final": final} if final else {})
    elif old:
        note = " (the old record had other numbers, which are replaced)"
    save_record(run.record, record)
    return f"Record: {run.record}{note}"


def save_checkpoint(
    run: Run, model: nn.Module, optimizer: Optimizer, history: History, seconds: list[float], **more
) -> None:
    """Write the run's state after an epoch, and `more`, from which `resume` continues."""
    content = run.identity | {"command": run.command, "history": history, "seconds": seconds}
    content |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()} | more
    write_file(run.checkpoint, lambda file: torch.save(content, file))


def load_checkpoint(path: Path, device: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint, without running code from it. Raises UserError if it is not one."""
    with user_errors(f"{path}: not a readable checkpoint; delete it"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd files, which are refused below
        if not path.exists():
            raise UserError(f"{path}: no such checkpoint")
        with zipfile.ZipFile(path) as file:
            if sum(entry.file_size for entry in file.infolist()) > 4 * 2**30:
                raise ValueError("it unpacks to more than 4 GiB")
            if part := file.testzip():  # torch.load does not compare checksums
                raise ValueError(f"wrong checksum of {part}")
        content = torch.load(path, map_location=device, weights_only=True)
        kinds = {"command": str, "arguments": dict, "data": dict, "training_version": int}
        kinds |= {"history": dict, "seconds": list, "model": dict, "optimizer": dict}
        _check_parts(content, **kinds)
        lengths = {len(column) for column in content["history"].values()}
        if lengths != ({len(content["seconds"])} if content["seconds"] else set()):
            raise ValueError("its history is incomplete")
        json.dumps([content[name] for name in ("arguments", "history")])  # TypeError for tensors
        sum(content["seconds"])  # TypeError unless they are numbers
    return content


def require_finite(model: nn.Module) -> None:
    """Raise ValueError if a weight is not a finite number."""
    if not all(weights.isfinite().all() for weights in model.state_dict().values()):
        raise ValueError("a weight is not a finite number")


@contextlib.contextmanager
def checkpoint_errors(text: str) -> Iterator[None]:
    """`user_errors` for code that uses a checkpoint's content; it may parse its command."""
    with user_errors(text):
        try:
            yield
        except (UserError, SystemExit) as error:  # SystemExit by -h
            raise ValueError(error)


def resume(run: Run, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Load the run's checkpoint, if there is one, into `model` and `optimizer`. Returns its
    content, or empty 'history' and 'seconds'. Raises UserError if it is another run's."""
    if not run.checkpoint.exists():
        return {"history": {}, "seconds": []}
    saved = load_checkpoint(run.checkpoint, next(model.parameters()).device)
    if not run.identity.items() <= saved.items():
        raise UserError(
            f"{run.checkpoint}: belongs to another run; choose another name, or delete it"
        )
    with checkpoint_errors(f"{run.checkpoint}: does not fit the network; delete it"):
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        for weight, state in optimizer.state.items():  # fused steps do not compare shapes
            tensors = (x for name, x in state.items() if torch.is_tensor(x) and name != "step")
            if any(x.shape != weight.shape for x in tensors):
                raise ValueError("optimizer state of another shape")
    if 0 < len(saved["seconds"]) < run.epochs:
        print(f"Resuming after epoch {len(saved['seconds'])}")
    return saved


def note_shorter_run(run: Run) -> None:
    """Say so if a run with fewer epochs and else the same options is finished."""

    def options(arguments):
        return {k: v for k, v in arguments.items() if k not in ("epochs", "n_epochs")}

    for path in run.record.parent.glob(f"{glob.escape(run.title)}-*.json"):
        try:
            record = load_record(path)
        except UserError:  # a damaged record of another run
            continue
        epochs = len(record["measured"].get("seconds", ()))
        same = options(record["arguments"]) == options(run.arguments) and record["data"] == run.data
        if same and record.get("final") and 0 < epochs < run.epochs:
            print(f"Finished with fewer epochs ({epochs}): {path.stem}")
            print("This run starts from scratch; runs of other lengths are not continued")


def discard_checkpoint(run: Run) -> None:
    """Delete the run's checkpoint. Raises UserError if the file has another run's."""
    is_named = run.checkpoint_file and run.checkpoint.exists()
    if is_named and not run.identity.items() <= load_checkpoint(run.checkpoint).items():
        raise UserError(f"{run.checkpoint}: belongs to another run; choose another name")
    with user_errors(f"{run.checkpoint}: cannot be deleted"):
        run.checkpoint.unlink(missing_ok=True)


def is_trained(run: Run) -> bool:
    """Whether the run's checkpoint has all its epochs."""
    if not run.checkpoint.exists():
        return False
    saved = load_checkpoint(run.checkpoint)
    return run.identity.items() <= saved.items() and len(saved["seconds"]) == run.epochs


def finished_record(run: Run) -> dict[str, Any]:
    """The record of a run that has final scores and a checkpoint of all its epochs, or {}."""
    record = load_record(run.record)
    return record if record.get("final") and is_trained(run) else {}


def best_checkpoint(
    folder: Path, prefix: str, score: Callable[[dict], Any], default: Path | None = None
) -> Path:
    """The checkpoint prefix*.pt in `folder` with the highest score(content), which is None for one
    that does not fit; without any the default. Raises UserError."""
    scores = {}
    for path in sorted(folder.glob(f"{prefix}*.pt")):
        try:
            with checkpoint_errors(f"{path}: not usable"):
                scores[path] = score(load_checkpoint(path))
        except UserError as error:
            print(f"Skipping {error}", file=sys.stderr)
    ranking = [(value, path) for path, value in scores.items() if value is not None]
    if ranking:
        return max(ranking)[1]
    if default and default.exists():
        return default
    raise UserError(f"{folder}: no trained network there yet; train one first")


class Diverged(UserError):
    """The training loss is not a finite number."""

    def __init__(self, epoch: int, batch: int):
        self.epoch, self.batch, where = epoch, batch, f"epoch {epoch}, batch {batch}"
        super().__init__(f"the loss was not a finite number in {where}; try a lower learning rate")


def check_divergence(running_sums: Tensor, epoch: int, batch: int, batches: int) -> None:
    """Raise Diverged if the summed loss, running_sums[0], is not finite after batch 1..batches;
    running_sums[-1] counts the batches of finite loss. A GPU, which has to wait where a number is
    read, is asked every 100 batches."""
    is_due = running_sums.device.type == "cpu" or batch % 100 == 0 or batch == batches
    if is_due and not math.isfinite(running_sums[0].item()):
        raise Diverged(epoch, int(running_sums[-1].item()) + 1)


@contextlib.contextmanager
def recording_divergence(
    run: Run, model: nn.Module, history: History, seconds: list[float]
) -> Iterator[None]:
    """Write the record of a run that raises Diverged in the `with` block."""
    try:
        yield
    except Diverged as error:
        diverged = {"diverged_in_epoch": error.epoch, "diverged_in_batch": error.batch}
        save_record(run.record, new_record(run, model, history, seconds) | diverged)
        raise


@contextlib.contextmanager
def run_lock(run: Run) -> Iterator[None]:
    """Hold the lock that keeps other processes from training `run`; it ends with this process."""
    commit()  # of the code that trains; files may change meanwhile
    load_record(run.record)  # a damaged one is better known before training
    path = run.checkpoint.with_name(f"{run.checkpoint.name}.lock")
    with user_errors(f"{path}: cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = filelock.FileLock(path).acquire(timeout=0)
        except filelock.Timeout:
            raise UserError(f"{run.name}: another process is training this run")
    with lock:
        yield


# ----------------------------------------------------------------------------------------------
# runs side by side


def train_side_by_side(script: ModuleType, configs: list[Namespace]) -> None:
    """Train the runs that several sets of arguments describe, each in a process of its own.
    Finished runs are skipped, so the same command again trains what is left; `restart` retrains
    them. A run that fails does not stop the others; at the end UserError says how many failed.

    script: a question's, with DASH, load_data, make_run, finished_record, overrides and summary
    """
    args, data = configs[0], script.load_data(configs[0])
    runs, failures = {}, 0  # runs: {command: (run, its record before)}
    for config in configs:
        run, before, record = script.make_run(config, data), {}, {}
        with contextlib.suppress(UserError):  # damaged files: the run's own process says so
            before = load_record(run.record)
            record = {} if args.restart else script.finished_record(run, config)
        if record:
            note = f"(finished; {script.DASH}restart retrains it)"
            print(f"{run.name}: {script.summary(record)} {note}")
            continue
        arguments = script.overrides(config, ("jobs", "scheduler"))
        words = to_argv(script.DASH, arguments | {"threads": args.threads or 1})
        command = sys.executable, str(Path(script.__file__).resolve()), *words
        runs[command] = run, before
    device = args.device or default_device()
    at_once = cpu_count() // (args.threads or 1) if device.startswith("cpu") else 1
    results = run_processes(list(runs), args.jobs or max(1, at_once), args.scheduler)
    for result in tqdm(results, total=len(runs), unit="run", disable=None if runs else True):
        (run, before), record = runs[tuple(result.args)], {}
        with contextlib.suppress(UserError):
            record = load_record(run.record)
        if record and (result.returncode == 0 or record != before):  # scored, or it has diverged
            line = script.summary(record)
        else:
            failures += 1
            line = (result.stderr.strip().splitlines() or [f"status {result.returncode}"])[-1]
        tqdm.write(f"{run.name}: {line}")
    if failures:
        how = f", without {script.DASH}restart," * args.restart
        problem = f"{failures} of {len(configs)} runs failed"
        raise UserError(f"{problem}; run the same command{how} to retry")


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

    with dask_client(scheduler) if scheduler else ThreadPoolExecutor(jobs) as pool:
        submit = pool.get_executor().submit if scheduler else pool.submit
        run = subprocess.run if scheduler else run_here
        futures = [submit(run, list(command), **how) for command in commands]
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
    with user_errors("Dask is not installed; pip install distributed"):
        from distributed import Client
    with user_errors(f"no Dask scheduler at {address}"):
        return Client(address, timeout=10)


# ----------------------------------------------------------------------------------------------
# plotting

# Okabe and Ito's colours, which colour-blind readers can distinguish.
BLUE, VERMILION, GREEN, PURPLE, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
SKY = "#56B4E9"
STYLE = {
    "font.size": 10.5, "axes.titlesize": 10.5, "legend.fontsize": 9.5, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.6,
    "axes.grid": True, "grid.alpha": 0.3, "grid.linewidth": 0.6, "savefig.dpi": 200,
    "svg.hashsalt": "hw2",  # the same bytes again
}  # fmt: skip


def new_figure(
    width: float = 4.2, height: float = 2.9, rows: int = 1, columns: int = 1, **kwargs: Any
) -> tuple[Figure, Any]:
    """A figure of `width` x `height` inches and its axes, in the style of all figures."""
    matplotlib.rcParams.update(STYLE)  # titles and labels look here when they are set, not before
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(rows, columns, **kwargs)


def save_figure(path: Path, fig: Figure) -> None:
    """Write `fig` in the format of the path's suffix, without the date: the same bytes again."""
    fig.draw_without_rendering()
    fig.set_layout_engine("none")  # whose last digits vary
    for axes in fig.axes:
        axes.set_position(np.round(axes.get_position(original=True).bounds, 6))
    date = {".pdf": "CreationDate", ".svg": "Date"}.get(path.suffix)
    write_file(path, lambda file: fig.savefig(file, metadata={date: None} if date else None))


def plot_curve(path: Path, title: str, ylabel: str, values: list[float]) -> None:
    """Plot one value per epoch."""
    fig, axes = new_figure()
    axes.plot(range(1, len(values) + 1), values, color=BLUE, marker=".", markersize=4)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title=title, xlabel="Epoch", ylabel=ylabel)
    save_figure(path, fig)
