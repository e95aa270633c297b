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
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import hw2_q3
import utils
from hw2_q3 import END, PAD, START, UNK, spellings
from tests.conftest import assert_equal_runs, killed_at, load_run, needs_cuda

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


def make_speller(line="--use_attn", seed=0):
    """A Speller with random weights, without dropout."""
    torch.manual_seed(seed)
    args = hw2_q3.parse_args(f"--hidden_size 16 --dropout 0 {line}".split())
    vocabularies = hw2_q3.make_vocabularies(args, DATA)
    return hw2_q3.Speller(hw2_q3.build_model(args, *vocabularies).eval(), *vocabularies)


# ----------------------------------------------------------------------------------------------
# textbook code: one word, one position at a time


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
    encoder, decoder, logits = model.encoder, model.decoder, []
    values, state = encoder.lstm(encoder.embedding.weight[source])  # values (S, H)
    state = [part.reshape(-1, values.shape[1]) for part in state]  # both directions joined
    layers, input_feed = list(zip(*state)), torch.zeros_like(values[0])
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


def test_attention_by_hand():
    """Scores of ln 2 and 0 make weights of 2/3 and 1/3; a padded row attends to its one value."""
    attention, c = hw2_q3.BahdanauAttention(1), math.atanh(math.log(2))
    for name, weights in attention.named_parameters():
        torch.nn.init.constant_(weights, 0 if "bias" in name else 1)
    values = torch.tensor([[[c - 1], [-1.0]], [[0.5], [9.0]]])
    memory = hw2_q3.Memory(values, values, torch.tensor([[True, True], [True, False]]))
    with torch.no_grad():  # torch 2.4 fails where only the weights of an embedding bag need one
        outputs, weights = attention(torch.ones(2, 1), torch.tensor([0, 1]), memory)
    assert_close(weights, torch.tensor([[2 / 3, 1 / 3], [1.0, 0.0]]))
    assert_close(outputs, torch.tensor([[2 * c / 3], [1.5]]).tanh())


def test_the_embedding_scale_multiplies_the_embeddings_alone():
    usual, small = (make_speller(f"--embedding_scale {s}").model.state_dict() for s in (1, 0.1))
    for name, weights in usual.items():
        is_scaled = "embedding" in name or name == "decoder.output.weight"
        assert_close(small[name], weights * (0.1 if is_scaled else 1))


def test_label_smoothing_is_undone():
    """q = (1 - e) p + e / V over the V symbols that can be emitted gives p again."""
    p = torch.tensor([[0.0, 0.0, 0.0, 0.7, 0.3, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.2, 0.2, 0.6]])
    q = 0.9 * p + 0.1 / 4
    q[:, :END] = 0
    smoothed = SimpleNamespace(next_log_probs=lambda: (q.log(), "state"))
    log_probs, _ = hw2_q3.Unsmoothed(smoothed, 0.1).next_log_probs()
    assert_close(log_probs.exp(), p)


def test_smoothed_models_are_sampled_and_re_ranked_without_smoothing():
    speller = make_speller()
    smoothed, pairs = speller._replace(smoothing=0.2), speller.encode(PAIRS)
    bare = speller._replace(model=hw2_q3.Unsmoothed(speller.model, 0.2))
    assert smoothed.beam(pairs, 3) == speller.beam(pairs, 3) != bare.beam(pairs, 3)
    assert smoothed.unsmoothed().beam(pairs, 3) == bare.beam(pairs, 3)
    samples = [s.sample(pairs, 0.9, 3, torch.Generator().manual_seed(0)) for s in (smoothed, bare)]
    assert samples[0] == samples[1]


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
    model, decode = speller.model, speller.target.decode
    pairs = speller.encode(PAIRS[8::-1])  # the longest first
    sources, _ = unpad(pairs)
    beams = [textbook_beam(model, source, 1, 5) for source in sources]  # greedy
    beams += [textbook_beam(model, source, 3, 5) for source in sources]
    beams += [textbook_beam(model, source, 50, 2) for source in sources]  # of 43 spellings
    order = pairs.lengths.argsort(stable=True).tolist()  # words of like length share a batch
    for size in (1024, 6):
        monkeypatch.setattr(hw2_q3, "DECODE_BATCH_SIZE", size)
        rows = speller.greedy(pairs, 5) + speller.beam(pairs, 3, 5) + speller.beam(pairs, 50, 2)
        for row, prefixes in zip(rows, beams, strict=True):
            expected = [(decode(p), pytest.approx(score, abs=1e-4)) for p, score in prefixes]
            assert row == expected
        drawn = spellings(speller.sample(pairs, 0.8, 2, torch.Generator().manual_seed(1), 5))
        generator = torch.Generator().manual_seed(1)
        for batch in (order[i : i + size // 2] for i in range(0, len(order), size // 2)):
            words = [sources[i] for i in batch]
            expected = map(decode, textbook_sample(model, words, 0.8, 2, generator, 5))
            assert [spelling for i in batch for spelling in drawn[i]] == list(expected)


@needs_cuda
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
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
# symbols and scores


def test_symbols_are_encoded_padded_and_decoded():
    speller = make_speller()
    pairs = speller.encode([(("A", "B", "X"), "ab"), (("A",), "aby")])
    assert pairs.sources.tolist() == [[4, 5, UNK], [4, PAD, PAD]]
    assert pairs.targets.tolist() == [[START, 4, 5, END, PAD], [START, 4, 5, UNK, END]]
    assert (pairs.lengths.tolist(), pairs.target_lengths.tolist()) == ([3, 1], [4, 5])
    assert pairs.spellings == ["ab", "aby"]
    assert speller.source.decode([4, 5]) == "A B"
    assert [speller.target.decode(x) for x in ([4, 5, END, 6], [5, PAD], [END])] == ["ab", "b", ""]
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
    assert hw2_q3.cer(["t͡ʃ i z", ""], ["t͡ʃ iː z", "k æ t"], str.split) == 4 / 6
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
def run(words, tmp_path):
    """run(line): the output of a command on the words; to train is to train a small model."""
    folders = "--data_dir", words, "--output_dir", tmp_path
    return lambda line="", *argv: main(SMALL, *folders, *line.split(), *argv)[0]


@pytest.fixture(scope="module")
def finished(words, tmp_path_factory):
    """A folder with a finished run, scored in all ways, and the lines that it printed."""
    folder = tmp_path_factory.mktemp("finished")
    output, _ = main(f"{SMALL} {FULL}", "--data_dir", words, "--output_dir", folder)
    return folder, output.splitlines()


@pytest.fixture
def copied(finished, tmp_path):
    """The record and the checkpoint of the finished run, whose files are copied to `tmp_path`."""
    return load_run(shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True))


def textbook_epoch(model, optimizer, words, epoch, args):
    """Train word by word. Returns the mean loss per character; label smoothing spreads over the
    characters that can be written, of which END is one."""
    utils.seed_everything(args.seed, epoch)
    batches, epoch_losses = torch.randperm(len(words)).split(args.batch_size), []
    for i, batch in enumerate(batches):
        losses = []
        for source, target in (words[j] for j in batch):
            for row, true in zip(textbook_logits(model, source, target[:-1]), target[1:]):
                first = END if args.label_smoothing else 0
                log_probs = row[first:].log_softmax(0)
                loss = -log_probs[true - first].lerp(log_probs.mean(), args.label_smoothing)
                losses.append(loss)
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        gradients = [weights.grad for weights in model.parameters()]
        norm = sum((gradient**2).sum() for gradient in gradients).sqrt()
        if args.clip and norm > args.clip:
            for gradient in gradients:
                gradient *= args.clip / norm
        step, steps = (epoch - 1) * len(batches) + i, args.n_epochs * len(batches)
        [group] = optimizer.param_groups
        group["lr"] = utils.learning_rate(args.schedule, args.lr, step, steps)
        optimizer.step()
        epoch_losses += [loss.item() for loss in losses]
    return sum(epoch_losses) / len(epoch_losses)


@pytest.mark.parametrize("line", ["", "--use_attn --batch_size 7", MODEL, BEST])
def test_training_equals_a_textbook_loop(run, tmp_path, line):
    """Weights and losses after 3 epochs, dropout aside, in double precision."""
    line = f"{line} --dropout 0 --lr 0.02"
    args = hw2_q3.parse_args(f"{SMALL} {line}".split())
    torch.set_default_dtype(torch.float64)
    try:
        run(line)
        utils.seed_everything(args.seed)
        vocabularies = hw2_q3.make_vocabularies(args, DATA)
        model = hw2_q3.build_model(args, *vocabularies)
        words = list(zip(*unpad(hw2_q3.encode_pairs(PAIRS, *vocabularies))))
        optimizer = torch.optim.Adam(model.parameters())
        losses = [textbook_epoch(model, optimizer, words, epoch, args) for epoch in (1, 2, 3)]
    finally:
        torch.set_default_dtype(torch.float32)
    record, saved = load_run(tmp_path)
    assert record["history"]["train_loss"] == pytest.approx(losses, rel=1e-5)
    for name, weights in model.state_dict().items():
        assert_close(saved["model"][name], weights, rtol=1e-4, atol=1e-6, msg=name)


def test_the_best_epoch_is_tested(run, tmp_path, monkeypatch):
    """The scores make the second epoch the best; of equal ones the first is."""
    run("train --lr 0.05 --n_epochs 2", "--output_dir", tmp_path / "second")
    scores = iter([0.9, 0.3, 0.3])
    monkeypatch.setattr(hw2_q3, "cer", lambda *args: next(scores, 0.0))
    run("--lr 0.05")
    (_, second), (record, saved) = load_run(tmp_path / "second"), load_run(tmp_path)
    assert record["best_epoch"] == 2
    assert all(torch.equal(saved["best"][name], w) for name, w in second["model"].items())
    speller, distances = make_speller(""), []
    for weights in (saved["best"], saved["model"]):
        speller.model.load_state_dict(weights)
        rows = speller.greedy(speller.encode(DATA.splits["test"]))
        predicted = [spelling for [(spelling, _)] in rows]
        distances.append(hw2_q3.distances(predicted, TRUE))
    assert record["final"]["greedy"]["distances"] == distances[0] != distances[1]


# ----------------------------------------------------------------------------------------------
# testing


def test_the_output_of_a_run(finished):
    (record, _), lines = load_run(finished[0]), finished[1]
    greedy, nucleus, beam = (record["final"][way] for way in ("greedy", "nucleus", "beam"))
    epoch = r"Epoch  \d/3  Training loss: [\d.]+  Validation CER: [\d.]+  Validation WER: [\d.]+ "
    assert len(re.findall(epoch, "\n".join(lines))) == 3
    expected = [
        f"Test CER: {s['cer']:.4f}, Test WER: {s['wer']:.4f}" for s in (greedy, nucleus, beam)
    ]
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
    folder, (record, saved) = finished[0], load_run(finished[0])
    options = {"n_epochs": 3, "batch_size": 4, "hidden_size": 16, "use_attn": True, "layers": 2}
    options |= {"schedule": "one_cycle", "clip": 0.2}
    assert record["arguments"] == saved["arguments"] == options
    assert record["measured"]["threads"] == 1
    columns = {"train_loss", "val_cer", "val_wer"}
    assert {name for name, values in record["history"].items() if len(values) == 3} == columns
    assert len(record["final"]["attention"]) == 4
    for example in record["final"]["attention"]:
        weights = torch.tensor(example["weights"])
        assert weights.shape == (len(example["letters"]), len(example["phonemes"]))
        assert_close(weights.sum(1), torch.ones(len(weights)), atol=1e-3, rtol=0)
    assert not [path for path in (folder, words) if str(path) in json.dumps(record)]
    names = {path.name for path in folder.glob("figures/q3-*/*")}
    assert names == {"validation-cer.png", "attention.png"}


def test_nucleus_ranks_are_over_ten_samples_and_scores_over_the_first_k(finished):
    [path] = finished[0].glob("checkpoints/*.pt")
    speller, args, _ = hw2_q3.load_speller(path, "cpu")
    pairs, generator = speller.encode(DATA.splits["test"]), torch.Generator().manual_seed(args.seed)
    samples = spellings(speller.sample(pairs, 0.8, 10, generator))
    nucleus = load_run(finished[0])[0]["final"]["nucleus"]
    assert hw2_q3.score_candidates(samples, TRUE, 3).items() <= nucleus.items()
    distinct = [list(dict.fromkeys(row[:3])) for row in samples]
    assert nucleus["examples"] == [list(example) for example in zip(TRUE, distinct)]


def test_retraining_compares_its_numbers_with_the_record_at_its_end(run, tmp_path, copied):
    [path], (record, checkpoint) = tmp_path.glob("figures/runs/*"), copied
    record |= {"analysis": "of the report"}
    utils.save_record(path, record)
    assert "the same numbers" in run(f"{MODEL} --restart")
    assert_equal_runs(load_run(tmp_path), (record, checkpoint))
    other = record | {"history": record["history"] | {"val_cer": [1, 2, 3]}}
    utils.save_record(path, other)
    with killed_at(utils, "save_checkpoint", 2):
        run(f"{MODEL} --restart")
    assert "record is not written" in run(f"test {MODEL}")  # of an unfinished model
    assert utils.load_record(path) == other
    assert "other numbers" in run(MODEL)
    assert utils.load_record(path)["history"] == record["history"]


def test_training_and_each_way_of_testing_apart_complete_the_same_record(finished, run, tmp_path):
    assert "Test" not in run(f"train {FULL}")
    assert "final" not in load_run(tmp_path)[0]
    outputs = [run(f"test {MODEL} {way}") for way in ("", "--nucleus", "--beam_size 4")]
    is_score = re.compile(r"Test |\(|Nucleus|Beam|Printing").match
    assert set(filter(is_score, finished[1])) <= set("".join(outputs).splitlines())
    assert_equal_runs(load_run(tmp_path), load_run(finished[0]))


def test_scores_and_threads_are_those_that_were_asked_for(run, tmp_path):
    run("--max_len 2 --topp 1 --k 12 --threads 2")
    assert load_run(tmp_path)[0]["measured"]["threads"] == 2
    final = load_run(tmp_path)[0]["final"]
    assert list(final) == ["max_len", "greedy", "nucleus"]
    assert (final["max_len"], final["nucleus"]["p"], final["nucleus"]["k"]) == (2, 1, 12)
    assert "wer@12" in final["nucleus"]
    assert max(len(text) for _, row in final["nucleus"]["examples"] for text in row) == 2


def test_checkpoints_that_are_missing_or_of_other_runs(run, tmp_path):
    """Those of other runs are tested, without a record, and not trained further."""
    with pytest.raises(utils.UserError, match="no such checkpoint; train the model first"):
        run("test")
    assert not list(tmp_path.iterdir())
    run("train --use_attn --checkpoint_name mine.pt")
    mine = f"--checkpoint_name {tmp_path / 'checkpoints' / 'mine.pt'}"
    output = run(f"test {mine} --output_dir {tmp_path / 'other'}")
    assert "Test CER" in output
    assert "record is not written" in output
    assert not (tmp_path / "other").exists()
    with pytest.raises(utils.UserError, match=r"mine\.pt: was trained with the other --direction"):
        run(f"test --direction g2p {mine}")
    with pytest.raises(utils.UserError, match=r"mine\.pt: belongs to another run"):
        run(mine)


def test_the_sample_is_used_without_data_and_marked(tmp_path, monkeypatch):
    monkeypatch.setattr(hw2_q3, "DATA_DIR", tmp_path)
    sample = utils.Pronunciations(DATA.splits, "sample")
    monkeypatch.setattr("data.sample.choose_pronunciations", lambda: sample)
    output, _ = main(f"{SMALL} --n_epochs 1 --nucleus --output_dir", tmp_path)
    assert "built-in SAMPLE" in output
    assert output.count("(built-in sample)\n") == 3
    assert list(tmp_path.glob("figures/runs/*-sample-*.json"))


def test_an_ensemble_trains_its_members_and_spells_as_one(run, tmp_path):
    line = "--use_attn --ensemble --seed 1 2"
    run("--use_attn --beam_size 2 --seed 1")
    with pytest.raises(utils.UserError, match=r"-seed2-.*: missing or unfinished"):
        run(f"test {line}")
    output = run(f"{line} --beam_size 2")
    first, second = paths = sorted(tmp_path.glob("checkpoints/*.pt"))
    assert re.search(rf"{first.stem}: Test CER.* \(finished", output)
    assert f"\n{second.stem}: Test CER" in output
    run("--use_attn --beam_size 2 --seed 2", "--output_dir", tmp_path / "alone")
    record = utils.load_record(tmp_path / "figures" / "runs" / f"{second.stem}.json")
    assert_equal_runs(load_run(tmp_path / "alone"), (record, utils.load_checkpoint(second)))
    spellers = [hw2_q3.load_speller(path, "cpu")[0] for path in paths]
    ensemble = spellers[0]._replace(model=hw2_q3.Ensemble([s.model for s in spellers]))
    beam = ensemble.beam(ensemble.encode(DATA.splits["test"]), 2)
    [path] = tmp_path.glob("figures/runs/*ensemble*")
    final = utils.load_record(path)["final"]
    assert final["beam"]["distances"] == hw2_q3.distances([row[0][0] for row in beam], TRUE)
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


@pytest.fixture
def prompt(spell, monkeypatch):
    """prompt(text, argv...): the answers, as of `spell`, at a prompt where a text is typed."""

    def prompt(text, *argv):
        stdin = io.StringIO(text)
        stdin.isatty = lambda: True
        monkeypatch.setattr(sys, "stdin", stdin)
        *rows, _ = spell(*argv)[0]  # last the prompt alone
        return [[row[0].rpartition("> ")[2], *row[1:]] for row in rows]

    return prompt


def test_answers_at_a_prompt_end_with_an_empty_line_or_the_input(spell, prompt):
    rows, _ = spell("C A B", "D A D")
    assert [prompt(f"C A B\nD A D\n{end}") for end in ("", "\n", "\nD A D")] == [rows] * 3


def test_samples_at_a_prompt_are_of_one_stream_of_random_numbers(prompt):
    """Lines that are read one by one share no numbers; each seed has others."""
    argv = "--topp", 1, "--k", 1, "--max_len", 4, "--seed"
    samples = [[row[1] for row in prompt("D A D\n" * 20, *argv, seed)] for seed in (1, 2)]
    assert len(set(samples[0])) > 10
    assert samples[0] != samples[1]


def test_spelling_through_a_pipe(finished):
    """An answer to each line before the next is written, whatever the locale and the bytes."""
    command = sys.executable, "hw2_q3.py", "spell", "--output_dir", str(finished[0])
    how = {"cwd": utils.ROOT, "env": os.environ | {"PYTHONIOENCODING": "latin-1"}}
    pipe, answers = subprocess.PIPE, []
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, **how) as process:
        guard = threading.Timer(300, process.kill)  # or a lost answer would stop the tests
        guard.start()
        for line in (b"\xef\xbb\xbfC A B\n", b"C \xc3\xa6 \xff\n", b"\n", b"C \xc3\xa6\r\n"):
            process.stdin.write(line)
            process.stdin.flush()
            answers.append(process.stdout.readline().decode())
        rest, errors = process.communicate(b"D A D\nF A D")
        guard.cancel()
    fields = [line.rstrip("\n").split("\t") for line in answers + rest.decode().splitlines()]
    assert [row[0] for row in fields] == ["C A B", "", "", "C æ", "D A D", "F A D"]
    assert [row[3:] for row in fields[:4]] == [[], ["not UTF-8"], [], ['no phoneme for "æ"']]
    assert errors.decode().splitlines()[1:] == ["line 2: not UTF-8", 'line 4: no phoneme for "æ"']
    assert process.returncode == 0


def test_words_of_one_line_are_spelled_one_by_one(spell):
    """Their candidates are the best sums of log-probabilities."""
    first, second, both = (
        spell(line, "--beam_size", 4)[0] for line in ("C A B", "D A D", "CAB  DAD")
    )
    assert [row[0] for row in both] == ["C A B # D A D"] * 4
    pairs = itertools.product(first, second)
    sums = {f"{a[1]} {b[1]}": float(a[2]) + float(b[2]) for a, b in pairs}
    assert [sums[row[1]] for row in both] == sorted(sums.values(), reverse=True)[:4]
    assert all(float(row[2]) == pytest.approx(sums[row[1]], abs=0.002) for row in both)


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


def test_answers_as_json(finished):
    """An input that cannot be spelled does not stop the others."""
    argv = "C A (B)", "A " * 600, "C x\t\x9b", "", "--beam_size", 2, "--json"
    output, errors = main("spell --device cpu --output_dir", finished[0], *argv)
    first, long, unknown, blank = json.loads(output)
    assert (first["input"], first["phonemes"]) == ("C A (B)", first["candidates"][0]["phonemes"])
    keys = {"phonemes", "spelling", "log_probability"}
    assert [row.keys() for row in first["candidates"]] == [keys, keys]
    assert (long["candidates"], long["note"]) == ([], "longer than 1,000 characters")
    assert "argument 2: longer than 1,000 characters" in errors
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


def test_pronouncing_written_words(run, tmp_path, copied):
    """Beside a model that spells: each is asked in its direction."""
    output = run("--use_attn --direction g2p --nucleus")
    [path] = tmp_path.glob("figures/runs/q3-g2p-*")
    greedy = utils.load_record(path)["final"]["greedy"]
    assert f"Test PER: {greedy['cer']:.4f}, Test WER: {greedy['wer']:.4f}\n" in output
    assert "CER" not in output
    speller, _, _ = hw2_q3.load_speller(tmp_path / "checkpoints" / f"{path.stem}.pt", "cpu")
    rows = speller.greedy(speller.encode([(tuple(word), "") for word in TRUE]))
    predicted = [sounds for [(sounds, _)] in rows]
    true = [" ".join(sounds) for sounds, _ in DATA.splits["test"]]
    assert greedy["cer"] == hw2_q3.cer(predicted, true, str.split)
    argv = "spell --device cpu --output_dir", tmp_path
    output, errors = main(*argv, "--direction", "g2p", "--json", f"Dad, {TRUE[1]}!", "dqd")
    assert f"{path.stem}.pt (trained on your words, validation PER" in errors
    assert 'argument 2: no letter for "q"' in errors
    answer, _ = json.loads(output)
    assert answer["letters"] == f"dad {TRUE[1]}"
    assert [row["phonemes"] for row in answer["candidates"]] == [" # ".join(predicted[:2])]
    assert path.stem not in main(*argv, "D A D")[1]


def test_the_best_speller_is_chosen(copied, tmp_path, words):
    """Of the default words before others, of real words before the sample's; with --data_dir, of
    these words alone."""
    [first], [_, saved] = tmp_path.glob("checkpoints/*.pt"), copied
    first.unlink()

    def save(name, error, fingerprint="x"):
        history = saved["history"] | {"val_cer": [error] * 3}
        content = saved | {"history": history, "data": {"name": name, "fingerprint": fingerprint}}
        torch.save(content, first.with_name(f"q3-{name}.pt"))

    def chosen(*argv):
        _, errors = main("spell --device cpu --output_dir", tmp_path, "D A D", *argv)
        return re.search(r"trained on (.*), validation CER (.*)\)", errors).groups()

    save("sample", 0.05)  # used only where it is named
    assert chosen()[0] == "the words in data/us-all"  # the shipped one
    save("portuguese", 0.1)
    assert chosen() == ("the words in data/portuguese", "0.1000")
    save("pronunciations", 0.5, DATA.fingerprint)
    assert chosen() == chosen("--data_dir", words) == ("your words", "0.5000")
    assert chosen("--checkpoint_name", "q3-sample.pt") == ("the built-in SAMPLE", "0.0500")
    save("pronunciations", 0.3, "of other words")
    assert chosen() == ("your words", "0.3000")
    with pytest.raises(utils.UserError, match=r"python hw2_q3\.py --use_attn --data_dir \S+ --out"):
        chosen("--data_dir", words)
