"""Question 3: model, decoding, symbols, scores, training, testing, spelling."""

import ast
import contextlib
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import hw2_q3
import utils
from hw2_q3 import END, PAD, START, UNK, spellings
from tests.conftest import assert_equal_runs, killed_at, needs_cuda
from tests.conftest import load_run as results

# Words of a small language in which every letter has one sound, written as its capital.
WORDS = "a ab abc bac cab dab add bad dad fad fed feed bead deaf face fade cafe acceded baba deed"
PAIRS = [(tuple(word.upper()), word) for word in WORDS.split()]
DATA = utils.Pronunciations({"train": PAIRS, "val": PAIRS[3:9], "test": PAIRS[8:18]})
TRUE = [word for _, word in DATA.splits["test"]]
SMALL = "--hidden_size 16 --n_epochs 3 --batch_size 4 --device cpu"
MODEL = "--use_attn --layers 2 --schedule one_cycle --clip 0.2"  # of the fixture `finished`
FULL = f"{MODEL} --nucleus --beam_size 4"
BEST = f"{MODEL} --input_feeding --embedding_scale 0.1 --label_smoothing 0.1"
SHAPES = {
    "no attention": "",
    "attention": "--use_attn",
    "two layers": "--use_attn --layers 2",
    "input feeding": "--use_attn --layers 2 --input_feeding",
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def parse(line):
    return hw2_q3.parse_args(line.split())


def make_speller(line="--use_attn", seed=0, pairs=PAIRS):
    """A Speller with random weights, without dropout."""
    torch.manual_seed(seed)
    args = parse(f"--hidden_size 16 --dropout 0 {line}")
    vocabularies = hw2_q3.make_vocabularies(args, utils.Pronunciations({"train": pairs}))
    return hw2_q3.Speller(hw2_q3.build_model(args, *vocabularies).eval(), *vocabularies)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def first_of(candidates):
    return [row[0] for row in spellings(candidates)]


# ----------------------------------------------------------------------------------------------
# textbook code: one word, one position at a time


def textbook_encoder(encoder, source):
    """The outputs (S, H), and hidden and cell (layers, H), both directions joined."""
    outputs, state = encoder.lstm(encoder.embedding.weight[source])
    return outputs, tuple(part.reshape(-1, outputs.shape[1]) for part in state)


def textbook_attention(attention, state, values):
    """The attentional vector (H,) of a decoder's state."""
    query = attention.query.weight @ state + attention.query.bias
    keys = [attention.key.weight @ value for value in values]
    scores = [attention.score.weight[0] @ torch.tanh(key + query) for key in keys]
    weights = torch.stack(scores).softmax(0)
    context = sum(weight * value for weight, value in zip(weights, values))
    joined = torch.cat((context, state))
    return torch.tanh(attention.combine.weight @ joined + attention.combine.bias)


def textbook_logits(model, source, characters):
    """The logits (T, V) after each of the characters."""
    values, state = textbook_encoder(model.encoder, source)
    decoder, input_feed, logits = model.decoder, torch.zeros_like(values[0]), []
    layers = list(zip(*state))
    for character in characters:
        x = decoder.embedding.weight[character]
        if decoder.input_feeding:
            x = torch.cat((x, input_feed))
            for i, cell in enumerate(decoder.cells):
                layers[i] = cell(x, layers[i])
                x = layers[i][0]
        else:
            [x], state = decoder.lstm(x.unsqueeze(0), state)
        if decoder.attention is not None:
            x = input_feed = textbook_attention(decoder.attention, x, values)
        logits.append(decoder.embedding.weight @ x + decoder.output.bias)
    return torch.stack(logits)


def unpad(pairs):
    """The sources and the targets of encoded pairs, without padding."""
    sources = [row[:length] for row, length in zip(pairs.sources, pairs.lengths)]
    return sources, [row[:length] for row, length in zip(pairs.targets, pairs.target_lengths)]


@torch.no_grad()
def next_log_probs(model, source, prefix):
    """The log-probabilities (V,) of the next character, the whole prefix computed again."""
    if isinstance(model, hw2_q3.Ensemble):
        probs = [next_log_probs(part, source, prefix).exp() for part in model.models]
        return (sum(probs) / len(probs)).log()
    logits = textbook_logits(model, source, [START, *prefix])[-1]
    logits[:END] = -torch.inf
    return logits.log_softmax(0)


def textbook_beam(model, source, size, max_len):
    """The beam [(prefix, score)], best first. A beam of size 1 is greedy search."""
    beam = [([], 0.0)]
    for _ in range(max_len):
        candidates = [(prefix, score) for prefix, score in beam if END in prefix]
        for prefix, score in beam:
            if END not in prefix:
                log_probs = enumerate(next_log_probs(model, source, prefix).tolist())
                candidates += [([*prefix, t], score + x) for t, x in log_probs if t >= END]
        beam = sorted(candidates, key=lambda candidate: -candidate[1])[:size]
    return beam


def textbook_sample(model, sources, p, k, generator, max_len):
    """k prefixes of each word: step by step a uniform number for each unfinished one."""
    rows = [(source, []) for source in sources for _ in range(k)]
    for _ in range(max_len):
        unfinished = [row for row in rows if END not in row[1]]
        points = torch.rand(len(unfinished), generator=generator).tolist() if unfinished else []
        for (source, prefix), point in zip(unfinished, points):
            probs = hw2_q3.nucleus(next_log_probs(model, source, prefix).unsqueeze(0), p)[0]
            sums = probs.cumsum(0).tolist()
            prefix.append(next(t for t, total in enumerate(sums) if total > point * sums[-1]))
    return [prefix for _, prefix in rows]


# ----------------------------------------------------------------------------------------------
# model


def test_the_embedding_scale_multiplies_the_embeddings_alone():
    usual, small = (make_speller(f"--embedding_scale {s}").model.state_dict() for s in (1, 0.1))
    for name, weights in usual.items():
        is_scaled = "embedding" in name or name == "decoder.output.weight"
        assert_close(small[name], weights * (0.1 if is_scaled else 1))


# ----------------------------------------------------------------------------------------------
# decoding

NUCLEI = {
    "the token that crosses p is kept": ([0.5, 0.3, 0.15, 0.05], 0.7, [0.5, 0.3, 0, 0]),
    "reached exactly, no more": ([0.5, 0.25, 0.125, 0.125], 0.75, [0.5, 0.25, 0, 0]),
    "one token above p": ([0.05, 0.9, 0.05], 0.8, [0, 0.9, 0]),
    "p tiny": ([0.2, 0.3, 0.5], 1e-50, [0, 0, 0.5]),
    "p = 1 keeps all": ([0.7, 0.3 - 1e-6, 1e-6], 1.0, [0.7, 0.3 - 1e-6, 1e-6]),
    "ties: the first": ([0.25, 0.25, 0.25, 0.25], 0.4, [0.25, 0.25, 0, 0]),
    "a forbidden token": ([0.0, 0.6, 0.4], 1.0, [0, 0.6, 0.4]),
}


@pytest.mark.parametrize(("probs", "p", "kept"), NUCLEI.values(), ids=NUCLEI)
def test_nucleus_by_hand(probs, p, kept):
    """Also beside a row in another order."""
    rows = torch.tensor([probs, sorted(probs, reverse=True)]).log()
    expected = torch.tensor([kept, sorted(kept, reverse=True)]) / sum(kept)
    assert_close(hw2_q3.nucleus(rows, p), expected)


@pytest.mark.parametrize("kind", [*SHAPES, "ensemble"])
def test_decoding_equals_one_word_at_a_time(kind, monkeypatch):
    """In one batch and in small ones, of a model that prefers the special symbols, which are never
    written. A beam that is wider than the number of spellings lists all of them."""
    speller = make_speller(SHAPES.get(kind, ""), 3)
    with torch.no_grad():
        speller.model.decoder.output.bias[:END] = 9.0
    if kind == "ensemble":  # of models of different shapes
        members = [speller.model, *(make_speller(line).model for line in SHAPES.values())]
        speller = speller._replace(model=hw2_q3.Ensemble(members).eval())
    model, pairs, decode = speller.model, speller.encode(PAIRS[:9]), speller.target.decode
    sources, _ = unpad(pairs)
    greedy = [textbook_beam(model, source, 1, 5) for source in sources]
    beams = [textbook_beam(model, source, 3, 5) for source in sources]
    wide = [textbook_beam(model, source, 50, 2) for source in sources]
    order = pairs.lengths.argsort(stable=True).tolist()  # words of like length share a batch
    for size in (1024, 6):
        monkeypatch.setattr(hw2_q3, "DECODE_BATCH_SIZE", size)
        rows = speller.greedy(pairs, 5) + speller.beam(pairs, 3, 5) + speller.beam(pairs, 50, 2)
        for row, prefixes in zip(rows, greedy + beams + wide, strict=True):
            expected = [(decode(p), pytest.approx(score, abs=1e-4)) for p, score in prefixes]
            assert row == expected
        drawn, generator = spellings(speller.sample(pairs, 0.8, 2, seeded(1), 5)), seeded(1)
        for batch in (order[i : i + size // 2] for i in range(0, len(order), size // 2)):
            words = [sources[i] for i in batch]
            expected = map(decode, textbook_sample(model, words, 0.8, 2, generator, 5))
            assert [spelling for i in batch for spelling in drawn[i]] == list(expected)


def test_finished_rows_are_dropped():
    """In greedy decoding, beam search, and training with input feeding."""
    speller, rows = make_speller(SHAPES["input feeding"]), []
    model, pairs = speller.model, speller.encode(PAIRS[:9])
    model.decoder.attention.register_forward_hook(lambda _, inputs, y: rows.append(len(inputs[0])))
    model.decoder.output.bias.data[END] = 0  # ends some spellings early
    ways = {1: speller.greedy, 3: lambda pairs, max_len: speller.beam(pairs, 3, max_len)}
    for size, decode in ways.items():
        rows.clear()
        decode(pairs, 5)
        for step, count in enumerate(rows):
            beams = (textbook_beam(model, source, size, step) for source in unpad(pairs)[0])
            assert count == sum(END not in prefix for beam in beams for prefix, _ in beam)
        assert rows[-1] < max(rows)
    rows.clear()
    model(pairs.sources, pairs.lengths, pairs.targets)
    longest = pairs.target_lengths.max()
    assert rows == [sum(pairs.target_lengths - 1 > step) for step in range(longest - 1)]


# ----------------------------------------------------------------------------------------------
# symbols and scores


def test_symbols_are_encoded_padded_and_decoded():
    speller = make_speller()
    pairs = speller.encode([(("A", "B", "X"), "ab"), (("A",), "aby")])
    assert pairs.sources.tolist() == [[4, 5, UNK], [4, PAD, PAD]]
    assert pairs.targets.tolist() == [[START, 4, 5, END, PAD], [START, 4, 5, UNK, END]]
    assert (pairs.lengths.tolist(), pairs.target_lengths.tolist()) == ([3, 1], [4, 5])
    assert pairs.spellings == ["ab", "aby"]
    for sounds, word in PAIRS:
        assert speller.target.decode([*speller.target.encode(word), END, 5, 6]) == word
        assert speller.source.decode(speller.source.encode(sounds)) == " ".join(sounds)
    assert speller.target.decode([END]) == ""
    assert hw2_q3.Vocabulary.of(["<", "<pad>"]).encode(["<pad>"]) == [UNK]  # text, not padding


def test_audit_counts_words_of_two_splits_and_unseen_symbols():
    a, ba = (("A",), "a"), (("B", "A"), "ba")
    data = utils.Pronunciations({"train": [a], "val": [a, ba], "test": [ba]})
    assert list(hw2_q3.audit(data)) == [
        "Words: 1 training, 2 validation, 1 test",
        "Spellings seen in training: 1 of validation, 0 of test",
        "Symbols not seen in training, read as unknown: 1 phonemes (B), 1 characters (b)",
    ]


def test_the_split_of_the_assignment(real_data):
    data = utils.load_pronunciations(real_data / "pronunciations")
    assert [len(data.splits[split]) for split in utils.SPLITS] == [10000, 1000, 1000]
    assert "42 of validation, 45 of test" in " ".join(hw2_q3.audit(data))
    assert data.splits["test"][0] == (("ɹ", "ə", "m", "e", "ɪ", "n", "d", "ɚ"), "remainder")


ERRORS = {
    "match": (["abc"], ["abc"], 0, 0),
    "deletion": (["ac"], ["abc"], 1 / 3, 1),
    "substitutions, insertion": (["sitting"], ["kitten"], 3 / 6, 1),
    "nothing written": ([""], ["abc"], 1, 1),
    "much too long": (["aaaaaaaaab"], ["b"], 9, 1),
    "letter case counts": (["paris"], ["Paris"], 1 / 5, 1),
    "accents count": (["crudites"], ["crudités"], 1 / 8, 1),
    "summed, not averaged by word": (["x", "abcdefgh"], ["a", "abcdefghi"], 2 / 10, 1),
    "half the words": (["ab", "cd"], ["ab", "ce"], 1 / 4, 1 / 2),
}


@pytest.mark.parametrize(("predicted", "true", "cer", "wer"), ERRORS.values(), ids=ERRORS)
def test_error_rates_by_hand(predicted, true, cer, wer):
    assert hw2_q3.cer(predicted, true) == pytest.approx(cer)
    assert hw2_q3.wer(predicted, true) == pytest.approx(wer)


def test_scores_of_phonemes_and_candidates_by_hand():
    true, predicted = ["t͡ʃ iː z", "k æ t"], ["t͡ʃ i z", ""]
    assert hw2_q3.cer(predicted, true, str.split) == 4 / 6
    assert hw2_q3.distances(predicted, true, str.split) == [1, 3]
    candidates, true = [["a", "b", "c"], ["x", "y", "b"], ["q"]], ["b", "b", "b"]
    assert [hw2_q3.wer_at_k(candidates, true, k) for k in (1, 2, 3, 9)] == [1, 2 / 3, 1 / 3, 1 / 3]
    candidates = [["abc", "abd"], ["bed", "bad"], ["kafe", "kaf"], ["ba"]]
    scores = hw2_q3.score_candidates(candidates, ["abc", "bad", "cafe", "b"], 2)
    words = {"distances": [0, 1, 1, 1], "ranks": [1, 2, 0, 0]}
    assert scores == {"cer": 3 / 11, "wer": 0.75, "wer@2": 0.5} | words


# ----------------------------------------------------------------------------------------------
# training


def main(line, *argv):
    """Run the script. Returns what it prints to standard output and to standard error."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        hw2_q3.main([*line.split(), *map(str, argv)])
    return output.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The folder of the small language's .tsv files."""
    folder = tmp_path_factory.mktemp("words")
    for name, split in (("train", "train"), ("valid", "val"), ("test", "test")):
        lines = "".join(f"{' '.join(sounds)}\t{word}\n" for sounds, word in DATA.splits[split])
        (folder / f"{name}.tsv").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture
def out(tmp_path):
    """The folder in which `run` writes."""
    return tmp_path / "out"


@pytest.fixture
def run(words, out):
    """run(line): the output of a command on the words; to train is to train a small model."""
    folders = "--data_dir", words, "--output_dir", out
    return lambda line="", *argv: main(SMALL, *folders, *line.split(), *argv)[0]


@pytest.fixture(scope="module")
def finished(words, tmp_path_factory):
    """A folder with a finished run, scored in all ways, and the lines that it printed."""
    folder = tmp_path_factory.mktemp("finished")
    output, _ = main(f"{SMALL} {FULL}", "--data_dir", words, "--output_dir", folder)
    return folder, output.splitlines()


@pytest.fixture
def copied(finished, out):
    """The record and the checkpoint of the finished run, whose files are copied to `out`."""
    return results(shutil.copytree(finished[0], out))


def textbook_epoch(model, optimizer, words, epoch, args):
    """Train word by word. Returns the mean loss per character; label smoothing spreads over the
    characters that can be written, of which END is one."""
    utils.seed_everything(args.seed, epoch)
    batches, epoch_losses = torch.randperm(len(words)).split(args.batch_size), []
    for i, batch in enumerate(batches):
        losses = []
        for source, target in (words[j] for j in batch):
            for row, true in zip(textbook_logits(model, source, target[:-1]), target[1:]):
                log_probs = row.log_softmax(0)
                if args.label_smoothing:
                    log_probs = torch.cat((row[:END], row[END:].log_softmax(0)))
                smooth = log_probs[END:].mean()
                losses.append(-log_probs[true].lerp(smooth, args.label_smoothing))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        gradients = [weights.grad for weights in model.parameters()]
        norm = sum((gradient**2).sum() for gradient in gradients).sqrt()
        if args.clip and norm > args.clip:
            for gradient in gradients:
                gradient *= args.clip / norm
        step, steps = (epoch - 1) * len(batches) + i, args.n_epochs * len(batches)
        for group in optimizer.param_groups:
            group["lr"] = utils.learning_rate(args.schedule, args.lr, step, steps)
        optimizer.step()
        epoch_losses += [loss.item() for loss in losses]
    return sum(epoch_losses) / len(epoch_losses)


@pytest.mark.parametrize("line", ["", "--use_attn --batch_size 7", MODEL, BEST])
def test_training_equals_a_textbook_loop(run, out, line):
    """Weights and losses after 3 epochs, dropout aside, in double precision."""
    args = parse(f"{SMALL} {line} --dropout 0 --lr 0.02")
    torch.set_default_dtype(torch.float64)
    try:
        run(f"{line} --dropout 0 --lr 0.02")
        utils.seed_everything(args.seed)
        vocabularies = hw2_q3.make_vocabularies(args, DATA)
        model = hw2_q3.build_model(args, *vocabularies)
        words = list(zip(*unpad(hw2_q3.encode_pairs(PAIRS, *vocabularies))))
        optimizer = torch.optim.Adam(model.parameters())
        losses = [textbook_epoch(model, optimizer, words, epoch, args) for epoch in (1, 2, 3)]
    finally:
        torch.set_default_dtype(torch.float32)
    record, saved = results(out)
    assert record["history"]["train_loss"] == pytest.approx(losses, rel=1e-5)
    for name, weights in model.state_dict().items():
        assert_close(saved["model"][name], weights, rtol=1e-4, atol=1e-6, msg=name)


def test_a_run_has_one_thread_unless_the_arguments_say(run, monkeypatch):
    counts = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    run("train --n_epochs 1")
    run("train --n_epochs 1 --threads 2")
    assert counts == [1, 2]


def test_the_best_epoch_is_tested(run, out, tmp_path, monkeypatch):
    """The scores make the second epoch the best; of equal ones the first is."""
    run("train --lr 0.05 --n_epochs 2", "--output_dir", tmp_path / "second")
    scores = iter([0.9, 0.3, 0.3])
    monkeypatch.setattr(hw2_q3, "cer", lambda *args: next(scores, 0.0))
    run("--lr 0.05")
    (_, second), (record, saved) = results(tmp_path / "second"), results(out)
    assert record["best_epoch"] == 2
    assert all(torch.equal(saved["best"][name], w) for name, w in second["model"].items())
    speller = make_speller("")
    pairs, distances = speller.encode(DATA.splits["test"]), []
    for weights in (second["model"], saved["model"]):
        speller.model.load_state_dict(weights)
        distances.append(hw2_q3.distances(first_of(speller.greedy(pairs)), TRUE))
    assert record["final"]["greedy"]["distances"] == distances[0] != distances[1]


@needs_cuda
@every_shape
def test_cuda_computes_what_the_cpu_computes(shape):
    speller, outcomes = make_speller(shape), []
    for device in ("cpu", "cuda"):
        speller.model.to(utils.prepare_device(device, 1))  # without TF32
        pairs = speller.encode(PAIRS)
        logits, _ = speller.model(pairs.sources, pairs.lengths, pairs.targets)
        ways = speller.greedy(pairs, 9), speller.beam(pairs, 3, 9)
        outcomes.append((logits.detach().cpu(), *map(spellings, ways)))
    assert_close(outcomes[1][0], outcomes[0][0], rtol=1e-3, atol=1e-4)
    assert outcomes[1][1:] == outcomes[0][1:]


# ----------------------------------------------------------------------------------------------
# testing


def test_the_output_of_a_run(finished):
    (record, _), lines = results(finished[0]), finished[1]
    nucleus, beam = record["final"]["nucleus"], record["final"]["beam"]
    epoch = r"Epoch  \d/3  Training loss: [\d.]+  Validation CER: [\d.]+  Validation WER: [\d.]+ "
    assert sum(re.match(epoch, line) is not None for line in lines) == 3
    scores = record["final"]["greedy"], nucleus, beam
    expected = [f"Test CER: {s['cer']:.4f}, Test WER: {s['wer']:.4f}" for s in scores]
    assert [line for line in lines if line.startswith("Test CER")] == expected
    assert "Nucleus sampling, p = 0.8, the first of 3 samples:" in lines
    at = lines.index("Printing first 10 examples with multiple predictions:") + 1
    examples = [f"({word!r}, {{{', '.join(map(repr, row))}}})" for word, row in nucleus["examples"]]
    assert lines[at : at + 11] == [*examples, f"Test WER@3: {nucleus['wer@3']:.4f}"]
    at = lines.index("Printing first 10 examples with their 3 best and log-probabilities:") + 1
    examples = [(word, dict(row)) for word, row in beam["examples"]]
    assert list(map(ast.literal_eval, lines[at : at + 10])) == examples
    assert lines[at + 10] == f"Test WER@3: {beam['wer@3']:.4f}"


def test_the_record_and_the_figures_of_a_run(finished, words):
    folder, (record, saved) = finished[0], results(finished[0])
    options = {"n_epochs": 3, "batch_size": 4, "hidden_size": 16, "use_attn": True, "layers": 2}
    options |= {"schedule": "one_cycle", "clip": 0.2}
    assert record["arguments"] == saved["arguments"] == options
    columns = {"train_loss", "val_cer", "val_wer"}
    assert {name for name, values in record["history"].items() if len(values) == 3} == columns
    assert len(record["final"]["attention"]) == 4
    for example in record["final"]["attention"]:
        weights = torch.tensor(example["weights"])
        assert weights.shape == (len(example["letters"]), len(example["phonemes"]))
        assert_close(weights.sum(1), torch.ones(len(weights)), atol=1e-3, rtol=0)
    assert not [path for path in (folder, words) if str(path) in json.dumps(record)]
    figures = {path.name: Image.open(path) for path in folder.glob("figures/q3-*/*")}
    assert figures.keys() == {"validation-cer.png", "attention.png"}
    assert all(image.width >= 600 for image in figures.values())


def test_nucleus_ranks_are_over_ten_samples_and_scores_over_the_first_k(finished):
    (path,) = finished[0].glob("checkpoints/*.pt")
    speller, args, _ = hw2_q3.load_speller(path, "cpu")
    pairs = speller.encode(DATA.splits["test"])
    samples = spellings(speller.sample(pairs, 0.8, 10, seeded(args.seed)))
    nucleus = results(finished[0])[0]["final"]["nucleus"]
    assert hw2_q3.score_candidates(samples, TRUE, 3).items() <= nucleus.items()
    distinct = [list(dict.fromkeys(row[:3])) for row in samples]
    assert nucleus["examples"] == [list(example) for example in zip(TRUE, distinct)]


def test_retraining_compares_its_numbers_with_the_record_at_its_end(run, out, copied):
    (checkpoint,), (record,) = out.glob("checkpoints/*.pt"), out.glob("figures/runs/*")
    checkpoint.unlink()  # as in a clone, which has records alone
    copied = copied[0] | {"analysis": "of the report"}, copied[1]
    utils.save_record(record, copied[0])
    assert "the same numbers" in run(MODEL)
    assert_equal_runs(results(out), copied, ("model", "best"))
    other = copied[0] | {"history": copied[0]["history"] | {"val_cer": [1, 2, 3]}}
    utils.save_record(record, other)
    with killed_at(utils, "save_checkpoint", 2):
        run(f"{MODEL} --restart")
    assert "record is not written" in run(f"test {MODEL}")  # of an unfinished model
    assert results(out)[0] == other
    assert "other numbers" in run(MODEL)
    assert results(out)[0]["history"] == copied[0]["history"]


def test_training_and_each_way_of_testing_apart_complete_the_same_record(finished, run, out):
    assert "Test" not in run(f"train {FULL}")
    assert "final" not in results(out)[0]
    outputs = [run(f"test {MODEL} {way}") for way in ("", "--nucleus", "--beam_size 4")]
    is_score = re.compile(r"Test |\(|Nucleus|Beam|Printing").match
    assert set(filter(is_score, finished[1])) <= set("".join(outputs).splitlines())
    assert_equal_runs(results(out), results(finished[0]), ("model", "best"))


def test_the_record_has_the_scores_that_were_asked_for(run, out):
    run("--max_len 2 --topp 1 --k 12")
    final = results(out)[0]["final"]
    assert list(final) == ["max_len", "greedy", "nucleus"]
    assert (final["max_len"], final["nucleus"]["p"], final["nucleus"]["k"]) == (2, 1, 12)
    assert "wer@12" in final["nucleus"]
    assert max(len(text) for _, row in final["nucleus"]["examples"] for text in row) == 2


def test_checkpoints_that_are_missing_or_of_other_runs(run, out, tmp_path):
    """Those of other runs are tested, without a record, and not trained further."""
    with pytest.raises(utils.UserError, match="no such checkpoint; train the model first"):
        run("test")
    assert not list(tmp_path.iterdir())
    run("train --use_attn --checkpoint_name mine.pt")
    path = ["--checkpoint_name", out / "checkpoints" / "mine.pt"]
    output = run("test", *path, "--output_dir", tmp_path / "other")
    assert "Test CER" in output
    assert "record is not written" in output
    assert not (tmp_path / "other").exists()
    with pytest.raises(utils.UserError, match=r"mine\.pt: was trained with the other --direction"):
        run("test --direction g2p", *path)
    with pytest.raises(utils.UserError, match=r"mine\.pt: belongs to another run"):
        run("", *path)


def test_the_sample_is_used_without_data_and_marked(out, monkeypatch):
    monkeypatch.setattr(hw2_q3, "DATA_DIR", out)
    sample = utils.Pronunciations(DATA.splits, "sample")
    monkeypatch.setattr("data.sample.choose_pronunciations", lambda: sample)
    output, _ = main(f"{SMALL} --n_epochs 1 --nucleus --output_dir", out)
    assert "built-in SAMPLE" in output
    assert output.count("(built-in sample)\n") == 3
    assert list(out.glob("figures/runs/*-sample-*.json"))


def test_an_ensemble_trains_its_members_and_spells_as_one(run, out, tmp_path):
    run("--use_attn --seed 1")
    line = "--use_attn --ensemble --seed 1 2"
    with pytest.raises(utils.UserError, match=r"-seed2-.*: missing or unfinished"):
        run(f"test {line}")
    output = run(line)
    first, second = sorted(out.glob("checkpoints/*.pt"))
    assert re.search(rf"{first.stem}: Test CER.* \(finished", output)
    assert f"\n{second.stem}: Test CER" in output
    run("--use_attn --seed 2", "--output_dir", tmp_path / "alone")
    record = utils.load_record(out / "figures" / "runs" / f"{second.stem}.json")
    beside = record, utils.load_checkpoint(second)
    assert_equal_runs(results(tmp_path / "alone"), beside, ("model", "best"))
    run(f"test --beam_size 2 {line}")
    (record,) = map(utils.load_record, out.glob("figures/runs/*ensemble*"))
    assert record["arguments"]["seed"] == [1, 2]
    spellers = [hw2_q3.load_speller(path, "cpu")[0] for path in (first, second)]
    ensemble = spellers[0]._replace(model=hw2_q3.Ensemble([s.model for s in spellers]))
    pairs = ensemble.encode(DATA.splits["test"])
    beam = ensemble.beam(pairs, 2)
    for way, rows in (("greedy", ensemble.greedy(pairs)), ("beam", beam)):
        assert record["final"][way]["distances"] == hw2_q3.distances(first_of(rows), TRUE)
    output = run(f"spell DAD --beam_size 2 {line}")
    assert output.splitlines() == [f"D A D\t{text}\t{score:.3f}" for text, score in beam[0]]


# ----------------------------------------------------------------------------------------------
# spelling


@pytest.fixture
def spell(finished):
    """spell(argv...) -> the fields of each line of the output, and what stderr says."""

    def spell(*argv):
        output, errors = main("spell --device cpu --output_dir", finished[0], *argv)
        return [line.split("\t") for line in output.splitlines()], errors

    return spell


def test_spelling_arguments_files_standard_input_and_at_a_prompt(spell, tmp_path, monkeypatch):
    rows, errors = spell("C A B", "D A D")
    assert [row[0] for row in rows] == ["C A B", "D A D"]
    assert "trained on your words, validation CER" in errors
    assert spell("CAB", "DAD")[0] == rows  # without spaces
    content = b"\xef\xbb\xbfC A B\r\n\r\nD A D"
    (tmp_path / "ipa.txt").write_bytes(content)
    assert spell("--input", tmp_path / "ipa.txt")[0] == [rows[0], [""], rows[1]]
    for argv in ([], ["--input", "-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert spell(*argv)[0] == [rows[0], [""], rows[1]]
    for end in ("", "\n"):
        stdin = io.StringIO(f"C A B\nD A D\n{end}")
        stdin.isatty = lambda: True
        monkeypatch.setattr(sys, "stdin", stdin)
        answers = [[row[0].rpartition("> ")[2], *row[1:]] for row in spell()[0]]
        assert answers[:2] == rows


def test_spelling_through_a_pipe(finished):
    """An answer to each line before the next is written, whatever the locale and the bytes."""
    command = sys.executable, "hw2_q3.py", "spell", "--output_dir", str(finished[0])
    how = {"cwd": utils.ROOT, "env": os.environ | {"PYTHONIOENCODING": "latin-1"}}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, **how) as process:
        guard = threading.Timer(300, process.kill)  # or a lost answer would stop the tests
        guard.start()
        answers = []
        for line in (b"\xef\xbb\xbfC A B\n", b"C \xc3\xa6 \xff\n", b"\n", b"C \xc3\xa6\r\n"):
            process.stdin.write(line)
            process.stdin.flush()
            answers.append(process.stdout.readline().decode())
        rest, errors = process.communicate(b"D A D\nF A D")
        guard.cancel()
    fields = [line.rstrip("\n").split("\t") for line in answers + rest.decode().splitlines()]
    assert [row[0] for row in fields] == ["C A B", "", "", "C æ", "D A D", "F A D"]
    assert fields[1] == ["", "", "", "not UTF-8"]
    assert fields[3][3] == 'no phoneme for "æ"'
    assert [len(row) for row in fields] == [3, 4, 1, 4, 3, 3]
    assert errors.decode().splitlines()[1:] == ["line 2: not UTF-8", 'line 4: no phoneme for "æ"']
    assert process.returncode == 0


def test_words_of_one_line_are_spelled_one_by_one(spell):
    """Their candidates are the best sums of log-probabilities."""
    first, second, both = ("C A B", "D A D", "C A B # D A D")
    ((read, spelling, _),) = spell(both)[0]
    words = [spell(word)[0][0][1] for word in (first, second)]
    assert (read, spelling) == (both, " ".join(words))
    assert spell("CAB  DAD")[0] == spell(both)[0]
    rows, _ = spell(both, "--beam_size", 4)
    pairs = itertools.product(*(spell(word, "--beam_size", 4)[0] for word in (first, second)))
    sums = {f"{a[1]} {b[1]}": float(a[2]) + float(b[2]) for a, b in pairs}
    assert len(rows) == 4
    assert [sums[row[1]] for row in rows] == sorted(sums.values(), reverse=True)[:4]
    assert all(float(row[2]) == pytest.approx(sums[row[1]], abs=0.002) for row in rows)


@pytest.mark.parametrize("omission", [0, 8])
def test_optional_sounds_are_tried_with_and_without(spell, monkeypatch, omission):
    """The best of both: as many as of one, and each spelling once; an omitted sound costs."""
    monkeypatch.setattr(hw2_q3, "OMISSION", omission)
    rows, _ = spell("C A (B)", "--beam_size", 6)
    both = spell("C A B", "C A", "--beam_size", 6)[0]

    def score(row):
        return float(row[2]) - omission * (row[0] == "C A")

    best = {row[1]: row for row in sorted(both, key=score)}
    assert rows == sorted(best.values(), key=score, reverse=True)[:6]
    assert ("C A" in {row[0] for row in rows}) == (omission < 8)


def test_what_was_cut_off_is_marked_and_comes_last(spell):
    for line, max_len in (("C A B", 2), ("C A B # D A D", 1)):
        rows, _ = spell(line, "--beam_size", 20, "--max_len", max_len)
        is_cut = [max(map(len, row[1].split(" "))) == max_len for row in rows]
        assert is_cut == sorted(is_cut)
        assert set(is_cut) == {False, True}
        for row, cut in zip(rows, is_cut):
            assert row[3:] == [f"cut off at {max_len} characters"] * cut
    assert spell("C æ B", "--max_len", 1)[0][0][3] == 'no phoneme for "æ"; cut off at 1 characters'


def test_answers_line_up_with_inputs(spell):
    """An input that cannot be spelled does not stop the others."""
    rows, errors = spell("CAB", "", "A " * 600, "//", "D\tA", "DAD")
    assert [row[0] for row in rows] == ["C A B", "", "", "", "D # A", "D A D"]
    assert [row[3:] for row in rows[2:4]] == [["longer than 1,000 characters"], ["no phonemes"]]
    assert "argument 3: longer than 1,000 characters\nargument 4: no phonemes\n" in errors


def test_answers_as_json(finished):
    argv = "C A (B)", "C x\t\x9b", "", "--beam_size", 2, "--json"
    output, _ = main("spell --device cpu --output_dir", finished[0], *argv)
    assert output.replace("\n", "").isprintable()
    first, unknown, blank = json.loads(output)
    assert first.keys() == {"input", "phonemes", "candidates"}
    assert first["input"] == "C A (B)"
    assert [row.keys() for row in first["candidates"]] == [
        {"phonemes", "spelling", "log_probability"}
    ] * 2
    assert first["phonemes"] == first["candidates"][0]["phonemes"]
    assert (unknown["input"], unknown["note"]) == ("C x\t\x9b", 'no phoneme for "x", "\x9b"')
    assert blank == {"input": "", "phonemes": "", "candidates": []}


def test_arguments_without_quotation_marks_and_with_a_dash(spell, fails):
    rows, errors = spell("C", "A", "B")
    assert [row[0] for row in rows] == ["C", "A", "B"]
    assert 'Read word by word; quote a word: spell "C A B"' in errors
    for argv in (["CAB"], ["C A", "B"]):
        assert "quote" not in spell(*argv)[1]
    assert spell("--", "-C A B-", "-DAD")[0] == spell("C A B", "D A D")[0]
    for word in ("-ɪŋ", "-hʊd", "-CA"):
        assert f'spell -- "{word}"' in fails(hw2_q3.main, ["spell", "CAB", word])


def test_candidates_have_log_probabilities_and_are_sorted(spell):
    beam, _ = spell("C A B", "--beam_size", 4)
    drawn, _ = spell("C A B", "--nucleus", "--k", 5)
    assert len({row[1] for row in beam}) == len(beam) == 4
    assert 1 <= len({row[1] for row in drawn}) == len(drawn) <= 5
    for rows in (beam, drawn):
        scores = [float(row[2]) for row in rows]
        assert scores == sorted(scores, reverse=True)
        assert max(scores) <= 0


def test_long_inputs_are_sampled_from_one_stream_of_random_numbers(spell, tmp_path):
    """Two batches of lines share no numbers, neither within a run nor between seeds."""
    (tmp_path / "ipa.txt").write_text("D A D\n" * 2000)
    argv = ["--topp", 1, "--k", 1, "--max_len", 4, "--input", tmp_path / "ipa.txt"]
    words = [row[1] for seed in (1, 2) for row in spell(*argv, "--seed", seed)[0]]
    assert len(words) == 4000
    batches = [words[i : i + 1000] for i in range(0, 4000, 1000)]
    for one, other in itertools.combinations(batches, 2):
        assert sum(a == b for a, b in zip(one, other)) < 500


def test_pronouncing_written_words(run, out, copied):
    """Beside a model that spells: each is asked in its direction."""
    output = run("--use_attn --direction g2p --nucleus")
    (path,) = out.glob("figures/runs/q3-g2p-*")
    greedy = utils.load_record(path)["final"]["greedy"]
    assert f"Test PER: {greedy['cer']:.4f}, Test WER: {greedy['wer']:.4f}\n" in output
    assert "CER" not in output
    speller, _, _ = hw2_q3.load_speller(out / "checkpoints" / f"{path.stem}.pt", "cpu")
    predicted = first_of(speller.greedy(speller.encode([(tuple(word), "") for word in TRUE])))
    true = [" ".join(sounds) for sounds, _ in DATA.splits["test"]]
    assert greedy["cer"] == hw2_q3.cer(predicted, true, str.split)
    answers, errors = main("spell dad dqd --device cpu --direction g2p --output_dir", out)
    assert answers.startswith(f"dad\t{predicted[0]}\t")
    assert f"{path.stem}.pt (trained on your words, validation PER" in errors
    assert 'argument 2: no letter for "q"' in errors
    both, _ = main(
        "spell --device cpu --direction g2p --json --output_dir", out, f"Dad, {TRUE[1]}!"
    )
    (answer,) = json.loads(both)
    assert answer["letters"] == f"dad {TRUE[1]}"
    assert [row["phonemes"] for row in answer["candidates"]] == [" # ".join(predicted[:2])]
    assert path.stem not in main("spell --device cpu --output_dir", out, "D A D")[1]


def test_the_best_speller_is_chosen(copied, out, words):
    """Of the default words before others, of real words before the sample's; with --data_dir, of
    these words alone."""
    (first,), (_, saved) = out.glob("checkpoints/*.pt"), copied
    first.unlink()

    def save(name, error, fingerprint):
        history = saved["history"] | {"val_cer": [error] * 3}
        content = saved | {"history": history, "data": {"name": name, "fingerprint": fingerprint}}
        torch.save(content, first.with_name(f"q3-{name}.pt"))

    def chosen(*argv):
        _, errors = main("spell --device cpu --output_dir", out, "D A D", *argv)
        return re.search(r"trained on (.*), validation CER (.*)\)", errors).groups()

    cases = [("portuguese", 0.1, "y", "the words in data/portuguese")]
    cases += [("pronunciations", 0.5, DATA.fingerprint, "your words")]
    save("sample", 0.05, "x")  # used only where it is named
    assert chosen()[0] == "the words in data/us-all"  # the shipped one
    for name, error, fingerprint, description in cases:
        save(name, error, fingerprint)
        assert chosen() == (description, f"{error:.4f}")
    assert chosen("--data_dir", words) == ("your words", "0.5000")
    assert chosen("--checkpoint_name", "q3-sample.pt") == ("the built-in SAMPLE", "0.0500")
    save("pronunciations", 0.3, "of other words")
    assert chosen() == ("your words", "0.3000")
    with pytest.raises(utils.UserError, match=r"train one first: python hw2_q3\.py --use_attn;"):
        chosen("--data_dir", words)


SHIPPED = {
    "/kæt/": "cat", "/dɔɡ/": "dog", "/ˈhæpi/": "happy", "/wɪndoʊ/": "window", "/stɹɔŋ/": "strong",
    "W IH1 N D OW0": "window", "/kəmˈpænjənz/": "companions", "/ˈplænɪt/": "planet",
    "/tʃɪp/": "chip", "/dʒʌmp/": "jump", "/ʃɪp/": "ship", "/ˈdɪnɚ/": "dinner", "K AE1 T": "cat",
    "/ˈwɪntɚ/": "winter", "/ˈsɪlvɚ/": "silver", "/fænˈtæstɪk/": "fantastic", "/ˈneɪʃən/": "nation",
    "/ˈlɪsənɪŋ/": "listening", "/ˈfæmɪli/": "family", "/ˈfɔɹɪst/": "forest", "/ˈɡleɪʃɚ/": "glacier",
    "/ˈhɑspɪtəl/": "hospital", "/həˈloʊ/": "hello", "HH AH0 L OW1": "hello", "h ə l oʊ": "hello",
}  # fmt: skip


def test_a_clone_spells_with_its_own_model(tmp_path):
    """As recorded; without data and without a training."""
    output, errors = main("spell --device cpu --output_dir", tmp_path, *SHIPPED)
    assert [line.split("\t")[1] for line in output.splitlines()] == list(SHIPPED.values())
    assert "pretrained/q3.pt (trained on the words in data/us-all, validation CER 0." in errors


def test_attention_by_hand():
    """Scores of ln 2 and 0 make weights of 2/3 and 1/3; a padded row attends to its one value."""
    attention, c = hw2_q3.BahdanauAttention(1), math.atanh(math.log(2))
    for weights in attention.parameters():
        torch.nn.init.ones_(weights)
    for layer in (attention.query, attention.combine):
        torch.nn.init.zeros_(layer.bias)
    values = torch.tensor([[[c - 1], [-1.0]], [[0.5], [9.0]]])
    memory = hw2_q3.Memory(values, values, torch.tensor([[True, True], [True, False]]))
    with torch.no_grad():  # torch 2.4 fails where only the weights of an embedding bag need one
        outputs, weights = attention(torch.ones(2, 1), torch.tensor([0, 1]), memory)
    assert_close(weights, torch.tensor([[2 / 3, 1 / 3], [1.0, 0.0]]))
    assert_close(outputs, torch.tensor([[2 * c / 3], [1.5]]).tanh())


def test_beam_search_finds_the_best_of_all_spellings():
    """A beam that is wider than their number lists all, in order, like an exhaustive search."""
    for seed in range(4):
        speller = make_speller(seed=seed, pairs=[(("A", "B"), "ab")])
        pairs = speller.encode([(tuple("ABA"), ""), (("B",), "")])
        for source, ours in zip(unpad(pairs)[0], speller.beam(pairs, 40, 4)):
            scores = {}
            for word in (w for n in range(5) for w in itertools.product("ab", repeat=n)):
                indices = [*speller.target.encode(word), END][:4]
                prefixes = [(indices[:i], index) for i, index in enumerate(indices)]
                steps = [next_log_probs(speller.model, source, p)[i] for p, i in prefixes]
                scores["".join(word)] = pytest.approx(float(sum(steps)), abs=1e-5)
            best = sorted(scores.items(), key=lambda item: -item[1].expected)
            assert ours == best
        assert first_of(speller.beam(pairs, 8, 4)) == first_of(speller.beam(pairs, 40, 4))


def test_the_embedding_of_unknown_symbols_is_never_trained(finished):
    args = parse(f"{SMALL} {MODEL}")
    utils.seed_everything(args.seed)
    initial = hw2_q3.build_model(args, *hw2_q3.make_vocabularies(args, DATA)).encoder.embedding
    trained = results(finished[0])[1]["model"]["encoder.embedding.weight"]
    is_same = (trained == initial.weight).all(1)
    assert is_same[UNK]
    assert not is_same[END + 1 :].any()


def test_samples_have_the_frequencies_of_the_nucleus():
    log_probs = torch.tensor([[0.0, 0.4, 0.3, 0.2, 0.1]]).log().expand(20000, 5)
    choose = hw2_q3.nucleus_sampler(0.8, seeded(0))
    frequencies = choose(log_probs).bincount(minlength=5) / 20000
    assert_close(frequencies, torch.tensor([0, 4 / 9, 3 / 9, 2 / 9, 0]), atol=0.012, rtol=0)
    assert frequencies[[0, 4]].sum() == 0


def test_label_smoothing_is_undone():
    """q = (1 - e) p + e / V over the V symbols that can be emitted gives p again."""
    p = torch.tensor([[0.0, 0.0, 0.0, 0.7, 0.3, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.2, 0.2, 0.6]])
    q = 0.9 * p + 0.1 / 4
    q[:, :END] = 0
    smoothed = torch.nn.Module()
    smoothed.next_log_probs = lambda *_: (q.log(), "state")
    log_probs, state = hw2_q3.Unsmoothed(smoothed, 0.1).next_log_probs()
    assert state == "state"
    assert_close(log_probs.exp(), p)


def test_smoothed_models_are_sampled_and_re_ranked_without_smoothing():
    speller = make_speller()
    smoothed = speller._replace(smoothing=0.2)
    pairs = speller.encode(PAIRS)
    assert speller.unsmoothed() is speller
    assert smoothed.beam(pairs, 3) == speller.beam(pairs, 3)
    bare = speller._replace(model=hw2_q3.Unsmoothed(speller.model, 0.2))
    assert smoothed.unsmoothed().beam(pairs, 3) == bare.beam(pairs, 3) != speller.beam(pairs, 3)
    how = 0.9, 3
    assert smoothed.sample(pairs, *how, seeded(0)) == bare.sample(pairs, *how, seeded(0))


def test_special_symbols_are_never_written():
    """Even by a model that prefers them."""
    speller = make_speller()
    with torch.no_grad():
        speller.model.decoder.output.bias[[PAD, UNK, START]] = 50.0
    pairs = speller.encode(PAIRS)
    samples = [
        version.sample(pairs, p, 4, seeded(0), 15)
        for version in (speller, speller._replace(smoothing=0.5))
        for p in (0.8, 1.0)
    ]
    for row in itertools.chain(*samples, speller.greedy(pairs), speller.beam(pairs, 3)):
        assert set("".join(spelling for spelling, _ in row)) <= set("abcdef")
        assert all(math.isfinite(score) for _, score in row)
