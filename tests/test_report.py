"""The README's tables say what the run records say; the report is made of the records alone."""

import dataclasses
import re
import shlex
import shutil
import statistics

import numpy as np
import pytest

import hw2_q2
import hw2_q3
import utils
from data import prepare_landscapes, prepare_pronunciations
from utils import UserError

README = (utils.ROOT / "README.md").read_text(encoding="utf-8")
RECORDS = [utils.load_record(path) for path in sorted(utils.ROOT.glob("figures/runs/*.json"))]
RECORDS = [record for record in RECORDS if record["config"]["data"]["name"] != "sample"]


def runs_of(script, label):
    """The records of one of a script's systems, of all seeds."""
    [system] = [system for system in script.SYSTEMS if system.label == label]
    wanted = script.run_options(script.parse_options(system.arguments.split()))
    configs = [(record, record["config"]) for record in RECORDS]
    return [
        record
        for record, config in configs
        if config["question"] == script.QUESTION
        and config["options"] | {"seed": wanted["seed"]} == wanted
        and utils._data_of(config["data"]["name"]) == system.data
    ]


OF_THE_REPORT = [
    record
    for script in (hw2_q2, hw2_q3)
    for system in script.SYSTEMS
    if system.group != "beyond"
    for record in runs_of(script, system.label)
]
Q2 = {
    "plain, rate 0.1 | .5684 / .5743": ("plain, rate 0.1", None),
    "plain, rate 0.01 | .7293 / .6970": ("plain, rate 0.01", "plain, scrambled"),
    "plain, rate 0.001 | .5798 / .5743": ("plain, rate 0.001", None),
    "batch norm + pooling, rate 0.01 | .7528 / .7460": (
        "batch norm + pooling",
        "batch norm + pooling, scrambled",
    ),
}


def row_of_question_2(start, label, scrambled):
    runs = runs_of(hw2_q2, label)
    ordered = hw2_q2.with_scores(runs)
    scrambled = runs_of(hw2_q2, scrambled) if scrambled else []
    columns = [
        " / ".join(utils.mean_sd(hw2_q2.accuracy(runs, split)) for split in ("val", "test"))
        for runs in (scrambled, ordered)
    ]
    diverged = len(runs) - len(ordered)
    columns += [
        utils.mean_sd([hw2_q2.late(r) for r in ordered]),
        str(len(scrambled) or "–"),
        str(len(ordered)) + (f" (+ {diverged} diverged)" if diverged else ""),
    ]
    return f"| {start} | {' | '.join(columns)} |".replace("– / –", "–")


@pytest.mark.parametrize(("start", "labels"), Q2.items(), ids=Q2)
def test_question_2(start, labels):
    assert row_of_question_2(start, *labels) in README.splitlines()


BEYOND = {
    "the report's recipe": hw2_q2.VARIANT,
    "`-recipe best`": hw2_q2.BEST,
    "`-recipe best -model resnet -augment flip crop`, 20 epochs": hw2_q2.RESNET_20,
    "`-recipe best -model resnet`": hw2_q2.BEST_RESNET,
}


def row_beyond(start, runs, took, *scores):
    row = start, f"{runs[0]['parameters']:,}", f"{statistics.mean(took):.0f}", *scores
    return f"| {' | '.join(row)} | {len(runs)} |"


def row_of_a_network(start, label):
    runs = runs_of(hw2_q2, label)
    scores = [utils.mean_sd(hw2_q2.accuracy(runs, split)) for split in ("val", "test")]
    return row_beyond(start, runs, map(utils.minutes, runs), *scores)


@pytest.mark.parametrize(("start", "label"), BEYOND.items(), ids=BEYOND)
def test_beyond_the_report(start, label):
    assert row_of_a_network(start, label) in README.splitlines()


MEASURES = {
    "greedy": ("cer", "wer"),
    "nucleus": ("cer", "wer", "wer@3"),
    "beam": ("cer", "wer", "wer@3"),
}
Q3 = {
    "no attention, greedy | .4354 / .9040": ("greedy", "no attention"),
    "attention, greedy | .2677 / .8090": ("greedy", "attention"),
    "attention, nucleus, p = 0.8 | .3139 / .8550 / .7550": ("nucleus", "attention"),
    "attention, beam of 5 | - ": ("beam", "attention"),
}


def row_of_question_3(start, system):
    kind, label = system
    scores = [record["final"][kind] for record in runs_of(hw2_q3, label)]
    assert all(score.get("p", 0.8) == 0.8 and score.get("size", 5) == 5 for score in scores)
    ours = " / ".join(
        utils.mean_sd([score[measure] for score in scores]) for measure in MEASURES[kind]
    )
    return f"| {start} | {ours} | {len(scores)} |".replace("  ", " ")


@pytest.mark.parametrize(("start", "system"), Q3.items(), ids=Q3)
def test_question_3(start, system):
    assert row_of_question_3(start, system) in README.splitlines()


BEYOND_3 = {
    "the report's recipe, attention": hw2_q3.ATTENTION,
    "the same, trained better": hw2_q3.EQUAL,
    "`--recipe best`": hw2_q3.BEST,
    "`--recipe best`, five models together": hw2_q3.TOGETHER,
    "`--recipe best --dropout 0.2 --n_epochs 20`, all of WikiPron's US English": hw2_q3.ALL,
    "the same words, three models together": hw2_q3.ALL_TOGETHER,
    "`--recipe best`, 10,000 words of UK English": "UK English",
    "`--recipe best`, 10,000 words of Portuguese": "Portuguese",
    "`--recipe best --direction g2p`: phonemes of written words": hw2_q3.PRONOUNCED,
}


def row_of_a_speller(start, label):
    scored = {name: runs_of(hw2_q3, name) for name in BEYOND_3.values()}
    scores = [
        utils.mean_sd([hw2_q3.error(run["final"], "beam", measure) for run in scored[label]])
        for measure in MEASURES["beam"]
    ]
    return row_beyond(start, scored[label], hw2_q3.minutes(scored, label), " / ".join(scores))


@pytest.mark.parametrize(("start", "label"), BEYOND_3.items(), ids=BEYOND_3)
def test_beyond_the_report_spelling(start, label):
    assert row_of_a_speller(start, label) in README.splitlines()


def test_means_deviations_and_late_epochs():
    assert utils.mean_sd([0.1, 0.3]) == "0.200 ± 0.141"
    assert utils.mean_sd([0.5]) == "0.500"
    assert utils.mean_sd([]) == "–"
    history = lambda *values: {"history": {"val_accuracy": values}}  # noqa: E731
    assert hw2_q2.late(history(*[0] * 30, *[0.5] * 10)) == 0.5
    assert hw2_q2.late(history(*[0] * 5, *[1] * 5)) == 1
    assert hw2_q2.first_epoch(history(0.7, 0.75, 0.6)) == 2
    assert hw2_q2.first_epoch(history(0.7)) is None


def accurate(right, wrong):
    """A record of question 2 with so many right and wrong answers."""
    scores = {"accuracy": right / (right + wrong), "confusion": [[right, wrong], [0, 0]]}
    history = {"val_accuracy": [scores["accuracy"]]}
    return {"history": history, "final": {"val": scores, "test": scores}}


def test_whether_the_reports_accuracy_could_be_ours():
    """.5684 / .5743 against runs of 1,000 pictures at .57 and .58, and at .7 and .71."""
    label, diverged = "plain, rate 0.1", {"history": {}, "diverged_in_epoch": 1}
    near = [accurate(570, 430), accurate(580, 420), diverged]
    *_, row = hw2_q2.accuracy_table({label: near}, [label]).splitlines()
    assert row.startswith(f"| {label} | 0.5684 / 0.5743 | 0.575 ± 0.007 / 0.575 ± 0.007 | 0.575 ")
    assert row.endswith("| 2 (+ 1 diverged) | – / – | – / – |")
    assert hw2_q2.accuracy_table({label: near[:2]}, [label]).endswith("| yes / yes |")
    far = [accurate(700, 300), accurate(710, 290)]
    assert hw2_q2.accuracy_table({label: far}, [label]).endswith("| no / no |")


def sure(right, wrong, minutes=1):
    """Like accurate(), with what the chapter beyond the report shows of a run."""
    record = accurate(right, wrong)
    test = record["final"]["test"] | {
        "confusion": [[right, wrong, 0, 0, 0, 0], *[[0, 1, 0, 0, 0, 0]] * 5],
        "confident": [[9, 2, 0, 0, 0, 0], *[[0, 1, 0, 0, 0, 0]] * 5],
        "calibration": [[0, None, None], [40, 0.25, 0.5], [60, 0.75, 0.75]],
        "disputed": [3, 2, 1],
        "as_is": record["final"]["test"]["accuracy"] - 0.01,
    }
    final = {"val": test, "test": test}
    return record | {"final": final, "measured": {"seconds": [30.0] * 2 * minutes}}


def test_gains_by_hand():
    """Variances .0002 and .0008 of two runs each: an error of the square root of .0001 + .0004."""
    assert utils.gain([0.8, 0.82], [0.7, 0.74]) == "+0.090 ± 0.022"
    assert utils.gain([0.8], [0.9, 0.7]) == "+0.000"
    assert utils.gain([], [0.9]) == "–"
    records = {"base": [sure(80, 20), sure(82, 18)], "less": [sure(70, 30)], "none": []}
    *_, first, second = hw2_q2.gains_table(records, "base", ("less", "none")).splitlines()
    assert first == "| base | 0.810 ± 0.014 |  | 0.810 ± 0.014 |  | 0.810 ± 0.014 |  | 2 |"
    assert second == "| less | 0.700 | -0.110 | 0.700 | -0.110 | 0.700 | -0.110 | 1 |"


@pytest.fixture
def beyond():
    """Records of question 2's chapter beyond the report."""
    records = {system.label: [] for system in hw2_q2.SYSTEMS}
    records[hw2_q2.VARIANT] = [sure(70, 30, minutes=9)]
    records[hw2_q2.BEST] = [sure(90, 10, minutes=20), sure(92, 8, minutes=30)]
    records[hw2_q2.BEST_20] = [sure(88, 12, minutes=10)]
    records["without smoothed labels"] = [sure(86, 14)]
    return records


def test_mistakes_by_hand(beyond):
    """Nine mistakes of the first class, four of the others, two and four of them confident."""
    runs = beyond[hw2_q2.BEST]
    text = hw2_q2.count_mistakes(runs)
    assert "Of 13.0 mistakes (mean over seeds) 6.0 are made" in text
    assert "Of the 3 test pictures that are also" in text
    assert "under another label 2.0 (15.4% of the mistakes) are taken" in text
    assert text.endswith("1.0 of them with such a probability")
    first = hw2_q2.mistakes_table(runs).splitlines()[2]
    assert first == "| buildings | forest | 9.0 | 2.0 |"
    *_, last = hw2_q2.table(beyond, hw2_q2.LADDER, "test", hw2_q2.LADDER_COLUMNS[-2]).splitlines()
    assert last == "| best recipe | 0.910 ± 0.014 | 0.900 ± 0.014 |"
    assert (
        hw2_q2.classes_table(beyond).splitlines()[3].startswith("| best recipe, 20 epochs | 0.880")
    )


def test_calibration_by_hand(beyond):
    """40 pictures .25 off, 60 not off at all."""
    record = beyond[hw2_q2.BEST_20][0]
    assert hw2_q2.calibration_error(record) == pytest.approx(0.4 * 0.25)
    assert hw2_q2.pool_bin([[10, 0.2, 0.1], [30, 0.6, 0.5]]) == pytest.approx((0.5, 0.4))
    assert hw2_q2.pool_bin([[10, 0.2, 0.1], [0, None, None]]) is None
    _, *lines = hw2_q2.draw_calibration(beyond).axes[0].get_lines()
    assert [list(zip(*line.get_data())) for line in lines] == [[(0.25, 0.5), (0.75, 0.75)]] * 2


def test_the_ladder_shows_the_records(beyond):
    *lines, reported = hw2_q2.draw_ladder(beyond).axes[0].get_lines()
    points = [list(zip(*line.get_data())) for line in lines]
    assert points == [[(9, 0.7)], [(10, 0.88)], [(20, 0.9), (30, 0.92)]]
    assert list(reported.get_ydata()) == [0.746, 0.746]


def spelled(distances, ranks, cer, took, seed=42):
    """A record of question 3 with words of four letters each."""
    scores = {"distances": distances, "ranks": ranks}
    final = {"lengths": [4] * len(ranks), "greedy": scores, "beam": scores}
    history, measured = {"val_cer": cer}, {"seconds": [took * 60.0]}
    config = {"options": {"seed": seed}}
    return {
        "final": final, "history": history, "measured": measured, "parameters": 1234,
        "config": config,
    }  # fmt: skip


def test_the_speller_beyond_the_report_by_hand():
    """Half and three quarters of the letters wrong; the first of two words right, or neither."""
    scored = {system.label: [] for system in hw2_q3.SYSTEMS}
    scored[hw2_q3.ATTENTION] = [spelled([2, 4], [3, 0], [0.5, 0.4, 0.6], 3)]
    assert hw2_q3.draw_ladder(scored) is None
    assert hw2_q3.results_table(scored, [hw2_q3.BEST]) is None
    third = spelled([0, 4], [1, 0], [0.2], 6, seed=2)  # is in no ensemble
    better = spelled([0, 4], [1, 0], [0.3], 5), spelled([0, 4], [1, 0], [0.2], 6, seed=1)
    scored[hw2_q3.BEST] = [*better, third]
    scored[hw2_q3.TOGETHER] = [spelled([0, 0], [1, 1], [], 0, seed=[42, 1])]
    labels = hw2_q3.ATTENTION, hw2_q3.TOGETHER
    *_, first, second = hw2_q3.results_table(scored, labels).splitlines()
    errors = "0.750 | 1.000 | 0.750 | 1.000 | 0.500"
    assert first == f"| {hw2_q3.ATTENTION} | 1,234 | 3.0 | {errors} | 1 |"
    assert second.startswith(f"| {hw2_q3.TOGETHER} | 1,234 | 11.0 | 0.000 | ")
    alone = scored | {hw2_q3.BEST: [third]}  # whose members' times are not known
    [row] = hw2_q3.results_table(alone, [hw2_q3.TOGETHER]).splitlines()[2:]
    assert row.startswith(f"| {hw2_q3.TOGETHER} | 1,234 | – | 0.000 | ")
    step = list(hw2_q3.STEPS)[-1]
    scored[step] = [spelled([2, 4], [3, 0], [0.35], 4)]
    *_, first, second, third = hw2_q3.steps_table(scored).splitlines()
    assert first == f"| {hw2_q3.ATTENTION} | 3.0 | 0.400 |  | {errors} | 1 |"
    assert second == f"| {step} | 4.0 | 0.350 | – | {errors} | 1 |"  # the one before is missing
    start = f"| {hw2_q3.BEST} | 5.7 | 0.233 ± 0.058 | -0.117 | 0.500 ± 0.000 | 0.500"
    assert third.startswith(start)
    panels = ([0.75, 0.5, 0], 0.2677), ([1, 0.5, 0], 0.809)
    for axes, (values, report) in zip(hw2_q3.draw_ladder(scored).axes, panels):
        *lines, reported = axes.get_lines()
        times = [list(line.get_xdata()) for line in lines]
        assert times == [[3], [5, 6, 6], [11]]
        assert [line.get_ydata()[0] for line in lines] == values
        assert reported.get_ydata()[0] == report
        assert lines[-1].get_label() == hw2_q3.TOGETHER


PARSERS = {
    "hw2_q2.py": hw2_q2.parse_options,
    "hw2_q3.py": hw2_q3.parse_options,
    "data.prepare_landscapes": prepare_landscapes.parse_options,
    "data.prepare_pronunciations": prepare_pronunciations.parse_options,
}


@pytest.mark.parametrize("name", ["README.md", "data/README.md", "figures/README.md"])
def test_every_command_in_the_documents_is_one(name):
    text = (utils.ROOT / name).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("    python ")]
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        script, *arguments = words[1:] if words[0] == "-m" else words
        if script in PARSERS:
            PARSERS[script](arguments)
    assert lines


def test_records_bear_the_names_of_their_runs():
    """So that the report finds them: options that come later must not rename earlier runs."""
    for path in utils.ROOT.glob("figures/runs/*.json"):
        title = path.stem.rpartition("-")[0]
        assert utils.Run(title, utils.load_record(path)["config"]).name == path.stem


def test_the_readme_says_what_the_records_took():
    took = {"q2": [], "q3": []}
    for record in OF_THE_REPORT:
        config, minutes = record["config"], sum(record["measured"]["seconds"]) / 60
        if "final" in record and config["options"].get("epochs", 40) == 40:
            took[config["question"]].append(minutes)
    memory = max(r["measured"].get("peak_memory_mib") or 0 for r in OF_THE_REPORT) / 1024
    text = " ".join(README.split())
    assert f"took {min(took['q2']):.0f} to {max(took['q2']):.0f} minutes of one thread" in text
    assert f"question 3 took {min(took['q3']):.0f} to {max(took['q3']):.0f}." in text
    assert f"whole runs up to {memory:.1f} GiB" in text


def test_records_name_their_machines():
    for record in OF_THE_REPORT:
        assert record["measured"]["threads"] == 1  # as the README says
        assert record["measured"]["cores"] == 2
        assert record["measured"]["processor"]


def test_machines_are_counted_with_their_gpus():
    machine = {"processor": "CPU", "cores": 2, "threads": 1, "torch": "2", "python": "3"}
    records = [{"measured": machine | {"device": name}} for name in ("cpu", "cpu", "GPU")]
    same = "2 cores of an CPU, 1 thread a run, torch 2, Python 3"
    assert utils.machines(records) == f"{same} (2 runs); GPU, {same} (1 runs)"


def test_records_hold_no_paths_and_can_be_repeated():
    assert RECORDS
    for record in RECORDS:
        config = record["config"]
        script, _ = SCRIPTS[config["question"]]
        python, name, *words = record["command"].split()
        assert (python, name) == ("python", f"{script.__name__}.py")
        assert script.run_options(script.parse_options(words)) == config["options"]
        assert "/" not in "".join(map(str, config["options"].values()))


# ----------------------------------------------------------------------------------------------
# the regenerated report

SCRIPTS = {"q2": (hw2_q2, "-"), "q3": (hw2_q3, "--")}


def regenerate(question, folder, *argv):
    """Write a question's part of the report in `folder`, training nothing."""
    script, dash = SCRIPTS[question]
    words = f"{dash}report", f"{dash}only", "none of them", f"{dash}output_dir", str(folder)
    script.main([*words, *argv])


@pytest.fixture
def committed(tmp_path):
    """A folder with a copy of the committed records."""
    for name in ("runs", "trials"):
        shutil.copytree(utils.ROOT / "figures" / name, tmp_path / "figures" / name)
    return tmp_path


def contents(folder):
    return {p.name: p.read_bytes() for p in (folder / "figures").iterdir() if p.is_file()}


@pytest.mark.parametrize("question", SCRIPTS)
@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_the_same_records_give_the_same_bytes(committed, question, ending):
    argv = f"{SCRIPTS[question][1]}figure_format", ending
    regenerate(question, committed, *argv)
    first = contents(committed)
    assert sum(name.endswith(ending) for name in first) >= 5
    for path in (committed / "figures").glob("*.*"):
        path.unlink()
    regenerate(question, committed, *argv)
    assert contents(committed) == first


def test_each_part_leaves_the_other_and_what_was_written_by_hand(committed):
    regenerate("q2", committed)
    path = committed / "figures" / "README.md"
    text = path.read_text(encoding="utf-8")
    assert "{{" not in text
    assert "not trained yet" in text.partition("<!-- q3 -->")[2]
    regenerate("q3", committed)
    text = path.read_text(encoding="utf-8")
    assert "{{" not in text
    by_hand = text.replace("<!-- q3 -->", "A remark in between.\n\n<!-- q3 -->") + "A last word.\n"
    path.write_text(by_hand.replace("### 2.1", "### changed"), encoding="utf-8")
    regenerate("q2", committed)
    assert path.read_text(encoding="utf-8") == by_hand
    regenerate("q3", committed)
    assert path.read_text(encoding="utf-8") == by_hand


def test_the_committed_report_is_that_of_the_committed_records(committed):
    for question in SCRIPTS:
        regenerate(question, committed)
    text = (committed / "figures" / "README.md").read_text(encoding="utf-8")
    assert (utils.ROOT / "figures" / "README.md").read_text(encoding="utf-8") == text
    figures = {path.name for path in (utils.ROOT / "figures").glob("q?-*.png")}
    assert figures == set(re.findall(r"\((q\d-[\w-]+\.png)\)", text))


def test_a_report_without_its_markers_is_left_alone(committed, fails):
    path = committed / "figures" / "README.md"
    path.write_text("mine", encoding="utf-8")
    line = fails(hw2_q2.main, ["-report", "-only", "none", "-output_dir", committed])
    assert "<!-- q2 -->" in line
    assert path.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("content", [b"\xff\xfe", None], ids=["bytes", "folder"])
def test_a_report_that_cannot_be_read_is_named_before_any_training(committed, fails, content):
    path = committed / "figures" / "README.md"
    if content:
        path.write_bytes(content)
    else:
        path.mkdir()
    for record in (committed / "figures" / "runs").glob("q2-*"):
        record.unlink()
    argv = ["-report", "-data_path", "no such data", "-output_dir", committed]
    assert "README.md: cannot be read" in fails(hw2_q2.main, argv)


def test_a_broken_record_is_set_aside(committed, capsys):
    broken = sorted((committed / "figures" / "runs").glob("q3-*"))[0]
    broken.write_text('{"config": ', encoding="utf-8")
    regenerate("q3", committed)
    assert broken.name in capsys.readouterr().err
    assert not broken.exists()
    assert broken.with_suffix(".broken").exists()


def test_records_of_other_data_stay_out(committed):
    """Also where there are real ones of the same options, or samples."""
    regenerate("q3", committed)
    before = contents(committed)
    runs = committed / "figures" / "runs"
    record = utils.load_record(next(runs.glob("q3-attn-lr0.003-seed42-*")))
    record["final"]["greedy"]["cer"] = 0.001
    for name, fingerprint in (("pronunciations", "f" * 12), ("sample", "0" * 12)):
        record["config"]["data"] = {"name": name, "fingerprint": fingerprint}
        utils.save_record(runs / f"q3-zzz-{name}.json", record)
    regenerate("q3", committed)
    assert contents(committed) == before


@pytest.mark.parametrize("question", SCRIPTS)
def test_a_run_that_diverged_at_once_breaks_no_report(committed, question):
    for path in (committed / "figures" / "runs").glob(f"{question}-*"):
        record = utils.load_record(path)
        record |= {"history": {}, "diverged_in_epoch": 1, "diverged_in_batch": 1}
        utils.save_record(path, {k: v for k, v in record.items() if k != "final"})
        if "-seed42-" not in path.name:
            path.unlink()
    regenerate(question, committed)
    text = (committed / "figures" / "README.md").read_text(encoding="utf-8")
    assert "not trained yet" in text


def test_error_rates_by_length():
    """Question 3's figure, at its last point, from the records' words."""
    runs = runs_of(hw2_q3, "attention")
    fig = hw2_q3.draw_lengths({"attention": runs})
    assert [bar.get_height() for bar in fig.axes[2].patches][-1] == np.sum(
        np.array(runs[0]["final"]["lengths"]) >= 14
    )
    for axes, index in zip(fig.axes, (0, 1)):
        [line] = axes.get_lines()
        rates = []
        for run in runs:
            words = zip(run["final"]["lengths"], run["final"]["greedy"]["distances"])
            long = [(length, distance) for length, distance in words if length >= 14]
            lengths, distances = map(np.array, zip(*long))
            rates.append([distances.sum() / lengths.sum(), (distances > 0).mean()][index])
        assert line.get_ydata()[-1] == pytest.approx(np.mean(rates))


def test_figures_show_the_records(committed):
    records = {label: runs_of(hw2_q2, label) for label in SMALL}
    fig = hw2_q2.draw_bands(records, tuple(records), {"val_accuracy": "Validation accuracy"})
    lines = fig.axes[0].get_lines()
    assert len(lines) == len(records)
    for line, runs in zip(lines, records.values()):
        for epoch, value in zip(*line.get_data()):
            histories = [run["history"]["val_accuracy"] for run in runs]
            known = [history[int(epoch) - 1] for history in histories if len(history) >= epoch]
            assert value == pytest.approx(statistics.mean(known))
    [running, own] = hw2_q2.draw_running_mean(records["plain, rate 0.01"]).axes[0].get_lines()
    losses = [run["history"]["train_loss"] for run in records["plain, rate 0.01"]]
    assert own.get_ydata()[2] == pytest.approx(np.mean(losses, 0)[2])
    assert running.get_ydata()[2] == pytest.approx(np.mean(losses, 0)[:3].mean())


def drawn(axes):
    """{label: y values} of the lines of an axes."""
    return {line.get_label().partition(" (")[0]: line.get_ydata() for line in axes.get_lines()}


def test_runs_that_end_early_are_drawn_one_by_one():
    runs = runs_of(hw2_q2, "plain, rate 0.1")
    records = {"plain, rate 0.1": runs}
    [axes] = hw2_q2.draw_bands(records, records, {"val_accuracy": "Validation accuracy"}).axes
    lines = [list(line.get_ydata()) for line in axes.get_lines()]
    assert lines == [run["history"]["val_accuracy"] for run in runs]


def test_figures_of_final_scores_show_the_records():
    """Moved pictures, sizes, overfitting and scrambled pixels; WER@k."""
    records = {system.label: runs_of(hw2_q2, system.label) for system in hw2_q2.SYSTEMS}
    for axes, labels in zip(hw2_q2.draw_moved(records).axes, (hw2_q2.MOVED, hw2_q2.POOLS)):
        assert list(drawn(axes)) == list(labels)
        for label, values in zip(labels, drawn(axes).values()):
            runs = np.array(hw2_q2.moved(records[label]))
            assert values == pytest.approx((runs - runs[:, :1]).mean(0))
    accuracy, epochs, seconds = hw2_q2.draw_size(records).axes
    for label in hw2_q2.CHANGES:
        runs = hw2_q2.with_scores(records[label])
        assert list(drawn(accuracy)[label]) == [hw2_q2.late(run) for run in runs]
        assert list(drawn(epochs)[label]) == [hw2_q2.first_epoch(run) for run in runs]
        assert list(drawn(seconds)[label]) == [hw2_q2.seconds_an_epoch(run) for run in runs]
    for axes, label in zip(hw2_q2.draw_overfitting(records).axes, hw2_q2.REGULARISED):
        histories = [run["history"] for run in records[label]]
        for name, column in (("training", "train_accuracy"), ("validation", "val_accuracy")):
            mean = np.mean([history[column] for history in histories], 0)
            assert drawn(axes)[name] == pytest.approx(mean)
    lines = drawn(hw2_q2.draw_scrambled(records).axes[-1])
    for label in hw2_q2.SCRAMBLED:
        mean = np.mean([run["history"]["val_accuracy"] for run in records[label]], 0)
        assert lines[label] == pytest.approx(mean)
    runs = runs_of(hw2_q3, "attention")
    reported = hw2_q3.REPORTED[hw2_q3.ATTENTION, "nucleus"][1:]
    lines = drawn(hw2_q3.draw_candidates(runs, reported).axes[0])
    for way, name in (("nucleus", "nucleus, p = 0.8"), ("beam", "beam of 10")):
        assert lines[name] == pytest.approx(
            np.mean([run["final"]["curves"][way] for run in runs], 0)
        )
    assert list(lines["nucleus, the report"]) == [0.855, 0.755]


def test_the_reports_totals():
    table = hw2_q2.totals_table().splitlines()
    assert table[2].endswith("| 5,340,742 | -3,078 | 2,496 | 5,340,160 | 5,340,160 |")
    assert table[3].endswith("| 755,718 | -3,078 | 0 | 752,640 | 752,640 |")


def test_right_examples_by_hand():
    runs = runs_of(hw2_q3, "attention")
    rows = hw2_q3.example_table(runs[:1]).splitlines()[2:]
    bold = [
        sum(f"**{row.split(' | ')[0][2:]}**" in cell for cell in row.split(" | ")[1:2])
        for row in rows
    ]
    assert sum(bold) == 5  # remainder, misperception, slogger, glossal, companions
    sentence = hw2_q3.count_right_examples(runs)
    right = [sum(word in found for word, found in run["final"]["examples"]) for run in runs]
    assert f"spell 5 of the ten words rightly, ours {', '.join(map(str, right))}" in sentence


@pytest.mark.parametrize("question", SCRIPTS)
def test_trials_are_named_by_what_they_change(tmp_path, question, capsys):
    script, _ = SCRIPTS[question]
    assert utils._trials_table(script, tmp_path) is None
    record = runs_of(script, "attention" if question == "q3" else "kernels 3x3, max pooling")[0]
    more = {"03": {"gone": ["a", "b"]}, "02": {}, "04": {"dropout": 0.7}, "05": {"gone": []}}
    for day, changes in more.items():
        options = record["config"]["options"] | changes
        trial = record | {"config": record["config"] | {"options": options}}
        trial["measured"] = record["measured"] | {"date": f"2026-01-{day}", "commit": f"c{day}"}
        if day == "04":
            del trial["final"]
            trial |= {"diverged_in_epoch": 2}
        if day == "05" and question == "q3":
            del trial["final"]  # it was not tested
        utils.save_record(tmp_path / f"{question}-{day}.json", trial)
    (tmp_path / f"{question}-06.json").write_text("{")
    rows = utils._trials_table(script, tmp_path).splitlines()[2:]
    assert f"{question}-06.json" in capsys.readouterr().err
    changed = [row.split(" | ")[0] for row in rows]
    assert changed == ["| –", "| gone a b", "| dropout 0.7", "| gone none"]
    assert [row.split(" | ")[-1] for row in rows] == ["c02 |", "c03 |", "c04 |", "c05 |"]
    best = {
        "q2": lambda: f"{record['final']['val']['accuracy']:.3f}",
        "q3": lambda: f"{min(record['history']['val_cer']):.4f}",
    }
    assert rows[0].split(" | ")[1] == best[question]()
    assert rows[2].split(" | ")[1] == "diverged"
    assert rows[3].split(" | ")[1] == best[question]()


@pytest.fixture
def small(monkeypatch, tmp_path, landscapes_path):
    """small(*argv) -> question 2's report over two tiny systems, two seeds each."""
    kept = [dataclasses.replace(s, seeds=2) for s in hw2_q2.SYSTEMS if s.label in SMALL]
    short = [dataclasses.replace(s, arguments=f"{s.arguments} -epochs 1") for s in kept]
    rest = [s for s in hw2_q2.SYSTEMS if s.label not in SMALL]
    systems = (*short, *(dataclasses.replace(s, group="never") for s in rest))
    monkeypatch.setattr(hw2_q2, "SYSTEMS", systems)

    def report(*argv):
        words = f"-report -data_path {landscapes_path} -output_dir {tmp_path}".split()
        hw2_q2.main([*words, *argv])

    return report


SMALL = "plain, rate 0.01", "batch norm + pooling"


def test_what_is_missing_is_trained_and_nothing_else(small, tmp_path, capsys):
    small("-dry_run")
    listed = capsys.readouterr().out.splitlines()
    assert listed[-1].startswith("4 runs to train")
    assert all(
        line.startswith("python hw2_q2.py -learning_rate 0.01 -epochs 1") for line in listed[:4]
    )
    small("-only", "plain*")
    runs = tmp_path / "figures" / "runs"
    assert len(list(runs.iterdir())) == 2
    small()
    before = {path: path.stat().st_mtime_ns for path in runs.iterdir()}
    assert len(before) == 4
    [gone, *others] = before
    gone.unlink()
    small()
    assert gone.exists()
    assert all(path.stat().st_mtime_ns == before[path] for path in others)
    text = (tmp_path / "figures" / "README.md").read_text(encoding="utf-8")
    assert f"({SCRIPTS['q2'][0].QUESTION}-rates.png)" in text
    assert "not trained yet" in text


@pytest.mark.parametrize(
    ("argv", "runs"),
    [
        ("-report", 16), ("-report all", 43), ("-report -n_seeds 1", 6),
        ("-report -only plain*", 11), ("-report beyond -n_seeds 1", 22),
        ("--report", 6), ("--report beyond", 37),
    ],
)  # fmt: skip
def test_what_would_be_trained(tmp_path, capsys, argv, runs):
    script, dash = SCRIPTS["q3" if argv.startswith("--") else "q2"]
    script.main([*argv.split(), f"{dash}dry_run", f"{dash}output_dir", str(tmp_path)])
    *commands, last = capsys.readouterr().out.splitlines()
    assert last == f"{runs} runs to train"
    assert len(set(commands)) == runs


def test_how_long_training_would_take(tmp_path, capsys):
    """One run of 40 epochs of an hour each is there; of the same network two more are missing."""
    record = runs_of(hw2_q2, "plain, rate 0.01")[0]
    record["measured"]["seconds"] = [3600.0] * 40
    utils.save_record(tmp_path / "figures" / "runs" / "q2-one.json", record)
    argv = "-report", "-only", "plain, rate 0.01", "-dry_run", "-output_dir", str(tmp_path)
    hw2_q2.main(list(argv))
    hours = 80 / len(utils.cores())
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"2 runs to train; some {hours:.1f} hours on this machine"


def test_systems_on_other_words_and_of_several_models(tmp_path, monkeypatch, capsys):
    """Other words' runs have keys of their own; the ensemble is trained last, and takes no time."""
    systems = (
        utils.System("together", "--ensemble --seed 42 1", group="beyond"),
        utils.System("one", "", 2, "beyond"),
        utils.System("other", "", 1, "beyond", "cats"),
    )
    shown, trained = [], []

    def train(script, several, data):
        for options in several:
            run, measured = script.make_run(options, data), {"seconds": [3600.0]}
            trained.append((options.label, options.seed))
            record = {"config": run.config, "final": {}, "measured": measured}
            utils.save_record(run.record, record | {"history": {}})

    monkeypatch.setattr(hw2_q3, "SYSTEMS", systems)
    monkeypatch.setattr(hw2_q3, "DATA_DIR", tmp_path / "data")
    monkeypatch.setattr(hw2_q3, "report_parts", lambda records: shown.append(records) or {})
    monkeypatch.setattr(utils, "ROOT", tmp_path)
    monkeypatch.setattr(utils, "write_part", lambda *_: None)
    monkeypatch.setattr(utils, "train_many", train)
    for folder, word in (("data", "kat"), ("data/cats", "cats")):
        (tmp_path / folder).mkdir()
        for name in ("train", "valid", "test"):
            (tmp_path / folder / f"{name}.tsv").write_text(f"{' '.join(word)}\t{word}\n")
    argv = ["--report", "beyond", "--output_dir", str(tmp_path)]
    hw2_q3.main([*argv, "--dry_run"])
    assert "4 runs to train" in capsys.readouterr().out
    hw2_q3.main(argv)
    assert trained == [("one", 42), ("one", 1), ("other", 42), ("together", [42, 1])]
    [records] = shown
    assert {label: len(runs) for label, runs in records.items()} == {
        "together": 1, "one": 2, "other": 1
    }  # fmt: skip
    assert records["other"][0]["config"]["data"]["name"] == "cats"
    for path in [
        *tmp_path.glob("figures/runs/*-ensemble-*"),
        *tmp_path.glob("figures/runs/*-cats-*"),
    ]:
        path.unlink()
    capsys.readouterr()
    hw2_q3.main([*argv, "--dry_run"])
    hours = 20 / len(utils.cores())  # of the usual hour an epoch; testing together takes none
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"2 runs to train; some {hours:.1f} hours on this machine"
    (tmp_path / "data" / "train.tsv").write_text("k\tc\n")
    with pytest.raises(UserError, match="need the data of the others"):
        hw2_q3.main(argv)


def test_missing_runs_do_not_mix_data(committed, monkeypatch, landscapes_path):
    """Neither samples nor other photographs with those of the records."""
    monkeypatch.setattr(hw2_q2, "DATA_PATH", committed / "nothing.npz")
    for path in (committed / "figures" / "runs").glob("q2-bn-gap-lr0.01-seed1-*"):
        path.unlink()
    argv = ["-report", "-only", "batch norm + pooling", "-output_dir", str(committed)]
    with pytest.raises(UserError, match="need the data of the others"):
        hw2_q2.main(argv)
    with pytest.raises(UserError, match="need the data of the others"):
        hw2_q2.main([*argv, "-data_path", str(landscapes_path)])
    shutil.rmtree(committed / "figures")
    with pytest.raises(UserError, match="need real data"):
        hw2_q2.main(argv)


def test_intervals_hold_what_they_should():
    """One run of accuracy .5 on 100 pictures: .5 ± 1.96 * .05; two very different runs: both."""
    runs = [{"final": {"test": {"confusion": [[25, 25], [25, 25]]}}}]
    draw = hw2_q2.draw_accuracy("test")
    low, high = utils.interval(draw, runs)
    assert (low, high) == (pytest.approx(0.402, abs=0.02), pytest.approx(0.598, abs=0.02))
    runs.append({"final": {"test": {"confusion": [[45, 5], [5, 45]]}}})
    low, high = utils.interval(draw, runs)
    assert low < 0.45
    assert high > 0.92
    words = {"lengths": [4] * 100, "greedy": {"distances": [0, 4] * 50, "ranks": [1, 0] * 50}}
    for measure in ("cer", "wer"):
        low, high = utils.interval(hw2_q3.draw_errors("greedy", measure), [{"final": words}])
        assert (low, high) == (pytest.approx(0.402, abs=0.02), pytest.approx(0.598, abs=0.02))
