"""The README's tables of results say what the run records say."""

import statistics

import pytest

import utils

README = (utils.ROOT / "README.md").read_text(encoding="utf-8")
RECORDS = [utils.load_record(path) for path in sorted(utils.ROOT.glob("figures/runs/*.json"))]
RECORDS = [record for record in RECORDS if record["config"]["data"]["name"] != "sample"]


def select(question, **options):
    """The records of a question with these options, of all seeds."""
    configs = [(record, record["config"]) for record in RECORDS]
    return [
        record
        for record, config in configs
        if config["question"] == question and options.items() <= config["options"].items()
    ]


def show(values):
    """Their mean, with the standard deviation over seeds where there are several."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


PLAIN = {"batch_norm": False, "head": "flatten", "scramble_pixels": False, "epochs": 40}
VARIANT = PLAIN | {"batch_norm": True, "head": "gap"}
BAD_PIXELS = {"scramble_pixels": True, "learning_rate": 0.01}
Q2 = {
    "plain, rate 0.1 | .5684 / .5743": PLAIN | {"learning_rate": 0.1},
    "plain, rate 0.01 | .7293 / .6970": PLAIN | {"learning_rate": 0.01},
    "plain, rate 0.001 | .5798 / .5743": PLAIN | {"learning_rate": 0.001},
    "batch norm + pooling, rate 0.01 | .7528 / .7460": VARIANT | {"learning_rate": 0.01},
    "plain, rate 0.01, scrambled | .7293 / .6970": PLAIN | BAD_PIXELS,
    "batch norm + pooling, rate 0.01, scrambled | .7528 / .7460": VARIANT | BAD_PIXELS,
}


@pytest.mark.parametrize(("start", "options"), Q2.items(), ids=Q2)
def test_question_2(start, options):
    everything = select("q2", **options)
    records = [record for record in everything if "final" in record]
    diverged = len(everything) - len(records)
    seeds = f"{len(records)}, {diverged} more diverged" if diverged else f"{len(records)}"
    last = [show([r["final"][split]["accuracy"] for r in records]) for split in ("val", "test")]
    late = show([statistics.mean(r["history"]["val_accuracy"][-10:]) for r in records])
    best = show([max(r["history"]["val_accuracy"]) for r in records])
    row = f"| {start} | {' / '.join(last)} | {late} | {best} | {seeds} |"
    assert row in README.splitlines()


MEASURES = {
    "greedy": ("cer", "wer"),
    "nucleus": ("cer", "wer", "wer@3"),
    "beam": ("cer", "wer", "wer@3"),
}
Q3 = {
    "no attention, greedy | .4354 / .9040": ("greedy", False),
    "attention, greedy | .2677 / .8090": ("greedy", True),
    "attention, nucleus, p = 0.8 | .3139 / .8550 / .7550": ("nucleus", True),
    "attention, beam of 5 | - ": ("beam", True),
}


@pytest.mark.parametrize(("start", "system"), Q3.items(), ids=Q3)
def test_question_3(start, system):
    kind, use_attn = system
    records = select("q3", use_attn=use_attn, n_epochs=20, hidden_size=128, lr=0.003)
    scores = [record["final"][kind] for record in records]
    assert all(score.get("p", 0.8) == 0.8 and score.get("size", 5) == 5 for score in scores)
    ours = " / ".join(show([score[measure] for score in scores]) for measure in MEASURES[kind])
    assert f"| {start} | {ours} | {len(scores)} |".replace("  ", " ") in README.splitlines()


def test_records_bear_the_names_of_their_runs():
    """So that the report finds them: options that come later must not rename earlier runs."""
    for path in utils.ROOT.glob("figures/runs/*.json"):
        title = path.stem.rpartition("-")[0]
        assert utils.Run(title, utils.load_record(path)["config"]).name == path.stem


def test_the_readme_names_the_machine():
    text = " ".join(README.split())
    for record in RECORDS:
        m = record["measured"]
        assert f"{m['cores']} cores of an {m['processor']}" in text
        assert f"torch {m['torch']}, Python {m['python']}" in text


def test_records_hold_no_paths_and_can_be_repeated():
    assert RECORDS
    for record in RECORDS:
        assert record["command"].startswith(f"python hw2_{record['config']['question']}.py")
        assert "/" not in "".join(map(str, record["config"]["options"].values()))
