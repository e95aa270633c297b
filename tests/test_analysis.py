"""What only the report measures, against other code."""

import pytest
import torch

import hw2_q2
import hw2_q3
import utils
from figures import analysis_q2, analysis_q3

CPU = torch.device("cpu")


def prepare(landscapes, words):
    """A network, its arguments and the splits."""
    args = hw2_q2.parse_args(words.split())
    splits = {
        name: hw2_q2.to_device(*split, CPU, args) for name, split in landscapes.splits.items()
    }
    torch.manual_seed(0)
    return hw2_q2.build_model(args).eval(), args, splits


def test_every_epoch_is_scored_as_in_training(landscapes_path, landscapes, tmp_path, monkeypatch):
    """An average with decay 0 is the last weights."""
    monkeypatch.setattr(analysis_q2, "EMA_DECAY", 0.0)
    words = "-epochs 3 -learning_rate 0.03 -last_batch keep -device cpu -threads 1"
    places = ["-data_path", str(landscapes_path), "-output_dir", str(tmp_path)]
    hw2_q2.main([*words.split(), *places])
    history = utils.load_record(next(tmp_path.glob("figures/runs/*.json")))["history"]
    model, args, splits = prepare(landscapes, words)
    scores = analysis_q2.score_every_epoch(model, args, splits)
    assert scores["as they are"] == scores["average"] == history["val_accuracy"]
    assert len(scores["statistics"]) == 3


def test_statistics_recomputed_by_hand(landscapes, monkeypatch):
    """The first batch norm's running mean is that of its inputs over all training images."""
    model, args, splits = prepare(landscapes, "-epochs 1")
    update_bn, updated = analysis_q2.update_bn, []

    def update(batches, network):
        update_bn(batches, network)
        updated.append(network)

    monkeypatch.setattr(analysis_q2, "update_bn", update)
    analysis_q2.score_every_epoch(model, args, splits)
    [network] = updated
    with torch.no_grad():
        inputs = network.convs[0].conv(hw2_q2.to_float(splits["train"][0]))
    assert torch.allclose(network.convs[0].norm.running_mean, inputs.mean((0, 2, 3)), atol=1e-5)


def test_grad_cam_of_a_network_with_a_linear_head(landscapes):
    """Its output layer's weights then weigh the feature maps (Zhou et al. 2016, section 2)."""
    model, args, splits = prepare(landscapes, "-model resnet")
    found = analysis_q2.grad_cam(model, args, splits)
    assert splits["test"][1][found["images"]].tolist() == list(range(6))
    with torch.no_grad():
        for i, guess, heat in zip(*found.values(), strict=True):
            image = hw2_q2.to_float(splits["test"][0][i : i + 1])
            assert model(image).argmax() == guess
            features = model.convs(image)[0]  # (160, 3, 3)
            expected = torch.einsum("c,chw->hw", model.output.weight[guess], features).relu()
            assert torch.allclose(torch.tensor(heat), expected / expected.max(), atol=1e-3)


def test_grad_cam_without_images_of_a_class(landscapes):
    model, args, splits = prepare(landscapes, "")
    images, labels = splits["test"]
    found = analysis_q2.grad_cam(model, args, {"test": (images[labels > 1], labels[labels > 1])})
    assert len(found["maps"]) == 4


def test_filters_are_the_first_layers(landscapes):
    model, args, splits = prepare(landscapes, "")
    weight = torch.tensor(analysis_q2.first_filters(model, args, splits))
    assert torch.allclose(weight, model.convs[0].conv.weight.detach(), atol=6e-4)


def test_sampling_at_low_temperature_is_greedy(monkeypatch):
    """And with temperature 1 and p = 1 it draws what --nucleus draws."""
    args = hw2_q3.parse_args(["--use_attn", "--hidden_size", "8", "--seed", "3"])
    pairs = [(tuple("kæt"), "cat"), (tuple("bɛd"), "bed")] * 3
    data = utils.Pronunciations({"train": pairs, "val": pairs, "test": pairs}, "words")
    source, target = hw2_q3.make_vocabularies(args, data)
    torch.manual_seed(0)
    speller = hw2_q3.Speller(hw2_q3.build_model(args, source, target), source, target)
    encoded = speller.encode(pairs)
    monkeypatch.setattr(analysis_q3, "TEMPERATURES", (1e-4, 1.0))
    monkeypatch.setattr(analysis_q3, "P_VALUES", (1.0,))
    scores = analysis_q3.sampling_errors(speller, args, encoded)
    assert scores["as trained"] == scores["unsmoothed"]  # it was trained without label smoothing
    cold, plain = scores["as trained"]
    greedy = hw2_q3.score_candidates(
        hw2_q3.spellings(speller.greedy(encoded, args.max_len)), encoded.spellings
    )
    samples = speller.sample(encoded, 1.0, 3, hw2_q3.make_generator(args, CPU), args.max_len)
    drawn = hw2_q3.score_candidates(hw2_q3.spellings(samples), encoded.spellings, 3)
    assert cold == [1e-4, 1.0, greedy["cer"], greedy["wer"]]
    assert plain == pytest.approx([1.0, 1.0, drawn["cer"], drawn["wer@3"]])
