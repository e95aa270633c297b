"""Errors, seeding and devices, checkpoints, runs side by side, figures.
Options: test_options.py. Loading data: test_data.py."""

import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import nn

import hw2_q2
import utils
from tests.conftest import make_run, save_checkpoint
from utils import UserError


def test_messages_are_one_short_line_without_control_characters():
    text = str(UserError("a\nb \x1b[31m \u202e Größe ʃ" + "c" * 1000))
    assert text.isprintable()
    assert text.startswith(r"a\nb \x1b[31m \u202e Größe ʃ")
    assert text.endswith("ccc ...")
    assert len(text) == 500
    assert utils.one_line(ValueError("a\n  b")) == "a b"
    assert utils.one_line(ValueError()) == "ValueError"


def test_one_namespace_per_combination_of_values():
    expanded = utils.expand(Namespace(rate=[1, 2], seed=[3, 4], size=5), "rate", "seed")
    values = [(args.rate, args.seed, args.size) for args in expanded]
    assert values == [(1, 3, 5), (1, 4, 5), (2, 3, 5), (2, 4, 5)]


# ----------------------------------------------------------------------------------------------
# seeding and devices


def test_random_numbers_repeat_and_differ_by_seed_and_epoch():
    def draw(*seed):
        utils.seed_everything(*seed)
        return tuple(torch.rand(4).tolist())

    assert draw(1, 2) == draw(1, 2)
    assert len({draw(seed, epoch) for seed in range(5) for epoch in range(5)}) == 25


@pytest.mark.parametrize("name", ["cuda:99", "meta"])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(UserError, match=f"device '{name}' cannot be used"):
        utils.prepare_device(name)


def test_an_apple_gpu_is_offered_if_it_has_every_operation(monkeypatch):
    for works in (True, False):
        monkeypatch.setattr(utils, "mps_works", lambda works=works: works)
        parser = utils.Parser("script.py")
        utils.add_runtime_options(parser, "-", "one")
        assert ("cuda:1, mps" in parser.format_help()) == works
    monkeypatch.setattr(torch, "zeros", lambda *_, device: Mock(device=torch.device(device)))
    with pytest.raises(UserError, match="device 'mps' lacks operations"):
        utils.prepare_device("mps")


QUOTA, PERIOD = "cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"  # version 1 of control groups


@pytest.mark.parametrize(("files", "count"), [
    ({}, 8),
    ({QUOTA: "-1\n", PERIOD: "100000\n"}, 8),
    ({QUOTA: "9000\n", PERIOD: "100000\n"}, 1),
    ({"cpu.max": "max 100000\n"}, 8),
    ({"cpu.max": "150000 100000\n"}, 2),
    ({"cpu.max": "nonsense"}, 8),
])  # fmt: skip
def test_cores_are_limited_by_the_quota_of_a_container(tmp_path, monkeypatch, files, count):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(utils.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(utils, "cpu_quota", functools.partial(utils.cpu_quota, tmp_path))
    assert utils.cpu_count() == count


def test_the_mask_of_dropout_comes_from_torch_rand():
    """This defines the results of a seed."""
    x = torch.randn(7, 9)
    torch.manual_seed(5)
    y = utils.FastDropout(0.3)(x)
    torch.manual_seed(5)
    assert torch.equal(y, x * ((torch.rand(7, 9) >= 0.3).float() / (1 - 0.3)))
    assert torch.equal(utils.FastDropout(0.5).eval()(x), x)
    assert utils.FastDropout(0.5)(x.bfloat16()).dtype == torch.bfloat16


def test_the_one_cycle_schedule_warms_up_linearly_and_decays_as_torch():
    """Each step has the rate of its middle: torch's at every second of twice as many steps."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    settings = {"total_steps": 400, "pct_start": 0.3, "final_div_factor": 1e30}
    schedule, theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2.0, **settings), []
    for _ in range(400):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    ours = [utils.learning_rate("one_cycle", 2.0, step, 200) for step in range(200)]
    assert ours[60:] == pytest.approx(theirs[120::2])
    assert ours[:60] == pytest.approx([2 * (step + 0.5) / 60 for step in range(60)])
    assert {utils.learning_rate("constant", 2.0, step, 200) for step in range(200)} == {2.0}


# ----------------------------------------------------------------------------------------------
# records and checkpoints


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Or a power cut could leave an empty file."""
    calls = Mock()
    monkeypatch.setattr(utils.os, "fsync", calls.fsync)
    monkeypatch.setattr(utils.os, "replace", calls.replace)
    utils.write_file(tmp_path / "x.json", lambda file: file.write_text("{}"))
    assert [call[0] for call in calls.method_calls] == ["fsync", "replace"]


def test_only_a_file_is_replaced():
    """A device would be gone."""
    with pytest.raises(UserError, match="not a file"):
        utils.write_file(Path(os.devnull), Mock())


@pytest.mark.parametrize(("system", "tries"), [("nt", 3), ("posix", 1)])
def test_windows_denies_a_rename_for_a_moment(monkeypatch, system, tries):
    replace = Mock(side_effect=[PermissionError, PermissionError, None])
    with monkeypatch.context() as patch:
        patch.setattr(utils.os, "replace", replace)
        patch.setattr(utils.time, "sleep", lambda seconds: None)
        patch.setattr(utils.os, "name", system)
        with contextlib.suppress(PermissionError):
            utils._replace("a", "b")
    assert replace.call_count == tries


@pytest.mark.parametrize("module", ["hw2_q2", "figures.report"])
def test_figures_need_no_backend_of_a_notebook(module):
    """A notebook's kernel hands its children a backend that may not be installed."""
    environment = os.environ | {"MPLBACKEND": "no_such_backend"}
    command = [sys.executable, "-c", f"import {module}"]
    done = subprocess.run(command, cwd=utils.ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_finished_run_with_fewer_epochs_is_named(tmp_path, capsys):
    def run(epochs, title="run", lr=0.1):
        return make_run(tmp_path, title, arguments={"epochs": epochs, "lr": lr}, epochs=epochs)

    short = run(2)
    finished = {"final": {"x": 1}, "history": {}, "measured": {"seconds": [1.0, 1.0]}}
    utils.save_record(short.record, {"command": "x", **short.identity} | finished)
    short.record.with_name("run-broken.json").write_text("{")
    for other in (run(2), run(1), run(5, lr=0.2), run(5, "another")):
        utils.note_shorter_run(other)
    assert capsys.readouterr().out == ""
    utils.note_shorter_run(run(5))
    assert f"Finished with fewer epochs (2): {short.name}\n" in capsys.readouterr().out


@pytest.mark.parametrize("fused", [True, False])
def test_a_run_resumes_with_the_optimizer_of_another_device(tmp_path, fused):
    """Some devices have no fused steps."""

    def make(fused):
        model = nn.Linear(2, 1)
        return model, torch.optim.Adam(model.parameters(), 0.5, fused=fused)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    run, first, second = make_run(tmp_path), make(fused), make(not fused)
    step(*first)
    utils.save_checkpoint(run, *first, {}, [])
    utils.resume(run, *second)
    step(*first)
    step(*second)
    torch.testing.assert_close(second[0].weight, first[0].weight)


def test_the_best_checkpoint_has_the_highest_score(tmp_path, capsys):
    for name, score in {"q2-a": 1, "q2-b": 3, "q2-c": 2, "q2-d": None, "q3-e": 9}.items():
        save_checkpoint(tmp_path / f"{name}.pt", history={"score": [score]}, seconds=[1.0])
    save_checkpoint(tmp_path / "q2-empty.pt")
    (tmp_path / "q2-broken.pt").write_text("nothing")
    best = utils.best_checkpoint(tmp_path, "q2-", lambda saved: saved["history"]["score"][0])
    assert best == tmp_path / "q2-b.pt"
    skipped = [line.split(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert skipped == [f"Skipping {tmp_path / name}" for name in ("q2-broken.pt", "q2-empty.pt")]


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_record_names_the_commit_of_the_code(tmp_path, monkeypatch):
    def git(line):
        command = f"git -c user.name=a -c user.email=a@b.c {line}".split()
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)

    def commit():
        utils.commit.cache_clear()
        return utils.measured(torch.device("cpu"), [])["commit"]

    monkeypatch.setattr(utils, "ROOT", tmp_path)
    assert commit() is None
    git("init")
    assert commit() is None  # nothing is committed
    for name in ("file.py", "notes"):
        (tmp_path / name).write_text("1")
    git("add .")
    git("commit -m first")
    name = git("rev-parse --short HEAD").stdout.strip()
    (tmp_path / "notes").write_text("2")
    assert commit() == name  # the code is the same
    (tmp_path / "file.py").write_text("2")
    assert commit() == f"{name}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None  # no git
    utils.commit.cache_clear()


# ----------------------------------------------------------------------------------------------
# runs side by side


def test_leaving_early_ends_the_processes_even_those_just_starting(tmp_path, monkeypatch):
    start = subprocess.Popen

    def start_slowly(*args, **how):
        process = start(*args, **how)
        time.sleep(0.5)
        return process

    monkeypatch.setattr(subprocess, "Popen", start_slowly)
    path = tmp_path / "late"
    late = sys.executable, "-c", f"import time; time.sleep(15); open({str(path)!r}, 'w')"
    results = utils.run_processes([(sys.executable, "-c", "pass"), late, late, late], 2)
    assert next(results).returncode == 0
    time.sleep(0.25)  # of the others one is running and one is just starting
    results.close()
    assert not path.exists()


def test_failed_runs_do_not_stop_the_others_and_are_retried(
    landscapes_path, tmp_path, monkeypatch, capsys
):
    """Of four rates one has no data, one dies, one diverges and one is trained."""
    endings = {0.1: (2, "Warning\nhw2_q2.py: error: no data\n"), 0.2: (-6, ""), 0.3: (2, "x")}
    started = []

    def run_processes(commands, *how):
        started.append((len(commands), *how))
        for command in commands:
            args = hw2_q2.parse_args(command[2:])
            status, errors = endings.get(args.learning_rate, (0, ""))
            if status == 0:
                hw2_q2.train(args)
            elif args.learning_rate == 0.3:
                run = hw2_q2.make_run(args, hw2_q2.load_data(args))
                record = utils.new_record(run, nn.Linear(1, 1), {}, [])
                utils.save_record(run.record, record | {"diverged_in_epoch": 2})
            yield subprocess.CompletedProcess(command, status, stderr=errors)

    def train(line, failures=0):
        """{rate: line of the output} of a command of which so many runs fail."""
        argv = f"-epochs 1 -device cpu -data_path {landscapes_path} -output_dir {tmp_path} {line}"
        how = ", without -restart," * ("-restart" in line)
        message = f"{failures} of 4 runs failed; run the same command{how} to retry"
        with pytest.raises(UserError, match=message) if failures else contextlib.nullcontext():
            hw2_q2.main([*argv.split(), "-learning_rate", "0.1", "0.2", "0.3", "0.4"])
        lines = re.findall("^q2-bn-gap-lr(0..).*?: (.*)", capsys.readouterr().out, re.M)
        return {float(rate): text for rate, text in lines}

    monkeypatch.setattr(hw2_q2, "draw_figures", lambda *_: None)
    monkeypatch.setattr(utils, "run_processes", run_processes)
    monkeypatch.setattr(utils, "cpu_count", lambda: 6)
    lines = train("-threads 2", failures=2)
    assert "Final Test acc" in lines.pop(0.4)
    assert lines == {0.1: "hw2_q2.py: error: no data", 0.2: "status -6", 0.3: "diverged in epoch 2"}
    endings.clear()
    lines = train("-jobs 5")
    assert lines[0.4].endswith("(finished; -restart retrains it)")
    assert all("Final Test acc" in line for line in lines.values())
    endings[0.4] = 2, "no data"
    assert train("-restart", failures=1)[0.4] == "no data"  # not the old record's scores
    assert started == [(4, 3, None), (3, 5, None), (4, 6, None)]


def test_a_scheduler_that_is_not_there_is_named(monkeypatch):
    client = pytest.importorskip("distributed").Client
    monkeypatch.setattr("distributed.Client", lambda a, timeout: client(a, timeout=0.2))
    for address in ("tcp://127.0.0.1:9", "nonsense://"):
        with pytest.raises(UserError, match=f"no Dask scheduler at {address}"):
            utils.dask_client(address)
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match="pip install distributed"):
        utils.dask_client("tcp://127.0.0.1:1")


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_same_figure_has_the_same_bytes(tmp_path, suffix):
    first, second = tmp_path / f"first.{suffix}", tmp_path / f"second.{suffix}"
    for path in (first, second):
        utils.plot_curve(path, "title", "loss", [3.0, 2.0])
    assert first.read_bytes() == second.read_bytes() != b""
