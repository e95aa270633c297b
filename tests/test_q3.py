"""Question 3: options, symbols, attention, decoding, scores, training, testing, spelling."""

import ast
import io
import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

import hw2_q3
import utils
from hw2_q3 import END, PAD, START, UNK
from tests import benchmark
from tests.conftest import Killed, assert_equal_runs, save_checkpoint

# Words of a small language in which every letter sounds like itself, written in capitals.
WORDS = "a ab abc bac cab dab add bad dad fad fed feed bead deaf face fade cafe acceded baba deed"
PAIRS = [(tuple(word.upper()), word) for word in WORDS.split(" ")]
ONE = torch.tensor([[True]]), torch.tensor([0])  # one step of one word, for the decoder


@pytest.fixture(scope="module")
def words():
    splits = {"train": PAIRS, "val": PAIRS[3:9], "test": PAIRS[8:18]}
    return utils.Pronunciations(splits)


@pytest.fixture(scope="module")
def vocabularies():
    phonemes = hw2_q3.Vocabulary.of(sound for sound, _ in PAIRS)
    return phonemes, hw2_q3.Vocabulary.of(word for _, word in PAIRS)


def build(vocabularies, seed=0, **options):
    torch.manual_seed(seed)
    options = {"hidden_size": 16, "dropout": 0.0, "use_attn": True} | options
    return hw2_q3.build_model(options, *vocabularies).eval()


def build_speller(vocabularies, seed=0, **options):
    return hw2_q3.Speller(build(vocabularies, seed, **options), *vocabularies)


def write_tsv(folder, pairs):
    folder.mkdir(exist_ok=True)
    for name, rows in pairs.items():
        lines = "".join(f"{' '.join(sound)}\t{word}\n" for sound, word in rows)
        (folder / f"{name}.tsv").write_bytes(lines.encode())
    return folder


@pytest.fixture
def folder(tmp_path, words):
    s = words.splits
    pairs = {"train": s["train"], "valid": s["val"], "test": s["test"]}
    return write_tsv(tmp_path / "words", pairs)


# ----------------------------------------------------------------------------------------------
# options


def options(*argv):
    return hw2_q3.parse_options([str(word) for word in argv])


def test_defaults_are_the_recipe():
    o = options()
    assert (o.n_epochs, o.batch_size, o.lr, o.dropout, o.hidden_size) == (20, 64, 0.003, 0.3, 128)
    assert (o.use_attn, o.nucleus, o.topp, o.k, o.beam_size, o.max_len) == (
        False,
        False,
        0.8,
        3,
        None,
        50,
    )
    assert o.seed == 42


def test_topp_implies_nucleus():
    assert options("--topp", 0.9).nucleus
    assert not options("train").nucleus


def test_spell_takes_options_before_and_behind_its_words():
    o = options("spell", "--beam_size", 3, "h ə", "--max_len", 9, "j uː")
    assert (o.mode, o.ipa, o.beam_size, o.max_len) == ("spell", ["h ə", "j uː"], 3, 9)


@pytest.mark.parametrize(
    "line",
    [
        "--n_epochs 0", "--batch_size 0", "--lr 0", "--lr nan", "--dropout 1", "--hidden_size 7",
        "--hidden_size 0", "--topp 0", "--topp 1.1", "--k 0", "--beam_size 0", "--max_len 0",
        "--seed -1", "guess", "train abc", "--input x", "spell abc --input x", "--nucleas",
        "--data_dir no/such/folder", "test --checkpoint_name no/such.pt", "--device abacus",
        "spell a --checkpoint_name no/such.pt",
        "test --seed 1 2", "spell a --lr 0.1 0.2", "--seed 1 2 --checkpoint_name x.pt", "--jobs 0",
        "--report some", "--report --n_seeds 9", "--report --figure_format gif",
        "--recipe none", "--layers 0", "--clip 0", "--label_smoothing 1", "--schedule cosine",
        "--input_feeding", "--ensemble",
        "train --ensemble --seed 1 2", "--ensemble --seed 1 2 --lr 0.1 0.2",
    ],
)  # fmt: skip
def test_bad_options_end_with_one_line(line, fails, folder, tmp_path):
    argv = line.split()
    if "--data_dir" not in line and not line.startswith("spell"):
        argv += ["--data_dir", folder, "--output_dir", tmp_path]
    message = fails(hw2_q3.main, argv)
    named = [word for word in line.split() if len(word) > 2] + ["go with spell"]
    assert any(word.rstrip("s") in message for word in named)


def test_a_recipe_is_the_defaults_of_its_options():
    best = hw2_q3.RECIPES["best"]
    for name, value in best.items():
        assert getattr(options("--recipe", "best"), name) == value
        assert value != hw2_q3.make_parser().get_default(name)
    assert options("--recipe", "best", "--layers", 3).layers == 3
    assert options("--recipe", "best", "--layers", 3).clip == best["clip"]


LINES = ["", "--use_attn", "--lr 0.01 --seed 3 --hidden_size 64", "--direction g2p"]
LINES += ["--layers 2 --schedule one_cycle --clip 1.0 --label_smoothing 0.1"]


@pytest.mark.parametrize("line", LINES)
def test_the_recorded_command_repeats_the_run(line):
    chosen = hw2_q3.run_options(options(*line.split()))
    command = hw2_q3.command(chosen)
    assert command.startswith("python hw2_q3.py")
    assert set(command.split()[2:]) == set(line.split())
    assert hw2_q3.run_options(options(*command.split()[2:])) == chosen


# ----------------------------------------------------------------------------------------------
# symbols and batches


def test_vocabulary_round_trip(vocabularies):
    _, characters = vocabularies
    for _, word in PAIRS:
        assert characters.decode(characters.encode(word)) == word
        assert characters.decode([*characters.encode(word), END, 5, 6]) == word
    assert characters.decode([END]) == ""
    assert characters.encode("aza") == [4, UNK, 4]
    assert characters.symbols[:4] == list(hw2_q3.SPECIAL)


def test_tensors_are_padded_and_framed(vocabularies):
    phonemes, characters = vocabularies
    tensors = hw2_q3.to_tensors([(("A", "B", "X"), "ab"), (("A",), "aby")], phonemes, characters)
    assert tensors.sources.tolist() == [[4, 5, UNK], [4, PAD, PAD]]
    assert tensors.targets.tolist() == [[START, 4, 5, END, PAD], [START, 4, 5, UNK, END]]
    assert tensors.lengths.tolist() == [3, 1]
    assert tensors.target_lengths.tolist() == [4, 5]


def test_an_epoch_shows_every_word_once(vocabularies):
    words = hw2_q3.to_tensors(PAIRS, *vocabularies)
    seen, totals = [], torch.zeros(3)

    def step(sources, lengths, targets):
        totals.add_(1)
        for source, length, target in zip(sources.tolist(), lengths.tolist(), targets.tolist()):
            assert PAD not in source[:length]
            assert set(source[length:]) <= {PAD}
            seen.append((tuple(source[:length]), vocabularies[1].decode(target[1:])))

    for _ in range(2):
        seen.clear()
        assert hw2_q3.train_epoch(step, totals, words, batch_size=6) == 1
        expected = [(tuple(vocabularies[0].encode(sound)), word) for sound, word in PAIRS]
        assert sorted(seen) == sorted(expected)


def test_teacher_forcing_shifts_by_one(vocabularies):
    """The model gets START and all characters but the last and must tell all but START."""
    model = build(vocabularies)
    seen = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))

    class Spy(torch.nn.Module):
        def forward(self, sources, lengths, targets):
            logits, weights = model(sources, lengths, targets)
            return logits * 0, weights

    totals = torch.zeros(3)
    step = hw2_q3.make_step(Spy(), torch.optim.SGD(model.parameters(), 0.1), totals)
    targets = torch.tensor([[START, 4, 5, END], [START, 6, END, PAD]])
    step(torch.tensor([[4, 5], [6, PAD]]), torch.tensor([2, 1]), targets)
    [(inputs, _, _, steps, words)] = seen
    assert inputs.tolist() == [[START, 4, 5], [START, 6, END]]
    assert steps.tolist() == [[True, True, True], [True, True, False]]
    assert words.tolist() == [0, 1]
    # five characters count, padding does not; logits of 0 make each cost log(10)
    assert totals.tolist() == pytest.approx([5 * math.log(10), 5, 1])


def test_padding_changes_neither_loss_nor_gradients(vocabularies):
    sources, targets = (
        torch.tensor([[4, 5], [6, 4]]),
        torch.tensor([[START, 4, END], [START, 5, END]]),
    )
    lengths = torch.tensor([2, 2])
    padded = torch.cat((targets, torch.full((2, 3), PAD)), 1)
    gradients = []
    for batch in (targets, padded):
        model = build(vocabularies)
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        totals = torch.zeros(3)
        hw2_q3.make_step(model, optimizer, totals)(sources, lengths, batch)
        gradients.append([totals, *(p.grad for p in model.parameters())])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


# ----------------------------------------------------------------------------------------------
# model


def loop_attention(attention, states, values, lengths):
    """Bahdanau attention one state and one position at a time."""
    contexts, weights = torch.zeros_like(states), torch.zeros(*states.shape[:2], values.shape[1])
    for b, t in itertools.product(range(states.shape[0]), range(states.shape[1])):
        scores = []
        for i in range(lengths[b]):
            inside = attention.key.weight @ values[b, i]
            inside = inside + attention.query.weight @ states[b, t] + attention.query.bias
            scores.append(attention.score.weight[0] @ torch.tanh(inside))
        shares = torch.stack(scores).softmax(0)
        weights[b, t, : lengths[b]] = shares
        context = sum(shares[i] * values[b, i] for i in range(lengths[b]))
        joined = torch.cat((context, states[b, t]))
        contexts[b, t] = torch.tanh(attention.combine.weight @ joined + attention.combine.bias)
    return contexts, weights


def test_attention_equals_a_loop():
    torch.manual_seed(0)
    attention = hw2_q3.BahdanauAttention(7)
    states, values, lengths = torch.randn(3, 2, 7), torch.randn(3, 5, 7), [5, 3, 1]
    mask = torch.arange(5) < torch.tensor(lengths).unsqueeze(1)
    memory = hw2_q3.Memory(values, attention.key(values), mask)
    words = torch.tensor([0, 0, 1, 1, 2, 2])
    outputs, weights = attention(states.flatten(0, 1), words, memory)
    expected, expected_weights = loop_attention(attention, states, values, lengths)
    torch.testing.assert_close(outputs, expected.flatten(0, 1))
    torch.testing.assert_close(weights, expected_weights.flatten(0, 1))
    assert (weights[~mask[words]] == 0).all()  # exactly
    torch.testing.assert_close(weights.sum(1), torch.ones(6))


def test_attention_gradients_equal_a_loops():
    gradients = []
    for looped in (False, True):
        torch.manual_seed(0)
        attention = hw2_q3.BahdanauAttention(7)
        states, values, lengths = torch.randn(3, 2, 7), torch.randn(3, 5, 7), [5, 3, 1]
        states.requires_grad_(), values.requires_grad_()
        if looped:
            outputs = loop_attention(attention, states, values, lengths)[0].flatten(0, 1)
        else:
            mask = torch.arange(5) < torch.tensor(lengths).unsqueeze(1)
            memory = hw2_q3.Memory(values, attention.key(values), mask)
            words = torch.tensor([0, 0, 1, 1, 2, 2])
            outputs, _ = attention(states.flatten(0, 1), words, memory)
        (outputs * torch.linspace(-1, 1, 42).view(6, 7)).sum().backward()
        gradients.append([states.grad, values.grad, *(p.grad for p in attention.parameters())])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_small_embeddings_are_the_usual_ones_scaled(vocabularies):
    models = []
    for scale in (1.0, 0.1):
        torch.manual_seed(0)
        chosen = {"hidden_size": 8, "dropout": 0.0, "use_attn": True, "embedding_scale": scale}
        models.append(hw2_q3.build_model(chosen, *vocabularies).state_dict())
    for name, weights in models[0].items():
        scaled = "embedding" in name or name == "decoder.output.weight"
        torch.testing.assert_close(models[1][name], weights * (0.1 if scaled else 1))


SHAPES = {
    "recipe": {},
    "no attention": {"use_attn": False},
    "layers": {"layers": 2},
    "input feeding": {"layers": 2, "input_feeding": True},
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@every_shape
def test_padded_sources_give_what_each_word_gives_alone(vocabularies, shape):
    model = build(vocabularies, **shape)
    tensors = hw2_q3.to_tensors(PAIRS, *vocabularies)
    together, _ = model(tensors.sources, tensors.lengths, tensors.targets)
    alone = []
    for i, length in enumerate(tensors.lengths.tolist()):
        row, end = tensors.sources[i : i + 1, :length], tensors.target_lengths[i]
        alone.append(model(row, torch.tensor([length]), tensors.targets[i : i + 1, :end])[0])
    torch.testing.assert_close(together, torch.cat(alone))


@every_shape
def test_all_steps_at_once_equal_one_at_a_time(vocabularies, shape):
    model = build(vocabularies, **shape)
    source = torch.tensor([[4, 5, 6]]), torch.tensor([3])
    targets = torch.tensor([[START, 4, 5, 6, END]])
    memory, state = model.encode(*source)
    steps = []
    for t in range(4):
        logits, state, _ = model.decoder(targets[:, t : t + 1], state, memory, *ONE)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps), model(*source, targets)[0])


def test_model_training_and_greedy_spelling_are_the_textbooks(vocabularies):
    """Without dropout: the same logits, the same weights after some steps, the same spellings."""
    ours = build(vocabularies)
    textbook = benchmark.TextbookSpeller(*map(len, vocabularies), size=16, dropout=0).eval()
    textbook.load_state_dict(ours.state_dict())
    words = hw2_q3.to_tensors(PAIRS, *vocabularies)
    steps = words.targets[:, 1:] != PAD
    logits = textbook(words.sources, words.lengths, words.targets[:, :-1])[steps]
    torch.testing.assert_close(ours(words.sources, words.lengths, words.targets)[0], logits)

    batch = words.sources, words.lengths, words.targets
    optimizer = torch.optim.SGD(textbook.parameters(), 0.5)
    benchmark.textbook_spelling_epoch(textbook, optimizer, [batch] * 5)
    step = hw2_q3.make_step(ours, torch.optim.SGD(ours.parameters(), 0.5), torch.zeros(3))
    for _ in range(5):
        step(*batch)
    for name, weights in textbook.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], weights, rtol=1e-3, atol=1e-4, msg=name)

    textbook.load_state_dict(ours.state_dict())
    sources = [row[:length] for row, length in zip(words.sources, words.lengths)]
    spelled = [benchmark.textbook_spell(textbook, source) for source in sources]
    greedy = hw2_q3.Speller(ours, *vocabularies).greedy(words)
    assert hw2_q3.only_spellings(greedy) == [[vocabularies[1].decode(s)] for s in spelled]


def test_each_layer_of_the_decoder_starts_from_the_encoders(vocabularies):
    """The final states of both its directions, side by side."""
    model = build(vocabularies, layers=2)
    sources = torch.tensor([[4, 5, 6], [7, 8, 9]])
    _, (hidden, cell) = model.encode(sources, torch.tensor([3, 3]))
    outputs, (own, _) = model.encoder.lstm(model.encoder.embedding(sources))
    assert hidden.shape == cell.shape == (2, 2, 16)
    torch.testing.assert_close(hidden[0], torch.cat((own[0], own[1]), 1))
    last = torch.cat((outputs[:, -1, :8], outputs[:, 0, 8:]), 1)  # forwards, backwards
    torch.testing.assert_close(hidden[1], last)


def test_label_smoothing_and_clipping_by_hand(vocabularies):
    words, losses = hw2_q3.to_tensors(PAIRS, *vocabularies), []
    batch, true = (words.sources, words.lengths, words.targets), words.targets[:, 1:]
    for smoothing, clip in ((0.0, None), (0.2, None), (0.2, 0.01)):
        model, totals = build(vocabularies), torch.zeros(3)
        before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        log_probs = model(*batch)[0].detach().log_softmax(1)
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        hw2_q3.make_step(model, optimizer, totals, smoothing, clip)(*batch)
        if smoothing:  # over what can be written
            log_probs[:, :END] = -torch.inf
            log_probs = log_probs.log_softmax(1)
        own = -log_probs.gather(1, true[true != PAD].unsqueeze(1)).mean()
        spread = log_probs[:, END:].mean() if smoothing else 0
        expected = (1 - smoothing) * own - smoothing * spread
        assert (totals[0] / totals[1]).item() == pytest.approx(expected.item(), rel=1e-5)
        after = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        losses.append((after - before).norm().item())
    assert losses[2] == pytest.approx(0.01, rel=1e-3)
    assert min(losses[:2]) > 0.05


def test_the_output_layer_is_the_embedding(vocabularies):
    model = build(vocabularies)
    assert model.decoder.output.weight is model.decoder.embedding.weight
    names = [name for name, _ in model.named_parameters()]
    assert "decoder.embedding.weight" in names
    assert "decoder.output.weight" not in names


def test_parameter_count_of_the_recipe():
    symbols, characters, h = 107, 93, 128
    vocabularies = [None] * symbols, [None] * characters
    lstm = 2 * (4 * h // 2 * (h + h // 2) + 2 * 4 * h // 2) + 4 * h * 2 * h + 2 * 4 * h
    plain = symbols * h + characters * h + lstm + characters
    attention = h * h + (h * h + h) + h + (2 * h * h + h)
    for use_attn, count in ((False, plain), (True, plain + attention)):
        o = {"hidden_size": h, "dropout": 0.3, "use_attn": use_attn}
        model = hw2_q3.build_model(o, *vocabularies)
        assert sum(p.numel() for p in model.parameters()) == count


# ----------------------------------------------------------------------------------------------
# decoding


def test_input_feeding_by_hand(vocabularies):
    """The second step reads the first one's state with context beside its character."""
    model = build(vocabularies, input_feeding=True)
    decoder, source = model.decoder, (torch.tensor([[4, 5, 6]]), torch.tensor([3]))
    memory, (hidden, cell, fed) = model.encode(*source)
    assert fed.abs().sum() == 0
    logits = []
    for character in (START, 4):
        x = torch.cat((decoder.embedding(torch.tensor([character])), fed[0]), 1)
        hidden, cell = (part.unsqueeze(0) for part in decoder.cells[0](x, (hidden[0], cell[0])))
        x, _ = decoder.attention(hidden[0], torch.tensor([0]), memory)
        logits.append(decoder.output(x))
        fed = x.unsqueeze(0)
    expected = model(*source, torch.tensor([[START, 4, END]]))[0]
    torch.testing.assert_close(torch.cat(logits), expected)


@every_shape
@pytest.mark.parametrize("rows", [2048, 7])
def test_batched_greedy_equals_one_word_at_a_time(vocabularies, monkeypatch, shape, rows):
    monkeypatch.setattr(hw2_q3, "ROWS", rows)
    for seed in range(3):
        speller = build_speller(vocabularies, seed, **shape)
        together = speller.greedy(speller.tensors(PAIRS), 12)
        for pair, [(spelled, score)] in zip(PAIRS, together):
            word = speller.tensors([pair])
            [[alone]] = speller.greedy(word, 12)
            assert alone == (spelled, pytest.approx(score, abs=1e-5))
            assert spelled == plain_greedy(speller.model, word.sources, vocabularies[1], 12)


def plain_greedy(model, sources, characters, max_len):
    """Greedy decoding as a beginner would write it: the whole prefix again for each character."""
    inputs = [START]
    while len(inputs) <= max_len and inputs[-1] != END:
        length = torch.tensor([sources.shape[1]])
        logits = model(sources, length, torch.tensor([[*inputs, END]]))[0][-1]
        logits[[PAD, UNK, START]] = -torch.inf
        inputs.append(int(logits.argmax()))
    return characters.decode(inputs[1:])


def test_an_ensemble_has_the_mean_of_its_models_probabilities(vocabularies):
    """Also of models of different depth and with and without attention, letter by letter."""
    kinds = {"layers": 2}, {"use_attn": False}, {"input_feeding": True}
    models = [build(vocabularies, seed, **kind) for seed, kind in enumerate(kinds)]
    ensemble = hw2_q3.Speller(hw2_q3.Ensemble(models), *vocabularies)
    words = ensemble.tensors(PAIRS[:3])
    for row, [(spelling, log_prob)] in enumerate(ensemble.greedy(words, 6)):
        source, length = words.sources[row : row + 1, : words.lengths[row]], words.lengths[row:][:1]
        letters = [*vocabularies[1].encode(spelling), END][:6]
        target = torch.tensor([[START, *letters, END]])
        probs = 0
        for model in models:
            logits = model(source, length, target)[0][: len(letters)]
            logits[:, :END] = -torch.inf
            probs = probs + logits.softmax(1) / len(models)
        assert probs.argmax(1).tolist() == letters
        total = probs.gather(1, torch.tensor([letters]).T).log().sum()
        assert log_prob == pytest.approx(total.item(), abs=1e-4)


def test_an_ensemble_of_one_model_is_that_model(vocabularies):
    speller = build_speller(vocabularies)
    twice = speller._replace(model=hw2_q3.Ensemble([speller.model, speller.model]).eval())
    words = speller.tensors(PAIRS)
    for one, two in zip(speller.beam(words, 3, 8), twice.beam(words, 3, 8)):
        assert [spelling for spelling, _ in one] == [spelling for spelling, _ in two]
        assert [p for _, p in one] == pytest.approx([p for _, p in two], abs=1e-4)
    assert speller.sample(words, 0.8, 2, 1, 8) == [
        [(spelling, pytest.approx(p, abs=1e-4)) for spelling, p in found]
        for found in twice.sample(words, 0.8, 2, 1, 8)
    ]


def test_a_beam_of_one_is_greedy(vocabularies):
    for seed in range(5):
        speller = build_speller(vocabularies, seed)
        words = speller.tensors(PAIRS)
        greedy, beam = speller.greedy(words, 10), speller.beam(words, 1, 10)
        assert hw2_q3.only_spellings(greedy) == hw2_q3.only_spellings(beam)
        scores = [[score for [(_, score)] in found] for found in (greedy, beam)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def every_spelling(model, sources, size, max_len):
    """{numbers: log-probability} of every spelling of at most max_len characters, END included."""
    memory, state = model.encode(sources, torch.tensor([sources.shape[1]]))
    scores = {}

    def extend(prefix, state, score):
        logits, state, _ = model.decoder(torch.tensor([prefix[-1:]]), state, memory, *ONE)
        logits[:, :END] = -torch.inf
        for number, log_prob in enumerate(logits[0].log_softmax(0).tolist()):
            longer = [*prefix, number]
            if number == END or (number > END and len(longer) > max_len):
                scores[tuple(longer[1:])] = score + log_prob
            elif number > END:
                extend(longer, state, score + log_prob)

    with torch.inference_mode():
        extend([START], state, 0.0)
    return scores


def test_beam_search_finds_the_best_of_all():
    """With a beam as wide as all prefixes the n best are those of an exhaustive search."""
    vocabularies = hw2_q3.Vocabulary.of(["AB"]), hw2_q3.Vocabulary.of(["ab"])
    for seed in range(4):
        model = build(vocabularies, seed)
        sources, lengths = torch.tensor([[4, 5, 4], [5, PAD, PAD]]), torch.tensor([3, 1])
        characters, scores = hw2_q3.beam_search(model, sources, lengths, 16, max_len=4)
        for row, length in enumerate(lengths):
            expected = every_spelling(model, sources[row : row + 1, :length], 6, 4)
            best = sorted(expected.items(), key=lambda item: -item[1])[:16]
            found = [tuple(n for n in spelled if n != PAD) for spelled in characters[row].tolist()]
            assert found == [spelling for spelling, _ in best]
            assert scores[row].tolist() == pytest.approx([score for _, score in best], abs=1e-5)


def test_a_narrow_beam_is_sorted_and_its_scores_are_true():
    vocabularies = hw2_q3.Vocabulary.of(["AB"]), hw2_q3.Vocabulary.of(["ab"])
    model = build(vocabularies, 1)
    sources, lengths = torch.tensor([[4, 5, 4]]), torch.tensor([3])
    characters, scores = hw2_q3.beam_search(model, sources, lengths, 3, max_len=4)
    expected = every_spelling(model, sources, 6, 4)
    found = [tuple(n for n in spelled if n != PAD) for spelled in characters[0].tolist()]
    assert len(set(found)) == 3
    assert scores[0].tolist() == pytest.approx([expected[spelling] for spelling in found], abs=1e-5)
    assert scores[0].tolist() == sorted(scores[0].tolist(), reverse=True)


def test_fewer_spellings_than_the_beam_is_wide(vocabularies):
    speller = build_speller(vocabularies)
    found = speller.beam(speller.tensors(PAIRS[:2]), 40, max_len=1)
    assert [len(options) for options in found] == [7, 7]  # six letters and the empty word


def test_sampled_log_probabilities_are_the_models():
    vocabularies = hw2_q3.Vocabulary.of(["AB"]), hw2_q3.Vocabulary.of(["ab"])
    speller = build_speller(vocabularies, 2)
    words = speller.tensors([(("A", "B"), "")])
    expected = every_spelling(speller.model, words.sources, 6, 5)
    spelled = {vocabularies[1].decode(numbers): score for numbers, score in expected.items()}
    for spelling, score in speller.sample(words, p=1.0, k=20, seed=0, max_len=5)[0]:
        assert score == pytest.approx(spelled[spelling], abs=1e-5)


NUCLEI = {
    "the crossing token is kept": ([0.5, 0.3, 0.15, 0.05], 0.7, [0.5, 0.3, 0, 0]),
    "reached exactly, no more": ([0.5, 0.25, 0.125, 0.125], 0.75, [0.5, 0.25, 0, 0]),
    "one token above p": ([0.05, 0.9, 0.05], 0.8, [0, 0.9, 0]),
    "p tiny": ([0.2, 0.3, 0.5], 1e-50, [0, 0, 0.5]),
    "p = 1 keeps all": ([0.7, 0.3 - 1e-6, 1e-6], 1.0, [0.7, 0.3 - 1e-6, 1e-6]),
    "unsorted": ([0.1, 0.4, 0.2, 0.3], 0.6, [0, 0.4, 0, 0.3]),
    "ties: the first": ([0.25, 0.25, 0.25, 0.25], 0.4, [0.25, 0.25, 0, 0]),
    "a forbidden token": ([0.0, 0.6, 0.4], 1.0, [0, 0.6, 0.4]),
}


@pytest.mark.parametrize(("probs", "p", "kept"), NUCLEI.values(), ids=NUCLEI)
def test_nucleus_by_hand(probs, p, kept):
    expected = torch.tensor([kept]) / sum(kept)
    torch.testing.assert_close(hw2_q3.nucleus(torch.tensor([probs]).log(), p), expected)


def test_nuclei_of_rows_do_not_mix():
    rows = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).log()
    both = hw2_q3.nucleus(rows, 0.75)
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], hw2_q3.nucleus(rows[i : i + 1], 0.75))


def test_the_sampler_has_the_nucleuss_frequencies():
    log_probs = torch.tensor([[0.0, 0.4, 0.3, 0.2, 0.1]]).log().expand(20000, 5)
    drawn = hw2_q3.sampler(0.8, 0, "cpu")(log_probs).bincount(minlength=5) / 20000
    expected = torch.tensor([0, 4 / 9, 3 / 9, 2 / 9, 0])
    torch.testing.assert_close(drawn, expected, atol=0.012, rtol=0)
    assert drawn[[0, 4]].sum() == 0


def test_samples_repeat_by_seed(vocabularies):
    speller = build_speller(vocabularies)
    words = speller.tensors(PAIRS)
    a, b, c = (speller.sample(words, 0.9, 3, seed, 12) for seed in (1, 1, 2))
    assert a == b
    assert a != c
    assert all(len(options) == 3 for options in a)


@pytest.mark.parametrize("p", [0.8, 1.0])
def test_sampling_never_emits_padding_start_or_unknown(vocabularies, p):
    """Even from a model that would like to."""
    model = build(vocabularies)
    with torch.no_grad():
        model.decoder.output.bias[[PAD, UNK, START]] = 50.0
    tensors = hw2_q3.to_tensors(PAIRS, *vocabularies)
    choose = hw2_q3.sampler(p, 0, "cpu")
    numbers, scores = hw2_q3.generate(model, tensors.sources, tensors.lengths, choose, 4, 15)
    assert torch.isfinite(scores).all()
    for row in numbers.flatten(0, 1).tolist():
        end = row.index(END) if END in row else len(row)
        assert all(number > END for number in row[:end])
        assert all(number == PAD for number in row[end + 1 :])


# ----------------------------------------------------------------------------------------------
# scores

CASES = {
    "match": (["abc"], ["abc"], 0, 0),
    "substitution": (["abd"], ["abc"], 1 / 3, 1),
    "insertion": (["abxc"], ["abc"], 1 / 3, 1),
    "deletion": (["ac"], ["abc"], 1 / 3, 1),
    "nothing written": ([""], ["abc"], 1, 1),
    "much too long": (["aaaaaaaaab"], ["b"], 9, 1),
    "letter case counts": (["paris"], ["Paris"], 1 / 5, 1),
    "accents count": (["crudites"], ["crudités"], 1 / 8, 1),
    "summed, not averaged by word": (["x", "abcdefgh"], ["a", "abcdefghi"], 2 / 10, 1),
    "half the words": (["ab", "cd"], ["ab", "ce"], 1 / 4, 1 / 2),
}


@pytest.mark.parametrize(("predicted", "true", "characters", "words"), CASES.values(), ids=CASES)
def test_error_rates(predicted, true, characters, words):
    assert hw2_q3.cer(predicted, true) == pytest.approx(characters)
    assert hw2_q3.wer(predicted, true) == pytest.approx(words)


def distance(a, b):
    """Levenshtein's, by his recurrence."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def test_error_rates_against_the_recurrence():
    torch.manual_seed(0)
    draw = lambda: "".join("abc"[i] for i in torch.randint(0, 3, (5,)))  # noqa: E731
    pairs = [(draw(), draw()) for _ in range(50)]
    predicted, true = zip(*pairs)
    distances = [distance(a, b) for a, b in pairs]
    assert hw2_q3.cer(predicted, true) == sum(distances) / 250
    found = hw2_q3.score_candidates([[word] for word in predicted], true)
    assert found["distances"] == distances


def test_phoneme_error_rates_by_hand():
    """'t͡ʃ' is one phoneme of two characters; a word without any phoneme is empty."""
    true, predicted = ["t͡ʃ iː z", "k æ t"], ["t͡ʃ i z", ""]
    assert hw2_q3.cer(predicted, true, str.split) == 4 / 6
    assert hw2_q3.distances(predicted, true, str.split) == [1, 3]
    found = hw2_q3.score_candidates([[word] for word in predicted], true, 1, str.split)
    assert (found["cer"], found["wer"], found["ranks"]) == (4 / 6, 1, [0, 0])
    words = [[text.split() for text in texts] for texts in (predicted, true)]
    common = hw2_q3.mistakes(*words)["common"]
    assert ["iː", "i", 1] in common
    assert ["k", "", 1] in common


def test_wer_at_k():
    candidates, true = [["a", "b", "c"], ["x", "y", "b"], ["q"]], ["b", "b", "b"]
    assert [hw2_q3.wer_at_k(candidates, true, k) for k in (1, 2, 3, 9)] == [1, 2 / 3, 1 / 3, 1 / 3]


def test_scores_of_lists_of_different_length():
    with pytest.raises(ValueError, match="zip"):
        hw2_q3.cer(["a"], ["a", "b"])


def test_scores_and_mistakes_by_hand():
    true = ["abc", "bad", "cafe", "b"]
    candidates = [["abc", "abd"], ["bed", "bad"], ["kafe", "kaf"], ["ba"]]
    scores = hw2_q3.score_candidates(candidates, true, 2)
    words = {"distances": [0, 1, 1, 1], "ranks": [1, 2, 0, 0]}
    assert scores == {"cer": 3 / 11, "wer": 0.75, "wer@2": 0.5} | words
    final = {"greedy": scores, "lengths": [3, 3, 4, 1]}
    assert hw2_q3.error(final, "greedy", "cer") == 3 / 11
    assert hw2_q3.error(final, "greedy", "wer", [0, 1]) == 0.5
    assert hw2_q3.error(final, "greedy", "wer@3", [0, 1]) == 0
    found = hw2_q3.mistakes(["abc", "bed", "kafe", "ba"], true, most=2)
    assert found == {"kinds": {"insert": 1, "replace": 2}, "common": [["", "a", 1], ["a", "e", 1]]}
    assert hw2_q3.mistakes(["ac"], ["abc"])["common"] == [["b", "", 1]]


# ----------------------------------------------------------------------------------------------
# training and testing


@pytest.fixture
def train(folder, tmp_path):
    """train(argv...) -> (record, checkpoint) of a run of 3 epochs on the small language."""

    def run(*argv, out="out"):
        out = tmp_path / out
        argv = ["--data_dir", folder, "--output_dir", out, "--threads", 1, *argv]
        hw2_q3.main([str(word) for word in ("--hidden_size", 16, "--n_epochs", 3, *argv)])
        (record,), (checkpoint,) = out.glob("figures/runs/*"), out.glob("checkpoints/*.pt")
        return utils.load_record(record), utils.load_checkpoint(checkpoint)

    return run


PARTS = ("model", "best")


def test_overfits_twenty_words(train, tmp_path):
    write_tsv(tmp_path / "words", dict.fromkeys(("train", "valid", "test"), PAIRS[:20]))
    argv = "--use_attn --dropout 0 --n_epochs 60 --hidden_size 48 --lr 0.01 --batch_size 8"
    record, _ = train(*argv.split())
    assert min(record["history"]["val_cer"]) == 0
    greedy = {"cer": 0, "wer": 0, "wer@1": 0, "distances": [0] * 20, "ranks": [1] * 20}
    assert record["final"]["greedy"] == greedy
    assert record["final"]["mistakes"] == {"kinds": {}, "common": []}


def test_several_seeds_are_the_runs_one_by_one(folder, tmp_path, capsys, monkeypatch):
    """Also where paths are relative to a folder that is not the project's."""
    monkeypatch.chdir(tmp_path)
    words = f"--n_epochs 2 --hidden_size 8 --data_dir {folder.name} --output_dir .".split()
    hw2_q3.main([*words, "--seed", "1", "2", "--jobs", "2", "--use_attn"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    alone = tmp_path / "alone"
    argv = "--seed", "2", "--use_attn", "--threads", "1", "--output_dir", str(alone)
    hw2_q3.main([*words, *argv])
    [path] = (alone / "checkpoints").glob("*.pt")
    pairs = []
    for place in (tmp_path, alone):
        record = utils.load_record(place / "figures" / "runs" / f"{path.stem}.json")
        pairs.append((record, utils.load_checkpoint(place / "checkpoints" / path.name)))
    assert_equal_runs(*pairs, parts=("model", "best"))
    assert f"{path.stem}: {hw2_q3.summary(pairs[0][0])}" in lines


def test_an_ensemble_trains_what_is_missing_and_is_scored_as_one(folder, tmp_path, capsys):
    where = ["--data_dir", folder, "--output_dir", tmp_path, "--n_epochs", 2, "--hidden_size", 8]
    argv = [str(word) for word in (*where, "--seed", 1, 2, "--ensemble", "--beam_size", 2)]
    hw2_q3.main(argv)
    assert "Beam search, size 2, the best:" in capsys.readouterr().out
    records = {path.name: path.read_bytes() for path in tmp_path.glob("figures/runs/*")}
    assert len(records) == 3
    [name] = [name for name in records if "ensemble" in name]
    record = utils.load_record(tmp_path / "figures" / "runs" / name)
    assert record["config"]["options"]["seed"] == [1, 2]
    assert (
        record["command"] == "python hw2_q3.py --n_epochs 2 --hidden_size 8 --ensemble --seed 1 2"
    )
    one, other = tmp_path.glob("checkpoints/*.pt")
    saved = utils.load_checkpoint(other)  # as if its training had been interrupted there
    short = {column: values[:1] for column, values in saved["history"].items()}
    saved |= {"history": short, "seconds": saved["seconds"][:1], "finished": False}
    utils.save_checkpoint(other, **saved)
    with pytest.raises(utils.UserError, match="not trained to its end"):
        hw2_q3.main(["test", *argv])
    capsys.readouterr()
    hw2_q3.main(argv)
    assert f"{one.stem}: Test CER" in capsys.readouterr().out
    assert len(utils.load_checkpoint(other)["seconds"]) == 2
    path = tmp_path / "figures" / "runs" / f"{one.stem}.json"
    trained = {key: value for key, value in utils.load_record(path).items() if key != "final"}
    utils.save_record(path, trained)  # as if it had only been trained
    hw2_q3.main(argv)
    assert f"{one.stem}: trained, not tested (from its record)" in capsys.readouterr().out
    one.unlink()
    other.unlink()  # as in a clone, which has records alone
    hw2_q3.main(argv)
    again = utils.load_record(tmp_path / "figures" / "runs" / name)
    assert again["final"] == record["final"]
    paths = tmp_path.glob("checkpoints/*.pt")
    spellers = [hw2_q3.load_speller(path, "cpu")[0] for path in paths]
    ensemble = spellers[0]._replace(model=hw2_q3.Ensemble([s.model for s in spellers]))
    words = ensemble.tensors(PAIRS[8:18])
    [wer] = {hw2_q3.wer([found[0][0] for found in ensemble.greedy(words)], words.spellings)}
    assert record["final"]["greedy"]["wer"] == wer
    capsys.readouterr()
    hw2_q3.main(["spell", "C A B", *argv])
    out, err = capsys.readouterr()
    assert "the ensemble" in err
    [found] = ensemble.beam(ensemble.tensors([(("C", "A", "B"), "")]), 2)
    assert [line.split("\t")[1] for line in out.splitlines()] == [w for w, _ in found]
    for size, kept in ((5, False), (2, True)):  # the report compares beams of 5
        hw2_q3.main(["test", *argv, "--beam_size", str(size)])
        assert ("The record keeps the scores" in capsys.readouterr().out) == kept
    assert utils.load_record(tmp_path / "figures" / "runs" / name)["final"]["beam"]["size"] == 5


def test_what_was_only_trained_is_only_tested(train, monkeypatch):
    record, _ = train("train")
    assert "final" not in record
    monkeypatch.setattr(hw2_q3, "train_epoch", None)
    again, _ = train()
    assert again["history"] == record["history"]
    assert "final" in again


def test_a_model_without_its_record_is_not_tested(train, tmp_path, folder, fails, monkeypatch):
    record, _ = train()
    (path,) = tmp_path.glob("out/figures/runs/*.json")
    path.unlink()
    monkeypatch.setattr(hw2_q3, "score", None)
    argv = ["--data_dir", folder, "--output_dir", tmp_path / "out"]
    line = fails(hw2_q3.main, ["test", *record["command"].split()[2:], *argv])
    assert f"{path}: no such record" in line


@pytest.mark.parametrize("mode", ["test", "spell"])
def test_an_ensemble_of_models_that_are_not_there(folder, tmp_path, fails, mode):
    argv = [mode, "--ensemble", "--seed", 1, 2, "--data_dir", folder, "--output_dir", tmp_path]
    assert "-seed1-pronunciations-" in fails(hw2_q3.main, argv)


@pytest.mark.parametrize("argv", [["--use_attn"], []], ids=["attention", "plain"])
def test_output_record_and_figures_of_a_run(train, tmp_path, capsys, argv, words):
    record, saved = train(*argv, "--nucleus", "--beam_size", 4)
    lines = capsys.readouterr().out.splitlines()
    final = record["final"]
    assert sum("Validation CER: " in line for line in lines) == 3
    scores = [line for line in lines if line.startswith("Test CER: ")]
    expected = [final[name] for name in ("greedy", "nucleus", "beam")]
    assert scores == [f"Test CER: {s['cer']:.4f}, Test WER: {s['wer']:.4f}" for s in expected]
    assert any("p = 0.8" in line for line in lines)
    at = lines.index("Printing first 10 examples with multiple predictions:")
    for line, (word, spellings) in zip(lines[at + 1 : at + 11], final["examples"]):
        assert line == f"({word!r}, {{{', '.join(map(repr, spellings))}}})"
        assert len(set(spellings)) == len(spellings) <= 3
    assert [word for word, _ in final["examples"]] == [w for _, w in words.splits["test"]]
    assert lines[at + 11] == f"Test WER@3: {final['nucleus']['wer@3']:.4f}"
    at = lines.index("Printing first 10 examples with their 3 best and log-probabilities:")
    assert [word for word, _ in final["beam"]["examples"]] == [w for w, _ in final["examples"]]
    for line, (word, found) in zip(lines[at + 1 : at + 11], final["beam"]["examples"]):
        assert ast.literal_eval(line) == (word, dict(found))
        assert [score for _, score in found] == sorted((s for _, s in found), reverse=True)
        assert len(dict(found)) == len(found) == 3
    assert lines[at + 11] == f"Test WER@3: {final['beam']['wer@3']:.4f}"
    for curve in final["curves"].values():
        assert len(curve) == 10
        assert curve == sorted(curve, reverse=True)
    assert record["best_epoch"] == 1 + record["history"]["val_cer"].index(
        min(record["history"]["val_cer"])
    )
    assert saved["finished"]
    (figures,) = (tmp_path / "out" / "figures").glob("q3-*")
    names = {"validation-cer", "wer-at-k"} | ({"attention"} if argv else set())
    assert {path.stem for path in figures.iterdir()} == names
    for path in figures.iterdir():
        assert Image.open(path).width >= 600
    for example in final["attention"]:
        weights = torch.tensor(example["weights"])
        assert weights.shape == (len(example["letters"]), len(example["phonemes"]))
        torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)), atol=1e-3, rtol=0)
    assert len(final["attention"]) == (4 if argv else 0)
    assert str(tmp_path) not in json.dumps(record)


def test_the_best_epochs_weights_are_tested(train, monkeypatch, tmp_path):
    """The second of three epochs is made the best by its score; of equal ones the first is."""
    scores = iter([0.9, 0.3, 0.3])
    weights = []

    def cer(predicted, true, split):
        return next(scores, 0.0)

    real_save = utils.save_run

    def save(run, model, *args, **kwargs):
        weights.append({name: w.clone() for name, w in model.state_dict().items()})
        real_save(run, model, *args, **kwargs)

    monkeypatch.setattr(hw2_q3, "cer", cer)
    monkeypatch.setattr(utils, "save_run", save)
    record, saved = train()
    assert record["best_epoch"] == 2
    for name, best in saved["best"].items():
        assert torch.equal(best, weights[1][name])
        assert torch.equal(saved["model"][name], weights[2][name])
    [path] = tmp_path.glob("out/checkpoints/*.pt")
    speller, _ = hw2_q3.load_speller(path, "cpu")
    for name, tested in speller.model.state_dict().items():
        assert torch.equal(tested, weights[1][name])


def test_an_epoch_looks_at_every_batchs_loss(vocabularies, words):
    pairs = hw2_q3.to_tensors(words.splits["train"], *vocabularies)
    totals, batches = torch.zeros(3), []

    def step(*batch):
        batches.append(batch)
        loss = math.nan if len(batches) == 3 else 1.0
        totals.add_(torch.tensor([loss, 1.0, float(math.isfinite(loss))]))

    with pytest.raises(utils.Diverged) as stop:
        hw2_q3.train_epoch(step, totals, pairs, 2)
    assert stop.value.batch == len(batches) == 3


def test_an_unfinished_checkpoint_leaves_the_record_alone(train, tmp_path, folder, monkeypatch):
    """Trained anew and killed after an epoch, then tested: the record is still the first one's."""
    record, _ = train()
    real_save = utils.save_run

    def save(*args, **kwargs):
        real_save(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(utils, "save_run", save)
    with pytest.raises(Killed):
        train()
    argv = f"test --data_dir {folder} --output_dir {tmp_path / 'out'} --hidden_size 16 --n_epochs 3"
    hw2_q3.main(argv.split())
    [path] = tmp_path.glob("out/figures/runs/*")
    assert utils.load_record(path) == record


def test_the_longest_spelling_is_as_asked(train, capsys):
    record, _ = train("--max_len", 2)
    assert record["final"]["max_len"] == 2
    assert all(len(s) <= 2 for _, spellings in record["final"]["examples"] for s in spellings)
    assert hw2_q3.spelled_alike([record]) == []  # so the report's tables leave it out
    assert f"{record['command']}: left out" in capsys.readouterr().err


def test_other_decoding_options_leave_the_scores_of_the_report_alone(
    train, folder, tmp_path, capsys
):
    record, _ = train()
    assert hw2_q3.is_spelled_alike(record)
    argv = f"test --data_dir {folder} --output_dir {tmp_path / 'out'} --hidden_size 16 --n_epochs 3"
    for more in ("--k 5", "--topp 0.9", "--beam_size 3", "--max_len 7"):
        hw2_q3.main(f"{argv} {more}".split())
        assert "The record keeps the scores" in capsys.readouterr().out
    [path] = tmp_path.glob("out/figures/runs/*")
    assert utils.load_record(path) == record


def test_spell_chooses_among_the_models_of_the_words_that_are_meant(
    train, folder, tmp_path, capsys
):
    train()
    (first,) = tmp_path.glob("out/checkpoints/*.pt")
    saved = utils.load_checkpoint(first)

    def save(name, error, **more):
        config = saved["config"] | {"data": saved["config"]["data"] | {"name": name} | more}
        history = saved["history"] | {"val_cer": [error] * len(saved["seconds"])}
        path = first.with_name(f"q3-{name}.pt")
        utils.save_checkpoint(path, **saved | {"config": config, "history": history})

    def chosen(*more):
        hw2_q3.main(["spell", "k æ t", "--output_dir", str(tmp_path / "out"), *more])
        return capsys.readouterr().err

    first.unlink()
    save("portuguese", 0.1, fingerprint="of Portuguese")
    assert "trained on the words in data/portuguese, validation CER 0.1000" in chosen()
    save("pronunciations", 0.5)
    assert "trained on your words, validation CER 0.5000" in chosen()
    assert "validation CER 0.5000" in chosen("--data_dir", str(tmp_path))
    assert "validation CER 0.5000" in chosen("--data_dir", str(folder))
    save("pronunciations", 0.3, fingerprint="of others")
    assert "validation CER 0.3000" in chosen()
    with pytest.raises(utils.UserError, match="no trained network there"):
        chosen("--data_dir", str(folder))  # which has other words than the model


@pytest.mark.parametrize("losses", [[math.nan], [0.5, math.inf]])
def test_a_loss_that_explodes_stops_the_run(train, monkeypatch, tmp_path, losses):
    left = iter(losses)

    def train_epoch(step, totals, *rest):
        totals[:] = totals.new_tensor([next(left), 1, 6])
        utils.check_totals(totals, 7, 10)
        return totals[0].item()

    monkeypatch.setattr(hw2_q3, "train_epoch", train_epoch)
    where = f"epoch {len(losses)}, batch 7, and training stopped"
    with pytest.raises(utils.UserError, match=where):
        train()
    (record,) = map(utils.load_record, tmp_path.glob("out/figures/runs/*"))
    assert record["history"].get("train_loss", []) == losses[:-1]
    assert "final" not in record


def test_the_same_run_twice_gives_the_same_bits(train):
    first, second = (train("--use_attn", out=out) for out in "ab")
    assert_equal_runs(first, second, PARTS)


@pytest.mark.parametrize("recipe", ["report", "best"])
@pytest.mark.parametrize("moment", ["after an epoch", "within an epoch", "before the test"])
def test_a_killed_run_continues_to_the_same_bits(train, monkeypatch, capsys, moment, recipe):
    argv = ["--use_attn", "--n_epochs", 5, "--batch_size", 4, "--recipe", recipe]
    real_save, real_step, real_test = utils.save_run, hw2_q3.make_step, hw2_q3.test
    done = []

    def save(*args, **kwargs):
        real_save(*args, **kwargs)
        done.append(1)
        if moment == "after an epoch" and len(done) == 2:
            raise Killed

    def make_step(*args):
        step = real_step(*args)

        def dying(*batch):
            step(*batch)
            if moment == "within an epoch" and len(done) == 2:
                raise Killed

        return dying

    def test(*args):
        if moment == "before the test":
            raise Killed
        real_test(*args)

    with monkeypatch.context() as patch:
        patch.setattr(utils, "save_run", save)
        patch.setattr(hw2_q3, "make_step", make_step)
        patch.setattr(hw2_q3, "test", test)
        with pytest.raises(Killed):
            train(*argv)
    capsys.readouterr()
    continued = train(*argv)
    epochs = 5 if moment == "before the test" else 2
    assert f"Going on after epoch {epochs}" in capsys.readouterr().out
    whole = train(*argv, out="undisturbed")
    assert_equal_runs(continued, whole, PARTS)


def test_a_finished_run_and_restart_begin_anew(train, monkeypatch, capsys):
    first = train("--use_attn")

    def stop(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(hw2_q3, "test", stop)
        with pytest.raises(Killed):
            train("--use_attn")
    again = train("--use_attn", "--restart")
    assert "Going on" not in capsys.readouterr().out
    assert_equal_runs(first, again, PARTS)


def test_train_then_test_is_the_same_as_both(train, folder, tmp_path, capsys):
    both = train("--nucleus", out="both")
    text = capsys.readouterr().out
    argv = ["--data_dir", folder, "--output_dir", tmp_path / "apart", "--hidden_size", 16]
    argv = [str(word) for word in (*argv, "--n_epochs", 3, "--threads", 1)]
    hw2_q3.main(["train", *argv])
    assert "Test CER" not in capsys.readouterr().out
    hw2_q3.main(["test", "--nucleus", *argv])
    again = capsys.readouterr().out
    (record,) = (tmp_path / "apart" / "figures" / "runs").iterdir()
    (checkpoint,) = (tmp_path / "apart" / "checkpoints").glob("*.pt")
    apart = utils.load_record(record), utils.load_checkpoint(checkpoint)
    assert_equal_runs(apart, both, PARTS)
    tail = text[text.index("Test CER") : text.index("Figures")]
    assert tail in again
    hw2_q3.main(["test", "--nucleus", *argv])
    assert tail in capsys.readouterr().out


def test_another_checkpoint_is_tested_but_not_recorded(train, folder, tmp_path, capsys):
    train("--use_attn", "--checkpoint_name", "mine.pt", out="a")
    mine = tmp_path / "a" / "checkpoints" / "mine.pt"
    argv = ["--data_dir", folder, "--output_dir", tmp_path / "b", "--checkpoint_name", mine]
    hw2_q3.main(["test", *map(str, argv)])
    output = capsys.readouterr().out
    assert "Test CER" in output
    assert "no record" in output
    assert not (tmp_path / "b").exists()


def test_bad_checkpoints(train, folder, tmp_path, fails):
    argv = ["test", "--data_dir", folder, "--output_dir", tmp_path]
    assert "train the model first" in fails(hw2_q3.main, argv)
    save_checkpoint(tmp_path / "x.pt")
    argv += ["--checkpoint_name", tmp_path / "x.pt"]
    assert "not a model of question 3" in fails(hw2_q3.main, argv)


def test_without_data_the_sample_is_used_and_marked(tmp_path, monkeypatch, capsys, words):
    monkeypatch.setattr(hw2_q3, "DATA_DIR", tmp_path)
    small = utils.Pronunciations(words.splits, "sample")
    monkeypatch.setattr("data.sample.choose_pronunciations", lambda: small)
    argv = ["--n_epochs", 1, "--hidden_size", 8, "--nucleus", "--output_dir", tmp_path]
    hw2_q3.main([str(word) for word in argv])
    output = capsys.readouterr().out
    assert "built-in SAMPLE" in output
    assert output.count("(built-in sample)") == 3
    assert list(tmp_path.glob("figures/runs/*-sample-*.json"))


def test_audit_counts_words_on_two_sides_and_new_symbols():
    train, held_out = [(("A",), "a")], [(("A",), "a"), (("B", "A"), "ba")]
    data = utils.Pronunciations({"train": train, "val": held_out, "test": held_out[1:]})
    text = " ".join(hw2_q3.audit(data))
    assert "1 training, 2 validation, 1 test" in text
    assert "1 of validation, 0 of test" in text
    assert "1 phonemes (B), 1 characters (b)" in text


def test_the_assignments_split(real_data):
    data = utils.load_pronunciations(real_data / "pronunciations")
    assert [len(data.splits[split]) for split in utils.SPLITS] == [10000, 1000, 1000]
    assert "42 of validation, 45 of test" in " ".join(hw2_q3.audit(data))
    assert data.splits["test"][0] == (("ɹ", "ə", "m", "e", "ɪ", "n", "d", "ɚ"), "remainder")


# ----------------------------------------------------------------------------------------------
# spelling


@pytest.fixture
def spell(train, tmp_path, capsys):
    """spell(argv...) -> rows of the output, fields split, and what was said on stderr."""
    train("--use_attn", "--n_epochs", 5)
    capsys.readouterr()

    def run(*argv):
        hw2_q3.main([str(word) for word in ("spell", *argv, "--output_dir", tmp_path / "out")])
        out, err = capsys.readouterr()
        return [line.split("\t") for line in out.splitlines()], err

    return run


def test_spelling_arguments_files_and_standard_input(spell, tmp_path, monkeypatch):
    rows, err = spell("C A B", "D A D")
    assert [row[0] for row in rows] == ["C A B", "D A D"]
    assert "validation CER" in err
    (tmp_path / "ipa.txt").write_text("C A B\n\nD A D\n")
    assert spell("--input", tmp_path / "ipa.txt")[0] == rows
    for argv in ([], ["--input", "-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("C A B\nD A D\n"))
        assert spell(*argv)[0] == rows
    assert spell("CAB", "DAD")[0] == rows  # without spaces


def test_a_checkpoint_that_is_not_there_leaves_no_folder(folder, tmp_path, fails):
    name = tmp_path / "no" / "such.pt"
    argv = ["test", "--checkpoint_name", name, "--data_dir", folder, "--output_dir", tmp_path / "o"]
    assert "no such checkpoint" in fails(hw2_q3.main, argv)
    assert not name.parent.exists()
    assert not (tmp_path / "o").exists()


def test_standard_input_may_begin_as_editors_begin_files(monkeypatch):
    """With a byte order mark, where it is no terminal."""
    stdin = io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfC A B\n"), encoding="latin-1")
    monkeypatch.setattr(sys, "stdin", stdin)
    utils.run_script(lambda: None)
    assert list(hw2_q3.read_lines(None)) == [["C A B\n"]]


def test_a_long_file_is_read_in_parts(tmp_path):
    (tmp_path / "ipa.txt").write_text("\ufeffA\r\nB\n\nC", encoding="utf-8")
    parts = list(hw2_q3.read_lines(tmp_path / "ipa.txt", most=3))
    assert [[line.strip() for line in part] for part in parts] == [["A", "B", ""], ["C"]]


@pytest.mark.parametrize("end", ["", EOFError], ids=["empty line", "end of input"])
def test_spelling_at_a_prompt(spell, monkeypatch, end):
    answers = iter(["C A B", "D A D", end])

    def answer(prompt):
        text = next(answers)
        if text is EOFError:
            raise EOFError
        return text

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", answer)
    assert [row[0] for row in spell()[0]] == ["C A B", "D A D"]


def test_spelling_candidates_with_log_probabilities(spell):
    rows, _ = spell("C A B", "--beam_size", 4)
    scores = [float(row[2]) for row in rows]
    assert len({row[1] for row in rows}) == 4
    assert scores == sorted(scores, reverse=True)
    assert all(score <= 0 for score in scores)
    sampled, _ = spell("C A B", "--nucleus", "--k", 5)
    spellings = [row[1] for row in sampled]
    assert 1 <= len(set(spellings)) == len(spellings) <= 5
    assert spell("C A B", "--nucleus", "--k", 5)[0] == sampled
    scores = [float(row[2]) for row in sampled]
    assert scores == sorted(scores, reverse=True)


def test_the_other_direction_pronounces(train, spell, tmp_path, capsys, words):
    """Beside a model that spells, each is asked in its own direction."""
    argv = ["--data_dir", str(tmp_path / "words"), "--output_dir", str(tmp_path / "out")]
    argv += [
        "--hidden_size",
        "16",
        "--n_epochs",
        "5",
        "--use_attn",
        "--direction",
        "g2p",
        "--nucleus",
    ]
    hw2_q3.main(argv)
    output = capsys.readouterr().out
    [path] = tmp_path.glob("out/figures/runs/q3-g2p-*.json")
    record = utils.load_record(path)
    greedy, sounds = record["final"]["greedy"], [sound for sound, _ in words.splits["test"]]
    assert f"Test PER: {greedy['cer']:.4f}, Test WER: {greedy['wer']:.4f}\n" in output
    assert "CER" not in output
    assert record["final"]["lengths"] == [len(sound) for sound in sounds]
    speller, _ = hw2_q3.load_speller(tmp_path / "out" / "checkpoints" / f"{path.stem}.pt", "cpu")
    pairs = [(tuple(word), " ".join(sound)) for sound, word in words.splits["test"]]
    found = [candidates[0][0] for candidates in speller.greedy(speller.tensors(pairs))]
    assert greedy["cer"] == hw2_q3.cer(found, [text for _, text in pairs], str.split)
    assert set(" ".join(found).split()) <= set("ABCDEF")
    assert record["final"]["examples"][0][0] == " ".join(sounds[0])
    rows, err = spell("dad", "--direction", "g2p")
    assert path.stem in err
    assert "validation PER" in err
    assert rows[0][:2] == ["dad", found[[word for _, word in words.splits["test"]].index("dad")]]
    assert "Unknown letters: q" in spell("qad", "--direction", "g2p")[1]
    assert path.stem not in spell("D A D")[1]


def test_unknown_phonemes_are_reported(spell):
    rows, err = spell("C ʘ B")
    assert "Unknown phonemes: ʘ" in err
    assert rows[0][0] == "C ʘ B"
    assert "Unknown" not in spell("C A B")[1]


def test_bad_input_for_spelling(spell, tmp_path, fails):
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe")
    for name in (tmp_path / "none.txt", tmp_path / "x.txt"):
        argv = ["spell", "--input", name, "--output_dir", tmp_path / "out"]
        assert "cannot be read" in fails(hw2_q3.main, argv)
    assert "no trained network" in fails(
        hw2_q3.main, ["spell", "a", "--output_dir", tmp_path / "no"]
    )


def test_segmenting_by_the_longest_phoneme():
    phonemes = hw2_q3.Vocabulary.of([("t", "t͡ʃ", "a", "aː")])
    assert hw2_q3.segment("t͡ʃaːta", phonemes) == ["t͡ʃ", "aː", "t", "a"]
    assert hw2_q3.segment(" t͡ʃ  a x ", phonemes) == ["t͡ʃ", "a", "x"]
    assert hw2_q3.segment("tx", phonemes) == ["t", "x"]


def test_bytes_that_are_no_text_are_unknown_phonemes(spell, tmp_path):
    """Through a real pipe, in a locale that is not UTF-8."""
    command = [sys.executable, "hw2_q3.py", "spell", "--output_dir", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    given = {"cwd": utils.ROOT, "env": environment, "input": b"C \xc3\xa6 \xff\n"}
    done = subprocess.run(command, capture_output=True, check=True, **given)
    assert done.stdout.decode().startswith("C æ \\xff\t")
    assert "Unknown phonemes: \\xff æ" in done.stderr.decode()
