"""Question 2: convolutional networks that classify 48x48 photographs of six landscapes.

    python hw2_q2.py -learning_rate 0.01                   batch norm + global average pooling
    python hw2_q2.py -learning_rate 0.01 -no_batch_norm    the plain network
    python hw2_q2.py -recipe best -precision bfloat16      the same network, trained better
    python hw2_q2.py -count_params                         trainable parameters, layer by layer
    python hw2_q2.py -predict beach.jpg holiday/           classify your own images

Test accuracy, mean ± standard deviation over seeds, on one thread of a CPU: batch norm and pooling
0.825 ± 0.031 (3 seeds, 23 minutes each), plain 0.783 ± 0.031 (3 seeds), best recipe 0.900 ± 0.004
(5 seeds, 18 minutes).

model | training | figures | prediction | options | main
"""

import copy
import functools
import json
import math
import os
import shlex
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

import utils
from data import image_files, sample
from utils import CLASSES, SIZE, OneOrMore, UserError, number, probability

# ----------------------------------------------------------------------------------------------
# model


class ConvBlock(nn.Module):
    """Convolution -> [batch norm] -> ReLU -> pooling -> dropout (Ioffe and Szegedy 2015).

    (B, C_in, H, W) -> (B, C_out, H', W') with H' = H / 2, or H if `pool` is 'none'. An even kernel
    is not padded, so a kernel of H pixels gives H' = 1.
    """

    def __init__(
        self, c_in: int, c_out: int, kernel_size: int, batch_norm: bool, pool: str, dropout: float
    ):
        super().__init__()
        stride = 2 if pool == "stride" else 1
        padding = kernel_size // 2 if kernel_size % 2 else 0
        self.conv = nn.Conv2d(c_in, c_out, kernel_size, stride, padding)
        self.norm = nn.BatchNorm2d(c_out) if batch_norm else nn.Identity()
        self.pool = {"max": nn.MaxPool2d(2), "avg": nn.AvgPool2d(2)}.get(pool, nn.Identity())
        self.dropout = utils.FastDropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        if isinstance(self.pool, nn.MaxPool2d):  # max commutes with ReLU: a quarter of the values
            return self.dropout(F.relu(self.pool(x)))
        return self.dropout(self.pool(F.relu(x)))


class ResidualBlock(ConvBlock):
    """x + block(x), (B, C, H, W) -> (B, C, H, W), without pooling (He et al. 2016, section 3.1)."""

    def __init__(self, channels: int, dropout: float):
        super().__init__(channels, channels, 3, True, "none", dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Classifier(nn.Module):
    """Images, float (B, 3, 48, 48) in 0..1, -> log-probabilities (B, 6), by a subclass's layers
    `convs`, computed in `precision` ('float32' or 'bfloat16'), and its method `logits`."""

    def __init__(self, precision: str):
        super().__init__()
        self.precision = precision

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, self.precision == "bfloat16"):
            x = self.convs(x)  # (B, C, H, W)
        x = x.float() if x.dtype == torch.bfloat16 else x
        return F.log_softmax(self.logits(x), dim=1)  # (B, 6)


class CNN(Classifier):
    """Three blocks of `convs` convolutions and three linear layers; the original has convs = 1.

    head: 'flatten' gives fc1 the whole last feature map, 'gap' its mean over positions (Lin et al.
    2013, section 3.2). A kernel of the image's size makes a single block, with 128 channels.
    """

    def __init__(
        self, batch_norm: bool = True, head: str = "gap", pool: str = "max", kernel_size: int = 3,
        dropout: float = 0.1, convs: int = 1, precision: str = "float32",
    ):  # fmt: skip
        super().__init__(precision)
        whole_image = kernel_size == SIZE
        channels = (3, 128) if whole_image else (3, 32, 64, 128)
        blocks = []
        for c_in, c_out in zip(channels, channels[1:]):
            for _ in range(convs - 1):
                blocks.append(ConvBlock(c_in, c_out, kernel_size, batch_norm, "none", 0.0))
                c_in = c_out
            blocks.append(ConvBlock(c_in, c_out, kernel_size, batch_norm, pool, dropout))
        side = 1 if whole_image or head == "gap" else SIZE if pool == "none" else SIZE // 8
        self.convs = nn.Sequential(*blocks)
        self.gap = nn.AdaptiveAvgPool2d(1) if head == "gap" else nn.Identity()
        self.fc1 = FusedSGDLinear(channels[-1] * side**2, 1024)
        self.norm = nn.BatchNorm1d(1024) if batch_norm else nn.Identity()
        self.dropout = utils.FastDropout(dropout)
        self.fc2 = nn.Linear(1024, 512)
        self.fc3 = nn.Linear(512, len(CLASSES))

    def logits(self, x: Tensor) -> Tensor:
        x = self.gap(x).flatten(1)  # (B, 128, 6, 6) -> (B, 128) or (B, 4608)
        x = F.relu(self.fc1(x))  # (B, 1024)
        x = self.dropout(self.norm(x))
        x = F.relu(self.fc2(x))  # (B, 512)
        return self.fc3(x)  # (B, 6)


class ResNet(Classifier):
    """Four pooled blocks, each followed by residual blocks, and a linear layer. Most layers work on
    small feature maps, so a step takes only twice as long as the CNN's."""

    def __init__(self, dropout: float = 0.1, precision: str = "float32"):
        super().__init__(precision)
        channels, depths = (3, 32, 64, 128, 160), (1, 2, 2, 1)
        blocks = []
        for c_in, c_out, depth in zip(channels, channels[1:], depths):
            blocks.append(ConvBlock(c_in, c_out, 3, True, "max", dropout))
            blocks += [ResidualBlock(c_out, dropout) for _ in range(depth)]
        self.convs = nn.Sequential(*blocks)
        self.output = nn.Linear(channels[-1], len(CLASSES))

    def logits(self, x: Tensor) -> Tensor:
        return self.output(x.mean((2, 3)))  # (B, 160, 3, 3) -> (B, 6)


class FusedSGDLinear(nn.Linear):
    """nn.Linear that updates its weight by SGD within the backward pass if `lr` is set.

    The gradient, 19 MB for the plain network's fc1, is then never stored, which at batch size 8
    saves a quarter of a training step. The optimizer sees no gradient and skips the weight.
    """

    lr, weight_decay = None, 0.0

    def forward(self, x: Tensor) -> Tensor:
        if self.lr is None or not (self.training and torch.is_grad_enabled()):
            return super().forward(x)
        return _FusedSGDLinear.apply(x, self.weight.detach(), self.bias, self.lr, self.weight_decay)


class _FusedSGDLinear(torch.autograd.Function):
    """x Wᵀ + b, whose backward pass updates W -= lr (dyᵀ x + weight_decay W) in place."""

    @staticmethod
    def forward(ctx, x, weight, bias, lr, weight_decay):
        ctx.save_for_backward(x, weight)
        ctx.lr, ctx.weight_decay = lr, weight_decay
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dy @ weight  # before the update: the weight of the forward pass
        weight.addmm_(dy.T, x, beta=1 - ctx.lr * ctx.weight_decay, alpha=-ctx.lr)
        return dx, None, dy.sum(0), None, None


def build_model(args: Namespace) -> Classifier:
    """The network that the arguments describe."""
    if args.model == "resnet":
        model = ResNet(args.dropout, args.precision)
    else:
        shape = args.batch_norm, args.head, args.pool, args.kernel_size, args.dropout, args.convs
        model = CNN(*shape, args.precision)
    return model.to(memory_format=torch.channels_last)


def parameter_table(model: Classifier) -> list[tuple[str, tuple, str, int]]:
    """(layer, output shape, formula, count) for every layer with parameters, in order."""
    rows = []

    def add_row(name, layer, inputs, output):
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            formula = f"2 x {layer.num_features}"
        else:
            sizes = layer.weight.transpose(0, 1).shape  # (inputs, outputs) or (C_in, C_out, k, k)
            formula = f"{' x '.join(map(str, sizes))} + {len(layer.bias)}"
        rows.append((name, tuple(output.shape[1:]), formula, utils.count_parameters(layer)))

    hooks = [
        layer.register_forward_hook(functools.partial(add_row, name))
        for name, layer in model.named_modules()
        if list(layer.parameters(recurse=False))
    ]
    model.eval()(torch.zeros(1, 3, SIZE, SIZE))
    for hook in hooks:
        hook.remove()
    return rows


NETWORKS = {  # the two that the original compares
    "Plain network": {"batch_norm": False, "head": "flatten"},
    "Batch norm + global average pooling": {"batch_norm": True, "head": "gap"},
}


def print_parameters(args: Namespace) -> None:
    """Print the parameters, layer by layer, of both CNNs or of the residual network."""
    networks = {"Residual network": {}} if args.model == "resnet" else NETWORKS
    for title, shape in networks.items():
        rows = parameter_table(build_model(Namespace(**vars(args) | shape)))
        print(f"{title}\n{'layer':17}{'output shape':16}{'formula':26}{'parameters':>10}")
        for name, output, formula, count in rows:
            print(f"{name:17}{' x '.join(map(str, output)):16}{formula:26}{count:10,}")
        print(f"{'trainable parameters':59}{sum(row[-1] for row in rows):10,}\n")


# ----------------------------------------------------------------------------------------------
# training

TRAINING_VERSION = 1  # raised when a change alters the results of training
DATA_PATH = utils.ROOT / "data" / "intel_landscapes.v2.npz"
PRETRAINED = utils.ROOT / "data" / "pretrained" / "q2.pt"
AUGMENTATIONS = ("flip", "crop", "erase")
TTA = ("mirror", "shift")  # test-time augmentations
EPOCH_LINE = (
    "Epoch {:2}/{}  Training loss: {train_loss:.4f}  Training acc: {train_accuracy:.4f}  "
    "Valid acc: {val_accuracy:.4f}  ({:.1f} s)"
)


def to_float(images: Tensor) -> Tensor:
    """uint8 images (B, 3, 48, 48) -> the networks' input: float in 0..1, channels last."""
    return images.to(torch.float32, memory_format=torch.channels_last).div(255)


def scramble_pixels(images: Tensor) -> Tensor:
    """The course loader's error: channels-last images reshaped to (N, 3, 48, 48), not permuted."""
    return images.permute(0, 2, 3, 1).reshape(images.shape)


def shuffle_pixels(images: Tensor) -> Tensor:
    """Images (N, 3, 48, 48) with their pixels in a random order, the same for every image."""
    order = torch.randperm(SIZE * SIZE, generator=torch.Generator().manual_seed(0))
    return images.flatten(2)[:, :, order].reshape(images.shape)


PIXELS = {"ordered": lambda x: x, "scrambled": scramble_pixels, "shuffled": shuffle_pixels}


def shift_images(images: Tensor, dimension: int, distance: int) -> Tensor:
    """Images (B, 3, H, W) shifted by `distance` pixels along a dimension, the border repeated."""
    indices = torch.arange(images.shape[dimension], device=images.device) + distance
    return images.index_select(dimension, indices.clamp(0, images.shape[dimension] - 1))


def make_augmentation(names: list[str]) -> Callable[[Tensor], Tensor] | None:
    """A function that augments each image of (B, 3, 48, 48) at random; None without names."""
    if not names:
        return None
    from torchvision.transforms import v2  # here, for it takes two seconds and 160 MiB

    transforms = {
        "flip": v2.RandomHorizontalFlip(),
        "crop": v2.RandomCrop(SIZE, padding=4, padding_mode="reflect"),
        "erase": v2.RandomErasing(p=0.5, scale=(0.05, 0.2)),
    }
    transform = v2.Compose([transforms[name] for name in names])
    return lambda images: torch.stack([transform(image) for image in images])


def make_optimizer(model: nn.Module, args: Namespace) -> Optimizer:
    """Adam, or SGD with Nesterov momentum (Sutskever et al. 2013, section 2). On a CPU, SGD without
    momentum at a constant rate updates fc1 in the backward pass."""
    device = next(model.parameters()).device.type
    settings = {"lr": args.learning_rate, "weight_decay": args.l2_decay}
    settings["fused"] = device in ("cpu", "cuda")
    if args.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), **settings)
    if device == "cpu" and not args.momentum and args.schedule == "constant":
        for layer in model.modules():
            if isinstance(layer, FusedSGDLinear):
                layer.lr, layer.weight_decay = args.learning_rate, args.l2_decay
    settings |= {"momentum": args.momentum, "nesterov": args.momentum > 0}
    return torch.optim.SGD(model.parameters(), **settings)


def capture_cuda_graphs(model: nn.Module, batch_size: int) -> None:
    """Let the model train on batches of this size by CUDA graphs, which start all kernels of the
    forward or the backward pass at once: a GPU computes a small batch faster than a CPU starts its
    kernels one by one. Other batches, and evaluation, run as before.

    The weights may only be changed in place. Each forward pass overwrites the output of the one
    before, each backward pass the gradients. A deep copy would still call this model's graphs.
    """
    # Gradients are captured on a side stream, which is harmless.
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
    state, eager = copy.deepcopy(model.state_dict()), model.forward
    x = to_float(torch.zeros(batch_size, 3, SIZE, SIZE, dtype=torch.uint8, device="cuda"))
    graphed = torch.cuda.make_graphed_callables(model.train(), (x,)).forward
    model.forward = lambda x: graphed(x) if len(x) == batch_size else eager(x)
    model.load_state_dict(state)  # warming up has changed batch norm's statistics


def batch_sizes(count: int, batch_size: int, last_batch: str = "keep") -> list[int]:
    """The sizes of an epoch's batches. The last is merged into the one before if it is a single
    image, on which batch norm cannot train, or, with 'merge', if it is less than half full."""
    full, rest = divmod(count, batch_size)
    if full and (rest == 1 or (last_batch == "merge" and 0 < 2 * rest < batch_size)):
        return [batch_size] * (full - 1) + [batch_size + rest]
    return [batch_size] * full + [rest] * (rest > 0)


def train(args: Namespace) -> None:
    """Train a network, or resume its training; write a checkpoint after each epoch, at the end
    record and figures. Raises UserError."""
    data, device = load_data(args), utils.prepare_device(args.device, args.threads)
    run = make_run(args, data)
    with utils.run_lock(run):
        if args.restart:
            utils.discard_checkpoint(run)
        elif record := finished_record(run, args):
            print(f"{run.name} is finished; -restart retrains it", summary(record, "\n"), sep="\n")
            return
        splits = {split: to_device(*part, device, args) for split, part in data.splits.items()}
        utils.seed_everything(args.seed)
        model = build_model(args).to(device)
        optimizer = make_optimizer(model, args)
        print(f"Run {run.name}\nTrainable parameters: {utils.count_parameters(model):,}")
        sizes = batch_sizes(len(splits["train"][1]), args.batch_size, args.last_batch)
        if args.batch_norm and sizes == [1]:
            raise UserError("batch norm needs at least 2 training images; try -no_batch_norm")
        saved = utils.resume(run, model, optimizer)
        if not saved["seconds"]:
            utils.note_shorter_run(run)
        if device.type == "cuda":
            capture_cuda_graphs(model, sizes[0])  # it keeps the resumed weights
        history, seconds = saved["history"], saved["seconds"]
        with utils.recording_divergence(run, model, history, seconds):
            for epoch in range(len(seconds) + 1, args.epochs + 1):
                started = time.perf_counter()
                row = train_one_epoch(model, optimizer, *splits["train"], sizes, epoch, args)
                valid = evaluate(model, *splits["val"])
                if not math.isfinite(valid["loss"]):  # the last step ruined the weights
                    raise utils.Diverged(epoch, len(sizes))
                row |= {"val_loss": valid["loss"], "val_accuracy": valid["accuracy"]}
                for column, value in row.items():
                    history.setdefault(column, []).append(value)
                seconds.append(time.perf_counter() - started)
                utils.save_checkpoint(run, model, optimizer, history, seconds)
                print(EPOCH_LINE.format(epoch, args.epochs, seconds[-1], **row), flush=True)
        record = utils.new_record(run, model, history, seconds)
        record["final"] = score(model, splits, args.tta)
        print(summary(record, "\n"))
        draw_figures(run, args, record, model, *data.splits["test"])
        print(utils.store_record(run, record))  # last: a run with final scores is complete
        print(f"Figures: {run.figures}\nCheckpoint: {run.checkpoint}")


def finished_record(run: utils.Run, args: Namespace) -> dict[str, Any]:
    """The record of a run that is trained and scored, or {}."""
    return utils.finished_record(run)


def train_one_epoch(
    model: nn.Module, optimizer: Optimizer, images: Tensor,
    labels: Tensor, sizes: list[int], epoch: int, args: Namespace,
) -> dict[str, float]:  # fmt: skip
    """Train on all images, uint8 (N, 3, 48, 48), in random order, in batches of these `sizes`.
    Returns the mean loss (nats) and accuracy of the batches as trained on, with dropout,
    augmentation and label smoothing. Raises utils.Diverged."""
    utils.seed_everything(args.seed, epoch)
    model.train()
    augment = make_augmentation(args.augment)
    running_sums = torch.zeros(3, device=labels.device)  # loss, correct, batches of finite loss
    order = torch.randperm(len(labels), device=labels.device)
    batches = tqdm(order.split(sizes), unit="batch", leave=False, disable=None)
    for i, indices in enumerate(batches):
        step, steps = (epoch - 1) * len(sizes) + i, args.epochs * len(sizes)
        rate = utils.learning_rate(args.schedule, args.learning_rate, step, steps)
        utils.set_learning_rate(optimizer, rate)

        x, y = images[indices], labels[indices]  # (B, 3, 48, 48), (B,)
        log_probs = model(to_float(augment(x) if augment else x))  # (B, 6)
        loss = F.nll_loss(log_probs, y)
        if args.label_smoothing:  # Szegedy et al. 2016, section 7
            loss = (1 - args.label_smoothing) * loss - args.label_smoothing * log_probs.mean()
        optimizer.zero_grad()
        loss.backward()  # on a CPU it may also update fc1: FusedSGDLinear
        optimizer.step()

        loss, correct = loss.detach(), (log_probs.detach().argmax(1) == y).sum()
        running_sums.add_(torch.stack((loss * len(y), correct, loss.isfinite())))
        utils.check_divergence(running_sums, epoch, i + 1, len(sizes))
    loss, accuracy, _ = (running_sums / len(labels)).tolist()
    return {"train_loss": loss, "train_accuracy": accuracy}


def to_device(images: Tensor, labels: Tensor, device: Any, args: Namespace) -> tuple[Tensor, ...]:
    """A split as the network sees it: its pixels in the order of -pixels, channels last."""
    images = PIXELS[args.pixels](images)
    return images.to(device, memory_format=torch.channels_last), labels.to(device)


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, tta: Sequence[str] = ()) -> Tensor:
    """Log-probabilities (N, 6), on the CPU, of uint8 images (N, 3, 48, 48): with test-time
    augmentation those of the mean probabilities over an image's variants."""
    model.eval()
    batches = []
    for x in map(to_float, images.split(64)):
        variants = [x]
        if "mirror" in tta:
            variants += [x.flip(3)]
        if "shift" in tta:  # 2 pixels up, down, left and right
            shifts = [(dimension, distance) for dimension in (2, 3) for distance in (-2, 2)]
            variants += [shift_images(variant, *shift) for variant in variants for shift in shifts]
        log_probs = torch.stack([model(variant) for variant in variants])  # (variants, B, 6)
        batches.append(log_probs.logsumexp(0) - math.log(len(variants)))
    return torch.cat(batches).cpu()


def evaluate(model: nn.Module, images: Tensor, labels: Tensor, tta: Sequence[str] = ()) -> dict:
    """classification_metrics of the predictions on uint8 images (N, 3, 48, 48), labels (N,)."""
    return classification_metrics(predict(model, images, tta), labels.cpu())


def classification_metrics(log_probs: Tensor, labels: Tensor) -> dict[str, Any]:
    """Mean loss (nats), accuracy (0..1) and confusion matrix of log-probabilities (N, 6)."""
    predicted = log_probs.argmax(1)
    pairs = torch.bincount(labels * len(CLASSES) + predicted, minlength=len(CLASSES) ** 2)
    return {
        "loss": F.nll_loss(log_probs, labels).item(),
        "accuracy": (predicted == labels).double().mean().item(),
        "confusion": pairs.view(len(CLASSES), -1).tolist(),  # rows: true, columns: predicted
    }


def score(model: nn.Module, splits: dict[str, tuple], tta: Sequence[str]) -> dict[str, dict]:
    """Validation and test metrics; with test-time augmentation also the accuracy without it."""
    final = {split: evaluate(model, *splits[split], tta) for split in ("val", "test")}
    if tta:
        for split, metrics in final.items():
            metrics["accuracy_without_tta"] = evaluate(model, *splits[split])["accuracy"]
    return final


def summary(record: dict[str, Any], separator: str = "  ") -> str:
    """A record's result: the accuracies, or where it diverged."""
    if "final" not in record:
        return f"diverged in epoch {record['diverged_in_epoch']}"
    mark = " (built-in sample)" if record["data"]["name"] == "sample" else ""
    valid, test = (f"{record['final'][split]['accuracy']:.4f}{mark}" for split in ("val", "test"))
    return f"Valid acc: {valid}{separator}Final Test acc: {test}"


def load_data(args: Namespace) -> utils.Landscapes:
    """The images of -data_path, or of its default file, or else the built-in sample."""
    if args.data_path or DATA_PATH.exists():
        return utils.load_landscapes(args.data_path or DATA_PATH)
    print("No photographs found: training on the built-in SAMPLE of drawn landscapes.")
    print("  To get the photographs: python -m data.prepare_landscapes --download")
    return sample.draw_landscapes()


def overrides(args: Namespace, without: tuple[str, ...]) -> dict[str, Any]:
    """The arguments that differ from the defaults, except those called `without`."""
    defaults = parse_args([] if args.batch_norm else ["-no_batch_norm"])  # -head depends on it
    arguments = {} if args.batch_norm else {"batch_norm": False}
    return arguments | utils.overrides(args, defaults, without)


def make_run(args: Namespace, data: utils.Landscapes) -> utils.Run:
    """The run of these arguments on these data."""
    arguments = overrides(args, RUNTIME_OPTIONS)
    cnn = f"{'bn' if args.batch_norm else 'plain'}-{args.head}"
    network = "resnet" if args.model == "resnet" else cnn
    pixels = "" if args.pixels == "ordered" else f"-{args.pixels}"
    title = f"q2-{network}-lr{args.learning_rate:g}{pixels}-seed{args.seed}-{data.name}"
    command = shlex.join(["python", "hw2_q2.py", *utils.to_argv(DASH, arguments)])
    identity = arguments, {"name": data.name, "fingerprint": data.fingerprint}, TRAINING_VERSION
    return utils.Run(title, command, *identity, args.epochs, args.output_dir)


# ----------------------------------------------------------------------------------------------
# figures


def draw_figures(
    run: utils.Run, args: Namespace, record: dict, model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    """Draw the curves of a run, its confusion matrix and four test images of each class."""
    history, folder = record["history"], run.figures
    loss, accuracy = history["train_loss"], history["val_accuracy"]
    utils.plot_curve(folder / "training-loss.png", run.title, "Training loss (nats)", loss)
    utils.plot_curve(folder / "validation-accuracy.png", run.title, "Validation accuracy", accuracy)
    confusion = plot_confusion(run.title, record["final"]["test"]["confusion"])
    utils.save_figure(folder / "confusion-matrix.png", confusion)
    shown = [i for c in range(len(CLASSES)) for i in (labels == c).nonzero()[:4, 0].tolist()]
    images, labels = images[shown], labels[shown]
    inputs, _ = to_device(images, labels, next(model.parameters()).device, args)
    predicted = predict(model, inputs, args.tta).argmax(1)
    draw_images(folder / "test-images.png", run.title, images, labels, predicted)


def plot_confusion(title: str, confusion: list[list[int]]) -> utils.Figure:
    """A figure of a confusion matrix (6, 6): counts in the cells, each class's recall beside it."""
    fig, axes = utils.new_figure(4.6, 3.9)
    axes.grid(False)
    shares = [[count / max(1, sum(row)) for count in row] for row in confusion]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(confusion):
        for j, count in enumerate(row):
            color = "white" if shares[i][j] > 0.6 else "black"
            axes.text(j, i, count, ha="center", va="center", color=color)
    names = [f"{name}\nrecall {shares[i][i]:.2f}" for i, name in enumerate(CLASSES)]
    axes.set_xticks(range(len(CLASSES)), CLASSES, rotation=35, ha="right")
    axes.set_yticks(range(len(CLASSES)), names)
    axes.set(title=title, xlabel="Predicted class", ylabel="True class (test images)")
    return fig


def draw_images(path: Path, title: str, images: Tensor, labels: Tensor, predicted: Tensor) -> None:
    """Draw images (N, 3, 48, 48), four to a column, with true and predicted classes (N,)."""
    columns = math.ceil(len(images) / 4)
    fig, grid = utils.new_figure(1.05 * columns, 5.4, 4, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, true, guess in zip(grid.T.flat, images, labels, predicted):
        axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        color = "black" if true == guess else utils.VERMILION
        note = "" if true == guess else f"\npredicted {CLASSES[guess]}"
        axes.set_title(CLASSES[true] + note, fontsize=7, color=color)
    fig.suptitle(f"{title}\nTest images with their true class; red: misclassified", fontsize=8)
    utils.save_figure(path, fig)


# ----------------------------------------------------------------------------------------------
# prediction


def load_network(path: Path, device: Any = "cpu") -> tuple[Classifier, Namespace, dict]:
    """A checkpoint's network, ready to predict, its arguments and its content. Raises UserError."""
    saved = utils.load_checkpoint(path, device)
    with utils.checkpoint_errors(f"{path}: not a network of question 2"):
        args = parse_args(shlex.split(saved["command"])[2:])
        model = build_model(args).to(device)
        model.load_state_dict(saved["model"])
        utils.require_finite(model)
        validation_accuracy(saved)  # raises unless there is a history
    return model.eval(), args, saved


def validation_accuracy(saved: dict[str, Any]) -> float | None:
    """A network's last validation accuracy; None if it is that on the built-in sample."""
    accuracy = float(saved["history"]["val_accuracy"][-1])
    return None if saved["data"]["name"] == "sample" else accuracy


def choose_network(args: Namespace) -> Path:
    """-checkpoint, or the best network trained here on photographs, or the shipped one."""
    folder = args.output_dir / "checkpoints"
    return args.checkpoint or utils.best_checkpoint(folder, "q2-", validation_accuracy, PRETRAINED)


def read_images(paths: list[Path]) -> tuple[dict[Path, Tensor], list[str]]:
    """The images (3, 48, 48) of the readable files among `paths` and in the folders among them, and
    what is wrong with other paths. Skips unreadable files in folders with a message."""
    named, images, problems = {}, {}, []  # named: {file: whether it is itself among `paths`}
    for path in [path for pattern in paths for path in image_files.expand_pattern(pattern)]:
        is_folder = os.path.isdir(path)
        files = image_files.find_images(path) if is_folder else [path]
        for file in files:
            named[file] = named.get(file, False) or not is_folder
        problems += [] if files else [utils.printable(f"{path}: no images in this folder")]
    for file, is_named in tqdm(named.items(), unit="image", leave=False, disable=None):
        try:
            images[file] = image_files.read_image(file)
        except UserError as error:
            if is_named:
                problems.append(str(error))
            else:
                tqdm.write(f"Skipping {error}", file=sys.stderr)
    if not images and not problems:
        problems = ["none of these images can be read"]
    return images, problems


def predict_files(args: Namespace) -> None:
    """Print the classes of the images under -predict. Raises UserError, after all answers, if one
    of these paths cannot be read."""
    path, device = choose_network(args), utils.prepare_device(args.device, args.threads)
    model, trained, saved = load_network(path, device)
    images, problems = read_images(args.predict)
    if images:
        accuracy = float(saved["history"]["val_accuracy"][-1])
        note = " without test-time augmentation" if trained.tta else ""
        note += ", trained on the built-in SAMPLE" if validation_accuracy(saved) is None else ""
        print(f"Network: {path} (validation accuracy {accuracy:.4f}{note})", file=sys.stderr)
        inputs = PIXELS[trained.pixels](torch.stack([*images.values()])).to(device)
        print_answers(list(images), predict(model, inputs, trained.tta).exp(), args.json)
    for problem in problems[:-1]:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        raise UserError(problems[-1])


def print_answers(files: list[Path], probabilities: Tensor, as_json: bool) -> None:
    """Print class and probabilities (N, 6) of image files, as a table or as JSON."""
    answers = []
    for file, row in zip(files, probabilities.tolist()):
        answer = {"image": str(file), "class": CLASSES[row.index(max(row))]}
        answers.append(answer | {"probabilities": dict(zip(CLASSES, row))})
    if as_json:
        print(json.dumps(answers, indent=1, ensure_ascii=False))
        return
    names = [utils.printable(answer["image"]) for answer in answers]
    width = max(map(len, ("image", *names)))
    print(f"{'image':{width}}  {'class':9}  " + " ".join(f"{name:>9}" for name in CLASSES))
    for name, answer in zip(names, answers):
        columns = " ".join(f"{p:9.3f}" for p in answer["probabilities"].values())
        print(f"{name:{width}}  {answer['class']:9}  {columns}")


# ----------------------------------------------------------------------------------------------
# options

DASH = "-"
RUNTIME_OPTIONS = (  # where and how a run is made: they do not identify it
    "device", "threads", "jobs", "scheduler", "restart", "output_dir", "data_path",
    "count_params", "predict", "checkpoint", "json",
)  # fmt: skip
PRESETS = {
    "assignment": {},
    "best": {
        "batch_size": 64, "learning_rate": 0.1, "momentum": 0.9, "schedule": "one_cycle",
        "epochs": 60, "l2_decay": 5e-4, "dropout": 0.0, "label_smoothing": 0.1,
        "augment": ["flip", "crop", "erase"], "tta": ["mirror", "shift"],
    },
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The command line. Raises UserError, also if options contradict each other."""
    args = utils.parse_with_presets(make_parser, PRESETS, argv)
    if args.kernel_size == SIZE:
        if args.convs > 1 or args.pool not in ("max", "none"):
            raise UserError(f"-kernel_size {SIZE} is a single convolution: drop -pool and -convs")
        args.pool = "none"
    args.head = args.head or ("gap" if args.batch_norm else "flatten")
    args.last_batch = args.last_batch or ("merge" if args.batch_norm else "keep")
    args.augment = [name for name in AUGMENTATIONS if name in args.augment]  # in one order
    args.tta = [name for name in TTA if name in args.tta]
    shape = args.batch_norm, args.head, args.pool, args.kernel_size, args.convs
    if args.model == "resnet" and shape != (True, "gap", "max", 3, 1):
        raise UserError("-model resnet has a fixed shape: -dropout is its only network option")
    if args.pixels != "ordered" and (args.augment or args.tta):
        problem = f"-pixels {args.pixels} cannot be combined with -augment or -tta"
        raise UserError(f"{problem}; with -recipe best, add both without a name")
    if args.momentum and args.optimizer != "sgd":
        raise UserError("-momentum needs -optimizer sgd; with adam, -momentum 0")
    if args.batch_norm and args.batch_size == 1:
        raise UserError("batch norm needs at least -batch_size 2; or use -no_batch_norm")
    if args.predict and args.count_params:
        raise UserError("give either -predict or -count_params")
    if args.predict is None and (args.checkpoint or args.json):
        raise UserError("-checkpoint and -json need -predict")
    return args


# fmt: off
def make_parser() -> utils.Parser:
    """The parser of the command line; its defaults are the assignment's recipe."""
    parser = utils.Parser("hw2_q2.py", description=__doc__.rpartition("\n\n")[0])
    group = parser.add_argument_group
    add_training_options(group("training").add_argument)
    add_network_options(group("network"))
    add_data_options(group("images"))
    utils.add_runtime_options(parser, DASH, "one per core, or one if several runs are trained")
    add = group("instead of training").add_argument
    add("-count_params", action="store_true",
        help="print the parameters, layer by layer, of both CNNs, or of the residual network")
    add("-predict", nargs="+", type=Path, metavar="PATH", help="classify image files or folders")
    add("-checkpoint", type=Path, metavar="FILE",
        help="network for -predict (default: the one with the best validation accuracy on "
        "photographs, else data/pretrained/q2.pt)")
    add("-json", action="store_true",
        help="print predictions as a JSON list; images that cannot be read are omitted")
    return parser


def add_training_options(add: Callable) -> None:
    """Add the options of training."""
    count, decay = number(int, 1, 10**6), number(float, 0, 1000)
    rate = number(float, 0, 1000, low_open=True)
    add("-learning_rate", type=rate, default=0.01, nargs="+", metavar="RATE", action=OneOrMore,
        help="learning rate; several rates: one run each, side by side (default: %(default)s)")
    add("-epochs", type=count, default=40, help="number of training epochs (default: %(default)s)")
    add("-batch_size", type=count, default=8, help="batch size (default: %(default)s)")
    add("-last_batch", choices=("keep", "merge"),
        help="keep an epoch's last batch if it is less than half full, or merge it into the one "
        "before (default: merge with batch norm, else keep); a single image is always merged")
    add("-l2_decay", type=decay, default=0.0, help="weight decay (default: %(default)s)")
    add("-optimizer", choices=("sgd", "adam"), default="sgd",
        help="SGD or Adam (default: %(default)s)")
    add("-momentum", type=probability, default=0.0, help="Nesterov momentum (default: %(default)s)")
    add("-precision", choices=("float32", "bfloat16"), default="float32",
        help="precision of convolutions; bfloat16 is faster on some CPUs (default: %(default)s)")
    utils.add_training_options(add, DASH, PRESETS)


def add_network_options(group: Any) -> None:
    """Add the options that describe the network."""
    add, pools = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("-model", choices=("cnn", "resnet"), default="cnn",
        help="the original's CNN, or a residual network, whose only option is -dropout "
        "(default: %(default)s)")
    add("-dropout", type=probability, default=0.1,
        help="dropout probability (default: %(default)s)")
    add("-no_batch_norm", dest="batch_norm", action="store_false",
        help="omit batch norm; changes the defaults of -head and -last_batch")
    add("-head", choices=("gap", "flatten"),
        help="input of the linear layers: the last feature map's global average, or all of it "
        "(default: gap with batch norm, else flatten)")
    pools("-pool", choices=("max", "avg", "stride", "none"), default="max",
        help="what halves the feature map in a block: max pooling, average pooling, a convolution "
        "of stride 2, or nothing (default: %(default)s)")
    pools("-no_maxpool", dest="pool", action="store_const", const="stride",
        help="the course's name for -pool stride")
    add("-kernel_size", type=number(int, 1, SIZE), choices=(1, 3, 5, 7, 9, 11, SIZE), default=3,
        help=f"kernel size; {SIZE}: one convolution over the whole image (default: %(default)s)")
    add("-convs", type=number(int, 1, 4), default=1,
        help="convolutions per block (default: %(default)s)")


def add_data_options(group: Any) -> None:
    """Add the options of the images."""
    add, pixels = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("-data_path", type=Path, metavar="FILE",
        help=".npz file (default: data/intel_landscapes.v2.npz, else a built-in sample)")
    pixels("-pixels", choices=PIXELS, default="ordered",
        help="order of the pixels: ordered; scrambled, as by the course's loader; shuffled, one "
        "random order for all images (default: %(default)s)")
    pixels("-scramble_pixels", dest="pixels", action="store_const", const="scrambled",
        help="short for -pixels scrambled")
    add("-augment", nargs="*", default=[], choices=AUGMENTATIONS, metavar="NAME",
        help=f"random augmentations of training images: {', '.join(AUGMENTATIONS)}; none without a "
        "name")
    add("-tta", nargs="*", default=[], choices=TTA, metavar="NAME",
        help="test-time augmentation: average the probabilities of an image and its variants; "
        "mirror: flipped; shift: shifted by 2 pixels up, down, left and right; none without a name")

# fmt: on


# ----------------------------------------------------------------------------------------------
# main


def main(argv: list[str] | None = None) -> None:
    """Do what the command line asks for."""
    args = parse_args(argv)
    if args.count_params:
        print_parameters(args)
    elif args.predict:
        predict_files(args)
    else:
        configs = utils.expand(args, "learning_rate", "seed")
        if args.precision == "bfloat16":
            threads = args.threads or (1 if len(configs) > 1 else None)  # of a run
            device = utils.prepare_device(args.device, threads)
            if device.type == "cpu" and not utils.bfloat16_is_faster():
                print("float32 is faster than bfloat16 on this processor", file=sys.stderr)
        if len(configs) > 1:
            utils.train_side_by_side(sys.modules[__name__], configs)
        else:
            train(args)


if __name__ == "__main__":
    utils.run_script(main)
