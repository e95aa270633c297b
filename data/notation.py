"""Lines in and out of `hw2_q3.py spell`, and the notation in them as people type it.

    make_reader(known, is_ipa=True)("/hɛləʊ wɝld/").words  [[(h, ɛ, l, ə, ʊ)], [(w, ɝ, l, d)]]
    make_reader(known, is_ipa=False)("Hello!").words       [[(H, e, l, l, o)]]

A sign that the model knows is neither replaced nor dropped.

lines | signs | phonemes | letters
"""

import codecs
import contextlib
import functools
import itertools
import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Set
from pathlib import Path
from typing import Any, NamedTuple

from data.sample import ARPABET_TO_IPA, to_ipa
from utils import MAX_SYMBOLS, UserError, printable, user_errors

# ----------------------------------------------------------------------------------------------
# lines


class Text(NamedTuple):
    """A line and its words."""

    line: str
    words: list[list[tuple[str, ...]]]  # each word's readings: several if it has optional sounds
    note: str  # on what could not be read, or ""


def make_reader(known: Iterable[str], is_ipa: bool) -> Callable[[str], Text]:
    """A function that reads a line of IPA, or of written words, as the symbols in `known`."""
    known = set(known)
    read = PhonemeReader(known).read if is_ipa else functools.partial(read_letters, known=known)
    kind = "phoneme" if is_ipa else "letter"

    def read_line(line):
        line = line.strip()
        if len(line) > MAX_SYMBOLS:
            return Text(line, [], f"longer than {MAX_SYMBOLS:,} characters")
        if "\0" in line or any(unicodedata.category(c) == "Cs" for c in line):
            return Text(line, [], "not UTF-8")
        words, unknown = read(line)
        if line and not any(known.intersection(reading) for word in words for reading in word):
            return Text(line, [], f"no {kind}s")
        signs = ", ".join(f'"{sign}"' for sign in unknown)
        return Text(line, words, f"no {kind} for {signs}" if unknown else "")

    return read_line


def read_lines(path: Path | str) -> Iterator[list[str]]:
    """The lines of a file, or of standard input if `path` is -, as many at once as have arrived.
    Bytes that are not UTF-8 become surrogates. Raises UserError."""
    name, size, rest = "standard input" if path == "-" else path, 2**16, b""
    with user_errors(f"{name}: cannot be read"), contextlib.ExitStack() as stack:
        file = sys.stdin.buffer if path == "-" else stack.enter_context(open(path, "rb"))
        while chunk := file.read1(size):
            if chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UserError(f"{name}: cannot be read (UTF-16; save it as UTF-8)")
            *lines, rest = (rest + chunk).split(b"\n")
            yield [line.decode("utf-8-sig", "surrogateescape") for line in lines]
            rest = rest[:size]  # a line that is too long need not fill the memory
        yield [rest.decode("utf-8-sig", "surrogateescape")] if rest else []


def prompt_lines(what: str) -> Iterator[list[str]]:
    """Lines typed at a prompt until an empty one, each by itself."""
    yield []  # the prompt follows the model's description
    with contextlib.suppress(EOFError):
        while line := input(f"{what} (empty line to end)> "):
            yield [line]


def print_answers(answers: Iterable[dict[str, Any]], is_json: bool) -> None:
    """Print answers, {input, ..., candidates: [{read, written, log-probability, note}], note}, as a
    JSON list, or line by line: the fields of a candidate, separated by TABs, notes last."""
    if is_json:
        text = json.dumps(list(answers), indent=1, ensure_ascii=False)
        print("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))
        return
    for answer in answers:
        for row in answer["candidates"] or [{}]:
            read, written, log_prob = [*row.values()][:3] or ["", "", None]
            notes = "; ".join(part["note"] for part in (answer, row) if "note" in part)
            fields = read, written, f"{log_prob:.3f}" if row else "", notes
            print("\t".join(printable(x, 10**6) for x in fields).rstrip("\t"), flush=True)


# ----------------------------------------------------------------------------------------------
# signs

VOWELS = "iyɨʉɯuɪʏʊeøɘɵɤoəɛœɜɞʌɔæɐaɶɑɒɚɝ"
SYLLABIC = "\u0329"
# Delimiters, stress, syllables, links, intonation, punctuation, tie bars.
IGNORED = "/\\[](){}⟨⟩<>«»“”\"ˈˌ'’‘′ʹ`´.·‧•,;!?…‿⁀-–—‑|‖↗↘*\u0361\u035c"
# Signs that stand for others: look-alikes of IPA's signs, ligatures, Americanist letters.
SIGNS = str.maketrans({
    "g": "ɡ", "r": "ɹ", ":": "ː", "꞉": "ː", "'": "ʼ", "’": "ʼ", "?": "ʔ", "ł": "ɫ", "∫": "ʃ",
    "ӡ": "ʒ", "ȝ": "ʒ", "ǝ": "ə", "ә": "ə", "ε": "ɛ", "з": "ɜ", "α": "ɑ", "ӕ": "æ", "ı": "ɪ",
    "ι": "ɪ", "ɩ": "ɪ", "ɷ": "ʊ", "υ": "ʊ", "ᴧ": "ʌ", "Λ": "ʌ", "ϑ": "θ", "φ": "ɸ", "ꞵ": "β",
    "ꭓ": "χ", "η": "ŋ", "λ": "ʎ", "ʧ": "t͡ʃ", "ʤ": "d͡ʒ", "ʦ": "t͡s", "ʣ": "d͡z", "ʨ": "t͡ɕ", "ʥ": "d͡ʑ",
    "\u035c": "\u0361", "\u030d": SYLLABIC, "\u0311": "\u032f",
})  # fmt: skip
PAIRS = {  # not t s: cats has no affricate
    "s\u030c": "ʃ", "z\u030c": "ʒ", "c\u030c": "t͡ʃ", "j\u030c": "d͡ʒ", "tʃ": "t͡ʃ", "dʒ": "d͡ʒ",
    "ə˞": "ɚ", "ɜ˞": "ɝ",
}  # fmt: skip
OPTIONAL = {"ʳ": "(ɹ)", "ᵊ": "(ə)"}  # dictionaries' signs of sounds that may be silent
MAX_OPTIONAL = 4  # brackets, so at most 16 readings of a word

QUOTED = re.compile(r"(?<!\w)(?:/[^/]+/|\[[^]]+\])(?!\w)")  # a dictionary's IPA among words
GAP = re.compile(r"\s{2,}|\t")  # between words
STRESS = re.compile(rf"['’](?=[^\W{VOWELS}])")  # before a vowel, or last, it may mark an ejective
AFFRICATE = re.compile(r"(?<!\S)(t|d) (ʃ|ʒ)(?!\S)")  # one sound, as it is where they are joined
TIED_VOWELS = re.compile(rf"[{VOWELS}]\u0361")


def decompose(text: str) -> str:
    """`text` with diacritics as signs of their own (NFD), without invisible format characters."""
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    return unicodedata.normalize("NFD", text)


@functools.lru_cache(10_000)
def fold(sign: str) -> str:
    """The form that all signs of one phoneme share."""
    sign = sign.translate(SIGNS)
    for pair, phoneme in PAIRS.items():
        sign = sign.replace(pair, phoneme)
    return sign


def is_diacritic(sign: str) -> bool:
    """Whether a sign, such as a combining mark or a raised h, belongs to the sound before it."""
    return unicodedata.category(sign) in ("Mn", "Lm", "Sk") and sign not in IGNORED


# ----------------------------------------------------------------------------------------------
# phonemes


class PhonemeReader:
    """Reads IPA and ARPAbet as the phonemes in `known`, which are IPA."""

    def __init__(self, known: Iterable[str]):
        self.exact = {decompose(symbol): symbol for symbol in sorted(known)}
        folded = {fold(sign): symbol for sign, symbol in self.exact.items()}
        # Tied vowels whose own sign is unknown are two sounds: symbols for them are rare.
        self.folded = {s: symbol for s, symbol in folded.items() if not TIED_VOWELS.match(s)}
        self.longest = 1 + max(map(len, [*self.exact, *self.folded]), default=1)  # two signs for ʃ

    def read(self, text: str) -> tuple[list[list[tuple]], list[str]]:
        """The words of a text, and what no phoneme stands for.

        Wide gaps, # and | separate words; single spaces do by the rule of `split_words`. If parts
        of a text are between slashes or square brackets, only these are read.
        """
        text = decompose(text)
        if quoted := QUOTED.findall(text):
            text = "  ".join(part[1:-1] for part in quoted)
        head, *phones = text.split() or [""]
        if re.search("[012]", text) and not is_phone(head) and arpabet(phones):
            text = text.split(maxsplit=1)[1]  # a line of the CMU dictionary begins with the word
        text = re.sub(r"#|(?<=\s)[|‖](?=\s)", lambda m: m[0] if m[0] in self.exact else "  ", text)
        words, unknown = [], []
        for word in itertools.chain.from_iterable(map(self._words, GAP.split(text))):
            readings = [self._segment(tokens) for tokens in optional_readings(word)]
            unknown += readings[0][1]  # the first reading has every sound
            words.append(list(dict.fromkeys(phonemes for phonemes, _ in readings if phonemes)))
        return [word for word in words if word], list(dict.fromkeys(unknown))

    def _words(self, text: str) -> list[list[str]]:
        """The words of a text without wide gaps, each a list of tokens."""
        text = AFFRICATE.sub(r"\1\2", text)
        tokens = text.split()
        if self.exact.keys() >= set(tokens):
            return [tokens]
        if phonemes := arpabet(tokens):
            return [phonemes]
        for sign, sound in OPTIONAL.items():
            text = text if sign in self.exact else text.replace(sign, sound)
        text = text if "'" in self.exact else STRESS.sub("ˈ", text)
        return split_words([t.rstrip("?") for t in text.split() if t.strip(IGNORED)])

    def _segment(self, tokens: list[str]) -> tuple[tuple[str, ...], list[str]]:
        """Split tokens into phonemes by longest match. Returns the phonemes and the signs without
        a match. Of these, a letter stays among the phonemes; a diacritic is dropped and reported
        with the phoneme before it."""
        phonemes, unknown = [], []
        for token in tokens:
            while token:
                sizes = range(min(self.longest, len(token)), 0, -1)
                size = next((n for n in sizes if self._find(token[:n])), 1)
                sign, token = token[:size], token[size:]
                if phoneme := self._find(sign):
                    phonemes.append(phoneme)
                elif is_diacritic(sign) and phonemes:
                    unknown.append(unicodedata.normalize("NFC", phonemes[-1] + sign))
                elif sign not in IGNORED:
                    phonemes.append(sign)
                    unknown.append(sign)
        return tuple(phonemes), unknown

    def _find(self, sign: str) -> str | None:
        return self.exact.get(sign) or self.folded.get(fold(sign))


def is_phone(token: str) -> bool:
    """Whether a token is an ARPAbet symbol, with or without commas or quotation marks around it."""
    return token.strip(IGNORED).upper().rstrip("012") in ARPABET_TO_IPA


def arpabet(tokens: list[str]) -> list[str]:
    """ARPAbet in IPA, or [] if it is not ARPAbet in capitals or with stress digits: b is IPA."""
    phones = [token.strip(IGNORED) for token in tokens]
    is_clear = all(map(str.isupper, phones)) or re.search("[012]", "".join(phones))
    is_arpabet = is_clear and all(map(is_phone, phones))
    return [to_ipa(phone.upper()) for phone in phones] if is_arpabet else []


def split_words(tokens: list[str]) -> list[list[str]]:
    """Tokens as words: one word's sounds, as in h ə l oʊ, or several words, as in həloʊ wɝld.

    They are words if each has a vowel and some have a consonant, too: a consonant alone is no word,
    and vowels alone are more often diphthongs than words.
    """
    signs = [fold(token) for token in tokens]
    letters = {c for c in "".join(signs) if c.isalpha() and not is_diacritic(c)}
    have_vowels = all({*VOWELS, SYLLABIC} & set(sign) for sign in signs)
    return [[token] for token in tokens] if have_vowels and letters - {*VOWELS} else [tokens]


def optional_readings(tokens: list[str]) -> Iterator[list[str]]:
    """Tokens with and without each (bracketed) part; the first reading has all of them."""
    parts = re.split(r"\(([^()]*)\)", " ".join(tokens))  # every second one is optional
    for kept in itertools.product((True, False), repeat=min(len(parts) // 2, MAX_OPTIONAL)):
        rest = itertools.chain(kept, itertools.repeat(True))
        yield "".join(part for i, part in enumerate(parts) if i % 2 == 0 or next(rest)).split()


# ----------------------------------------------------------------------------------------------
# letters


def read_letters(text: str, known: Set[str]) -> tuple[list[list[tuple]], list[str]]:
    """The words of a written text, without punctuation, and what is not in `known`."""
    words, unknown = [], {}
    text = unicodedata.normalize("NFC", decompose(text))
    for word in [text] if " " in known else text.split():
        letters = []
        for letter in word:
            plain = "'" if letter in "’‘`ʼ" else letter.lower()
            forms = [form for form in (letter, plain, decompose(plain)[0]) if form in known]
            if not forms and letter not in IGNORED + ":":
                unknown[letter], forms = None, [letter]
            letters += forms[:1]
        words += [[tuple(letters)]] if letters else []
    return words, list(unknown)
