"""Measurements of question 2's finished networks that only the report needs.

of every network | of some experiments
"""

import copy
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import hw2_q2 as script
import utils

# ----------------------------------------------------------------------------------------------
# of every network

MAX_SHIFT = 4  # pixels
SIZES = 32, 48, 64, 96  # pixels


def analyse(
    args: Namespace, data: utils.Landscapes, device: torch.device, extra: Iterable[str] = ()
) -> dict[str, Any]:
    """Measure the finished network of these arguments: 'train', classification_metrics of the
    training images; calibration_metrics and confident_errors, with test-time augmentation; if
    the pixels are in order, 'shifted' and, for networks that take images of any size, 'sizes', test
    accuracies; and what `extra` names of EXTRA.
    """
    model, args, _ = script.load_network(script.make_run(args, data).checkpoint, device)
    training = script.to_device(*data.splits["train"], device, args)
    test = script.to_device(*data.splits["test"], device, args)
    log_probs = script.predict(model, test[0], args.tta)
    analysis = {"train": script.evaluate(model, *training)}
    analysis |= calibration_metrics(log_probs, test[1].cpu(), label_conflicts(test, training))
    analysis["confident_errors"] = confident_errors(log_probs, test[1].cpu())
    if args.pixels == "ordered":
        analysis["shifted"] = shifted_accuracies(model, *test)
        if args.head == "gap" and args.kernel_size != utils.SIZE:
            analysis["sizes"] = size_accuracies(model, *test)
    splits = {"train": training, "test": test}
    splits["val"] = script.to_device(*data.splits["val"], device, args)
    return analysis | {name: EXTRA[name](model, args, splits) for name in extra}


def label_conflicts(test: tuple[Tensor, Tensor], training: tuple[Tensor, Tensor]) -> Tensor:
    """Which test images (N,) also occur among the training images with another label. Both:
    images uint8 (N, 3, 48, 48) and labels (N,)."""
    training_labels = defaultdict(set)  # by image
    for image, label in zip(training[0].cpu().numpy(), training[1].tolist()):
        training_labels[image.tobytes()].add(label)
    pairs = zip(test[0].cpu().numpy(), test[1].tolist())
    return torch.tensor([bool(training_labels[x.tobytes()] - {label}) for x, label in pairs])


def calibration_metrics(
    log_probs: Tensor, labels: Tensor, conflicts: Tensor, bins: int = 10, threshold: float = 0.9
) -> dict[str, list]:
    """How well the probability of the predicted class is calibrated (Guo et al. 2017, section 2).

    log_probs: (N, 6), labels: (N,), conflicts: bool (N,), all on the CPU. Returns
    'calibration': for each bin of that probability [images, mean probability, accuracy];
    'confident': the confusion matrix of the predictions with at least the threshold's probability;
    'label_conflicts': the numbers of [conflicts, errors among them, confident errors among them].
    """
    probabilities, predicted = log_probs.exp().max(1)
    correct, indices = (predicted == labels).float(), (probabilities * bins).long()
    calibration = []
    for i in range(bins):
        inside = indices.clamp(max=bins - 1) == i
        means = (x[inside].mean().item() for x in (probabilities, correct))
        calibration.append([inside.sum().item(), *(means if inside.any() else (None, None))])
    confident, errors = probabilities >= threshold, conflicts & (predicted != labels)
    confusion = script.classification_metrics(log_probs[confident], labels[confident])["confusion"]
    return {
        "calibration": calibration,
        "confident": confusion,
        "label_conflicts": [x.sum().item() for x in (conflicts, errors, errors & confident)],
    }


def confident_errors(log_probs: Tensor, labels: Tensor, count: int = 24) -> list[list]:
    """The misclassified images of the most probable predictions: [index, true class, predicted
    class, probability], the most probable first. log_probs: (N, 6), labels: (N,), on the CPU."""
    probabilities, predicted = log_probs.exp().max(1)
    wrong = (predicted != labels).nonzero()[:, 0]
    order = wrong[probabilities[wrong].argsort(descending=True, stable=True)][:count]
    columns = order, labels[order], predicted[order], probabilities[order]
    return [[i, a, b, round(p, 4)] for i, a, b, p in zip(*(column.tolist() for column in columns))]


def shifted_accuracies(model: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """Accuracies on images shifted by 0, 1, ... MAX_SHIFT pixels, each the mean over up, down, left
    and right."""
    accuracies = [script.evaluate(model, images, labels)["accuracy"]]
    for distance in range(1, MAX_SHIFT + 1):
        scores = [
            script.evaluate(model, script.shift_images(images, dimension, step), labels)["accuracy"]
            for step in (-distance, distance)
            for dimension in (2, 3)
        ]
        accuracies.append(sum(scores) / len(scores))
    return accuracies


def size_accuracies(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """{size: accuracy} on images resized to size x size pixels, antialiased, for all SIZES."""
    accuracies = {}
    for size in SIZES:
        correct = 0
        for x, y in zip(images.split(16), labels.cpu().split(16)):  # feature maps may be large
            x = F.interpolate(x.float(), (size, size), mode="bilinear", antialias=True).round()
            correct += (script.predict(model, x).argmax(1) == y).sum().item()
        accuracies[str(size)] = correct / len(labels)
    return accuracies


# ----------------------------------------------------------------------------------------------
# of some experiments, each from (finished network, arguments, splits on the device)

Splits = dict[str, tuple[Tensor, Tensor]]
EMA_DECAY = 0.999  # per step: an average over the last thousand steps or so


def score_every_epoch(_: nn.Module, args: Namespace, splits: Splits) -> dict[str, list[float]]:
    """Train the network again, to the same bits, and measure each epoch's validation accuracy three
    times: with its weights 'as they are', with batch norm's 'statistics' recomputed on the training
    images, and with an exponential moving 'average' of weights and statistics."""
    images, labels = splits["train"]
    utils.seed_everything(args.seed)
    model = script.build_model(args).to(images.device)
    optimizer = script.make_optimizer(model, args)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY), use_buffers=True)
    hook = optimizer.register_step_post_hook(lambda *_: average.update_parameters(model))
    sizes = script.batch_sizes(len(labels), args.batch_size, args.last_batch)
    accuracies = {"as they are": [], "statistics": [], "average": []}
    for epoch in range(1, args.epochs + 1):
        script.train_one_epoch(model, optimizer, images, labels, sizes, epoch, args)
        recomputed = copy.deepcopy(model)
        update_bn(map(script.to_float, images.split(64)), recomputed)
        for values, network in zip(accuracies.values(), (model, recomputed, average.module)):
            values.append(script.evaluate(network, *splits["val"])["accuracy"])
    hook.remove()
    return accuracies


def first_filters(model: nn.Module, args: Namespace, splits: Splits) -> list:
    """The kernels of the first convolution, (C_out, 3, k, k), rounded."""
    return rounded(model.convs[0].conv.weight)


def rounded(values: Tensor) -> list:
    """Nested lists of numbers with three decimals."""
    return values.detach().cpu().double().round(decimals=3).tolist()


def grad_cam(model: nn.Module, args: Namespace, splits: Splits) -> dict[str, list]:
    """Grad-CAM (Selvaraju et al. 2017, section 3) of the predicted class for the first test image
    of each class, in float32: 'images', their indices in the test set; 'predicted' classes; 'maps',
    (6, 6, 6) for 48x48 images: the last convolution's feature maps, weighted by the mean gradients
    of the class's logit, summed, without negative values and divided by the largest."""
    images, labels = splits["test"]
    indices = first_images(labels)
    features = model.convs(script.to_float(images[indices]))  # (6, C, 6, 6)
    score, predicted = model.logits(features).max(1)
    [gradients] = torch.autograd.grad(score.sum(), features)
    maps = F.relu((gradients.mean((2, 3), keepdim=True) * features).sum(1))  # (6, 6, 6)
    maps = maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)
    return {"images": indices, "predicted": predicted.tolist(), "maps": rounded(maps)}


def first_images(labels: Tensor) -> list[int]:
    """The index of the first image of each class that occurs."""
    return [labels.tolist().index(i) for i in range(len(utils.CLASSES)) if (labels == i).any()]


EXTRA = {"epochs": score_every_epoch, "filters": first_filters, "grad_cam": grad_cam}
