"""Word lists, and the spellings that they re-rank."""

import contextlib
import io
import json
import math
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest

import hw2_q3
import utils
from data import lexicon
from data.lexicon import Lexicon, Reranker, Weights, fit_reranker, load_lexicon

ROWS = [[("remander", -0.5), ("remainder", -1.0), ("Remainder", -1.2), ("remaynder", -3.0)]]
LIST = Lexicon("x", "x.txt", {"remainder": math.log(0.75), "the": math.log(0.25)})


def write(tmp_path, content, name="words.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def rerank(row, *weights):
    """The spellings of a row, re-ranked with these weights and the LIST."""
    [result] = Reranker(LIST, Weights(*weights)).rerank([row])
    assert all(row[0][1] + 9 > score for *_, score in result)
    return [spelling for spelling, *_ in result]


@pytest.mark.parametrize(
    ("content", "frequencies"),
    [
        ("a\nb\nc\nd", dict.fromkeys("abcd", 0.25)),
        ("\ufeffthe\t30\r\nsea\t10\r\n\r\n", {"the": 0.75, "sea": 0.25}),
        ("Sol\t1\nsol\t2.5\nsol\t0.5\n", {"Sol": 0.25, "sol": 0.75}),
        ("cafe\u0301\nice cream\t\n", {"café": 0.5, "ice cream": 0.5}),
        ("10,000\t 5\ncatch 22\t5\n", {"10,000": 0.5, "catch 22": 0.5}),
        ("世界\r10\r", {"世界": 0.5, "10": 0.5}),
    ],
)
def test_a_file_of_words_with_and_without_counts(tmp_path, content, frequencies):
    loaded = load_lexicon(write(tmp_path, content))
    assert loaded.source == "words.txt"
    assert {w: math.exp(f) for w, f in loaded.log_frequencies.items()} == pytest.approx(frequencies)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no words"),
        ("\n\n", "has no words"),
        ("a\nb\tc\n", "line 2: expected a word"),
        ("a\t1\t2\n", "line 1: expected a word"),
        ("the 22761659\n", "line 1: expected a word"),
        ("the,100\n", "line 1: expected a word"),
        ("a\t1e308\nb\t1e308\n", "counts are too large"),
        ("a\t0\n", "line 1: expected a word"),
        ("a\t-1\n", "line 1: expected a word"),
        ("a\tnan\n", "line 1: expected a word"),
        ("\t5\n", "line 1: expected a word"),
        ("a" * 2000, "line 1: a line of more than 1,000 characters"),
        ("   7 cat\n", "line 1: expected a word"),
        ('"the","5.4e-02"', "line 1: expected a word"),
        ("CAT\nDOG 2\t3\n", "most words are in capitals"),
        (b"cat\ncaf\xe9\n", "line 2: not UTF-8"),
        ("cat".encode("utf-16"), "line 1: not UTF-8"),
        ("cat".encode("utf-16-le"), "line 1: not UTF-8"),
    ],
)
def test_a_file_that_is_no_list_is_refused(tmp_path, content, message):
    with pytest.raises(utils.UserError, match=message):
        load_lexicon(write(tmp_path, content))


def test_a_list_of_too_many_words_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lexicon, "MAX_WORDS", 3)
    assert len(load_lexicon(write(tmp_path, "a\nb\nc\n")).log_frequencies) == 3
    with pytest.raises(utils.UserError, match="more than 3 lines"):
        load_lexicon(write(tmp_path, "a\nb\nc\nd\n"))


def test_a_file_with_the_name_of_a_language(tmp_path, monkeypatch):
    pytest.importorskip("wordfreq")
    monkeypatch.chdir(tmp_path)
    Path("en").write_text("onlyword", encoding="utf-8")
    assert len(load_lexicon("en").log_frequencies) > 1
    assert list(load_lexicon("./en").log_frequencies) == ["onlyword"]


def test_lists_of_wordfreq(monkeypatch):
    pytest.importorskip("wordfreq")
    english = load_lexicon("en")
    assert english.log_frequency("the") > english.log_frequency("remainder") > math.log(1e-7)
    assert english.log_frequency("The") == english.log_frequency("the")
    assert english.log_frequency("remander") is english.log_frequency("remainDer") is None
    assert sum(map(math.exp, english.log_frequencies.values())) == pytest.approx(1)
    with pytest.raises(utils.UserError, match="'xx' is no file and no language of wordfreq: ar "):
        load_lexicon("xx")
    monkeypatch.setitem(sys.modules, "wordfreq", None)
    with pytest.raises(utils.UserError, match="pip install wordfreq"):
        load_lexicon("en")


def test_reranking_by_hand():
    words = [spelling for spelling, _ in ROWS[0]]
    for unlisted, first in ((0, 0), (0.4, 0), (0.6, 1)):  # -0.5, -0.9, -1.1 against -1
        assert rerank(ROWS[0], 0, unlisted, 0, math.inf)[0] == words[first]
    for unlisted, first in ((0.6, 0), (1, 1)):  # against -1 + ln 0.75 = -1.29
        assert rerank(ROWS[0], 1, unlisted, 0, math.inf)[0] == words[first]
    # A capital counts as listed, less its penalty; ties keep their order.
    assert rerank(ROWS[0], 0, 1, 0, math.inf) == [words[i] for i in (1, 2, 0, 3)]
    assert rerank(ROWS[0], 0, 1, 0.5, math.inf) == [words[i] for i in (1, 0, 2, 3)]
    # Beyond the margin nothing wins.
    assert rerank(ROWS[0], 0, 9, 0, 0.4) == words
    assert Reranker(LIST).rerank([]) == []


def test_capitals_of_a_list():
    names = Lexicon("x", "x", {"Sol": -1.0, "sol": -2.0, "DNA": -3.0})
    spellings = "Sol", "sol", "DNA", "dna", "Dna", ""
    assert [names.log_frequency(x) for x in spellings] == [-1, -2, -3, None, None, None]
    folded = Lexicon("x", "x", {"strasse": -1.0, "λόγοσ": -2.0, "istanbul": -3.0})
    words = "Straße", "strasse", "Λόγος", "İstanbul"
    assert [folded.log_frequency(x) for x in words] == [-1, -1, -2, -3]
    row = [("straße", -0.1), ("strasse", -0.2)]
    assert Reranker(folded, Weights(capital=9)).rerank([row])[0][0][0] == "straße"


def test_weights_are_chosen_by_validation_words_and_prefer_frequent_words():
    listed = Lexicon("x", "x", {"sea": math.log(0.5), "see": math.log(0.5)})
    rows = [[("sie", -0.5), ("sea", -1.75)]] * 10
    reranker = fit_reranker(rows, ["sea"] * 10, listed)
    assert reranker.rerank(rows)[0][0][0] == "sea"
    assert reranker.weights.frequency == max(weights.frequency for weights in lexicon.GRID)
    assert 1.25 < reranker.weights.unlisted - reranker.weights.frequency * math.log(2) < 2.25
    assert fit_reranker(rows, ["sie"] * 10, listed).rerank(rows)[0][0][0] == "sie"
    for weights in (reranker.weights, Weights(margin=math.inf)):
        record = json.loads(json.dumps(weights.to_json()))
        assert lexicon.Weights.from_json(record) == weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny model that was tested with a list of two of its three words: folder, list, output."""
    folder, output = tmp_path_factory.mktemp("trained"), io.StringIO()
    for name in ("train", "valid", "test"):
        (folder / f"{name}.tsv").write_text("k æ t\tcat\nd ɔ ɡ\tdog\nk ʌ p\tcup\n", "utf-8")
    words = write(folder, "cat\ncup\n", "my words.txt")
    with contextlib.redirect_stdout(output):
        hw2_q3.main([*argv(folder), "--lexicon", words])
    return folder, words, output.getvalue().splitlines()


def argv(folder):
    line = f"--n_epochs 40 --lr 0.01 --dropout 0 --hidden_size 16 --data_dir {folder}"
    return [*line.split(), "--output_dir", str(folder)]


def test_a_lexicon_at_test_is_scored_and_recorded(trained, capsys, fails):
    folder, words, lines = trained
    [path] = folder.glob("figures/runs/*.json")
    scores = utils.load_record(path)["final"]["lexicon"]
    assert (scores["name"], scores["source"], scores["size"]) == (words, "my words.txt", 30)
    assert scores["listed"] == [1, 0, 1]
    assert any(line.startswith("Beam search, size 30, re-ranked by my words.txt") for line in lines)
    assert "The list has 2 of the 3 test words" in lines
    assert f"Test WER@3: {scores['wer@3']:.4f}" == lines[lines.index(f"Record: {path}") - 1]
    hw2_q3.main(["test", *argv(folder)])  # keeps them
    assert utils.load_record(path)["final"]["lexicon"] == scores
    line = fails(hw2_q3.main, [*argv(folder), "--restart", "--lexicon", "none such"])
    assert "'none such' is no file" in line
    assert list(folder.glob("checkpoints/*.pt"))  # not even begun
    line = fails(hw2_q3.main, ["--direction", "g2p", "--lexicon", words])
    assert "--lexicon lists written words" in line


def spell(folder, capsys, *options):
    capsys.readouterr()
    hw2_q3.main(["spell", "kæt", "dɔɡ", "--output_dir", str(folder), *options])
    return capsys.readouterr()


def test_spell_uses_the_list_of_the_test_and_marks_what_is_not_listed(trained, capsys, tmp_path):
    folder, _, _ = trained
    output = spell(folder, capsys)
    assert "Words: my words.txt (2 words)" in output.err
    assert [line.split("\t")[1:] for line in output.out.splitlines()] == [
        ["cat", mock.ANY], ["dog", mock.ANY, "not listed: dog"],
    ]  # fmt: skip
    plain = spell(folder, capsys, "--lexicon", "none")
    assert "Words:" not in plain.err
    assert plain.out == output.out.replace("\tnot listed: dog", "")
    other = write(tmp_path, "dug\ndog\n")  # without recorded weights
    assert "dog" in spell(folder, capsys, "--lexicon", other, "--beam_size", "2").out
    assert "Words:" not in spell(folder, capsys, "--nucleus").err


@pytest.mark.parametrize("final", [
    [], {"lexicon": []}, {"lexicon": {"name": "x"}},
    {"lexicon": {"name": "x", "weights": {"a": 1}}},
    {"lexicon": {"name": "x", "weights": {"frequency": "much"}}},
    {"lexicon": {"name": "x", "weights": {"frequency": math.nan}}},
])  # fmt: skip
def test_a_record_whose_list_cannot_be_used_costs_no_answer(trained, tmp_path, capsys, final):
    copy = shutil.copytree(trained[0], tmp_path / "copy")
    [path] = copy.glob("figures/runs/*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"final": final}))
    output = spell(copy, capsys)
    assert "Words:" not in output.err
    assert output.out.startswith("k æ t\tcat\t")


def test_a_recorded_list_that_is_gone_is_named_and_one_that_is_asked_for_is_an_error(
    trained, capsys, tmp_path, fails
):
    folder, words, _ = trained
    copy = shutil.copytree(folder, tmp_path / "copy")
    Path(words).rename(folder / "moved.txt")
    try:
        assert "Spelling without a word list: " in spell(copy, capsys).err
        line = fails(hw2_q3.main, ["spell", "kæt", "--output_dir", copy, "--lexicon", words])
        assert "my words.txt" in line
    finally:
        (folder / "moved.txt").rename(words)
