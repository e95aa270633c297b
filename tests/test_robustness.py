"""Runs that are killed; full disks, short memory, closed pipes; damaged and hostile files.
`--kills 500` and `--fuzz 100000` search for longer.

kills, locks | disks, memory, output | checkpoints, records | data files | fuzzing
"""

import contextlib
import errno
import io
import itertools
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import hw2_q2
import hw2_q3
import utils
from data import prepare_landscapes, prepare_pronunciations
from data.image_files import read_image
from tests.conftest import (
    SCRIPTS,
    assert_equal_runs,
    both_questions,
    killed_at,
    load_run,
    make_run,
    needs_cuda,
)
from utils import UserError

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and limits")


@pytest.fixture(scope="module")
def finished_runs(commands, tmp_path_factory):
    """A folder where both runs are finished."""
    folder = tmp_path_factory.mktemp("finished")
    for question, argv in commands.items():
        SCRIPTS[question].main([*argv, str(folder)])
    return folder


@pytest.fixture
def start(commands, finished_runs, tmp_path):
    """start(question): main function and arguments of a run in tmp_path/out; of a finished one also
    checkpoint and record."""

    def make(question, finished=False):
        out = tmp_path / "out"
        command = SCRIPTS[question].main, [*commands[question], str(out)]
        if not finished:
            return command
        shutil.copytree(finished_runs, out, dirs_exist_ok=True)
        [checkpoint] = out.glob(f"checkpoints/{question}-*.pt")
        [record] = out.glob(f"figures/runs/{question}-*")
        return *command, checkpoint, record

    return make


# ----------------------------------------------------------------------------------------------
# kills and locks

KILLS_PER_RUN = 5
READERS = {"pt": utils.load_checkpoint, "json": utils.load_record, "png": read_image}
if os.name == "posix":
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([__name__])  # imports are made once


def child(question, argv, output, started, kill, moment):
    """Run a script in this process, which kills itself at a moment: each file has three, before
    it is written, when it has its temporary name, and afterwards."""
    write_whole, moments = utils.write_file, itertools.count(1)

    def reach_moment():
        if next(moments) == moment:
            os.kill(os.getpid(), kill)

    def write_file(path, write):
        reach_moment()
        write_whole(path, lambda file: (write(file), reach_moment()))
        reach_moment()

    def main():
        started.set()
        SCRIPTS[question].main(argv)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it has ended: nothing to interrupt
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    utils.write_file = write_file
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with open(output, "w", encoding="utf-8", buffering=1) as stream:
        sys.stdout = sys.stderr = stream
        utils.run_script(main)


def run_child(question, argv, folder, kill=None, delay=None, moment=0):
    """Run a script until it ends or is killed. Returns its exit status, output and seconds."""
    folder.mkdir(exist_ok=True)
    argv = [f"{SCRIPTS[question].DASH}device", "cpu", *argv, str(folder)]  # forks cannot use a GPU
    output, started = folder / "output.txt", forks.Event()
    process = forks.Process(target=child, args=(question, argv, output, started, kill, moment))
    process.start()
    assert started.wait(60)
    start = time.monotonic()
    if delay is not None:
        process.join(delay)
        if process.is_alive():
            os.kill(process.pid, kill)
    process.join(120)
    return process.exitcode, output.read_text(encoding="utf-8"), time.monotonic() - start


MOMENTS = [  # question, options, function and its call at which a run dies, finished epochs
    ("q2", "-optimizer adam", utils, "check_divergence", 8, 1),  # of 5 batches
    ("q2", "-no_batch_norm", utils, "save_checkpoint", 2, 1),
    ("q2", "-recipe best", utils, "store_record", 1, 4),
    ("q3", "--layers 2 --clip 0.2", torch.optim.Adam, "step", 4, 1),  # of 2 batches
    ("q3", "--input_feeding --beam_size 4", utils, "save_checkpoint", 3, 2),
    ("q3", "--recipe best", utils, "store_record", 1, 4),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize(("question", "line", "owner", "name", "call", "epochs"), MOMENTS)
def test_every_kind_of_run_resumes(
    start, question, line, owner, name, call, epochs, device, tmp_path, capsys
):
    """To the same bits as an uninterrupted one, after the epochs that it had finished."""
    main, argv = start(question)
    device = [f"{SCRIPTS[question].DASH}device", device]
    argv = [*line.split(), *device, *argv]  # of two values the last counts
    with killed_at(owner, name, call):
        main(argv)
    capsys.readouterr()
    main(argv)
    assert len(re.findall("Epoch +[0-9]/4", capsys.readouterr().out)) == 4 - epochs
    main([*argv[:-1], str(tmp_path / "uninterrupted")])
    first, second = load_run(tmp_path / "out"), load_run(tmp_path / "uninterrupted")
    assert_equal_runs(first, second)


@posix
@both_questions
def test_a_killed_run_resumes_to_the_same_bits(question, commands, tmp_path, pytestconfig):
    rng, argv = random.Random(question), commands[question]
    remaining = pytestconfig.getoption("kills") // len(SCRIPTS)
    status, output, seconds = run_child(question, argv, tmp_path / "whole")
    assert status == 0, output
    expected = load_run(tmp_path / "whole")
    while remaining > 0:
        folder = tmp_path / f"killed-{remaining}"
        for _ in range(min(KILLS_PER_RUN, remaining)):
            kill = rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
            when = {"delay": rng.uniform(0, seconds)}, {"moment": rng.randint(1, 27)}  # of 9 files
            status, output, _ = run_child(question, argv, folder, kill, **rng.choice(when))
            for suffix, read in READERS.items():
                for path in folder.rglob(f"[!.]*.{suffix}"):
                    read(path)  # raises UserError unless it is whole
            if status == 0:  # it ended before
                break
            remaining -= 1
            assert status == (-signal.SIGKILL if kill == signal.SIGKILL else 130), output
            if status == 130:
                assert "the same command without restart resumes it" in output.splitlines()[-1]
                assert "Traceback" not in output
        status, output, _ = run_child(question, argv, folder)
        assert status == 0, output
        assert_equal_runs(load_run(folder), expected)
        names = [{path.name for path in f.rglob("*")} for f in (folder, tmp_path / "whole")]
        assert names[0] == names[1]  # no temporary file is left
        shutil.rmtree(folder)


STEPS = ("q2", 6, 3), ("q2", 9, 5), ("q3", 2, 2), ("q3", 3, 2)


@pytest.mark.parametrize(("question", "step", "batch"), STEPS)
def test_divergence_ends_with_one_line_and_keeps_the_epochs_before(
    start, question, step, batch, tmp_path, monkeypatch, fails
):
    """A step of infinite rate ruins the weights: the next batch shows it, or the epoch's end."""
    rate = lambda schedule, peak, i, steps: math.inf if i == step else peak  # noqa: E731
    monkeypatch.setattr(utils, "learning_rate", rate)
    assert f"in epoch 2, batch {batch}; try a lower learning" in fails(*start(question))
    record, checkpoint = load_run(tmp_path / "out")
    assert (record["diverged_in_epoch"], record["diverged_in_batch"]) == (2, batch)
    assert "final" not in record
    assert SCRIPTS[question].summary(record) == "diverged in epoch 2"
    assert len(record["history"]["train_loss"]) == len(checkpoint["seconds"]) == 1
    assert all(weights.isfinite().all() for weights in checkpoint["model"].values())


def hold_lock(checkpoint, held):
    with utils.run_lock(make_run(checkpoint.parent, checkpoint_file=checkpoint)):
        held.set()
        time.sleep(60)


@posix
@both_questions
def test_a_run_has_one_process_whose_end_frees_its_lock(start, question, fails):
    main, argv, checkpoint, _ = start(question, finished=True)
    held = forks.Event()
    process = forks.Process(target=hold_lock, args=(checkpoint, held))
    process.start()
    assert held.wait(60)
    assert "another process is training this run" in fails(main, argv)
    process.kill()
    process.join()
    main(argv)


# ----------------------------------------------------------------------------------------------
# disks, memory, output


def contents(folder):
    """{path: bytes} of the files in a folder, but for the empty locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path: path.read_bytes() for path in files}


@both_questions
def test_a_full_disk_costs_no_finished_epoch(start, question, tmp_path, fails, monkeypatch, capsys):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    (main, argv), save, before = start(question), utils.save_checkpoint, {}

    def save_and_fill(*args, **more):
        save(*args, **more)
        before.update(contents(tmp_path / "out"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # no file grows beyond that

    monkeypatch.setattr(utils, "save_checkpoint", save_and_fill)
    try:
        assert ".pt: cannot be written" in fails(main, argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path / "out") == before != {}
    monkeypatch.undo()
    main(argv)
    assert "Resuming after epoch 1" in capsys.readouterr().out


@both_questions
def test_an_epoch_is_saved_before_it_is_printed(start, question, monkeypatch, capsys):
    def full(*texts, **more):
        if str(texts).startswith("('Epoch"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    main, argv = start(question)
    with monkeypatch.context() as patch:
        patch.setattr("builtins.print", full)
        with pytest.raises(OSError, match="No space left"):
            main(argv)
    main(argv)
    assert "Resuming after epoch 1" in capsys.readouterr().out


@both_questions
def test_a_folder_that_cannot_be_written(start, question, monkeypatch, tmp_path, fails):
    for code in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO):
        replace = Mock(side_effect=OSError(code, os.strerror(code)))
        monkeypatch.setattr(utils, "_replace", replace)
        assert f"cannot be written ([Errno {code}]" in fails(*start(question))
        assert contents(tmp_path / "out") == {}


@both_questions
@pytest.mark.parametrize("name", ["out", "out/checkpoints", "out/figures"])
def test_a_file_where_a_folder_should_be(start, question, name, tmp_path, fails):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    assert f"error: {path}" in fails(*start(question))
    assert path.read_text() == "mine"


OUT_OF_MEMORY = [
    MemoryError(),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    lambda *_: torch.empty(2**50),  # which no machine has
]
BUGS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "a file of ours"),
    OSError(errno.EBADF, os.strerror(errno.EBADF)),
    KeyError("x"),
]


@both_questions
def test_short_memory_in_training_ends_with_one_line(start, question, monkeypatch, fails):
    for error in OUT_OF_MEMORY:
        monkeypatch.setattr(utils, "learning_rate", Mock(side_effect=error))
        assert "out of memory; reduce batch size or network" in fails(*start(question))


@pytest.mark.parametrize("bug", BUGS, ids=repr)
def test_a_bug_shows_its_traceback(bug):
    with pytest.raises(type(bug)) as caught:
        utils.run_script(Mock(side_effect=bug))
    assert caught.value is bug


NO_READER = "| true", ""  # as in `... | head -1`
NO_SPACE = "> /dev/full", r"hw2_q2.py: error: cannot write the output .*No space left on device.*\n"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize(("target", "errors"), [NO_READER, NO_SPACE])
def test_output_that_cannot_be_written(target, errors):
    command = f"'{sys.executable}' hw2_q2.py -count_params {target}"
    done = subprocess.run(command, shell=True, cwd=utils.ROOT, capture_output=True, text=True)
    assert re.fullmatch(errors, done.stderr)


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_a_standard_stream_that_is_closed(monkeypatch, name):
    monkeypatch.setattr(sys, name, None)
    main = Mock(side_effect=lambda: print("x"))
    utils.run_script(main)
    main.assert_called_once()


# ----------------------------------------------------------------------------------------------
# checkpoints and records


class Bomb:
    """Unpickling it would write the file `exploded`."""

    def __reduce__(self):
        return open, ("exploded", "w")


BAD_CHECKPOINTS = {
    "a folder": lambda path: path.mkdir(),
    "a pickle that runs code": lambda path: path.write_bytes(pickle.dumps(Bomb())),
    "a checkpoint that runs code": lambda path: torch.save({"model": Bomb()}, path),
    "another program's": lambda path: torch.save({"state_dict": {}}, path),
    "a tensor": lambda path: torch.save(torch.ones(3), path),
}


@pytest.mark.parametrize("write", BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint_is_named_and_runs_no_code(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write(Path("c.pt"))
    for load in (hw2_q2.load_network, hw2_q3.load_speller):
        with pytest.raises(UserError, match=r"c\.pt"):
            load(Path("c.pt"), "cpu")
    assert not Path("exploded").exists()


def test_a_bit_flipped_in_the_weights_is_found(start, fails):
    """torch itself would load them."""
    main, argv, path, _ = start("q3", finished=True)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        entry = max(file.infolist(), key=lambda entry: entry.file_size)
    content[entry.header_offset + entry.file_size // 2] ^= 1
    path.write_bytes(content)
    assert "wrong checksum" in fails(main, argv)


def test_a_checkpoint_that_does_not_fit_its_run_is_named_and_kept(start, fails):
    main, argv, path, record = start("q3", finished=True)
    saved, scores = utils.load_checkpoint(path), utils.load_record(record)
    model, data, optimizer = (saved[part] for part in ("model", "data", "optimizer"))
    state = optimizer["state"]
    flat, scalar = (state | {1: state[1] | {"exp_avg": torch.zeros(n)}} for n in ((3,), ()))
    wrong_contents = {
        ("belongs to another run", "arguments"): [saved["arguments"] | {"lr": 0.1}],
        ("belongs to another run", "training_version"): [saved["training_version"] - 1],
        ("belongs to another run", "data"): [data | {"fingerprint": "0" * 12}],
        ("does not fit the network", "model"): [
            {}, model | {"decoder.output.bias": torch.zeros(3)}, dict.fromkeys(model, "weights"),
        ],
        ("does not fit the network", "optimizer"): [
            {}, {"state": {}, "param_groups": []}, optimizer | {"param_groups": "all"},
            optimizer | {"state": flat}, optimizer | {"state": scalar},
        ],
        ("not a readable checkpoint", "seconds"): [4, saved["seconds"] * 3],
        ("not a readable checkpoint", "history"): [[0.5]],
        ("not a readable checkpoint", "training_version"): ["2"],
        ("not a readable checkpoint", "data"): [{}, data | {"name": 5}],
    }  # fmt: skip
    for (message, part), contents in wrong_contents.items():
        for content in contents:
            torch.save(saved | {part: content}, path)
            before = path.read_bytes()
            assert f"{path}: {message}" in fails(main, argv), (part, content)
            assert path.read_bytes() == before
    main([*argv, "--restart"])
    restarted = utils.load_record(record), utils.load_checkpoint(path)
    assert_equal_runs(restarted, (scores, saved))


def test_checkpoints_of_the_other_question_are_refused(start, fails):
    q2, q3 = (start(question, finished=True)[2] for question in SCRIPTS)
    line = fails(hw2_q2.main, ["-predict", "x.jpg", "-checkpoint", q3])
    assert f"{q3}: not a network of question 2" in line
    line = fails(hw2_q3.main, ["spell", "k æ t", "--checkpoint_name", q2])
    assert f"{q2}: not a model of question 3" in line


NAMELESS = '{"command": "x", "arguments": {}, "data": {}, "history": {}, "measured": {}}'
BAD_RECORDS = NAMELESS, "", "{", "[1]", "null", '{"a": 1}', "[" * 10**5, '{"command": 1}', "\udcff"


@pytest.mark.parametrize("content", BAD_RECORDS, ids=range(len(BAD_RECORDS)))
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / "r.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"r\.json: not a .*run record.*; delete it"):
        utils.load_record(tmp_path / "r.json")


@both_questions
def test_a_damaged_record_or_figure_costs_no_training(start, question, fails, capsys):
    main, argv, _, record = start(question, finished=True)
    before = utils.load_record(record)
    record.write_text(record.read_text()[:100])
    assert f"{record}: not a readable run record" in fails(main, argv)
    record.unlink()
    figure = next(record.parents[1].glob(f"{question}-*/*.png"))
    figure.unlink()
    figure.mkdir()
    assert f"{figure.name}: cannot be written" in fails(main, argv)
    figure.rmdir()
    main(argv)
    assert "Epoch " not in capsys.readouterr().out
    assert figure.is_file()
    assert utils.load_record(record)["final"] == before["final"]


# ----------------------------------------------------------------------------------------------
# data files


def test_a_file_that_unpacks_to_too_much_is_not_read(tmp_path):
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("train_images.npy", b"")
        file.filelist[0].file_size = 5 * 2**30  # written to the directory at the end
    with pytest.raises(UserError, match=r"x\.npz: refused, it unpacks to 5\.0 GiB"):
        utils.load_landscapes(path)
    with pytest.raises(UserError, match=r"not a readable checkpoint.* unpacks to more than 4 GiB"):
        utils.load_checkpoint(path)


def test_an_array_that_claims_to_be_huge(tmp_path, arrays, fails):
    path, header = tmp_path / "x.npz", io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": (10**12, 48, 48, 3)}
    np.lib.format.write_array_header_1_0(header, description)
    np.savez(path, **{k: v for k, v in arrays.items() if k != "train_images"})
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("train_images.npy", header.getvalue())
    assert re.search("not a readable|out of memory", fails(hw2_q2.main, ["-data_path", path]))


def make_jpeg(width, height):
    """A small JPEG that claims to have this size."""
    content = in_memory(Image.new("RGB", (16, 16)).save, "JPEG")
    return content.replace(struct.pack(">HH", 16, 16), struct.pack(">HH", height, width))


BOMBS = {  # images of a few kilobytes: (content, the limit in millions of pixels)
    "PNG": (lambda: in_memory(Image.new("1", (14_000, 14_000)).save, "PNG"), 178),
    "PNG that Pillow refuses": (lambda: in_memory(Image.new("1", (20_001,) * 2).save, "PNG"), 400),
    "JPEG": (lambda: make_jpeg(20_000, 20_001), 400),
}


@pytest.mark.parametrize(("make", "limit"), BOMBS.values(), ids=BOMBS)
def test_images_of_too_many_pixels_are_not_decoded(tmp_path, make, limit):
    (tmp_path / "x").write_bytes(make())
    with pytest.raises(UserError, match=f"more than {limit} million pixels; shrink it"):
        read_image(tmp_path / "x")


def test_symbols_that_look_like_mathematics(start, tmp_path):
    """matplotlib would parse what is between two dollar signs, and fail."""
    main, argv = start("q3")
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.tsv").write_text("k $\\bad$ t\tc$\\a$t\n", encoding="utf-8")
    main([*argv, "--data_dir", str(tmp_path)])
    assert list(tmp_path.glob("out/figures/q3-*/attention.png"))


MISSING = [
    (hw2_q2.main, "-data_path no/such/file.npz"),
    (hw2_q2.main, "-predict x.jpg -checkpoint no/such/network.pt"),
    (hw2_q2.main, "-predict x.jpg -output_dir no/such"),
    (hw2_q3.main, "--data_dir no/such"),
    (hw2_q3.main, "spell x --direction g2p --output_dir no/such"),
    (hw2_q3.main, "spell x --checkpoint_name no/such/model.pt"),
]


@pytest.mark.parametrize(("main", "line"), MISSING)
def test_what_is_not_there_is_named_and_not_made(main, line, fails, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hw2_q2, "PRETRAINED", Path("none shipped.pt"))
    assert f"error: {Path('no/such')}" in fails(main, line.split())
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------
# fuzzing: every input is read, or refused by UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def damaged(content):
    """`content` with some bytes replaced, some cut out of it, or other bytes altogether."""
    positions = st.integers(0, len(content) - 1)
    edits = st.lists(st.tuples(positions, st.integers(0, 255)), min_size=1, max_size=8)

    def replace(edits):
        result = bytearray(content)
        for position, byte in edits:
            result[position] = byte
        return bytes(result)

    cuts = st.tuples(positions, positions).map(lambda c: content[: min(c)] + content[max(c) :])
    return edits.map(replace) | cuts | st.binary(max_size=200)


def in_memory(write, *arguments, **options):
    """The bytes that write(file, ...) writes."""
    file = io.BytesIO()
    write(file, *arguments, **options)
    return file.getvalue()


ARRAYS = {f"{split}_images": np.zeros((2, 48, 48, 3), np.uint8) for split in utils.SPLITS}
ARRAYS |= {f"{split}_labels": np.array([0, 5]) for split in utils.SPLITS}
PIXELS = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
FORMATS = "PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"
IMAGES = {name: in_memory(Image.fromarray(PIXELS).save, name) for name in FORMATS}


def make_archive(file):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for folder, name in itertools.product(("seg_train", "seg_test"), utils.CLASSES):
            for number in range(2):
                archive.writestr(f"{folder}/{folder}/{name}/{number}.png", IMAGES["PNG"])


def read_landscapes(path):
    for images, labels in utils.load_landscapes(path).splits.values():
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert images.shape[1:] == (3, 48, 48)
        assert len(labels) == len(images) > 0


def read_archive(path):
    output = path.with_name("archive.npz")
    output.unlink(missing_ok=True)
    prepare_landscapes.main(["--archive", str(path), "--output", str(output)])
    read_landscapes(output)


def read_record(path):
    record = utils.load_record(path)
    kinds = {"command": str} | dict.fromkeys(("arguments", "data", "history", "measured"), dict)
    assert all(type(record[name]) is kind for name, kind in kinds.items())


def read_checkpoint(path):
    """In every way the scripts do, unless the first refuses it for all."""
    saved = utils.load_checkpoint(path)
    with contextlib.suppress(UserError):
        hw2_q2.load_network(path, "cpu")
    identity = {k: saved[k] for k in ("arguments", "data", "training_version")}
    run, model = make_run(path.parent, **identity, checkpoint_file=path), torch.nn.Linear(2, 2)
    with contextlib.suppress(UserError):
        utils.resume(run, model, torch.optim.Adam(model.parameters()))
    speller, _, _ = hw2_q3.load_speller(path, "cpu")
    speller.greedy(speller.encode([(("k", "æ"), "")]), 3)


def read_photograph(path):
    image = read_image(path)
    assert (image.shape, image.dtype) == ((3, 48, 48), torch.uint8)


FILES = {"arrays": read_landscapes, "archive": read_archive, "record": read_record}
FILES |= {"checkpoint": read_checkpoint, **dict.fromkeys(IMAGES, read_photograph)}


@pytest.fixture(scope="module")
def contents_of_files(finished_runs, folder):
    """{name: the content of a file, which is a good one}."""
    [record], [checkpoint] = finished_runs.glob("*/runs/q3-*"), finished_runs.glob("*/q3-*.pt")
    made = {"arrays": in_memory(np.savez, **ARRAYS), "archive": in_memory(make_archive)}
    written = {"record": record.read_bytes(), "checkpoint": checkpoint.read_bytes()}
    files = IMAGES | made | written
    for name, read in FILES.items():
        (folder / name).write_bytes(files[name])
        read(folder / name)
    return files


@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
def test_fuzzed_files(folder, contents_of_files, name, data):
    (folder / name).write_bytes(data.draw(damaged(contents_of_files[name])))
    with contextlib.suppress(UserError):
        FILES[name](folder / name)


VALUES = st.sampled_from([0, 1, 255, -1, 6, float("nan"), float("inf")])
TYPES = st.sampled_from(["u1", "i8", "f2", "f4", "f8", "b1", "c8", "U3", "S2", "M8[s]"])
SIZES = st.lists(st.sampled_from([0, 1, 2, 3, 48, 6912]), max_size=4)
SHAPES = SIZES.filter(lambda shape: np.prod(shape, dtype=float) < 10**5)


@given(key=st.sampled_from(list(ARRAYS)), shape=SHAPES, dtype=TYPES, value=VALUES)
def test_fuzzed_shapes_and_types_of_arrays(folder, key, shape, dtype, value):
    arrays = dict(ARRAYS)
    with contextlib.suppress(ValueError, OverflowError, TypeError), np.errstate(all="ignore"):
        arrays[key] = np.full(shape, value).astype(dtype)
    np.savez(folder / "x.npz", **arrays)
    with contextlib.suppress(UserError):
        read_landscapes(folder / "x.npz")


SEPARATORS = st.sampled_from(
    ["\t", "\t\t", " ", "", "  ", ";", ',"', "\t/", '"\t"', ", ", "(1)\t["]
)
LINE = st.tuples(st.text(max_size=12), SEPARATORS, st.text(max_size=12)).map("".join)
LINES = st.lists(LINE | st.just("k æ t\tcat"), max_size=5).map("\n".join)
LISTS = LINES.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=100)


@given(content=LISTS)
def test_fuzzed_words(folder, content):
    for name in ("train.tsv", "valid.tsv", "test.tsv"):
        (folder / name).write_bytes(content)
    with contextlib.suppress(UserError):
        data = utils.load_pronunciations(folder)
        for phonemes, word in data.splits["train"]:
            assert phonemes
            assert all(phonemes)
            assert word == word.strip() != ""
        "\n".join(hw2_q3.audit(data)).encode()  # can be printed


@given(content=LISTS, segment=st.sampled_from([[], ["--segment"]]))
def test_fuzzed_lists_of_pronunciations(folder, content, segment):
    (folder / "wiki.tsv").write_bytes(content)
    shutil.rmtree(folder / "split", ignore_errors=True)
    argv = f"--tsv {folder / 'wiki.tsv'} --output_dir {folder / 'split'} --valid 1 --test 1"
    with contextlib.suppress(UserError):
        prepare_pronunciations.main([*argv.split(), "--train", "all", *segment])
    if (folder / "split").exists():
        splits = utils.load_pronunciations(folder / "split").splits.values()
        words = [{word for _, word in pairs} for pairs in splits]
        assert all(words)
        assert sum(map(len, words)) == len(set.union(*words))


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(
    LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x)
)


@given(data=st.data(), value=JSON)
def test_fuzzed_pickles_and_parts_in_intact_checkpoints(folder, contents_of_files, data, value):
    good = contents_of_files["checkpoint"]
    with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(folder / "p.pt", "w") as new:
        for entry in old.infolist():
            content, is_pickle = old.read(entry), entry.filename.endswith("data.pkl")
            new.writestr(entry, data.draw(damaged(content)) if is_pickle else content)
    with contextlib.suppress(UserError):
        read_checkpoint(folder / "p.pt")
    parts = torch.load(io.BytesIO(good))
    torch.save(parts | {data.draw(st.sampled_from(sorted(parts))): value}, folder / "p.pt")
    with contextlib.suppress(UserError):
        read_checkpoint(folder / "p.pt")
