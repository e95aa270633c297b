"""Question 2: convolutional networks that classify 48x48 photographs of six landscapes.

    python hw2_q2.py -learning_rate 0.01                   batch norm + global average pooling
    python hw2_q2.py -learning_rate 0.01 -no_batch_norm    the plain network
    python hw2_q2.py -recipe best                          the same network, trained better
    python hw2_q2.py -count_params                         trainable parameters, layer by layer
    python hw2_q2.py -predict beach.jpg holiday/           classify your own images

Test accuracy, mean ± standard deviation over seeds, on one thread of a CPU: 0.825 ± 0.031 (3 seeds,
23 minutes each), plain 0.783 ± 0.031 (3 seeds), best recipe 0.900 ± 0.004 (5 seeds, 18 minutes).

model | training | figures | prediction | options | main
"""

import functools
import json
import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

import utils
from data import sample
from utils import CLASSES, SIZE, UserError

# ----------------------------------------------------------------------------------------------
# model


class ConvBlock(nn.Module):
    """Convolution -> [batch norm] -> ReLU -> pooling -> dropout.

    (B, C_in, H, W) -> (B, C_out, H', W') with H' = H / 2, or H if `pool` is 'none'. An even kernel
    is not padded, so a kernel of H pixels gives H' = 1. Batch norm: Ioffe and Szegedy 2015, section
    3.2 (before the nonlinearity).
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, batch_norm: bool, pool: str,
        dropout: float,
    ):  # fmt: skip
        super().__init__()
        stride = 2 if pool == "stride" else 1
        padding = kernel_size // 2 if kernel_size % 2 else 0
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding)
        self.norm = nn.BatchNorm2d(out_channels) if batch_norm else nn.Identity()
        self.pool = {"max": nn.MaxPool2d(2), "avg": nn.AvgPool2d(2)}.get(pool, nn.Identity())
        self.dropout = utils.FastDropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        if isinstance(self.pool, nn.MaxPool2d):  # max commutes with ReLU: a quarter of the values
            return self.dropout(F.relu(self.pool(x)))
        return self.dropout(self.pool(F.relu(x)))


class ResidualBlock(ConvBlock):
    """A block without pooling, added to its input, (B, C, H, W) -> (B, C, H, W) (He et al. 2016,
    "Deep residual learning", section 3.1)."""

    def __init__(self, channels: int, dropout: float):
        super().__init__(channels, channels, 3, True, "none", dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Classifier(nn.Module):
    """Images, float (B, 3, 48, 48) in 0..1, -> log-probabilities (B, 6), by the layers `convs` and
    the method `logits` of a subclass. precision: 'bfloat16' for the convolutions, or 'float32'."""

    def __init__(self, precision: str):
        super().__init__()
        self.precision = precision

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, self.precision == "bfloat16"):
            x = self.convs(x)  # (B, C, H, W)
        x = x.float() if x.dtype == torch.bfloat16 else x
        return F.log_softmax(self.logits(x), dim=1)  # (B, 6)


class CNN(Classifier):
    """Three convolution blocks and three linear layers, the original's network.

    head: 'flatten' gives fc1 the whole last feature map, 'gap' its mean over positions (Lin et al.
    2013, section 3.2). convs: convolutions per block, the last of which is pooled (Simonyan and
    Zisserman 2015, section 2.3). A kernel of the image's size makes it one block with the last
    block's channels.
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
            for i in range(convs):
                last = (pool, dropout) if i == convs - 1 else ("none", 0.0)
                shape = c_in if i == 0 else c_out, c_out, kernel_size
                blocks.append(ConvBlock(*shape, batch_norm, *last))
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
    """Four blocks that halve the feature map, each followed by residual blocks, and one linear
    layer. Most layers are where maps are small, so a step takes only twice as long as the CNN's."""

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
    """nn.Linear that takes its weight's SGD step within the backward pass if `lr` is set.

    Then the gradient, 19 MB for the plain network's fc1, is never stored, which at batch size 8
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
        model = CNN(
            args.batch_norm, args.head, args.pool, args.kernel_size, args.dropout, args.convs,
            args.precision,
        )  # fmt: skip
    return model.to(memory_format=torch.channels_last)


def parameter_table(model: Classifier) -> list[tuple[str, tuple, str, int]]:
    """(layer, output shape, formula, count) for every layer with parameters, in order."""
    rows = []

    def add_row(name, layer, inputs, output):
        if isinstance(layer, nn.Conv2d):
            c_out, c_in, height, width = layer.weight.shape
            formula = f"{c_in} x {c_out} x {height} x {width} + {c_out}"
        elif isinstance(layer, nn.Linear):
            formula = f"{layer.in_features} x {layer.out_features} + {layer.out_features}"
        else:
            formula = f"2 x {layer.num_features}"
        rows.append((name, tuple(output.shape[1:]), formula, utils.count_parameters(layer)))

    hooks = [
        layer.register_forward_hook(functools.partial(add_row, name))
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.BatchNorm1d))
    ]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, SIZE, SIZE))
    for hook in hooks:
        hook.remove()
    return rows


def print_parameters(args: Namespace) -> None:
    """Print the parameters, layer by layer, of both CNNs or of the residual network."""
    networks = {
        "Plain network": {"batch_norm": False, "head": "flatten"},
        "Network with batch norm and global average pooling": {"batch_norm": True, "head": "gap"},
    }
    if args.model == "resnet":
        networks = {"Residual network": {}}
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
AUGMENTATIONS = {  # name: (class in torchvision.transforms.v2, its arguments)
    "flip": ("RandomHorizontalFlip", {}),
    "crop": ("RandomCrop", {"size": SIZE, "padding": 4, "padding_mode": "reflect"}),
    "erase": ("RandomErasing", {"p": 0.5, "scale": (0.05, 0.2)}),
}
TTA = ("mirror", "shift")  # test-time augmentations


def to_float(images: Tensor) -> Tensor:
    """uint8 images (B, 3, 48, 48) -> the networks' input: float in 0..1, channels last."""
    return images.to(torch.float32, memory_format=torch.channels_last).div(255)


def scramble_pixels(images: Tensor) -> Tensor:
    """Images (N, 3, 48, 48) as the course's loader passed them on: it flattened channels-last
    images and reshaped the rows without moving the channel axis."""
    return images.permute(0, 2, 3, 1).reshape(images.shape)


def shuffle_pixels(images: Tensor) -> Tensor:
    """Images (N, 3, 48, 48) with their pixels in a random order, the same for every image."""
    order = torch.randperm(SIZE * SIZE, generator=torch.Generator().manual_seed(0))
    return images.flatten(2)[:, :, order].reshape(images.shape)


PIXELS = {
    "ordered": lambda images: images,
    "scrambled": scramble_pixels,
    "shuffled": shuffle_pixels,
}


def shift_images(images: Tensor, dimension: int, distance: int) -> Tensor:
    """Images (B, 3, H, W) shifted by some pixels along a dimension, the border repeated."""
    indices = torch.arange(images.shape[dimension], device=images.device) + distance
    return images.index_select(dimension, indices.clamp(0, images.shape[dimension] - 1))


def make_augmentation(names: list[str]) -> Callable[[Tensor], Tensor] | None:
    """A function that augments each of some images (B, 3, 48, 48) at random; None without names."""
    if not names:
        return None
    from torchvision.transforms import v2  # here, for it takes two seconds and 160 MiB

    classes = (AUGMENTATIONS[name] for name in names)
    transform = v2.Compose([getattr(v2, name)(**arguments) for name, arguments in classes])
    return lambda images: torch.stack([transform(image) for image in images])


def make_optimizer(model: nn.Module, args: Namespace) -> Optimizer:
    """SGD, its momentum Nesterov's (Sutskever et al. 2013, section 2), or Adam. On a CPU, SGD
    without momentum at a constant rate updates fc1 in the backward pass."""
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


def batch_sizes(count: int, batch_size: int, last_batch: str = "keep") -> list[int]:
    """The sizes of an epoch's batches of `count` images. A last batch less than half full is merged
    into the one before if `last_batch` is 'merge', and a single image, on which batch norm cannot
    train, always."""
    full, rest = divmod(count, batch_size)
    is_small = rest == 1 or (last_batch == "merge" and 2 * rest < batch_size)
    if full and rest and is_small:
        return [batch_size] * (full - 1) + [batch_size + rest]
    return [batch_size] * full + [rest] * (rest > 0)


def train(args: Namespace) -> None:
    """Train one network, resuming if it was interrupted; write a checkpoint per epoch, finally
    record and figures. Raises UserError."""
    data, device = load_data(args), utils.prepare_device(args.device, args.threads)
    if args.precision == "bfloat16" and device.type == "cpu" and not utils.bfloat16_is_faster():
        print("This processor emulates bfloat16: float32 is faster here", file=sys.stderr)
    run = make_run(args, data)
    with utils.run_lock(run):
        if args.restart:
            run.checkpoint.unlink(missing_ok=True)
        elif record := utils.finished_record(run):
            print(f"{run.name} is finished; -restart retrains it")
            print_scores(record)
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
                print_epoch(epoch, args.epochs, row, seconds[-1])
                utils.save_checkpoint(run, model, optimizer, history, seconds)
        record = utils.new_record(run, model, history, seconds)
        record["final"] = score(model, splits, args.tta)
        print_scores(record)
        draw_figures(run.figures, record, args, model, *data.splits["test"], splits["test"][0])
        print(utils.store_record(run, record))  # last: a run with final scores is complete
        print(f"Figures: {run.figures}\nCheckpoint: {run.checkpoint}")


def train_one_epoch(
    model: nn.Module, optimizer: Optimizer, images: Tensor,
    labels: Tensor, sizes: list[int], epoch: int, args: Namespace,
) -> dict[str, float]:  # fmt: skip
    """Train on all images, uint8 (N, 3, 48, 48), in random order, in batches of these `sizes`.
    Returns the mean loss (nats) and accuracy, dropout included. Raises utils.Diverged.

    Label smoothing: Szegedy et al. 2016, section 7.
    """
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
        if args.label_smoothing:
            loss = (1 - args.label_smoothing) * loss - args.label_smoothing * log_probs.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        loss, correct = loss.detach(), (log_probs.detach().argmax(1) == y).sum()
        running_sums.add_(torch.stack((loss * len(y), correct, loss.isfinite())))
        utils.check_divergence(running_sums, epoch, i + 1, len(sizes))
    loss, accuracy, _ = (running_sums / len(labels)).tolist()
    return {"train_loss": loss, "train_accuracy": accuracy}


def to_device(
    images: Tensor, labels: Tensor, device: torch.device, args: Namespace
) -> tuple[Tensor, Tensor]:
    """A split as the network sees it: its pixels in the order of -pixels, channels last."""
    images = PIXELS[args.pixels](images)
    return images.to(device, memory_format=torch.channels_last), labels.to(device)


@torch.inference_mode()
def predict(
    model: nn.Module, images: Tensor, tta: tuple[str, ...] | list[str] = (),
    batch_size: int = 64,
) -> Tensor:  # fmt: skip
    """Log-probabilities (N, 6), on the CPU, of uint8 images (N, 3, 48, 48); with test-time
    augmentation those of the mean probabilities over an image's variants."""
    model.eval()
    return torch.cat([_predict(model, to_float(x), tta) for x in images.split(batch_size)]).cpu()


def _predict(model, x, tta):
    variants = [x]
    if "mirror" in tta:
        variants += [image.flip(3) for image in variants]
    if "shift" in tta:  # 2 pixels up, down, left and right
        shifts = [(dimension, distance) for dimension in (2, 3) for distance in (-2, 2)]
        variants += [shift_images(image, *shift) for image in variants for shift in shifts]
    if len(variants) == 1:
        return model(x)
    log_probs = torch.stack([model(variant) for variant in variants])  # (variants, B, 6)
    return log_probs.logsumexp(0) - math.log(len(variants))


def evaluate(
    model: nn.Module, images: Tensor, labels: Tensor, tta: list[str] | tuple = ()
) -> dict[str, Any]:
    """classification_metrics of the predictions on uint8 images (N, 3, 48, 48), labels (N,)."""
    return classification_metrics(predict(model, images, tta), labels.cpu())


def classification_metrics(log_probs: Tensor, labels: Tensor) -> dict[str, Any]:
    """Mean loss (nats), accuracy (0..1) and confusion matrix, rows true, columns predicted, of
    log-probabilities (N, 6), on the CPU."""
    return {
        "loss": F.nll_loss(log_probs, labels).item(),
        "accuracy": (log_probs.argmax(1) == labels).sum().item() / len(labels),
        "confusion": confusion_matrix(log_probs, labels).tolist(),
    }


def confusion_matrix(log_probs: Tensor, labels: Tensor) -> Tensor:
    """How many images of each class (rows) are predicted as each class (columns), (6, 6)."""
    pairs = labels * len(CLASSES) + log_probs.argmax(1)
    return torch.bincount(pairs, minlength=len(CLASSES) ** 2).view(len(CLASSES), -1)


def score(model: nn.Module, splits: dict[str, tuple], tta: list[str]) -> dict[str, dict]:
    """Final metrics on validation and test images; with test-time augmentation also the accuracy
    without it."""
    final = {split: evaluate(model, *splits[split], tta) for split in ("val", "test")}
    if tta:
        for split, metrics in final.items():
            metrics["accuracy_without_tta"] = evaluate(model, *splits[split])["accuracy"]
    return final


def print_epoch(epoch: int, epochs: int, row: dict[str, float], seconds: float) -> None:
    scores = f"Training loss: {row['train_loss']:.4f}  Training acc: {row['train_accuracy']:.4f}"
    scores += f"  Valid acc: {row['val_accuracy']:.4f}  ({seconds:.1f} s)"
    print(f"Epoch {epoch:2}/{epochs}  {scores}", flush=True)


def print_scores(record: dict[str, Any]) -> None:
    mark = " (built-in sample)" if record["data"]["name"] == "sample" else ""
    print(f"Valid acc: {record['final']['val']['accuracy']:.4f}{mark}")
    print(f"Final Test acc: {record['final']['test']['accuracy']:.4f}{mark}")


def summary(record: dict[str, Any]) -> str:
    """A record's result in one line."""
    if "final" not in record:
        return f"diverged in epoch {record['diverged_in_epoch']}"
    valid, test = (record["final"][split]["accuracy"] for split in ("val", "test"))
    return f"Valid acc: {valid:.4f}  Final Test acc: {test:.4f}"


def load_data(args: Namespace) -> utils.Landscapes:
    """The images of -data_path, or of its default file, or else the built-in sample."""
    if args.data_path or DATA_PATH.exists():
        return utils.load_landscapes(args.data_path or DATA_PATH)
    print(
        "No photographs found: training on the built-in SAMPLE of drawn landscapes.\n"
        "  To get the photographs: python -m data.prepare_landscapes --download"
    )
    return sample.draw_landscapes()


def overrides(args: Namespace, without: tuple[str, ...]) -> dict[str, Any]:
    """The arguments, but for those called `without`, that differ from the defaults, of which two
    depend on batch norm."""
    defaults = parse_args([] if args.batch_norm else ["-no_batch_norm"])
    arguments = {} if args.batch_norm else {"batch_norm": False}
    return arguments | utils.overrides(args, defaults, without)


def make_run(args: Namespace, data: utils.Landscapes) -> utils.Run:
    """The run of these arguments on these data."""
    arguments = overrides(args, RUNTIME_OPTIONS)
    network = f"{'bn' if args.batch_norm else 'plain'}-{args.head}"
    network = "resnet" if args.model == "resnet" else network
    pixels = "" if args.pixels == "ordered" else f"-{args.pixels}"
    title = f"q2-{network}-lr{args.learning_rate:g}{pixels}-seed{args.seed}-{data.name}"
    command = " ".join(["python hw2_q2.py", *utils.to_argv(DASH, arguments)])
    identity = arguments, {"name": data.name, "fingerprint": data.fingerprint}, TRAINING_VERSION
    return utils.Run(title, command, *identity, args.epochs, args.output_dir)


# ----------------------------------------------------------------------------------------------
# figures


def draw_figures(
    folder: Path, record: dict[str, Any], args: Namespace, model: nn.Module,
    images: Tensor, labels: Tensor, inputs: Tensor,
) -> None:  # fmt: skip
    """Draw a run's figures into `folder`. images: test images as they are; inputs: as the network
    sees them, uint8."""
    title, history = run_title(args, record["data"]["name"]), record["history"]
    loss, accuracy = history["train_loss"], history["val_accuracy"]
    utils.plot_curve(folder / "training-loss.png", title, "Training loss (nats)", loss)
    utils.plot_curve(folder / "validation-accuracy.png", title, "Validation accuracy", accuracy)
    draw_confusion(folder / "confusion-matrix.png", title, record["final"]["test"]["confusion"])
    shown = [i for c in range(len(CLASSES)) for i in (labels == c).nonzero()[:4, 0].tolist()]
    predicted = predict(model, inputs[shown], args.tta).argmax(1)
    draw_images(folder / "test-images.png", title, images[shown], labels[shown], predicted)


def run_title(args: Namespace, data_name: str) -> str:
    """The title of a run's figures."""
    norm = "batch norm" if args.batch_norm else "no batch norm"
    head = {"gap": "global average pooling", "flatten": "flattened head"}[args.head]
    network = "residual network" if args.model == "resnet" else f"{norm}, {head}"
    pixels = "" if args.pixels == "ordered" else f", {args.pixels} pixels"
    note = "\n(built-in sample, not photographs)" if data_name == "sample" else ""
    return f"{network}, lr = {args.learning_rate:g}{pixels}{note}"


def draw_confusion(path: Path, title: str, confusion: list[list[int]]) -> None:
    """Draw a confusion matrix (6, 6): counts in the cells, each class's recall beside it."""
    confusion = torch.tensor(confusion)
    recall = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    fig, axes = utils.new_figure(5.0, 3.9)
    axes.grid(False)
    image = axes.imshow(recall.numpy(), cmap="Blues", vmin=0, vmax=1)
    for row in range(len(CLASSES)):
        for column in range(len(CLASSES)):
            color = "white" if recall[row, column] > 0.6 else "black"
            count = confusion[row, column].item()
            axes.text(column, row, count, ha="center", va="center", color=color)
    axes.set_xticks(range(len(CLASSES)), CLASSES, rotation=35, ha="right")
    names = [f"{name}\nrecall {recall[i, i]:.2f}" for i, name in enumerate(CLASSES)]
    axes.set_yticks(range(len(CLASSES)), names)
    axes.set(title=title, xlabel="Predicted class", ylabel="True class (test images)")
    fig.colorbar(image, label="Share of the true class", shrink=0.85)
    utils.save_figure(path, fig)


def draw_images(path: Path, title: str, images: Tensor, labels: Tensor, predicted: Tensor) -> None:
    """Draw images (N, 3, 48, 48), four to a column, with true and predicted classes (N,)."""
    columns = math.ceil(len(images) / 4)
    fig, grid = utils.new_figure(1.05 * columns, 5.4, 4, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, true, guess in zip(grid.T.flat, images, labels, predicted):
        axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        correct = true == guess
        text = CLASSES[true] if correct else f"{CLASSES[true]}\npredicted {CLASSES[guess]}"
        axes.set_title(text, fontsize=7, color="black" if correct else utils.VERMILION)
    legend = "True class of each test image; red: the prediction is another class"
    fig.suptitle(f"{title}\n{legend}", fontsize=8)
    utils.save_figure(path, fig)


# ----------------------------------------------------------------------------------------------
# prediction


def load_network(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[Classifier, Namespace, dict[str, Any]]:
    """The network of a checkpoint, ready to predict, its arguments and the checkpoint's content.
    Raises UserError."""
    saved = utils.load_checkpoint(path, device)
    with utils.checkpoint_errors(f"{path}: not a network of question 2"):
        args = parse_args(saved["command"].split()[2:])
        model = build_model(args).to(device)
        model.load_state_dict(saved["model"])
        validation_accuracy(saved)
    return model.eval(), args, saved


def validation_accuracy(saved: dict[str, Any]) -> float:
    """A checkpoint's last validation accuracy."""
    return float(saved["history"]["val_accuracy"][-1])


def rank(saved: dict[str, Any]) -> tuple[bool, float]:
    """The order of checkpoints for -predict: real photographs first, then validation accuracy."""
    return saved["data"]["name"] != "sample", validation_accuracy(saved)


def find_images(paths: list[Path]) -> list[Path]:
    """The files among `paths` and, by their suffix, all images in the folders among them."""
    suffixes, files = utils.image_suffixes(), []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        inside = [p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file()]
        if not inside:
            raise UserError(f"{path}: no images in this folder")
        files += sorted(inside)
    return files


def read_images(files: list[Path], named: list[Path]) -> tuple[list[Path], Tensor]:
    """The readable files and their images (N, 3, 48, 48). An unreadable file is skipped with a
    message, or, if it is among the `named` ones, raises UserError."""
    readable, images = [], []
    for file in tqdm(files, leave=False, disable=None):
        try:
            images.append(utils.read_image(file))
            readable.append(file)
        except UserError as error:
            if file in named:
                raise
            tqdm.write(f"Skipping {error}", file=sys.stderr)
    if not images:
        raise UserError("none of these images can be read")
    return readable, torch.stack(images)


def predict_files(args: Namespace) -> None:
    """Print class and probabilities of the images under -predict, as a table or as JSON."""
    path = args.checkpoint or utils.best_checkpoint(args.output_dir / "checkpoints", "q2-", rank)
    device = utils.prepare_device(args.device, args.threads)
    model, trained, saved = load_network(path, device)
    files, images = read_images(find_images(args.predict), args.predict)
    images = PIXELS[trained.pixels](images)
    probabilities = predict(model, images.to(device), trained.tta).exp().tolist()
    note = ", trained on the built-in SAMPLE" if saved["data"]["name"] == "sample" else ""
    note = f" without test-time augmentation{note}" if trained.tta else note
    print(f"Network: {path} (validation accuracy {validation_accuracy(saved):.4f}{note})",
          file=sys.stderr)  # fmt: skip
    answers = [
        {
            "image": str(file),
            "class": CLASSES[row.index(max(row))],
            "probabilities": dict(zip(CLASSES, row)),
        }
        for file, row in zip(files, probabilities)
    ]
    if args.json:
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
RUNTIME_OPTIONS = (  # where and how a run is made: they do not change its result
    "device", "threads", "jobs", "scheduler", "restart", "output_dir", "data_path",
    "count_params", "predict", "checkpoint", "json",
)  # fmt: skip
PRESETS = {
    "report": {},
    "best": {
        "batch_size": 64,
        "learning_rate": 0.1,
        "momentum": 0.9,
        "schedule": "one_cycle",
        "epochs": 60,
        "l2_decay": 5e-4,
        "dropout": 0.0,
        "label_smoothing": 0.1,
        "augment": ["flip", "crop", "erase"],
        "tta": ["mirror", "shift"],
    },
}


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The command line. Raises UserError."""
    args = utils.parse_with_presets(make_parser, PRESETS, argv)
    validate_args(args)
    return args


# fmt: off
def make_parser() -> utils.Parser:
    """The parser of the command line, its defaults those of the original's recipe."""
    parser = utils.Parser("hw2_q2.py", description=__doc__.rpartition("\n\n")[0])
    group = parser.add_argument_group
    add_training_options(group("training").add_argument)
    add_network_options(group("network"))
    add_data_options(group("images"))
    utils.add_runtime_options(parser, DASH, "one per core, or one if several runs are trained")
    add = group("instead of training").add_argument
    add("-count_params", action="store_true",
        help="print the parameters by layer, of both CNNs or, with -model resnet, of that network")
    add("-predict", nargs="+", type=Path, metavar="PATH",
        help="classify images, or all images in folders")
    add("-checkpoint", type=Path, metavar="FILE",
        help="network for -predict (default: the one with the best validation accuracy)")
    add("-json", action="store_true", help="print the output of -predict as JSON")
    return parser


def add_training_options(add: Callable) -> None:
    count, rate = utils.number(int, 1, 10**6), utils.number(float, 0, 10**3, low_open=True)
    add("-learning_rate", type=rate, default=0.01, nargs="+", action=utils.OneOrMore,
        help="learning rate; several: one run each, side by side (default: %(default)s)")
    add("-epochs", type=count, default=40, help="number of training epochs (default: %(default)s)")
    add("-batch_size", type=count, default=8, help="batch size (default: %(default)s)")
    add("-last_batch", choices=("keep", "merge"),
        help="an epoch's last batch, if less than half full: keep it or merge it into the one "
        "before; a single image is always merged (default: merge with batch norm, else keep)")
    add("-l2_decay", type=utils.number(float, 0, 10**3), default=0.0,
        help="weight decay (default: %(default)s)")
    add("-optimizer", choices=("sgd", "adam"), default="sgd",
        help="optimizer (default: %(default)s)")
    add("-momentum", type=utils.probability, default=0.0,
        help="Nesterov momentum of sgd (default: %(default)s)")
    add("-precision", choices=("float32", "bfloat16"), default="float32",
        help="precision of the convolutions; bfloat16 is faster on processors that have it "
        "(default: %(default)s)")
    utils.add_training_options(add, DASH, PRESETS)


def add_network_options(group: Any) -> None:
    add = group.add_argument
    add("-model", choices=("cnn", "resnet"), default="cnn",
        help="the original's network or a residual one, of whose shape only -dropout can be set "
        "(default: %(default)s)")
    add("-dropout", type=utils.probability, default=0.1,
        help="dropout probability (default: %(default)s)")
    add("-no_batch_norm", dest="batch_norm", action="store_false",
        help="no batch norm, and -head flatten -last_batch keep unless they are given")
    add("-head", choices=("gap", "flatten"),
        help="input of the linear layers: the last feature map's global average or all of it "
        "(default: gap with batch norm, else flatten)")
    pools = group.add_mutually_exclusive_group().add_argument
    pools("-pool", choices=("max", "avg", "stride", "none"), default="max",
          help="how a block halves the feature map: max pooling, average pooling, a convolution "
          "of stride 2, or not at all (default: %(default)s)")
    pools("-no_maxpool", dest="pool", action="store_const", const="stride",
          help="the course's name for -pool stride")
    sizes = (*range(1, 12, 2), SIZE)
    add("-kernel_size", type=utils.number(int, 1, SIZE), choices=sizes, default=3,
        help=f"kernel size; {SIZE}: one convolution over the whole image instead of three blocks "
        "(default: %(default)s)")
    add("-convs", type=utils.number(int, 1, 4), default=1,
        help="convolutions per block (default: %(default)s)")


def add_data_options(group: Any) -> None:
    add = group.add_argument
    add("-data_path", type=Path, metavar="FILE",
        help=".npz file (default: data/intel_landscapes.v2.npz, or else a built-in sample)")
    pixels = group.add_mutually_exclusive_group().add_argument
    pixels("-pixels", choices=PIXELS, default="ordered",
        help="order of the pixels: ordered; scrambled, as by the course's loader; shuffled, one "
        "random order for all images (default: %(default)s)")
    pixels("-scramble_pixels", dest="pixels", action="store_const", const="scrambled",
        help="short for -pixels scrambled")
    add("-augment", nargs="*", default=[], choices=AUGMENTATIONS, metavar="NAME",
        help=f"random augmentations of training images: {', '.join(AUGMENTATIONS)}")
    add("-tta", nargs="*", default=[], choices=TTA, metavar="NAME",
        help="test-time augmentation, the mean probabilities over an image and mirror: its mirror "
        "image; shift: all of these shifted by 2 pixels up, down, left and right")

# fmt: on


def validate_args(args: Namespace) -> None:
    """Set what depends on other arguments. Raises UserError if arguments contradict each other."""
    whole_image = args.kernel_size == SIZE
    if whole_image and (args.convs > 1 or args.pool not in ("max", "none")):
        raise UserError(f"-kernel_size {SIZE} is a single convolution: drop -pool and -convs")
    if whole_image:
        args.pool = "none"
    args.head = args.head or ("gap" if args.batch_norm else "flatten")
    args.last_batch = args.last_batch or ("merge" if args.batch_norm else "keep")
    args.augment = [name for name in AUGMENTATIONS if name in args.augment]  # in one order
    args.tta = [name for name in TTA if name in args.tta]
    shape = args.batch_norm, args.head, args.pool, args.kernel_size, args.convs
    if args.model == "resnet" and shape != (True, "gap", "max", 3, 1):
        raise UserError("-model resnet has a fixed shape: of the network only -dropout can be set")
    if args.pixels != "ordered" and (args.augment or args.tta):
        raise UserError(f"-pixels {args.pixels} cannot be combined with -augment or -tta")
    if args.momentum and args.optimizer != "sgd":
        raise UserError("-momentum needs -optimizer sgd; with adam, -momentum 0")
    if args.batch_norm and args.batch_size == 1:
        raise UserError("batch norm needs at least -batch_size 2; or use -no_batch_norm")
    if args.predict and args.count_params:
        raise UserError("give either -predict or -count_params")
    if args.predict is None and (args.checkpoint or args.json):
        raise UserError("-checkpoint and -json need -predict")


# ----------------------------------------------------------------------------------------------
# main


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.count_params:
        print_parameters(args)
    elif args.predict:
        predict_files(args)
    elif len(configs := utils.expand(args, "learning_rate", "seed")) > 1:
        utils.train_side_by_side(sys.modules[__name__], configs)
    else:
        train(args)


if __name__ == "__main__":
    utils.run_script(main)
