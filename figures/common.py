"""Utilities of the reports on both questions: experiments | statistics | tables | figures."""

import math
import shlex
import statistics
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import utils

SEEDS = (42, 1, 2, 3, 4)
Record = dict[str, Any]
Records = dict[str, list[Record]]  # by experiment's label


@dataclass(frozen=True)
class Experiment:
    """Runs that differ in their seeds alone.

    arguments: of the question's script; only an ensemble's contain the seeds
    seeds: the number of SEEDS
    group: 'report' if the original has it, 'all' if it tests a claim of the original, 'beyond' if
    it improves on the original
    data: the name of a folder in data/, or None for the default data
    members: for an ensemble, the label of the experiment whose models it combines
    extra: what else its records need: names of further measures, or of scores, such as 'lexicon'
    """

    label: str
    arguments: str
    seeds: int = 3
    group: str = "report"
    data: str | None = None
    members: str | None = None
    extra: tuple[str, ...] = ()


def parse_command(script: ModuleType, record: Record) -> Namespace:
    """The arguments that a record's command gives its script."""
    return script.parse_args(shlex.split(record["command"])[2:])


# ----------------------------------------------------------------------------------------------
# statistics


def scored(records: list[Record]) -> list[Record]:
    """The records of runs that did not diverge."""
    return [record for record in records if "final" in record]


def mean_sd(values: Sequence[float]) -> str:
    """'mean ± standard deviation' over seeds; only the mean of a single value, a dash for none."""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


class Spread(NamedTuple):
    """How much runs that differ in their seeds alone vary."""

    variance: float
    df: int  # degrees of freedom


def pooled_spread(groups: Iterable[Sequence[float]]) -> Spread:
    """The variance within groups of runs, which is taken to be the same in all groups."""
    groups = [group for group in groups if len(group) > 1]
    df = sum(len(group) - 1 for group in groups)
    squares = sum((len(group) - 1) * statistics.variance(group) for group in groups)
    return Spread(squares / df if df else math.nan, df)


def prediction_interval(
    values: Sequence[float], spread: Spread, items_variance: float = 0.0
) -> tuple[float, float] | None:
    """The 95 % prediction interval for one new run, m ± t sqrt(s² (1 + 1/n) + items_variance), of
    the values' mean m and the spread s²; None without a spread.

    items_variance: of the difference of two scores of one run on two samples of test items. It is
    known, so t has more degrees of freedom than s² (Welch 1947, Satterthwaite 1946).
    """
    if not spread.df or not values:
        return None
    seeds = spread.variance * (1 + 1 / len(values))
    total = seeds + items_variance
    df = spread.df * (total / seeds) ** 2 if seeds else math.inf
    half = scipy.stats.t.ppf(0.975, df) * math.sqrt(total)
    return statistics.mean(values) - half, statistics.mean(values) + half


def difference(values: dict[int, float], baseline: dict[int, float]) -> str:
    """'mean difference [95 % confidence interval]' of two {seed: score}, paired by seed (Student's
    t, one degree of freedom less than pairs); without an interval for a single pair."""
    pairs = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    if not pairs:
        return "–"
    return with_interval(statistics.mean(pairs), pooled_spread([pairs]), 1 / len(pairs))


def unpaired_difference(values: Sequence[float], baseline: Sequence[float], spread: Spread) -> str:
    """'difference of means [95 % confidence interval]' of two experiments with a common spread
    (Student's t)."""
    if not values or not baseline:
        return "–"
    mean = statistics.mean(values) - statistics.mean(baseline)
    return with_interval(mean, spread, 1 / len(values) + 1 / len(baseline))


def with_interval(mean: float, spread: Spread, factor: float) -> str:
    """'mean [95 % confidence interval]' of a mean with the variance factor * s²; without an
    interval if there is no spread."""
    if not spread.df:
        return f"{mean:+.3f}"
    half = scipy.stats.t.ppf(0.975, spread.df) * math.sqrt(spread.variance * factor)
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def describe_difference(values: dict[int, float], baseline: dict[int, float]) -> str:
    """`difference`, with the number of pairs."""
    pairs = len(values.keys() & baseline.keys())
    return f"{difference(values, baseline)}, {pairs} pair{'s' * (pairs != 1)} of seeds"


def seed_of(record: Record) -> int:
    """The seed of a run, which its record has if it is not the default."""
    return record["arguments"].get("seed", SEEDS[0])


def by_seed(records: list[Record], measure: Callable[[Record], float]) -> dict[int, float]:
    """{seed: a measure of its run}, of the runs that did not diverge."""
    return {seed_of(record): measure(record) for record in scored(records)}


def minutes(record: Record) -> float:
    """The total time of a run's epochs."""
    return sum(record["measured"]["seconds"]) / 60


def seconds_per_epoch(record: Record) -> float:
    """The median over a run's epochs."""
    return statistics.median(record["measured"]["seconds"])


def machines(records: Records) -> str:
    """The machines and versions that made the records, with their numbers of runs."""
    counts = Counter(
        f"{'' if m['device'] == 'cpu' else m['device'] + ', '}"
        f"{m['cores']} cores of an {m['processor']}, {m['threads']} thread"
        f"{'s' * (m['threads'] > 1)} per run, torch {m['torch']}, Python {m['python']}"
        for m in (record["measured"] for runs in records.values() for record in runs)
    )
    return "; ".join(f"{machine} ({n} run{'s' * (n > 1)})" for machine, n in sorted(counts.items()))


# ----------------------------------------------------------------------------------------------
# tables


def markdown_table(head: Sequence[str], rows: list[Sequence], text: int = 1) -> str | None:
    """A Markdown table, or None without rows. The first `text` columns are aligned to the left, the
    others, numbers, to the right."""
    if not rows:
        return None
    lines = [head, ["---"] * text + ["--:"] * (len(head) - text), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


# ----------------------------------------------------------------------------------------------
# figures


def legend_above(fig: Figure, axes: Axes, columns: int = 2) -> None:
    """Put the legend of `axes` above all panels of `fig`, where it hides no curve."""
    fig.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=columns)


def interval_cells(bounds: tuple[float, float] | None, original: float | None) -> tuple[str, str]:
    """A prediction interval, and whether it contains the original's value; a dash if unknown."""
    text = "{:.3f} to {:.3f}".format(*bounds) if bounds else "–"
    if bounds is None or original is None:
        return text, "–"
    return text, "yes" if bounds[0] <= original <= bounds[1] else "no"


def with_seeds(label: str, runs: Sequence) -> str:
    """A label with the number of seeds."""
    return f"{label} ({len(runs)} seed{'s' * (len(runs) > 1)})"


def plot_bands(
    axes: Axes, runs: list[list[float]], label: str, marker: str | None = None, first: int = 1,
    **style: Any,
) -> None:  # fmt: skip
    """Plot lists of values, one per run, against `first`, `first` + 1, ...: their mean, and a band
    from the lowest to the highest. Runs of unequal length are drawn separately; a cross marks the
    end of a run that stopped early. style: the lines' colour and style."""
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(set(map(len, runs))) > 1:
        longest = max(map(len, runs))
        for run in runs:
            end = {"marker": "x", "markevery": [-1]} if len(run) < longest else {"marker": marker}
            axes.plot(range(first, first + len(run)), run, label=label, **end, **style)
            label = None  # once in the legend
        return
    table, steps = np.array(runs), range(first, first + len(runs[0]))
    axes.plot(steps, table.mean(0), label=label, marker=marker, **style)
    axes.fill_between(steps, table.min(0), table.max(0), color=style["color"], alpha=0.2, lw=0)


def curves(records: list[Record], column: str) -> list[list[float]]:
    """A column of the histories of the runs that did not diverge in their first epoch."""
    return [record["history"][column] for record in records if record["history"]]


def plot_experiment(
    axes: Axes, records: list[Record], column: str, label: str, **style: Any
) -> None:
    """Plot a column of the history of an experiment's runs, if it has any, over epochs."""
    if runs := curves(records, column):
        plot_bands(axes, runs, with_seeds(label, runs), **style)


def plot_forest(axes: Axes, rows: list[tuple]) -> None:
    """A forest plot: for each (name, original's value or None, [(mean, interval or None, colour,
    label), ...]), from top to bottom, the means with their intervals and the original's value."""
    labelled = set()

    def once(label):  # each label once in the legend
        is_new = label not in labelled
        labelled.add(label)
        return label if is_new else None

    for y, (_, original, points) in enumerate(rows):
        for i, (mean, bounds, color, label) in enumerate(points):
            height = y + 0.5 * (i - (len(points) - 1) / 2)
            if bounds:
                axes.plot(
                    bounds, [height] * 2, color=color, alpha=0.45, lw=2, solid_capstyle="butt"
                )
            axes.plot(mean, height, "o", color=color, markersize=3.5, label=once(label))
        if original is not None:
            axes.plot(original, y, "D", color="black", markersize=3.5, label=once("original"))
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    if rows:
        axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)


def plot_dots(axes: Axes, groups: dict[str, Sequence[float]], colors: Sequence[str] = ()) -> None:
    """For each {label: a value per run}, downwards, a dot per run and a bar at the mean; the labels
    name the number of runs where it differs."""
    for y, values in enumerate(groups.values()):
        color = colors[y] if colors else utils.BLUE
        axes.plot(values, [y] * len(values), "o", color=color, markersize=5, alpha=0.6)
        axes.plot(statistics.mean(values), y, "|", color="black", markersize=12)
    is_same = len(set(map(len, groups.values()))) == 1
    names = [x if is_same or len(v) == 1 else with_seeds(x, v) for x, v in groups.items()]
    axes.set_yticks(range(len(groups)), names)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)


def mark_original(axes: Axes, value: float) -> None:
    """Draw the original's value as a vertical line with its name."""
    axes.axvline(value, color="0.4", linestyle="--")
    where = {"xytext": (3, 3), "textcoords": "offset points", "fontsize": 8}
    axes.annotate("original", (value, 0), xycoords=("data", "axes fraction"), rotation=90, **where)
