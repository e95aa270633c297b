"""Word lists: which words a language has, and how often they are used.

A list is a language of the package `wordfreq` (Speer 2022, doi.org/10.5281/zenodo.7199437), such as
'en', or a file with a word on each line, optionally followed by a TAB and a count.

lists | re-ranking
"""

import itertools
import math
import re
import unicodedata
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

import utils
from utils import UserError

MAX_WORDS = 10**7
# A count that no TAB separates from the word.
UNTABBED_COUNT = re.compile(r'[,; ]\s*"?[\d.]+(e[-+]?\d+)?"?$|^[\d.]+[,; ]+\S', re.I)
Row = list[tuple[str, float]]  # a word's candidates (spelling, log-probability)

# ----------------------------------------------------------------------------------------------
# lists


@dataclass(frozen=True)
class Lexicon:
    """Words and the natural logarithms of their relative frequencies."""

    name: str  # as the user gave it: a language or a file
    source: str  # such as 'wordfreq 3.1.1 en'
    log_frequencies: dict[str, float]

    def log_frequency(self, word: str) -> float | None:
        """A word's log frequency; else that of the word without its capital, for most lists have
        none; else that of its casefolded form, for wordfreq has 'strasse', not 'straße'. None if it
        is not listed."""
        lower = word[:1].lower()[:1] + word[1:]
        forms = [word, lower] + [lower.casefold()] * lower.islower()
        return next((self.log_frequencies[x] for x in forms if x in self.log_frequencies), None)


def load_lexicon(name: str) -> Lexicon:
    """The list of wordfreq's language `name`, or else in the file called so. Raises UserError."""
    path = Path(name)
    try:
        import wordfreq

        languages = sorted(wordfreq.available_languages("best"))
    except ImportError:
        languages = []
    if name in languages:
        frequencies = wordfreq.get_frequency_dict(name, "best")
        return _normalised(name, f"wordfreq {metadata.version('wordfreq')} {name}", frequencies)
    with utils.user_errors(f"{path}: cannot be read"):
        if path.is_file():
            return _normalised(name, path.name, read_counts(path))
    if not languages:
        raise UserError(f"no file {name!r}; for wordfreq's word lists: pip install wordfreq")
    raise UserError(f"{name!r} is no file and no language of wordfreq: {' '.join(languages)}")


def _normalised(name: str, source: str, counts: dict[str, float]) -> Lexicon:
    total = sum(counts.values())
    if total == math.inf:
        raise UserError(f"{name}: its counts are too large")
    log_frequencies = np.log(np.fromiter(counts.values(), float)) - math.log(total)
    return Lexicon(name, source, dict(zip(counts, log_frequencies.tolist())))


def read_counts(path: Path) -> dict[str, float]:
    """{word: summed count} of a UTF-8 file; a word without a count counts 1. Raises UserError,
    naming file and line."""
    counts = {}
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for i, line in enumerate(itertools.islice(file, MAX_WORDS + 1), 1):
            if i > MAX_WORDS:
                raise UserError(f"{path}: has more than {MAX_WORDS:,} lines")
            try:
                word, count = parse_line(line)
            except ValueError as error:
                raise UserError(f"{path}, line {i}: {error}")
            if word:
                counts[word] = counts.get(word, 0) + count
    if not counts:
        raise UserError(f"{path}: has no words")
    if 2 * sum(map(str.isupper, counts)) > len(counts):
        raise UserError(f"{path}: most words are in capitals; write them in lower case")
    return counts


def parse_line(line: str) -> tuple[str, float]:
    """A word, '' in a blank line, and its count. Raises ValueError."""
    if re.search("[\0\udc80-\udcff]", line):  # bytes that the file was opened to keep
        raise ValueError("not UTF-8; save it as UTF-8 text")
    if len(line) > utils.MAX_SYMBOLS:
        raise ValueError(f"a line of more than {utils.MAX_SYMBOLS:,} characters")
    word, tab, count = line.partition("\t")
    word, count = unicodedata.normalize("NFC", word.strip()), count.strip()
    try:
        number = float(count or 1)
    except ValueError:
        number = math.nan
    is_untabbed = not tab and UNTABBED_COUNT.search(word)
    if not 0 < number < math.inf or (count and not word) or is_untabbed:
        raise ValueError("expected a word, or a word, TAB and a positive number")
    return word, number


# ----------------------------------------------------------------------------------------------
# re-ranking


@dataclass(frozen=True)
class Weights:
    """How a list changes the scores of spellings. The defaults are those of the shipped model."""

    frequency: float = 0.5  # times the log frequency of a listed word
    unlisted: float = 13.0  # taken from a word that is not listed, which can still win
    capital: float = 0.5  # taken from a listed word with a capital that the list does not have
    margin: float = 5.0  # a spelling less probable than the best by more is not considered

    def to_json(self) -> dict[str, float | None]:
        """The weights as JSON has them: no margin is None."""
        return {k: None if v == math.inf else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, content: dict[str, float | None]) -> "Weights":
        """The weights of `to_json`. Raises TypeError or ValueError if it has others."""
        weights = cls(**{k: math.inf if v is None else float(v) for k, v in content.items()})
        if any(math.isnan(value) for value in asdict(weights).values()):
            raise ValueError("a weight is not a number")
        return weights


GRID = [
    Weights(*values)
    for values in itertools.product(
        (0.5, 0.4, 0.3, 0.2, 0.1, 0.0), range(16), (1.0, 0.5, 0.0), (math.inf, 5.0, 4.0, 3.0)
    )
]


def features(candidates: list[Row], lexicon: Lexicon) -> tuple[np.ndarray, ...]:
    """Arrays (N, K) of words' candidates, best first: log-probabilities, -inf where there are
    fewer than K; log frequencies, nan for unlisted words; whether the list lacks the capital."""
    shape = len(candidates), max(map(len, candidates))
    log_probs, frequencies = np.full(shape, -np.inf), np.full(shape, np.nan)
    is_capital = np.zeros(shape, bool)
    for i, row in enumerate(candidates):
        for j, (spelling, log_prob) in enumerate(row):
            log_probs[i, j], frequency = log_prob, lexicon.log_frequency(spelling)
            frequencies[i, j] = np.nan if frequency is None else frequency
            is_capital[i, j] = spelling[:1].isupper() and spelling not in lexicon.log_frequencies
    return log_probs, frequencies, is_capital


def score(
    log_probs: np.ndarray, frequencies: np.ndarray, is_capital: np.ndarray, weights: Weights
) -> np.ndarray:
    """Scores (N, K) of candidates with these `features`: log p(spelling | phonemes) + weighted log
    frequency - penalty for a capital, or, for an unlisted word, - its penalty. -inf beyond the
    margin."""
    listed = weights.frequency * frequencies - weights.capital * is_capital
    scores = log_probs + np.where(np.isnan(frequencies), -weights.unlisted, listed)
    return np.where(log_probs < log_probs[:, :1] - weights.margin, -np.inf, scores)


@dataclass(frozen=True)
class Reranker:
    """Sorts spellings by their probability and by a word list."""

    lexicon: Lexicon
    weights: Weights = Weights()

    def rerank(self, candidates: list[Row]) -> list[list[tuple[str, float, float]]]:
        """Each word's candidates, best first, as (spelling, log-probability, score), sorted by
        their scores; those beyond the margin come last, as they were."""
        if not candidates:
            return []
        scores = score(*features(candidates, self.lexicon), self.weights).tolist()
        rows = ([(*c, x) for c, x in zip(row, part)] for row, part in zip(candidates, scores))
        return [sorted(row, key=lambda c: c[2], reverse=True) for row in rows]


def fit_reranker(candidates: list[Row], true: list[str], lexicon: Lexicon) -> Reranker:
    """The Reranker with the weights of GRID that give the lowest WER on these words; of equal ones
    that with the highest frequency weight, as people ask for common words, then the lowest penalty
    for unlisted words, then the highest for capitals, then the largest margin."""
    columns = features(candidates, lexicon)
    is_true = np.zeros(columns[0].shape, bool)
    for i, (row, word) in enumerate(zip(candidates, true, strict=True)):
        is_true[i, : len(row)] = [spelling == word for spelling, _ in row]

    def correct(weights):
        first = score(*columns, weights).argmax(1)
        return is_true[np.arange(len(first)), first].sum()

    return Reranker(lexicon, max(GRID, key=correct))
