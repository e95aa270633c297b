"""Word lists: which words a language has, and how often they are used.

A list is a language of the package `wordfreq` (Speer 2022, doi.org/10.5281/zenodo.7199437), such as
'en', or a file with a word on each line, optionally followed by a TAB and a count.

lists | re-ranking
"""

import itertools
import math
import unicodedata
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import utils
from utils import UserError

MAX_WORDS = 10**7

# ----------------------------------------------------------------------------------------------
# lists


@dataclass(frozen=True)
class Lexicon:
    """Words, in lower case, and the natural logarithms of their relative frequencies."""

    name: str  # as the user gave it: a language or a file
    source: str  # such as 'wordfreq 3.1.1'
    log_frequencies: dict[str, float]

    def log_frequency(self, word: str) -> float | None:
        """A word's log frequency, with or without a capital first letter; None if not listed."""
        return self.log_frequencies.get(word[:1].lower() + word[1:])


def load_lexicon(name: str) -> Lexicon:
    """The list in the file called `name`, or wordfreq's of this language. Raises UserError."""
    path = Path(name)
    with utils.user_errors(f"{path}: cannot be read"):
        if path.is_file():
            return _normalised(name, path.name, read_counts(path))
    try:
        import wordfreq
    except ImportError:
        raise UserError(f"no file {name}; for wordfreq's lists of words: pip install wordfreq")
    languages = sorted(wordfreq.available_languages("best"))
    if name not in languages:
        raise UserError(f"{name!r} is no file and no language of wordfreq: {' '.join(languages)}")
    frequencies = wordfreq.get_frequency_dict(name, "best")
    return _normalised(name, f"wordfreq {metadata.version('wordfreq')}", frequencies)


def _normalised(name: str, source: str, counts: dict[str, float]) -> Lexicon:
    total = math.log(sum(counts.values()))
    return Lexicon(name, source, {word: math.log(n) - total for word, n in counts.items()})


def read_counts(path: Path) -> dict[str, float]:
    """{word in lower case: summed count} of a UTF-8 file; a word without a count counts 1. Raises
    UserError, naming file and line."""
    counts = {}
    with open(path, encoding="utf-8-sig") as file:
        for i, line in enumerate(itertools.islice(file, MAX_WORDS + 1), 1):
            word, _, count = line.rstrip("\r\n").partition("\t")
            word = unicodedata.normalize("NFC", word.strip()).lower()
            if i > MAX_WORDS:
                raise UserError(f"{path}: has more than {MAX_WORDS:,} words")
            if len(line) > utils.MAX_SYMBOLS:
                problem = f"a line of more than {utils.MAX_SYMBOLS:,} characters"
                raise UserError(f"{path}, line {i}: {problem}")
            try:
                number = float(count or 1)
            except ValueError:
                number = math.nan
            if not (word or not count) or not 0 < number < math.inf:
                raise UserError(
                    f"{path}, line {i}: expected a word, or a word, TAB, a count above 0"
                )
            if word:
                counts[word] = counts.get(word, 0) + number
    if not counts:
        raise UserError(f"{path}: has no words")
    return counts


# ----------------------------------------------------------------------------------------------
# re-ranking

WEIGHTS = [i / 20 for i in range(11)]
PENALTIES = [i / 2 for i in range(31)]


class Reranker(NamedTuple):
    """Adds what a list of words knows of a spelling to its log p(spelling | phonemes)."""

    lexicon: Lexicon
    weight: float  # of a word's log frequency
    penalty: float  # of a word that is not listed, which can still win

    def score(self, spelling: str, log_prob: float) -> float:
        """The score by which candidates are sorted."""
        frequency = self.lexicon.log_frequency(spelling)
        return log_prob + (-self.penalty if frequency is None else self.weight * frequency)

    def rerank(self, candidates: list[list[tuple]]) -> list[list[tuple]]:
        """Each word's candidates (spelling, log-probability), sorted by their scores."""
        return [sorted(row, key=lambda c: self.score(*c), reverse=True) for row in candidates]


def fit_reranker(candidates: list[list[tuple]], true: list[str], lexicon: Lexicon) -> Reranker:
    """The Reranker whose weight and penalty are chosen by WER on these words.

    Among all weights whose WER is within one standard error of the lowest (Breiman et al. 1984,
    section 3.4.3) the largest: words of a dictionary are mostly rare, words that people want to
    spell are mostly frequent.
    """
    errors = {}
    for weights in itertools.product(WEIGHTS, PENALTIES):
        ranked = Reranker(lexicon, *weights).rerank(candidates)
        wrong = sum(row[0][0] != word for row, word in zip(ranked, true))
        errors[weights] = wrong / len(true)
    lowest = min(errors.values())
    limit = lowest + math.sqrt(lowest * (1 - lowest) / len(true))
    weight = max(weight for (weight, _), error in errors.items() if error <= limit)
    return Reranker(lexicon, *min((pair for pair in errors if pair[0] == weight), key=errors.get))
