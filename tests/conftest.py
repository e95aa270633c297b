"""Shared by the tests: small data, the real data where they are, helpers that run a script."""

import contextlib
import itertools
import os
import subprocess
from pathlib import Path
from unittest.mock import patch

import hypothesis
import numpy as np
import pytest
import torch

import hw2_q2
import hw2_q3
import utils
from data import sample

SCRIPTS = {"q2": hw2_q2, "q3": hw2_q3}
both_questions = pytest.mark.parametrize("question", SCRIPTS)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=20, help="kills in test_robustness.py")
    parser.addoption("--fuzz", type=int, default=30, help="inputs per fuzz test")


def pytest_configure(config):
    count = config.getoption("fuzz")
    hypothesis.settings.register_profile(
        "hw2",
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=count < 1000,  # the same inputs each time, but for a long search
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.settings.load_profile("hw2")


# ----------------------------------------------------------------------------------------------
# data


@pytest.fixture(scope="session")
def landscapes():
    """36 training, 12 validation and 12 test images, drawn as those of the built-in sample."""
    splits = {}
    for i, (split, size) in enumerate({"train": 36, "val": 12, "test": 12}.items()):
        random = np.random.default_rng([7, i])
        labels = np.arange(size) % 6
        images = [sample.draw_landscape(utils.CLASSES[label], random) for label in labels]
        images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        splits[split] = images, torch.from_numpy(labels)
    return utils.Landscapes(splits)


@pytest.fixture(scope="session")
def arrays(landscapes):
    """The same images, channels last, and labels as arrays under the course's keys."""
    result = {}
    for split, (images, labels) in landscapes.splits.items():
        result[f"{split}_images"] = images.permute(0, 2, 3, 1).numpy()
        result[f"{split}_labels"] = labels.numpy()
    return result


@pytest.fixture(scope="session")
def landscapes_path(arrays, tmp_path_factory):
    """The same as an .npz file."""
    path = tmp_path_factory.mktemp("data") / "landscapes.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="session")
def real_data():
    """The folder of real photographs and pronunciations; without it, the test is skipped."""
    folder = Path(os.environ.get("HW2_REAL_DATA", "no such folder"))
    if not folder.is_dir():
        pytest.skip("HW2_REAL_DATA does not name the folder of real data")
    return folder


# ----------------------------------------------------------------------------------------------
# runs

DATA = {"name": "photographs", "fingerprint": "0" * 12}


def make_run(folder, title="run", **changes):
    """A Run of three epochs in `folder`."""
    fields = {"command": "python hw2_q2.py", "arguments": {}, "data": DATA, "training_version": 1}
    return utils.Run(title, **fields | {"epochs": 3, "folder": folder} | changes)


def save_checkpoint(path, **changes):
    """Write a checkpoint that has every part, empty but for `changes`."""
    content = {"command": "python hw2_q2.py", "arguments": {}, "data": DATA, "training_version": 1}
    content |= {"history": {}, "seconds": [], "model": {}, "optimizer": {}}
    utils.write_file(path, lambda file: torch.save(content | changes, file))


@pytest.fixture(scope="session")
def commands(landscapes_path, tmp_path_factory):
    """{question: the arguments of a run of four epochs that takes a second}, but for a folder."""
    words = tmp_path_factory.mktemp("words")
    for name in ("train", "valid", "test"):
        text = "k æ t\tcat\nd ɔ ɡ\tdog\nk ʌ p\tcup\nt ɑ p\ttop\n"
        (words / f"{name}.tsv").write_text(text, encoding="utf-8")
    q2 = f"-epochs 4 -threads 1 -data_path {landscapes_path} -output_dir"
    q3 = f"--n_epochs 4 --use_attn --nucleus --hidden_size 8 --batch_size 2 --data_dir {words}"
    return {"q2": q2.split(), "q3": [*q3.split(), "--output_dir"]}


def load_run(folder):
    """The record and the checkpoint of the only run in a folder."""
    [record], [checkpoint] = folder.glob("figures/runs/*"), folder.glob("checkpoints/*.pt")
    assert record.stem == checkpoint.stem
    return utils.load_record(record), utils.load_checkpoint(checkpoint)


def run_here(commands, *_):
    """In place of utils.run_processes: train runs in this process, which takes less time."""
    for command in commands:
        SCRIPTS[Path(command[1]).stem.removeprefix("hw2_")].main(command[2:])
        yield subprocess.CompletedProcess(command, 0)


class Killed(BaseException):
    """Raised where a test wants a run to die; nothing catches it."""


@contextlib.contextmanager
def killed_at(owner, name, call):
    """The run in the `with` block has to die where it calls owner.name for the call-th time."""
    real, calls = getattr(owner, name), itertools.count(1)

    def die_in_time(*args, **kwargs):
        if next(calls) == call:
            raise Killed
        return real(*args, **kwargs)

    with patch.object(owner, name, die_in_time), pytest.raises(Killed):
        yield


def assert_equal_runs(first, second):
    """Two (record, checkpoint) agree in every bit, but for what was measured."""
    for part in {"model", "best"} & first[1].keys():  # question 2 has no best weights
        assert first[1][part].keys() == second[1][part].keys()
        for name, weights in first[1][part].items():
            assert torch.equal(weights, second[1][part][name]), name
    records = [{k: v for k, v in run[0].items() if k != "measured"} for run in (first, second)]
    assert records[0] == records[1]


@pytest.fixture
def fails(capsys):
    """fails(main, argv): the one line on stderr with which main(argv) ends, its status being 2."""

    def run(main, argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            utils.run_script(lambda: main([str(word) for word in argv]))
        assert stop.value.code == 2
        errors = capsys.readouterr().err.strip().splitlines()
        assert len(errors) == 1, errors
        assert "Traceback" not in errors[0]
        return errors[0]

    return run
