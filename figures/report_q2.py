"""The report on question 2.

experiments | thumbnails | measures of a record | tables | figures
"""

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

import hw2_q2 as script
import utils
from figures import analysis_q2, common
from figures.common import Experiment, Record, Records, markdown_table, mean_sd, scored

# ----------------------------------------------------------------------------------------------
# experiments

DATA_NAME = "photographs"
analyse = analysis_q2.analyse
SHORT = "-learning_rate 0.01 -epochs 10"
SHORT_BFLOAT16 = f"{SHORT} -precision bfloat16"
SHORT_CYCLE = f"{SHORT_BFLOAT16} -schedule one_cycle"
RECIPE_BEST = "-recipe best -precision bfloat16"
RECIPE_BEST_20 = f"{RECIPE_BEST} -epochs 20"
PLAIN, VARIANT = "plain, rate 0.01", "batch norm + pooling"
KEPT = "batch norm + pooling, last batch kept"
ORIGINAL_10, BEST_20 = "the assignment's recipe, 10 epochs", "best recipe, 20 epochs"
BEST, NOT_ERASED = "best recipe", "best recipe without erasing"
RESNET_20, BEST_RESNET = "residual, 20 epochs, no erasing", "residual network"
UNSMOOTHED = "without label smoothing"
ADDED = {  # to the assignment's recipe
    "with momentum": "-momentum 0.9",
    "with one cycle": "-schedule one_cycle",
    "with batch size 64, rate 0.08": "-batch_size 64 -learning_rate 0.08",
    "with weight decay": "-l2_decay 0.0005",
    "with label smoothing": "-label_smoothing 0.1",
    "with flips": "-augment flip",
    "with crops": "-augment crop",
    "with erasing": "-augment erase",
}
LEFT_OUT = {  # of the best recipe
    "without momentum": "-momentum 0",
    "without one cycle (rate 0.02)": "-schedule constant -learning_rate 0.02",
    "without batch size 64 (8, rate 0.0125)": "-batch_size 8 -learning_rate 0.0125",
    "without weight decay": "-l2_decay 0",
    UNSMOOTHED: "-label_smoothing 0",
    "without flips": "-augment crop erase",
    "without crops": "-augment flip erase",
    "without erasing": "-augment flip crop",
}
SWINGS = {  # of validation accuracy
    "last batch merged, 10 epochs": SHORT,
    "last batch kept, 10 epochs": f"{SHORT} -last_batch keep",
}
EVALUATIONS = {  # to score an epoch: name, colour, line
    "as they are": ("last weights", utils.VERMILION, "-"),
    "statistics": ("statistics recomputed", "0.5", "--"),
    "average": ("averaged weights", "black", "-"),
}
LOCALITY = {"plain network": "", "fully connected": "-kernel_size 48"}  # first layer; 10 epochs
LOCALITIES = tuple(f"{name}, {pixels}" for name in LOCALITY for pixels in script.PIXELS)
VISUALISED = {pixels: f"plain network, {pixels}" for pixels in ("ordered", "scrambled")}
SHAPES = {  # of the variant's blocks
    "kernels 3x3, max pooling": "", "kernels 5x5": "-kernel_size 5",
    "kernels 7x7": "-kernel_size 7", "two 3x3 per block": "-convs 2",
    "one 48x48 convolution": "-kernel_size 48", "average pooling": "-pool avg",
    "strided convolutions": "-pool stride",
    "no pooling between blocks": "-pool none",
}  # fmt: skip
SWEEP_EPOCHS = 5
SHORT_RATES = {
    rate: f"plain, rate {rate}, {SWEEP_EPOCHS} epochs" for rate in (3e-4, 0.003, 0.03, 0.3, 1.0)
}
SWEEP = {  # of learning rates: the first epochs of long runs are those of short ones
    **SHORT_RATES, 0.001: "plain, rate 0.001", 0.01: PLAIN, 0.1: "plain, rate 0.1",
}  # fmt: skip
BUDGETS = {
    (model, epochs): f"best recipe, {model}, {epochs} epochs"
    for model in ("cnn", "resnet")
    for epochs in (1, 2, 4, 8, 16)
}
TIMED = {  # label: runs of the same speed as its own, timed on the day of BUDGETS
    VARIANT: "batch norm + pooling, scrambled",
    BEST_20: BUDGETS["cnn", 16],
    BEST: BUDGETS["cnn", 16],
    BEST_RESNET: BUDGETS["resnet", 16],
}
ARGUMENTS = {  # (group, seeds): {label: arguments}
    ("report", 3): {
        "plain, rate 0.1": "-no_batch_norm -learning_rate 0.1",
        PLAIN: "-no_batch_norm -learning_rate 0.01",
        "plain, rate 0.001": "-no_batch_norm -learning_rate 0.001",
        VARIANT: "-learning_rate 0.01",
        "plain, rate 0.1, scrambled": "-no_batch_norm -learning_rate 0.1 -scramble_pixels",
        "plain, scrambled": "-no_batch_norm -scramble_pixels",
        "plain, rate 0.001, scrambled": "-no_batch_norm -learning_rate 0.001 -scramble_pixels",
        "batch norm + pooling, scrambled": "-scramble_pixels",
    },
    ("all", 2): {
        "batch norm, flattened": "-head flatten",
        "global pooling, no batch norm": "-no_batch_norm -head gap",
        "plain, dropout 0.3": "-no_batch_norm -dropout 0.3",
        "plain, weight decay 0.0005": "-no_batch_norm -l2_decay 0.0005",
    },
    ("all", 3): {
        f"{name}, {pixels}": f"{SHORT_CYCLE} -no_batch_norm {more} -pixels {pixels}"
        for name, more in LOCALITY.items()
        for pixels in script.PIXELS
    }
    | SWINGS
    | {KEPT: "-last_batch keep"},
    ("all", 1): {
        label: f"-no_batch_norm -precision bfloat16 -epochs {SWEEP_EPOCHS} -learning_rate {rate}"
        for rate, label in SHORT_RATES.items()
    },
    ("all", 5): {label: f"{SHORT_CYCLE} {arguments}" for label, arguments in SHAPES.items()},
    ("beyond", 5): {BEST: RECIPE_BEST, NOT_ERASED: f"{RECIPE_BEST} -augment flip crop"},
    ("beyond", 3): {
        ORIGINAL_10: SHORT_BFLOAT16,
        **{label: f"{SHORT_BFLOAT16} {more}" for label, more in ADDED.items()},
        RESNET_20: f"{RECIPE_BEST_20} -augment flip crop -model resnet",
        BEST_RESNET: f"{RECIPE_BEST} -model resnet",
        BEST_20: RECIPE_BEST_20,
        **{label: f"{RECIPE_BEST_20} {more}" for label, more in LEFT_OUT.items()},
        **{
            label: f"{RECIPE_BEST} -model {model} -epochs {epochs}"
            for (model, epochs), label in BUDGETS.items()
        },
    },
}
EXTRA = {  # label: further measures, of analysis_q2.EXTRA
    **dict.fromkeys(SWINGS, ("epochs",)),
    **dict.fromkeys(VISUALISED.values(), ("filters", "grad_cam")),
}
EXPERIMENTS = tuple(
    Experiment(label, arguments, seeds, group, extra=EXTRA.get(label, ()))
    for (group, seeds), experiments in ARGUMENTS.items()
    for label, arguments in experiments.items()
)
# The original counts the parameters of all layers but the output layer and the last batch norm.
ORIGINAL_LAYERS = 896, 18_496, 73_856, 64, 128, 256, 132_096, 4_719_616, 524_800
ORIGINAL_TOTALS = dict(zip(script.NETWORKS, (5_340_160, 752_640)))
ORIGINAL_VALIDATION_IMAGES = 1404
# Systems trained for 40 epochs at a constant rate, over which the spread between seeds is pooled.
# Not KEPT, whose last batch of three images makes it swing more, nor rate 0.1, scrambled or not.
POOLED = (  # of 40 epochs at a constant rate, with ordered pixels
    PLAIN, "plain, rate 0.001", VARIANT, "batch norm, flattened", "global pooling, no batch norm",
    "plain, dropout 0.3", "plain, weight decay 0.0005",
)  # fmt: skip
RATES = "plain, rate 0.1", PLAIN, "plain, rate 0.001"
SCRAMBLED = (
    "plain, rate 0.1, scrambled", "plain, scrambled", "plain, rate 0.001, scrambled",
    "batch norm + pooling, scrambled",
)  # fmt: skip
ORIGINAL = dict(  # its validation and test accuracies, compared with ordered and scrambled pixels
    zip(
        (*RATES, VARIANT, *SCRAMBLED),
        2 * ((0.5684, 0.5743), (0.7293, 0.6970), (0.5798, 0.5743), (0.7528, 0.7460)),
    )
)
CHANGES = PLAIN, "batch norm, flattened", "global pooling, no batch norm", VARIANT
REGULARISED = PLAIN, "plain, dropout 0.3", "plain, weight decay 0.0005", *CHANGES[1:]
POOLS = (
    "kernels 3x3, max pooling", "average pooling", "strided convolutions",
    "no pooling between blocks",
)  # fmt: skip
SHIFTED = PLAIN, "global pooling, no batch norm", VARIANT
MAIN_RESULTS = VARIANT, BEST_20, NOT_ERASED, BEST, RESNET_20, BEST_RESNET
LINE_STYLES = {  # the same in every figure
    label: {"color": color, "linestyle": line}
    for label, color, line in (
        ("plain, rate 0.1", utils.ORANGE, "-"), (PLAIN, utils.BLUE, "-"),
        ("plain, rate 0.001", utils.SKY, "--"), (VARIANT, utils.VERMILION, "-"),
        (KEPT, "0.4", "--"),
        ("batch norm, flattened", utils.GREEN, "-."),
        ("global pooling, no batch norm", utils.PURPLE, ":"),
        (BEST_20, utils.SKY, "-"), (UNSMOOTHED, utils.ORANGE, "--"), (BEST, utils.BLUE, "-"),
        (NOT_ERASED, utils.PURPLE, "-"), (RESNET_20, utils.ORANGE, "-"),
        (BEST_RESNET, utils.GREEN, "-"),
    )
}  # fmt: skip


def is_scored(record: Record) -> bool:
    """Whether a record has the final scores that the report compares."""
    return "final" in record


# ----------------------------------------------------------------------------------------------
# thumbnails: the few photographs that the figures show, beside each other in one PNG file

SHIPPED_SEED = 2  # of BEST_RESNET: the network in data/pretrained
SHOWN = 1469  # the test image, a mountain, that is also shown scrambled


def shipped_errors(records: Records) -> list[list]:
    """The confident errors of the shipped network, [] without its record."""
    runs = common.by_seed(records[BEST_RESNET], lambda run: run["analysis"].get("confident_errors"))
    return runs.get(SHIPPED_SEED) or []


def save_thumbnails(path: Path, records: Records, data: utils.Landscapes) -> None:
    """Write the test images of the shipped network's confident errors, the first of each class, on
    which Grad-CAM is shown, and, last, SHOWN."""
    images, labels = data.splits["test"]
    errors = [row[0] for row in shipped_errors(records)]
    indices = [*errors, *analysis_q2.first_images(labels), min(SHOWN, len(labels) - 1)]
    sheet = images[indices].permute(2, 0, 3, 1).flatten(1, 2)  # (48, N * 48, 3)
    utils.write_file(path, lambda file: Image.fromarray(sheet.numpy()).save(file))


def load_thumbnails(path: Path) -> Tensor:
    """The images that `save_thumbnails` wrote, uint8 (N, 48, 48, 3); none without the file."""
    if not path.exists():
        return torch.empty(0, utils.SIZE, utils.SIZE, 3, dtype=torch.uint8)
    try:
        with Image.open(path) as image:
            sheet = torch.from_numpy(np.array(image.convert("RGB")))  # (48, N * 48, 3)
        return sheet.unflatten(1, (-1, utils.SIZE)).transpose(0, 1)
    except (OSError, RuntimeError):
        raise utils.UserError(f"{path}: damaged; --thumbnails writes it again")


# ----------------------------------------------------------------------------------------------
# measures of a record


def accuracy(record: Record, split: str) -> float:
    """The finished network's accuracy."""
    scores = record["analysis"] if split == "train" else record["final"]
    return scores[split]["accuracy"]


def accuracy_without_tta(record: Record, split: str = "test") -> float:
    """The finished network's accuracy without test-time augmentation."""
    scores = record["final"][split]
    return scores.get("accuracy_without_tta", scores["accuracy"])


def accuracy_gap(record: Record) -> float:
    """Training accuracy minus validation accuracy."""
    return accuracy(record, "train") - accuracy(record, "val")


def late_epoch_accuracy(record: Record) -> float:
    """Mean validation accuracy over the late epochs: the last quarter, but at least five."""
    values = record["history"]["val_accuracy"]
    return statistics.mean(values[-max(5, math.ceil(len(values) / 4)) :])


def first_epoch(record: Record) -> int | None:
    """The first epoch with a validation accuracy of .75, or None."""
    values = record["history"]["val_accuracy"]
    return next((epoch for epoch, value in enumerate(values, 1) if value >= 0.75), None)


def recalls(record: Record) -> dict[str, float]:
    """The recall of each class on the test images."""
    confusion = record["final"]["test"]["confusion"]
    rows = enumerate(zip(utils.CLASSES, confusion))
    return {name: row[i] / sum(row) if any(row) else math.nan for i, (name, row) in rows}


def shifted(record: Record) -> dict[str, float]:
    """Test accuracy, and its changes on images shifted by 1, 2, ... pixels; {} for the oldest
    records."""
    accuracies = record["analysis"].get("shifted", [])
    changes = {
        f"{i} pixel{'s' * (i > 1)}": x - accuracies[0] for i, x in enumerate(accuracies) if i
    }
    return {"test": accuracies[0]} | changes if accuracies else {}


def change_when_shifted(record: Record) -> float:
    """The change of test accuracy on images shifted by 4 pixels."""
    return shifted(record).get("4 pixels", math.nan)


def resized(record: Record) -> dict[str, float]:
    """Test accuracies of networks with global average pooling on images of other sizes."""
    return {f"{size} pixels": value for size, value in record["analysis"]["sizes"].items()}


def calibration_error(record: Record) -> float:
    """The expected calibration error: the mean distance of probability and accuracy over the test
    images (Guo et al. 2017, section 2)."""
    rows = [row for row in record["analysis"]["calibration"] if row[0]]
    return sum(n * abs(p - correct) for n, p, correct in rows) / sum(n for n, _, _ in rows)


def compare(
    records: Records, label: str, base: str, column: str,
    describe: Callable[[dict, dict], str] = common.describe_difference,
) -> str:  # fmt: skip
    """The difference of a column of MEASURES between two experiments, paired by seed."""
    values, baseline = (common.by_seed(records[x], MEASURES[column]) for x in (label, base))
    return describe(values, baseline)


def interval(records: Records, label: str, split: str) -> tuple[float, float] | None:
    """The 95 % prediction interval for a new run's accuracy. The original's validation images are
    another tenth of the training images, so both samples of images add p (1 - p) / N; the test
    images are the same. The variance between seeds is pooled over POOLED, over SCRAMBLED at the
    rates .01 and .001, or over no others. None if a run diverged, for the others are a biased
    sample."""
    runs = scored(records[label])
    if not runs or len(runs) < len(records[label]):
        return None
    values = [accuracy(run, split) for run in runs]
    items = 0.0
    if split == "val":
        p, count = statistics.mean(values), sum(map(sum, runs[0]["final"]["val"]["confusion"]))
        items = p * (1 - p) * (1 / count + 1 / ORIGINAL_VALIDATION_IMAGES)
    pool = next((pool for pool in (POOLED, SCRAMBLED[1:]) if label in pool), (label,))
    groups = ([accuracy(run, split) for run in scored(records[x])] for x in pool)
    return common.prediction_interval(values, common.pooled_spread(groups), items)


def receptive_field(model: nn.Module) -> int:
    """The width, in pixels, that a position of the last convolution's feature map depends on."""
    field, stride = 1, 1
    for block in model.convs:
        field += (block.conv.kernel_size[0] - 1) * stride
        stride *= block.conv.stride[0]
        if isinstance(block.pool, (nn.MaxPool2d, nn.AvgPool2d)) and block is not model.convs[-1]:
            field += stride
            stride *= 2
    return field


def multiply_adds(model: nn.Module) -> int:
    """The multiply-adds of one image's forward pass."""
    outputs = {name: math.prod(shape) for name, shape, _, _ in script.parameter_table(model)}
    return sum(
        outputs[name] * layer.weight[0].numel()  # weight[0]: what one output is computed from
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    )


# ----------------------------------------------------------------------------------------------
# tables: Markdown, None without runs

LATE, NO_TTA = "validation, late epochs", "test, without test-time augmentation"
FIELD, PRODUCTS = "receptive field", "multiply-adds (millions)"
EPOCH = "first epoch at .75, per run"
MEASURES = {  # columns of means and standard deviations
    "training": functools.partial(accuracy, split="train"),
    "validation": functools.partial(accuracy, split="val"),
    "test": functools.partial(accuracy, split="test"),
    "training - validation": accuracy_gap,
    "shifted by 4 pixels": change_when_shifted,
    NO_TTA: accuracy_without_tta,
    LATE: late_epoch_accuracy,
}
GAP_COLUMNS = "training", "validation", "test", "training - validation", LATE, "runs"
SIZE_COLUMNS = "parameters", PRODUCTS, LATE, EPOCH
SHAPE_COLUMNS = FIELD, "parameters", PRODUCTS
MAIN_COLUMNS = "parameters", "epochs", "validation", "test", NO_TTA, "runs"


def values_of(column: str, records: list[Record]) -> list[float]:
    """One of MEASURES of the runs that did not diverge."""
    return list(map(MEASURES[column], scored(records)))


def cell(column: str, runs: list[Record]) -> str:
    """The entry of an experiment's runs in a column of a table."""
    if column in MEASURES:
        return mean_sd(values_of(column, runs))
    if column == "parameters":
        return f"{runs[0]['parameters']:,}"
    if column == "epochs":
        return str(len(runs[0]["history"]["val_accuracy"]))
    if column in (FIELD, PRODUCTS):
        model = script.build_model(common.parse_command(script, runs[0]))
        field, products = receptive_field(model), multiply_adds(model)
        return f"{field} x {field}" if column == FIELD else f"{products / 1e6:.1f}"
    if column == EPOCH:
        return ", ".join(str(first_epoch(run) or "never") for run in runs)
    if column == "runs":
        return str(len(runs))
    raise ValueError(f"no column {column!r}")


def table(records: Records, labels: Iterable[str], columns: Sequence[str]) -> str | None:
    """A row for each experiment with runs that did not diverge."""
    rows = [
        [label, *(cell(column, runs) for column in columns)]
        for label in labels
        if (runs := scored(records[label]))
    ]
    return markdown_table(["network", *columns], rows)


def accuracy_table(records: Records, labels: Iterable[str]) -> str | None:
    """The original's accuracies, this report's, the prediction intervals, and whether these contain
    the original's."""
    rows = []
    for label in labels:
        if runs := scored(records[label]):
            originals = dict(zip(("val", "test"), ORIGINAL[label]))
            means = (mean_sd([accuracy(run, split) for run in runs]) for split in originals)
            cells = (
                common.interval_cells(interval(records, label, split), original)
                for split, original in originals.items()
            )
            columns = (f"{value:.4f}" for value in originals.values()), means, *zip(*cells)
            original, mean, bounds, inside = map(" / ".join, columns)
            diverged = len(records[label]) - len(runs)
            count = f"{len(runs)} (+ {diverged} diverged)" if diverged else len(runs)
            rows.append([label, original, mean, cell(LATE, runs), count, bounds, inside])
    head = "network", "original: validation / test", "this report, last epoch: validation / test"
    head += LATE, "runs", "95 % prediction interval: validation / test"
    return markdown_table((*head, "original inside? validation / test"), rows)


def spread(records: Records, labels: Iterable[str], column: str) -> common.Spread:
    """How much a column of MEASURES varies between runs of one experiment, pooled over `labels`."""
    return common.pooled_spread(values_of(column, records[label]) for label in labels)


def compare_means(
    records: Records, labels: Iterable[str], label: str, base: str, column: str
) -> str:
    """The difference of the means of a column of MEASURES between two experiments, with the
    variance pooled over `labels`."""
    values, baseline = (values_of(column, records[x]) for x in (label, base))
    return common.unpaired_difference(values, baseline, spread(records, labels, column))


def precision_effect(records: Records, column: str) -> str | None:
    """How much a column of MEASURES is higher for SHAPES' runs in bfloat16 than for their runs in
    float32 on a CPU: the mean over the networks that have both, weighted by their runs."""
    groups, differences = [], []
    for label in SHAPES:
        runs = [run for run in records[label] if run["measured"]["device"] == "cpu"]
        parts = [
            values_of(column, [run for run in runs if ("precision" in run["arguments"]) == reduced])
            for reduced in (True, False)
        ]
        if all(parts):
            groups += parts
            weight = 1 / sum(1 / len(part) for part in parts)
            differences.append((weight, statistics.mean(parts[0]) - statistics.mean(parts[1])))
    if not differences:
        return None
    total = sum(weight for weight, _ in differences)
    mean = sum(weight * difference for weight, difference in differences) / total
    return common.with_interval(mean, common.pooled_spread(groups), 1 / total)


SWING_COLUMNS = "mean", "lowest", "change between epochs"


def with_epochs(runs: list[Record]) -> list[Record]:
    """The runs whose epochs were scored in all EVALUATIONS."""
    return [run for run in runs if "epochs" in run["analysis"]]


def late_swings(record: Record, way: str) -> dict[str, float]:
    """The SWING_COLUMNS of the second half of the epochs: validation accuracy's mean, its lowest
    value, and its mean change from one epoch to the next, scored in one of EVALUATIONS."""
    values = record["analysis"]["epochs"][way]
    late = values[len(values) // 2 :]
    changes = (abs(b - a) for a, b in itertools.pairwise(late))
    return dict(zip(SWING_COLUMNS, (statistics.mean(late), min(late), statistics.mean(changes))))


def swings_table(records: Records) -> str | None:
    """The SWING_COLUMNS of SWINGS, scored in all EVALUATIONS."""
    rows = []
    for label in SWINGS:
        runs = with_epochs(records[label])
        for way, (name, *_) in EVALUATIONS.items() if runs else ():
            swings = [late_swings(run, way) for run in runs]
            values = (mean_sd([row[column] for row in swings]) for column in SWING_COLUMNS)
            rows.append([label.partition(",")[0], name, *values, len(runs)])
    return markdown_table(["network", "scored with", *SWING_COLUMNS, "runs"], rows, text=2)


def compare_ways(records: Records, label: str, way: str, base: str) -> str:
    """The difference of late_swings' mean accuracy between two of EVALUATIONS, paired by seed."""
    runs = with_epochs(records[label])
    values, baseline = (
        common.by_seed(runs, lambda run, way=x: late_swings(run, way)["mean"]) for x in (way, base)
    )
    return common.describe_difference(values, baseline)


def swing_ratio(records: Records, way: str, base: str) -> str | None:
    """The change between epochs scored in one of EVALUATIONS, divided by that in another:
    'geometric mean [95 % confidence interval]' over seeds (Student's t of the logarithms, of which
    those of one seed's SWINGS are averaged)."""

    def log_ratio(run):
        above, below = (late_swings(run, x)[SWING_COLUMNS[-1]] for x in (way, base))
        return math.log(max(above, 1e-6) / max(below, 1e-6))

    logs = [common.by_seed(with_epochs(records[label]), log_ratio) for label in SWINGS]
    seeds = sorted(set().union(*logs))
    if len(seeds) < 2:
        return None
    means = [statistics.mean(part[seed] for part in logs if seed in part) for seed in seeds]
    low, high = scipy.stats.ttest_1samp(means, 0).confidence_interval()
    mean, low, high = np.exp([np.mean(means), low, high])
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def change_table(
    records: Records, base: str, labels: Iterable[str], columns: Sequence[str],
    pooled: Sequence[str] = (),
) -> str | None:  # fmt: skip
    """Columns of MEASURES of a base experiment and of others, with the changes: paired by seed, or
    of the means, with the variance pooled over the experiments `pooled`."""

    def change(label, column):
        if label == base:
            return ""
        if pooled:
            return compare_means(records, pooled, label, base, column)
        pair = (common.by_seed(records[x], MEASURES[column]) for x in (label, base))
        return common.difference(*pair)

    rows = [
        [label, *(text for c in columns for text in (cell(c, runs), change(label, c))), len(runs)]
        for label in (base, *labels)
        if (runs := scored(records[label]))
    ]
    head = [name for column in columns for name in (column, "change")]
    return markdown_table(["network", *head, "runs"], rows)


def vector_table(
    records: Records, labels: Iterable[str], measure: Callable[[Record], dict[str, float]]
) -> str | None:
    """The means over runs of a measure that gives several numbers, {column: number}."""
    rows, head = [], ()
    for label in labels:
        if runs := list(filter(None, map(measure, scored(records[label])))):
            rows.append([label, *(mean_sd([run[c] for run in runs]) for c in runs[0]), len(runs)])
            head = "network", *runs[0], "runs"
    return markdown_table(head, rows)


def totals_table() -> str:
    """How the original counted its totals of parameters: without the output layer, but with the
    batch norm of the other network."""
    tables = [script.parameter_table(script.CNN(**shape)) for shape in script.NETWORKS.values()]
    norms, rows = [sum(row[-1] for row in table if "norm" in row[0]) for table in tables], []
    for (title, original), table, norm in zip(ORIGINAL_TOTALS.items(), tables, norms):
        total, output, absent = sum(row[-1] for row in table), table[-1][-1], max(norms) - norm
        numbers = total, -output, absent, total - output + absent, original
        rows.append([title, *(f"{number:,}" for number in numbers)])
    head = "network", "trainable parameters", "output layer", "batch norm that it does not have"
    return markdown_table((*head, "sum", "original"), rows)


def parameters_table(title: str) -> str:
    """The parameters of one of the script's NETWORKS, layer by layer."""
    model = script.CNN(**script.NETWORKS[title])
    original = {count: f"{count:,}" for count in ORIGINAL_LAYERS}
    rows = [
        (name, " x ".join(map(str, shape)), formula, f"{count:,}", original.get(count, "–"))
        for name, shape, formula, count in script.parameter_table(model)
    ]
    totals = utils.count_parameters(model), ORIGINAL_TOTALS[title]
    rows.append(("**all**", "", "", *(f"**{total:,}**" for total in totals)))
    return markdown_table(["layer", "output shape", "formula", "parameters", "original"], rows)


def mean_errors(runs: list[Record]) -> tuple[Tensor, Tensor]:
    """Mean confusion matrices over runs without their diagonals: of all test images, and of those
    with confident predictions."""
    every = [run["final"]["test"]["confusion"] for run in runs]
    confident = [run["analysis"]["confident"] for run in runs]
    return tuple(torch.tensor(m).float().mean(0).fill_diagonal_(0) for m in (every, confident))


def filter_changes(records: Records, pixels: str) -> list[np.ndarray]:
    """What training changed in the first layer's kernels of the plain network's runs: for each an
    array (32, 3, 3, 3), output, channel, row, column."""
    changes = []
    for run in scored(records[VISUALISED[pixels]]):
        if "filters" in run["analysis"]:
            args = common.parse_command(script, run)
            utils.seed_everything(args.seed)
            initial = analysis_q2.first_filters(script.build_model(args), args, {})
            changes.append(np.subtract(run["analysis"]["filters"], initial))
    return changes


def filter_table(records: Records) -> str | None:
    """Correlations of the changes of the first layer's weights: of neighbours in a row or a column,
    and of two channels at the same position. Each kernel counts the same, however much it changed.
    """

    def correlation(a, b):
        return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])

    rows = []
    for pixels in VISUALISED:
        changes = [
            x / np.sqrt((x**2).sum((1, 2, 3), keepdims=True)).clip(1e-12)
            for x in filter_changes(records, pixels)
        ]
        if changes:
            across = [correlation(x[..., :-1], x[..., 1:]) for x in changes]
            down = [correlation(x[:, :, :-1], x[:, :, 1:]) for x in changes]
            channels = [correlation(x, np.roll(x, 1, axis=1)) for x in changes]
            rows.append([pixels, *map(mean_sd, (across, down, channels)), len(changes)])
    head = "pixels", "neighbours in a row", "neighbours in a column", "two channels", "runs"
    return markdown_table(head, rows)


def errors_table(records: list[Record], rows_shown: int = 8) -> str | None:
    """The most frequently confused pairs of classes, with the number of confident errors."""
    if not (runs := scored(records)):
        return None
    every, confident = mean_errors(runs)
    rows = []
    for i in every.flatten().argsort(descending=True, stable=True)[:rows_shown].tolist():
        true, guess = divmod(i, len(utils.CLASSES))
        counts = f"{every[true, guess]:.1f}", f"{confident[true, guess]:.1f}"
        rows.append([utils.CLASSES[true], utils.CLASSES[guess], *counts])
    head = "true class", "predicted", "test images", "with a probability of at least .9"
    return markdown_table(head, rows, text=2)


def count_errors(records: list[Record]) -> str | None:
    """A sentence each on errors, confident errors and errors due to conflicting labels."""
    if not (runs := scored(records)):
        return None
    every, confident = (errors.sum() for errors in mean_errors(runs))
    conflicts = (run["analysis"]["label_conflicts"] for run in runs)
    count, wrong, certain = (statistics.mean(column) for column in zip(*conflicts))
    share = wrong / every if every else 0
    return (
        f"The network makes {every:.1f} errors (mean over seeds), {confident:.1f} of them with a "
        f"probability of at least .9. {count:g} test images also occur among the training images "
        f"with another label. They cause {wrong:.1f} errors ({share:.1%} of all), "
        f"{certain:.1f} of them with such a probability."
    )


def trial_scores(record: Record) -> dict[str, str]:
    """The scores in the table of trials."""
    return {
        "validation, without test-time augmentation": f"{accuracy_without_tta(record, 'val'):.3f}",
        "with test-time augmentation": f"{accuracy(record, 'val'):.3f}",
        "loss (nats)": f"{record['final']['val']['loss']:.3f}",
        "training": f"{accuracy(record, 'train'):.3f}",
        "minutes": f"{common.minutes(record):.1f}",
    }


# ----------------------------------------------------------------------------------------------
# figures, None without runs


def draw_curves(records: Records, labels: Sequence[str], *columns: str) -> Figure | None:
    """Curves over epochs, a panel for each of these columns of the history."""
    titles = {"train_loss": "Training loss (nats)", "val_accuracy": "Validation accuracy"}
    rows, is_long = len(columns), max(map(len, labels)) > 24  # then a legend line for each label
    height = 0.6 + 2.3 * rows + is_long * 0.1 * len(labels)
    fig, panels = utils.new_figure(5.0, height, rows, 1, sharex=True, squeeze=False)
    for axes, column in zip(panels[:, 0], columns):
        for label in labels:
            common.plot_experiment(axes, records[label], column, label, **LINE_STYLES[label])
        axes.set(ylabel=titles[column])
        if column == "train_loss":  # a run that diverges would leave the others no room
            axes.set_ylim(0, 2)
    axes.set(xlabel="Epoch")
    common.legend_above(fig, panels[0][0], 1 if is_long else 2)
    return fig if axes.lines else None


def draw_scrambled(records: Records) -> Figure | None:
    """Validation accuracy at rate 0.01 over epochs, with ordered and with scrambled pixels, of both
    networks, a panel each."""
    fig, panels = utils.new_figure(5.6, 2.8, 1, 2, sharey=True)
    pairs = zip((PLAIN, VARIANT), (SCRAMBLED[1], SCRAMBLED[-1]))
    for axes, (ordered, scrambled) in zip(panels, pairs):
        for label, name, style in (
            (ordered, "ordered pixels", {"color": utils.BLUE}),
            (scrambled, "scrambled pixels", {"color": utils.VERMILION, "linestyle": "--"}),
        ):
            common.plot_experiment(axes, records[label], "val_accuracy", name, **style)
        axes.set(title=ordered, xlabel="Epoch")
    panels[0].set(ylabel="Validation accuracy")
    common.legend_above(fig, panels[0])
    return fig if panels[0].lines and panels[1].lines else None


def draw_overfitting(records: Records) -> Figure | None:
    """Training and validation accuracy of REGULARISED, a panel for each."""
    labels = [label for label in REGULARISED if common.curves(records[label], "val_accuracy")]
    if not labels:
        return None
    rows = math.ceil(len(labels) / 2)
    fig, panels = utils.new_figure(5.0, 0.6 + 1.9 * rows, rows, 2, sharey=True, squeeze=False)
    for axes in panels.flat[len(labels) :]:
        axes.axis("off")
    for axes, label in zip(panels.flat, labels):
        training = common.curves(records[label], "train_accuracy")
        validation = common.curves(records[label], "val_accuracy")
        common.plot_bands(axes, training, "training", color="0.4", linestyle="--")
        common.plot_bands(axes, validation, "validation", color="black")
        title = common.with_seeds(label, training).replace(" (", "\n(")  # or neighbours touch
        axes.set_title(title)
    fig.supxlabel("Epoch", fontsize=10)
    fig.supylabel("Accuracy", fontsize=10)
    common.legend_above(fig, panels[0][0])
    return fig


def forest_rows(records: Records) -> list[tuple]:
    """The rows of common.plot_forest: the original's accuracies, ordered and scrambled runs."""
    rows = []
    for ordered, scrambled in zip((*RATES, VARIANT), SCRAMBLED):
        for i, split in enumerate(("val", "test")):
            points = []
            for label, color, name in (
                (ordered, utils.BLUE, "ordered pixels"),
                (scrambled, utils.VERMILION, "scrambled pixels"),
            ):
                if runs := scored(records[label]):
                    mean = statistics.mean(accuracy(run, split) for run in runs)
                    points.append((mean, interval(records, label, split), color, name))
            name = f"{ordered}: {'validation' if split == 'val' else 'test'}"
            rows.append((name, ORIGINAL[ordered][i], points))
    return rows


def reorder(image: Tensor, pixels: str) -> Tensor:
    """An image, uint8 (48, 48, 3), with its pixels in one of the orders of -pixels."""
    return script.PIXELS[pixels](image.permute(2, 0, 1).unsqueeze(0))[0].permute(1, 2, 0)


def show_scrambled(panels: Iterable[Axes], image: Tensor) -> None:
    """Show an image, uint8 (48, 48, 3), and the same one scrambled, in two panels."""
    versions = {"a photograph": image, "the same, scrambled": reorder(image, "scrambled")}
    for axes, (title, version) in zip(panels, versions.items()):
        axes.imshow(version.numpy(), interpolation="nearest")
        axes.set_title(title)
        axes.axis("off")


def draw_confident_errors(records: Records, thumbnails: Tensor) -> Figure | None:
    """The most confident errors of the shipped network, with true and predicted class."""
    errors = shipped_errors(records)
    if len(thumbnails) != len(errors) + len(utils.CLASSES) + 1 or not errors:
        return None
    fig, grid = utils.new_figure(5.6, 5.2, 4, 6)
    for axes, image, (_, true, guess, probability) in zip(grid.flat, thumbnails, errors):
        axes.imshow(image.numpy(), interpolation="nearest")
        axes.axis("off")
        names = utils.CLASSES[true], utils.CLASSES[guess]
        axes.set_title(f"{names[0]}\nnot {names[1]}\n{probability:.2f}", fontsize=8)
    return fig


def draw_confusion(records: Records) -> Figure | None:
    """The shipped network's confusion matrix."""
    runs = common.by_seed(records[BEST_RESNET], lambda run: run["final"]["test"]["confusion"])
    return script.plot_confusion("", runs[SHIPPED_SEED]) if SHIPPED_SEED in runs else None


def draw_sweep(records: Records) -> Figure | None:
    """Validation accuracy after SWEEP_EPOCHS against the learning rate, a dot per run and a line
    through the means; crosses for runs that diverged before."""
    means, diverged = {}, []
    fig, axes = utils.new_figure(5.0, 2.8)
    for rate, label in sorted(SWEEP.items()):
        columns = [run["history"].get("val_accuracy", []) for run in records[label]]
        values = [x[SWEEP_EPOCHS - 1] for x in columns if len(x) >= SWEEP_EPOCHS]
        axes.plot([rate] * len(values), values, "o", color=utils.BLUE, markersize=4, alpha=0.6)
        means |= {rate: statistics.mean(values)} if values else {}
        diverged += [rate] * (len(columns) - len(values))
    if not means:
        return None
    axes.plot(means.keys(), means.values(), color=utils.BLUE)
    if diverged:
        axes.plot(diverged, [0] * len(diverged), "xk", clip_on=False, label="diverged")
    axes.axhline(1 / len(utils.CLASSES), color="0.6", linestyle=":", label="chance")
    axes.set(xscale="log", xlabel="Learning rate", ylim=(0, None))
    axes.set(ylabel=f"Validation accuracy, epoch {SWEEP_EPOCHS}")
    axes.set_xticks(list(means), [f"{rate:g}" for rate in means])
    axes.minorticks_off()
    axes.legend(loc="lower left")
    return fig


def draw_swings(records: Records) -> Figure | None:
    """Validation accuracy over epochs, scored in all EVALUATIONS, a panel for each of SWINGS."""
    measured = {label: runs for label in SWINGS if (runs := with_epochs(records[label]))}
    if not measured:
        return None
    fig, panels = utils.new_figure(5.6, 2.9, 1, len(measured), sharey=True, squeeze=False)
    for axes, (label, runs) in zip(panels.flat, measured.items()):
        for key, (name, color, line) in EVALUATIONS.items():
            values = [run["analysis"]["epochs"][key] for run in runs]
            common.plot_bands(axes, values, name, color=color, linestyle=line)
        axes.set_title(common.with_seeds(label.partition(",")[0], runs))
        axes.set(xlabel="Epoch")
    panels[0][0].set(ylabel="Validation accuracy", ylim=(0, 0.9))
    common.legend_above(fig, panels[0][0], 3)
    return fig


def draw_dots(records: Records, labels: Iterable[str], colors: Sequence[str] = ()) -> Figure | None:
    """Test accuracies, a dot per run."""
    groups = {label: values for label in labels if (values := values_of("test", records[label]))}
    if not groups:
        return None
    fig, axes = utils.new_figure(5.6, 0.6 + 0.3 * len(groups))
    common.plot_dots(axes, groups, colors)
    axes.set(xlabel="Test accuracy")
    return fig


def draw_locality(records: Records) -> Figure | None:
    """Test accuracies, a dot per run, of both networks on pixels in three orders."""
    colors = utils.BLUE, utils.VERMILION, utils.PURPLE  # ordered, scrambled, shuffled
    return draw_dots(records, LOCALITIES, colors * len(LOCALITY))


def draw_shapes(records: Records) -> Figure | None:
    """Validation accuracies of SHAPES, a dot per run, the most accurate network first."""
    groups = {
        f"{label} ({cell(PRODUCTS, runs)} M)": values_of("validation", runs)
        for label in SHAPES
        if (runs := scored(records[label]))
    }
    if not groups:
        return None
    fig, axes = utils.new_figure(5.6, 3.0)
    best_first = sorted(groups, key=lambda name: -statistics.mean(groups[name]))
    common.plot_dots(axes, {name: groups[name] for name in best_first})
    axes.set(xlabel="Validation accuracy")
    return fig


def draw_filters(records: Records) -> Figure | None:
    """What training changed in the first layer's kernels of one plain network each on ordered and
    on scrambled pixels."""
    rows = {pixels: filter_changes(records, pixels) for pixels in VISUALISED}
    if not all(rows.values()):
        return None
    fig, panels = utils.new_figure(5.6, 2.0, 2, 1)
    for axes, (pixels, changes) in zip(panels, rows.items()):
        kernels = torch.from_numpy(changes[0]).movedim(1, 3)  # (32, 3, 3, 3): channels last
        kernels = 0.5 + 0.5 * kernels / kernels.abs().quantile(0.99).clamp(min=1e-12)
        tiles = F.pad(
            kernels.clamp(0, 1), (0, 0, 0, 1, 0, 1), value=1.0
        )  # (32, 4, 4, 3): a white border
        sheet = tiles.unflatten(0, (2, 16)).transpose(1, 2).flatten(0, 1).flatten(1, 2)
        axes.imshow(sheet.numpy(), interpolation="nearest")
        axes.set_title(f"trained on {pixels} pixels")
        axes.axis("off")
    return fig


def draw_grad_cam(records: Records, thumbnails: Tensor) -> Figure | None:
    """Grad-CAM of one plain network each on ordered and on scrambled pixels: below each of six
    images, as the network sees it, the map."""
    runs = {pixels: scored(records[label]) for pixels, label in VISUALISED.items()}
    images = thumbnails[-len(utils.CLASSES) - 1 : -1]
    has_maps = all(part and "grad_cam" in part[0]["analysis"] for part in runs.values())
    if not has_maps or len(images) < len(utils.CLASSES):
        return None
    fig, grid = utils.new_figure(5.6, 4.4, 4, len(images))
    for rows, (pixels, part) in zip((grid[:2], grid[2:]), runs.items()):
        cam = part[0]["analysis"]["grad_cam"]
        for i, (image, guess, heat) in enumerate(zip(images, cam["predicted"], cam["maps"])):
            rows[0, i].imshow(reorder(image, pixels).numpy(), interpolation="nearest")
            rows[1, i].imshow(heat, cmap="inferno", vmin=0, vmax=1)
            rows[0, i].set_title(utils.CLASSES[i], fontsize=10)
            color = "black" if guess == i else utils.VERMILION
            rows[1, i].set_title(utils.CLASSES[guess], fontsize=9, color=color)
        rows[0, 0].set_ylabel(pixels)
        rows[1, 0].set_ylabel("Grad-CAM")
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set_visible(False)
    return fig


def budgets(records: Records) -> dict[str, dict[int, tuple[float, list[float]]]]:
    """{recipe: {epochs: (minutes, test accuracies)}} of the recipes that were trained with several
    budgets. The minutes are the epochs, with validation, times the fastest epoch of TIMED runs."""
    recipes = {"the assignment's recipe": {40: VARIANT}}
    for model, longest in (("cnn", BEST), ("resnet", BEST_RESNET)):
        recipes[longest] = {e: label for (m, e), label in BUDGETS.items() if m == model}
        recipes[longest] |= ({20: BEST_20} if longest == BEST else {}) | {60: longest}
    points = {}
    for recipe, labels in recipes.items():
        for epochs, label in labels.items():
            timed, values = records[TIMED.get(label, label)], values_of("test", records[label])
            if timed and values:
                fastest = min(min(run["measured"]["seconds"]) for run in timed)
                points.setdefault(recipe, {})[epochs] = epochs * fastest / 60, values
    return points


def budget_table(records: Records) -> str | None:
    """Test accuracy of each recipe and budget, and the minutes that it takes."""
    rows = [
        [recipe, epochs, f"{minutes:.1f}", mean_sd(values), len(values)]
        for recipe, row in budgets(records).items()
        for epochs, (minutes, values) in row.items()
    ]
    return markdown_table(["recipe", "epochs", "minutes", "test", "runs"], rows)


TARGETS = ORIGINAL[VARIANT][1], 0.85, 0.89  # test accuracies


def minutes_table(records: Records) -> str | None:
    """For each recipe with several budgets, the minutes of the smallest one whose mean test
    accuracy reaches each of TARGETS."""
    rows = []
    for recipe, row in budgets(records).items():
        points = [(minutes, statistics.mean(values)) for minutes, values in row.values()]
        reached = ([minutes for minutes, mean in points if mean >= x] for x in TARGETS)
        if len(row) > 1:
            rows.append([recipe, *(f"{min(part):.1f}" if part else "–" for part in reached)])
    return markdown_table(["recipe", *(f"minutes to {x:.3g}" for x in TARGETS)], rows)


def draw_budgets(records: Records) -> Figure | None:
    """Test accuracy against minutes of training, a dot per run and a line through the means."""
    if not (points := budgets(records)):
        return None
    fig, axes = utils.new_figure(5.6, 3.3)
    colors = utils.VERMILION, utils.BLUE, utils.GREEN
    for (recipe, row), color in zip(points.items(), colors):
        for epochs, (minutes, values) in row.items():
            axes.plot([minutes] * len(values), values, "o", color=color, markersize=3, alpha=0.5)
            where, at = {"xytext": (3, 5), "ha": "right"}, max(values)
            if recipe == BEST_RESNET:
                where, at = {"xytext": (3, -5), "ha": "left", "va": "top"}, min(values)
            where |= {"textcoords": "offset points", "color": color, "fontsize": 7}
            axes.annotate(str(epochs), (minutes, at), **where)
        means = [(minutes, statistics.mean(values)) for minutes, values in row.values()]
        marker = "o" if len(means) == 1 else None
        axes.plot(*zip(*means), color=color, marker=marker, label=recipe)
    for accuracy_reached, name in zip(TARGETS, ("the original's .746", "  0.85", "  0.89")):
        axes.axhline(accuracy_reached, color="0.6", linestyle=":", linewidth=0.8)
        x, side = (1, "right") if accuracy_reached < 0.8 else (0, "left")  # where no curve is
        where = {"xycoords": ("axes fraction", "data"), "ha": side, "va": "bottom"}
        axes.annotate(name, (x, accuracy_reached), color="0.4", fontsize=8, **where)
    axes.set(xscale="log", xlabel="Minutes of one thread", ylabel="Test accuracy")
    axes.set_xticks([0.25, 0.5, 1, 2, 4, 8, 16], ["1/4", "1/2", "1", "2", "4", "8", "16"])
    axes.minorticks_off()
    common.legend_above(fig, axes, 3)
    return fig


def draw_running_mean(records: list[Record]) -> Figure | None:
    """Each epoch's training loss, and the mean since the first epoch, probably the original's."""
    losses = common.curves(records, "train_loss")
    if not losses:
        return None
    fig, axes = utils.new_figure()
    running = [(np.cumsum(run) / np.arange(1, len(run) + 1)).tolist() for run in losses]
    style = LINE_STYLES[PLAIN]
    common.plot_bands(axes, running, "mean since the first epoch", **style | {"linestyle": "--"})
    common.plot_bands(axes, losses, "mean of each epoch", **style)
    axes.set(xlabel="Epoch", ylabel="Training loss (nats)", ylim=(0, None))
    axes.legend()
    return fig


def draw_main_results(records: Records) -> Figure | None:
    """Test accuracies, a dot per run, and the original's best accuracy."""
    fig = draw_dots(records, MAIN_RESULTS)
    if fig:
        common.mark_original(fig.axes[0], ORIGINAL[VARIANT][1])
    return fig


def draw_calibration(records: Records) -> Figure | None:
    """Accuracy against the probability of the predicted class."""
    fig, axes = utils.new_figure(4.2, 3.6)
    axes.plot([0.2, 1], [0.2, 1], color="0.6", linestyle=":", label="perfect calibration")
    for label, name in {UNSMOOTHED: UNSMOOTHED, BEST_20: "with label smoothing"}.items():
        if runs := scored(records[label]):
            bins = zip(*(run["analysis"]["calibration"] for run in runs))
            means = [mean for rows in bins if (mean := mean_of_bin(rows))]
            error = statistics.mean(map(calibration_error, runs))
            name = f"{common.with_seeds(name, runs)}, calibration error {error:.3f}"
            axes.plot(*zip(*means), marker="o", markersize=4, label=name, **LINE_STYLES[label])
    axes.set(xlabel="Probability of the predicted class", ylabel="Accuracy")
    common.legend_above(fig, axes, 1)
    return fig if len(axes.lines) > 1 else None


def mean_of_bin(rows: Iterable[list], fewest: int = 20) -> tuple[float, float] | None:
    """(mean probability, accuracy) of a bin over runs; None with fewer than `fewest` images."""
    rows = [row for row in rows if row[0]]
    count = sum(row[0] for row in rows)
    if count < fewest:
        return None
    return tuple(sum(row[0] * row[i] for row in rows) / count for i in (1, 2))
