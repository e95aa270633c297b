"""Errors and options, seeding and devices, records and checkpoints, runs side by side.
Loading data: test_data.py."""

import argparse
import contextlib
import math
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch import nn

import utils
from tests.conftest import make_run, save_checkpoint
from utils import UserError

# ----------------------------------------------------------------------------------------------
# errors and the command line


def test_messages_are_one_short_line_without_control_characters():
    text = str(UserError("a\nb \x1b[31m \u202e Größe ʃ" + "c" * 1000))
    assert text.isprintable()
    assert text.startswith(r"a\nb \x1b[31m \u202e Größe ʃ")
    assert text.endswith("ccc ...")
    assert len(text) == 500
    assert utils.one_line(ValueError("a\n  b")) == "a b"
    assert utils.one_line(ValueError()) == "ValueError"


def test_numbers_out_of_bounds_are_refused():
    integer = utils.number(int, 1, 10)
    open_range = utils.number(float, 0, 1, low_open=True, high_open=True)
    assert (integer("1"), integer("10"), open_range("0.5")) == (1, 10, 0.5)
    for text in ("0", "-1", "1.5", "x", "", "nan", "inf", "11", "1e1"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"is not an integer in \[1, 10\]"):
            integer(text)
    for text in ("0", "1", "nan"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"a number in \(0, 1\)"):
            open_range(text)


OVERRIDES = {
    "": {},
    "-rate 0.1 -augment": {},
    "-rate 0.5 -mirror": {"rate": 0.5, "mirror": True},
    "-rate 0.5 0.25 0.5": {"rate": [0.5, 0.25]},
    "-no_norm -augment flip crop": {"norm": False, "augment": ["flip", "crop"]},
}


@pytest.mark.parametrize(("line", "expected"), OVERRIDES.items())
def test_overrides_as_command_line_words_parse_back(line, expected):
    parser = utils.Parser("script.py")
    parser.add_argument("-rate", type=float, default=0.1, nargs="+", action=utils.OneOrMore)
    parser.add_argument("-augment", nargs="*", default=[])
    parser.add_argument("-mirror", action="store_true")
    parser.add_argument("-no_norm", dest="norm", action="store_false")
    args, defaults = parser.parse_args(line.split()), parser.parse_args([])
    arguments = utils.overrides(args, defaults)
    assert arguments == expected
    assert parser.parse_args(utils.to_argv("-", arguments)) == args
    assert "rate" not in utils.overrides(args, defaults, without=["rate"])


def test_one_namespace_per_combination_of_values():
    args = argparse.Namespace(rate=[1, 2], seed=[3, 4], size=5)
    expanded = [(a.rate, a.seed, a.size) for a in utils.expand(args, "rate", "seed")]
    assert expanded == [(1, 3, 5), (1, 4, 5), (2, 3, 5), (2, 4, 5)]
    assert utils.expand(argparse.Namespace(rate=1), "rate") == [argparse.Namespace(rate=1)]


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


@pytest.fixture
def mps(monkeypatch):
    """A torch that says it has Apple's GPU and makes the tensors of the probe on the CPU."""
    zeros, ones = torch.zeros, torch.ones

    def zeros_on_cpu(*size, device, **kwargs):
        return Mock(device=torch.device(device)) if size == (1,) else zeros(*size, **kwargs)

    monkeypatch.setattr(torch, "zeros", zeros_on_cpu)
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
    monkeypatch.setattr(torch, "autocast", lambda *args: torch.no_grad())
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    utils.mps_works.cache_clear()
    yield
    utils.mps_works.cache_clear()


@pytest.mark.parametrize("missing", [None, "embedding_bag", "interpolate"])
def test_an_apple_gpu_is_offered_if_it_has_every_operation(mps, missing, monkeypatch):
    parser = utils.Parser("script.py")
    if missing:
        monkeypatch.setattr(torch.nn.functional, missing, Mock(side_effect=NotImplementedError))
    utils.add_runtime_options(parser, "-", "one")
    assert ("cuda:1, mps" in parser.format_help()) == (not missing)
    if missing:
        with pytest.raises(UserError, match="device 'mps' lacks operations"):
            utils.prepare_device("mps", 1)
    else:
        assert utils.prepare_device("mps", 1).type == "mps"


def test_the_probe_of_bfloat16_answers_yes_or_no():
    assert utils.bfloat16_is_faster() in (True, False)


QUOTA, PERIOD = "cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"  # version 1 of control groups
QUOTAS = [
    ({}, math.inf),
    ({"cpu.max": "max 100000\n"}, math.inf),
    ({"cpu.max": "150000 100000\n"}, 1.5),
    ({"cpu.max": "nonsense"}, math.inf),
    ({QUOTA: "-1\n", PERIOD: "100000\n"}, math.inf),
    ({QUOTA: "50000\n", PERIOD: "100000\n"}, 0.5),
]


@pytest.mark.parametrize(("files", "quota"), QUOTAS)
def test_the_cpu_quota_of_a_container(tmp_path, files, quota):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert utils.cpu_quota(tmp_path) == quota


def test_cores_are_limited_by_the_quota(monkeypatch):
    monkeypatch.setattr(utils.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for quota, count in ((math.inf, 8), (2.5, 3), (2.0, 2), (0.1, 1)):
        monkeypatch.setattr(utils, "cpu_quota", lambda quota=quota: quota)
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


def test_a_name_depends_on_what_can_change_the_result_alone(tmp_path):
    run = make_run(tmp_path, arguments={"lr": 0.1, "seed": 1})
    same = make_run(tmp_path / "x", arguments={"seed": 1, "lr": 0.1}, command="x", epochs=9)
    assert run.name == same.name
    data = {"name": "photographs", "fingerprint": "1" * 12}
    others = [{"arguments": {"lr": 0.2}}, {"data": data}, {"training_version": 2}]
    assert run.name not in {make_run(tmp_path, **other).name for other in others}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, error):
    def write_half(file):
        file.write_text("half")
        raise error

    path = tmp_path / "folder" / "x.json"
    utils.write_file(path, lambda file: file.write_text("old"))
    with pytest.raises(UserError if error is OSError else error):
        utils.write_file(path, write_half)
    assert [file.read_text() for file in path.parent.iterdir()] == ["old"]


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


def new_record(run, **changes):
    """A record of two epochs."""
    record = {"command": run.command, **run.identity, "history": {"loss": [0.2, 0.1]}}
    return record | {"measured": {"date": "then"}, "final": {"greedy": 1}} | changes


def test_a_record_is_written_one_key_a_line_and_read_back(tmp_path):
    record = new_record(make_run(tmp_path), text="ʃ\n", history={"loss": [0.1, 1e-300]})
    utils.save_record(tmp_path / "x.json", record)
    assert utils.load_record(tmp_path / "x.json") == record
    assert len((tmp_path / "x.json").read_text().splitlines()) == len(record) + 2
    assert utils.load_record(tmp_path / "none.json") == {}


def test_a_finished_run_with_fewer_epochs_is_named(tmp_path, capsys):
    def run(epochs, **more):
        return make_run(tmp_path, arguments={"epochs": epochs} | more, epochs=epochs)

    finished = {"final": {"x": 1}, "history": {}, "measured": {"seconds": [1.0, 1.0]}}
    short = run(2, lr=0.1)
    utils.save_record(short.record, {"command": "x", **short.identity} | finished)
    for other in (run(2, lr=0.1), run(1, lr=0.1), run(5), make_run(tmp_path, "y", epochs=5)):
        utils.note_shorter_run(other)
    assert capsys.readouterr().out == ""
    utils.note_shorter_run(run(5, lr=0.1))
    assert f"{short.name} is finished with 2 epochs. This run starts" in capsys.readouterr().out


def test_training_again_completes_a_record_or_replaces_it(tmp_path):
    run = make_run(tmp_path)
    assert utils.store_record(run, new_record(run)) == f"Record: {run.record}"
    utils.save_record(run.record, new_record(run, analysis={"lengths": [1]}))
    again = new_record(run, final={"beam": 2}, measured={"date": "now"})
    assert "the same numbers before" in utils.store_record(run, again)
    completed = new_record(run, final={"greedy": 1, "beam": 2}, analysis={"lengths": [1]})
    assert utils.load_record(run.record) == completed
    other = new_record(run, history={"loss": [0.3, 0.1]})
    assert "other numbers before, which are replaced" in utils.store_record(run, other)
    assert utils.load_record(run.record) == other


def test_a_finished_run_has_all_epochs_and_final_scores(tmp_path):
    run = make_run(tmp_path, arguments={"lr": 0.1})
    assert not utils.is_trained(run)
    for arguments, epochs in (({"lr": 0.1}, 2), ({"lr": 0.2}, 3), ({"lr": 0.1}, 3)):
        save_checkpoint(run.checkpoint, arguments=arguments, seconds=[1.0] * epochs)
        assert utils.is_trained(run) == (arguments == {"lr": 0.1} and epochs == 3)
    assert utils.finished_record(run) == {}
    record = new_record(run)
    utils.save_record(run.record, {name: record[name] for name in record if name != "final"})
    assert utils.finished_record(run) == {}
    utils.save_record(run.record, record)
    assert utils.finished_record(run) == record
    run.checkpoint.unlink()
    assert utils.finished_record(run) == {}


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True)])
def test_a_run_resumes_with_the_optimizer_of_another_device(tmp_path, before, after):
    """Some devices have no fused steps."""

    def step(model, optimizer):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    run, model, other = make_run(tmp_path), nn.Linear(2, 1), nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5, fused=before)
    other_optimizer = torch.optim.Adam(other.parameters(), lr=0.1, fused=after)
    step(model, optimizer)
    utils.save_checkpoint(run, model, optimizer, {}, [])
    utils.resume(run, other, other_optimizer)
    model.zero_grad()
    step(model, optimizer)
    step(other, other_optimizer)
    torch.testing.assert_close(other.weight, model.weight)


def test_the_best_checkpoint_has_the_highest_score(tmp_path, capsys):
    for name, score in {"q2-a": 1, "q2-b": 3, "q2-c": 2, "q2-d": None, "q3-e": 9}.items():
        save_checkpoint(tmp_path / f"{name}.pt", history={"score": [score]}, seconds=[1.0])
    save_checkpoint(tmp_path / "q2-empty.pt")
    (tmp_path / "q2-broken.pt").write_text("nothing")
    best = utils.best_checkpoint(tmp_path, "q2-", lambda saved: saved["history"]["score"][0])
    assert best == tmp_path / "q2-b.pt"
    skipped = [line.split(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert skipped == [f"Skipping {tmp_path / name}" for name in ("q2-broken.pt", "q2-empty.pt")]
    with pytest.raises(UserError, match="no trained network there yet"):
        utils.best_checkpoint(tmp_path, "q4-", lambda saved: 1)


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_record_names_the_commit_of_the_code(tmp_path, monkeypatch):
    def git(*words):
        who = "-c", "user.name=a", "-c", "user.email=a@b.c"
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    def commit():
        utils.commit.cache_clear()
        return utils.measured(torch.device("cpu"), [])["commit"]

    monkeypatch.setattr(utils, "ROOT", tmp_path)
    assert commit() is None
    git("init")
    assert commit() is None  # nothing is committed
    for name in ("file.py", "notes"):
        (tmp_path / name).write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    clean = commit()
    [head] = (tmp_path / ".git" / "refs" / "heads").iterdir()
    assert head.read_text().startswith(clean)
    (tmp_path / "notes").write_text("2")
    assert commit() == clean  # the code is the same
    (tmp_path / "file.py").write_text("2")
    assert commit() == f"{clean}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None  # no git
    utils.commit.cache_clear()


# ----------------------------------------------------------------------------------------------
# runs side by side


def python(code):
    return sys.executable, "-c", code


def test_results_come_in_the_order_of_completion():
    slow = "import sys, time; time.sleep(1); sys.exit('slow failed')"
    results = list(utils.run_processes([python(slow), python("print()")], 2))
    assert [(r.returncode, r.stderr.strip()) for r in results] == [(0, ""), (1, "slow failed")]
    assert [r.args[-1] for r in results] == ["print()", slow]


def test_leaving_early_ends_the_processes_even_those_just_starting(tmp_path, monkeypatch):
    start = subprocess.Popen

    def start_slowly(*args, **how):
        process = start(*args, **how)
        time.sleep(0.5)
        return process

    monkeypatch.setattr(subprocess, "Popen", start_slowly)
    late = python(f"import time; time.sleep(15); open({str(tmp_path / 'late')!r}, 'w')")
    started = time.monotonic()
    results = utils.run_processes([python("pass"), late, late, late], 2)
    assert next(results).returncode == 0
    results.close()
    assert time.monotonic() - started < 10
    assert list(tmp_path.iterdir()) == []


# A script in place of a training: it behaves as its first option says and writes its record.
SCRIPT = """
import json, os, pathlib, sys, time
behaviour, path = sys.argv[2], pathlib.Path(sys.argv[4])
path.with_suffix(".started").open("a").write("started\\n")
if behaviour == "fail":
    sys.exit("script.py: error: no data")
if behaviour == "die":
    os.abort()
if behaviour == "meet":  # wait until two runs are there at once
    end = time.time() + 30
    while len(list(path.parent.glob("*.started"))) < 2 and time.time() < end:
        time.sleep(0.01)
data = {"name": "photographs", "fingerprint": "0"}
record = {"command": "", "arguments": {}, "data": data, "history": {}, "measured": {}}
record |= {"diverged_in_epoch": 2} if behaviour == "diverge" else {"final": behaviour}
path.write_text(json.dumps(record))
sys.exit(2 if behaviour == "diverge" else 0)
"""


@pytest.fixture
def train_all(tmp_path):
    """train_all(behaviour, ..., option=value): train a run for each behaviour side by side."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "figures" / "runs").mkdir(parents=True)
    defaults = {"behaviour": "", "record": "", "title": "", "device": "cpu", "threads": None}
    defaults |= {"jobs": 2, "scheduler": None, "restart": False}
    default_args = argparse.Namespace(**defaults)
    script = SimpleNamespace(
        __file__=str(tmp_path / "script.py"),
        DASH="-",
        load_data=lambda args: None,
        overrides=lambda args, without: utils.overrides(args, default_args, without),
        make_run=lambda args, data: make_run(tmp_path, args.title),
        summary=lambda record: record.get("final", "diverged"),
    )

    def train(*behaviours, **options):
        configs = []
        for i, behaviour in enumerate(behaviours):
            run = make_run(tmp_path, f"run{i}")
            changes = {"behaviour": behaviour, "record": str(run.record), "title": run.title}
            configs.append(argparse.Namespace(**defaults | options | changes))
        utils.train_side_by_side(script, configs, lambda run, args: utils.load_record(run.record))

    return train


def printed(capsys):
    """{run's title: line} of what was printed."""
    lines = (line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    return {name[:4]: text for name, text in lines}


def test_as_many_runs_as_cores_train_side_by_side(train_all, monkeypatch, capsys):
    monkeypatch.setattr(utils, "cpu_count", lambda: 2)
    started = time.monotonic()
    train_all("meet", "meet", jobs=None)
    assert time.monotonic() - started < 20  # or the first would have waited 30 seconds
    assert printed(capsys) == {"run0": "meet", "run1": "meet"}


def test_failed_runs_do_not_stop_the_others_and_are_retried(train_all, capsys, tmp_path):
    with pytest.raises(UserError, match="2 of 4 runs failed; run the same command to retry"):
        train_all("fail", "die", "diverge", "good", jobs=1)
    lines = printed(capsys)
    assert lines.pop("run1").startswith("status")
    assert lines == {"run0": "script.py: error: no data", "run2": "diverged", "run3": "good"}
    train_all("good", "good", "good", "good")
    assert printed(capsys)["run3"] == "good (finished; -restart retrains it)"
    with pytest.raises(UserError, match="3 of 3 runs failed"):  # old records hide no failure
        train_all("fail", "fail", "die", restart=True)
    assert printed(capsys)["run2"].startswith("status")
    logs = sorted((tmp_path / "figures" / "runs").glob("*.started"))
    assert [len(log.read_text().splitlines()) for log in logs] == [3, 3, 2, 1]


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense://"])
def test_a_scheduler_that_is_not_there_is_named(train_all, monkeypatch, address):
    client = pytest.importorskip("distributed").Client
    monkeypatch.setattr("distributed.Client", lambda a, timeout: client(a, timeout=0.2))
    with pytest.raises(UserError, match=f"no Dask scheduler at {address}"):
        train_all("good", scheduler=address)


def test_without_dask_a_scheduler_is_an_error(train_all, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match="pip install distributed"):
        train_all("good", scheduler="tcp://127.0.0.1:1")


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_same_figure_has_the_same_bytes(tmp_path, suffix):
    for name in ("a", "b"):
        utils.plot_curve(tmp_path / f"{name}.{suffix}", "title", "loss", [3.0, 2.0])
    first, second = (tmp_path / f"{name}.{suffix}" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes() != b""
