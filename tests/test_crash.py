"""Runs that are killed at any moment, by any signal, go on to the same bits: `--kills 500` for a
long soak."""

import multiprocessing
import os
import random
import signal
import sys
import time

import pytest
import torch
from PIL import Image

import hw2_q2
import hw2_q3
import utils
from tests.conftest import assert_equal_runs

if os.name != "posix":
    pytest.skip("signals as POSIX has them", allow_module_level=True)

SCRIPTS = {"q2": hw2_q2, "q3": hw2_q3}
KILLS_A_RUN = 5
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload([__name__])  # the imports, made once


def child(question, argv, output, started, write, stage):
    """A script's process; with `write` it kills itself around or within its write-th file."""
    torch.set_num_threads(1)
    real, count = utils.write_file, 0

    def write_file(path, content):
        nonlocal count
        count += 1
        kill = stage[1] if count == write else 0

        def half(file):
            content(file)
            os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), kill)

        if kill and stage[0] == "before":
            os.kill(os.getpid(), kill)
        real(path, half if kill and stage[0] == "within" else content)
        if kill and stage[0] == "after":
            os.kill(os.getpid(), kill)

    def main():
        started.set()
        SCRIPTS[question].main(argv)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is over: nothing to interrupt
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    utils.write_file = write_file
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with open(output, "w", encoding="utf-8", buffering=1) as stream:
        sys.stdout = sys.stderr = stream
        utils.run_script(main)


def run(question, argv, folder, write=0, stage=None, delay=None, kill=None):
    """Run a script until it ends or is killed: its exit status, its output and its seconds."""
    output, started = folder / "output.txt", forks.Event()
    process = forks.Process(target=child, args=(question, argv, output, started, write, stage))
    process.start()
    assert started.wait(60)
    began = time.monotonic()
    if delay is not None:
        process.join(delay)
        if process.is_alive():
            os.kill(process.pid, kill)
    process.join(120)
    return process.exitcode, output.read_text(encoding="utf-8"), time.monotonic() - began


def assert_files_are_whole(folder):
    """Every file under a final name can be read."""
    for path in folder.rglob("*"):
        if path.name.startswith(".") or path.is_dir():
            continue
        readers = {".pt": utils.load_checkpoint, ".json": utils.load_record, ".png": read_png}
        readers.get(path.suffix, lambda path: None)(path)


def read_png(path):
    with Image.open(path) as picture:
        picture.load()


def results(folder, output):
    """What two runs must have in common."""
    (record,), (checkpoint,) = folder.glob("figures/runs/*"), folder.glob("checkpoints/*.pt")
    lines = [line for line in output.splitlines() if line.startswith(("Valid", "Final", "Test "))]
    assert lines
    return utils.load_record(record), utils.load_checkpoint(checkpoint), lines


@pytest.fixture
def command(landscapes_path, tmp_path):
    """command(question, folder) -> the arguments of a small run of that question."""
    words = tmp_path / "words"
    words.mkdir()
    pairs = [("k æ t", "cat"), ("d ɔ ɡ", "dog"), ("k ʌ p", "cup"), ("t ɑ p", "top")]
    for name in ("train", "valid", "test"):
        text = "".join(f"{sound}\t{word}\n" for sound, word in pairs)
        (words / f"{name}.tsv").write_text(text, encoding="utf-8")
    lines = {
        "q2": f"-epochs 4 -threads 1 -data_path {landscapes_path} -output_dir",
        "q3": f"--use_attn --nucleus --n_epochs 6 --hidden_size 8 --batch_size 2 --threads 1 "
        f"--data_dir {words} --output_dir",
    }
    return lambda question, folder: [*lines[question].split(), str(folder)]


@pytest.mark.parametrize("question", SCRIPTS)
def test_killed_at_any_moment(question, command, tmp_path, pytestconfig):
    """Several kills, each followed by the same command; then it ends as if undisturbed."""
    whole = tmp_path / "undisturbed"
    whole.mkdir()
    status, output, seconds = run(question, command(question, whole), whole)
    assert status == 0, output
    expected = results(whole, output)
    chance, left = random.Random(question), pytestconfig.getoption("kills") // len(SCRIPTS)
    signals = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
    while left > 0:
        folder = tmp_path / f"killed-{left}"
        folder.mkdir()
        argv, again = command(question, folder), min(left, KILLS_A_RUN)
        while again:
            kill = chance.choice(signals)
            if chance.random() < 0.5:  # at any time, or around a file, of which there are ten
                how = {"delay": chance.uniform(0, seconds), "kill": kill}
            else:
                stage = chance.choice(("before", "within", "after"))
                how = {"write": chance.randint(1, 10), "stage": (stage, kill)}
            status, output, _ = run(question, argv, folder, **how)
            assert_files_are_whole(folder)
            if status == 0:  # it was over before
                continue
            again, left = again - 1, left - 1
            if kill == signal.SIGKILL:
                assert status == -kill
            else:
                assert status == 130
                assert output.splitlines()[-1].endswith("to go on, run the same command again")
                assert "Traceback" not in output
        status, output, _ = run(question, argv, folder)
        assert status == 0, output
        found = results(folder, output)
        assert_equal_runs(found[:2], expected[:2])
        assert found[2] == expected[2]
        names = [{p.name for p in place.rglob("*")} for place in (folder, whole)]
        assert names[0] == names[1]
        assert not [name for name in names[0] if ".part" in name]


def hold(path, held):
    run = utils.Run("run", {}, path)
    with utils.only_here(run):
        held.set()
        time.sleep(60)


def test_one_process_a_run_and_the_lock_goes_with_it(tmp_path):
    held, other = forks.Event(), utils.Run("run", {}, tmp_path)
    process = forks.Process(target=hold, args=(tmp_path, held))
    process.start()
    assert held.wait(60)
    with (
        pytest.raises(utils.UserError, match="another process is training"),
        utils.only_here(other),
    ):
        pass
    process.kill()
    process.join()
    with utils.only_here(other):
        pass
