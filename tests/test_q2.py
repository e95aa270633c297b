"""Question 2: options, networks, training, continuing, figures, prediction."""

import itertools
import json
import math
import os
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import hw2_q2
import utils
from tests import benchmark
from tests.conftest import DATA, Killed, assert_equal_runs, save_checkpoint
from utils import CLASSES

# ----------------------------------------------------------------------------------------------
# options


def options(*argv):
    return hw2_q2.parse_options([str(word) for word in argv])


def test_defaults_are_the_recipe():
    o = options()
    assert (o.epochs, o.batch_size, o.learning_rate, o.l2_decay) == (40, 8, 0.01, 0)
    assert (o.dropout, o.optimizer, o.batch_norm, o.head, o.pool) == (
        0.1,
        "sgd",
        True,
        "gap",
        "max",
    )


def test_one_option_decides_for_another():
    assert options("-no_batch_norm").head == "flatten"
    assert options("-no_batch_norm", "-head", "gap").head == "gap"
    assert options("-head", "flatten").batch_norm
    assert options("-no_maxpool").pool == "stride"


BAD_OPTIONS = [
    "-epochs 0", "-epochs 1.5", "-epochs many", "-batch_size 0", "-batch_size 1",
    "-learning_rate 0", "-learning_rate -1", "-learning_rate nan", "-learning_rate inf",
    "-l2_decay -1", "-dropout 1", "-dropout -0.1", "-optimizer rmsprop", "-head mean",
    "-kernel_size 4", "-kernel_size 0", "-pool avg -no_maxpool", "-seed -1", "-threads 0",
    "-kernel_size 48 -pool avg", "-kernel_size 48 -convs 2", "-convs 0",
    "-learning_rate .1 0", "-seed 1 2 x", "-jobs 0", "-device abacus", "-json", "-predict",
    "-data_path no/such/file.npz", "-checkpoint x.pt", "-epoch", "-leaning_rate 1", "train",
    "-predict no/such/picture.jpg -checkpoint none.pt", "-recipe none", "-augment flop",
    "-at_test mirror mirrors", "-momentum 1", "-momentum 0.9 -optimizer adam",
    "-at_test refresh", "-model vgg", "-model resnet -no_batch_norm",
    "-model resnet -convs 2", "-scramble_pixels -augment flip", "-recipe best -scramble_pixels",
    "-recipe best -optimizer adam", "-label_smoothing 1", "-precision float16",
]  # fmt: skip


@pytest.mark.parametrize("line", BAD_OPTIONS)
def test_bad_options_end_with_one_line(line, fails):
    message = fails(hw2_q2.main, line.split())
    assert any(word.rstrip("s") in message for word in line.split())


@pytest.mark.parametrize(
    "line",
    [
        "-learning_rate 0.01",
        "-learning_rate 0.1 -no_batch_norm -seed 3",
        "-learning_rate 0.01 -no_batch_norm -head gap -scramble_pixels",
        "-learning_rate 0.001 -optimizer adam -pool avg -kernel_size 5",
        "-learning_rate 0.01 -convs 2",
        "-learning_rate 0.01 -batch_size 16 -head flatten -dropout 0.3 -l2_decay 0.0005",
        "-learning_rate 0.1 -momentum 0.9 -augment flip -at_test shift",
    ],
)
def test_the_recorded_command_repeats_the_run(line):
    names = (*hw2_q2.RUN_OPTIONS, *hw2_q2.LATER_OPTIONS)
    chosen = {name: getattr(options(*line.split()), name) for name in names}
    command = hw2_q2.command(chosen)
    assert command.startswith("python hw2_q2.py -learning_rate ")
    assert set(command.split()[2:]) == set(line.split())
    again = options(*command.split()[2:])
    assert {name: getattr(again, name) for name in names} == chosen


@pytest.mark.parametrize(
    "more", ["", "-augment", "-momentum 0 -seed 3", "-at_test", "-model resnet"]
)
def test_the_command_of_a_recipe_names_its_options(more):
    """So that it is the same run when the recipe has become another."""
    chosen = hw2_q2.run_options(options("-recipe", "best", *more.split()))
    command = hw2_q2.command(chosen)
    assert "recipe" not in command
    assert hw2_q2.run_options(options(*command.split()[2:])) == chosen


def test_a_recipe_is_the_defaults_of_its_options():
    best = hw2_q2.RECIPES["best"]
    for name, value in best.items():
        assert getattr(options("-recipe", "best"), name) == value
        assert value != hw2_q2.make_parser().get_default(name)
    asked = options("-batch_size", 32, "-recipe", "best", "-augment", "crop", "flip")
    assert (asked.batch_size, asked.learning_rate) == (32, best["learning_rate"])
    assert asked.augment == ["flip", "crop"]  # in one order: a run has one name
    assert options("-recipe", "best", "-augment").augment == []


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        options("-recipe", "best", "-h")
    assert f"default: {hw2_q2.RECIPES['best']['epochs']})" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        options("-h")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in hw2_q2.RUN_OPTIONS:
        assert f"-{'no_batch_norm' if name == 'batch_norm' else name}" in text
    assert "default: 0.01" in text


# ----------------------------------------------------------------------------------------------
# networks


@pytest.mark.parametrize(
    ("argv", "count"),
    [
        (["-no_batch_norm"], 5_340_742),
        ([], 755_718),
        (["-head", "flatten"], 5_340_742 + 2 * (32 + 64 + 128) + 2 * 1024),
        (["-no_batch_norm", "-head", "gap"], 755_718 - 2_496),
        (["-no_batch_norm", "-no_maxpool"], 5_340_742),
        (["-kernel_size", "5"], 755_718 + 16 * (3 * 32 + 32 * 64 + 64 * 128)),
        (["-convs", "2"], 755_718 + sum(9 * c * c + c + 2 * c for c in (32, 64, 128))),
        (["-kernel_size", "48"], 755_718 - 93_248 - 2 * (32 + 64) + 3 * 128 * 48**2 + 128),
    ],
)
def test_parameter_counts(argv, count):
    model = hw2_q2.build_model(options(*argv))
    assert hw2_q2.count_parameters(model) == count
    assert sum(row[-1] for row in hw2_q2.parameter_table(model)) == count


def test_parameter_table_by_hand():
    rows = hw2_q2.parameter_table(hw2_q2.build_model(options()))
    assert [(shape, count) for _, shape, _, count in rows] == [
        ((32, 48, 48), 896), ((32, 48, 48), 64), ((64, 24, 24), 18_496), ((64, 24, 24), 128),
        ((128, 12, 12), 73_856), ((128, 12, 12), 256), ((1024,), 132_096), ((1024,), 2_048),
        ((512,), 524_800), ((6,), 3_078),
    ]  # fmt: skip
    for _, _, formula, count in rows:
        assert eval(formula.replace("x", "*")) == count


def test_count_params_explains_the_reports_totals(capsys):
    hw2_q2.main(["-count_params"])
    lines = capsys.readouterr().out.splitlines()
    totals = [line.split()[-1] for line in lines if line.startswith("trainable")]
    assert totals == ["5,340,742", "755,718"]
    text = " ".join(lines)
    assert "The report's 752,640 is 755,718 without the output layer's 3,078." in text
    assert "The report's 5,340,160 is 5,340,742 without the output layer's 3,078 and with" in text
    assert "2,496 batch-norm parameters" in text


@pytest.mark.parametrize(
    ("pool", "head"),  # all but none and flatten, a network of 302 million parameters
    [*itertools.product(["max", "avg", "stride"], ["gap", "flatten"]), ("none", "gap")],
)
@pytest.mark.parametrize("norm", [[], ["-no_batch_norm"]])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_forward_shapes(pool, head, norm, kernel):
    model = hw2_q2.build_model(options("-pool", pool, "-head", head, "-kernel_size", kernel, *norm))
    side = 48 if pool == "none" else 6
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    assert model.convs(hw2_q2.as_input(images)).shape == (2, 128, side, side)
    log_probs = model(hw2_q2.as_input(images))
    assert log_probs.shape == (2, 6)
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(2))


@pytest.mark.parametrize(
    ("argv", "side"),
    [(["-convs", 2], 6), (["-convs", 3, "-pool", "avg"], 6), (["-kernel_size", 48], 1)],
)
def test_forward_shapes_of_stacked_and_whole_picture_convolutions(argv, side):
    model = hw2_q2.build_model(options(*argv)).eval()
    images = torch.rand(2, 3, 48, 48)
    assert model.convs(images).shape == (2, 128, side, side)
    assert model(images).shape == (2, 6)


@pytest.mark.parametrize(
    ("argv", "side"),
    [(["-pool", "avg"], 18), (["-pool", "stride"], 15), (["-pool", "none"], 7)],
)
def test_receptive_field_is_where_the_gradient_reaches(argv, side):
    options = hw2_q2.parse_options(argv)
    model = hw2_q2.build_model(options).eval()
    picture, seen = torch.rand(1, 3, 48, 48, requires_grad=True), []
    model.convs[-1].conv.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    model(picture)
    middle = seen[0].shape[-1] // 2
    seen[0][0, :, middle, middle].sum().backward()
    reached = picture.grad[0].abs().sum(0) > 0
    assert (reached.any(0).sum().item(), reached.any(1).sum().item()) == (side, side)
    assert hw2_q2.field_and_products(model)[0] == side


def test_multiply_adds_by_hand():
    """Of the plain network: three convolutions, three linear layers."""
    model = hw2_q2.build_model(hw2_q2.parse_options(["-no_batch_norm"]))
    convs = 48 * 48 * 32 * 27 + 24 * 24 * 64 * 288 + 12 * 12 * 128 * 576
    assert hw2_q2.field_and_products(model)[1] == convs + 4608 * 1024 + 1024 * 512 + 512 * 6


def test_convolution_block_by_hand():
    """One 2x2 picture, one 3x3 kernel of ones: every output is the sum 10 of the picture, plus
    the bias; batch norm (in evaluation, unit statistics) scales by 1 / sqrt(1 + 1e-5)."""
    image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    block = hw2_q2.ConvBlock(1, 2, kernel_size=3, batch_norm=True, pool="max", dropout=0.5).eval()
    with torch.no_grad():
        block.conv.weight.fill_(1)
        block.conv.bias.copy_(torch.tensor([-4.0, -40.0]))
    expected = torch.tensor([[[[6 / math.sqrt(1 + 1e-5)]], [[0.0]]]])
    torch.testing.assert_close(block(image), expected)


def test_average_pooling_comes_after_relu():
    block = hw2_q2.ConvBlock(1, 1, kernel_size=1, batch_norm=False, pool="avg", dropout=0)
    with torch.no_grad():
        block.conv.weight.fill_(1)
        block.conv.bias.zero_()
    image = torch.tensor([[[[8.0, -8.0], [4.0, -100.0]]]])
    assert block(image).item() == 3  # (8 + 0 + 4 + 0) / 4


@pytest.mark.parametrize("norm", [True, False])
def test_pooling_before_relu_is_the_textbook_block(norm):
    """Values and gradients are those of convolution -> norm -> ReLU -> max pooling."""
    torch.manual_seed(0)
    block = hw2_q2.ConvBlock(3, 5, kernel_size=3, batch_norm=norm, pool="max", dropout=0)
    x = torch.randn(4, 3, 8, 8)
    textbook = F.max_pool2d(F.relu(block.norm(block.conv(x))), 2)
    ours = block(x)
    assert torch.equal(ours, textbook)
    parameters = list(block.parameters())
    direction = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, parameters, direction),
        torch.autograd.grad(textbook, parameters, direction),
    ):
        torch.testing.assert_close(a, b)


def test_the_residual_network_by_hand(capsys):
    """Its parameters; a residual block adds what its convolution makes of what comes in."""
    total, before = 160 * 6 + 6, 3
    for channels, depth in ((32, 1), (64, 2), (128, 2), (160, 1)):
        total += 9 * before * channels + 3 * channels  # weights; bias, and batch norm's two
        total += depth * (9 * channels**2 + 3 * channels)
        before = channels
    model = hw2_q2.build_model(options("-model", "resnet")).eval()
    assert hw2_q2.count_parameters(model) == total < 1e6
    hw2_q2.main(["-model", "resnet", "-count_params"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split()[-1] == f"{total:,}"
    for line in lines[2:-2]:
        words = line.split("  ")
        formula, count = [word for word in words if word.strip()][-2:]
        assert eval(formula.replace("x", "*")) == int(count.replace(",", "")), line
    block, x = model.convs[1], torch.rand(2, 32, 8, 8)
    nn.init.normal_(block.norm.weight)
    torch.testing.assert_close(block(x), x + F.relu(block.norm(block.conv(x))))
    assert model(torch.rand(2, 3, 96, 64)).shape == (2, 6)


def test_predictions_with_views_are_the_mean_of_all():
    torch.manual_seed(0)
    model, images = hw2_q2.build_model(options("-at_test", "mirror")), torch.rand(3, 3, 48, 48)
    torch.testing.assert_close(model.eval()(images), model(images.flip(3)))
    both = (model.log_probs(images).exp() + model.log_probs(images.flip(3)).exp()) / 2
    torch.testing.assert_close(model(images).exp(), both)
    assert not torch.allclose(model(images), model.log_probs(images))
    model = hw2_q2.build_model(options("-at_test", "mirror", "shift", "-dropout", 0))
    assert torch.equal(model.train()(images), model.log_probs(images))  # in training as they are
    padded = F.pad(images, (2, 2, 2, 2), mode="replicate")
    sides = (2, 2), (0, 2), (4, 2), (2, 0), (2, 4)
    moved = [padded[:, :, y : y + 48, x : x + 48] for y, x in sides]
    seen = [*moved, *(image.flip(3) for image in moved)]
    mean = sum(model.eval().log_probs(image).exp() for image in seen) / 10
    torch.testing.assert_close(model(images).exp(), mean)


@pytest.mark.parametrize("argv", [[], ["-no_batch_norm"]], ids=str)
def test_bfloat16_convolutions_are_near_float32s(argv):
    """And everything behind them, the weights and their gradients stay float32."""
    images, outputs, kinds = torch.rand(8, 3, 48, 48), [], []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        o = options("-precision", precision, "-dropout", 0, *argv)
        model = hw2_q2.build_model(o)
        model.convs[0].conv.register_forward_hook(lambda layer, i, x: kinds.append(x.dtype))
        outputs.append(model(images))
        outputs[-1][:, 0].sum().backward()
        assert outputs[-1].dtype == model.convs[0].conv.weight.grad.dtype == torch.float32
    assert kinds == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(*outputs, atol=0.05, rtol=0)
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.1, 0.002])
def test_dropout_keeps_the_right_share_and_the_mean(dtype, share):
    torch.manual_seed(0)
    dropout = utils.Dropout(share)
    x = torch.full((1000, 1000), 1 - share, dtype=dtype)
    dropped = dropout(x)
    assert dropped.dtype == dtype
    assert (dropped == 0).float().mean().item() == pytest.approx(share, abs=0.001)
    assert dropped.max().item() == pytest.approx(1, abs=0.004)
    assert dropped.float().mean().item() == pytest.approx(1 - share, abs=0.003)
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize("decay", [0, 0.1])
def test_the_step_in_the_backward_pass_is_sgds(decay):
    """Some steps of the plain network with fc1's fast step and with the optimizer's alone."""

    def train(fast):
        torch.manual_seed(0)
        o = options("-no_batch_norm", "-learning_rate", 0.1, "-l2_decay", decay)
        model = hw2_q2.build_model(o)
        optimizer = hw2_q2.make_optimizer(model, o)
        assert model.fc1.lr == 0.1
        if not fast:
            model.fc1.lr = None
        step = hw2_q2.make_step(model, optimizer, torch.zeros(3))
        torch.manual_seed(1)
        for _ in range(4):
            step(torch.randint(0, 256, (8, 3, 48, 48), dtype=torch.uint8), torch.arange(8) % 6)
        return model.state_dict()

    slow = train(False)
    for name, weights in train(True).items():
        torch.testing.assert_close(weights, slow[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("argv", [[], ["-no_batch_norm"]], ids=str)
def test_training_is_the_textbooks(argv):
    """Without dropout, in double precision: some steps of the textbook loop, and ours with all
    that makes it fast, end with the same weights."""
    images, labels = torch.rand(24, 3, 48, 48, dtype=torch.float64), torch.arange(24) % 6
    options_ = options("-dropout", 0, "-learning_rate", 0.05, *argv)
    torch.manual_seed(0)
    ours = hw2_q2.build_model(options_).double().train()
    textbook = benchmark.TextbookCNN(batch_norm=not argv).double()
    textbook.load_state_dict(ours.state_dict())
    for layer in textbook.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0
    batches = list(zip(images.split(8), labels.split(8)))
    benchmark.textbook_epoch(textbook, torch.optim.SGD(textbook.parameters(), 0.05), batches)
    optimizer = hw2_q2.make_optimizer(ours, options_)
    for inputs, truth in batches:
        loss = F.nll_loss(ours(inputs.to(memory_format=torch.channels_last)), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ours.fc1.lr == 0.05
    for name, weights in textbook.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], weights, msg=name)


@pytest.mark.parametrize("argv", [["-momentum", 0.9], ["-schedule", "one_cycle"]], ids=str)
def test_the_optimizer_steps_on_fc1_where_its_step_is_not_plain_sgds(argv):
    o = options(*argv)
    model = hw2_q2.build_model(o)
    optimizer = hw2_q2.make_optimizer(model, o)
    assert model.fc1.lr is None
    assert optimizer.defaults["nesterov"] == ("-momentum" in argv)


def test_label_smoothing_is_the_cross_entropy_with_smoothed_labels():
    o = options("-no_batch_norm", "-dropout", 0)
    model, labels, totals = hw2_q2.build_model(o).train(), torch.arange(5), torch.zeros(3)
    images = torch.randint(0, 256, (5, 3, 48, 48), dtype=torch.uint8)
    log_probs = model(hw2_q2.as_input(images)).detach()
    hw2_q2.make_step(model, hw2_q2.make_optimizer(model, o), totals, 0.1)(images, labels)
    expected = F.cross_entropy(log_probs, labels, label_smoothing=0.1, reduction="sum")
    assert totals[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_augmentation_changes_each_picture_by_itself():
    torch.manual_seed(0)
    [picture] = torch.randint(0, 256, (1, 3, 48, 48), dtype=torch.uint8)
    images = picture.repeat(40, 1, 1, 1)
    flipped = hw2_q2.make_augmentation(["flip"])(images)
    as_it_was = [torch.equal(image, picture) for image in flipped]
    mirrored = [torch.equal(image, picture.flip(2)) for image in flipped]
    assert all(a != b for a, b in zip(as_it_was, mirrored))
    assert 10 < sum(mirrored) < 30
    padded = F.pad(picture.unsqueeze(0).float(), (4, 4, 4, 4), mode="reflect")[0].byte()
    places = {
        padded[:, y : y + 48, x : x + 48].numpy().tobytes(): (y, x)
        for y, x in itertools.product(range(9), range(9))
    }
    found = [
        places[image.numpy().tobytes()] for image in hw2_q2.make_augmentation(["crop"])(images)
    ]
    assert len(set(found)) > 20
    for name in hw2_q2.AUGMENTATIONS:
        changed = hw2_q2.make_augmentation([name])(images)
        assert (changed.shape, changed.dtype) == (images.shape, torch.uint8)
        assert len(changed.flatten(1).unique(dim=0)) > 1
    assert hw2_q2.make_augmentation([]) is None


def test_adam_sees_fc1s_gradient():
    o = options("-optimizer", "adam")
    model = hw2_q2.build_model(o)
    step = hw2_q2.make_step(model, hw2_q2.make_optimizer(model, o), torch.zeros(3))
    step(torch.randint(0, 256, (8, 3, 48, 48), dtype=torch.uint8), torch.arange(8) % 6)
    assert model.fc1.weight.grad.abs().sum() > 0


def test_networks_see_pixels_divided_by_255():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    inputs = hw2_q2.as_input(pixels.repeat(2, 1, 48, 48))
    assert inputs[1, :, 5, 7].tolist() == pytest.approx([0, 0.2, 1])
    assert inputs.dtype == torch.float32
    assert inputs.is_contiguous(memory_format=torch.channels_last)


def test_a_step_adds_summed_loss_right_answers_and_one():
    o = options("-no_batch_norm", "-dropout", 0)
    model, labels = hw2_q2.build_model(o).train(), torch.arange(5)
    images = torch.randint(0, 256, (5, 3, 48, 48), dtype=torch.uint8)
    log_probs, totals = model(hw2_q2.as_input(images)).detach(), torch.tensor([10.0, 2.0, 1.0])
    hw2_q2.make_step(model, hw2_q2.make_optimizer(model, o), totals)(images, labels)
    loss = -log_probs[range(5), labels].sum().item()
    right = (log_probs.argmax(1) == labels).sum().item()
    assert totals.tolist() == pytest.approx([10 + loss, 2 + right, 2], abs=1e-4)


def test_scrambling_is_the_courses():
    """The first row holds the colours of the first sixteen pixels, one after the other."""
    [p] = picture = torch.arange(3 * 48 * 48).reshape(1, 3, 48, 48)
    [scrambled] = hw2_q2.scramble_pixels(picture)
    assert scrambled[0, 0, :4].tolist() == [p[0, 0, 0], p[1, 0, 0], p[2, 0, 0], p[0, 0, 1]]
    assert scrambled[0, 1, 0] == p[0, 0, 16]
    assert scrambled[1, 0, 0] == p[0, 16, 0]
    assert scrambled.unique().numel() == picture.numel()


# ----------------------------------------------------------------------------------------------
# training


@pytest.fixture
def train(landscapes_path, tmp_path):
    """train(argv...) -> (record, checkpoint) of a run of two epochs on the small data."""

    def run(*argv, folder="out"):
        out = tmp_path / folder
        argv = ["-data_path", landscapes_path, "-output_dir", out, "-threads", 1, *argv]
        hw2_q2.main([str(word) for word in ("-epochs", 2, *argv)])
        (record,), (checkpoint,) = out.glob("figures/runs/*"), out.glob("checkpoints/*.pt")
        return utils.load_record(record), utils.load_checkpoint(checkpoint)

    return run


def test_record_figures_and_output_of_a_run(train, tmp_path, capsys):
    record, _ = train("-learning_rate", 0.02)
    output = capsys.readouterr().out
    assert "Trainable parameters: 755,718" in output
    assert "Training loss: " in output
    final = record["final"]
    assert f"Valid acc: {final['val']['accuracy']:.4f}\n" in output
    assert f"Final Test acc: {final['test']['accuracy']:.4f}\n" in output
    assert record["command"] == "python hw2_q2.py -learning_rate 0.02 -epochs 2"
    assert record["config"]["data"]["name"] == "photographs"
    assert str(tmp_path) not in json.dumps(record)
    history = record["history"]
    assert list(history) == ["train_loss", "train_accuracy", "val_loss", "val_accuracy"]
    assert all(len(column) == 2 for column in history.values())
    assert history["val_accuracy"][-1] == final["val"]["accuracy"]
    for split, size in (("train", 36), ("val", 12), ("test", 12)):
        confusion = torch.tensor(final[split]["confusion"])
        assert confusion.shape == (6, 6)
        assert confusion.sum(1).tolist() == [size // 6] * 6
        assert confusion.trace() / size == pytest.approx(final[split]["accuracy"])
    (folder,) = (tmp_path / "out" / "figures").glob("q2-*")
    names = {"training-loss", "validation-accuracy", "confusion-matrix", "test-pictures"}
    assert {path.stem for path in folder.iterdir()} == names
    for path in folder.iterdir():
        assert Image.open(path).width >= 600


@pytest.mark.parametrize(
    "count, last_batch, sizes",
    [
        (16, "keep", [8, 8]),
        (19, "keep", [8, 8, 3]),
        (19, "join", [8, 11]),
        (20, "join", [8, 8, 4]),
        (17, "keep", [8, 9]),  # batch norm cannot train on a single picture
        (3, "join", [3]),
        (1, "keep", [1]),
    ],
)
def test_batch_sizes(count, last_batch, sizes):
    assert hw2_q2.batch_sizes(count, 8, last_batch) == sizes


@pytest.mark.parametrize(
    ("argv", "sizes"),
    [
        ([], [11, 11, 14]),
        (["-last_batch", "keep"], [11, 11, 11, 3]),
        (["-no_batch_norm"], [11, 11, 11, 3]),
        (["-no_batch_norm", "-last_batch", "join"], [11, 11, 14]),
    ],
    ids=str,
)
def test_training_has_the_batches_it_was_told(train, monkeypatch, argv, sizes):
    seen, real = [], hw2_q2.train_epoch
    monkeypatch.setattr(hw2_q2, "train_epoch", lambda *a: (seen.append(a[4]), real(*a))[1])
    train("-batch_size", 11, *argv)  # of 36 pictures three are left over
    assert seen == [sizes] * 2


def test_one_picture_is_too_few_for_batch_norm(arrays, tmp_path, fails):
    few = {name: array[:1] if "train" in name else array for name, array in arrays.items()}
    np.savez(tmp_path / "x.npz", **few)
    argv = ["-epochs", 1, "-data_path", tmp_path / "x.npz", "-output_dir", tmp_path]
    assert "at least 2 training pictures" in fails(hw2_q2.main, argv)
    hw2_q2.main([str(word) for word in (*argv, "-no_batch_norm")])


def test_the_last_batch_is_joined_with_batch_norm_and_kept_without():
    """So that runs of the plain network, recorded before there was a choice, keep their names."""
    defaults = {"": ("join", "join"), "-no_batch_norm": ("keep", None)}
    for argv, (default, recorded) in defaults.items():
        settled = options(*argv.split())
        assert settled.last_batch == default
        assert hw2_q2.run_options(settled).get("last_batch") == recorded
        assert "last_batch" not in hw2_q2.command(hw2_q2.run_options(settled))
        other = {"keep": "join", "join": "keep"}[default]
        asked = hw2_q2.run_options(options("-last_batch", other, *argv.split()))
        assert f"-last_batch {other}" in hw2_q2.command(asked)


def test_training_loss_is_each_epochs_own(landscapes):
    """A step that is told what to add: the mean is over this epoch's pictures alone."""
    totals = torch.zeros(3)
    seen = []

    def step(images, labels):
        seen.append(len(labels))
        totals.add_(torch.tensor([2.0 * len(labels), 1.0, 1.0]))

    for _ in range(2):
        result = hw2_q2.train_epoch(step, totals, *landscapes.splits["train"], [20, 16])
        assert result == pytest.approx((2.0, 2 / 36))
    assert seen == [20, 16] * 2


def test_an_epoch_shows_every_picture_once(landscapes):
    images, labels = landscapes.splits["train"]
    seen = []
    totals = torch.zeros(3)
    sizes = hw2_q2.batch_sizes(len(labels), 8)
    hw2_q2.train_epoch(lambda x, y: seen.append((x, y)), totals, images, labels, sizes)
    assert [len(y) for _, y in seen] == [8, 8, 8, 8, 4]
    pixels = {image.numpy().tobytes(): int(label) for image, label in zip(images, labels)}
    shown = {x.numpy().tobytes(): int(y) for xs, ys in seen for x, y in zip(xs, ys)}
    assert shown == pixels


def test_evaluation_by_hand():
    class Fixed(nn.Module):
        def forward(self, x):
            return torch.log(torch.tensor([[0.5, 0.1, 0.1, 0.1, 0.1, 0.1]])).repeat(len(x), 1)

    images = torch.zeros(100, 3, 48, 48, dtype=torch.uint8)
    labels = torch.tensor([0] * 70 + [3] * 30)
    result = hw2_q2.evaluate(Fixed(), images, labels)
    assert result["accuracy"] == 0.7
    assert result["loss"] == pytest.approx(-0.7 * math.log(0.5) - 0.3 * math.log(0.1))
    assert result["confusion"][0][0] == 70
    assert result["confusion"][3][0] == 30


@pytest.mark.parametrize(
    "argv", [["-no_batch_norm", "-optimizer", "adam", "-learning_rate", 0.001], []]
)
def test_loss_falls(train, argv):
    losses = train(*argv, "-epochs", 12, "-dropout", 0)[0]["history"]["train_loss"]
    assert losses[-1] < 0.9 * losses[0]


def test_the_residual_network_is_trained_and_used(train, tmp_path, pictures, capsys):
    argv = ["-model", "resnet", "-recipe", "best", "-batch_size", "12", "-precision", "bfloat16"]
    record, _ = train(*argv)
    assert record["parameters"] == 889_446
    assert set(record["final"]["test"]["sizes"]) == {"32", "48", "64", "96"}
    [path] = tmp_path.glob("out/checkpoints/q2-resnet-*.pt")
    capsys.readouterr()
    hw2_q2.main(["-predict", str(pictures), "-json", "-checkpoint", str(path)])
    assert len(json.loads(capsys.readouterr().out)) == 3


def test_the_same_run_twice_gives_the_same_bits(train):
    first, second = train(folder="a"), train(folder="b")
    assert_equal_runs(first, second)
    other = train("-seed", 1, folder="c")
    assert not torch.equal(other[1]["model"]["fc3.weight"], first[1]["model"]["fc3.weight"])


RESUMED = [], ["-optimizer", "adam"], ["-no_batch_norm"], ["-recipe", "best", "-batch_size", 12]


@pytest.mark.parametrize("argv", RESUMED, ids=str)
@pytest.mark.parametrize("moment", ["after an epoch", "within an epoch", "before the end"])
def test_a_killed_run_continues_to_the_same_bits(train, monkeypatch, capsys, argv, moment):
    """Killed after epoch 2, within epoch 3, or between the last epoch and the record."""
    argv = ["-epochs", 4, *argv]
    calls = {"epochs": 0}
    real_save, real_epoch, real_record = utils.save_run, hw2_q2.train_epoch, utils.save_record

    def save(*args, **kwargs):
        real_save(*args, **kwargs)
        calls["epochs"] += 1
        if moment == "after an epoch" and calls["epochs"] == 2:
            raise Killed

    def epoch(step, *args):
        def dying(*batch):
            step(*batch)
            if moment == "within an epoch" and calls["epochs"] == 2:
                raise Killed

        return real_epoch(dying, *args)

    def record(*args):
        if moment == "before the end":
            raise Killed
        real_record(*args)

    with monkeypatch.context() as patch:
        patch.setattr(utils, "save_run", save)
        patch.setattr(hw2_q2, "train_epoch", epoch)
        patch.setattr(utils, "save_record", record)
        with pytest.raises(Killed):
            train(*argv)
    capsys.readouterr()
    continued = train(*argv)
    done = 4 if moment == "before the end" else 2
    assert f"Going on after epoch {done}" in capsys.readouterr().out
    whole = train(*argv, folder="undisturbed")
    assert_equal_runs(continued, whole)
    assert len(continued[0]["measured"]["seconds"]) == 4


def test_a_finished_run_and_restart_begin_anew(train, monkeypatch, capsys):
    first = train()
    again = train()
    assert "Going on" not in capsys.readouterr().out
    assert_equal_runs(first, again)

    def stop(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(utils, "save_record", stop)
        with pytest.raises(Killed):
            train()
    train("-restart")
    assert "Going on" not in capsys.readouterr().out


def test_a_broken_checkpoint_of_the_run_is_named(train, tmp_path, landscapes_path, fails):
    train()
    (path,) = tmp_path.glob("out/checkpoints/*.pt")
    path.write_bytes(path.read_bytes()[:1000])
    argv = ["-epochs", 2, "-data_path", landscapes_path, "-output_dir", tmp_path / "out"]
    assert path.name in fails(hw2_q2.main, argv)


def test_a_loss_that_explodes_stops_the_run(landscapes_path, tmp_path, fails):
    argv = ["-data_path", landscapes_path, "-output_dir", tmp_path, "-learning_rate", 1000]
    line = fails(hw2_q2.main, [*argv, "-no_batch_norm"])
    (record,) = map(utils.load_record, tmp_path.glob("figures/runs/*"))
    assert record["diverged_in_epoch"] == 1
    batch = record["diverged_in_batch"]
    assert 1 < batch <= 5
    assert f"epoch 1, batch {batch}, and training stopped" in line
    assert "final" not in record


def test_a_last_step_that_ruins_the_weights_keeps_the_epoch_before(train, monkeypatch, tmp_path):
    """The training loss was still a number; that of the validation is none."""
    real, epochs = hw2_q2.train_epoch, []

    def train_epoch(step, *args):
        result = real(step, *args)
        epochs.append(1)
        if len(epochs) == 2:
            spoil()
        return result

    def make_step(model, *args):
        nonlocal spoil
        spoil = lambda: model.fc3.bias.data.fill_(math.nan)  # noqa: E731
        return make(model, *args)

    spoil, make = None, hw2_q2.make_step
    monkeypatch.setattr(hw2_q2, "train_epoch", train_epoch)
    monkeypatch.setattr(hw2_q2, "make_step", make_step)
    with pytest.raises(utils.UserError, match="epoch 2, batch 5"):
        train()
    (checkpoint,) = map(utils.load_checkpoint, tmp_path.glob("out/checkpoints/*.pt"))
    assert len(checkpoint["seconds"]) == 1
    assert checkpoint["model"]["fc3.bias"].isfinite().all()


def test_a_loss_that_explodes_later_keeps_the_epochs_before(train, monkeypatch, tmp_path):
    real, rates = hw2_q2.make_step, []

    def make_step(model, optimizer, totals, smoothing):
        step = real(model, optimizer, totals, smoothing)

        def spoiling(images, labels):
            rates.append(1)
            if len(rates) == 5 + 3:  # of an epoch's five batches the third
                model.fc3.bias.data.fill_(math.inf)
            step(images, labels)

        return spoiling

    monkeypatch.setattr(hw2_q2, "make_step", make_step)
    with pytest.raises(utils.UserError, match="epoch 2, batch 3"):
        train()
    assert len(rates) == 5 + 3
    (record,) = map(utils.load_record, tmp_path.glob("out/figures/runs/*"))
    assert len(record["history"]["train_loss"]) == 1
    (checkpoint,) = map(utils.load_checkpoint, tmp_path.glob("out/checkpoints/*.pt"))
    assert len(checkpoint["seconds"]) == 1


def test_without_photographs_the_sample_is_used_and_marked(
    tmp_path, monkeypatch, capsys, landscapes
):
    monkeypatch.setattr(hw2_q2, "DATA_PATH", tmp_path / "none.npz")
    small = utils.Landscapes(landscapes.splits, "sample")
    monkeypatch.setattr("data.sample.draw_landscapes", lambda: small)
    hw2_q2.main(["-epochs", "1", "-output_dir", str(tmp_path)])
    output = capsys.readouterr().out
    assert "built-in SAMPLE" in output
    assert "python -m data.prepare_landscapes --download" in output
    assert output.count("(built-in sample)") == 2
    (record,) = tmp_path.glob("figures/runs/*-sample-*.json")
    assert utils.load_record(record)["config"]["data"]["name"] == "sample"


def test_other_data_is_another_run(train, tmp_path, arrays):
    first = train()[0]
    np.savez(tmp_path / "other.npz", **arrays | {"test_labels": 5 - arrays["test_labels"]})
    second = train("-data_path", tmp_path / "other.npz", folder="b")[0]
    assert first["config"]["options"] == second["config"]["options"]
    assert first["config"]["data"] != second["config"]["data"]


def test_scrambled_pixels_change_the_training(train):
    first, second = train(), train("-scramble_pixels", folder="b")
    assert first[0]["history"] != second[0]["history"]


def test_certainty_by_hand():
    """All are taken for class 1, the brighter, the surer."""
    images = torch.zeros(5, 3, 48, 48, dtype=torch.uint8)
    images[:, :, 0, 0] = torch.tensor([255, 242, 243, 140, 128]).unsqueeze(1)
    sure = images[:, 0, 0, 0].unsqueeze(1) / 255
    log_probs = torch.cat(((1 - sure) / 5, sure, *[(1 - sure) / 5] * 4), 1).log()
    training = images.clone(), torch.tensor([1, 0, 2, 1, 1])  # the third and fifth disagree
    training[0][3] = 7  # not the same picture
    found = hw2_q2.certainty(log_probs, images, torch.tensor([1, 0, 1, 1, 2]), training)
    rows = found["calibration"]
    assert [row[0] for row in rows] == [0, 0, 0, 0, 0, 2, 0, 0, 0, 3]
    assert rows[5] == [2, pytest.approx(134 / 255), 0.5]
    assert rows[9] == [3, pytest.approx(740 / 765), pytest.approx(2 / 3)]
    assert rows[0] == [0, None, None]
    confident = torch.tensor(found["confident"])
    assert (confident[1, 1], confident[0, 1], confident.sum()) == (2, 1, 3)
    assert found["disputed"] == [2, 1, 0]  # the fifth is taken for 1, but not surely
    same = images[1:2].expand(2, -1, -1, -1)  # under both labels
    both = same, torch.tensor([0, 1])
    found = hw2_q2.certainty(log_probs, images, torch.zeros(5).long(), both)
    assert found["disputed"] == [1, 1, 1]


def test_a_run_with_views_is_also_scored_without(train, landscapes, tmp_path):
    record, _ = train("-recipe", "best", "-batch_size", 9, "-epochs", 1)
    [path] = tmp_path.glob("out/checkpoints/*.pt")
    model, _ = hw2_q2.load_network(path)
    assert model.views == ["mirror", "shift"]
    seen = {s: hw2_q2.evaluate(model, *landscapes.splits[s])["loss"] for s in utils.SPLITS}
    model.views = []
    as_is = {s: hw2_q2.evaluate(model, *landscapes.splits[s])["loss"] for s in utils.SPLITS}
    assert all(abs(seen[split] - as_is[split]) > 1e-6 for split in utils.SPLITS)
    final = record["final"]
    assert final["train"]["loss"] == as_is["train"]
    assert (final["val"]["loss"], final["test"]["loss"]) == (seen["val"], seen["test"])
    assert record["history"]["val_loss"][-1] == as_is["val"]
    assert final["test"]["moved"][0] == final["test"]["as_is"]


class Brightest(torch.nn.Module):
    """Takes a picture for class 1 if its pixel in the middle is white, else for class 0."""

    def log_probs(self, x):
        row, column = x.shape[2] // 2, x.shape[3] // 2
        white = x[:, 0, row, column] > 0.5  # (B,)
        return torch.nn.functional.one_hot(white.long(), 6).float()


def test_moved_and_resized_pictures_by_hand():
    """A white square of 5 pixels about the middle: moved by up to 2 it still covers it. One of 9
    in a corner is where the border is repeated, and leads astray nobody."""
    images = torch.zeros(2, 3, 48, 48, dtype=torch.uint8)
    images[0, :, 22:27, 22:27] = 255
    images[1, :, :9, :9] = 255
    labels = torch.tensor([1, 0])
    assert hw2_q2.moved_accuracies(Brightest(), images, labels) == [1, 1, 1, 0.5, 0.5]
    sizes = hw2_q2.size_accuracies(Brightest(), images, labels)
    assert sizes == {"32": 1, "48": 1, "64": 1, "96": 1}
    shifted = images.roll(1, 2)  # one row lower: three up uncovers it, three down does not
    assert hw2_q2.moved_accuracies(Brightest(), shifted, labels)[2:4] == [1 - 1 / 8, 0.5 + 1 / 8]


def test_several_rates_and_seeds_are_the_runs_one_by_one(landscapes_path, tmp_path, capsys):
    words = f"-epochs 2 -no_batch_norm -data_path {landscapes_path} -output_dir {tmp_path}".split()
    hw2_q2.main([*words, "-learning_rate", ".1", ".01", "-seed", "1", "2", "-jobs", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    for line in lines:
        name, valid, test = re.fullmatch(
            r"(\S+): Valid acc: (\S+)  Final Test acc: (\S+)", line
        ).groups()
        record = utils.load_record(tmp_path / "figures" / "runs" / f"{name}.json")
        final = record["final"]
        assert (f"{final['val']['accuracy']:.4f}", f"{final['test']['accuracy']:.4f}") == (
            valid,
            test,
        )
        assert record["measured"]["threads"] == 1
    alone = tmp_path / "alone"
    hw2_q2.main(
        [*words, "-learning_rate", ".1", "-seed", "2", "-threads", "1", "-output_dir", str(alone)]
    )
    [path] = (alone / "checkpoints").glob("*.pt")
    pairs = [
        (utils.load_record(folder / "figures" / "runs" / f"{path.stem}.json"),
         utils.load_checkpoint(folder / "checkpoints" / path.name))
        for folder in (tmp_path, alone)
    ]  # fmt: skip
    assert_equal_runs(*pairs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("argv", [[], ["-no_batch_norm"], ["-optimizer", "adam"]], ids=str)
def test_cuda_repeats_itself(train, argv):
    first, second = (train("-device", "cuda", *argv, folder=folder) for folder in "ab")
    assert_equal_runs(first, second)


# ----------------------------------------------------------------------------------------------
# prediction


@pytest.fixture
def trained(train, tmp_path):
    train()
    return tmp_path / "out"


@pytest.fixture
def pictures(tmp_path, landscapes):
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    for i, image in enumerate(landscapes.splits["test"][0][:3]):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        picture.save(folder / ("deeper" if i else ".") / f"{i}.png")
    (folder / "notes.txt").write_text("not a picture")
    return folder


def test_predictions_are_the_networks(trained, pictures, landscapes, capsys):
    hw2_q2.main(["-predict", str(pictures), "-json", "-output_dir", str(trained)])
    out, err = capsys.readouterr()
    answers = json.loads(out)
    assert [answer["picture"][-5:] for answer in answers] == ["0.png", "1.png", "2.png"]
    (checkpoint,) = trained.glob("checkpoints/*.pt")
    assert f"Network: {checkpoint}" in err
    model, _ = hw2_q2.load_network(checkpoint)
    expected = hw2_q2.predict(model, landscapes.splits["test"][0][:3]).exp()
    for answer, row in zip(answers, expected):
        probabilities = list(answer["probabilities"].values())
        assert list(answer["probabilities"]) == list(CLASSES)
        assert probabilities == pytest.approx(row.tolist(), abs=1e-5)
        assert answer["class"] == CLASSES[row.argmax()]


def test_predictions_as_a_table(trained, pictures, capsys):
    paths = [str(pictures / "0.png"), str(pictures / "deeper")]
    hw2_q2.main(["-predict", *paths, "-output_dir", str(trained)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    for line in lines[1:]:
        _, name, *shares = line.split()
        assert CLASSES[np.argmax([float(share) for share in shares])] == name
        assert sum(map(float, shares)) == pytest.approx(1, abs=0.004)


def test_the_best_checkpoint_on_photographs_is_chosen(trained, pictures, capsys):
    (first,) = (trained / "checkpoints").glob("*.pt")
    saved = utils.load_checkpoint(first)

    def save(name, data, *accuracies, **more):
        config = saved["config"] | {"data": DATA | {"name": data}}
        config["options"] = saved["config"]["options"] | more
        history = {"val_accuracy": list(accuracies)}
        seconds = [1.0] * len(accuracies)
        parts = {"config": config, "history": history, "seconds": seconds}
        utils.save_checkpoint(first.with_name(f"q2-{name}.pt"), **saved | parts)

    def chosen(*argv):
        hw2_q2.main(["-predict", str(pictures), "-output_dir", str(trained), *map(str, argv)])
        return capsys.readouterr().err

    first.unlink()
    save("sample", "sample", 0.99)
    assert "q2-sample.pt (validation accuracy 0.9900, trained on the built-in SAMPLE)" in chosen()
    save("a", "photographs", 0.9, 0.6)  # its weights are the last epoch's
    save("b", "photographs", 0.5, 0.7)
    assert "q2-b.pt (validation accuracy 0.7000)" in chosen()
    assert "q2-a.pt" in chosen("-checkpoint", first.with_name("q2-a.pt"))
    save("c", "photographs", 0.8, at_test=["mirror"])
    assert "q2-c.pt (validation accuracy 0.8000 on pictures as they are)" in chosen()


def test_names_that_a_terminal_would_obey_or_refuse(trained, pictures, capsys):
    odd = os.fsdecode(b"\x1b]0;owned\x07\xff.png")
    try:
        (pictures / "0.png").rename(pictures / odd)
    except OSError:
        pytest.skip("no such name on this system")
    hw2_q2.main(["-predict", str(pictures), "-output_dir", str(trained)])
    table = capsys.readouterr().out
    assert r"\x1b]0;owned\x07\udcff.png" in table
    assert table.replace("\n", "").isprintable()


def test_a_network_of_scrambled_pictures_is_scored_and_asked_with_them(
    train, tmp_path, pictures, landscapes, capsys
):
    record, _ = train("-scramble_pixels")
    (path,) = tmp_path.glob("out/checkpoints/*.pt")
    model, _ = hw2_q2.load_network(path)
    for split in utils.SPLITS:
        images, labels = landscapes.splits[split]
        scrambled = hw2_q2.evaluate(model, hw2_q2.scramble_pixels(images), labels)["loss"]
        assert record["final"][split]["loss"] == pytest.approx(scrambled, rel=1e-4)
        assert scrambled != pytest.approx(hw2_q2.evaluate(model, images, labels)["loss"], rel=1e-4)
    capsys.readouterr()
    hw2_q2.main(["-predict", str(pictures), "-json", "-checkpoint", str(path)])
    seen = hw2_q2.scramble_pixels(landscapes.splits["test"][0][:3])
    for answer, row in zip(json.loads(capsys.readouterr().out), hw2_q2.predict(model, seen).exp()):
        assert list(answer["probabilities"].values()) == pytest.approx(row.tolist(), abs=1e-5)


def test_bad_pictures_in_a_folder_are_passed_over(trained, pictures, capsys):
    argv = ["-predict", str(pictures), "-output_dir", str(trained), "-json"]
    hw2_q2.main(argv)
    expected = capsys.readouterr().out
    (pictures / "._0.png").write_bytes(b"hello")  # as another system's archives have them
    hw2_q2.main(argv)
    out, err = capsys.readouterr()
    assert out == expected
    assert "._0.png: not a readable picture" in err
    for path in pictures.rglob("[0-9].png"):
        path.unlink()
    with pytest.raises(utils.UserError, match="none of these pictures can be read"):
        hw2_q2.main(argv)


def test_bad_predictions(trained, pictures, tmp_path, fails):
    out = ["-output_dir", trained]
    bad = pictures / "bad.png"
    bad.write_bytes(b"hello")
    assert "bad.png: not a readable picture" in fails(hw2_q2.main, ["-predict", bad, *out])
    assert "none.jpg" in fails(hw2_q2.main, ["-predict", "none.jpg", *out])
    (tmp_path / "empty").mkdir()
    assert "no pictures" in fails(hw2_q2.main, ["-predict", tmp_path / "empty", *out])
    nothing = ["-predict", pictures, "-output_dir", tmp_path / "nothing"]
    assert "train one first" in fails(hw2_q2.main, nothing)
    save_checkpoint(tmp_path / "x.pt")
    other = ["-predict", pictures, "-checkpoint", tmp_path / "x.pt"]
    assert "not a network of question 2" in fails(hw2_q2.main, other)
