"""The documents say what the records say, and the report is made of the records alone."""

import dataclasses
import json
import math
import re
import shlex
import shutil
from collections import defaultdict

import jinja2
import numpy as np
import pytest
import torch

import hw2_q2
import hw2_q3
import utils
from data import prepare_landscapes, prepare_pronunciations
from figures import analysis_q2, analysis_q3, common, report
from figures import report_q2 as q2
from figures import report_q3 as q3
from figures.common import mean_sd
from tests.conftest import run_here

FIGURES = utils.ROOT / "figures"
README = (utils.ROOT / "README.md").read_text(encoding="utf-8")
RECORDS = report.load_records(FIGURES / "runs")
FOUND = {key: report.find_records(module, RECORDS) for key, module in report.QUESTIONS.items()}


def run_of(record, **data):
    """The run that a record's command makes, on its data or on other `data`."""
    _, name, *words = shlex.split(record["command"])
    script = {"hw2_q2.py": hw2_q2, "hw2_q3.py": hw2_q3}[name]
    return script.make_run(script.parse_args(words), report.Dataset(**record["data"] | data))


# ----------------------------------------------------------------------------------------------
# documents and commands against records

RATES = "cer", "wer", "wer@3"


def accuracy(label):
    return mean_sd([q2.accuracy(run, "test") for run in common.scored(FOUND["q2"][label])])


def rates(label, decoding, names=RATES):
    runs = [run for run in FOUND["q3"][label] if decoding in run["final"]]
    return " / ".join(q3.mean_error(runs, decoding, name) for name in names)


def test_the_shipped_networks_have_the_scores_of_their_records():
    text = (utils.ROOT / "data" / "README.md").read_text(encoding="utf-8")
    [*_, resnet] = FOUND["q2"][q2.BEST_RESNET]
    speller = next(run for run in FOUND["q3"][q3.ALL] if common.seed_of(run) == q3.SHIPPED_SEED)
    decodings = [speller["final"][decoding] for decoding in ("beam", "lexicon")]
    scores = {q2: [f"{resnet['final'][split]['accuracy']:.4f}" for split in ("val", "test")]}
    scores[q3] = [f"{min(speller['history']['val_cer']):.4f}"]
    scores[q3] += [f"{final[rate]:.3f}" for final in decodings for rate in ("wer", "wer@3")]
    for module, record in ((q2, resnet), (q3, speller)):
        shipped = utils.load_checkpoint(module.script.PRETRAINED)
        assert shipped["history"] == record["history"]
        [row] = [line for line in text.splitlines() if f"`{run_of(record).name}`" in line]
        written = re.findall(r"(?<= )\.\d{3,4}", row.partition(":")[2])
        assert written == [score[1:] for score in scores[module]]


def test_the_readmes_table_has_the_records_results():
    scrambled = accuracy("plain, scrambled"), accuracy("batch norm + pooling, scrambled")
    parameters = (f"{FOUND['q2'][x][0]['parameters']:,}" for x in (q2.PLAIN, q2.VARIANT))
    two, wikipron = RATES[:2], rates(q3.ALL, "beam")
    rows = f"""
plain network, learning rate 0.01: accuracy | .6970
| {accuracy(q2.PLAIN)}; scrambled pixels: {scrambled[0]} |
batch norm + global average pooling: accuracy | .7460
| {accuracy(q2.VARIANT)}; scrambled pixels: {scrambled[1]}
| `-recipe best`: {accuracy(q2.BEST)}; with `-model resnet`: {accuracy(q2.BEST_RESNET)}
parameters of these two networks | 5,340,160; 752,640 | {"; ".join(parameters)} |
no attention, greedy: CER / WER | .4354 / .9040 | {rates(q3.PLAIN, "greedy", two)} |
attention, greedy: CER / WER | .2677 / .8090 | {rates(q3.ATTENTION, "greedy", two)}
| `--recipe best`: {rates(q3.BEST, "greedy", two)}
attention, nucleus sampling: CER / WER / WER@3 | .3139 / .8550 / .7550
| {rates(q3.ATTENTION, "nucleus")} |
attention, beam of 5: CER / WER / WER@3 | – | {rates(q3.ATTENTION, "beam")}
| `--recipe best`: {rates(q3.BEST, "beam")}
the same, trained on 75,049 words of WikiPron: CER / WER / WER@3 | – | | {wikipron}
beam of 30, re-ranked by `--lexicon en`: CER / WER / WER@3 | –
| {rates(q3.ATTENTION, "lexicon")} | `--recipe best`: {rates(q3.BEST, "lexicon")}
the same, trained on 75,049 words of WikiPron: CER / WER / WER@3 | – |
| {rates(q3.ALL, "lexicon")}; three models: {rates(q3.ALL_ENSEMBLE, "lexicon")}
"""
    table = [line for line in README.splitlines() if line.startswith("|")]
    expected = rows.replace("\n|", " |").strip().splitlines()
    assert table[2:] == [f"| {row} |" for row in expected]


def test_documents_give_the_records_means():
    def mean(values):
        return values.partition(" ")[0]

    def seeds(label):
        return f"{accuracy(label)} ({len(common.scored(FOUND['q2'][label]))} seeds"

    [minutes] = re.findall(
        rf"\| {q2.BEST} \| (.*) \| (.*) \| (.*) \|", q2.minutes_table(FOUND["q2"])
    )
    cer = {label: mean(rates(label, "greedy", ["cer"])) for label in (q3.PLAIN, q3.ATTENTION)}
    (beam, listed), (beam_all, listed_all) = (
        [mean(rates(label, how, ["wer"])) for how in ("beam", "lexicon")]
        for label in (q3.BEST, q3.ALL)
    )
    sentences = {
        README: [
            f"test accuracy of **{mean(accuracy(q2.VARIANT))}** (3 seeds)",
            f"on scrambled images {mean(accuracy(q2.SCRAMBLED[-1]))};",
            f"accuracy of **{mean(accuracy(q2.BEST))}** (5 seeds), "
            f"{q2.cell(q2.NO_TTA, FOUND['q2'][q2.BEST]).split()[0]} without",
            "the original's .7460 in {} minutes, .85 in {} and .89 in {}, at".format(*minutes),
            f"from {cer[q3.PLAIN]} to **{cer[q3.ATTENTION]}** (3 seeds)",
            f"from {beam} to **{listed}** (5 seeds)",
            f"from {beam_all} to **{listed_all}** (3 seeds)",
        ],
        hw2_q2.__doc__: [
            f"{seeds(q2.VARIANT)},", f"plain {seeds(q2.PLAIN)})", f"best recipe {seeds(q2.BEST)},"
        ],
        hw2_q3.__doc__: [
            f"{rates(q3.ATTENTION, 'greedy', RATES[:2])} with attention",
            f"{rates(q3.PLAIN, 'greedy', RATES[:2])} without",
        ],
    }  # fmt: skip
    for document, expected in sentences.items():
        assert [x for x in expected if x not in " ".join(document.split())] == []


PROGRAMS = (hw2_q2, hw2_q3, report, prepare_landscapes, prepare_pronunciations)
PARSERS = {program.__name__: program.parse_args for program in PROGRAMS}
DOCUMENTS = ["README.md", "data/README.md", "figures/README.md", "figures/speed.md"]
DOCUMENTS += ["hw2_q2.py", "hw2_q3.py", "figures/report.py"]  # their docstrings


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_in_the_documents_parse(name):
    text = (utils.ROOT / name).read_text(encoding="utf-8")
    lines = re.findall("^    python (?:-m )?(.*?)(?:   .*)?$", text, re.M)
    assert lines
    for line in lines:
        program, *arguments = shlex.split(line, comments=True)
        if parse := PARSERS.get(program.removesuffix(".py")):
            parse(arguments)


def test_the_readmes_answers_are_those_of_spell(tmp_path, capsys):
    pattern = r"    python hw2_q3.py (spell .*)\n\n((?:    .*\n)+)"
    command, pasted = re.search(pattern, README).groups()
    hw2_q3.main([*shlex.split(command), "--device", "cpu", "--output_dir", str(tmp_path)])
    rows = [line.strip().split("\t") for line in pasted.splitlines()]
    answers = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    for row, answer in zip(rows, answers, strict=True):
        assert (row[:2], row[3:]) == (answer[:2], answer[3:])
        assert float(row[2]) == pytest.approx(float(answer[2]), abs=0.01)


def test_readme_says_what_the_records_took():
    """Of the experiments on the original and on its claims."""
    minutes, seconds, memory = {"q2": [], "q3": []}, defaultdict(list), 0
    for key, question in report.QUESTIONS.items():
        labels = [e.label for e in question.EXPERIMENTS if e.group != "beyond"]
        for record in (record for label in labels for record in FOUND[key][label]):
            if (measured := record["measured"])["device"] == "cpu":
                assert measured["threads"] == 1 and measured["processor"]
                memory = max(memory, measured.get("peak_memory_mib") or 0)
                if "final" in record and record["arguments"].get("epochs", 40) == 40:
                    minutes[key].append(common.minutes(record))
            else:
                seconds[len(measured["seconds"])].append(sum(measured["seconds"]))
    text = " ".join(README.split())
    assert f"took {min(minutes['q2']):.0f} to {max(minutes['q2']):.0f} minutes of one" in text
    times = (f"{n} epochs in {min(x):.0f} to {max(x):.0f}" for n, x in sorted(seconds.items()))
    assert f"H100, {' and '.join(times)} seconds." in text
    assert f"question 3 took {min(minutes['q3']):.0f} to {max(minutes['q3']):.0f}." in text
    assert f"whole runs up to {memory / 1024:.1f} GiB" in (FIGURES / "speed.md").read_text("utf-8")


@pytest.mark.parametrize("name", RECORDS)
def test_a_records_command_gives_its_name(name):
    record = RECORDS[name]
    run = run_of(record)
    assert (run.name, run.command) == (name, record["command"])
    assert run.identity == {key: record[key] for key in run.identity}
    assert "/" not in record["command"]


# ----------------------------------------------------------------------------------------------
# statistics, tables and figures by hand


def accurate(right, wrong, seed=42):
    """A record of question 2 with so many correct and wrong predictions of the first class."""
    confusion = [[right, wrong, 0, 0, 0, 0], *[[0, 1, 0, 0, 0, 0]] * 5]
    scores = {"accuracy": right / (right + wrong), "confusion": confusion}
    record = {"arguments": {"seed": seed}, "history": {"val_accuracy": [scores["accuracy"]]}}
    return record | {"final": {"val": scores, "test": scores}}


def test_late_and_first_epochs():
    values = [0] * 30 + [0.5] * 10, [0] * 5 + [1] * 5, [0.7, 0.75, 0.6], [0.7]
    flat, rising, high, low = ({"history": {"val_accuracy": column}} for column in values)
    assert [q2.late_epoch_accuracy(flat), q2.late_epoch_accuracy(rising)] == [0.5, 1]
    assert [q2.first_epoch(high), q2.first_epoch(low)] == [2, None]


def test_whether_the_originals_accuracy_is_inside():
    """.7293 / .6970 against two runs of 1,005 images each, at .72 and .73, and at .6 and .61."""
    label, diverged = q2.PLAIN, {"history": {}, "diverged_in_epoch": 1}

    def row(*runs):
        return q2.accuracy_table(defaultdict(list, {label: runs}), [label]).splitlines()[-1]

    near = accurate(710, 290), accurate(720, 280, 1)
    assert row(*near).startswith(f"| {label} | 0.7293 / 0.6970 | 0.715 ± 0.007 / 0.715 ± 0.007 | ")
    assert row(*near, diverged).endswith("| 2 (+ 1 diverged) | – / – | – / – |")
    # test: s = .0070, one degree of freedom, t = 12.71, s sqrt(1 + 1/2) = .0086
    assert " / 0.605 to 0.825 |" in row(*near)
    assert row(*near).endswith("| yes / yes |")
    assert row(accurate(500, 500), accurate(505, 495, 1)).endswith("| no / no |")


def test_recall_of_a_class_without_test_images():
    recalls = q2.recalls(accurate(1, 3))
    assert recalls["buildings"] == 0.25
    confusion = [[0] * 6] * 6
    assert math.isnan(q2.recalls({"final": {"test": {"confusion": confusion}}})["sea"])


def test_calibration():
    record = {"analysis": {"calibration": [[0, None, None], [40, 0.25, 0.5], [60, 0.75, 0.75]]}}
    assert q2.calibration_error(record) == pytest.approx(0.4 * 0.25)  # 40 images are .25 off
    assert q2.mean_of_bin([[10, 0.2, 0.1], [30, 0.6, 0.5]]) == pytest.approx((0.5, 0.4))
    assert q2.mean_of_bin([[10, 0.2, 0.1], [0, None, None]]) is None


def test_thumbnails_show_the_most_confident_errors(tmp_path, monkeypatch, landscapes):
    log_probs = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.2, 0.8], [0.6, 0.4]]).log()
    rows = analysis_q2.confident_errors(log_probs, torch.tensor([0, 0, 0, 1]), count=2)
    assert rows == [[2, 0, 1, 0.8], [1, 0, 1, 0.7]]
    run = {"arguments": {"seed": 2}, "final": {}, "analysis": {"confident_errors": rows}}
    other = {"arguments": {"seed": 3}, "final": {}, "analysis": {}}
    records, path = {q2.BEST_RESNET: [run, other]}, tmp_path / "thumbnails.png"
    assert q2.draw_confident_errors(records, q2.load_thumbnails(path)) is None
    monkeypatch.setattr(q2, "SHOWN", 5)
    q2.save_thumbnails(path, records, landscapes)
    images = landscapes.splits["test"][0][[2, 1, *range(6), 5]].permute(0, 2, 3, 1)
    assert torch.equal(q2.load_thumbnails(path), images)
    titles = [axes.get_title() for axes in q2.draw_confident_errors(records, images).axes]
    assert titles[:3] == ["buildings\nnot forest\n0.80", "buildings\nnot forest\n0.70", ""]


def test_what_a_list_gains_by_hand():
    """Of four words the list corrects two and spoils none."""
    beam = {"ranks": [1, 0, 2, 1], "distances": [0, 2, 1, 0]}
    lexicon = {"ranks": [1, 1, 1, 1], "distances": [0, 0, 0, 0], "listed": [1, 1, 1, 0]}
    run = {"final": {"beam": beam, "lexicon": lexicon}, "arguments": {}}
    run["analysis"] = {"lengths": [4, 4, 4, 8]}
    unlisted = {"final": {"beam": {"ranks": [1, 1, 1, 1]}}, "arguments": {"seed": 1}}
    assert q3.lexicon_gain([run, unlisted]) == "-0.500, 1 pair of seeds"
    assert q3.lexicon_gain([run], "not in the list") == "+0.000, 1 pair of seeds"
    assert q3.lexicon_table({"x": [run]}).splitlines()[2:] == [
        "| x | 4 words, all | 0.150 | 0.000 | 0.500 | 0.000 | 0.250 | 0.000 | 1 |",
        "| x | 3 words, in the list | 0.250 | 0.000 | 0.667 | 0.000 | 0.333 | 0.000 | 1 |",
        "| x | 1 words, not in the list | 0.000 | 0.000 | 0.000 | 0.000 | 0.000 | 0.000 | 1 |",
    ]


def test_correlations_of_filters_by_hand():
    """The changes agree in all channels; a row has one number, whose sign changes row by row."""
    change = np.broadcast_to(np.array([1.0, -1.0, 1.0])[:, None], (32, 3, 3, 3))
    change = change * np.arange(1, 33)[:, None, None, None]
    utils.seed_everything(5)
    initial = hw2_q2.build_model(hw2_q2.parse_args(["-no_batch_norm"])).convs[0].conv.weight
    filters = (initial.detach().numpy() + change).tolist()
    command = "python hw2_q2.py -no_batch_norm -seed 5"
    run = {"final": {}, "command": command, "analysis": {"filters": filters}}
    row = q2.filter_table(defaultdict(list, {"plain network, ordered": [run]})).splitlines()[-1]
    assert row == "| ordered | 1.000 | -1.000 | 1.000 | 1 |"


def test_the_effect_of_precision_by_hand():
    """Of two networks with both the means differ by .2 and .1, with weights 2 / 3 and 1; a GPU and
    a network with one precision do not count."""

    def run(validation, precision="float32", device="cpu"):
        arguments = {"precision": precision} if precision != "float32" else {}
        final = {"val": {"accuracy": validation}}
        return {"final": final, "arguments": arguments, "measured": {"device": device}}

    first, second, third, *_ = q2.SHAPES
    records = defaultdict(list)
    assert q2.precision_effect(records, "validation") is None
    records[first] = [run(0.5), run(0.3), run(0.6, "bfloat16"), run(0.9, "float32", "cuda")]
    records[second] = [run(0.4), run(0.6)] + [run(x, "bfloat16") for x in (0.5, 0.7)]
    records[third] = [run(0.9, "bfloat16")]
    # weighted mean .14, s² = .02 with 3 degrees of freedom, t = 3.182, t s / sqrt(5 / 3) = .349
    assert q2.precision_effect(records, "validation") == "+0.140 [-0.209, +0.489]"


def test_swings_by_hand():
    """The second half of four epochs; over two runs the change is halved and stays the same."""

    def run(last, seed):
        ways = {"as they are": [0.9, 0.1, 0.5, 0.25], "average": [0, 0, 0.5, last]}
        analysis = {"epochs": ways | {"statistics": [0, 0, 0.5, 0.5]}}
        return {"analysis": analysis, "final": {}, "arguments": {"seed": seed}}

    merged, kept = q2.SWINGS
    records = defaultdict(list, {merged: [run(0.375, 1)], kept: [run(0.75, 2)]})
    rows = q2.swings_table(records).splitlines()[2:]
    assert rows[0] == "| last batch merged | last weights | 0.375 | 0.250 | 0.250 | 1 |"
    assert len(rows) == 2 * len(q2.EVALUATIONS)
    # logarithms -ln 2 and 0: mean -.347, s .490, t = 12.71 with one degree of freedom
    assert q2.swing_ratio(records, "average", "as they are") == "0.71 [0.01, 57.80]"
    assert q2.compare_ways(records, kept, "average", "as they are") == "+0.250, 1 pair of seeds"


def test_local_exponents_by_hand():
    """The error halves from 1,000 to 2,500 words and stays the same from there to 5,000."""
    records = defaultdict(list)
    assert q3.exponents(records, "cer") is None
    for n, distance in ((1000, 4), (2500, 2), (5000, 2)):
        final = {"greedy": {"distances": [distance]}}
        records[q3.words_label(n)] = [{"final": final, "analysis": {"lengths": [8]}}]
    assert q3.exponents(records, "cer") == f"{math.log(0.5) / math.log(2.5):.2f} and 0.00"


def test_ambiguity_by_hand():
    """Two of four test words sound like another word; one is spelled like that one."""
    train = [("s oʊ l", "soul"), ("s i", "sea"), ("k æ t", "cat")]
    test = [("s oʊ l", "Sol"), ("s i", "see"), ("d ɔ ɡ", "dog"), ("k æ t", "cat")]
    found = analysis_q3.ambiguity(["soul", "cee", "dog", "kat"], {"train": train, "test": test})
    assert found == {"several": 0.5, "wer_any": 0.5, "wer_best": 0.25}
    runs = [{"analysis": {"ambiguity": found, "curves": {"beam": [wer]}}} for wer in (0.75, 1)]
    expected = "| 0.500 | 0.875 ± 0.177 | 0.500 ± 0.000 | 0.417 ± 0.118 | 0.250 | 2 |"
    assert q3.ambiguity_table(runs).splitlines()[-1] == expected
    assert q3.ambiguity_table([]) is None


def test_edits_by_hand():
    assert analysis_q3.count_edits(["cut", "bd", "tabs"], ["cat", "bed", "tab"]) == {
        "kinds": {"delete": 1, "insert": 1, "replace": 1},
        "common": [["", "s", 1], ["a", "u", 1], ["e", "", 1]],
    }
    edits = analysis_q3.count_edits(["cut"] * 2, ["cat"] * 2, most_common=1)
    assert edits["common"] == [["a", "u", 2]]


def lines_of(figure):
    """The lines of a figure's first axes: their labels, without numbers of seeds, and y values."""
    lines = figure.axes[0].get_lines()
    return [(line.get_label().partition(" (")[0], list(line.get_ydata())) for line in lines]


def test_curves_show_the_records():
    def draw(*labels):
        return lines_of(q2.draw_curves(FOUND["q2"], labels, "val_accuracy"))

    def curves(label, column="val_accuracy"):
        return common.curves(FOUND["q2"][label], column)

    lines = dict(draw(q2.PLAIN, q2.VARIANT))
    for label in (q2.PLAIN, q2.VARIANT):
        assert lines[label] == pytest.approx(np.mean(curves(label), 0))
    label = "plain, rate 0.1"  # two of its runs end early
    assert [values for _, values in draw(label)] == curves(label)
    losses = np.array(curves(q2.PLAIN, "train_loss"))
    (_, running), (_, each) = lines_of(q2.draw_running_mean(FOUND["q2"][q2.PLAIN]))
    assert each == pytest.approx(losses.mean(0))
    assert running[2] == pytest.approx(losses[:, :3].mean())


def test_comparisons_show_the_records():
    records = FOUND["q2"]
    rows = {name: (original, points) for name, original, points in q2.forest_rows(records)}
    original, points = rows[f"{q2.PLAIN}: test"]
    assert original == q2.ORIGINAL[q2.PLAIN][1]
    for (mean, bounds, _, _), label in zip(points, (q2.PLAIN, "plain, scrambled"), strict=True):
        assert mean == pytest.approx(np.mean([q2.accuracy(run, "test") for run in records[label]]))
        assert bounds == q2.interval(records, label, "test")
    dots = q2.draw_main_results(records).axes[0].get_lines()[::2]  # a bar at the mean follows each
    for label, line in zip(q2.MAIN_RESULTS, dots):
        assert list(line.get_xdata()) == [q2.accuracy(run, "test") for run in records[label]]


def test_errors_of_question_3_show_the_records():
    runs = FOUND["q3"][q3.ATTENTION]
    assert q3.example_table(runs).count("**") == 2 * (5 + 3)  # the original's and the first run's
    beam = np.mean([run["analysis"]["curves"]["beam"] for run in runs], 0)
    assert dict(lines_of(q3.draw_wer_at_k(runs)))["beam of 10"] == pytest.approx(beam)
    _, errors, counts = q3.draw_lengths({q3.ATTENTION: runs}, [q3.ATTENTION]).axes
    is_long = np.array(runs[0]["analysis"]["lengths"]) >= 14
    wrong = [np.array(run["final"]["greedy"]["distances"])[is_long] > 0 for run in runs]
    assert errors.get_lines()[0].get_ydata()[-1] == pytest.approx(np.mean(wrong))
    assert counts.patches[-1].get_height() == is_long.sum()


# ----------------------------------------------------------------------------------------------
# the report, regenerated


@pytest.fixture
def committed(tmp_path):
    """A folder with a copy of the committed records."""
    for name in ("runs", "trials"):
        shutil.copytree(FIGURES / name, tmp_path / "figures" / name)
    shutil.copy(FIGURES / "thumbnails.png", tmp_path / "figures")
    return tmp_path


def contents(folder):
    return {path.name: path.read_bytes() for path in (folder / "figures").glob("*.*")}


def test_the_committed_report_is_that_of_the_committed_records(committed):
    report.main(["--output_dir", str(committed)])
    written = contents(committed)
    text = written.pop("README.md").decode()
    assert text == (FIGURES / "README.md").read_text(encoding="utf-8")
    assert ", 0 pairs" not in text and report.NOT_TRAINED not in text  # all experiments have runs
    named = set(re.findall(r"\(([\w-]+\.png)\)", text))
    assert written.keys() == named | {"thumbnails.png"}
    assert written.keys() == {path.name for path in FIGURES.glob("*.png")} - {"benchmark.png"}


def test_the_same_records_give_the_same_bytes(tmp_path):
    (tmp_path / "figures" / "runs").mkdir(parents=True)
    for path in FIGURES.glob("runs/q3-plain-*"):
        shutil.copy(path, tmp_path / "figures" / "runs")
    report.main(["--output_dir", str(tmp_path), "--format", "svg"])
    first = contents(tmp_path)
    assert "q3-cer.svg" in first
    assert "q3-attention.svg" not in first  # it is not trained yet
    report.main(["--output_dir", str(tmp_path), "--format", "svg"])
    assert contents(tmp_path) == first


def without_further_measures(record):
    names = {"filters", "grad_cam", "sampling", "lexicon", "confident_errors"}
    parts = {part: record[part] for part in ("analysis", "final") if part in record}
    return record | {part: {k: v[k] for k in v.keys() - names} for part, v in parts.items()}


def diverged_at_once(record):
    record = {k: v for k, v in record.items() if k != "final"}
    return record | {"history": {}, "diverged_in_epoch": 1, "diverged_in_batch": 1}


@pytest.mark.parametrize("change", [without_further_measures, diverged_at_once])
def test_other_records_give_a_report(committed, change):
    for path in (committed / "figures" / "runs").glob("*"):
        utils.save_record(path, change(utils.load_record(path)))
        if "-seed42-" not in path.name:
            path.unlink()
    report.main(["--output_dir", str(committed)])
    assert b"*(not trained yet)*" in contents(committed)["README.md"]


def test_damaged_thumbnails_are_named(committed, fails):
    (committed / "figures" / "thumbnails.png").write_bytes(b"damaged")
    assert "thumbnails.png: damaged" in fails(report.main, ["--output_dir", committed])


def test_an_undefined_name_in_the_template_is_an_error(committed, monkeypatch):
    monkeypatch.setattr(report, "TEMPLATE", committed / "template.md")
    report.TEMPLATE.write_text("{{ records | length }} {{ recods }}")
    with pytest.raises(jinja2.UndefinedError, match="recods"):
        report.main(["--output_dir", str(committed)])


def test_samples_and_other_data_do_not_count(tmp_path):
    """Also if they are of the same arguments."""
    [record, *_] = FOUND["q3"][q3.ATTENTION]
    for name in ("pronunciations", "sample"):
        data = {"name": name, "fingerprint": "f" * 12}
        path = tmp_path / f"{run_of(record, **data).name}.json"
        utils.save_record(path, record | {"data": data})
    others = report.load_records(tmp_path)
    assert [other["data"]["name"] for other in others.values()] == ["pronunciations"]
    assert report.find_records(q3, RECORDS | others) == FOUND["q3"]


def test_records_scored_otherwise_are_named_and_left_out(capsys):
    name, record = next((n, r) for n, r in RECORDS.items() if r in FOUND["q3"][q3.ATTENTION])
    final = {k: v for k, v in record["final"].items() if k != "beam"}
    for changed in ({"final": final}, {"final": final | {"beam": {"size": 10}}}):
        found = report.find_records(q3, RECORDS | {name: record | changed})
        assert len(found[q3.ATTENTION]) == len(FOUND["q3"][q3.ATTENTION]) - 1
        assert name in capsys.readouterr().err


def test_trials_are_named_by_what_they_change(tmp_path):
    assert report.trials_table("q2", tmp_path) is None
    record = FOUND["q2"]["kernels 3x3, max pooling"][0]
    changes = {"03": {"gone": ["a", "b"]}, "02": {}, "04": {"dropout": 0.7}, "05": {"gone": []}}
    for day, changed in changes.items():
        trial = record | {"arguments": record["arguments"] | changed}
        trial["measured"] = record["measured"] | {"date": f"2026-01-{day}", "commit": f"c{day}"}
        trial |= {"diverged_in_epoch": 2} if day == "04" else {}
        utils.save_record(tmp_path / f"q2-{day}.json", trial)
    rows = [row[2:-2].split(" | ") for row in report.trials_table("q2", tmp_path).splitlines()]
    accuracy = f"{record['final']['val']['accuracy']:.3f}"
    assert [(row[0], row[1], row[-1]) for row in rows[2:]] == [
        ("–", accuracy, "c02"), ("gone a b", accuracy, "c03"),
        ("dropout 0.7", "diverged", "c04"), ("gone none", accuracy, "c05"),
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------
# training for the report


@pytest.mark.parametrize("group", report.GROUPS)
def test_a_dry_run_lists_the_commands(tmp_path, capsys, group):
    for key, question in report.QUESTIONS.items():
        words = f"--train {group} --question {key} --seeds 2 --only *t* --dry_run --output_dir"
        report.main([*words.split(), str(tmp_path)])
        groups = report.GROUPS[group]
        chosen = [e for e in question.EXPERIMENTS if e.group in groups and "t" in e.label]
        runs = sum(1 if experiment.members else 2 for experiment in chosen)
        *commands, total = capsys.readouterr().out.splitlines()
        assert total == f"{runs} runs to train"
        assert len({command for command in commands if f"hw2_{key}" in command}) == runs


def test_a_dry_run_estimates_the_hours(tmp_path, capsys, monkeypatch):
    """One run of 40 epochs of an hour each is there; two more seeds are missing."""
    record = FOUND["q2"][q2.PLAIN][0]
    hours = record | {"measured": record["measured"] | {"seconds": [3600.0] * 40}}
    utils.save_record(tmp_path / "figures" / "runs" / f"{run_of(record).name}.json", hours)
    monkeypatch.setattr(utils, "cpu_count", lambda: 4)
    argv = ["--train", "report", "--only", q2.PLAIN, "--dry_run"]
    report.main([*argv, "--output_dir", str(tmp_path)])
    assert "2 runs to train; about 20.0 hours" in capsys.readouterr().out


def test_bfloat16_where_it_is_faster(monkeypatch):
    """Else float32; a record of either counts, and two experiments may then share a run."""
    options = report.parse_args(["--train", "beyond", "--only", q2.ORIGINAL_10])
    for is_faster, precision in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(utils, "bfloat16_is_faster", lambda is_faster=is_faster: is_faster)
        jobs = report.missing_jobs(q2, options, {})
        assert [args.precision for _, args in jobs] == [precision] * 3
    assert report.missing_jobs(q2, options, RECORDS) == []
    dataset = report.Dataset(**next(iter(FOUND["q2"][q2.VARIANT]))["data"])
    names = {hw2_q2.make_run(args, dataset).name for _, args in jobs}
    assert report.missing_jobs(q2, options, {name: RECORDS[name] for name in names}) == []


@pytest.mark.parametrize("line", ["--dry_run", "--only x", "--question q2", "--seeds 1"])
def test_training_options_need_train(fails, line):
    assert f"{line.split()[0]} needs --train" in fails(report.main, line.split())


NEED_DATA = [["--train", "report", "--only", q2.VARIANT], ["--thumbnails"]]


@pytest.mark.parametrize("argv", NEED_DATA, ids=["train", "thumbnails"])
def test_data_are_those_of_the_records(committed, monkeypatch, landscapes_path, fails, argv):
    """Neither samples nor other photographs; a dry run needs none and writes nothing."""
    monkeypatch.setattr(hw2_q2, "DATA_PATH", committed / "nothing.npz")
    for path in (committed / "figures" / "runs").glob("q2-bn-gap-lr0.01-seed1-*"):
        path.unlink()
    argv, before = [*argv, "--output_dir", committed], contents(committed)
    for data in ([], ["--data_path", landscapes_path]):
        assert "needs the data of the records" in fails(report.main, [*argv, *data])
    report.main([*map(str, argv), "--train", "report", "--only", q2.PLAIN, "--dry_run"])
    assert contents(committed) == before
    assert "'nothing' matches no experiment" in fails(
        report.main, ["--train", "all", "--only", "nothing"]
    )


def test_without_records_training_needs_real_data(tmp_path, monkeypatch, fails):
    monkeypatch.setattr(hw2_q2, "DATA_PATH", tmp_path / "nothing.npz")
    assert "needs real data" in fails(report.main, [*NEED_DATA[0], "--output_dir", tmp_path])


def only(monkeypatch, question, arguments, seeds):
    """Leave the experiments of {label: arguments} alone in the group 'report'."""
    experiments = [
        dataclasses.replace(e, arguments=arguments[e.label], seeds=seeds, group="report", extra=())
        if e.label in arguments else dataclasses.replace(e, group="none")
        for e in question.EXPERIMENTS
    ]  # fmt: skip
    monkeypatch.setattr(question, "EXPERIMENTS", tuple(experiments))


def test_what_is_missing_is_trained_and_analysed(monkeypatch, tmp_path, arrays):
    arrays = dict(arrays) | {"train_images": arrays["train_images"].copy()}
    arrays["train_images"][:2] = arrays["test_images"][:2]  # of classes 0 and 1
    arrays["train_labels"] = np.array([0, 5, *arrays["train_labels"][2:]])
    np.savez(tmp_path / "data.npz", **arrays)
    tiny = {q2.PLAIN: "-no_batch_norm -epochs 1", q2.BEST: "-tta mirror -epochs 1"}
    only(monkeypatch, q2, tiny, seeds=1)
    monkeypatch.setattr(utils, "run_processes", run_here)
    argv = ["--train", "report", "--question", "q2", "--data_path", str(tmp_path / "data.npz")]
    argv += ["--output_dir", str(tmp_path)]
    report.main(argv)
    runs = tmp_path / "figures" / "runs"
    before = {path: path.read_bytes() for path in sorted(runs.iterdir())}
    assert len(before) == 2
    shutil.rmtree(tmp_path / "checkpoints")  # a complete record needs none
    path = next(iter(before))
    path.unlink()
    report.main(argv)  # trains this run again, with the same numbers, and no other
    record, old = utils.load_record(path), json.loads(before.pop(path))
    assert record | {"measured": 0} == old | {"measured": 0}
    assert all(path.read_bytes() == content for path, content in before.items())
    model, _, _ = hw2_q2.load_network(tmp_path / "checkpoints" / f"{path.stem}.pt")
    check_analysis(record["analysis"], model, arrays)


def check_analysis(analysis, model, arrays):
    """Compare with other code; the network has mirror images at test time."""

    @torch.no_grad()
    def predict(images):  # uint8 (N, 48, 48, 3) -> probabilities (N, 6)
        x = torch.tensor(images.copy()).permute(0, 3, 1, 2) / 255
        return model(x).exp().numpy()

    def accuracy(images, labels):
        return np.mean(predict(images).argmax(1) == labels)

    test, labels = arrays["test_images"], arrays["test_labels"]
    train = accuracy(arrays["train_images"], arrays["train_labels"])
    assert analysis["train"]["accuracy"] == train
    assert analysis["shifted"][0] == analysis["sizes"]["48"] == accuracy(test, labels)
    padded = np.pad(test, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    corners = (0, 2), (4, 2), (2, 0), (2, 4)
    shifted = [accuracy(padded[:, y : y + 48, x : x + 48], labels) for y, x in corners]
    assert analysis["shifted"][2] == pytest.approx(np.mean(shifted))
    probabilities = (predict(test) + predict(test[:, :, ::-1])) / 2
    p, is_right = probabilities.max(1), probabilities.argmax(1) == labels
    assert np.sum(analysis["confident"]) == (p >= 0.9).sum()
    is_wrong = not is_right[1]  # this image is among the training images with label 5
    assert analysis["label_conflicts"] == [1, is_wrong, is_wrong and p[1] >= 0.9]
    for i, (count, *means) in enumerate(analysis["calibration"]):
        is_in_bin = (p * 10).astype(int).clip(max=9) == i
        assert count == is_in_bin.sum()
        expected = [np.mean(values[is_in_bin]) for values in (p, is_right)] if count else means
        assert means == pytest.approx(expected, abs=1e-5)


def test_question_3_is_trained_scored_and_analysed(monkeypatch, tmp_path):
    """An ensemble comes after its members; a record scored otherwise is completed."""
    words = ["cat", "bed", "deck", "tab", "beak", "cab"]
    for name in ("train", "valid", "test"):
        lines = (f"{' '.join(word)}\t{word}\n" for word in words)
        (tmp_path / f"{name}.tsv").write_text("".join(lines))
    tiny = f"--use_attn --hidden_size 8 --n_epochs 2 {q3.DECODING}"
    ensemble = f"{tiny} --ensemble --seed 42 1"
    only(monkeypatch, q3, {q3.BEST: tiny, q3.ENSEMBLE: ensemble}, seeds=2)
    places = ["--data_dir", str(tmp_path), "--output_dir", str(tmp_path)]
    hw2_q3.main(["--use_attn", "--hidden_size", "8", "--n_epochs", "2", "--threads", "1", *places])
    report.main(["--train", "report", "--question", "q3", *places])
    found = report.find_records(q3, report.load_records(tmp_path / "figures" / "runs"))
    assert [len(found[label]) for label in (q3.BEST, q3.ENSEMBLE)] == [2, 1]
    for record in found[q3.BEST] + found[q3.ENSEMBLE]:
        final, analysis = record["final"], record["analysis"]
        assert analysis["lengths"] == [3, 3, 4, 3, 4, 3]
        ranks = final["nucleus"]["ranks"]
        curve = [np.mean([not 1 <= rank <= k for rank in ranks]) for k in range(1, 11)]
        assert analysis["curves"]["nucleus"] == pytest.approx(curve)
        assert analysis["curves"]["beam"] == sorted(analysis["curves"]["beam"], reverse=True)
        edits = analysis["mistakes"]["kinds"]
        assert sum(edits.values()) == sum(final["greedy"]["distances"])
