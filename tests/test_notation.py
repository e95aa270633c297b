"""The notation that people type, and the lines of spell."""

import io
import itertools
import json
import os
import sys
import unicodedata

import hypothesis.strategies as st
import pytest
from hypothesis import given

import utils
from data import notation

CONSONANTS = "t ʃ t͡ʃ d ʒ d͡ʒ t͡s s z k kʼ n n̩ l h ɹ w θ ð b f ɡ β ʔ"
VOWELS = "æ a ã ɑː ɒ e ɛ ə ɚ ɜː ɝ ɪ iː o ɔː ʊ ʌ"
KNOWN = {*CONSONANTS.split(), *VOWELS.split()}


def read(text, known=KNOWN):
    """The words of a text, separated by #, of a word its readings, separated by |."""
    words = notation.make_reader(known, is_ipa=True)(text).words
    return " # ".join(" | ".join(map(" ".join, word)) for word in words)


CLEAN = "t͡ʃ ɜː t͡ʃ ɡ o ʊ"
NOTATIONS = {  # of these phonemes
    "clean": CLEAN, "joined": "t͡ʃɜːt͡ʃɡoʊ", "slashes": "/t͡ʃɜːt͡ʃɡoʊ/",
    "brackets": "[t͡ʃ ɜː t͡ʃ ɡ o ʊ]", "one slash": "/t͡ʃɜːt͡ʃɡoʊ",
    "backslashes": "\\ ˈt͡ʃɜː-t͡ʃ-ˌɡoʊ \\", "stress": "ˈt͡ʃ ɜː t͡ʃ ˌɡ o ʊ",
    "apostrophe": "'t͡ʃɜː't͡ʃɡoʊ", "comma": "'t͡ʃɜːt͡ʃ,ɡoʊ", "dots": "ˈt͡ʃɜː.t͡ʃ.ˌɡoʊ",
    "link": "t͡ʃɜːt͡ʃ‿ɡoʊ", "hyphens": "-t͡ʃɜː-t͡ʃɡoʊ-", "no ties": "tʃ ɜː tʃ ɡ o ʊ",
    "no ties, joined": "tʃɜːtʃɡoʊ", "ties below": "t͜ʃɜːt͜ʃɡoʊ",
    "affricates apart": "t ʃ ɜː t ʃ ɡ o ʊ", "ligatures": "ʧɜːʧɡoʊ", "carons": "čɜːčɡoʊ",
    "colon": "t͡ʃ ɜ: t͡ʃ ɡ o ʊ", "ASCII g": "t͡ʃɜːt͡ʃgoʊ", "diphthong": "t͡ʃ ɜː t͡ʃ ɡ oʊ",
    "tied diphthong": "t͡ʃɜːt͡ʃɡo͡ʊ", "Cyrillic": "tʃз:tʃɡoʊ",
    "among words": "Brit. /tʃɜːtʃɡoʊ/, noun", "invisible signs": "t͡ʃɜː\u200bt͡ʃ\u00adɡoʊ\ufeff",
    "question": "t͡ʃɜːt͡ʃɡoʊ?", "NFD": "t͡ʃɜːt͡ʃɡoʊ.",
}  # fmt: skip


@pytest.mark.parametrize("text", NOTATIONS.values(), ids=NOTATIONS)
def test_notations_of_one_word(text):
    for form in ("NFC", "NFD"):
        assert read(unicodedata.normalize(form, text)) == CLEAN


READINGS = {
    "kæts": "k æ t s", "nʌ": "n ʌ", "ǝɡɛn": "ə ɡ ɛ n", "әɡεn": "ə ɡ ɛ n", "rɛd": "ɹ ɛ d", "ꞵ": "β",
    "lɜ˞n": "l ɝ n", "ə˞": "ɚ", "ˈba?n": "b a ʔ n", "n̍": "n̩", "ã": "ã", "a\u0303": "ã",
    # An apostrophe marks an ejective where the model has it, but stress before a consonant.
    "k'a": "kʼ a", "ak’": "a kʼ", "ək'sɛs": "ə k s ɛ s", "t'a": "t a",
    # Spaces between sounds, and between words.
    "h ə l oʊ": "h ə l o ʊ", "tʃ iː z": "t͡ʃ iː z", "oʊ": "o ʊ", "a ɪ": "a ɪ",
    "n ɔː ɹ θ": "n ɔː ɹ θ", "n ɔːɹ θ": "n ɔː ɹ θ", "b æ tn̩": "b æ t n̩",
    "nɔːθ kəˈriːnə": "n ɔː θ # k ə ɹ iː n ə", "ə kæt": "ə # k æ t", "aɪ siː": "a ɪ # s iː",
    "bæt n̩ kæt": "b æ t # n̩ # k æ t", "ˈkæt ˈʃiːz": "k æ t # ʃ iː z",
    "n ɔː θ  k æ t": "n ɔː θ # k æ t", "n ɔː θ # kæt": "n ɔː θ # k æ t",
    "n ɔː | kæt‖": "n ɔː # k æ t", "kæt#kæt": "k æ t # k æ t", "n ɔː\tk æ t": "n ɔː # k æ t",
    "/n ɔː/ or /n ɒ/": "n ɔː # n ɒ", "kæt — ɒn": "k æ t # ɒ n", "i: ə": "iː ə",
    # Optional sounds.
    "kɑː(ɹ)": "k ɑː ɹ | k ɑː", "k ɑː (r)": "k ɑː ɹ | k ɑː", "/kɑːʳ/": "k ɑː ɹ | k ɑː",
    "(h)(w)ɪ": "h w ɪ | h ɪ | w ɪ | ɪ", "wɪ(tʃ) kæ(t)": "w ɪ t͡ʃ | w ɪ # k æ t | k æ",
    "ˈsæd(ə)n": "s æ d ə n | s æ d n", "(ɹ)": "ɹ", "kɑː(ɹ": "k ɑː ɹ", "kɑː[ɹ]": "k ɑː ɹ",
    # ARPAbet.
    "HH AH0 L OW1": "h ə l o ʊ", "hh ah0 l ow1": "h ə l o ʊ", "K AE T": "k æ t",
    "k ae t": "k a e t", "CH ER1 CH": "t͡ʃ ɝ t͡ʃ", "[HH AH0 L OW1]": "h ə l o ʊ",
    "['HH', 'AH0', 'L', 'OW1']": "h ə l o ʊ", "HELLO  HH AH0 L OW1": "h ə l o ʊ",
    "hello(2) HH AH0 L OW1": "h ə l o ʊ", "HH AH0 L OW1  W ER1 L D": "h ə l o ʊ # w ɝ l d",
    "HH AH0 # W ER1": "h ə # w ɝ", "": "", "/ /": "", "ˈ.": "", "()": "",
}  # fmt: skip


@pytest.mark.parametrize(("text", "words"), READINGS.items(), ids=READINGS)
def test_readings(text, words):
    assert read(text) == words


def test_at_most_sixteen_readings_of_a_word():
    readings = read("(a)(e)(ə)(ɪ)(o)").split(" | ")
    assert len(set(readings)) == len(readings) == 16
    assert all(reading.endswith("o") for reading in readings)


SIGNS = "g r : ' # | ʧ t͜ʃ ə˞ ǝ a͜ɪ - ."


def test_signs_that_the_model_knows_are_neither_replaced_nor_dropped():
    known = KNOWN | {*SIGNS.split()}
    assert read(SIGNS, known) == SIGNS
    assert read("gǝr:", known) == "g ǝ r :"
    assert read("kʧa͜ɪ", known) == "k ʧ a͜ɪ"
    assert read("ɡə t͡ʃ", {"g", "ǝ", "tʃ"}) == "g ǝ tʃ"  # whichever the model knows
    assert read("K D", {"K", "D"}) == "K D"  # no ARPAbet
    assert read("t'kaʳ", KNOWN | {"'", "ʳ"}) == "t ' k a ʳ"
    assert read("š", {"ʃ"}) == "ʃ"


def test_tied_vowels_that_the_model_does_not_know_are_two_sounds():
    assert read("ka͜ɪ", KNOWN | {"a͜ɪ"}) == "k a͜ɪ"
    assert read("ka͡ɪ", KNOWN | {"a͜ɪ"}) == "k a ɪ"


NOTED = {
    "kʘt": ("k ʘ t", 'no phoneme for "ʘ"'),
    "ˈtʰɛsʰʘ": ("t ɛ s ʘ", 'no phoneme for "tʰ", "sʰ", "ʘ"'),
    "bɒ̃": ("b ɒ", 'no phoneme for "ɒ̃"'),
    "(ʘ)a": ("ʘ a | a", 'no phoneme for "ʘ"'),
    "HH XX1": ("", "no phonemes"),
    "//": ("", "no phonemes"),
    "a" * 1001: ("", "longer than 1,000 characters"),
    "k\udcffa": ("", "not UTF-8"),
}


@pytest.mark.parametrize(("text", "expected"), NOTED.items(), ids=range(len(NOTED)))
def test_what_cannot_be_read_is_named(text, expected):
    words, note = expected
    assert read(text) == words
    assert notation.make_reader(KNOWN, is_ipa=True)(text).note == note


WRITTEN = {  # words of letters, separated by spaces, and the note
    "Hello, world!": ("hello world", ""), "don’t stop.": ("don't stop", ""), "-ing": ("ing", ""),
    "(Well)-known: “yes”?": ("wellknown yes", ""), "Café": ("cafe", ""),
    "x3": ("x3", 'no letter for "3"'), " ": ("", ""), "...": ("", "no letters"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), WRITTEN.items(), ids=WRITTEN)
def test_written_words(text, expected):
    text = notation.make_reader("abcdefghijklmnopqrstuvwxyz'", is_ipa=False)(text)
    assert (" ".join("".join(*word) for word in text.words), text.note) == expected


def test_letters_that_the_model_knows_are_kept():
    text = notation.make_reader({"A", "a", "é", "-", "."}, is_ipa=False)("Aa-é. A")
    assert text.words == [[("A", "a", "-", "é", ".")], [("A",)]]


@given(st.text(max_size=30) | st.text("ntʃaeɹ()/[]' ːʰ#|012H\u0303\u0361\t", max_size=30))
def test_any_text_is_read_and_what_is_unknown_is_named(text):
    for is_ipa in (True, False):
        line, words, note = notation.make_reader(KNOWN, is_ipa)(text)
        assert line == text.strip()
        assert words or note or not line
        symbols = {symbol for word in words for reading in word for symbol in reading}
        assert all(f'"{symbol}"' in note for symbol in symbols - KNOWN)
        assert all(word and all(word) and len(set(word)) == len(word) <= 16 for word in words)


# ----------------------------------------------------------------------------------------------
# lines

LINES = {
    "LF": (b"a\nb\n", ["a", "b"]),
    "CRLF, byte order mark, no last LF": (b"\xef\xbb\xbfa\r\n\r\nb", ["a\r", "\r", "b"]),
    "not UTF-8": (b"\xc9\x99\n\xff\n", ["ə", "\udcff"]),
    "nothing": (b"", []),
}  # fmt: skip


@pytest.mark.parametrize(("content", "lines"), LINES.values(), ids=LINES)
def test_lines_of_a_file_and_of_standard_input(content, lines, tmp_path, monkeypatch):
    (tmp_path / "ipa.txt").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    for path in (tmp_path / "ipa.txt", "-"):
        assert list(itertools.chain.from_iterable(notation.read_lines(path))) == lines


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "x.txt").write_text("a", encoding="utf-16")
    cases = {"x.txt": "UTF-16; save it as UTF-8", "none.txt": "No such file", ".": "directory"}
    for name, message in cases.items():
        with pytest.raises(utils.UserError, match=f"cannot be read .*{message}"):
            list(notation.read_lines(tmp_path / name))


def test_lines_arrive_as_they_are_written(monkeypatch):
    """One by one if they come slowly, together if they wait; a very long one is shortened."""
    source, sink = os.pipe()
    monkeypatch.setattr(sys, "stdin", os.fdopen(source, encoding="utf-8"))
    batches = notation.read_lines("-")
    for text, lines in {"a\n": ["a"], "b\nc\nd": ["b", "c"], "\n": ["d"], "e": []}.items():
        os.write(sink, text.encode())
        assert next(batches) == lines
    for _ in range(40):
        os.write(sink, b"e" * 2**14)
        next(batches)
    os.write(sink, b"\nf")
    os.close(sink)
    long, *rest = itertools.chain.from_iterable(batches)
    assert 10_000 < len(long) <= 2**17
    assert rest == ["f"]


def test_printed_answers_are_escaped(capsys):
    """TABs, control characters and what turns the direction of text; JSON gives them back."""
    text = "a\t\x1b[2J\x9b\u202e\U000e0001\udcff"
    row = {"phonemes": text, "spelling": "a", "log_probability": -1.0, "note": "cut off"}
    answer = {
        "input": text,
        "phonemes": text,
        "candidates": [row],
        "note": f'no phoneme for "{text}"',
    }
    notation.print_answers([answer, answer | {"candidates": []}], is_json=False)
    first, second = capsys.readouterr().out.splitlines()
    escaped = r"a\t\x1b[2J\x9b\u202e\U000e0001\udcff"
    assert first.split("\t") == [escaped, "a", "-1.000", f'no phoneme for "{escaped}"; cut off']
    assert second.split("\t") == ["", "", "", f'no phoneme for "{escaped}"']
    notation.print_answers([answer], is_json=True)
    printed = capsys.readouterr().out
    assert printed.replace("\n", "").isprintable()
    assert json.loads(printed) == [answer]
