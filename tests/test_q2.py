"""Question 2: networks, training, runs, runs side by side, CUDA, prediction."""

import json
import math
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import hw2_q2
import utils
from figures.report_q2 import load_thumbnails
from tests.benchmark import TextbookCNN
from tests.conftest import DATA, assert_equal_runs, load_run, needs_cuda, save_checkpoint
from utils import CLASSES


def main(*argv):
    hw2_q2.main(["-device", "cpu", "-threads", "1", *map(str, argv)])


def parse(line=""):
    return hw2_q2.parse_args(line.split())


def build(line=""):
    return hw2_q2.build_model(parse(line))


# ----------------------------------------------------------------------------------------------
# networks

KERNELS = 3 * 32 + 32 * 64 + 64 * 128  # of the three convolutions: a weight each if 1 x 1
SHAPES = {  # options: (parameters, side of the last feature map)
    "": (755_718, 6),
    "-no_batch_norm": (5_340_742, 6),
    "-no_batch_norm -head gap": (755_718 - 2_496, 6),
    "-no_batch_norm -no_maxpool": (5_340_742, 6),
    "-pool avg -head flatten": (5_340_742 + 2 * (32 + 64 + 128) + 2 * 1024, 6),
    "-pool none -kernel_size 5": (755_718 + (5**2 - 3**2) * KERNELS, 48),
    "-no_maxpool -kernel_size 11": (755_718 + (11**2 - 3**2) * KERNELS, 6),
    "-kernel_size 1": (755_718 - (3**2 - 1) * KERNELS, 6),
    "-kernel_size 48": (755_718 - 93_248 - 2 * (32 + 64) + 3 * 128 * 48**2 + 128, 1),
    "-convs 2": (755_718 + sum(9 * c * c + c + 2 * c for c in (32, 64, 128)), 6),
    "-model resnet": (889_446, 3),
}


@pytest.mark.parametrize(("line", "shape"), SHAPES.items(), ids=SHAPES)
def test_parameters_and_shapes(line, shape):
    model, images = build(line).eval(), torch.rand(2, 3, 48, 48)
    assert (utils.count_parameters(model), model.convs(images).shape[-1]) == shape
    torch.testing.assert_close(model(images).exp().sum(1), torch.ones(2))


def test_parameter_tables_by_hand(capsys):
    hw2_q2.main(["-count_params"])
    tables = capsys.readouterr().out.strip().split("\n\n")
    plain, norm = ([re.split(r"\s{2,}", row) for row in t.splitlines()[2:]] for t in tables)
    assert norm == [
        ["convs.0.conv", "32 x 48 x 48", "3 x 32 x 3 x 3 + 32", "896"],
        ["convs.0.norm", "32 x 48 x 48", "2 x 32", "64"],
        ["convs.1.conv", "64 x 24 x 24", "32 x 64 x 3 x 3 + 64", "18,496"],
        ["convs.1.norm", "64 x 24 x 24", "2 x 64", "128"],
        ["convs.2.conv", "128 x 12 x 12", "64 x 128 x 3 x 3 + 128", "73,856"],
        ["convs.2.norm", "128 x 12 x 12", "2 x 128", "256"],
        ["fc1", "1024", "128 x 1024 + 1024", "132,096"],
        ["norm", "1024", "2 x 1024", "2,048"],
        ["fc2", "512", "1024 x 512 + 512", "524,800"],
        ["fc3", "6", "512 x 6 + 6", "3,078"],
        ["trainable parameters", "755,718"],
    ]
    fc1 = ["fc1", "1024", "4608 x 1024 + 1024", "4,719,616"]
    assert plain == [*norm[0:6:2], fc1, *norm[8:10], ["trainable parameters", "5,340,742"]]


def test_average_pooling_comes_after_relu():
    block = hw2_q2.ConvBlock(1, 1, kernel_size=1, batch_norm=False, pool="avg", dropout=0)
    nn.init.ones_(block.conv.weight)
    nn.init.zeros_(block.conv.bias)
    assert block(torch.tensor([[[[8.0, -8.0], [4.0, -100.0]]]])).item() == (8 + 0 + 4 + 0) / 4


def test_a_residual_block_adds_its_input():
    block, x = hw2_q2.ResidualBlock(4, dropout=0), torch.rand(2, 4, 6, 6)
    torch.testing.assert_close(block(x), x + F.relu(block.norm(block.conv(x))))


def test_bfloat16_is_for_convolutions_only():
    """Everything after them, weights and gradients stay float32; the output is nearly the same."""
    images, outputs, types = torch.rand(8, 3, 48, 48), [], []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model = build(f"-dropout 0 -precision {precision}")
        weight = model.convs[0].conv.weight
        model.convs[0].conv.register_forward_hook(lambda layer, x, y: types.append(y.dtype))
        outputs.append(model(images))
        outputs[-1][:, 0].sum().backward()
        assert outputs[-1].dtype == weight.grad.dtype == torch.float32
    assert types == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(*outputs, atol=0.05, rtol=0)
    assert not torch.equal(*outputs)


# ----------------------------------------------------------------------------------------------
# training against a textbook's


def textbook_training(model, args, images, labels, sizes):
    """Two epochs of a plain loop. Returns mean loss and accuracy of the last."""
    rates = {"lr": args.learning_rate, "weight_decay": args.l2_decay}
    optimizer = torch.optim.Adam(model.parameters(), **rates)
    if args.optimizer == "sgd":
        rates |= {"momentum": args.momentum, "nesterov": args.momentum > 0}
        optimizer = torch.optim.SGD(model.parameters(), **rates)
    step, steps = 0, 2 * len(sizes)
    for epoch in (1, 2):
        utils.seed_everything(args.seed, epoch)
        total = correct = 0
        for batch in torch.randperm(len(labels)).split(sizes):
            rate = utils.learning_rate(args.schedule, args.learning_rate, step, steps)
            optimizer.param_groups[0]["lr"] = rate
            scores = model(images[batch].double() / 255)
            loss = F.cross_entropy(scores, labels[batch], label_smoothing=args.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
            correct += (scores.argmax(1) == labels[batch]).sum().item()
            step += 1
    return {"train_loss": total / len(labels), "train_accuracy": correct / len(labels)}


RECIPES = {  # line: whether the optimizer's step is fused into the backward pass
    "": True, "-momentum 0.9 -l2_decay 0.01": False, "-schedule one_cycle -seed 7": False,
    "-no_batch_norm -l2_decay 0.1": True, "-no_batch_norm -label_smoothing 0.1": True,
    "-no_batch_norm -optimizer adam -learning_rate 0.001 -l2_decay 0.01": False,
    "-recipe best -augment": False,
}  # fmt: skip


@pytest.mark.parametrize(("line", "is_fused"), RECIPES.items(), ids=RECIPES)
def test_training_equals_a_textbooks(line, is_fused, landscapes, monkeypatch):
    """In double precision and without dropout: weights, loss, accuracy and predictions after two
    epochs."""
    monkeypatch.setattr(hw2_q2, "to_float", lambda images: images.double() / 255)
    args, sizes = parse(f"{line} -dropout 0 -epochs 2"), [4, 3, 2]
    images, labels = (tensor[:9] for tensor in landscapes.splits["train"])
    torch.manual_seed(0)
    model, textbook = hw2_q2.build_model(args).double(), TextbookCNN(args.batch_norm, 0).double()
    textbook.load_state_dict(dict(zip(textbook.state_dict(), model.state_dict().values())))
    expected = textbook_training(textbook, args, images, labels, sizes)
    optimizer = hw2_q2.make_optimizer(model, args)
    for epoch in (1, 2):
        row = hw2_q2.train_one_epoch(model, optimizer, images, labels, sizes, epoch, args)
    assert row == pytest.approx(expected, rel=1e-5)
    weights = zip(model.state_dict().values(), textbook.state_dict().values(), strict=True)
    for ours, theirs in weights:
        torch.testing.assert_close(ours, theirs)
    scores = textbook.eval()(images.double() / 255).log_softmax(1)
    torch.testing.assert_close(hw2_q2.predict(model, images), scores)
    assert (model.fc1.weight.grad is None) == is_fused  # the fused step stores no gradient


def test_an_epoch_has_the_batches_that_were_asked_for(train, monkeypatch):
    cases = {
        (16, "keep"): [8, 8], (19, "keep"): [8, 8, 3], (19, "merge"): [8, 11], (3, "merge"): [3],
        (20, "merge"): [8, 8, 4], (17, "keep"): [8, 9], (1, "keep"): [1],
    }  # fmt: skip
    for (count, last_batch), sizes in cases.items():
        assert hw2_q2.batch_sizes(count, 8, last_batch) == sizes
    real, seen = hw2_q2.train_one_epoch, []
    monkeypatch.setattr(hw2_q2, "train_one_epoch", lambda *a: (seen.append(a[4]), real(*a))[1])
    train("-batch_size 11")
    assert seen == [[11, 11, 14]] * 2  # of both epochs


def test_to_float_divides_by_255():
    pixels = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    inputs = hw2_q2.to_float(pixels)
    torch.testing.assert_close(inputs, pixels / 255)
    assert inputs.is_contiguous(memory_format=torch.channels_last)


def test_scrambled_pixels_are_the_courses():
    """The first row holds the colours of the first sixteen pixels, one after the other."""
    [p] = images = torch.arange(3 * 48 * 48).reshape(1, 3, 48, 48)
    [scrambled] = hw2_q2.scramble_pixels(images)
    assert scrambled[0, 0, :4].tolist() == [p[0, 0, 0], p[1, 0, 0], p[2, 0, 0], p[0, 0, 1]]
    assert scrambled[0, 1, 0] == p[0, 0, 16]
    assert scrambled[1, 0, 0] == p[0, 16, 0]
    assert scrambled.unique().numel() == images.numel()


def test_shuffled_pixels_are_one_permutation():
    """The same for all images and channels."""
    positions = torch.arange(48 * 48)
    images = positions.view(1, 1, 48, 48) + 10_000 * torch.arange(6).view(2, 3, 1, 1)
    shuffled = hw2_q2.shuffle_pixels(images)
    order = shuffled[0, 0].flatten()
    assert torch.equal(order.sort().values, positions)
    assert (order == positions).sum() < 10
    assert torch.equal(shuffled - shuffled[:1, :1], images - images[:1, :1])
    assert torch.equal(shuffled, hw2_q2.shuffle_pixels(images))


def test_each_image_is_augmented_by_itself():
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, 48, 48), dtype=torch.uint8)
    images = image.repeat(40, 1, 1, 1)

    def variants(name):
        """How often each variant of the image occurs among 40."""
        return Counter(x.numpy().tobytes() for x in hw2_q2.make_augmentation([name])(images))

    flipped, mirrored = variants("flip"), image.flip(2).numpy().tobytes()
    assert flipped.keys() == {image.numpy().tobytes(), mirrored}
    assert 10 < flipped[mirrored] < 30
    cropped, padded = variants("crop"), F.pad(image.float(), (4, 4, 4, 4), mode="reflect").byte()
    windows = padded.unfold(1, 48, 1).unfold(2, 48, 1)  # (3, 9, 9, 48, 48)
    assert cropped.keys() <= {windows[:, y, x].numpy().tobytes() for y, x in np.ndindex(9, 9)}
    assert len(cropped) > 20
    erased = hw2_q2.make_augmentation(["erase"])(images)
    assert erased.dtype == torch.uint8
    fractions = (erased != images).any(1).float().mean((1, 2))  # of each image's pixels
    assert 10 < (fractions == 0).sum() < 30
    assert fractions.max() < 0.25


def test_test_time_augmentation_is_the_mean_of_probabilities():
    torch.manual_seed(0)
    model = build("-dropout 0.5")
    model.fc3.weight.data *= 100  # or all variants would have nearly the same probabilities
    images = torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8)

    padded = F.pad(images.float(), (2, 2, 2, 2), mode="replicate").byte()
    corners = (2, 2), (0, 2), (4, 2), (2, 0), (2, 4)  # unshifted, up, down, left, right
    shifted = [padded[:, :, y : y + 48, x : x + 48] for y, x in corners]
    both = shifted + [x.flip(3) for x in shifted]
    cases = {"mirror": [images, images.flip(3)], "shift": shifted, "mirror shift": both}
    for tta, variants in cases.items():
        expected = sum(hw2_q2.predict(model, x).exp() for x in variants) / len(variants)
        probabilities = hw2_q2.predict(model, images, tta.split()).exp()
        torch.testing.assert_close(probabilities, expected)
        assert not torch.allclose(probabilities, hw2_q2.predict(model, images).exp())


def test_metrics_by_hand():
    log_probs = torch.tensor([[0.5, 0.1, 0.1, 0.1, 0.1, 0.1]]).log().repeat(100, 1)
    metrics = hw2_q2.classification_metrics(log_probs, torch.tensor([0] * 70 + [3] * 30))
    assert metrics["accuracy"] == 0.7
    assert metrics["loss"] == pytest.approx(-0.7 * math.log(0.5) - 0.3 * math.log(0.1))
    counts = {0: 70, 3: 30}
    assert metrics["confusion"] == [[counts.get(i, 0), 0, 0, 0, 0, 0] for i in range(6)]


# ----------------------------------------------------------------------------------------------
# runs


@pytest.fixture
def train(landscapes_path, tmp_path):
    """train(line): (record, checkpoint) of a run of two epochs on 36 images, in tmp_path/out."""

    def run(line="", folder="out"):
        out = tmp_path / folder
        main("-epochs", 2, "-data_path", landscapes_path, "-output_dir", out, *line.split())
        return load_run(out)

    return run


def test_output_record_and_figures_of_a_run(train, tmp_path, capsys):
    record, checkpoint = train("-learning_rate 0.02")
    output, final, history = capsys.readouterr().out, record["final"], record["history"]
    assert "Trainable parameters: 755,718\n" in output
    assert len(re.findall(r"Training loss: \S+  Training acc: \S+  Valid acc: \S+", output)) == 2
    valid, test = (final[split]["accuracy"] for split in ("val", "test"))
    assert f"\nValid acc: {valid:.4f}\nFinal Test acc: {test:.4f}\n" in output
    assert record["arguments"] == {"learning_rate": 0.02, "epochs": 2}
    assert (record["parameters"], record["data"]["name"]) == (755_718, "photographs")
    assert str(tmp_path) not in json.dumps(record)
    columns = "train_loss", "train_accuracy", "val_loss", "val_accuracy"
    assert {name: len(values) for name, values in history.items()} == dict.fromkeys(columns, 2)
    assert checkpoint["history"] == history
    figures = {path.stem: Image.open(path).width for path in tmp_path.glob("out/figures/q2-*/*")}
    names = {"training-loss", "validation-accuracy", "confusion-matrix", "test-images"}
    assert figures.keys() == names
    assert min(figures.values()) >= 600


def test_one_image_is_too_few_for_batch_norm(arrays, tmp_path, fails):
    few = {name: array[:1] if "train" in name else array for name, array in arrays.items()}
    np.savez(tmp_path / "x.npz", **few)
    argv = ["-epochs", 1, "-data_path", tmp_path / "x.npz", "-output_dir", tmp_path]
    assert "at least 2 training images" in fails(hw2_q2.main, argv)
    main(*argv, "-no_batch_norm")


@pytest.mark.parametrize("is_faster", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_warning_where_bfloat16_is_slower(train, monkeypatch, capsys, precision, is_faster):
    monkeypatch.setattr(utils, "bfloat16_is_faster", lambda: is_faster)
    train(f"-epochs 1 -precision {precision}")
    has_warning = "float32 is faster than bfloat16" in capsys.readouterr().err
    assert has_warning == (precision == "bfloat16" and not is_faster)


@pytest.mark.parametrize("line", ["-tta mirror shift -model resnet", "-scramble_pixels"])
def test_final_scores_are_those_of_the_saved_network(train, landscapes, tmp_path, line):
    """On scrambled images; or with test-time augmentation, which epochs are scored without."""
    record, _ = train(f"-epochs 1 {line}")
    [path] = tmp_path.glob("out/checkpoints/*.pt")
    model, args, _ = hw2_q2.load_network(path)
    for split in ("val", "test"):
        images, labels = landscapes.splits[split]
        images = hw2_q2.PIXELS[args.pixels](images)
        plain, expected = (hw2_q2.evaluate(model, images, labels, tta) for tta in ([], args.tta))
        expected |= {"accuracy_without_tta": plain["accuracy"]} if args.tta else {}
        assert record["final"][split] == expected
        assert split == "test" or record["history"]["val_loss"] == [plain["loss"]]


def test_the_built_in_sample_is_named(tmp_path, monkeypatch, capsys, landscapes):
    monkeypatch.setattr(hw2_q2, "DATA_PATH", tmp_path / "none.npz")
    small = utils.Landscapes(landscapes.splits, "sample")
    monkeypatch.setattr("data.sample.draw_landscapes", lambda: small)
    main("-epochs", 1, "-output_dir", tmp_path)
    output = capsys.readouterr().out
    assert "training on the built-in SAMPLE" in output
    assert "python -m data.prepare_landscapes --download" in output
    assert output.count("(built-in sample)\n") == 2  # beside both final scores
    [record] = tmp_path.glob("figures/runs/*-sample-*.json")
    assert utils.load_record(record)["data"]["name"] == "sample"


def test_a_finished_run_is_retrained_only_by_restart(train, tmp_path, capsys):
    first = train()
    scores = re.findall("^(?:Valid|Final).*", capsys.readouterr().out, re.M)
    assert train()[0] == first[0]
    finished, *again = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"q2-\S+ is finished; -restart retrains it", finished)
    assert again == scores
    assert_equal_runs(first, train("-restart"))
    output = capsys.readouterr().out
    assert output.count("Epoch") == 2
    assert "the old record had the same numbers" in output
    next(tmp_path.glob("out/checkpoints/*.pt")).unlink()  # as in a clone, which has records alone
    train()
    assert "the old record had the same numbers" in capsys.readouterr().out
    assert train("-seed 1", folder="seed")[0]["history"] != first[0]["history"]


# ----------------------------------------------------------------------------------------------
# runs side by side


@pytest.fixture
def side_by_side(landscapes_path, tmp_path, train, capsys):
    """side_by_side(line, option, values): the last lines of runs of the plain network, of which the
    first has the record and the bits of the same one trained alone."""

    def run(line, option, values):
        places = "-data_path", str(landscapes_path), "-output_dir", str(tmp_path / "many")
        argv = f"-no_batch_norm -epochs 2 {line} {option}".split()
        hw2_q2.main([*argv, *values, *places])
        lines = dict(sorted(row.split(": ", 1) for row in capsys.readouterr().out.splitlines()))
        name = next(iter(lines))
        record = utils.load_record(tmp_path / f"many/figures/runs/{name}.json")
        checkpoint = utils.load_checkpoint(tmp_path / f"many/checkpoints/{name}.pt")
        assert lines[name] == hw2_q2.summary(record)
        assert record["measured"]["threads"] == 1
        device = re.search("-device [a-z]+", line)[0]
        alone = train(f"-no_batch_norm {device} {option} {values[0]}", folder="alone")
        assert_equal_runs((record, checkpoint), alone)
        return list(lines.values())

    return run


def test_rates_on_a_cluster_of_two_workers(side_by_side):
    distributed = pytest.importorskip("distributed")
    how = {"n_workers": 2, "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": None}
    with distributed.LocalCluster(**how) as cluster:
        line = f"-device cpu -scheduler {cluster.scheduler_address}"
        one, other = side_by_side(line, "-learning_rate", ["0.1", "1000"])
    assert re.fullmatch(r"Valid acc: [\d.]{6}  Final Test acc: [\d.]{6}", one)
    assert other == "diverged in epoch 1"


# ----------------------------------------------------------------------------------------------
# CUDA


@needs_cuda
def test_cuda_trains_as_the_cpu_does(train, tmp_path, landscapes):
    """With all images in one batch and no dropout, of which the devices draw other masks."""
    line = "-batch_size 36 -dropout 0 -device"
    cpu, cuda = (train(f"{line} {device}", folder=device)[0] for device in ("cpu", "cuda"))
    assert cuda["history"]["train_loss"] == pytest.approx(cpu["history"]["train_loss"], rel=1e-3)
    [path], images = tmp_path.glob("cuda/checkpoints/*.pt"), landscapes.splits["test"][0]
    networks = {device: hw2_q2.load_network(path, device)[0] for device in ("cpu", "cuda")}
    outputs = (hw2_q2.predict(network, images.to(d)) for d, network in networks.items())
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)


@needs_cuda
@pytest.mark.parametrize("line", ["", "-no_batch_norm", "-precision bfloat16"])
def test_cuda_graphs_train_as_eager_code_does(line, landscapes):
    """With dropout, and a last batch of another size, which is not captured."""
    args, device, states = parse(line), utils.prepare_device("cuda", 1), []
    images, labels = hw2_q2.to_device(*landscapes.splits["train"], device, args)
    for is_captured in (True, False):
        utils.seed_everything(0)
        model = hw2_q2.build_model(args).to(device)
        optimizer = hw2_q2.make_optimizer(model, args)
        if is_captured:
            hw2_q2.capture_cuda_graphs(model, 8)
        for epoch in (1, 2):
            sizes = [8, 8, 8, 8, 4]
            hw2_q2.train_one_epoch(model, optimizer, images, labels, sizes, epoch, args)
        states.append(model.state_dict())
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)


@needs_cuda
def test_runs_side_by_side_on_one_gpu(side_by_side):
    side_by_side("-device cuda -jobs 4", "-seed", ["1", "2", "3", "4"])


# ----------------------------------------------------------------------------------------------
# prediction


@pytest.fixture(scope="module")
def trained(landscapes_path, tmp_path_factory):
    """A folder with one trained network."""
    out = tmp_path_factory.mktemp("trained")
    main("-epochs", 1, "-data_path", landscapes_path, "-output_dir", out)
    return out


@pytest.fixture
def photos(tmp_path, landscapes):
    """A folder of three images, two of them in a folder inside, and a text."""
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    for i, image in enumerate(landscapes.splits["test"][0][:3]):
        path = folder / ("deeper" if i else ".") / f"{i}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_a_clone_classifies_with_its_own_network(tmp_path, capsys):
    """The photographs in the report's figures, as recorded; without data and without a training."""
    [path] = utils.ROOT.glob("figures/runs/q2-resnet-lr0.1-seed2-*870ba559*")
    errors = utils.load_record(path)["analysis"]["confident_errors"]
    thumbnails = load_thumbnails(utils.ROOT / "figures" / "thumbnails.png")
    for i, image in enumerate(thumbnails[: len(errors)]):
        Image.fromarray(image.numpy()).save(tmp_path / f"{i:02}.png")
    main("-predict", tmp_path, "-json", "-output_dir", tmp_path)
    output = capsys.readouterr()
    assert "pretrained/q2.pt (validation accuracy 0.90" in Path(output.err).as_posix()
    for answer, (_, _, predicted, probability) in zip(json.loads(output.out), errors, strict=True):
        assert answer["class"] == CLASSES[predicted]
        assert answer["probabilities"][answer["class"]] == pytest.approx(probability, abs=0.02)


@pytest.fixture
def predict(trained, capsys):
    """predict(paths, argv...): what -predict prints, (stdout, stderr)."""

    def run(*argv):
        capsys.readouterr()
        main("-output_dir", trained, "-predict", *argv)
        return capsys.readouterr()

    return run


@pytest.mark.parametrize("line", ["", "-scramble_pixels", "-tta mirror"])
def test_predictions_are_the_networks(train, predict, photos, landscapes, tmp_path, line):
    train(line)
    [checkpoint] = tmp_path.glob("out/checkpoints/*.pt")
    model, args, _ = hw2_q2.load_network(checkpoint)
    images = hw2_q2.PIXELS[args.pixels](landscapes.splits["test"][0][:3])
    expected = hw2_q2.predict(model, images, args.tta).exp()
    files = [photos / "0.png", photos / "deeper" / "1.png", photos / "deeper" / "2.png"]
    out, err = predict(photos, "-json", "-checkpoint", checkpoint)
    assert f"Network: {checkpoint}" in err
    table = predict(files[0], photos / "deeper", "-checkpoint", checkpoint).out.splitlines()
    assert table[0].split()[2:] == list(CLASSES)
    for file, p, answer, row in zip(files, expected, json.loads(out), table[1:], strict=True):
        assert (answer["image"], answer["class"]) == (str(file), CLASSES[p.argmax()])
        probabilities = dict(zip(CLASSES, p.tolist()))
        assert answer["probabilities"] == pytest.approx(probabilities, abs=1e-5)
        numbers = [f"{p:.3f}" for p in answer["probabilities"].values()]
        assert row.split() == [answer["image"], answer["class"], *numbers]


def test_the_best_network_on_photographs_predicts(trained, predict, photos, tmp_path, monkeypatch):
    saved = load_run(trained)[1]

    def network(name, data, *accuracies, options="", argv=()):
        """What -predict says of its network, when one of these accuracies is there, too."""
        changes = {"data": DATA | {"name": data}, "history": {"val_accuracy": list(accuracies)}}
        changes |= {"seconds": [1.0] * len(accuracies), "command": saved["command"] + options}
        save_checkpoint(tmp_path / "checkpoints" / f"q2-{name}.pt", **saved | changes)
        return predict(photos, "-output_dir", tmp_path, *argv).err

    monkeypatch.setattr(hw2_q2, "PRETRAINED", tmp_path / "shipped.pt")
    with pytest.raises(utils.UserError, match="train one first"):
        network("sample", "sample", 0.99)  # which answers only where it is named
    note = "q2-sample.pt (validation accuracy 0.9900, trained on the built-in SAMPLE)"
    named = "-checkpoint", tmp_path / "checkpoints" / "q2-sample.pt"
    assert note in network("sample", "sample", 0.99, argv=named)
    shutil.copy(named[1], tmp_path / "shipped.pt")
    assert f"Network: {tmp_path / 'shipped.pt'} (" in network("sample", "sample", 0.99)
    network("a", "photographs", 0.9, 0.6)  # its weights are the last epoch's
    assert "q2-b.pt (validation accuracy 0.7000)" in network("b", "photographs", 0.5, 0.7)
    note = "q2-c.pt (validation accuracy 0.8000 without test-time augmentation)"
    assert note in network("c", "photographs", 0.8, options=" -tta mirror")


def test_file_names_with_control_characters_are_escaped(predict, photos):
    odd = os.fsdecode(b"\x1b]0;owned\x07\xff.png")
    try:
        (photos / "0.png").rename(photos / odd)
    except OSError:
        pytest.skip("no such name on this system")
    out, _ = predict(photos)
    assert r"\x1b]0;owned\x07\udcff.png" in out
    assert out.replace("\n", "").isprintable()


def test_unreadable_images_in_a_folder_are_skipped(predict, photos):
    expected = predict(photos, "-json").out
    (photos / "cut.png").write_bytes((photos / "0.png").read_bytes()[:-500])
    out, err = predict(photos, "-json")
    assert out == expected
    assert re.search(r"Skipping .*cut\.png: not a readable image", err)
    with pytest.raises(utils.UserError, match=r"cut\.png: not a readable image"):
        predict(photos / "cut.png", photos)  # it is named, too
    for path in photos.rglob("[0-9].png"):
        path.unlink()
    with pytest.raises(utils.UserError, match="none of these images can be read"):
        predict(photos)


WRONG_PATHS = {  # {paths: errors}
    "good.png bad.png": ["bad.png: not a readable image"],
    "none.jpg good.png empty": ["empty: no images in this folder", "none.jpg: no such file"],
    "bad.png none.jpg good.png": ["bad.png: not a readable image", "none.jpg: no such file"],
    "good.png *.gif": ["*.gif: no such file"],
    "empty bad.png": ["empty: no images in this folder", "bad.png: not a readable image"],
}


@pytest.mark.parametrize("output", ["", "-json"])
@pytest.mark.parametrize(("line", "errors"), WRONG_PATHS.items(), ids=WRONG_PATHS)
def test_a_wrong_path_does_not_cost_the_other_answers(
    trained, photos, tmp_path, monkeypatch, capsys, line, errors, output
):
    monkeypatch.chdir(tmp_path)
    shutil.copy(photos / "0.png", "good.png")
    Path("bad.png").write_bytes(b"hello")
    Path("empty").mkdir()
    argv = "-output_dir", trained, "-predict", *line.split(), *output.split()
    with pytest.raises(SystemExit) as stop:
        utils.run_script(lambda: main(*argv))
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    rows = json.loads(out or "[]") if output else map(str.split, out.splitlines()[1:])
    answers = [row["image"] if output else row[0] for row in rows]
    assert answers == ["good.png"] * ("good.png" in line)
    messages = [row for row in err.splitlines() if not row.startswith("Network: ")]
    for message, error in zip(messages, errors, strict=True):
        assert f"error: {error}" in message


def test_patterns_that_the_shell_leaves(predict, photos, monkeypatch):
    monkeypatch.chdir(photos / "deeper")

    def images(*argv):
        return [answer["image"] for answer in json.loads(predict(*argv, "-json").out)]

    assert images("*.png") == images("[12].png") == images("?.png") == ["1.png", "2.png"]
    assert images("../deep*") == [str(Path("../deeper", name)) for name in ("1.png", "2.png")]
    Path("1.png").rename("[12].png")  # a file of that very name
    assert images("[12].png") == ["[12].png"]
    assert images("2.png", "*.png") == ["2.png", "[12].png"]
