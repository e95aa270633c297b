"""What both questions share.

errors, command line | seeding, devices | loading data | run records, checkpoints | running many
runs | report | plotting
"""

import argparse
import contextlib
import datetime
import difflib
import fnmatch
import functools
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import unicodedata
import urllib.request
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import filelock
import joblib
import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
SPLITS = ("train", "val", "test")

# ----------------------------------------------------------------------------------------------
# errors and the command line


class UserError(Exception):
    """Something the user can mend. Its text is one line: what is wrong, where, how to mend it."""

    def __init__(self, text):
        super().__init__(printable(text))


class Damaged(UserError):
    """A record whose content is not what this project wrote."""


def printable(text, most=500):
    """A text on one line, without characters that a terminal would obey, not too long."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return line if len(line) <= most else f"{line[: most - 4]} ..."


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Names each option's default, but for those whose default needs a sentence of its own."""

    def _get_help_string(self, action):
        switch = action.default in (None, []) or isinstance(action.default, bool)
        plain = switch or "(default" in action.help
        return action.help if plain else super()._get_help_string(action)


NEGATIVE = re.compile(r"-\.?\d")  # how a negative number begins, or what is meant as one


def _is_of_a_system(word):
    """Whether the system could have given this argument: lone surrogates and NUL are none of its
    characters."""
    try:
        return b"\0" not in os.fsencode(word)
    except UnicodeEncodeError:
        return False


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with the nearest option for an unknown one."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        self._negative_number_matcher = NEGATIVE  # argparse's own takes -1e3 for an option

    def parse_args(self, args=None, namespace=None):
        words = list(sys.argv[1:] if args is None else args)
        for word in words:
            if not _is_of_a_system(word):  # a path of it would fail late, and not as an OSError
                self.error(f"{word!r}: has a character that no file's name can have")
        named = words[: words.index("--")] if "--" in words else words
        unknown = [word for word in named if self._looks_unknown(word)]  # also a shortened name
        if not unknown:
            options, unknown = self.parse_known_intermixed_args(words, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0], self._option_string_actions, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unknown argument {unknown[0]}{hint}")
        return options

    def _looks_unknown(self, word):
        name = word.partition("=")[0]
        is_option = word.startswith("-") and word.strip("-") and not NEGATIVE.match(word)
        return is_option and name not in self._option_string_actions

    def arguments(self, options):
        """The arguments that say what `options`, a dictionary, says beyond the defaults."""
        words = []
        for action in self._actions:
            value = options.get(action.dest)
            if value is None or value == action.default:
                continue
            values = value if isinstance(value, list) else [] if action.nargs == 0 else [value]
            words += [*action.option_strings[:1], *map(str, values)]
        return words

    def error(self, message):
        message = printable(message)
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} -h)\n")


def check_command(parse_options, command):
    """Raise ValueError if the command line that a file claims to be of is refused."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            parse_options(command.split()[2:])
    except SystemExit:
        raise ValueError(errors.getvalue())


class OneOrMore(argparse.Action):
    """Stores one value as it is, several as a list, each once; for an option with nargs='+'."""

    def __call__(self, parser, namespace, values, option_string=None):
        values = list(dict.fromkeys(values))
        setattr(namespace, self.dest, values if len(values) > 1 else values[0])


def each(options, *names):
    """The namespace `options` once for each combination of the values of those called `names`."""
    values = (getattr(options, name) for name in names)
    lists = [value if isinstance(value, list) else [value] for value in values]
    return [
        argparse.Namespace(**vars(options) | dict(zip(names, combination)))
        for combination in itertools.product(*lists)
    ]


def number(kind, low, high, low_open=False, high_open=False):
    """An argparse type: a finite `kind` (int or float) between `low` and `high`."""
    left, right = "(" if low_open else "[", ")" if high_open else "]"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        inside = low < value if low_open else low <= value
        inside &= value < high if high_open else value <= high
        if not (inside and math.isfinite(value)):
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {name} in {left}{low}, {high}{right}"
            )
        return value

    return parse


def add_machine_options(parser, dash):
    """Add what both scripts ask about seed, machine and places; `dash` is '-' or '--'."""
    group = parser.add_argument_group("seed, machine and places")
    several = {"nargs": "+", "action": OneOrMore}
    seed = "random seed; several: a run for each, side by side"
    group.add_argument(
        f"{dash}seed", type=number(int, 0, 2**32 - 1), default=42, help=seed, **several
    )
    device = "cpu, cuda, cuda:1, mps, ... (default: cuda where there is one, else cpu)"
    group.add_argument(f"{dash}device", help=device)
    threads = "CPU threads a run (default: one a core; one where runs go side by side)"
    group.add_argument(f"{dash}threads", type=number(int, 1, 1024), help=threads)
    jobs = "runs at once, where there are several (default: one a core; on a GPU, one; with "
    jobs += "a scheduler, as many as its workers have threads)"
    group.add_argument(f"{dash}jobs", type=number(int, 1, 1024), help=jobs)
    scheduler = "spread several runs over the workers of this Dask scheduler, tcp://HOST:PORT"
    group.add_argument(f"{dash}scheduler", metavar="ADDRESS", help=scheduler)
    restart = "forget an unfinished run, of several runs the finished ones too, and begin anew"
    group.add_argument(f"{dash}restart", action="store_true", help=restart)
    folder = "where checkpoints/ and figures/ are written (default: beside the scripts)"
    group.add_argument(f"{dash}output_dir", type=Path, default=ROOT, help=folder)


def add_recipe_options(group, dash, recipes):
    """Add what both scripts ask about trainings beyond the report's. recipes: {name: {option: its
    default}}, the first without any."""
    _, best = recipes
    words = []
    for name, value in recipes[best].items():
        values = value if isinstance(value, list) else [value]
        words += [f"{dash}{name}", *(str(v) for v in values if v is not True)]
    recipe = f"the report's training, or one meant to be better: {' '.join(words)}"
    group.add_argument(f"{dash}recipe", choices=recipes, default="report", help=recipe)
    schedule = "the learning rate: as it is, or up to it and down to 0, once"
    kinds = {"choices": ("constant", "one_cycle"), "default": "constant"}
    group.add_argument(f"{dash}schedule", help=schedule, **kinds)
    smooth = "share of a label that is spread over all that there are"
    share = number(float, 0, 1, high_open=True)
    group.add_argument(f"{dash}label_smoothing", type=share, default=0.0, help=smooth)


def parse_with_recipe(parser, recipes, argv):
    """The command line as a namespace, what it leaves open as the recipe says that it names; so
    says -h, too."""
    [option] = [action.option_strings[0] for action in parser._actions if action.dest == "recipe"]
    first = Parser(prog=parser.prog, add_help=False)
    first.add_argument(option, dest="recipe")
    parser.set_defaults(**recipes.get(first.parse_known_args(argv)[0].recipe, {}))
    return parser.parse_args(argv)


def chosen_options(options, names, later):
    """A namespace's options called `names`, and those of `later`, {name: usual value}, that say
    something else, as a dictionary."""
    unusual = [name for name, usual in later.items() if getattr(options, name) != usual]
    return {name: getattr(options, name) for name in (*names, *unusual)}


def run_script(main):
    """Run `main()`; what a user can mend or asked for ends with one line and status 2 or 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to end as tidily as by Ctrl-C
    commit()
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            usual = "utf-8-sig" if stream is sys.stdin else "utf-8"  # as editors may begin files
            encoding = None if stream.isatty() else usual  # Windows has another for files
            stream.reconfigure(encoding=encoding, errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        sys.exit(_say(f"error: {error}", 2))
    except KeyboardInterrupt:
        anew = {"-restart", "--restart"} & set(sys.argv)
        how = f", without {anew.pop()}" if anew else ""
        sys.exit(_say(f"interrupted; to go on, run the same command again{how}", 130))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        line = "error: out of memory; a smaller batch size or network needs less"
        sys.exit(_say(f"{line} ({one_line(error)})", 2))
    except OSError as error:  # a full disk below the output, a name that no system takes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where its rest goes
        if isinstance(error, BrokenPipeError):  # as in `... | head`: nobody reads on
            sys.exit(1)
        sys.exit(_say(f"error: {printable(str(error))}", 2))


def is_out_of_memory(error):
    """Whether an exception says that memory, the processor's or the GPU's, was short."""
    signs = "can't allocate memory", "not enough memory", "out of memory"
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def _say(line, status):
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    return status


# ----------------------------------------------------------------------------------------------
# seeding and devices


def seed_everything(seed, epoch=0):
    """Seed torch, on every device, from (seed, epoch).

    Each epoch starts from a seed of its own (0 is the model's initialisation), so a run that was
    killed continues exactly where an undisturbed one would be, and no random state is ever saved.
    """
    torch.manual_seed(
        int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1)
    )


def prepare_device(name=None, threads=None):
    """The torch.device called `name` (default: cuda where there is one, else cpu), set up to
    repeat itself bit for bit; `threads` CPU threads (default: one a core).

    Raises UserError if this machine lacks the device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UserError(f"device {name!r} cannot be used ({one_line(error)}); try cpu")
    torch.set_num_threads(threads or len(cores()))
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # where graphs are captured
        torch.backends.cudnn.allow_tf32 = False  # or float32 convolutions have 10 bits for 23
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Only warn: max pooling's backward pass adds atomically, but its windows do not overlap.
        torch.use_deterministic_algorithms(True, warn_only=True)
    return device


class Dropout(nn.Dropout):
    """nn.Dropout with its mask from torch.rand: on a CPU, Bernoulli numbers take twice as long."""

    def forward(self, x):
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        mask = torch.rand_like(x, dtype=torch.float32)  # bfloat16 has too few numbers below 1
        return (x * mask.ge_(self.p).div_(1 - self.p)).to(x.dtype)


def cores():
    """The CPU cores this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")  # Linux only
    return os.sched_getaffinity(0) if has_affinity else range(os.cpu_count() or 1)


def one_cycle(step, optimizer, peak, begun, steps, warm_up=0.3):
    """`step`, with the learning rate set before each call, of which `begun` of `steps` are past:
    one cycle (Smith and Topin 2018, section 3), up to `peak` along a line, and, as torch's
    OneCycleLR, down to 0 along a cosine."""
    count = itertools.count(begun)

    def stepped(*batch):
        past = (next(count) + 0.5) / steps
        down = (1 + math.cos(math.pi * (past - warm_up) / (1 - warm_up))) / 2
        for group in optimizer.param_groups:
            group["lr"] = peak * (past / warm_up if past < warm_up else down)
        step(*batch)

    return stepped


class GraphedStep:
    """step(*tensors), captured as one CUDA graph for each shape of its tensors and then replayed.

    A small step spends most of its time launching kernels one by one; a graph launches them at
    once. `step` reads nothing but its tensors and writes nothing but `model`, `optimizer`'s state
    and `totals`, all of which are put back as they were after the rehearsals that CUDA needs.
    """

    def __init__(self, step, model, optimizer, totals):
        self.step, self.model, self.optimizer, self.totals = step, model, optimizer, totals
        self.replays = {}  # by the shapes of the tensors

    def __call__(self, *tensors):
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self.replays:
            inputs = [tensor.clone() for tensor in tensors]
            self._rehearse(inputs)
            self.replays[shapes] = inputs, record_graph(self.step, inputs)
        inputs, replay = self.replays[shapes]
        for place, tensor in zip(inputs, tensors):
            place.copy_(tensor)
        replay()

    @torch.no_grad()
    def _put_back(self, before):
        for tensor in self._state():  # what the optimizer has made meanwhile starts at zero
            tensor.copy_(before[tensor]) if tensor in before else tensor.zero_()
        self.optimizer.zero_grad()

    def _rehearse(self, inputs):
        """Run the step so that libraries choose their kernels and the optimizer makes its state."""
        before = {tensor: tensor.detach().clone() for tensor in self._state()}
        device = self.totals.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), on_side_stream(device):
            for _ in range(3):
                self.step(*inputs)
        self._put_back(before)

    def _state(self):
        states = self.optimizer.state.values()
        inside = [value for state in states for value in state.values() if torch.is_tensor(value)]
        return [*self.model.parameters(), *self.model.buffers(), *inside, self.totals]


@contextlib.contextmanager
def on_side_stream(device):
    """Run on a CUDA stream of its own, after what was queued before and before what comes after."""
    if device.type != "cuda":
        yield
        return
    main, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield
    main.wait_stream(side)


def record_graph(step, inputs):
    """Capture step(*inputs) without running it; a function that runs what was captured."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*inputs)
    return graph.replay


# ----------------------------------------------------------------------------------------------
# loading data

CLASSES = ("buildings", "forest", "glacier", "mountain", "sea", "street")
BIDIRECTIONAL = set(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)  # may hide text
SIZE = 48  # pixels, the height and width of every picture
MOST_BYTES = 4 * 2**30  # of a data file, unpacked; the course's is .1 GiB, in float64 it is .9
MOST_SYMBOLS = 1000  # of a word's sound or spelling
MOST_TEXT = 2**28  # bytes of a list of words; WikiPron's have two million


@dataclass
class Landscapes:
    """Pictures of the six classes.

    splits: for 'train', 'val' and 'test', uint8 pictures (N, 3, 48, 48), in any memory layout, and
    int64 labels (N,)
    name: 'photographs' or 'sample'
    """

    splits: dict
    name: str = "photographs"

    @functools.cached_property
    def fingerprint(self):
        """12 hexadecimal digits that change with any pixel or label."""
        digest = hashlib.sha256()
        for split in SPLITS:
            for tensor in self.splits[split]:
                for part in tensor.split(1000):  # a copy of them all would take much memory
                    digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()[:12]


def load_landscapes(path):
    """Read the course's .npz (keys train_images, train_labels, val_..., test_...).

    Images may be (N, 48, 48, 3), (N, 3, 48, 48) or (N, 6912), which is taken as channels last, and
    uint8 or floats in 0..1 or 0..255; labels (N,) or (N, 1). Raises UserError, naming file and key,
    for anything else.
    """
    arrays = _read_npz(path, [f"{s}_{kind}" for s in SPLITS for kind in ("images", "labels")])
    splits = {}
    for split in SPLITS:
        images = _as_pictures(arrays[f"{split}_images"], f"{path}: {split}_images")
        labels = _as_labels(arrays[f"{split}_labels"], f"{path}: {split}_labels")
        if len(images) != len(labels):
            raise UserError(
                f"{path}: {len(images)} {split}_images but {len(labels)} {split}_labels"
            )
        splits[split] = torch.from_numpy(images), torch.from_numpy(labels)
    return Landscapes(splits)


def _read_npz(path, keys):
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise UserError(f"{path}: not an .npz file, but a single array")
        with file:
            size = sum(entry.file_size for entry in file.zip.infolist())
            if size > MOST_BYTES:
                raise UserError(f"{path}: refused, for it unpacks to {size / 2**30:.1f} GiB")
            if missing := [key for key in keys if key not in file]:
                raise UserError(f"{path}: has no {', '.join(missing)}; found: {', '.join(file)}")
            return {key: file[key] for key in keys}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; data/README.md says how to get the data")
    except UserError:
        raise
    except Exception as error:  # damaged zip files and headers raise whatever they like
        raise UserError(f"{path}: not a readable .npz file ({one_line(error)}); prepare it again")


def _as_pictures(array, where):
    """`array` in any accepted layout as uint8 (N, 3, 48, 48); a view of it if it is uint8."""
    if not isinstance(array, np.ndarray) or not (
        array.dtype == np.uint8 or array.dtype.kind == "f"
    ):
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
        raise UserError(f"{where}: no pictures")
    if array.dtype.kind == "f":
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 255):  # also for NaN, which compares false
            raise UserError(
                f"{where}: values from {low:g} to {high:g}; expected 0 to 1 or 0 to 255"
            )
        array = np.rint(array * (255 if high <= 1 else 1)).astype(np.uint8)
    return array


def _as_labels(array, where):
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        raise UserError(f"{where}: type {getattr(array, 'dtype', 'unknown')}, not whole numbers")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise UserError(f"{where}: shape {array.shape}; expected (N,) or (N, 1)")
    if len(array) and not (array.min() >= 0 and array.max() < len(CLASSES)):
        raise UserError(f"{where}: labels {array.min()} to {array.max()}; expected 0 to 5")
    return array.astype(np.int64)


@dataclass
class Pronunciations:
    """Words and how they sound.

    splits: for 'train', 'val' and 'test', a list of (phonemes, spelling): a tuple of symbols such
    as ('k', 'æ', 't') and a string
    name: 'pronunciations', 'sample', or that of a folder in data/
    """

    splits: dict
    name: str = "pronunciations"

    @property
    def fingerprint(self):
        """12 hexadecimal digits that change with any symbol."""
        text = json.dumps([self.splits[split] for split in SPLITS])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def load_pronunciations(folder):
    """Read train.tsv, valid.tsv and test.tsv in `folder`.

    Each line is phonemes separated by spaces, TAB, spelling; UTF-8 with or without a byte order
    mark, LF or CRLF; the text is brought to Unicode's NFC. Raises UserError, naming file and line,
    for anything else.
    """
    files = {"train": "train.tsv", "val": "valid.tsv", "test": "test.tsv"}
    pairs = {split: read_tsv(Path(folder) / name) for split, name in files.items()}
    return Pronunciations(
        {split: [(tuple(a.split()), b) for a, b in rows] for split, rows in pairs.items()}
    )


def read_tsv(path):
    """The lines of a file as pairs of NFC strings. Raises UserError, naming file and line."""
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_TEXT + 1)
        if len(content) > MOST_TEXT:
            raise UserError(f"{path}: refused, for it has more than {MOST_TEXT / 2**20:.0f} MiB")
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
    return [_fields(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _fields(line, where):
    fields = [field.strip() for field in line.split("\t")]
    if len(fields) != 2:
        raise UserError(f"{where}: {len(fields)} fields separated by tabs, expected 2")
    if not all(fields):
        raise UserError(f"{where}: an empty field")
    if max(map(len, fields)) > MOST_SYMBOLS:
        raise UserError(f"{where}: a field of more than {MOST_SYMBOLS:,} characters")
    if any(unicodedata.category(c) == "Cc" or c in BIDIRECTIONAL for c in "".join(fields)):
        raise UserError(f"{where}: a control character")
    return tuple(unicodedata.normalize("NFC", field) for field in fields)


def read_picture(file):
    """The picture in `file` (a path or a binary file) as a uint8 tensor (3, 48, 48), whatever its
    size and mode, of an animation the first. Raises UserError if Pillow cannot read it, or warns
    of its size: it has more than 89 million pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning)  # about odd metadata
            with Image.open(file, formats=picture_formats()) as picture:
                picture = ImageOps.exif_transpose(picture)
                if picture.mode == "F":  # convert() would take 0 to 1 for black
                    raise ValueError("its pixels are floats, of which nothing says what is white")
                if picture.mode.startswith("I"):  # 16 bits, which convert() would cut off at 255
                    levels = np.asarray(picture) // 257
                    picture = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
                picture = picture.convert("RGB")
        if picture.size != (SIZE, SIZE):
            picture = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)  # antialiased
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
    except MemoryError:
        raise
    except Exception as error:  # the decoders of damaged pictures raise whatever they like
        raise UserError(f"{file}: not a readable picture ({one_line(error)})")


# Those that a photograph may come in; others of Pillow's start programs or are films.
FORMATS = "JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF"


def picture_formats():
    """Those that this Pillow can read."""
    Image.init()
    return [kind for kind in FORMATS if kind in Image.OPEN]


def picture_endings():
    """The file name endings, such as '.jpg', of the formats that are read."""
    return {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}


def download(url, path):
    """Fetch `url` to `path`, whole or not at all. Raises UserError."""
    print(f"Downloading {url}")
    write_file(path, lambda file: _fetch(url, file))


def _fetch(url, file):
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "hw2"})
        with urllib.request.urlopen(request, timeout=60) as response, open(file, "wb") as output:
            size = int(response.headers.get("Content-Length", 0)) or None
            bar = {"total": size, "desc": "download", "leave": False, "disable": None}
            with tqdm.wrapattr(output, "write", **bar) as output:
                shutil.copyfileobj(response, output)
        if size not in (None, file.stat().st_size):
            raise ConnectionError(f"{file.stat().st_size:,} of {size:,} bytes arrived; try again")
    except (URLError, ConnectionError, TimeoutError, HTTPException, ValueError) as error:
        raise UserError(f"{url}: {one_line(error)}; data/README.md names other ways")


def one_line(error):
    """An exception's text on one line, at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


# ----------------------------------------------------------------------------------------------
# run records and checkpoints


@dataclass(frozen=True)
class Run:
    """One training run. Whatever can change its result is in `config`, save device and threads,
    which may change its last bits, and its name is made of that: question, recipe version, options
    (seed among them), data name and fingerprint."""

    title: str  # the readable part of the name, such as 'q2-bn-gap-lr0.01-seed42-sample'
    config: dict
    folder: Path = ROOT
    checkpoint_file: Path | None = None  # where not in checkpoints/ under the run's name

    @property
    def name(self):
        text = json.dumps(self.config, sort_keys=True)
        return f"{self.title}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def checkpoint(self):
        return self.checkpoint_file or self.folder / "checkpoints" / f"{self.name}.pt"

    @property
    def record(self):
        return self.folder / "figures" / "runs" / f"{self.name}.json"

    @property
    def figures(self):
        return self.folder / "figures" / self.name


def run_config(question, recipe, options, data):
    """A `Run`'s config: the options that count, a dictionary, and which data they met."""
    return {
        "question": question,
        "recipe": recipe,
        "options": options,
        "data": {"name": data.name, "fingerprint": data.fingerprint},
    }


def write_file(path, write):
    """Call `write(temporary path)`, then move the result to `path`: whole or not at all.

    The temporary name is fixed, so what a killed process left is replaced by the next one. Raises
    UserError where the file cannot be written; what stood at `path` stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # before the name is its, or a power cut could leave it empty
        _replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        raise UserError(f"{path}: cannot be written ({one_line(error)})")
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _replace(source, path, tries=20):
    """os.replace, which Windows denies for the moment that another process reads `path`."""
    for left in reversed(range(tries)):
        try:
            return os.replace(source, path)
        except PermissionError:
            if os.name != "nt" or left == 0:
                raise
            time.sleep(0.1)


def save_record(path, record):
    """Write a run record as JSON, one line a top-level key, the last its checksum."""
    record = record | {"checksum": _checksum(record)}
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    write_file(path, lambda file: file.write_text(text, encoding="utf-8"))


def _checksum(record):
    text = json.dumps(record, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_record(path):
    """Read a run record. Raises UserError if it cannot be read, Damaged if it is broken or was
    changed by hand."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such record")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})")
    try:
        record = json.loads(content.decode("utf-8"))
        found = record.pop("checksum", None) if isinstance(record, dict) else None
        checksum = _checksum(record)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path}: not a readable run record ({one_line(error)})")
    if not isinstance(record, dict) or not _is_config(record.get("config")):
        raise Damaged(f"{path}: not a run record")
    if found != checksum:
        raise Damaged(f"{path}: damaged, or changed by hand: its checksum is another")
    return record


def _is_config(config):
    kinds = {"question": str, "recipe": int, "options": dict, "data": dict}
    return (
        isinstance(config, dict)
        and all(isinstance(config.get(name), kind) for name, kind in kinds.items())
        and all(isinstance(config["data"].get(name), str) for name in ("name", "fingerprint"))
    )


def save_checkpoint(path, **content):
    """Write a checkpoint: tensors, numbers, strings, lists and dictionaries of them."""
    write_file(path, lambda file: torch.save(content, file))


def load_checkpoint(path, device="cpu", mmap=False):
    """Read a checkpoint without running code from it; with `mmap`, tensors only when used, and
    their checksums unseen.

    Raises UserError if it is missing, broken or not one of this project's.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if any(entry.compress_size != entry.file_size for entry in file.infolist()):
                raise ValueError("it is compressed")
            if not mmap and (part := file.testzip()):  # torch.load does not look
                raise ValueError(f"wrong checksum of {part}")
        with warnings.catch_warnings():  # about odd files, which are refused below
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})")
    except Exception as error:  # the unpickler of a damaged file raises whatever it likes
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path}: not a readable checkpoint ({one_line(error)}); delete it")
    kinds = {"history": dict, "seconds": list, "finished": bool, "model": dict, "optimizer": dict}
    if not (
        isinstance(content, dict)
        and _is_config(content.get("config"))
        and all(isinstance(content.get(name), kind) for name, kind in kinds.items())
        and all(map(_are_numbers, (content["seconds"], *content["history"].values())))
        and {len(column) for column in content["history"].values()} <= {len(content["seconds"])}
    ):
        raise UserError(f"{path}: not a checkpoint of this project")
    return content


def _are_numbers(values):
    return isinstance(values, list) and all(type(value) in (int, float) for value in values)


# What torch and Python raise where a checkpoint's parts do not fit the network they are meant for.
MISFITS = RuntimeError, ValueError, LookupError, TypeError, AttributeError


@contextlib.contextmanager
def refusing_misfits(what):
    """Raise UserError, `what` and why, in place of MISFITS other than short memory."""
    try:
        yield
    except MISFITS as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{what} ({one_line(error)})")


def continue_run(run, model, optimizer, restart=False):
    """Load the unfinished run's last epoch into `model` and `optimizer`, if there is one.

    Returns what its checkpoint holds, above all 'history' {column: [a value an epoch]} and
    'seconds' [a value an epoch]; only these two, empty, where training starts anew: no checkpoint,
    a finished one with its record, or `restart`.
    """
    anew = {"history": {}, "seconds": []}
    if restart or not run.checkpoint.exists():
        return anew
    saved = load_checkpoint(run.checkpoint, next(model.parameters()).device)
    if saved["config"] != run.config:
        raise UserError(f"{run.checkpoint}: belongs to another run; delete it")
    if saved["finished"] and run.record.exists():
        return anew
    with refusing_misfits(f"{run.checkpoint}: of another network; delete it"):
        model.load_state_dict(saved["model"])
        groups = zip(saved["optimizer"]["param_groups"], optimizer.param_groups)
        for group, own in groups:  # the run may have begun on another device
            group |= {name: own[name] for name in ("fused", "capturable", "foreach") if name in own}
        _check_optimizer(saved["optimizer"], optimizer)
        optimizer.load_state_dict(saved["optimizer"])
    return saved


STATES = {torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"}, torch.optim.SGD: {"momentum_buffer"}}


def _check_optimizer(saved, optimizer):
    """Raise ValueError if an optimizer's saved state is not of its kind and its parameters' shapes,
    which torch does not look at: its fast steps would write beyond the tensors' ends."""
    for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        kinds = [{name: type(value) for name, value in part.items()} for part in (group, own)]
        if kinds[0] != kinds[1]:
            raise ValueError("another optimizer's settings")
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, state in saved["state"].items():
        own = {name: () if name == "step" else weights[number].shape for name in state}
        found = {name: t.shape if t is not None else own[name] for name, t in state.items()}
        if state and (state.keys() != STATES[type(optimizer)] or found != own):
            raise ValueError("another optimizer's state")


@contextlib.contextmanager
def only_here(run):
    """Keep other processes from training `run` meanwhile. The lock goes with its process, though
    its empty file stays. Raises UserError if another process trains the run."""
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


def save_run(run, model, optimizer, history, seconds, **more):
    """Write the checkpoint from which `continue_run` goes on; `more` is kept with it."""
    save_checkpoint(
        run.checkpoint,
        config=run.config,
        history=history,
        seconds=seconds,
        finished=False,
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        **more,
    )


def finish_run(run):
    """Mark the run's checkpoint as finished: the same command will train it anew."""
    saved = load_checkpoint(run.checkpoint)
    save_checkpoint(run.checkpoint, **saved | {"finished": True})


def best_checkpoint(folder, question, score, wanted=lambda saved: True):
    """The checkpoint of `question` in `folder` with the highest score(checkpoint), of those for
    which wanted(checkpoint); one trained on a built-in sample only where there is no other. Raises
    UserError if there is none."""
    found = []
    for path in sorted(folder.glob(f"{question}-*.pt")):
        try:
            saved = load_checkpoint(path, mmap=True)
            if wanted(saved):
                found.append((saved["config"]["data"]["name"] != "sample", score(saved), path))
        except (UserError, *MISFITS) as error:
            print(f"{path.name} is passed over ({one_line(error)})", file=sys.stderr)
    if not found:
        raise UserError(f"{folder}: no trained network there yet; train one first")
    return max(found)[-1]


class Diverged(Exception):
    """The training loss is no finite number any more, since this batch of the epoch."""

    def __init__(self, batch):
        super().__init__(batch)
        self.batch = batch


LOOK = 100  # batches between two looks at a GPU's totals, for which it would have to wait


def check_totals(totals, batch, batches):
    """Raise Diverged if the summed loss, totals[0], is no finite number after `batch` of an epoch's
    `batches`. totals[-1] counts the batches of finite loss."""
    look = totals.device.type == "cpu" or batch % LOOK == 0 or batch == batches
    if look and not math.isfinite(totals[0].item()):
        raise Diverged(int(totals[-1].item()) + 1)


def stop_diverged(run, record, epoch, batch):
    """Write the record of a run whose loss was no finite number in `epoch`. Raises UserError."""
    save_record(run.record, record | {"diverged_in_epoch": epoch, "diverged_in_batch": batch})
    raise UserError(
        f"the training loss was no longer a number in epoch {epoch}, batch {batch}, and training "
        "stopped; try a lower learning rate"
    )


def measured(device, seconds):
    """What differs from run to run: time, machine, versions and date."""
    return {
        "seconds": [round(s, 3) for s in seconds],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": _processor(),
        "cores": len(cores()),
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
def commit():
    """The commit of the code, '-dirty' behind it where a script was changed since; None without
    one. As it was at the first call, for an update does not change a process that runs."""
    if not (ROOT / ".git").exists():  # a folder above this may have commits of its own
        return None
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    try:
        found = git(["git", "describe", "--always", "--exclude=*"], check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    changed = git(["git", "diff", "--quiet", "HEAD", "--", "*.py"]).returncode
    return f"{found}-dirty" if changed else found


def _peak_memory():
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) // 1024
    except (OSError, ValueError, IndexError):  # not Linux
        return None


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


# ----------------------------------------------------------------------------------------------
# running many runs

POLL = 2  # seconds between two looks at how far the runs are


@dataclass(frozen=True)
class Task:
    """A run to be trained by a process of its own: `python` with these arguments."""

    run: Run
    arguments: tuple
    epochs: int

    def epochs_done(self):
        """How many epochs its checkpoint has."""
        try:
            return len(load_checkpoint(self.run.checkpoint, mmap=True)["seconds"])
        except UserError:
            return 0


def epochs_of(options):
    """How many epochs a dictionary of options asks for, by either question's name for them."""
    return options.get("epochs") or options["n_epochs"]


def finished_record(run):
    """The record of a run that was trained to its end, be it that it diverged; None if there is
    none, or its checkpoint is of a later training that was interrupted. A broken record is set
    aside, with a line that says so."""
    record = read_or_set_aside(run.record)
    if "final" in record:
        with contextlib.suppress(UserError):  # there may be no checkpoint any more
            if not load_checkpoint(run.checkpoint, mmap=True)["finished"]:
                return None
    return record if is_finished(record) else None


def is_finished(record):
    """Whether a record is of a run that was trained to its end, be it that it diverged."""
    return bool({"final", "diverged_in_epoch"} & record.keys())


def read_or_set_aside(path):
    """A run record, {} where there is none; a broken one is renamed, with a line that says so, and
    {} takes its place."""
    if not path.exists():
        return {}
    try:
        return load_record(path)
    except Damaged as error:
        aside = path.with_suffix(".broken")
        with contextlib.suppress(FileNotFoundError):  # another process was first
            os.replace(path, aside)
        print(f"{error}; set aside as {aside.name}", file=sys.stderr)
        return {}


def train_many(script, several, data=None, done=finished_record):
    """Train the runs that several namespaces of options describe, side by side.

    script: the question's module; it has make_parser, make_run, load_data and summary. done: as
    of run_many.
    """
    data = data or script.load_data(several[0])
    parser, tasks = script.make_parser(), []
    for options in several:
        own = vars(options) | {"threads": options.threads or 1, "jobs": None, "scheduler": None}
        words = str(Path(script.__file__).resolve()), *parser.arguments(own)
        tasks.append(Task(script.make_run(options, data), words, epochs_of(own)))
    run_many(tasks, script.summary, several[0], done)


def run_many(tasks, summary, options, done=finished_record):
    """Train the runs of `tasks` side by side and return their records, in order, None for one that
    was never tested.

    A run for which done(run) returns a record is passed over, so the same call again does what is
    left. summary: a record -> what the line says that is printed as its run ends. options: how many
    at once ('jobs'; by default one a core, or one on a GPU), or the address of a Dask scheduler
    whose workers, on machines that share this folder, do the work ('scheduler'); 'restart' passes
    no run over. A run that fails takes no other along; at the end UserError says how many did.
    """
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    jobs = options.jobs or (len(cores()) if device.partition(":")[0] == "cpu" else 1)
    left, failed = {}, 0
    before = {task.run.name: done(task.run) for task in tasks}
    for task in tasks:
        record = before[task.run.name]
        if record and not options.restart:
            print(f"{task.run.name}: {summary(record)} (from its record)")
        else:
            left[(sys.executable, *task.arguments)] = task
    with _progress(left.values()) as bar, _finished(left, jobs, options.scheduler) as results:
        for result in results:
            run = left[tuple(result.args)].run
            record = finished_record(run)
            diverged = record and "diverged_in_epoch" in record and record != before[run.name]
            if record and (result.returncode == 0 or diverged):
                bar.write(f"{run.name}: {summary(record)}")
            else:
                failed += 1
                bar.write(f"{run.name}: {_why(result)}")
    if failed:
        how = "the same command" + ", without restart," * options.restart
        raise UserError(f"{failed} of {len(tasks)} runs failed; {how} tries them again")
    return [finished_record(task.run) for task in tasks]


def _why(result):
    lines = result.stderr.strip().splitlines()
    if result.returncode == 0:
        return "left no record here; do the machines share this folder?"
    return lines[-1] if lines else f"ended with status {result.returncode}"


@contextlib.contextmanager
def _progress(tasks):
    """One progress bar over all epochs of the tasks, kept up to date by a thread."""
    ended = threading.Event()
    total = sum(task.epochs for task in tasks)
    with tqdm(total=total, unit="epoch", disable=None if total else True) as bar:

        def watch():
            while not ended.wait(POLL):
                bar.n = sum(task.epochs_done() for task in tasks)
                bar.refresh()

        watcher = threading.Thread(target=watch, daemon=True)
        if not bar.disable:
            watcher.start()
        try:
            yield bar
        finally:
            ended.set()
            if watcher.is_alive():
                watcher.join()


@contextlib.contextmanager
def _finished(commands, jobs, scheduler):
    """An iterator over the commands' CompletedProcess as they end. Leaving ends the others, but for
    those that a Dask worker has begun."""
    how = {"cwd": os.getcwd(), "stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    how |= {"stderr": subprocess.PIPE, "encoding": "utf-8", "errors": "replace"}
    with contextlib.ExitStack() as stack:
        if scheduler:
            stack.enter_context(_dask(scheduler))
            start, jobs = subprocess.run, -1  # as many as the workers have threads
        else:
            start = stack.enter_context(_Children()).run
            stack.enter_context(joblib.parallel_config("threading"))
        parallel = joblib.Parallel(jobs, return_as="generator_unordered")
        results = parallel(joblib.delayed(start)(list(command), **how) for command in commands)
        try:
            yield results
        finally:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # joblib tells of runs that were not awaited
                results.close()


class _Children(contextlib.AbstractContextManager):
    """Like subprocess.run, but leaving the context ends the processes that are still there, and
    waits for their end."""

    def __init__(self):
        self.running, self.left = set(), False

    def run(self, command, **how):
        if self.left:
            return subprocess.CompletedProcess(command, -signal.SIGTERM, stderr="")
        with subprocess.Popen(command, **how) as process:
            self.running.add(process)
            if self.left:  # meanwhile
                process.terminate()
            errors = process.communicate()[1]
        self.running.discard(process)
        return subprocess.CompletedProcess(command, process.returncode, stderr=errors)

    def __exit__(self, *exception):
        self.left = True
        left = list(self.running)
        for process in left:
            process.terminate()
        for process in left:  # none outlives this one
            process.wait()


@contextlib.contextmanager
def _dask(address):
    try:
        from dask.distributed import Client
    except ImportError:
        raise UserError('Dask is not installed; pip install "dask[distributed]"')
    try:
        client = Client(address, timeout=10)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"no Dask scheduler at {address} ({one_line(error)})")
    with client, joblib.parallel_config("dask"):
        yield


# ----------------------------------------------------------------------------------------------
# report

REPORT_SEEDS = (42, 1, 2, 3, 4)
GROUPS = {"report": ("report",), "all": ("report", "all"), "beyond": ("beyond",)}  # of systems
TEMPLATE = ROOT / "figures" / "template.md"
FIELD = re.compile(r"{{(.*?)}}", re.DOTALL)
NOT_TRAINED = "*(not trained yet)*"


@dataclass(frozen=True)
class System:
    """Something that the report trains: its label in tables and figures, the script's arguments,
    over how many seeds, whether the original report has it ('report'), it tests what that says
    ('all'), or it goes beyond it ('beyond'), and the name of its data, None for the usual ones."""

    label: str
    arguments: str
    seeds: int = 3
    group: str = "report"
    data: str | None = None


def add_report_options(parser, dash):
    """Add what both scripts ask about the report."""
    add = parser.add_argument_group("report").add_argument
    what = "train what is missing, then write this question's part of figures/README.md; all: train"
    what += " also what tests the original report's claims; beyond: what goes beyond it"
    choices = {"nargs": "?", "const": "report", "choices": GROUPS}
    add(f"{dash}report", help=what, **choices)
    seeds = number(int, 1, len(REPORT_SEEDS))
    add(f"{dash}n_seeds", type=seeds, metavar="N", help="seeds a system (default: 1 to 5)")
    only = "train only systems whose label matches, such as '*pool*'"
    add(f"{dash}only", metavar="GLOB", default="*", help=only)
    dry = "only list what would be trained and how long it takes"
    add(f"{dash}dry_run", action="store_true", help=dry)
    formats = {"choices": ("png", "pdf", "svg"), "default": "png"}
    add(f"{dash}figure_format", help="file format of the report's figures", **formats)


def check_report_options(parser, options, dash, places):
    """End with one line where an option of the report's is given without it, or another with it
    that is not about `places`: the report trains systems of its own."""
    own = "n_seeds", "only", "dry_run", "figure_format"
    for action in parser._actions:
        name = action.option_strings[0] if action.option_strings else action.dest
        if getattr(options, action.dest, action.default) in (action.default, []):
            continue
        if action.dest in own and not options.report:
            parser.error(f"{name} goes with {dash}report")
        if options.report and action.dest not in ("report", *own, *places):
            parser.error(f"{dash}report trains systems of its own: it goes without {name}")


def write_report(script, options):
    """Train what is missing and write a question's part of the report.

    script: the question's module; it has QUESTION, RECIPE, SYSTEMS, PLACES, LATER_OPTIONS,
    parse_options, make_parser, run_options, command, make_run, load_data, summary, trial_scores,
    which makes of a record of `figures/trials` {column: text}, and report_parts, which makes of
    {label: records} the fields of the template's part: figures, text, or None where no run is.
    """
    folder = options.output_dir / "figures"
    trials = _trials_table(script, folder / "trials")
    all_systems = argparse.Namespace(**vars(options) | {"report": None, "only": "*"})
    most_seeds = argparse.Namespace(**vars(all_systems) | {"n_seeds": len(REPORT_SEEDS)})
    known = {key: several.label for key, several in _wanted_runs(script, most_seeds)}
    found = _read_records(folder / "runs", script.QUESTION, known)
    missing = [several for key, several in _wanted_runs(script, options) if key not in found]
    if options.dry_run:
        _list_missing(script, missing, found, known)
        return
    if (folder / "README.md").exists():
        _around(folder / "README.md", script.QUESTION)  # before hours of training
    if missing:
        _train_missing(script, missing, found)
        found = _read_records(folder / "runs", script.QUESTION, known)
    records = {system.label: [] for system in script.SYSTEMS}
    for key, several in _wanted_runs(script, all_systems):
        if key in found:
            records[several.label].append(found[key])
    fields = script.report_parts(records) | {"table trials": trials}
    write_part(folder / "README.md", script.QUESTION, fields, options.figure_format)
    print(f"Report: {folder / 'README.md'}")


def _wanted_runs(script, options):
    """A (key, options) for each run that the report wants, of all groups where it says none."""
    wanted = []
    for system in script.SYSTEMS:
        matches = fnmatch.fnmatchcase(system.label, options.only)
        if matches and system.group in GROUPS.get(options.report, (system.group,)):
            seeds = REPORT_SEEDS[: options.n_seeds or system.seeds]
            own = vars(script.parse_options(system.arguments.split()))
            if isinstance(own["seed"], list):  # an ensemble's, one run
                seeds = [own["seed"]]
            places = {name: getattr(options, name) for name in script.PLACES}
            if system.data:
                places["data_dir"] = ROOT / "data" / system.data
            for seed in seeds:
                about = {"seed": seed, "label": system.label, "data": system.data}
                several = argparse.Namespace(**own | places | about)
                chosen = script.run_options(several)
                wanted.append((_key(script.RECIPE, chosen, system.data), several))
    return wanted


def _data_of(name):
    """How System.data says what data of this name are."""
    return None if name in ("photographs", "pronunciations", "sample") else name


def _key(recipe, options, data):
    """What a run is known by; data: as System.data."""
    return json.dumps([recipe, options, data], sort_keys=True)


def _key_of(record):
    config = record["config"]
    return _key(config["recipe"], config["options"], _data_of(config["data"]["name"]))


def _read_records(folder, question, known):
    """{key: record} of a question's runs with `known` keys, of each name of data on one set, that
    with the most of them; built-in samples are none. Broken records are named and set aside."""
    found = {}  # by name, by fingerprint
    for path in sorted(folder.glob(f"{question}-*.json")):
        record = read_or_set_aside(path)
        if is_finished(record) and (key := _key_of(record)) in known:
            data = record["config"]["data"]
            if data["name"] != "sample":
                sets = found.setdefault(data["name"], {})
                sets.setdefault(data["fingerprint"], {})[key] = record
    most = (max(sets.values(), key=len) for sets in found.values())
    return {key: record for records in most for key, record in records.items()}


def _trials_table(script, folder):
    """What the runs in `folder` changed, against the first of them, and what it gave; None without
    any. Their options may be gone again: the commit has them. They need not have been tested."""
    records = [read_or_set_aside(path) for path in folder.glob(f"{script.QUESTION}-*.json")]
    records = [record for record in records if record]
    records.sort(key=lambda record: record["measured"]["date"])
    configs = [record["config"] for record in records]
    options = [script.LATER_OPTIONS | c["options"] | {"data": c["data"]["name"]} for c in configs]
    scores = [
        {} if "diverged_in_epoch" in record else script.trial_scores(record) for record in records
    ]
    columns = max(scores, key=len, default={})
    rows = [
        [
            _changes(options[0], own) or "–",
            *(found.get(column, "diverged") for column in columns),
            record["measured"].get("commit") or "–",
        ]
        for record, own, found in zip(records, options, scores)
    ]
    return markdown_table(["changed", *columns, "commit"], rows)


def _changes(before, after):
    """What differs in dictionaries of options, 'name value' each, by the values of the latter."""
    texts = {
        name: " ".join(value) or "none" if isinstance(value, list) else value
        for name, value in after.items()
    }
    names = dict.fromkeys((*before, *after))
    return ", ".join(f"{n} {texts.get(n)}" for n in names if before.get(n) != after.get(n))


def _list_missing(script, missing, found, labels):
    """Print the command of each missing run, and how long it takes by the records found; labels: by
    their keys."""
    took = {}  # by label, seconds an epoch
    for key, record in found.items():
        if seconds := record["measured"]["seconds"]:
            took.setdefault(labels[key], []).append(statistics.median(seconds))
    usual = statistics.median([second for known in took.values() for second in known] or [0])
    hours = 0
    for options in missing:
        if not vars(options).get("ensemble"):  # whose members are systems of their own
            epoch = statistics.median(took.get(options.label, [usual]))
            hours += epoch * epochs_of(vars(options)) / 3600
        words = f" --data_dir data/{options.data}" if options.data else ""
        print(script.command(script.run_options(options)) + words)
    guess = f"; some {hours / len(cores()):.1f} hours on this machine" if usual else ""
    print(f"{len(missing)} runs to train{guess}")


def _train_missing(script, missing, found):
    """Train these runs, each kind of data by itself and ensembles last. Where runs fail, the others
    go on, and UserError says so at the end."""
    parts, failures = {}, []
    for several in missing:
        together = vars(several).get("ensemble", False)
        several.restart &= not together  # its members have just been trained
        parts.setdefault((together, several.data or ""), []).append(several)
    parts = [part for _, part in sorted(parts.items())]
    loaded = [_load_as_found(script, part[0], found) for part in parts]  # before any training
    for part, data in zip(parts, loaded):
        try:
            train_many(script, part, data)
        except UserError as error:
            failures.append(str(error))
    if failures:
        raise UserError("; ".join(failures))


def _load_as_found(script, options, found):
    """The data that a missing run needs: real ones, and those of the records found, if any. Raises
    UserError where others are there."""
    data = script.load_data(options)
    used = (record["config"]["data"] for record in found.values())
    known = {own["fingerprint"] for own in used if _data_of(own["name"]) == options.data}
    right = known <= {data.fingerprint} and _data_of(data.name) == options.data
    if data.name == "sample" or not right:
        needed = "the data of the others" if known else "real data, not the built-in sample"
        raise UserError(
            f"{options.label}: its runs are missing, and need {needed}; data/README.md says how to "
            "get them"
        )
    return data


def write_part(path, part, fields, ending="png"):
    """Write the report's `part`: the template's text between its markers, with {{name}} replaced by
    fields[name], and {{name: caption}} by a figure, which is saved beside `path` as `ending`; all
    else in the file stays. In a new file the other parts' fields are not trained yet. Other
    processes wait.
    """

    def fill(match):
        name, _, caption = match[1].partition(": ")
        value = fields[name]
        if isinstance(value, Figure):
            file = f"{part}-{name}.{ending}"
            save_figure(path.parent / file, value)
            return f"![{caption}]({file})\n\n*{caption}*"
        return NOT_TRAINED if value is None else value

    filled = FIELD.sub(fill, _around(TEMPLATE, part)[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_name(f".{path.name}.part.lock"), timeout=60):
        new = not path.exists()
        before, _, behind = _around(TEMPLATE if new else path, part)
        text = before + filled + behind
        text = FIELD.sub(NOT_TRAINED, text) if new else text
        write_file(path, lambda file: file.write_text(text, encoding="utf-8"))


def _around(path, part):
    """What stands before, between and behind the markers of the report's `part`, these included
    outside. Raises UserError."""
    begin, end = f"<!-- {part} -->", f"<!-- /{part} -->"
    try:
        before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})")
    between, found, behind = rest.partition(end)
    if not found:
        raise UserError(f"{path}: has no {begin} ... {end}; delete it, and it is made anew")
    return before + begin, between, end + behind


def markdown_table(head, rows, text=1):
    """A Markdown table, or None without rows; its first `text` columns to the left, the others,
    numbers, to the right."""
    if not rows:
        return None
    lines = [head, ["---"] * text + ["--:"] * (len(head) - text), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def mean_sd(values):
    """'mean ± standard deviation' over seeds; the mean alone of one, a dash for none."""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def gain(values, usual):
    """'difference of two means ± its standard error' over seeds; without the error where either
    has one value, a dash where it has none."""
    if not (values and usual):
        return "–"
    difference = f"{statistics.mean(values) - statistics.mean(usual):+.3f}"
    if min(len(values), len(usual)) == 1:
        return difference
    squares = sum(statistics.variance(part) / len(part) for part in (values, usual))
    return f"{difference} ± {math.sqrt(squares):.3f}"


def minutes(record):
    """How long a run's epochs took together."""
    return sum(record["measured"]["seconds"]) / 60


def machines(records):
    """Sentences that say on what machines and with which versions the records were made."""
    counts = Counter(
        f"{'' if m['device'] == 'cpu' else m['device'] + ', '}"
        f"{m['cores']} cores of an {m['processor']}, {m['threads']} thread"
        f"{'s' * (m['threads'] > 1)} a run, torch {m['torch']}, Python {m['python']}"
        for m in (record["measured"] for record in records)
    )
    return "; ".join(f"{machine} ({n} runs)" for machine, n in sorted(counts.items()))


def interval(draw, runs, repetitions=2000):
    """The middle 95 % of a single run's score: draw(run, random) resamples the test items of a run
    that is itself drawn from `runs`, the seeds (Efron and Tibshirani 1993, chapter 13)."""
    random = np.random.default_rng(0)
    scores = [draw(runs[random.integers(len(runs))], random) for _ in range(repetitions)]
    return tuple(np.percentile(scores, [2.5, 97.5]).tolist())


# ----------------------------------------------------------------------------------------------
# plotting

# Okabe and Ito's colours, distinct for colour-blind readers too.
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


def figure(width=4.2, height=2.9, rows=1, columns=1, **kwargs):
    """A new figure, `width` x `height` inches, and its axes, in the style of all figures."""
    matplotlib.rcParams.update(STYLE)  # titles and labels look here when they are set, not before
    new = Figure(figsize=(width, height), layout="constrained")
    return new, new.subplots(rows, columns, **kwargs)


def save_figure(path, fig):
    """Write `fig` in the format that `path` ends with, without the date: the same bytes again."""
    date = {".pdf": "CreationDate", ".svg": "Date"}.get(Path(path).suffix)
    write_file(path, lambda file: fig.savefig(file, metadata={date: None} if date else None))


def plot_curve(path, title, ylabel, values):
    """Plot a value an epoch."""
    fig, axes = figure()
    axes.plot(range(1, len(values) + 1), values, color=BLUE, marker=".", markersize=4)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title=title, xlabel="Epoch", ylabel=ylabel)
    save_figure(path, fig)


def legend_above(fig, axes, columns=2):
    """The legend of `axes` above all panels of `fig`, where it hides no curve."""
    fig.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=columns)


def with_seeds(label, runs):
    """A label that says over how many seeds."""
    return f"{label} ({len(runs)} seed{'s' * (len(runs) > 1)})"


def plot_bands(axes, runs, label, marker=None, first=1, **look):
    """Plot lists of values, one a run, against `first`, `first` + 1, ...: their mean, and a band
    from the least to the greatest; if some end early, each run by itself, their ends crossed. look:
    colour and style of the lines."""
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(set(map(len, runs))) > 1:
        longest = max(map(len, runs))
        for run in runs:
            end = {"marker": "x", "markevery": [-1]} if len(run) < longest else {"marker": marker}
            axes.plot(range(first, first + len(run)), run, label=label, **end, **look)
            label = None  # once in the legend
        return
    table, steps = np.array(runs), range(first, first + len(runs[0]))
    axes.plot(steps, table.mean(0), label=label, marker=marker, **look)
    axes.fill_between(steps, table.min(0), table.max(0), color=look["color"], alpha=0.2, lw=0)


def plot_against_time(axes, points, looks, ensembles=()):
    """A mark for each run of {label: (minutes, values)}; ensembles: those of runs of many seeds."""
    for (label, (times, values)), marker in zip(points.items(), "osD^vP<>"):
        look = {"color": looks[label]["color"], "markersize": 6, "alpha": 0.8}
        name = label if label in ensembles else with_seeds(label, values)
        axes.plot(times, values, marker, label=name, **look)
