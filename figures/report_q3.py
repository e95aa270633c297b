"""The report on question 3.

experiments | measures of a record | tables | figures
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from matplotlib.figure import Figure

import hw2_q3 as script
import utils
from figures import analysis_q3, common
from figures.common import Experiment, Record, Records, markdown_table, mean_sd

# ----------------------------------------------------------------------------------------------
# experiments

DATA_NAME = "pronunciations"
analyse = analysis_q3.analyse
P, K, BEAM_SIZE = 0.8, 3, 5  # the decoding settings of all runs
DECODINGS = {
    "greedy": "greedy",
    "nucleus": f"nucleus, p = {P}",
    "beam": f"beam of {BEAM_SIZE}",
    "lexicon": f"beam of {script.LEXICON_BEAM}, re-ranked by the list",
}
DECODING = f"--nucleus --beam_size {BEAM_SIZE}"
PLAIN, ATTENTION = "no attention", "attention"
INPUT_FEEDING, G2P = "input feeding, one cycle", "pronunciation (g2p)"
BEST, ENSEMBLE = "best recipe", "best recipe, ensemble of five"
ALL, ALL_ENSEMBLE = "all of WikiPron", "all of WikiPron, ensemble of three"
STEPS = {  # cumulative, from the assignment's model with attention to the best recipe
    "+ one cycle, 30 epochs": "--schedule one_cycle --n_epochs 30",
    "+ label smoothing": "--label_smoothing 0.1",
    "+ small embeddings": "--embedding_scale 0.1",
    "+ input feeding": "--input_feeding",
    "+ hidden size 256": "--hidden_size 256",
    "+ two layers": "--layers 2",
}
SMOOTHING = "+ one cycle, 30 epochs", "+ label smoothing"  # without and with it
LISTED = ("lexicon",)  # further scores: with a word list
LANGUAGES = {"UK English": ("uk", "en"), "Portuguese": ("portuguese", "pt")}  # data, wordfreq's
RECIPE_BEST = f"--recipe best {DECODING}"
RECIPE_ALL = f"{RECIPE_BEST} --lexicon en --dropout 0.2 --n_epochs 12"
SHIPPED_SEED = 42  # of ALL: the model in data/pretrained
WORDS = {1000: 60, 2500: 40, 5000: 30, 10_000: 20, 20_000: 20, 40_000: 15, 75_049: 12}  # epochs
SMALL = "--use_attn --embedding_scale 0.1 --input_feeding --dropout 0.2 --schedule one_cycle"


def step_arguments(count: int) -> str:
    """The arguments of the assignment's model with the first `count` of STEPS."""
    return " ".join(["--use_attn", *list(STEPS.values())[:count], DECODING])


def words_label(words: int) -> str:
    """The label of the assignment's model trained on so many words."""
    return f"attention, {words:,} words"


SIZES = [words_label(words) for words in WORDS]

EXPERIMENTS = (
    Experiment(PLAIN, DECODING),
    Experiment(ATTENTION, f"{step_arguments(0)} --lexicon en", extra=LISTED),
    Experiment(INPUT_FEEDING, f"{SMALL} {DECODING}", 3, "beyond"),
    *(
        Experiment(step, step_arguments(i), 3, "beyond", extra=("sampling",) * (step in SMOOTHING))
        for i, step in enumerate(STEPS, 1)
    ),
    Experiment(BEST, f"{RECIPE_BEST} --lexicon en", 5, "beyond", extra=LISTED),
    Experiment(
        ENSEMBLE, f"{RECIPE_BEST} --lexicon en --ensemble --seed 42 1 2 3 4", 1, "beyond",
        members=BEST, extra=LISTED,
    ),
    Experiment(ALL, RECIPE_ALL, 3, "beyond", "us-all", extra=LISTED),
    Experiment(
        ALL_ENSEMBLE, f"{RECIPE_ALL} --ensemble --seed 42 1 2", 1, "beyond", "us-all",
        members=ALL, extra=LISTED,
    ),
    Experiment(G2P, f"{RECIPE_BEST} --direction g2p", 2, "beyond"),
    *(Experiment(name, RECIPE_BEST, 2, "beyond", data) for name, (data, _) in LANGUAGES.items()),
    *(
        Experiment(
            f"{ATTENTION}, {name}", f"{step_arguments(0)} --lexicon {lexicon}", 2, "beyond", data,
            extra=LISTED,
        )
        for name, (data, lexicon) in LANGUAGES.items()
    ),
    *(
        Experiment(
            words_label(n), f"--use_attn --n_epochs {epochs} {DECODING}", 2, "beyond",
            "us-all" if n == max(WORDS) else f"us-{n}",
        )
        for n, epochs in WORDS.items()
    ),
)  # fmt: skip
OTHERS = G2P, *LANGUAGES
MAIN_RESULTS = ATTENTION, INPUT_FEEDING, BEST, ENSEMBLE, ALL, ALL_ENSEMBLE
LINE_STYLES = {  # of an experiment, the same in every figure
    PLAIN: {"color": "0.3", "linestyle": "--"},
    ATTENTION: {"color": utils.VERMILION},
}
ORIGINAL = {  # (experiment, decoding): its test CER, WER, WER@3
    (PLAIN, "greedy"): (0.4354, 0.9040, None),
    (ATTENTION, "greedy"): (0.2677, 0.8090, None),
    (ATTENTION, "nucleus"): (0.3139, 0.8550, 0.7550),
    (ATTENTION, "beam"): (None, None, None),
}
ORIGINAL_EXAMPLES = {  # word: the spellings that it sampled
    "remainder": ("remainder", "remender"),
    "misperception": ("mesperception", "misperception"),
    "crudités": ("cruditai", "croudite", "cruditay"),
    "slogger": ("slogger", "slogar"),
    "Jingchuan": ("gingoen", "ginglwan", "jinguan"),
    "scare": ("scaur", "skeer", "skear"),
    "glossal": ("glossal", "gloسل", "glosal"),
    "touchedness": ("tutudenis", "tutuddice", "tutuddecis"),
    "alkaloses": ("alcoloses", "alcoholoses", "alcolosies"),
    "companions": ("companuns", "companions"),
}


def is_scored(record: Record) -> bool:
    """Whether a record has the scores of all three ways of decoding with the report's settings."""
    final = record.get("final", {})
    nucleus, beam = final.get("nucleus", {}), final.get("beam", {})
    settings = nucleus.get("p"), nucleus.get("k"), beam.get("size"), final.get("max_len")
    return settings == (P, K, BEAM_SIZE, script.MAX_LEN)


# ----------------------------------------------------------------------------------------------
# measures of a record


def error(
    record: Record, decoding: str, measure: str, words: np.ndarray | slice = slice(None)
) -> float:
    """A test error rate, 'cer', 'wer' or 'wer@k', over the words of these indices."""
    scores = record["final"][decoding]
    if measure == "cer":
        distances, lengths = np.array(scores["distances"]), np.array(record["analysis"]["lengths"])
        return distances[words].sum() / lengths[words].sum()
    ranks = np.array(scores["ranks"])[words]
    k = int(measure.partition("@")[2] or 1)
    return 1 - ((ranks >= 1) & (ranks <= k)).mean()


def with_list(runs: list[Record]) -> list[Record]:
    """The runs that were also scored with a word list."""
    return [run for run in runs if "lexicon" in run["final"]]


def listed_words(record: Record) -> dict[str, np.ndarray]:
    """The indices of all test words, of those in the word list, and of the others."""
    listed = np.array(record["final"]["lexicon"]["listed"], dtype=bool)
    masks = {"all": np.ones_like(listed), "in the list": listed, "not in the list": ~listed}
    return {name: np.flatnonzero(mask) for name, mask in masks.items()}


def interval(runs: list[Record], decoding: str, measure: str) -> tuple[float, float] | None:
    """The 95 % prediction interval for a new run's error rate on the same test words."""
    errors = [error(run, decoding, measure) for run in runs]
    return common.prediction_interval(errors, common.pooled_spread([errors]))


def long_words(record: Record) -> np.ndarray:
    """The indices of the test words of five letters and more."""
    return np.flatnonzero(np.array(record["analysis"]["lengths"]) >= 5)


def short_words(record: Record) -> np.ndarray:
    """The indices of the other test words."""
    return np.flatnonzero(np.array(record["analysis"]["lengths"]) < 5)


def compare(
    records: Records, label: str, base: str, decoding: str, measure: str,
    words: Callable[[Record], np.ndarray | slice] = lambda record: slice(None),
) -> str:  # fmt: skip
    """The difference of an error rate between two experiments, paired by seed; words: the indices
    of the test words that count."""
    values, baseline = (
        common.by_seed(records[x], lambda run: error(run, decoding, measure, words(run)))
        for x in (label, base)
    )
    return common.describe_difference(values, baseline)


def compare_decodings(runs: list[Record], score: tuple[str, str], base: tuple[str, str]) -> str:
    """The difference of two error rates, each (decoding, measure), paired by seed."""
    values, baseline = (
        common.by_seed(runs, lambda run, x=x: error(run, *x)) for x in (score, base)
    )
    return common.describe_difference(values, baseline)


def compare_means(
    records: Records, labels: Sequence[str], label: str, base: str, decoding: str, measure: str
) -> str:
    """The difference of the means of an error rate between two experiments, with the variance
    between seeds pooled over `labels`."""
    errors = {x: [error(run, decoding, measure) for run in records[x]] for x in labels}
    spread = common.pooled_spread(errors.values())
    return common.unpaired_difference(errors[label], errors[base], spread)


def beam_wer(runs: list[Record]) -> str:
    """The mean and standard deviation of the WER of a beam of analysis_q3.N_CANDIDATES."""
    return mean_sd([run["analysis"]["curves"]["beam"][0] for run in runs])


def mean_error(runs: list[Record], decoding: str, measure: str) -> str:
    """The mean and standard deviation of an error rate over runs."""
    return mean_sd([error(run, decoding, measure) for run in runs])


# ----------------------------------------------------------------------------------------------
# tables: Markdown, None without runs


def error_table(records: Records, keys: Iterable[tuple[str, str]]) -> str | None:
    """Error rates of the original and of this report, for `keys` of ORIGINAL, the prediction
    intervals, and whether these contain the original's."""
    rows = []
    for label, decoding in keys:
        runs = records[label]
        for measure, original in zip(("cer", "wer", "wer@3"), ORIGINAL[label, decoding]):
            if not runs or (measure == "wer@3" and decoding == "greedy"):
                continue
            row = [f"{label}, {DECODINGS[decoding]}", measure.upper()]
            row += ["–" if original is None else f"{original:.4f}"]
            row += [mean_error(runs, decoding, measure), len(runs)]
            rows.append([*row, *common.interval_cells(interval(runs, decoding, measure), original)])
    head = "model", "measure", "original", "this report", "runs", "95 % prediction interval"
    return markdown_table((*head, "original inside?"), rows, text=2)


def lexicon_table(records: Records) -> str | None:
    """Error rates of a beam without and with a word list, of the experiments that have both: of
    all test words, of those in the list, and of the others."""
    rows = []
    for label, runs in records.items():
        runs = with_list(runs)
        for name in listed_words(runs[0]) if runs else ():
            row = [label, f"{len(listed_words(runs[0])[name]):,} words, {name}"]
            for measure, how in itertools.product(("cer", "wer", "wer@3"), ("beam", "lexicon")):
                row.append(mean_sd([error(r, how, measure, listed_words(r)[name]) for r in runs]))
            rows.append([*row, len(runs)])
    heads = [head for rate in ("CER", "WER", "WER@3") for head in (rate, f"{rate} with the list")]
    return markdown_table(["model", "test words", *heads, "runs"], rows, text=2)


def lexicon_gain(runs: list[Record], words: str = "all") -> str:
    """The change of the WER of a beam by a word list, paired by seed; words: a key of
    `listed_words`."""

    def wer(decoding):
        return common.by_seed(
            with_list(runs), lambda run: error(run, decoding, "wer", listed_words(run)[words])
        )

    return common.describe_difference(wer("lexicon"), wer("beam"))


def ambiguity_table(runs: list[Record]) -> str | None:
    """The errors of the runs' beams, and what several attested spellings explain of them."""
    if not runs:
        return None
    ambiguity = [run["analysis"]["ambiguity"] for run in runs]
    errors = [run["analysis"]["curves"]["beam"][0] for run in runs]
    unexplained = [row["wer_any"] for row in ambiguity]
    explained = [1 - b / a for a, b in zip(errors, unexplained)]
    share, lowest = (f"{ambiguity[0][key]:.3f}" for key in ("several", "wer_best"))
    head = "test pronunciations with several spellings", "WER", "WER if any of them counts"
    head += "share of the errors that this explains", "lowest expected WER, given these spellings"
    row = [share, *map(mean_sd, (errors, unexplained, explained)), lowest, len(runs)]
    return markdown_table((*head, "runs"), [row], text=0)


def example_table(runs: list[Record]) -> str | None:
    """Spellings of ten words sampled by the original and by the first run, correct ones in bold."""

    def mark(word, spellings):
        return ", ".join(f"**{s}**" if s == word else s for s in spellings)

    examples = runs[0]["final"]["nucleus"]["examples"] if runs else []
    rows = [
        [w, mark(w, ORIGINAL_EXAMPLES.get(w, "–")), mark(w, samples)] for w, samples in examples
    ]
    return markdown_table(["word", "original", "this report"], rows, text=3)


def count_correct_examples(runs: list[Record]) -> str | None:
    """A sentence: how many of the ten words the samples contain, here and in the original."""
    if not runs:
        return None
    examples = (run["final"]["nucleus"]["examples"] for run in runs)
    counts = [sum(word in spellings for word, spellings in rows) for rows in examples]
    original = sum(word in spellings for word, spellings in ORIGINAL_EXAMPLES.items())
    seeds = ", ".join(str(common.seed_of(run)) for run in runs)
    return (
        f"The original's samples contain {original} of the ten words, this report's "
        f"{', '.join(map(str, counts))} (seeds {seeds})."
    )


def kind_table(records: Records, labels: Iterable[str]) -> str | None:
    """Edits of each kind, greedy, in the test words, mean over runs."""
    kinds = {"replace": "substitutions", "delete": "deletions", "insert": "insertions"}
    rows = []
    for label in labels:
        if runs := records[label]:
            counts = [run["analysis"]["mistakes"]["kinds"] for run in runs]
            means = (np.mean([count.get(kind, 0) for count in counts]) for kind in kinds)
            rows.append([label, *(f"{mean:.0f}" for mean in means)])
    return markdown_table(["model", *kinds.values()], rows)


def edit_table(runs: list[Record], rows_shown: int = 12) -> str | None:
    """The most frequent single edits, greedy, mean over runs; an edit that is not among a run's
    twenty counts as 0 there."""
    counts = Counter()
    for run in runs:
        for true, written, count in run["analysis"]["mistakes"]["common"]:
            counts[true, written] += count / len(runs)
    frequent, nothing = counts.most_common(rows_shown), "(nothing)"
    rows = [[a or nothing, b or nothing, f"{n:.0f}"] for (a, b), n in frequent]
    return markdown_table(["correct", "written", "count"], rows, text=2)


def sampling_errors(
    runs: list[Record], version: str, measure: str
) -> dict[tuple[float, float], dict[int, float]]:
    """{(temperature, p): {seed: error rate}} of samples, 'cer' of the first or 'wer@3'; version:
    of analysis_q3.sampling_errors."""
    table = defaultdict(dict)
    for run in runs:
        for temperature, p, *errors in run["analysis"].get("sampling", {}).get(version, ()):
            by_measure = dict(zip(("cer", "wer@3"), errors))
            table[temperature, p][common.seed_of(run)] = by_measure[measure]
    return table


def sampling_table(records: Records, temperatures: Sequence[float] = (0.6, 1.0)) -> str | None:
    """Validation CER of the first sample for each temperature and p: without label smoothing, with
    it, and with it removed, and the differences."""
    without, smoothed = (sampling_errors(records[x], "as trained", "cer") for x in SMOOTHING)
    removed, rows = sampling_errors(records[SMOOTHING[1]], "unsmoothed", "cer"), []
    for key in itertools.product(temperatures, analysis_q3.P_VALUES):
        a, b, c = without[key], smoothed[key], removed[key]
        if a and b:
            means = (mean_sd(list(x.values())) for x in (a, b, c))
            rows.append([*key, *means, common.difference(b, a), common.difference(c, b)])
    head = "temperature", "p", "no smoothing", "smoothing .1", "floor subtracted"
    head += "smoothing .1 - no smoothing", "floor subtracted - smoothing .1"
    return markdown_table(head, rows, text=0)


def words_table(records: Records) -> str | None:
    """Greedy test error rates of the assignment's model by the number of training words."""
    rows = []
    for n in WORDS:
        if runs := records[words_label(n)]:
            errors = (mean_error(runs, "greedy", measure) for measure in ("cer", "wer"))
            loss = mean_sd([run["history"]["train_loss"][-1] for run in runs])
            rows.append([f"{n:,}", WORDS[n], *errors, loss, len(runs)])
    head = "training words", "epochs", "CER", "WER", "last training loss (nats)", "runs"
    return markdown_table(head, rows, text=0)


RESULTS = ("greedy", "cer"), ("greedy", "wer"), ("beam", "cer"), ("beam", "wer"), ("beam", "wer@3")
RESULT_COLUMNS = tuple(f"{decoding}, {measure.upper()}" for decoding, measure in RESULTS)


def results(runs: list[Record]) -> list[str]:
    """The RESULT_COLUMNS of an experiment's runs."""
    return [mean_error(runs, *result) for result in RESULTS]


def results_table(records: Records, labels: Iterable[str]) -> str | None:
    """Test error rates of experiments; for g2p, CER denotes the phoneme error rate."""
    rows = []
    for label in labels:
        if runs := records[label]:
            rows.append([label, f"{runs[0]['parameters']:,}", *results(runs), len(runs)])
    return markdown_table(("model", "parameters", *RESULT_COLUMNS, "runs"), rows)


def steps_table(records: Records) -> str | None:
    """What each step from the assignment's model to the best recipe gains in validation CER."""
    rows, before = [], None
    for label in (ATTENTION, *STEPS, BEST):
        valid = common.by_seed(records[label], lambda run: min(run["history"]["val_cer"]))
        if runs := records[label]:
            change = "" if before is None else common.difference(valid, before)
            values = mean_sd(list(valid.values()))
            rows.append([label, values, change, *results(runs), len(runs)])
        before = valid
    head = "model", "validation CER", "change", *RESULT_COLUMNS, "runs"
    return markdown_table(head, rows)


def trial_scores(record: Record) -> dict[str, str]:
    """The scores by which a trial is compared: the lowest greedy validation error rate."""
    epoch, history = record["best_epoch"] - 1, record["history"]
    rate = "PER" if "direction" in record["arguments"] else "CER"
    return {
        f"validation {rate}": f"{history['val_cer'][epoch]:.4f}",
        "validation WER": f"{history['val_wer'][epoch]:.4f}",
        "in epoch": str(epoch + 1),
        "minutes": f"{common.minutes(record):.1f}",
    }


# ----------------------------------------------------------------------------------------------
# figures, None without runs


def draw_attention(runs: list[Record]) -> Figure | None:
    """The attention weights of the first run."""
    return script.plot_attention(common.parse_command(script, runs[0]), runs[0]) if runs else None


def draw_cer(records: Records, labels: Iterable[str]) -> Figure | None:
    """Validation CER of every epoch."""
    fig, axes = utils.new_figure()
    for label in labels:
        common.plot_experiment(axes, records[label], "val_cer", label, **LINE_STYLES[label])
    if not axes.lines:
        return None
    axes.set(xlabel="Epoch", ylabel="Validation CER", ylim=(0, None))
    axes.legend()
    return fig


def forest_rows(records: Records) -> list[tuple]:
    """The rows of common.plot_forest: the original's error rates and this report's."""
    rows = []
    for (label, decoding), originals in ORIGINAL.items():
        for measure, original in zip(("cer", "wer", "wer@3"), originals):
            if original is not None and (runs := records[label]):
                mean = float(np.mean([error(run, decoding, measure) for run in runs]))
                bounds = interval(runs, decoding, measure)
                name = f"{label}, {decoding}: {measure.upper()}"
                rows.append((name, original, [(mean, bounds, utils.GREEN, "this report")]))
    return rows


def draw_wer_at_k(runs: list[Record]) -> Figure | None:
    """WER@k against k, of nucleus sampling and of beam search, with the greedy WER and the
    original's WER and WER@3."""
    if not runs:
        return None
    fig, axes = utils.new_figure()
    names = {"nucleus": DECODINGS["nucleus"], "beam": f"beam of {analysis_q3.N_CANDIDATES}"}
    styles = {"color": utils.PURPLE}, {"color": utils.BLUE, "linestyle": "--"}
    for (decoding, name), style in zip(names.items(), styles):
        curves = [run["analysis"]["curves"][decoding] for run in runs]
        common.plot_bands(axes, curves, common.with_seeds(name, runs), ".", **style)
    greedy = np.mean([run["final"]["greedy"]["wer"] for run in runs])
    axes.axhline(greedy, color=utils.ORANGE, linestyle=":", label="greedy")
    original = ORIGINAL[ATTENTION, "nucleus"][1:]
    axes.plot([1, K], original, "D", color="black", markersize=4, label="nucleus, original")
    axes.set_xticks(range(1, analysis_q3.N_CANDIDATES + 1))
    axes.set(xlabel="Candidates per word, k", ylabel="Test WER@k")
    common.legend_above(fig, axes)
    return fig


def draw_lexicon(runs: list[Record]) -> Figure | None:
    """WER@k of a beam with and without a word list, for the words in the list and the others,
    a panel each."""
    runs = with_list(runs)
    if not runs:
        return None
    fig, panels = utils.new_figure(5.0, 2.8, 1, 2, sharey=True)
    ks = range(1, BEAM_SIZE + 1)
    for axes, name in zip(panels, ("in the list", "not in the list")):
        for decoding, style in (
            ("beam", {"color": utils.BLUE, "linestyle": "--"}),
            ("lexicon", {"color": utils.GREEN}),
        ):
            values = [
                [error(r, decoding, f"wer@{k}", listed_words(r)[name]) for k in ks] for r in runs
            ]
            common.plot_bands(axes, values, DECODINGS[decoding], ".", **style)
        axes.set_title(f"{len(listed_words(runs[0])[name])} words {name}")
        axes.set(xlabel="Candidates per word, k", xticks=ks)
    panels[0].set(ylabel="Test WER@k", ylim=(0, None))
    common.legend_above(fig, panels[0])
    return fig


def errors_by_words(records: Records, measure: str) -> dict[int, list[float]]:
    """{training words: greedy test error rates} of the assignment's model with attention."""
    runs = {n: records[words_label(n)] for n in WORDS}
    return {n: [error(r, "greedy", measure) for r in part] for n, part in runs.items() if part}


def draw_words(records: Records) -> Figure | None:
    """Test CER and WER against the number of training words, on logarithmic axes."""
    fig, axes = utils.new_figure(5.0, 3.2)
    for measure, color in (("wer", "black"), ("cer", "0.5")):
        if not (groups := errors_by_words(records, measure)):
            return None
        means = list(map(np.mean, groups.values()))
        axes.plot(groups.keys(), means, color=color)
        name = {"xytext": (0, 8), "textcoords": "offset points", "color": color}
        axes.annotate(measure.upper(), (max(groups), means[-1]), ha="right", **name)
        for n, values in groups.items():
            axes.plot([n] * len(values), values, "o", color=color, markersize=4, alpha=0.6)
    axes.set(xscale="log", yscale="log", xlabel="Training words", ylabel="Test error rate")
    axes.set_yticks([0.1, 0.2, 0.5, 1], ["0.1", "0.2", "0.5", "1"])
    axes.set_xticks(list(groups), [f"{n:,}" for n in groups], rotation=30)
    axes.minorticks_off()
    return fig


def exponents(records: Records, measure: str) -> str | None:
    """The lowest and the highest of the local exponents b of error = c words^b, each between the
    means of two neighbouring sizes."""
    means = {n: np.mean(values) for n, values in errors_by_words(records, measure).items()}
    pairs = itertools.pairwise(means.items())
    slopes = [math.log(b / a) / math.log(m / n) for (n, a), (m, b) in pairs]
    return f"{min(slopes):.2f} and {max(slopes):.2f}" if slopes else None


def draw_lengths(
    records: Records, labels: Iterable[str], shortest: int = 3, longest: int = 14
) -> Figure | None:
    """Greedy CER and WER, and the number of test words, against the words' length, which is clipped
    to `shortest` and `longest`."""
    labels = [label for label in labels if records[label]]
    if not labels:
        return None
    fig, panels = utils.new_figure(5.0, 5.6, 3, 1, sharex=True, height_ratios=(2, 2, 1))
    shown = range(shortest, longest + 1)
    lengths = np.clip(records[labels[0]][0]["analysis"]["lengths"], shortest, longest)
    groups = [np.flatnonzero(lengths == length) for length in shown]
    for axes, measure in zip(panels, ("cer", "wer")):
        for label in labels:
            runs = [
                [error(run, "greedy", measure, g) if len(g) else math.nan for g in groups]
                for run in records[label]
            ]
            style = LINE_STYLES[label] | {"first": shortest}
            common.plot_bands(axes, runs, common.with_seeds(label, runs), ".", **style)
        axes.set(ylabel=f"Test {measure.upper()}")
    panels[2].bar(shown, list(map(len, groups)), color="0.7")
    panels[2].set(ylabel="Test words", xticks=shown)
    panels[2].set(xlabel=f"Letters per word ({shortest}: or fewer, {longest}: or more)")
    common.legend_above(fig, panels[0])
    return fig


def draw_main_results(records: Records) -> Figure | None:
    """Test WER of three ways of decoding, a dot per run, and the original's, greedy; None without
    runs beyond the original's."""
    shown = {label: runs for label in MAIN_RESULTS if (runs := records[label])}
    if not shown.keys() - {ATTENTION}:
        return None
    fig, axes = utils.new_figure(5.6, 3.8)
    ways = {"greedy": utils.ORANGE, "beam": utils.BLUE, "lexicon": utils.GREEN}
    for y, runs in enumerate(shown.values()):
        for shift, (way, color) in zip((-0.25, 0, 0.25), ways.items()):
            if errors := [error(run, way, "wer") for run in runs if way in run["final"]]:
                style = {"color": color, "markersize": 5, "alpha": 0.6}
                name = None if y else DECODINGS[way]
                axes.plot(errors, [y + shift] * len(errors), "o", label=name, **style)
                axes.plot(np.mean(errors), y + shift, "|", color="black", markersize=9)
    axes.set_yticks(range(len(shown)), [label.replace(", ", ",\n", 1) for label in shown])
    axes.set(xlabel="Test WER", ylim=(len(shown) - 0.5, -0.5))
    axes.grid(axis="y", visible=False)
    common.mark_original(axes, ORIGINAL[ATTENTION, "greedy"][1])
    common.legend_above(fig, axes, 3)
    return fig
