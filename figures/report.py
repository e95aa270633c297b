"""Write the report, figures/README.md and its figures, from the run records in figures/runs.

    python -m figures.report                             takes seconds and needs no data
    python -m figures.report --train report              first train the runs without a record
    python -m figures.report --train beyond --dry_run    list these runs and estimate the hours

options | records | training | writing
"""

import fnmatch
import itertools
import re
import statistics
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jinja2
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import utils
from figures import common, report_q2, report_q3
from figures.common import SEEDS, Experiment, Record, Records, markdown_table, scored
from utils import UserError

QUESTIONS = {"q2": report_q2, "q3": report_q3}
GROUPS = {"report": ("report",), "all": ("report", "all"), "beyond": ("beyond",)}
TEMPLATE = utils.ROOT / "figures" / "template.md"
NOT_TRAINED = "*(not trained yet)*"

# ----------------------------------------------------------------------------------------------
# options


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The command line. Raises UserError."""
    parser = make_parser()
    options = parser.parse_args(argv)
    for name, value in vars(options).items():
        is_general = name in ("format", "output_dir", "train", "thumbnails")
        is_general |= name == "data_path" and options.thumbnails
        if not options.train and not is_general and value != parser.get_default(name):
            raise UserError(f"--{name} needs --train")
    if options.train and not any(chosen_experiments(q, options) for q in chosen_questions(options)):
        labels = [x.label for q in QUESTIONS.values() for x in q.EXPERIMENTS]
        problem = f"--only {options.only!r} matches no experiment, such as {labels[0]!r}"
        raise UserError(f"{problem}, of --train {options.train} and --question")
    return options


def chosen_questions(options: Namespace) -> list[ModuleType]:
    """The questions of --question."""
    return [QUESTIONS[options.question]] if options.question else list(QUESTIONS.values())


def chosen_experiments(question: ModuleType, options: Namespace) -> list[Experiment]:
    """A question's experiments that --train and --only choose."""
    group = [x for x in question.EXPERIMENTS if x.group in GROUPS[options.train]]
    return [x for x in group if fnmatch.fnmatchcase(x.label, options.only)]


# fmt: off
def make_parser() -> utils.Parser:
    """The parser of the command line."""
    parser = utils.Parser("python -m figures.report", description=__doc__.rpartition("\n\n")[0])
    add, number = parser.add_argument, utils.number
    add("--format", choices=("png", "pdf", "svg"), default="png",
        help="file format of the figures (default: %(default)s)")
    add("--output_dir", type=Path, default=utils.ROOT, metavar="DIR",
        help="where checkpoints/ and figures/ are (default: the repository)")
    add("--thumbnails", action="store_true",
        help="first write figures/thumbnails.png again: the few photographs that the figures show")
    add = parser.add_argument_group("training").add_argument
    add("--train", choices=GROUPS,
        help="train the runs without a record: report, the original's experiments; all, also "
        "tests of the original's claims; beyond, improvements on the original")
    add("--question", choices=QUESTIONS, help="train only experiments of this question")
    add("--seeds", type=number(int, 1, len(SEEDS)), metavar="N",
        help="seeds per experiment (default: 2 to 5)")
    add("--only", default="*", metavar="GLOB",
        help="train only experiments whose label matches, such as '*pool*'")
    add("--dry_run", action="store_true",
        help="only list the commands that would be run and estimate the hours")
    add("--data_path", type=Path, metavar="FILE",
        help="question 2's .npz file (default: data/intel_landscapes.v2.npz)")
    add("--data_dir", type=Path, metavar="DIR", help="question 3's folder (default: data/)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if available, else cpu)")
    add("--threads", type=number(int, 1, 1024), help="CPU threads per run (default: one)")
    add("--jobs", type=number(int, 1, 1024),
        help="number of runs at once (default: one per core; on a GPU, one)")
    add("--scheduler", metavar="ADDRESS",
        help="send runs to the workers of this Dask scheduler, tcp://HOST:PORT, in place of --jobs")
    return parser
# fmt: on


# ----------------------------------------------------------------------------------------------
# records

Job = tuple[Experiment, Namespace]  # a run: the arguments that train it on this machine
ByName = dict[str, Record]  # records by their runs' names


class Dataset(NamedTuple):
    """A data set's name and fingerprint, on which the names of runs depend."""

    name: str
    fingerprint: str = ""


OURS = {  # the data of the records on which the template's sentences rest
    "q2": Dataset("photographs", "c9e7154bf0dd"), "q3": Dataset("pronunciations", "3821d4ae01c3"),
}  # fmt: skip


def load_records(folder: Path) -> ByName:
    """{run's name: record} of the runs in a folder, without those on built-in samples. Raises
    UserError."""
    records = {path.stem: utils.load_record(path) for path in sorted(folder.glob("*.json"))}
    return {name: r for name, r in records.items() if r["data"]["name"] != "sample"}


def choose_dataset(question: ModuleType, experiment: Experiment, records: ByName) -> Dataset:
    """The data set of an experiment: among those with its name, the one of the most records, so
    that data sets are not mixed; without a fingerprint if there are no records."""
    name = experiment.data or question.DATA_NAME
    counts = Counter(Dataset(**record["data"]) for record in records.values())
    return max((d for d in counts if d.name == name), key=counts.get, default=Dataset(name))


def configurations(question: ModuleType, experiment: Experiment, seeds: int) -> list[Namespace]:
    """The arguments of an experiment's runs, one for each seed; an ensemble is a single run."""
    args = question.script.parse_args(experiment.arguments.split())
    if experiment.members:
        return [args]
    return [Namespace(**vars(args) | {"seed": seed}) for seed in SEEDS[:seeds]]


def run_names(question: ModuleType, args: Namespace, dataset: Dataset) -> list[str]:
    """The names of the runs whose record counts as that of these arguments, the preferred first:
    bfloat16 is slower than float32 on some processors, so either will do."""
    precisions = ("bfloat16", "float32") if is_bfloat16(args) else ()
    versions = [Namespace(**vars(args) | {"precision": p}) for p in precisions] or [args]
    return [question.script.make_run(version, dataset).name for version in versions]


def is_bfloat16(args: Namespace) -> bool:
    """Whether arguments, those of question 2, ask for bfloat16."""
    return vars(args).get("precision") == "bfloat16"


def is_finished(question: ModuleType, record: Record, extra: Sequence[str] = ()) -> bool:
    """Whether a record has all that the report needs, and these further measures."""
    measured = record.get("analysis", {}).keys() | record.get("final", {}).keys()
    is_measured = question.is_scored(record) and {"analysis", *extra} <= {*measured, *record}
    return is_measured or "diverged_in_epoch" in record


def find_records(question: ModuleType, records: ByName) -> Records:
    """The finished records of a question's experiments; unfinished ones are named on stderr."""
    records_by_label, unfinished = {}, {}
    for experiment in question.EXPERIMENTS:
        runs = records_by_label.setdefault(experiment.label, [])
        dataset = choose_dataset(question, experiment, records)
        for args in configurations(question, experiment, len(SEEDS)):
            names = [name for name in run_names(question, args, dataset) if name in records]
            finished = [name for name in names if is_finished(question, records[name])]
            runs += [records[name] for name in finished[:1]]
            unfinished |= dict.fromkeys([] if finished else names)
    for name in unfinished:
        print(f"{name}: left out, its record lacks scores; --train completes it", file=sys.stderr)
    return records_by_label


# ----------------------------------------------------------------------------------------------
# training


def missing_jobs(question: ModuleType, options: Namespace, records: ByName) -> list[Job]:
    """The runs of the chosen experiments that have no finished record with all measures."""
    jobs = {}
    for experiment in chosen_experiments(question, options):
        dataset = choose_dataset(question, experiment, records)
        for args in configurations(question, experiment, options.seeds or experiment.seeds):
            names = run_names(question, args, dataset)
            finished = (is_finished(question, records.get(x, {}), experiment.extra) for x in names)
            if not any(finished):
                args = adapt(question, experiment, args, options)
                name = question.script.make_run(args, dataset).name
                jobs.setdefault(name, (experiment, args))  # two experiments may share a run
    return list(jobs.values())


def adapt(
    question: ModuleType, experiment: Experiment, args: Namespace, options: Namespace
) -> Namespace:
    """The arguments with the command line's folders, device, jobs, ..., and with float32 if this
    processor computes bfloat16 more slowly."""
    given = {name: value for name, value in vars(options).items() if name in args}
    if experiment.data:
        given["data_dir"] = question.script.DATA_DIR / experiment.data
    if is_bfloat16(args) and (options.device or utils.default_device()).startswith("cpu"):
        utils.prepare_device("cpu", options.threads or 1)  # the run's threads
        if not utils.bfloat16_is_faster():
            given["precision"] = "float32"
    return Namespace(**vars(args) | given)


def list_jobs(question: ModuleType, jobs: list[Job], found: Records) -> None:
    """Print the jobs' commands and an estimate of their hours from the records found; an ensemble
    takes no time, for its members have their own jobs."""
    seconds = {
        label: [common.seconds_per_epoch(run) for run in runs if run["history"]]
        for label, runs in found.items()
    }
    every, total = [value for values in seconds.values() for value in values], 0
    for experiment, args in jobs:
        run = question.script.make_run(args, Dataset(""))
        print(run.command + (f" --data_dir data/{experiment.data}" if experiment.data else ""))
        if every and not experiment.members:
            total += statistics.median(seconds[experiment.label] or every) * run.epochs
    hours = f"; about {total / 3600 / utils.cpu_count():.1f} hours on this machine"
    print(f"{len(jobs)} runs to train{hours if jobs and every else ''}")


def train(question: ModuleType, jobs: list[Job], options: Namespace, records: ByName) -> list[str]:
    """Train runs side by side, one data set after the other and ensembles last, and analyse them.
    A run that fails does not stop the others; returns the errors."""
    groups, errors = {}, []
    for experiment, args in jobs:
        key = bool(experiment.members), experiment.data or ""
        groups.setdefault(key, []).append((experiment, args))
    groups = [group for _, group in sorted(groups.items())]
    loaded = [load_data(question, group[0], records) for group in groups]  # before any training
    for group, data in zip(groups, loaded):
        configs = [args for _, args in group]
        try:
            utils.train_side_by_side(question.script, configs)
        except UserError as error:
            errors.append(str(error))
        device = utils.prepare_device(options.device, options.threads or 1)
        for job in tqdm(group, desc="Analysis", unit="run", disable=None):
            try:
                store_analysis(question, job, data, device)
            except UserError as error:  # its training failed and left no checkpoint
                errors.append(str(error))
    return errors


def load_data(question: ModuleType, job: Job, records: ByName) -> Any:
    """A job's data: no sample, and those of the records, if any. Raises UserError otherwise."""
    experiment, args = job
    data, dataset = question.script.load_data(args), choose_dataset(question, experiment, records)
    if data.name != dataset.name or dataset.fingerprint not in ("", data.fingerprint):
        kind = "the data of the records" if dataset.fingerprint else "real data, no sample"
        raise UserError(f"{experiment.label}: needs {kind}; data/README.md says how to get them")
    return data


def store_analysis(question: ModuleType, job: Job, data: Any, device: Any) -> None:
    """Add the report's analysis to the record of a trained run."""
    experiment, args = job
    path = question.script.make_run(args, data).record
    record = utils.load_record(path)
    if question.is_scored(record) and not is_finished(question, record, experiment.extra):
        analysis = question.analyse(args, data, device, experiment.extra)
        utils.save_record(path, record | {"analysis": record.get("analysis", {}) | analysis})


# ----------------------------------------------------------------------------------------------
# writing


def write_report(folder: Path, figure_format: str) -> None:
    """Write README.md and its figures into `folder` from the records in its runs/ and trials/."""

    numbers = itertools.count(1)

    def figure(name, fig, finding, drawn):
        """Save a figure. Returns its Markdown, with a number, a caption and an alternative text."""
        if fig is None:
            return NOT_TRAINED
        utils.save_figure(folder / f"{name}.{figure_format}", fig)
        caption = f"**Figure {next(numbers)}.** {finding}. *{drawn}.*"
        drawn = re.sub(r" \(\[.*?\)\)", "", drawn)  # links are for the caption
        return f"![{drawn}]({name}.{figure_format})\n\n{caption}"

    def show(value):
        return NOT_TRAINED if value is None else value

    records = load_records(folder / "runs")
    fields = {"figure": figure, "common": common, **QUESTIONS}
    fields["records"] = {
        "q2": find_records(report_q2, records),
        "q3": {label: scored(runs) for label, runs in find_records(report_q3, records).items()},
    }
    fields["thumbnails"] = report_q2.load_thumbnails(folder / "thumbnails.png")
    fields["original"] = draw_original(fields["records"], fields["thumbnails"])
    fields["is_ours"] = all(
        choose_dataset(question, question.EXPERIMENTS[0], records) == OURS[key]
        for key, question in QUESTIONS.items()
    )
    fields["trials"] = {key: trials_table(key, folder / "trials") for key in QUESTIONS}
    strict = {"undefined": jinja2.StrictUndefined, "keep_trailing_newline": True}
    template = jinja2.Environment(finalize=show, **strict).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    text = template.render(fields)
    utils.write_file(folder / "README.md", lambda file: file.write_text(text, encoding="utf-8"))


def draw_original(records: dict[str, Records], thumbnails: Tensor) -> Figure:
    """A photograph, the last thumbnail, and the same one scrambled; below, all of the original's
    accuracies and error rates against this report's intervals."""
    rows = {key: question.forest_rows(records[key]) for key, question in QUESTIONS.items()}
    heights = [6, *(len(part) + 1 for part in rows.values())]
    fig = utils.new_figure(5.6, 7.2, 3, 1, height_ratios=heights)[0]
    grid = fig.axes[0].get_gridspec()
    fig.axes[0].remove()
    if len(thumbnails):
        columns = grid[0].subgridspec(1, 4, width_ratios=(1, 2, 2, 1))
        report_q2.show_scrambled((fig.add_subplot(columns[i]) for i in (1, 2)), thumbnails[-1])
    for axes, part, xlabel in zip(fig.axes, rows.values(), ("Accuracy", "Test error rate")):
        common.plot_forest(axes, part)
        axes.set(xlabel=xlabel)
    for axes in fig.axes[:2]:
        if axes.lines:
            where = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 3}
            axes.legend(**where, columnspacing=1, handletextpad=0)
    return fig


def trials_table(key: str, folder: Path) -> str | None:
    """The arguments that a question's trials changed, relative to the first trial, and the scores.
    The scripts may no longer have these options: the code of the commit has them."""
    question, paths = QUESTIONS[key], folder.glob(f"{key}-*.json")
    records = sorted(map(utils.load_record, paths), key=lambda r: r["measured"]["date"])
    defaults = vars(question.script.parse_args([]))
    arguments = [defaults | r["arguments"] | {"data": r["data"]["name"]} for r in records]
    scores = [{} if "diverged_in_epoch" in r else question.trial_scores(r) for r in records]
    columns = max(scores, key=len, default={})
    rows = []
    for record, changed, row in zip(records, arguments, scores):
        cells = (row.get(column, "diverged") for column in columns)
        commit = record["measured"].get("commit") or "–"
        rows.append([changes(arguments[0], changed) or "–", *cells, commit])
    return markdown_table(["changed", *columns, "commit"], rows)


def changes(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The arguments that differ, as text: 'name value, ...' with the values of `after`."""
    texts = {
        name: " ".join(value) or "none" if isinstance(value, list) else value
        for name, value in after.items()
    }
    names = sorted(before.keys() | after.keys())
    return ", ".join(f"{n} {texts.get(n)}" for n in names if before.get(n) != after.get(n))


def write_thumbnails(folder: Path, options: Namespace) -> None:
    """Write thumbnails.png from the photographs on which the records were made."""
    records = load_records(folder / "runs")
    args = Namespace(**vars(report_q2.script.parse_args([])) | {"data_path": options.data_path})
    data = load_data(report_q2, (report_q2.EXPERIMENTS[0], args), records)
    report_q2.save_thumbnails(folder / "thumbnails.png", find_records(report_q2, records), data)


def train_missing(folder: Path, options: Namespace) -> list[str]:
    """Train the runs without a record, or only list them. Returns the errors."""
    records, errors = load_records(folder / "runs"), []
    for question in chosen_questions(options):
        jobs = missing_jobs(question, options, records)
        if options.dry_run:
            list_jobs(question, jobs, find_records(question, records))
        else:
            errors += train(question, jobs, options, records)
    return errors


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, if asked to, and write the report."""
    options = parse_args(argv)
    folder = options.output_dir / "figures"
    if not options.train and not (folder / "runs").is_dir():
        raise UserError(f"{folder}: no run records; --train trains the runs")
    errors = train_missing(folder, options) if options.train else []
    if options.dry_run:
        return
    if options.thumbnails:
        write_thumbnails(folder, options)
    write_report(folder, options.format)
    print(f"Report: {folder / 'README.md'}")
    if errors:
        raise UserError("; ".join(errors))


if __name__ == "__main__":
    utils.run_script(main)
