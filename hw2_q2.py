"""Question 2: convolutional networks that classify 48x48 photographs of six landscapes.

    python hw2_q2.py -learning_rate 0.01                   batch norm + global average pooling
    python hw2_q2.py -learning_rate 0.01 -no_batch_norm    the plain network
    python hw2_q2.py -recipe best                          the same network, trained otherwise
    python hw2_q2.py -count_params                         the parameters of both, layer by layer
    python hw2_q2.py -predict beach.jpg holiday/           classify your own pictures

options | model | training | figures | report | prediction | main
"""

import json
import math
import statistics
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import utils
from data import sample
from utils import CLASSES, SIZE, UserError

QUESTION, RECIPE = "q2", 1  # the latter raised when a change alters the results of a run
DATA_PATH = utils.ROOT / "data" / "intel_landscapes.v2.npz"

# ----------------------------------------------------------------------------------------------
# options

# The options that can change a run's result; its name and its record hold these.
RUN_OPTIONS = (
    "epochs", "batch_size", "learning_rate", "l2_decay", "dropout", "optimizer", "batch_norm",
    "head", "pool", "kernel_size", "scramble_pixels", "seed",
)  # fmt: skip
# Those that came later, each with what was done before it; in a run's name and record only where
# it says something else, so that the runs made before keep their names.
LATER_OPTIONS = {
    "model": "cnn", "convs": 1, "last_batch": "keep", "momentum": 0.0, "schedule": "constant",
    "label_smoothing": 0.0, "augment": [], "at_test": [], "precision": "float32",
}  # fmt: skip
# What is done where the command line does not say: (without batch norm, with it).
BY_NORM = {"head": ("flatten", "gap"), "last_batch": ("keep", "join")}
CNN_OPTIONS = {"batch_norm": True, "head": "gap", "pool": "max", "kernel_size": 3, "convs": 1}
RECIPES = {  # what -recipe says where the command line does not
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
        "at_test": ["mirror", "shift"],
    },
}
# Those about where and how a run is made, which its name leaves out.
PLACES = "device", "threads", "output_dir", "data_path", "restart", "jobs", "scheduler"
AUGMENTATIONS = {  # of torchvision.transforms.v2
    "flip": ("RandomHorizontalFlip", {}),
    "crop": ("RandomCrop", {"size": SIZE, "padding": 4, "padding_mode": "reflect"}),
    "erase": ("RandomErasing", {"p": 0.5, "scale": (0.05, 0.2)}),
}


def parse_options(argv=None):
    """The command line as a namespace. Ends with one line and status 2 if it is wrong."""
    parser = make_parser()
    return _settle(parser, utils.parse_with_recipe(parser, RECIPES, argv))


SHARE = utils.number(float, 0, 1, high_open=True)


def make_parser():
    """The parser of the command line, its defaults those of the report's recipe."""
    parser = utils.Parser(description=__doc__.rpartition("\n\n")[0])
    training = parser.add_argument_group("training")
    _add_training_options(training.add_argument)
    utils.add_recipe_options(training, "-", RECIPES)
    _add_network_options(parser.add_argument_group("network").add_argument)
    _add_picture_options(parser.add_argument_group("pictures").add_argument)
    utils.add_machine_options(parser, "-")
    utils.add_report_options(parser, "-")

    add = parser.add_argument_group("instead of training").add_argument
    count = "print the parameters by layer, of both the report's networks or of the residual one"
    add("-count_params", action="store_true", help=count)
    predict = "classify pictures, or all pictures in folders"
    add("-predict", nargs="+", type=Path, metavar="PATH", help=predict)
    checkpoint = "the network for -predict (default: the one with the best validation accuracy)"
    add("-checkpoint", type=Path, metavar="FILE", help=checkpoint)
    add("-json", action="store_true", help="print the answer of -predict as JSON")
    return parser


def _add_training_options(add):
    whole, real = utils.number(int, 1, 10**6), utils.number(float, 0, 10**3, low_open=True)
    decay = utils.number(float, 0, 10**3)
    several = {"nargs": "+", "action": utils.OneOrMore}
    rate = "step size; several: a run for each, side by side"
    add("-learning_rate", type=real, default=0.01, help=rate, **several)
    add("-epochs", type=whole, default=40, help="passes over the training pictures")
    add("-batch_size", type=whole, default=8, help="pictures a step")
    last = "an epoch's last batch, if less than half full: keep it, or join it to the one before, "
    last += "as always where it is one picture (default: join with batch norm, or else keep)"
    add("-last_batch", choices=("keep", "join"), help=last)
    add("-l2_decay", type=decay, default=0.0, help="weight decay")
    add("-optimizer", choices=("sgd", "adam"), default="sgd", help="update rule")
    add("-momentum", type=SHARE, default=0.0, help="Nesterov's, for sgd")
    precision = "of the convolutions; bfloat16 is fast where the processor has it"
    add("-precision", choices=("float32", "bfloat16"), default="float32", help=precision)


def _add_network_options(add):
    model = "the report's network, or a residual one, to which only -dropout of these applies"
    add("-model", choices=("cnn", "resnet"), default="cnn", help=model)
    add("-dropout", type=SHARE, default=0.1, help="share of the units dropped")
    no_norm = "the plain network: no batch norm, and a flattened head unless -head says otherwise"
    add("-no_batch_norm", dest="batch_norm", action="store_false", help=no_norm)
    head = "what the linear layers see: the map's mean or all of it (default: gap with batch norm)"
    add("-head", choices=("gap", "flatten"), help=head)
    pool = "what halves a block's map: max or average pooling, a convolution of stride 2, nothing"
    add("-pool", choices=("max", "avg", "stride", "none"), default="max", help=pool)
    add("-no_maxpool", action="store_true", help="the course's name for -pool stride")
    kernel = f"in pixels; {SIZE}: one convolution over the whole picture instead of three blocks"
    sizes, side = (*range(1, 12, 2), SIZE), utils.number(int, 1, SIZE)
    add("-kernel_size", type=side, choices=sizes, default=3, help=kernel)
    add("-convs", type=utils.number(int, 1, 4), default=1, help="convolutions a block")


def _add_picture_options(add):
    where = "an .npz file (default: data/intel_landscapes.v2.npz, or else a built-in sample)"
    add("-data_path", type=Path, metavar="FILE", help=where)
    scramble = "reorder the pixels as the course's loader did by mistake"
    add("-scramble_pixels", action="store_true", help=scramble)
    some = {"nargs": "*", "default": [], "metavar": "NAME"}
    augment = f"random changes of the training pictures, some of: {', '.join(AUGMENTATIONS)}"
    add("-augment", choices=AUGMENTATIONS, help=augment, **some)
    at_test = "; ".join(f"{name}: {what}" for name, (what, _) in VIEWS.items())
    add("-at_test", choices=VIEWS, help=at_test, **some)


def _settle(parser, options):
    """Derive what one option says about another; refuse what contradicts itself."""
    utils.check_report_options(parser, options, "-", PLACES)
    if options.no_maxpool:
        if options.pool not in ("max", "stride"):
            parser.error(f"-no_maxpool means -pool stride, but -pool {options.pool} is given too")
        options.pool = "stride"
    if options.kernel_size == SIZE:
        if options.convs > 1 or options.pool not in ("max", "none"):
            parser.error(f"-kernel_size {SIZE} is one convolution: nothing to pool or to stack")
        options.pool = "none"
    for name, usual in BY_NORM.items():
        setattr(options, name, getattr(options, name) or usual[options.batch_norm])
    for name, order in (("augment", AUGMENTATIONS), ("at_test", VIEWS)):  # one name a run
        setattr(options, name, [word for word in order if word in getattr(options, name)])
    if options.model == "resnet" and any(
        getattr(options, name) != usual for name, usual in CNN_OPTIONS.items()
    ):
        parser.error("-model resnet has its own shape; of the network's options only -dropout fits")
    if options.scramble_pixels and (options.augment or options.at_test):
        parser.error("-scramble_pixels goes without changes: name none after -augment and -at_test")
    if options.momentum and options.optimizer != "sgd":
        parser.error("-momentum goes with -optimizer sgd; with adam, -momentum 0")
    if options.batch_norm and options.batch_size == 1:
        parser.error(
            "batch norm needs at least 2 pictures a batch: -batch_size 2 or -no_batch_norm"
        )
    if options.predict and options.count_params:
        parser.error("-predict and -count_params are two things to do")
    if options.predict is None and (options.checkpoint or options.json):
        parser.error("-checkpoint and -json go with -predict")
    del options.recipe  # all that it said is in the other options now
    return options


def run_options(options):
    """Those of a namespace that can change a run's result, as a dictionary."""
    return utils.chosen_options(options, RUN_OPTIONS, LATER_OPTIONS)


def command(options):
    """The command line, without paths and machine, that repeats the run with these options."""
    options = LATER_OPTIONS | options
    usual = {name: values[options["batch_norm"]] for name, values in BY_NORM.items()}
    shown = {name: value for name, value in options.items() if value != usual.get(name)}
    words = ["python hw2_q2.py -learning_rate", shown.pop("learning_rate")]
    return " ".join(map(str, [*words, *make_parser().arguments(shown)]))


# ----------------------------------------------------------------------------------------------
# model


class ConvBlock(nn.Module):
    """Convolution -> [batch norm] -> ReLU -> pooling -> dropout.

    (B, C_in, H, W) -> (B, C_out, H', W'), H' = H / 2, or H where `pool` is 'none'; an even kernel
    is not padded, so one of H pixels leaves H' = 1. Batch norm: Ioffe and Szegedy 2015, section 3.2
    (before the nonlinearity).
    """

    def __init__(self, in_channels, out_channels, kernel_size, batch_norm, pool, dropout):
        super().__init__()
        stride = 2 if pool == "stride" else 1
        padding = kernel_size // 2 if kernel_size % 2 else 0
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding)
        self.norm = nn.BatchNorm2d(out_channels) if batch_norm else nn.Identity()
        pools = {"max": nn.MaxPool2d(2), "avg": nn.AvgPool2d(2)}
        self.pool = pools.get(pool, nn.Identity())
        self.dropout = utils.Dropout(dropout)

    def forward(self, x):
        x = self.norm(self.conv(x))
        if isinstance(self.pool, nn.MaxPool2d):  # ReLU second: the same on a quarter of the values
            return self.dropout(F.relu(self.pool(x)))
        return self.dropout(self.pool(F.relu(x)))


class _StepInBackward(torch.autograd.Function):
    """x Wᵀ + b, whose backward pass takes SGD's step on W: W -= lr (dyᵀ x + decay W), in place."""

    @staticmethod
    def forward(ctx, x, weight, bias, lr, decay):
        ctx.save_for_backward(x, weight)
        ctx.lr, ctx.decay = lr, decay
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dy @ weight  # with the weight of the forward pass, so before its step
        weight.addmm_(dy.T, x, beta=1 - ctx.lr * ctx.decay, alpha=-ctx.lr)
        return dx, None, dy.sum(0), None, None


class WideLinear(nn.Linear):
    """nn.Linear that takes its weight's SGD step within the backward pass if `lr` is set.

    The gradient, 19 MB for the plain network's fc1, is then never stored, which at batch 8 saves a
    quarter of the whole step. The optimizer sees no gradient and leaves the weight alone.
    """

    lr, decay = None, 0.0

    def forward(self, x):
        if self.lr is None or not (self.training and torch.is_grad_enabled()):
            return super().forward(x)
        return _StepInBackward.apply(x, self.weight.detach(), self.bias, self.lr, self.decay)


def move(images, dimension, distance):
    """Pictures (B, 3, H, W) moved by some pixels along a dimension, the border repeated."""
    places = torch.arange(images.shape[dimension], device=images.device) + distance
    return images.index_select(dimension, places.clamp(0, images.shape[dimension] - 1))


VIEWS = {  # of -at_test: what it says, and what else than a picture itself is seen of it
    "mirror": (
        "the mean of the probabilities for a picture and its mirror image",
        lambda images: [images.flip(3)],
    ),
    "shift": (
        "the mean of those for a picture as it is and 2 pixels up, down, left and right",
        lambda images: [move(images, side, step) for side in (2, 3) for step in (-2, 2)],
    ),
}


class Classifier(nn.Module):
    """Pictures, float (B, 3, 48, 48) in 0..1, -> log-probabilities (B, 6), by the `convs` and the
    `scores` of a subclass.

    precision: 'bfloat16' computes the convolutions in it.
    views: of VIEWS; in evaluation, the mean of a picture's probabilities when seen in all of these.
    """

    def __init__(self, precision, views):
        super().__init__()
        self.precision, self.views = precision, views

    def forward(self, x):
        if self.training or not self.views:
            return self.log_probs(x)
        seen = [x]
        for name in self.views:
            _, view = VIEWS[name]
            seen += [other for image in seen for other in view(image)]
        log_probs = torch.stack([self.log_probs(image) for image in seen])  # (views, B, 6)
        return log_probs.logsumexp(0) - math.log(len(seen))

    def log_probs(self, x):
        """Those of the pictures as they are."""
        with torch.autocast(x.device.type, torch.bfloat16, self.precision == "bfloat16"):
            x = self.convs(x)  # (B, C, H, W)
        x = x.float() if x.dtype == torch.bfloat16 else x
        return F.log_softmax(self.scores(x), dim=1)  # (B, 6)


class CNN(Classifier):
    """Three convolution blocks and three linear layers.

    head: 'flatten' gives fc1 every position of the last map, 'gap' its mean over positions (Lin et
    al. 2013, section 3.2). convs: convolutions a block, the last of which is pooled (Simonyan and
    Zisserman 2015, section 2.3). kernel_size: one of the picture's size takes the blocks' place,
    with the last one's channels.
    """

    def __init__(
        self, batch_norm=True, head="gap", pool="max", kernel_size=3, dropout=0.1, convs=1,
        channels=(3, 32, 64, 128), fc1_out_dim=1024, fc2_out_dim=512,
        precision="float32", views=(),
    ):  # fmt: skip
        super().__init__(precision, views)
        if kernel_size == SIZE:
            channels = channels[0], channels[-1]
        blocks = []
        for c_in, c_out in zip(channels, channels[1:]):
            for i in range(convs):
                last = (pool, dropout) if i == convs - 1 else ("none", 0.0)
                shape = c_in if i == 0 else c_out, c_out, kernel_size
                blocks.append(ConvBlock(*shape, batch_norm, *last))
        self.convs = nn.Sequential(*blocks)
        self.gap = nn.AdaptiveAvgPool2d(1) if head == "gap" else nn.Identity()
        self.fc1 = WideLinear(self._features(channels[0]), fc1_out_dim)
        self.norm = nn.BatchNorm1d(fc1_out_dim) if batch_norm else nn.Identity()
        self.dropout = utils.Dropout(dropout)
        self.fc2 = nn.Linear(fc1_out_dim, fc2_out_dim)
        self.fc3 = nn.Linear(fc2_out_dim, len(CLASSES))

    @torch.no_grad()
    def _features(self, channels):
        """How many numbers fc1 receives of one picture."""
        self.eval()  # leaves batch norm's statistics and the random numbers alone
        count = self.gap(self.convs(torch.zeros(1, channels, SIZE, SIZE))).numel()
        self.train()
        return count

    def scores(self, x):
        """Maps, by the report's shape (B, 128, 6, 6), -> scores (B, 6)."""
        x = self.gap(x).flatten(1)  # (B, 128) or (B, 4608)
        x = F.relu(self.fc1(x))  # (B, 1024)
        x = self.dropout(self.norm(x))
        x = F.relu(self.fc2(x))  # (B, 512)
        return self.fc3(x)  # (B, 6)


class Residual(ConvBlock):
    """A block without pooling, (B, C, H, W) -> (B, C, H, W), added to what came in (He et al. 2016,
    "Deep residual learning", section 3.1)."""

    def __init__(self, channels, dropout):
        super().__init__(channels, channels, 3, True, "none", dropout)

    def forward(self, x):
        return x + super().forward(x)


class ResNet(Classifier):
    """Four blocks that halve the map, `depths` residual ones behind each, and one linear layer.

    It halves early and is deep only where maps are small, so a step takes but twice as long as the
    CNN's.
    """

    def __init__(
        self, channels=(32, 64, 128, 160), depths=(1, 2, 2, 1), dropout=0.1,
        precision="float32", views=(),
    ):  # fmt: skip
        super().__init__(precision, views)
        blocks = []
        for c_in, c_out, depth in zip((3, *channels), channels, depths):
            blocks.append(ConvBlock(c_in, c_out, 3, True, "max", dropout))
            blocks += [Residual(c_out, dropout) for _ in range(depth)]
        self.convs = nn.Sequential(*blocks)
        self.output = nn.Linear(channels[-1], len(CLASSES))

    def scores(self, x):
        """Maps (B, 160, 3, 3) -> scores (B, 6)."""
        return self.output(x.mean((2, 3)))


def build_model(options):
    """The network that the options (a namespace or a record's dictionary) describe."""
    options = options if isinstance(options, dict) else vars(options)
    options = LATER_OPTIONS | options
    kind, names = {"cnn": (CNN, CNN_OPTIONS), "resnet": (ResNet, ())}[options["model"]]
    chosen = {name: options[name] for name in (*names, "dropout", "precision")}
    model = kind(**chosen, views=options["at_test"])
    return model.to(memory_format=torch.channels_last)


def count_parameters(model):
    """How many trainable parameters `model` has."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def parameter_table(model):
    """Rows (layer, output shape, formula, count) of every layer with parameters, in order."""
    rows = []

    def add(name, layer, shape):
        if isinstance(layer, nn.Conv2d):
            c_out, c_in, height, width = layer.weight.shape
            formula = f"{c_in} x {c_out} x {height} x {width} + {c_out}"
        elif isinstance(layer, nn.Linear):
            formula = f"{layer.in_features} x {layer.out_features} + {layer.out_features}"
        else:
            formula = f"2 x {layer.num_features}"
        rows.append((name, tuple(shape), formula, count_parameters(layer)))

    hooks = [
        layer.register_forward_hook(
            lambda layer, _, out, name=name: add(name, layer, out.shape[1:])
        )
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.BatchNorm1d))
    ]
    with torch.no_grad():
        model.eval().log_probs(torch.zeros(1, 3, SIZE, SIZE))
    for hook in hooks:
        hook.remove()
    return rows


NETWORKS = ("Plain", False, "flatten"), ("Batch norm + global average pooling", True, "gap")


def print_parameters(options):
    """Print the network's table, or, of the CNN, both networks' and, for the report's, how it came
    to its totals."""
    networks = {title: {"batch_norm": norm, "head": head} for title, norm, head in NETWORKS}
    if options.model == "resnet":
        networks = {"Residual": {}}
    for title, own in networks.items():
        rows = parameter_table(build_model(vars(options) | own))
        print(f"{title} network\n{'layer':17}{'output shape':16}{'formula':26}{'parameters':>10}")
        for name, shape, formula, count in rows:
            print(f"{name:17}{' x '.join(map(str, shape)):16}{formula:26}{count:10,}")
        print(f"{'trainable parameters':59}{sum(row[-1] for row in rows):10,}\n")
    shape = options.model, options.pool, options.kernel_size, options.convs
    if shape == ("cnn", "max", 3, 1):
        print("\n".join(textwrap.wrap(explain_totals(), 100)))


def totals():
    """{network: (its parameters, the output layer's, those of batch norms that it does not have)}:
    what the original report's totals are made of."""
    counts = {
        title: {name: n for name, _, _, n in parameter_table(CNN(batch_norm=norm, head=head))}
        for title, norm, head in NETWORKS
    }
    norms = {
        title: sum(n for name, n in layers.items() if "norm" in name)
        for title, layers in counts.items()
    }
    return {
        title: (sum(layers.values()), layers["fc3"], max(norms.values()) - norms[title])
        for title, layers in counts.items()
    }


def explain_totals():
    """How the original report came to its two totals of parameters."""
    (plain, output, norms), (variant, _, _) = totals().values()
    without = f"without the output layer's {output:,}"
    return (
        f"The report's {variant - output:,} is {variant:,} {without}. "
        f"The report's {plain + norms - output:,} is {plain:,} {without} and with {norms:,} "
        "batch-norm parameters that the plain network does not have."
    )


# ----------------------------------------------------------------------------------------------
# training


def as_input(images):
    """uint8 pictures (B, 3, 48, 48) as the networks see them: float in 0..1, channels last."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)


def scramble_pixels(images):
    """(N, 3, 48, 48) in the order of the course's loader, which flattened channels-last pictures
    and reshaped the rows without moving the channel axis."""
    return images.permute(0, 2, 3, 1).reshape(images.shape)


def make_augmentation(names):
    """A function that changes pictures (B, 3, 48, 48), each at random, by these AUGMENTATIONS;
    None without any."""
    if not names:
        return None
    from torchvision.transforms import v2  # here, for it takes two seconds and 160 MiB

    kinds = (AUGMENTATIONS[name] for name in names)
    change = v2.Compose([getattr(v2, kind)(**settings) for kind, settings in kinds])
    return lambda images: torch.stack([change(image) for image in images])


def make_optimizer(model, options):
    """SGD, its momentum Nesterov's (Sutskever et al. 2013, section 2), or Adam. On a CPU, SGD
    without momentum at a constant rate steps on fc1 in the backward pass."""
    device = next(model.parameters()).device.type
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    extra = {}
    if options.optimizer == "sgd":
        extra = {"momentum": options.momentum, "nesterov": options.momentum > 0}
        if device == "cpu" and not options.momentum and options.schedule == "constant":
            for layer in model.modules():
                if isinstance(layer, WideLinear):
                    layer.lr, layer.decay = options.learning_rate, options.l2_decay
    elif device == "cuda":
        extra = {"capturable": True}
    return kinds[options.optimizer](
        model.parameters(),
        lr=options.learning_rate,
        weight_decay=options.l2_decay,
        fused=device in ("cpu", "cuda"),
        **extra,
    )


def make_step(model, optimizer, totals, smoothing=0.0):
    """A function that trains on one batch and adds (summed loss, right answers, 1 if the loss is
    finite) to `totals`, on the device: reading a number back would make it wait.

    smoothing: the share of a label that goes to all classes alike (Szegedy et al. 2016, section 7).
    """

    def step(images, labels):
        log_probs = model(as_input(images))  # (B, 6)
        loss = F.nll_loss(log_probs, labels)
        if smoothing:
            loss = (1 - smoothing) * loss - smoothing * log_probs.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        correct = (log_probs.detach().argmax(1) == labels).sum()
        loss = loss.detach()
        totals.add_(torch.stack((loss * len(labels), correct, loss.isfinite())))

    return step


def batch_sizes(count, batch_size, last_batch="keep"):
    """How many of `count` pictures each batch of an epoch has. A last batch that is less than half
    full is joined to the one before if `last_batch` is 'join', and one of a single picture, on
    which batch norm cannot train, always."""
    full, rest = divmod(count, batch_size)
    joined = rest == 1 or (last_batch == "join" and 2 * rest < batch_size)
    if full and rest and joined:
        return [batch_size] * (full - 1) + [batch_size + rest]
    return [batch_size] * full + [rest] * (rest > 0)


def train_epoch(step, totals, images, labels, sizes, augment=None):
    """One pass in random order, in batches of these sizes, changed by `augment`. Returns its mean
    loss (nats) and its accuracy (0..1), both of the network as it was at each batch, dropout
    included. Raises utils.Diverged."""
    order = torch.randperm(len(labels), device=labels.device)
    totals.zero_()
    batches = tqdm(order.split(sizes), unit="batch", leave=False, disable=None)
    for batch, rows in enumerate(batches, 1):
        pictures = images[rows]
        step(augment(pictures) if augment else pictures, labels[rows])
        utils.check_totals(totals, batch, len(batches))
    loss, accuracy, _ = (totals / len(labels)).tolist()
    return loss, accuracy


@torch.inference_mode()
def predict(model, images, batch_size=64, as_is=False):
    """Log-probabilities (N, 6), on the CPU, of uint8 pictures (N, 3, 48, 48), seen in all the ways
    of the model's views, or only as they are."""
    model.eval()
    look = model.log_probs if as_is else model
    return torch.cat([look(as_input(batch)) for batch in images.split(batch_size)]).cpu()


def evaluate(model, images, labels, as_is=False):
    """judge() of pictures seen as predict() sees them."""
    return judge(predict(model, images, as_is=as_is), labels)


def judge(log_probs, labels):
    """Mean loss (nats), accuracy (0..1) and the confusion matrix, rows true, columns predicted, of
    log-probabilities (N, 6), on the CPU."""
    labels = labels.cpu()
    return {
        "loss": F.nll_loss(log_probs, labels).item(),
        "accuracy": (log_probs.argmax(1) == labels).sum().item() / len(labels),
        "confusion": confusion_matrix(log_probs, labels).tolist(),
    }


def confusion_matrix(log_probs, labels):
    """How many pictures of each class (rows) are taken for each class (columns)."""
    pairs = labels * len(CLASSES) + log_probs.argmax(1)
    return torch.bincount(pairs, minlength=len(CLASSES) ** 2).view(len(CLASSES), -1)


def disputed_labels(images, labels, training):
    """Which pictures (N,) are one of the `training` ones, (pictures, labels), of another class."""
    places = {}  # of each picture's bytes
    for place, picture in enumerate(images.cpu().numpy()):
        places.setdefault(picture.tobytes(), []).append(place)
    disputed, labels = torch.zeros(len(labels), dtype=torch.bool), labels.tolist()
    for picture, label in zip(training[0].cpu().numpy(), training[1].tolist()):
        for place in places.get(picture.tobytes(), ()):
            disputed[place] |= label != labels[place]
    return disputed


def certainty(log_probs, images, labels, training, bins=10, sure=0.9):
    """How far the probability of the predicted class can be believed (Guo et al. 2017, section 2),
    by log-probabilities (N, 6), on the CPU, of pictures (N, 3, 48, 48).

    calibration: for each of the bins of that probability [pictures, their mean probability, the
    share of them that is right]; confident: the confusion matrix of those of at least `sure`;
    disputed: of the pictures that the training ones have under another label [all, those taken for
    another class, those of at least `sure` among these].
    """
    labels = labels.cpu()
    found, predicted = log_probs.exp().max(1)
    right, rows = (predicted == labels).float(), []
    places = (found * bins).long().clamp(max=bins - 1)
    for place in range(bins):
        here = places == place
        means = [part[here].mean().item() for part in (found, right)] if here.any() else [None] * 2
        rows.append([here.sum().item(), *means])
    chosen = found >= sure
    confident = confusion_matrix(log_probs[chosen], labels[chosen])
    disputed = disputed_labels(images, labels, training)
    sets = disputed, disputed & (predicted != labels), disputed & (predicted != labels) & chosen
    counts = [mask.sum().item() for mask in sets]
    return {"calibration": rows, "confident": confident.tolist(), "disputed": counts}


def moved_accuracies(model, images, labels, most=4):
    """Accuracies on pictures moved by 0, 1, ... `most` pixels, each the mean of up, down, left and
    right; the border is repeated."""
    accuracies = [evaluate(model, images, labels, as_is=True)["accuracy"]]
    for distance in range(1, most + 1):
        scores = [
            evaluate(model, move(images, dimension, step), labels, as_is=True)["accuracy"]
            for step in (-distance, distance)
            for dimension in (2, 3)
        ]
        accuracies.append(sum(scores) / len(scores))
    return accuracies


def size_accuracies(model, images, labels, sizes=(32, 48, 64, 96)):
    """{size: accuracy} on pictures resized to size x size pixels, antialiased."""
    accuracies = {}
    for size in sizes:
        shape, correct = {"size": (size, size), "mode": "bilinear", "antialias": True}, 0
        for batch, truth in zip(images.split(16), labels.cpu().split(16)):  # the maps are large
            resized = F.interpolate(batch.float(), **shape).round()
            found = predict(model, resized, as_is=True).argmax(1)
            correct += (found == truth).sum().item()
        accuracies[str(size)] = correct / len(labels)
    return accuracies


def fit(run, model, optimizer, splits, options):
    """Train epoch by epoch, going on after the last finished one; a checkpoint after each.

    Returns history {column: [a value an epoch]}, seconds [a value an epoch], and the batch of the
    next epoch in which the loss was no finite number, or None; the checkpoint of the epoch before
    stays.
    """
    saved = utils.continue_run(run, model, optimizer, options.restart)
    history, seconds = saved["history"], saved["seconds"]
    if seconds:
        print(f"Going on after epoch {len(seconds)}")
    sizes = batch_sizes(len(splits["train"][1]), options.batch_size, options.last_batch)
    if options.batch_norm and sizes == [1]:
        raise UserError("batch norm needs at least 2 training pictures; try -no_batch_norm")
    totals = torch.zeros(3, device=splits["train"][1].device)
    step = make_step(model, optimizer, totals, options.label_smoothing)
    if options.schedule == "one_cycle":
        begun, steps = len(seconds) * len(sizes), options.epochs * len(sizes)
        step = utils.one_cycle(step, optimizer, options.learning_rate, begun, steps)
    elif totals.is_cuda:  # a graph would keep the rate of its first step
        step = utils.GraphedStep(step, model, optimizer, totals)
    augment = make_augmentation(options.augment)
    for epoch in range(len(seconds) + 1, options.epochs + 1):
        started = time.perf_counter()
        utils.seed_everything(options.seed, epoch)
        model.train()
        try:
            loss, accuracy = train_epoch(step, totals, *splits["train"], sizes, augment)
        except utils.Diverged as diverged:
            return history, seconds, diverged.batch
        valid = evaluate(model, *splits["val"], as_is=True)
        if not math.isfinite(valid["loss"]):  # the last step ruined the weights
            return history, seconds, len(sizes)
        row = {"train_loss": loss, "train_accuracy": accuracy}
        row |= {"val_loss": valid["loss"], "val_accuracy": valid["accuracy"]}
        for column, value in row.items():
            history.setdefault(column, []).append(value)
        seconds.append(time.perf_counter() - started)
        scores = f"Training loss: {loss:.4f}  Training acc: {accuracy:.4f}"
        scores += f"  Valid acc: {valid['accuracy']:.4f}  ({seconds[-1]:.1f} s)"
        print(f"Epoch {epoch:2}/{options.epochs}  {scores}", flush=True)
        utils.save_run(run, model, optimizer, history, seconds)
    return history, seconds, None


def train(run, data, device, options):
    """Train one network, score it once on the test pictures, write record, figures, checkpoint."""
    utils.seed_everything(options.seed)
    model = build_model(options).to(device)
    optimizer = make_optimizer(model, options)
    print(f"Run {run.name}\nTrainable parameters: {count_parameters(model):,}", flush=True)

    splits = {}
    for split, (images, labels) in data.splits.items():
        images = scramble_pixels(images) if options.scramble_pixels else images
        splits[split] = images.to(device, memory_format=torch.channels_last), labels.to(device)
    history, seconds, stopped = fit(run, model, optimizer, splits, options)

    record = {
        "command": command(run.config["options"]),
        "config": run.config,
        "parameters": count_parameters(model),
        "history": history,
        "measured": utils.measured(device, seconds),
    }
    if stopped:
        utils.stop_diverged(run, record, len(seconds) + 1, stopped)
    final = record["final"] = score(model, splits, options)
    mark = " (built-in sample)" if data.name == "sample" else ""
    print(f"Valid acc: {final['val']['accuracy']:.4f}{mark}")
    print(f"Final Test acc: {final['test']['accuracy']:.4f}{mark}")
    draw_figures(run.figures, record, model, *data.splits["test"], splits["test"][0])
    utils.save_record(run.record, record)  # last: a run with a record is complete
    utils.finish_run(run)
    print(f"Figures: {run.figures}\nRecord: {run.record}\nCheckpoint: {run.checkpoint}")


def score(model, splits, options):
    """A run's final scores: each split's, and what the report says of the test pictures. Training
    pictures, moved and resized ones are seen as they are, whatever the model's views."""
    final, test = {"train": evaluate(model, *splits["train"], as_is=True)}, splits["test"]
    log_probs = {split: predict(model, splits[split][0]) for split in ("val", "test")}
    for split, found in log_probs.items():
        final[split] = judge(found, splits[split][1])
        if model.views:
            final[split]["as_is"] = evaluate(model, *splits[split], as_is=True)["accuracy"]
    final["test"] |= certainty(log_probs["test"], *test, splits["train"])
    if not options.scramble_pixels:
        final["test"]["moved"] = moved_accuracies(model, *test)
        if options.head == "gap" and options.kernel_size != SIZE:
            final["test"]["sizes"] = size_accuracies(model, *test)
    return final


def summary(record):
    """What a record says, in one line."""
    if "final" not in record:
        return f"diverged in epoch {record['diverged_in_epoch']}"
    valid, test = (record["final"][split]["accuracy"] for split in ("val", "test"))
    return f"Valid acc: {valid:.4f}  Final Test acc: {test:.4f}"


def load_data(options):
    """The pictures of -data_path, or of its default place, or else the built-in sample."""
    path = options.data_path or DATA_PATH
    if options.data_path or path.exists():
        return utils.load_landscapes(path)
    print(
        "No photographs found: training on the built-in SAMPLE of drawn landscapes.\n"
        "  To get the photographs: python -m data.prepare_landscapes --download"
    )
    return sample.draw_landscapes()


def make_run(options, data):
    """The utils.Run of these options on these data."""
    config = utils.run_config(QUESTION, RECIPE, run_options(options), data)
    network = f"{'bn' if options.batch_norm else 'plain'}-{options.head}"
    network = "resnet" if options.model == "resnet" else network
    scrambled = "-scrambled" if options.scramble_pixels else ""
    what = f"q2-{network}-lr{options.learning_rate:g}{scrambled}"
    return utils.Run(f"{what}-seed{options.seed}-{data.name}", config, options.output_dir)


# ----------------------------------------------------------------------------------------------
# figures


def draw_figures(folder, record, model, images, labels, inputs):
    """Draw a single run's figures into `folder`. images: as they are to look at; inputs: as the
    network sees them."""
    title = run_title(record["config"])
    history, final = record["history"], record["final"]
    loss, accuracy = history["train_loss"], history["val_accuracy"]
    utils.plot_curve(folder / "training-loss.png", title, "Training loss (nats)", loss)
    utils.plot_curve(folder / "validation-accuracy.png", title, "Validation accuracy", accuracy)
    draw_confusion(folder / "confusion-matrix.png", title, final["test"]["confusion"])
    shown = [i for c in range(len(CLASSES)) for i in (labels == c).nonzero()[:4, 0].tolist()]
    predicted = predict(model, inputs[shown]).argmax(1)
    draw_pictures(folder / "test-pictures.png", title, images[shown], labels[shown], predicted)


def run_title(config):
    """What a figure says above itself about the run."""
    options = config["options"]
    norm = "batch norm" if options["batch_norm"] else "no batch norm"
    head = {"gap": "global average pooling", "flatten": "flattened head"}[options["head"]]
    network = "residual network" if options.get("model") == "resnet" else f"{norm}, {head}"
    scrambled = ", scrambled pixels" if options["scramble_pixels"] else ""
    note = "\n(built-in sample, not photographs)" if config["data"]["name"] == "sample" else ""
    return f"{network}, lr = {options['learning_rate']:g}{scrambled}{note}"


def draw_confusion(path, title, confusion):
    """Draw a confusion matrix (6, 6): counts in the cells, each class's recall beside it."""
    confusion = torch.tensor(confusion)
    recall = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    fig, axes = utils.figure(5.0, 3.9)
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
    axes.set(title=title, xlabel="Predicted class", ylabel="True class (test pictures)")
    fig.colorbar(image, label="Share of the true class", shrink=0.85)
    utils.save_figure(path, fig)


def draw_pictures(path, title, images, labels, predicted):
    """Draw pictures (N, 3, 48, 48), four to a column, with true and predicted classes."""
    columns = math.ceil(len(images) / 4)
    fig, grid = utils.figure(1.05 * columns, 5.4, 4, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, true, guess in zip(grid.T.flat, images, labels, predicted):
        axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        right = true == guess
        text = CLASSES[true] if right else f"{CLASSES[true]}\ntaken for {CLASSES[guess]}"
        axes.set_title(text, fontsize=7, color="black" if right else utils.VERMILION)
    legend = "above each test picture its true class, in red where the prediction is another"
    fig.suptitle(f"{title}\n{legend}", fontsize=8)
    utils.save_figure(path, fig)


# ----------------------------------------------------------------------------------------------
# report

SHORT = "-learning_rate 0.01 -epochs 10"
QUICK = f"{SHORT} -precision bfloat16"
BETTER = "-recipe best -precision bfloat16"
BRIEF = f"{BETTER} -epochs 20"
RECIPE_10, BEST_20 = "the report's recipe, 10 epochs", "best recipe, 20 epochs"
BEST, NOT_ERASED = "best recipe", "best recipe without erasing"
RESNET_20, BEST_RESNET = "residual network, 20 epochs", "residual network"
ADDED = {  # to the report's recipe
    "with momentum": "-momentum 0.9",
    "with one cycle": "-schedule one_cycle",
    "with batches of 64 at rate 0.08": "-batch_size 64 -learning_rate 0.08",
    "with weight decay": "-l2_decay 0.0005",
    "with smoothed labels": "-label_smoothing 0.1",
    "with flips": "-augment flip",
    "with crops": "-augment crop",
    "with erasing": "-augment erase",
}
LEFT_OUT = {  # of the best one
    "without momentum": "-momentum 0",
    "without one cycle (rate 0.02)": "-schedule constant -learning_rate 0.02",
    "without batches of 64 (8 at rate 0.0125)": "-batch_size 8 -learning_rate 0.0125",
    "without weight decay": "-l2_decay 0",
    "without smoothed labels": "-label_smoothing 0",
    "without flips": "-augment crop erase",
    "without crops": "-augment flip erase",
    "without erasing": "-augment flip crop",
}
SYSTEMS = (
    utils.System("plain, rate 0.1", "-no_batch_norm -learning_rate 0.1"),
    utils.System("plain, rate 0.01", "-no_batch_norm -learning_rate 0.01"),
    utils.System("plain, rate 0.001", "-no_batch_norm -learning_rate 0.001"),
    utils.System("batch norm + pooling", "-learning_rate 0.01"),
    utils.System("plain, scrambled", "-no_batch_norm -scramble_pixels", 2),
    utils.System("batch norm + pooling, scrambled", "-scramble_pixels", 2),
    utils.System("batch norm + pooling, last batch kept", "-last_batch keep", 3, "all"),
    utils.System("batch norm, flattened", "-head flatten", 2, "all"),
    utils.System("pooling without batch norm", "-no_batch_norm -head gap", 2, "all"),
    utils.System("plain, dropout 0.3", "-no_batch_norm -dropout 0.3", 2, "all"),
    utils.System("plain, weight decay 0.0005", "-no_batch_norm -l2_decay 0.0005", 2, "all"),
    utils.System("kernels 3x3, max pooling", SHORT, 2, "all"),
    utils.System("kernels 5x5", f"{SHORT} -kernel_size 5", 2, "all"),
    utils.System("kernels 7x7", f"{SHORT} -kernel_size 7", 2, "all"),
    utils.System("two 3x3 a block", f"{SHORT} -convs 2", 2, "all"),
    utils.System("one 48x48", f"{SHORT} -kernel_size 48", 2, "all"),
    utils.System("average pooling", f"{SHORT} -pool avg", 2, "all"),
    utils.System("strided convolutions", f"{SHORT} -pool stride", 2, "all"),
    utils.System("no pooling", f"{SHORT} -pool none", 2, "all"),
    utils.System(RECIPE_10, QUICK, 3, "beyond"),
    *(utils.System(name, f"{QUICK} {more}", 3, "beyond") for name, more in ADDED.items()),
    utils.System(BEST, BETTER, 5, "beyond"),
    utils.System(NOT_ERASED, f"{BETTER} -augment flip crop", 5, "beyond"),
    utils.System(RESNET_20, f"{BRIEF} -augment flip crop -model resnet", 3, "beyond"),
    utils.System(BEST_RESNET, f"{BETTER} -model resnet", 3, "beyond"),
    utils.System(BEST_20, BRIEF, 3, "beyond"),
    *(utils.System(name, f"{BRIEF} {more}", 3, "beyond") for name, more in LEFT_OUT.items()),
)
# The original report's validation and test accuracy.
REPORTED = {
    "plain, rate 0.1": (0.5684, 0.5743),
    "plain, rate 0.01": (0.7293, 0.6970),
    "plain, rate 0.001": (0.5798, 0.5743),
    "batch norm + pooling": (0.7528, 0.7460),
    "plain, scrambled": (0.7293, 0.6970),
    "batch norm + pooling, scrambled": (0.7528, 0.7460),
}
# The layers whose parameters it counts, all but the output layer and the last batch norm, and its
# totals.
REPORTED_LAYERS = 896, 18_496, 73_856, 64, 128, 256, 132_096, 4_719_616, 524_800
REPORTED_TOTALS = {"Plain": 5_340_160, "Batch norm + global average pooling": 752_640}
RATES = "plain, rate 0.1", "plain, rate 0.01", "plain, rate 0.001"
BEST_PLAIN, VARIANT = "plain, rate 0.01", "batch norm + pooling"
KEPT = "batch norm + pooling, last batch kept"
SCRAMBLED = "plain, scrambled", BEST_PLAIN, "batch norm + pooling, scrambled", VARIANT
CHANGES = BEST_PLAIN, "batch norm, flattened", "pooling without batch norm", VARIANT
REGULARISED = BEST_PLAIN, "plain, dropout 0.3", "plain, weight decay 0.0005"
REGULARISED += "batch norm, flattened", "pooling without batch norm", VARIANT
KERNELS = "kernels 3x3, max pooling", "kernels 5x5", "kernels 7x7", "two 3x3 a block", "one 48x48"
POOLS = "kernels 3x3, max pooling", "average pooling", "strided convolutions", "no pooling"
MOVED = BEST_PLAIN, "pooling without batch norm", VARIANT
LOOKS = {  # of a system's lines, the same in every figure
    "plain, rate 0.1": {"color": utils.ORANGE},
    BEST_PLAIN: {"color": utils.BLUE},
    "plain, rate 0.001": {"color": utils.SKY, "linestyle": "--"},
    VARIANT: {"color": utils.VERMILION},
    KEPT: {"color": "0.4", "linestyle": "--"},
    "plain, scrambled": {"color": utils.BLUE, "linestyle": "--"},
    "batch norm + pooling, scrambled": {"color": utils.VERMILION, "linestyle": "--"},
    "batch norm, flattened": {"color": utils.GREEN, "linestyle": "-."},
    "pooling without batch norm": {"color": utils.PURPLE, "linestyle": ":"},
    "kernels 3x3, max pooling": {"color": utils.VERMILION},
    "average pooling": {"color": utils.ORANGE, "linestyle": "--"},
    "strided convolutions": {"color": utils.SKY, "linestyle": "-."},
    "no pooling": {"color": "0.4", "linestyle": ":"},
    BEST_20: {"color": utils.SKY},
    BEST: {"color": utils.BLUE},
    NOT_ERASED: {"color": utils.PURPLE},
    RESNET_20: {"color": utils.ORANGE},
    BEST_RESNET: {"color": utils.GREEN},
    "without smoothed labels": {"color": utils.ORANGE, "linestyle": "--"},
}
LADDER = VARIANT, BEST_20, NOT_ERASED, BEST, RESNET_20, BEST_RESNET


def report_parts(records):
    """The fields of this question's part of the report: figures, text, or None where no run is.

    records: {label: list of run records}, empty where a system was not trained.
    """
    every = records
    records = {label: [r for r in runs if r["history"]] for label, runs in every.items()}
    curves = {"train_loss": "Training loss (nats)", "val_accuracy": "Validation accuracy"}
    rates = [label for label in RATES if records[label]]
    best = max(rates, key=lambda label: mean_late(records[label]), default="–")
    return {
        "rates": draw_bands(records, RATES, curves),
        "table rates": accuracy_table(every, RATES),
        "best rate": best.rpartition(" ")[2],
        "variant": draw_bands(records, (BEST_PLAIN, VARIANT), curves),
        "table variant": accuracy_table(every, (BEST_PLAIN, VARIANT)),
        "last-batch": draw_bands(records, (VARIANT, KEPT), curves),
        "table last batch": table(records, (VARIANT, KEPT), *GAP_COLUMNS),
        "table parameters": "\n\n".join(parameter_markdown(*network) for network in NETWORKS),
        "table totals": totals_table(),
        "size": draw_size(records),
        "table size": table(records, CHANGES, *SIZE_COLUMNS),
        "changes": draw_bands(records, CHANGES, curves),
        "table changes": table(records, CHANGES, *GAP_COLUMNS),
        "overfitting": draw_overfitting(records),
        "table overfitting": table(records, REGULARISED, *GAP_COLUMNS),
        "table kernels": table(records, KERNELS, *KERNEL_COLUMNS),
        "table pools": table(records, POOLS, *KERNEL_COLUMNS),
        "moved": draw_moved(records),
        "table moved": moved_table(records),
        "table sizes": sizes_table(records),
        "scrambled": draw_scrambled(records),
        "table scrambled": accuracy_table(every, SCRAMBLED),
        "running-mean": draw_running_mean(records[BEST_PLAIN]),
        "parameters best": f"{count_parameters(CNN()):,}",
        "parameters resnet": f"{count_parameters(ResNet()):,}",
        "ladder": draw_ladder(records),
        "table ladder": table(records, LADDER, *LADDER_COLUMNS),
        "table added": gains_table(records, RECIPE_10, ADDED),
        "table left out": gains_table(records, BEST_20, LEFT_OUT),
        "calibration": draw_calibration(records),
        "table classes": classes_table(records),
        "table mistakes": mistakes_table(records[BEST]),
        "mistakes": count_mistakes(records[BEST]),
        "machines": utils.machines(r for runs in records.values() for r in runs),
    }


def with_scores(records):
    """Those that did not diverge."""
    return [record for record in records if "final" in record]


def late(record):
    """Mean validation accuracy over the late epochs: the last quarter, but at least five."""
    values = record["history"]["val_accuracy"]
    return statistics.mean(values[-max(5, math.ceil(len(values) / 4)) :])


def mean_late(records):
    """The mean of late() over the runs that did not diverge, or 0 where all did."""
    return statistics.mean([late(record) for record in with_scores(records)] or [0])


def accuracy(records, split):
    """The last epoch's accuracies on a split, a number a run."""
    return [record["final"][split]["accuracy"] for record in with_scores(records)]


def draw_accuracy(split):
    """A function (run, random) -> the accuracy on as many pictures of a split, drawn from them with
    replacement."""

    def draw(run, random):
        confusion = torch.tensor(run["final"][split]["confusion"])
        count = int(confusion.sum())
        return random.binomial(count, int(confusion.trace()) / count) / count

    return draw


def accuracy_table(records, labels):
    """The report's accuracies beside ours, and whether they could be those of one of our runs; no
    such interval where a run diverged, for those that are left are no fair sample."""
    rows = []
    for label in labels:
        runs, reported = with_scores(records[label]), REPORTED[label]
        if not runs:
            continue
        diverged = len(records[label]) - len(runs)
        ranges, inside = ["–"] * 2, ["–"] * 2
        for i, split in enumerate(("val", "test")):
            if not diverged:
                low, high = utils.interval(draw_accuracy(split), runs)
                ranges[i] = f"{low:.3f} to {high:.3f}"
                inside[i] = {True: "yes", False: "no"}[low <= reported[i] <= high]
        rows.append(
            [
                label,
                " / ".join(f"{x:.4f}" for x in reported),
                f"{utils.mean_sd(accuracy(runs, 'val'))} / {utils.mean_sd(accuracy(runs, 'test'))}",
                utils.mean_sd([late(run) for run in runs]),
                f"{len(runs)}" + (f" (+ {diverged} diverged)" if diverged else ""),
                " / ".join(ranges),
                " / ".join(inside),
            ]
        )
    head = "network", "report: validation / test", "here, last epoch: validation / test"
    head += "validation, late epochs", "runs", "95 % of single runs: validation / test"
    return utils.markdown_table((*head, "report inside? validation / test"), rows)


def first_epoch(record):
    """The first epoch with a validation accuracy of .75, or None."""
    values = record["history"]["val_accuracy"]
    return next((epoch for epoch, value in enumerate(values, 1) if value >= 0.75), None)


def seconds_an_epoch(record):
    """The median of a run's epochs."""
    return statistics.median(record["measured"]["seconds"])


def field_and_products(model):
    """Pixels across that a position of the last convolution's map depends on, and the
    multiply-adds of one picture's way through the network."""
    field, jump, products = 1, 1, 0
    for block in model.convs:
        field += (block.conv.kernel_size[0] - 1) * jump
        jump *= block.conv.stride[0]
        if isinstance(block.pool, (nn.MaxPool2d, nn.AvgPool2d)) and block is not model.convs[-1]:
            field += jump
            jump *= 2
    layers = dict(model.named_modules())
    for name, shape, _, _ in parameter_table(model):
        layer = layers[name]
        if isinstance(layer, nn.Conv2d):
            products += layer.weight[0].numel() * math.prod(shape)
        elif isinstance(layer, nn.Linear):
            products += layer.weight.numel()
    return field, products


def model_of(runs):
    """The network that these runs trained, before its training."""
    return build_model(runs[0]["config"]["options"])


def each_run(measure, digits):
    """A column that names measure(run) of each run."""

    def column(runs):
        values = map(measure, runs)
        return ", ".join("never" if value is None else f"{value:{digits}}" for value in values)

    return column


LATE = "validation, late epochs"
COLUMNS = {  # of a table: its head, and what it says of a system's runs
    "parameters": lambda runs: f"{runs[0]['parameters']:,}",
    "receptive field": lambda runs: "{0} x {0}".format(field_and_products(model_of(runs))[0]),
    "multiply-adds (millions)": lambda runs: f"{field_and_products(model_of(runs))[1] / 1e6:.1f}",
    "first epoch at .75, each run": each_run(first_epoch, "d"),
    "median seconds an epoch, each run": each_run(seconds_an_epoch, ".0f"),
    "minutes of training": lambda runs: f"{statistics.mean(map(utils.minutes, runs)):.1f}",
    "training": lambda runs: utils.mean_sd(accuracy(runs, "train")),
    "validation": lambda runs: utils.mean_sd(accuracy(runs, "val")),
    "test": lambda runs: utils.mean_sd(accuracy(runs, "test")),
    "test, pictures as they are": lambda runs: utils.mean_sd(
        [run["final"]["test"].get("as_is", run["final"]["test"]["accuracy"]) for run in runs]
    ),
    "training - validation": lambda runs: utils.mean_sd(
        [a - b for a, b in zip(accuracy(runs, "train"), accuracy(runs, "val"))]
    ),
    LATE: lambda runs: utils.mean_sd([late(run) for run in runs]),
    "runs": len,
}
SIZE_COLUMNS = "parameters", "multiply-adds (millions)", LATE, "first epoch at .75, each run"
SIZE_COLUMNS += ("median seconds an epoch, each run",)
GAP_COLUMNS = "training", "validation", "test", "training - validation", LATE, "runs"
KERNEL_COLUMNS = "receptive field", "parameters", "multiply-adds (millions)"
KERNEL_COLUMNS += "median seconds an epoch, each run", LATE, "test", "training - validation", "runs"
LADDER_COLUMNS = "parameters", "minutes of training", "validation", "test"
LADDER_COLUMNS += "test, pictures as they are", "runs"


def table(records, labels, *columns):
    """A row for each system with runs that did not diverge: these of COLUMNS."""
    rows = [
        [label, *(COLUMNS[column](runs) for column in columns)]
        for label in labels
        if (runs := with_scores(records[label]))
    ]
    return utils.markdown_table(["network", *columns], rows)


def sizes_table(records):
    """Test accuracy of pooled networks on pictures of other sizes than they were trained on."""
    rows, head = [], []
    for label in (*MOVED[1:], *POOLS):
        if runs := [r["final"]["test"]["sizes"] for r in with_scores(records[label])]:
            rows.append([label, *(utils.mean_sd([run[size] for run in runs]) for size in runs[0])])
            head = ["network", *(f"{size} pixels" for size in runs[0])]
    return utils.markdown_table(head, rows)


def moved(records):
    """Test accuracies on pictures moved by 0, 1, ... pixels, of each run whose record has them."""
    tests = [record["final"]["test"] for record in with_scores(records)]
    return [test["moved"] for test in tests if "moved" in test]


def moved_table(records):
    """Test accuracy on moved pictures."""
    rows, head = [], []
    for label in (*MOVED, *POOLS):
        if runs := moved(records[label]):
            rows.append([label, *map(utils.mean_sd, zip(*runs)), len(runs)])
            head = ["network", *(f"by {pixels}" for pixels in range(len(runs[0]))), "runs"]
    return utils.markdown_table(head, rows)


def totals_table():
    """How the original report came to its two totals of parameters, as a table."""
    rows = []
    for title, (count, output, norms) in totals().items():
        numbers = count, -output, norms, count - output + norms, REPORTED_TOTALS[title]
        rows.append([title, *(f"{number:,}" for number in numbers)])
    head = "network", "trainable parameters", "output layer", "batch norm that is not there"
    return utils.markdown_table((*head, "sum", "report"), rows)


def parameter_markdown(title, norm, head):
    """A network's parameters, layer by layer."""
    model = CNN(batch_norm=norm, head=head)
    reported = {count: f"{count:,}" for count in REPORTED_LAYERS}
    rows = [
        (name, " x ".join(map(str, shape)), formula, f"{count:,}", reported.get(count, "–"))
        for name, shape, formula, count in parameter_table(model)
    ]
    totals = f"**{count_parameters(model):,}**", f"**{REPORTED_TOTALS[title]:,}**"
    rows.append(("**all**", "", "", *totals))
    table = utils.markdown_table(["layer", "output", "formula", "parameters", "report"], rows)
    return f"{title} network:\n\n{table}"


def trial_scores(record):
    """What a trial is judged by. The first trials call pictures as they are unmirrored."""
    scores = record["final"]["val"]
    as_is = scores.get("as_is", scores.get("unmirrored", scores["accuracy"]))
    return {
        "validation, pictures as they are": f"{as_is:.3f}",
        "with the views of -at_test": f"{scores['accuracy']:.3f}",
        "its loss (nats)": f"{scores['loss']:.3f}",
        "training": f"{record['final']['train']['accuracy']:.3f}",
        "minutes": f"{utils.minutes(record):.1f}",
    }


def gains_table(records, base, labels):
    """Accuracies of a system, and what others, each with one ingredient more or less, gain."""
    usual, rows = with_scores(records[base]), []
    measures = (
        lambda runs: [late(run) for run in runs],
        lambda runs: accuracy(runs, "val"),
        lambda runs: accuracy(runs, "test"),
    )
    for label in (base, *labels):
        if runs := with_scores(records[label]):
            cells = []
            for measure in measures:
                change = utils.gain(measure(runs), measure(usual)) if label != base else ""
                cells += [utils.mean_sd(measure(runs)), change]
            rows.append([label, *cells, len(runs)])
    head = "recipe", LATE, "gain", "validation", "gain", "test", "gain", "runs"
    return utils.markdown_table(head, rows)


def classes_table(records):
    """The share of each class's test pictures that is recognised."""
    rows = []
    for label in LADDER:
        if runs := with_scores(records[label]):
            confusions = torch.tensor([run["final"]["test"]["confusion"] for run in runs]).float()
            recalls = confusions.diagonal(dim1=1, dim2=2) / confusions.sum(2)  # (runs, classes)
            rows.append([label, *(utils.mean_sd(column) for column in recalls.T.tolist())])
    return utils.markdown_table(("network", *CLASSES), rows)


def mean_matrix(runs, name):
    """The mean over runs of a confusion matrix of the test pictures, right ones left out."""
    matrices = torch.tensor([run["final"]["test"][name] for run in runs]).float()
    return matrices.mean(0).fill_diagonal_(0)


def mistakes_table(records, most=8):
    """The pairs of classes that are confused most often, and how often with confidence."""
    if not (runs := with_scores(records)):
        return None
    sure, every = mean_matrix(runs, "confident"), mean_matrix(runs, "confusion")
    rows = []
    for place in every.flatten().argsort(descending=True, stable=True)[:most].tolist():
        true, taken = divmod(place, len(CLASSES))
        counts = f"{every[true, taken]:.1f}", f"{sure[true, taken]:.1f}"
        rows.append([CLASSES[true], CLASSES[taken], *counts])
    head = "true class", "taken for", "times", "with a probability of .9 and more"
    return utils.markdown_table(head, rows, text=2)


def count_mistakes(records):
    """How many mistakes there are, how many of them confident, and how many are of pictures that
    training has under another label, as words."""
    if not (runs := with_scores(records)):
        return None
    sure, every = (mean_matrix(runs, name).sum() for name in ("confident", "confusion"))
    disputed = [run["final"]["test"]["disputed"] for run in runs]
    count, wrong, certain = (statistics.mean(column) for column in zip(*disputed))
    share = wrong / every if every else 0
    return (
        f"Of {every:.1f} mistakes (mean over seeds) {sure:.1f} are made with a probability of .9 "
        f"and more. Of the {count:g} test pictures that are also among the training pictures under "
        f"another label {wrong:.1f} ({share:.1%} of the mistakes) are taken for another "
        f"class than their own, {certain:.1f} of them with such a probability"
    )


def calibration_error(record):
    """The mean distance of probability and share of right ones over the test pictures (Guo et al.
    2017, section 2)."""
    rows = [row for row in record["final"]["test"]["calibration"] if row[0]]
    return sum(n * abs(sure - right) for n, sure, right in rows) / sum(n for n, _, _ in rows)


def draw_calibration(records):
    """The share of right answers against the probability that the network gives them."""
    names = {"without smoothed labels": "without smoothed labels", BEST_20: "with smoothed labels"}
    names = {label: name for label, name in names.items() if with_scores(records[label])}
    if not names:
        return None
    fig, axes = utils.figure(4.2, 3.6)
    axes.plot([0.2, 1], [0.2, 1], color="0.6", linestyle=":", label="as sure as right")
    for label, name in names.items():
        runs = with_scores(records[label])
        bins = zip(*(run["final"]["test"]["calibration"] for run in runs))
        means = [pooled for column in bins if (pooled := pool_bin(column))]
        error = statistics.mean(map(calibration_error, runs))
        name = f"{utils.with_seeds(name, runs)}, error {error:.3f}"
        axes.plot(*zip(*means), marker="o", markersize=4, label=name, **LOOKS[label])
    axes.set(xlabel="Probability of the predicted class", ylabel="Share of right answers")
    utils.legend_above(fig, axes, 1)
    return fig


def pool_bin(rows, least=20):
    """(mean probability, share of right answers) of a bin over runs; None of too few pictures."""
    counts = [row[0] for row in rows]
    if sum(counts) < least:
        return None
    sums = [sum(row[0] * row[i] for row in rows if row[0]) for i in (1, 2)]
    return sums[0] / sum(counts), sums[1] / sum(counts)


def draw_ladder(records):
    """Test accuracy against training time, a mark a run, from the report's own number on."""
    points = {
        label: (list(map(utils.minutes, runs)), accuracy(runs, "test"))
        for label in LADDER
        if (runs := with_scores(records[label]))
    }
    if not points:
        return None
    fig, axes = utils.figure(5.0, 3.6)
    utils.plot_against_time(axes, points, LOOKS)
    reported = REPORTED[VARIANT][1]
    axes.axhline(reported, color="0.4", linestyle="--", label=f"the report, {reported:.4f}")
    axes.set(xlabel="Training time (minutes)", ylabel="Test accuracy")
    axes.set_xlim(0, None)
    utils.legend_above(fig, axes)
    return fig


def draw_bands(records, labels, curves):
    """A figure with a panel for each of {column: axis label} over epochs, or None without runs."""
    labels = [label for label in labels if records[label]]
    if not labels:
        return None
    rows = len(curves)
    fig, panels = utils.figure(5.0, 0.6 + 2.3 * rows, rows, 1, sharex=True, squeeze=False)
    for axes, (column, title) in zip(panels[:, 0], curves.items()):
        for label in labels:
            runs = [record["history"][column] for record in records[label]]
            utils.plot_bands(axes, runs, utils.with_seeds(label, runs), **LOOKS[label])
        axes.set(ylabel=title)
        if column == "train_loss":  # a run that explodes would leave the others no room
            axes.set_ylim(0, 2)
    axes.set(xlabel="Epoch")
    utils.legend_above(fig, panels[0][0], 1 if KEPT in labels else 2)  # its name is long
    return fig


def draw_size(records):
    """Accuracy, convergence and time of the plain network, the variant and what lies between them,
    against their parameters; a mark a run."""
    labels = [label for label in CHANGES if with_scores(records[label])]
    if not labels:
        return None
    titles = "Validation accuracy,\nlate epochs", "First epoch at .75", "Time (s an epoch)"
    fig, panels = utils.figure(5.0, 6.0, 3, 1, sharex=True)
    for axes, measure, title in zip(panels, (late, first_epoch, seconds_an_epoch), titles):
        for label, marker in zip(labels, "osD^"):
            runs = with_scores(records[label])
            values = [math.nan if (x := measure(run)) is None else x for run in runs]
            sizes = [run["parameters"] / 1e6 for run in runs]
            name = utils.with_seeds(label, runs)
            look = {"color": LOOKS[label]["color"], "label": name, "markersize": 5, "alpha": 0.8}
            axes.plot(sizes, values, marker, **look)
        axes.set(ylabel=title, xlim=(0, 6))
    panels[1].set_ylim(0, None)
    panels[2].set_ylim(0, None)
    panels[2].set(xlabel="Parameters (millions)")
    utils.legend_above(fig, panels[0])
    return fig


def draw_overfitting(records):
    """Training and validation accuracy of the plain network, regularised and not, and variant."""
    labels = [label for label in REGULARISED if records[label]]
    if not labels:
        return None
    rows = math.ceil(len(labels) / 2)
    fig, panels = utils.figure(5.0, 0.6 + 1.9 * rows, rows, 2, sharey=True, squeeze=False)
    for axes in panels.flat[len(labels) :]:
        axes.axis("off")
    for axes, label in zip(panels.flat, labels):
        histories = [record["history"] for record in records[label]]
        looks = ("train_accuracy", "training", "--"), ("val_accuracy", "validation", "-")
        for (column, name, line), color in zip(looks, (utils.VERMILION, utils.BLUE)):
            runs = [history[column] for history in histories]
            utils.plot_bands(axes, runs, name, color=color, linestyle=line)
        axes.set_title(utils.with_seeds(label, runs).replace(" (", "\n("))  # or neighbours meet
    fig.supxlabel("Epoch", fontsize=9)
    fig.supylabel("Accuracy", fontsize=9)
    utils.legend_above(fig, panels[0][0])
    return fig


def draw_moved(records):
    """What test accuracy loses as the pictures are moved."""
    titles = "after 40 epochs", "after 10 epochs, batch norm and global average pooling"
    fig, panels = utils.figure(5.0, 6.0, 2, 1, sharex=True, sharey=True)
    for axes, labels, title in zip(panels, (MOVED, POOLS), titles):
        for label in labels:
            if runs := [[x - run[0] for x in run] for run in moved(records[label])]:
                name = utils.with_seeds(label, runs)
                utils.plot_bands(axes, runs, name, ".", first=0, **LOOKS[label])
        axes.set(title=title, ylabel="Change of test accuracy")
        if axes.lines:
            axes.legend()
    if not any(axes.lines for axes in panels):
        return None
    panels[1].set(xlabel="Test pictures moved by (pixels)")
    return fig


def draw_scrambled(records):
    """A drawn picture as it is and as the course's loader passed it on; accuracies with both."""
    fig, grid = utils.figure(5.0, 5.2, 2, 2, height_ratios=(1, 1.5))
    picture = torch.from_numpy(sample.draw_landscape("mountain", np.random.default_rng(1)))
    scrambled = scramble_pixels(picture.permute(2, 0, 1).unsqueeze(0))[0].permute(1, 2, 0)
    for axes, image, title in zip(grid[0], (picture, scrambled), ("a picture", "scrambled")):
        axes.imshow(image.numpy(), interpolation="nearest")
        axes.set_title(title)
        axes.axis("off")
    below = fig.add_subplot(grid[1, 0].get_gridspec()[1, :])
    for axes in grid[1]:
        axes.remove()
    for label in SCRAMBLED:
        if runs := [record["history"]["val_accuracy"] for record in records[label]]:
            utils.plot_bands(below, runs, utils.with_seeds(label, runs), **LOOKS[label])
    below.set(xlabel="Epoch", ylabel="Validation accuracy")
    utils.legend_above(fig, below)
    return fig


def draw_running_mean(records):
    """Each epoch's own training loss, and the mean since the first epoch, as the report had it."""
    if not records:
        return None
    fig, axes = utils.figure()
    own = [record["history"]["train_loss"] for record in records]
    running = [(np.cumsum(run) / np.arange(1, len(run) + 1)).tolist() for run in own]
    report = {"color": utils.VERMILION, "linestyle": "--"}
    utils.plot_bands(axes, running, "mean since the first epoch (report)", **report)
    utils.plot_bands(axes, own, "each epoch's own", color=utils.BLUE)
    axes.set(xlabel="Epoch", ylabel="Training loss (nats)", ylim=(0, None))
    axes.legend()
    return fig


# ----------------------------------------------------------------------------------------------
# prediction


def load_network(path, device="cpu"):
    """The network of a checkpoint, ready to predict, and the checkpoint's contents."""
    saved = utils.load_checkpoint(path, device)
    with utils.refusing_misfits(f"{path}: not a network of question 2"):
        utils.check_command(parse_options, command(saved["config"]["options"]))
        model = build_model(saved["config"]["options"])
        model.load_state_dict(saved["model"])
        saved["history"]["val_accuracy"][-1]
    return model.to(device).eval(), saved


def find_pictures(paths):
    """The files among `paths` and, by their ending, all pictures in the folders among them."""
    endings = utils.picture_endings()
    found = []
    for path in paths:
        if path.is_dir():
            inside = sorted(
                p for p in path.rglob("*") if p.suffix.lower() in endings and p.is_file()
            )
            if not inside:
                raise UserError(f"{path}: no pictures in this folder")
            found += inside
        else:
            found.append(path)
    return found


def read_pictures(files, named):
    """Those of the files that can be read, and their pictures (N, 3, 48, 48). One that cannot be is
    passed over with a line that says so; if it is among the `named`, UserError."""
    found = []
    for file in tqdm(files, leave=False, disable=None):
        try:
            found.append((file, utils.read_picture(file)))
        except UserError as error:
            if file in named:
                raise
            tqdm.write(f"{error}; passed over", file=sys.stderr)
    if not found:
        raise UserError("none of these pictures can be read")
    files, images = zip(*found)
    return files, torch.stack(images)


def classify(options):
    """Print class and probabilities of the pictures under -predict, as a table or as JSON."""
    path = options.checkpoint or utils.best_checkpoint(
        options.output_dir / "checkpoints", "q2", lambda saved: saved["history"]["val_accuracy"][-1]
    )
    device = utils.prepare_device(options.device, options.threads)
    model, saved = load_network(path, device)
    pictures = find_pictures(options.predict)
    pictures, images = read_pictures(pictures, options.predict)
    if saved["config"]["options"]["scramble_pixels"]:
        images = scramble_pixels(images)
    rows = predict(model, images.to(device)).exp().tolist()

    note = ", trained on the built-in SAMPLE" if saved["config"]["data"]["name"] == "sample" else ""
    if saved["config"]["options"].get("at_test"):
        note = f" on pictures as they are{note}"  # epochs are not scored with all views
    accuracy = saved["history"]["val_accuracy"][-1]
    print(f"Network: {path} (validation accuracy {accuracy:.4f}{note})", file=sys.stderr)
    answers = [
        {
            "picture": str(picture),
            "class": CLASSES[max(range(len(row)), key=row.__getitem__)],
            "probabilities": dict(zip(CLASSES, row)),
        }
        for picture, row in zip(pictures, rows)
    ]
    if options.json:
        print(json.dumps(answers, indent=1, ensure_ascii=False))
        return
    names = [utils.printable(answer["picture"]) for answer in answers]
    width = max(map(len, ("picture", *names)))
    print(f"{'picture':{width}}  {'class':9}  " + " ".join(f"{name:>9}" for name in CLASSES))
    for name, answer in zip(names, answers):
        shares = " ".join(f"{share:9.3f}" for share in answer["probabilities"].values())
        print(f"{name:{width}}  {answer['class']:9}  {shares}")


# ----------------------------------------------------------------------------------------------
# main


def main(argv=None):
    """Do what the command line asks for."""
    options = parse_options(argv)
    if options.count_params:
        print_parameters(options)
    elif options.predict:
        classify(options)
    elif options.report:
        utils.write_report(sys.modules[__name__], options)
    elif len(several := utils.each(options, "learning_rate", "seed")) > 1:
        utils.train_many(sys.modules[__name__], several)
    else:
        data, device = load_data(options), utils.prepare_device(options.device, options.threads)
        run = make_run(options, data)
        with utils.only_here(run):
            train(run, data, device, options)


if __name__ == "__main__":
    utils.run_script(main)
