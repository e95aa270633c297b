"""Data: loading, preparing and downloading the data files, the built-in samples."""

import errno
import gzip
import http.server
import io
import os
import pickle
import re
import shutil
import stat
import sys
import threading
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import utils
from data import image_files, prepare_landscapes, prepare_pronunciations, sample, ship
from data.image_files import read_image
from tests.conftest import save_checkpoint
from utils import CLASSES, SPLITS, UserError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test works in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(cases):
    """Arguments of pytest.mark.parametrize for {id: values}."""
    return {"argvalues": list(cases.values()), "ids": cases}


def write_zip(path, entries):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries.items():
            file.writestr(name, content)


# ----------------------------------------------------------------------------------------------
# loading landscapes

LAYOUTS = {
    "channels first": ("images", lambda a: a.transpose(0, 3, 1, 2)),
    "flattened": ("images", lambda a: a.reshape(len(a), -1)),
    "float32 in 0..1": ("images", lambda a: a.astype(np.float32) / 255),
    "float64 in 0..255, channels first": ("images", lambda a: a.transpose(0, 3, 1, 2) * 1.0),
    "float16 in 0..1, flattened": ("images", lambda a: (a / 255).astype("f2").reshape(-1, 6912)),
    "int64 in 0..255": ("images", lambda a: a.astype(np.int64)),
    "uint16 in 0..255, flattened": ("images", lambda a: a.astype(np.uint16).reshape(len(a), -1)),
    "Fortran order": ("images", np.asfortranarray),
    "int32 labels": ("labels", lambda a: a.astype(np.int32)),
    "uint8 labels in a column": ("labels", lambda a: a[:, None].astype(np.uint8)),
}


@pytest.mark.parametrize(("kind", "change"), **table(LAYOUTS))
def test_every_layout_gives_the_same_data(arrays, landscapes, kind, change):
    changed = {key: change(a) if key.endswith(kind) else a for key, a in arrays.items()}
    np.savez_compressed("x.npz", **changed)
    loaded = utils.load_landscapes(Path("x.npz"))
    assert loaded.name == "photographs"
    assert loaded.fingerprint == landscapes.fingerprint
    for split in SPLITS:
        for tensor, expected in zip(loaded.splits[split], landscapes.splits[split]):
            assert tensor.dtype == expected.dtype
            assert torch.equal(tensor, expected)


def test_the_fingerprint_depends_on_each_pixel_and_label(landscapes):
    images, labels = landscapes.splits["val"]
    other_images, other_labels = images.clone(), labels.clone()
    other_images[3, 1, 5, 7] += 1
    other_labels[0] += 1
    for changed in ((other_images, labels), (images, other_labels)):
        other = utils.Landscapes(landscapes.splits | {"val": changed})
        assert other.fingerprint != landscapes.fingerprint


BAD_ARRAYS = {
    "32 pixels": ("test_images", lambda a: a[:, :32, :32], "shape"),
    "a number": ("train_images", lambda a: np.uint8(3), "shape"),
    "integers up to 256": ("train_images", lambda a: a * np.uint16(0) + 256, "256.* 0 to 255"),
    "negative integers": ("train_images", lambda a: a.astype(np.int8) * 0 - 1, "from -1 to -1"),
    "Boolean images": ("train_images", lambda a: a > 9, "type bool"),
    "NaN": ("val_images", lambda a: np.where(a == a.max(), np.nan, a), "nan"),
    "floats up to 256": ("val_images", lambda a: a * np.float32(0) + 256, "256"),
    "negative floats": ("val_images", lambda a: a * -1.0, "values from"),
    "no images": ("val_images", lambda a: a[:0], "no images"),
    "label 6": ("train_labels", lambda a: a + 1, "labels 1 to 6"),
    "label -1": ("train_labels", lambda a: a - 1, "labels -1 to 4"),
    "float labels": ("train_labels", lambda a: a * 1.0, "type float64"),
    "one-hot labels": ("train_labels", lambda a: np.eye(6, dtype=int)[a], "shape"),
    "a label too few": ("test_labels", lambda a: a[:-1], "12 test_images but 11 test_labels"),
}


@pytest.mark.parametrize(("key", "change", "message"), **table(BAD_ARRAYS))
def test_bad_arrays_are_named(arrays, key, change, message):
    np.savez("x.npz", **arrays | {key: change(arrays[key])})
    with pytest.raises(UserError, match=rf"x\.npz.*{message}") as error:
        utils.load_landscapes(Path("x.npz"))
    assert key in str(error.value)


class Bomb:
    """Unpickling it writes the file `exploded`."""

    def __reduce__(self):
        return (open, ("exploded", "w"))


BAD_FILES = {
    "empty": (lambda path, good: path.write_bytes(b""), "not a readable"),
    "text": (lambda path, good: path.write_text("not an npz"), "not a readable"),
    "a folder": (lambda path, good: path.mkdir(), "not a readable"),
    "a pickle": (lambda path, good: path.write_bytes(pickle.dumps(Bomb())), "not a readable"),
    "one array": (lambda path, good: np.save(path.open("wb"), np.zeros(3)), "single array"),
    "other arrays": (lambda path, good: np.savez(path, val_labels=[1]), "has no .*val_images"),
    "cut at 99.9 %": (lambda path, good: path.write_bytes(good[: -len(good) // 1000]), "not a"),
    "damaged": (lambda p, good: p.write_bytes(good.replace(good[9000:9020], bytes(20))), "CRC"),
}


@pytest.mark.parametrize(("write", "message"), **table(BAD_FILES))
def test_bad_files_are_named_and_run_no_code(landscapes_path, write, message):
    write(Path("x.npz"), landscapes_path.read_bytes())
    with pytest.raises(UserError, match=rf"x\.npz: .*{message}"):
        utils.load_landscapes(Path("x.npz"))
    assert not Path("exploded").exists()


# ----------------------------------------------------------------------------------------------
# reading images

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
SHADES = np.linspace(0, 65535, 48 * 48).astype(np.uint16).reshape(48, 48)
WHOLE = {"lossless": True, "exact": True}
FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (48, 48))]}
TURNED = Image.Exif()
TURNED[0x0112] = 6  # the orientation of the camera
EXACT = {  # (pixels of a file, options of Image.save, pixels that are read)
    "48 pixels": (PIXELS, {}, PIXELS),
    "16 bits": (SHADES, {}, np.repeat(SHADES[..., None] // 257, 3, 2)),
    "first frame of an animation": (PIXELS, FRAMES, PIXELS),
    "turned 90 degrees clockwise": (PIXELS, {"exif": TURNED}, np.rot90(PIXELS, -1)),
}


@pytest.mark.parametrize(("pixels", "options", "expected"), **table(EXACT))
def test_images_of_48_pixels_are_not_resampled(pixels, options, expected):
    Image.fromarray(pixels).save("x.png", **options)
    assert np.array_equal(read_image("x.png").permute(1, 2, 0), expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK", "P", "1", "LA"])
def test_images_of_every_mode_and_size(mode):
    Image.new("RGB", (97, 33), (200, 0, 0)).convert(mode).save("x.tiff")
    image = read_image("x.tiff")
    assert image.dtype == torch.uint8
    assert image.shape == (3, 48, 48)
    expected = [60, 60, 60] if mode in ("L", "LA", "1") else [200, 0, 0]  # mode 1 is dithered
    assert image.float().mean((1, 2)).tolist() == pytest.approx(expected, abs=1)


def test_resizing_averages():
    stripes = np.zeros((480, 480, 3), np.uint8)
    stripes[:, ::2] = 255  # without antialiasing every pixel would be 0 or 255
    Image.fromarray(stripes).save("x.png")
    assert 110 < read_image("x.png").min() <= read_image("x.png").max() < 145


def test_formats_that_pillow_lacks_do_not_affect_the_others(monkeypatch):
    Image.new("RGB", (48, 48)).save("x.png")
    monkeypatch.setattr(image_files, "IMAGE_FORMATS", ("UNKNOWN", "PNG"))
    assert read_image("x.png").shape == (3, 48, 48)


def test_bad_images_are_named():
    Path("text").write_bytes(b"hello")
    Path("header").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    Image.new("F", (60, 60), 0.5).save("floats", "tiff")
    messages = {"text": "convert to JPEG", "header": "", "floats": "floats of unknown"}
    for name, message in messages.items():
        with pytest.raises(UserError, match=rf"{name}: not a readable image \(.*{message}"):
            read_image(name)
    for name, message in {"missing": "no such file", ".": "not a file"}.items():
        with pytest.raises(UserError, match=rf"^{re.escape(name)}: {message}"):
            read_image(name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_without_waiting_for_its_writer():
    os.mkfifo("pipe.jpg")
    with pytest.raises(UserError, match=r"pipe\.jpg: not a file"):
        read_image("pipe.jpg")


GREY = np.full((48, 48), 90, np.uint8)
ALPHA = np.where(np.arange(48) < 20, 0, 255).astype(np.uint8) * np.ones((48, 1), np.uint8)
TWO = Image.fromarray((ALPHA > 0).astype(np.uint8), "P")  # a palette image of two colours
TWO.putpalette([10, 20, 30, 90, 90, 90])
TRANSPARENT = {  # (image whose first 20 columns are transparent and others grey, options, suffix)
    "RGBA": (Image.fromarray(np.dstack([GREY, GREY, GREY, ALPHA])), {}, "png"),
    "RGBA as WebP": (Image.fromarray(np.dstack([GREY, GREY, GREY, ALPHA])), WHOLE, "webp"),
    "LA": (Image.fromarray(np.dstack([GREY, ALPHA])), {}, "png"),
    "PA": (TWO, {"transparency": bytes([0, 255])}, "png"),
    "P": (TWO, {"transparency": 0}, "gif"),
    "L": (Image.fromarray(np.where(ALPHA, GREY, 7)), {"transparency": 7}, "png"),
    "16 bits": (
        Image.fromarray(np.where(ALPHA, 90 * 257, 7).astype(np.uint16)),
        {"transparency": 7},
        "png",
    ),
    "RGB": (TWO.convert("RGB"), {"transparency": (10, 20, 30)}, "png"),
}


@pytest.mark.parametrize(("image", "options", "suffix"), **table(TRANSPARENT))
def test_what_is_transparent_is_white(image, options, suffix):
    image.save(f"x.{suffix}", **options)
    expected = np.where(ALPHA, GREY, 255)
    assert np.array_equal(read_image(f"x.{suffix}"), np.stack([expected] * 3))


def test_half_transparent_pixels_are_mixed_with_white():
    Image.new("RGBA", (48, 48), (0, 100, 255, 51)).save("x.png")
    assert read_image("x.png")[:, 0, 0].tolist() == [204, 224, 255]


def test_files_are_read_by_content():
    image, more = (
        Image.fromarray(PIXELS),
        {"save_all": True, "append_images": [Image.new("L", (9, 9))]},
    )
    image.save("x.png")
    expected = read_image("x.png")
    for name in ("no suffix", "x.PNG", "x.jpg", "x.txt"):
        shutil.copy("x.png", name)
        assert torch.equal(read_image(name), expected)
    image.save("x.mpo", quality=95, **more)  # two images, as some telephones write them
    shutil.copy("x.mpo", "telephone.jpg")
    image.save("alone.jpg", quality=95)
    for name in ("x.mpo", "telephone.jpg"):
        assert torch.equal(read_image(name), read_image("alone.jpg"))
    assert {".mpo", ".jpg", ".jfif", ".webp"} <= image_files.image_suffixes()


def test_only_large_jpeg_files_are_decoded_at_an_eighth(monkeypatch):
    waves = 120 + 99 * np.sin(np.arange(960) / 7)[:, None] * np.cos(np.arange(960) / 99)
    image = Image.fromarray(waves.astype(np.uint8))
    for name in ("x.jpg", "x.png"):
        image.save(name)
    whole = {name: read_image(name) for name in ("x.jpg", "x.png")}
    with Image.open("x.jpg") as image:
        exact = image.convert("RGB").resize((48, 48), Image.Resampling.BICUBIC)
    assert np.array_equal(whole["x.jpg"].permute(1, 2, 0), exact)
    monkeypatch.setattr(image_files, "ORDINARY_PIXELS", 10**5)
    assert torch.equal(read_image("x.png"), whole["x.png"])
    reduced = read_image("x.jpg")
    assert not torch.equal(reduced, whole["x.jpg"])
    torch.testing.assert_close(reduced.float(), whole["x.jpg"].float(), atol=4, rtol=0)


def test_a_photograph_of_90_million_pixels():
    Image.new("L", (10_000, 9_000), 77).save("x.jpg")
    assert torch.equal(read_image("x.jpg"), torch.full((3, 48, 48), 77, dtype=torch.uint8))


@pytest.mark.parametrize("is_installed", [False, True])
def test_heic_is_read_where_its_plugin_is_installed(monkeypatch, capsys, is_installed):
    for registry in ("OPEN", "EXTENSION", "ID"):
        monkeypatch.setattr(Image, registry, getattr(Image, registry).copy())

    def register():
        is_heic, opened = (
            lambda start: start[4:12] == b"ftypheic",
            Image.new("RGB", (9, 9), (1, 2, 3)),
        )
        Image.register_open("HEIF", lambda file, name: opened, is_heic)
        Image.register_extension("HEIF", ".heic")

    plugin = SimpleNamespace(register_heif_opener=register) if is_installed else None
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)  # None: importing it fails
    monkeypatch.setattr(image_files, "_register_formats", image_files._register_formats.__wrapped__)
    Path("x.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    Path("raw.NEF").touch()
    found = image_files.find_images(Path())
    if is_installed:
        assert found == [Path("x.HEIC")]
        assert read_image("x.HEIC").float().mean((1, 2)).tolist() == [1, 2, 3]
    else:
        assert found == []
        with pytest.raises(UserError, match="for HEIC, `pip install pillow-heif`"):
            read_image("x.HEIC")
    skipped = "1 .nef" if is_installed else "1 .heic, 1 .nef"
    assert capsys.readouterr().err.startswith(f".: skipping {skipped}, formats that are not read")


def test_folders_are_entered_once_and_hidden_files_skipped(tmp_path):
    names = "b/1.png", "b/c/2.PNG", "d.jpg/3.png", ".hidden/4.png", "__MACOSX/b/1.png", "b/._1.png"
    for name in names:
        Path("top", name).parent.mkdir(parents=True, exist_ok=True)
        Path("top", name).touch()
    Path("elsewhere").mkdir()
    Path("elsewhere/5.png").touch()
    try:
        for link, target in {"a": "b", "b/c/loop": "../..", "z": "../elsewhere"}.items():
            Path("top", link).symlink_to(target, target_is_directory=True)
        Path("top/broken.png").symlink_to("nothing")
    except OSError:
        pytest.skip("no symbolic links on this system")
    found = [path.as_posix() for path in image_files.find_images(Path("top"))]
    expected = "b/1.png", "b/c/2.PNG", "broken.png", "d.jpg/3.png", "z/5.png"
    assert found == [f"top/{name}" for name in expected]


def test_folders_that_cannot_be_read_are_named(monkeypatch, capsys):
    Path("shut").mkdir()
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "shut")
    monkeypatch.setattr(os, "scandir", Mock(side_effect=denied))
    assert image_files.files_below(Path("shut")) == []
    assert re.match("Skipping shut: .*Permission denied", capsys.readouterr().err)


# ----------------------------------------------------------------------------------------------
# loading pronunciations


def load_words(text, split="valid"):
    """Load three files of one line each, but for `text` in that of `split`."""
    for name in ("train", "valid", "test"):
        content = text if name == split else "k æ t\tcat\n"
        content = content if isinstance(content, bytes) else content.encode()
        Path(f"{name}.tsv").write_bytes(content)
    return utils.load_pronunciations(Path())


CAT, CAFE = (("k", "æ", "t"), "cat"), (("k", "a", "f", "e"), "caf\u00e9")

GOOD_WORDS = {
    "no newline at the end": ("k æ t\tcat", [CAT]),
    "Windows line endings": ("k æ t\tcat\r\nk a f e\tcafé\r\n", [CAT, CAFE]),
    "byte order mark": ("\ufeffk æ t\tcat\n", [CAT]),
    "decomposed accents": ("k a f e\tcafe\u0301\n", [CAFE]),
    "additional spaces": (" k  æ t \t cat \n", [CAT]),
    "repeated word": ("k æ t\tcat\nk æ t\tcat\n", [CAT, CAT]),
    "UTF-16": ("k æ t\tcat\n".encode("utf-16"), [CAT]),
    "joiners": ("k\tक्\u200dष\nk\tन्\u200c\n", [(("k",), "क्\u200dष"), (("k",), "न्\u200c")]),
    "a no-break space": ("aɪ s\tice\u00a0cube\n", [(("aɪ", "s"), "ice\u00a0cube")]),
    "one phoneme, two words": ("t͡ɬ\ta b\n", [(("t͡ɬ",), "a b")]),
    "an emoji": ("l ʌ v\t❤\ufe0f\n", [(("l", "ʌ", "v"), "❤\ufe0f")]),
}


@pytest.mark.parametrize(("text", "expected"), **table(GOOD_WORDS))
def test_pronunciations_are_read(text, expected):
    data = load_words(text)
    assert data.splits == {"train": [CAT], "val": expected, "test": [CAT]}
    assert data.name == "pronunciations"


BAD_WORDS = {
    "empty": ("", ": is empty"),
    "no tab": ("k æ t\tcat\nk æ t cat\n", ", line 2: 1 fields"),
    "a blank line": ("k æ t\tcat\n\nk æ t\tcat\n", ", line 2: 1 fields"),
    "no spelling": ("k æ t\t\n", ", line 1: an empty field"),
    "no phonemes": (" \tcat\n", ", line 1: an empty field"),
    "a long field": ("k æ t\t" + "t" * 1001, ", line 1: a field of more than 1,000 characters"),
    "spelling first": ("ship\tʃ ɪ p\na\tə\nshop\tʃ ɒ p\n", ".*swap the columns"),
    "a carriage return": ("k æ t\tcat\rk æ t\tcat\n", ", line 1: 3 fields"),
    "Latin-1": ("k æ t\tcat\n".encode() + b"k a f e\tcaf\xe9\n", ", line 2: not UTF-8"),
    "UTF-16, cut": ("k æ t\tcat\n".encode("utf-16")[:-1], ", line 1: not UTF-8"),
}


@pytest.mark.parametrize(("content", "message"), **table(BAD_WORDS))
def test_bad_lines_are_named(content, message):
    with pytest.raises(UserError, match=rf"test\.tsv{message}"):
        load_words(content, "test")


INVISIBLE = {
    "\x07": "U+0007 CONTROL CHARACTER",
    "\u00ad": "U+00AD SOFT HYPHEN",
    "\u0378": "U+0378 UNASSIGNED CHARACTER",
    "\u200b": "U+200B ZERO WIDTH SPACE",
    "\u2028": "U+2028 LINE SEPARATOR",
    "\u2029": "U+2029 PARAGRAPH SEPARATOR",
    "\u202e": "U+202E RIGHT-TO-LEFT OVERRIDE",
    "\u2067": "U+2067 RIGHT-TO-LEFT ISOLATE",
    "\ue000": "U+E000 PRIVATE USE CHARACTER",
    "\ufeff": "U+FEFF ZERO WIDTH NO-BREAK SPACE",
}


@pytest.mark.parametrize(("character", "name"), INVISIBLE.items(), ids=INVISIBLE.values())
@pytest.mark.parametrize("line", ["k æ t\tc{}at\n", "k {}æ t\tcat\n"])
def test_invisible_characters_are_named(line, character, name):
    with pytest.raises(UserError) as error:
        load_words("k æ t\tcat\n" + line.format(character), "test")
    assert str(error.value) == f"test.tsv, line 2: contains {name}; delete it"


def test_a_folder_in_place_of_a_list_is_named():
    Path("train.tsv").mkdir()
    with pytest.raises(UserError, match=r"train\.tsv: cannot be read"):
        utils.load_pronunciations(Path())


def test_the_fingerprint_depends_on_the_words():
    texts = "k æ t\tcat\n", "k æ t\tcat\n", "k æ t\tcats\n", "k æ d\tcat\n"
    first, again, *others = (load_words(text).fingerprint for text in texts)
    assert first == again
    assert first not in others


# ----------------------------------------------------------------------------------------------
# preparing landscapes


def png(seed):
    """The bytes of a random image, the same for the same seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


# An archive in Kaggle's layout: 11, 12, ... 16 training images of each class and 2 test images.
TRAIN, TEST = "seg_train/seg_train", "seg_test/seg_test"
ENTRIES = {"seg_pred/seg_pred/5.jpg": png(9), f"{TRAIN}/readme.txt": b"not an image"}
for label, name in enumerate(CLASSES):
    ENTRIES |= {f"{TRAIN}/{name}/{i}.png": png(1000 * label + i) for i in range(11 + label)}
    ENTRIES |= {f"{TEST}/{name}/t{i}.png": png(1000 * label + 500 + i) for i in range(2)}


def prepare(argv, entries=ENTRIES):
    """The splits that `argv` makes of x.zip, into which `entries` are written."""
    write_zip("x.zip", entries)
    prepare_landscapes.main([*argv.split(), "--output", "x.npz"])
    return utils.load_landscapes(Path("x.npz")).splits


def class_counts(*splits):
    return torch.bincount(torch.cat([labels for _, labels in splits])).tolist()


def test_archive_and_folder_give_the_same_file(capsys):
    splits = prepare("--archive x.zip")
    assert "Duplicate images: none" in capsys.readouterr().out
    # ceil(.1 * 81) = 9 validation images: the quotas 1.22, 1.33, 1.44, 1.56, 1.67, 1.78 rounded
    # down make 6, and the 3 others go to the largest remainders
    assert class_counts(splits["val"]) == [1, 1, 1, 2, 2, 2]
    assert class_counts(splits["train"]) == [10, 11, 12, 12, 13, 14]
    assert class_counts(splits["test"]) == [2] * 6
    names = sorted(path for path in ENTRIES if path.startswith(TEST))
    for image, label, name in zip(*splits["test"], names):
        assert CLASSES[label] == name.split("/")[2]
        assert torch.equal(image, read_image(io.BytesIO(ENTRIES[name])))
    before = Path("x.npz").read_bytes()
    with zipfile.ZipFile("x.zip") as file:
        file.extractall("unpacked")
    prepare("--folder unpacked")
    assert Path("x.npz").read_bytes() == before


def test_the_seed_chooses_the_validation_images():
    a, b, c = (prepare(f"--archive x.zip --seed {seed}")["val"][0] for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("size", [1, 7, 10, 14034, 14039])
def test_validation_has_a_tenth_rounded_up(size):
    labels = torch.arange(size) % 6
    mask = prepare_landscapes.split_validation(labels, seed=0)
    assert mask.sum() == -(-size // 10)
    excess = torch.bincount(labels[mask], minlength=6) - torch.bincount(labels, minlength=6) / 10
    assert excess.abs().max() <= 1


def test_duplicates_are_named_and_can_be_dropped(capsys):
    entries = ENTRIES | {
        f"{TRAIN}/sea/twin.png": ENTRIES[f"{TRAIN}/sea/0.png"],
        f"{TRAIN}/mountain/two_labels.png": ENTRIES[f"{TRAIN}/glacier/0.png"],
        f"{TRAIN}/forest/leak.png": ENTRIES[f"{TEST}/forest/t0.png"],
    }
    splits = prepare("--archive x.zip", entries)
    assert class_counts(splits["train"], splits["val"]) == [11, 13, 13, 15, 16, 16]
    pair = "train/glacier/0.png = train/mountain/two_labels.png"
    assert capsys.readouterr().out.splitlines()[:4] == [
        "  in training and test: train/forest/leak.png = test/forest/t0.png",
        f"  in one split, under two labels: {pair}",
        "  in one split: train/sea/0.png = train/sea/twin.png",
        "Duplicate images: 1 in training and test; 1 in one split, under two labels; "
        "1 in one split",
    ]
    splits = prepare("--archive x.zip --drop_duplicates", entries)
    assert class_counts(splits["train"], splits["val"]) == [11, 12, 12, 14, 15, 16]
    assert class_counts(splits["test"]) == [2] * 6


def test_broken_images_are_named_and_left_out(capsys):
    cut = ENTRIES[f"{TEST}/sea/t0.png"][:300]
    broken = {f"{TRAIN}/sea/0.png": b"not an image", f"{TEST}/sea/t0.png": cut}
    splits = prepare("--archive x.zip", ENTRIES | broken)
    assert class_counts(splits["test"]) == [2, 2, 2, 2, 1, 2]
    assert class_counts(splits["train"], splits["val"]) == [11, 12, 13, 14, 14, 16]
    assert capsys.readouterr().out.splitlines()[:3] == [
        "  broken, left out: test/sea/t0.png",
        "  broken, left out: train/sea/0.png",
        "2 broken images left out",
    ]


def with_entry(name, content=b"", change=bytes, **attributes):
    """Write an archive that has one more entry; attributes: of its ZipInfo; change: its bytes."""
    entry = zipfile.ZipInfo(name)
    for attribute, value in attributes.items():
        setattr(entry, attribute, value)

    def write(path):
        write_zip(path, ENTRIES | {entry: content})
        path.write_bytes(change(path.read_bytes()))

    return write


NAME, LINK_MODE = f"{TRAIN}/sea/x.png", (stat.S_IFLNK | 0o777) << 16
NO_CLASS = "in no folder of a class: buildings, forest, glacier, mountain, sea, street"
SIX = "expected in seg_train/<class>/, <class> being buildings, forest, glacier, mountain, sea, st"
BROKEN_SEA = {k: b"?" if "seg_train/sea/" in k else content for k, content in ENTRIES.items()}
EQUAL_IMAGES = dict.fromkeys(ENTRIES, png(1))


def without(part):
    """ENTRIES but for those with this part in their name."""
    return {name: content for name, content in ENTRIES.items() if part not in name}


BAD_ARCHIVES = {
    "a parent path": (with_entry("seg_train/../../sea/x.png"), "points outside"),
    "a parent path, backslashes": (with_entry("seg_train\\..\\..\\x.png"), "points outside"),
    "an absolute path": (with_entry("/seg_train/sea/x.png"), "points outside"),
    "a drive": (with_entry("C:/seg_train/sea/x.png"), "points outside"),
    "a link": (with_entry(NAME, b"/etc/passwd", external_attr=LINK_MODE), "is a link"),
    "a huge entry": (with_entry(NAME, bytes(65 * 2**20)), "unpacks to 65 MiB"),
    "a later zip version": (with_entry(NAME, extract_version=99), "not a readable zip"),
    "no UTF-8": (
        with_entry("é", change=lambda b: b.replace(b"\xa9", b"\xff")),
        "not a readable zip",
    ),
    "cut": (with_entry("x", change=lambda b: b[:-2000]), "not a readable zip"),
    "text": (lambda path: path.write_text("hello"), "not a readable zip"),
    "no images": (lambda path: write_zip(path, {"a.txt": b""}), "no train images of buildings"),
    "a missing class": (lambda path: write_zip(path, without("seg_train/sea/")), f"sea; {SIX}"),
    "a missing test class": (lambda path: write_zip(path, without("seg_test/sea/")), "no test im"),
    "a misnamed class": (with_entry(f"{TEST}/seas/x.png"), f"seas/x.png: {NO_CLASS}"),
    "an image in no class": (with_entry(f"{TRAIN}/x.JPG"), f"x.JPG: {NO_CLASS}"),
    "a class of broken images": (lambda path: write_zip(path, BROKEN_SEA), f"sea; {SIX}"),
    "equal images": (lambda path: write_zip(path, EQUAL_IMAGES), "too few training images"),
}


@pytest.mark.parametrize(("write", "message"), **table(BAD_ARCHIVES))
def test_bad_archives_are_refused_as_a_whole(fails, write, message):
    write(Path("x.zip"))
    Path("x.npz").write_text("earlier")
    argv = ["--archive", "x.zip", "--output", "x.npz", "--drop_duplicates"]
    assert message in fails(prepare_landscapes.main, argv)
    assert Path("x.npz").read_text() == "earlier"


OTHER_FOLDERS = {
    "no folder repeated": lambda name: name.replace("seg_train/seg_train", "seg_train"),
    "a folder above": lambda name: f"photographs of 2018/{name}",
    "capital letters": lambda name: name.replace("seg_", "Seg_").replace("sea", "Sea"),
    "folders inside those of classes": lambda name: re.sub("sea/(?=1)", "sea/from Kaggle/", name),
}


@pytest.mark.parametrize("rename", **table(OTHER_FOLDERS))
def test_folders_of_other_names_and_depths(rename):
    counts = [class_counts(split) for split in prepare("--archive x.zip").values()]
    entries = {rename(name): content for name, content in ENTRIES.items()}
    assert entries.keys() != ENTRIES.keys()
    assert [class_counts(split) for split in prepare("--archive x.zip", entries).values()] == counts


def test_hidden_files_and_other_formats_are_not_prepared(capsys):
    before = [class_counts(split) for split in prepare("--archive x.zip").values()]
    hidden = f"{TRAIN}/sea/._0.png", f"__MACOSX/{TRAIN}/seas/0.png", f"{TRAIN}/.tmp/x.png"
    other = f"{TRAIN}/sea/1.HEIC", f"{TEST}/sea/1.heic", f"{TEST}/sea/1.dng"
    entries = ENTRIES | dict.fromkeys((*hidden, *other), b"?")
    assert [class_counts(split) for split in prepare("--archive x.zip", entries).values()] == before
    out, err = capsys.readouterr()
    assert "broken" not in out
    assert "skipping 1 .dng, 2 .heic, formats that are not read here" in err


def test_an_entry_without_a_name_is_ignored():
    before = prepare("--archive x.zip")
    with_entry("name", change=lambda b: b.replace(b"name", bytes(4)))(Path("x.zip"))
    prepare_landscapes.main(["--archive", "x.zip", "--output", "x.npz"])
    after = utils.load_landscapes(Path("x.npz")).splits
    assert all(torch.equal(a, b) for s in SPLITS for a, b in zip(before[s], after[s]))


def test_real_photographs(real_data, capsys):
    splits = prepare(f"--archive {real_data / 'intel_scenes_48px.zip'}")
    assert [len(splits[split][1]) for split in SPLITS] == [12635, 1404, 3000]
    assert class_counts(splits["test"]) == [437, 474, 553, 525, 510, 501]
    counts = "10 in one split, under two labels; 3 in training and test, under two labels; "
    assert f"Duplicate images: {counts}5 in one split" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------
# shipped networks

WEIGHTS = {"weight": torch.tensor([0.1, 3]), "count": torch.tensor(7)}
HALVES = {"weight": torch.tensor([0.1, 3]).half(), "count": torch.tensor(7)}
NETWORKS = {  # (weights of a checkpoint, those of the file to ship)
    "question 2": ({"model": WEIGHTS}, {"model": HALVES}),
    "question 3": (
        {"model": {"last": WEIGHTS["weight"]}, "best": WEIGHTS},
        {"model": {}, "best": HALVES},
    ),
}


@pytest.mark.parametrize(("weights", "expected"), **table(NETWORKS))
def test_a_shipped_network_has_its_weights_in_half_precision(weights, expected):
    optimizer = {"state": {0: torch.ones(9)}}
    save_checkpoint(Path("x.pt"), **weights, optimizer=optimizer, symbols=["a"])
    ship.main(["x.pt", "small/y.pt"])
    before, after = (utils.load_checkpoint(Path(name)) for name in ("x.pt", "small/y.pt"))
    assert after.keys() == before.keys()
    for part, content in after.items():
        if part in expected:
            assert content.keys() == expected[part].keys()
            for name, weight in content.items():
                assert weight.dtype == expected[part][name].dtype
                assert torch.equal(weight, expected[part][name])
        else:
            assert content == ({} if part == "optimizer" else before[part])


def test_weights_beyond_half_precision_are_not_shipped(fails):
    save_checkpoint(Path("x.pt"), model={"weight": torch.tensor(1e5)})
    assert "not finite in half precision" in fails(ship.main, ["x.pt", "y.pt"])
    assert not Path("y.pt").exists()


# ----------------------------------------------------------------------------------------------
# preparing pronunciations

SIZES = "--train 40 --valid 7 --test 9"
LIST = f"--tsv list.tsv {SIZES}"


def write_list(path):
    """60 spellings, every third of them with two pronunciations."""
    lines = [f"word{i}\tw ɜ {i}\n" + f"word{i}\tw ɚ {i}\n" * (i % 3 == 0) for i in range(60)]
    path.write_bytes("".join(lines).encode())


def prepare_words(output_dir, argv):
    """The splits that `argv` makes of list.tsv."""
    write_list(Path("list.tsv"))
    prepare_pronunciations.main([*argv.split(), "--output_dir", output_dir])
    return utils.load_pronunciations(Path(output_dir))


def assert_split(data, *sizes):
    """The splits have these sizes, and no spelling occurs in two of them."""
    assert [len(data.splits[split]) for split in SPLITS] == list(sizes)
    spellings = [{word for _, word in data.splits[split]} for split in SPLITS]
    assert len(set.union(*spellings)) == sum(map(len, spellings))


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def read_list(content, argv=""):
    """What a list is read as: 'spelling: phonemes' of each pair."""
    content = content if isinstance(content, bytes) else content.encode()
    Path("list.tsv").write_bytes(content)
    command = f"--tsv list.tsv --output_dir out --train all --valid 1 --test 1 {argv}"
    prepare_pronunciations.main(command.split())
    pairs = [pair for split in SPLITS for pair in utils.load_pronunciations("out").splits[split]]
    return sorted(f"{spelling}: {' '.join(phonemes)}" for phonemes, spelling in pairs)


PLAIN = "cat\tk æ t\ndog\td ɒ ɡ\nship\tʃ ɪ p\n"
THREE = ["cat: k æ t", "dog: d ɒ ɡ", "ship: ʃ ɪ p"]
ABLE = ["able: EY B L", "able: EY1 B AH0 L", "cat: K AE1 T", "dog: D AO1 G"]
LISTS = {
    "Windows line ends": (PLAIN.replace("\n", "\r\n"), THREE),
    "old Mac line ends": (PLAIN.replace("\n", "\r"), THREE),
    "byte order mark": ("\ufeff" + PLAIN, THREE),
    "Excel's Unicode text": (PLAIN.replace("\n", "\r\n").encode("utf-16"), THREE),
    "header": ("Word\tIPA\n" + PLAIN, THREE),
    "no header": ("word\tw ɝ d\ncat\tk æ t\ndog\td ɒ ɡ\n", ["word: w ɝ d", *THREE[:2]]),
    "comments and blank lines": (f";;; a\n# b\tc\n\n{PLAIN}\n \n", THREE),
    "quoted": ("\n".join(f'"{a}"\t"{b}"' for a, b in map(str.split, ["a b", "c d", 'e""f g'])),
               ["a: b", "c: d", 'e"f: g']),
    "quotation marks in words": ('"n\ta\n5"\tb c\nd\t"e f\n', ['"n: a', '5": b c', 'd: "e f']),
    "commas": ('spelling,phones\ncat,k æ t\n"dog","d ɒ ɡ"\n"a, b",c\n', ["a, b: c", *THREE[:2]]),
    "semicolons": (PLAIN.replace("\t", ";"), THREE),
    "empty cells": (PLAIN.replace("\n", "\t\t\n"), THREE),
    "columns swapped": ("k æ t\tcat\nd ɒ ɡ\tdog\nʃ ɪ p\tship\nə\ta\n", ["a: ə", *THREE]),
    "variants": (PLAIN + "the\tð ə, ð i\n", [*THREE, "the: ð i", "the: ð ə"]),
    "slashes, segmented": (PLAIN + "the\t/ð ə/,/ð i/\n", [*THREE, "the: ð i", "the: ð ə"]),
    "CMUdict, 1998": (
        ";;; a\nable  EY1 B AH0 L\nable(1)  EY B L\ncat  K AE1 T\ndog  D AO1 G\n", ABLE),
    "CMUdict, today": (
        "able EY1 B AH0 L # a, b\nable(2) EY B L\ncat K AE1 T\ndog D AO1 G\n", ABLE),
    "Anki": ("#separator:tab\n#html:false\n" + PLAIN, THREE),
    "capitals, digits, signs": (
        "DON'T\td ə\n3-D\tθ ɹ\n👩\u200d👧\tm æ\n", ["3-D: θ ɹ", "DON'T: d ə", "👩\u200d👧: m æ"]),
    "words of several words": (
        "a b\tk æ\nc d e\td ɒ\nf g\tʃ ɪ\n", ["a b: k æ", "c d e: d ɒ", "f g: ʃ ɪ"]),
    "right to left": (
        "כלב\tk e\nقط\tq i\nآی\u200cها\tɒ j\n", ["כלב: k e", "آی\u200cها: ɒ j", "قط: q i"]),
    "Jamo": ("\u1100\u1161\tk a\n나\tn a\n다\tt a\n", ["가: k a", "나: n a", "다: t a"]),
    "one syllable a token": (
        "你好\tni3 hao3\n你\tni3\n好\thao3\n", ["你: ni3", "你好: ni3 hao3", "好: hao3"]),
}  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), **table(LISTS))
def test_lists_as_people_have_them(content, expected):
    assert read_list(content) == sorted(expected)


WHOLE = {  # one pronunciation, not separated into phonemes
    "stress and syllables": ("/ˌa.ˈbaʊt/", ["a b a ʊ t"]),
    "diacritics": ("t͡ʃʰiːn̩ɐ̃", ["t͡ʃʰ iː n̩ ɐ̃"]),
    "tones": ("[ma˧˥]", ["m a ˧˥"]),
    "variants": ("/ðə/, /ði/", ["ð ə", "ð i"]),
    "variants between two slashes": ("/ðə, ði/", ["ð ə", "ð i"]),
    "variants, no comma": ("/ðə/ or [ði]", ["ð ə", "ð i"]),
    "several words": ("/ɡʊd mɔː-nɪŋ/", ["ɡ ʊ d m ɔː n ɪ ŋ"]),
    "an optional phoneme": ("/kɑː(ɹ)/", ["k ɑː ɹ"]),
    "a joiner": ("/e\u200də/", ["e ə"]),
    "one slash": ("/ðə", ["ð ə"]),
    "phonemes": ("k æ t͡ʃ", ["k æ t͡ʃ"]),
}


@pytest.mark.parametrize(("pronunciation", "expected"), **table(WHOLE))
def test_segment_separates_phonemes_as_wikipron_does(pronunciation, expected):
    pytest.importorskip("segments")
    pairs = read_list(f"x\t{pronunciation}\ny\t/kæt/\nz\t/dɒɡ/\n", "--segment")
    assert pairs == [*sorted(f"x: {e}" for e in expected), "y: k æ t", "z: d ɒ ɡ"]


def test_segment_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "segments", None)
    with pytest.raises(UserError, match="pip install segments"):
        read_list(PLAIN, "--segment")


IPA_DICT = "cat\t/kæt/\ndog\t/dɒɡ/\nan\t/ən/\n"
NOT_UTF8 = "line 1: not UTF-8; unpack it if it is packed, or save it as UTF-8 text"
ODD_LISTS = {
    "phonemes not separated": (IPA_DICT, "", "no spaces between the phonemes; --segment"),
    "syllables in slashes": ("a\t/biəw kam/\nb\t/kam/\n", "", "--segment"),
    "phrases": ("good day\tɡʊddeɪ\nice cream\taɪskɹiːm\n", "", "--segment"),
    "three columns": (PLAIN + "a\tb\tc\n", "", "line 4: expected two columns"),
    "spaces only": ("cat k æ t\ndog  d ɒ ɡ\n", "", "line 1: expected two columns"),
    "no pronunciation": (PLAIN + "a\t\n", "", "line 4: an empty field"),
    "a tie bar at the end": (PLAIN + "a\tt͡\n", "--segment", "line 4: t͡ cannot be separated"),
    "stress only": (PLAIN + "a\t/ˈ/\n", "--segment", "line 4: an empty field"),
    "HTML": (PLAIN + "a\tb<br>\n", "", "line 4: contains <br; export the list as plain text"),
    "a sound of Anki": (PLAIN + "a\t[sound:a.mp3]\n", "", "line 4: contains [sound:"),
    "a web page": ("<!DOCTYPE html>\n<html>\n", "", "line 1: expected two columns"),
    "JSON lines": ('{"word": "cat", "ipa": "/kæt/"}\n', "", "line 1: expected two columns"),
    "a character after the BOM": (PLAIN + "\ufeffa\tb\n", "", "line 4: contains U+FEFF"),
    "a mark at the end": ("\n# x\nقط\u200f\tq i\n", "", "line 3: contains U+200F RIGHT-TO-LEFT"),
    "a separator": ("cat\tk æ\u2028t\n", "--segment", "line 1: contains U+2028 LINE SEPARATOR"),
    "gzip": (gzip.compress(PLAIN.encode()), "", NOT_UTF8),
    "xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "", NOT_UTF8),
    "Latin-1": ("café\ta\n".encode("latin-1"), "", NOT_UTF8),
    "UTF-16 without a mark": (PLAIN.encode("utf-16-le"), "", "line 1: "),
    "empty": ("", "", "list.tsv: is empty"),
    "comments only": ("# cat\n\n", "", "list.tsv: has no words"),
    "one line": ("cat\tk æ t\n", "", "the list has 1, each split needs a word"),
    "one word": ("cat\tk æ t, k a t, k ə t\n", "", "the list has 3, each split needs a word"),
}


@pytest.mark.parametrize(("content", "argv", "message"), **table(ODD_LISTS))
def test_odd_lists_are_refused(content, argv, message):
    if argv:
        pytest.importorskip("segments")
    with pytest.raises(UserError) as error:
        read_list(content, argv)
    assert message in str(error.value)
    assert not Path("out").exists()


@pytest.mark.parametrize("words", [3, 7, 25, 100])
def test_the_sizes_proposed_for_a_small_list_fit(words):
    lines = [f"word{i}\tw ɜ {i}, w ɚ {i}\n" for i in range(words)]  # of each word two
    with pytest.raises(UserError, match="test needs 1000, has") as error:
        read_list("".join(lines), "--valid 1000 --test 1000")
    assert f"the list has {2 * words}, enough for --train all" in str(error.value)
    assert len(read_list("".join(lines), str(error.value).split("enough for ")[1])) == 2 * words


def test_pronunciations_are_split_by_spelling(capsys):
    data = prepare_words("a", LIST)
    assert "Wrote 40 pairs" in capsys.readouterr().out
    assert_split(data, 40, 7, 9)
    pairs = {pair for split in data.splits.values() for pair in split}
    assert len(pairs) == 56
    assert all(sound[0] == "w" and word == f"word{sound[2]}" for sound, word in pairs)
    assert prepare_words("b", LIST).fingerprint == data.fingerprint
    assert prepare_words("c", f"{LIST} --seed 1").fingerprint != data.fingerprint
    assert_split(prepare_words("d", f"{LIST} --train all"), 80 - 16, 7, 9)


def test_keep_makes_a_larger_training_set_for_the_same_test_words():
    small = prepare_words("small", LIST)
    Path("small/valid.tsv").write_text("w ɜ x\tword of another list\n", encoding="utf-8")
    large = prepare_words("large", "--tsv list.tsv --keep small --train all")
    assert_split(large, 80 - 9, 1, 9)
    assert large.splits["test"] == small.splits["test"]
    assert large.splits["val"] == [(("w", "ɜ", "x"), "word of another list")]


def test_other_words_are_replaced_only_by_request(fails):
    first = prepare_words("a", LIST).fingerprint
    line = fails(prepare_pronunciations.main, f"{LIST} --output_dir a --seed 1".split())
    assert "train.tsv: has other words; give --replace" in line
    assert prepare_words("a", LIST).fingerprint == first
    assert prepare_words("a", f"{LIST} --seed 1 --replace").fingerprint != first


@pytest.mark.parametrize("file", [1, 2, 3])
def test_a_full_disk_leaves_the_earlier_files(monkeypatch, fails, file):
    prepare_words("a", LIST)
    before, successes = contents("a"), iter(range(file - 1))

    def fsync(number):
        if next(successes, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    argv = f"{LIST} --output_dir a --seed 1 --replace".split()
    assert "cannot be written" in fails(prepare_pronunciations.main, argv)
    assert contents("a") == before


def test_real_wikipron(real_data):
    lists = real_data / "wikipron"
    for language in ("eng_latn_us", "eng_latn_uk", "por_latn_po"):
        assert_split(
            prepare_words(language, f"--tsv {lists}/{language}_broad.tsv"), 10_000, 1000, 1000
        )
    argv = f"--tsv {lists}/eng_latn_us_broad.tsv --keep {real_data}/pronunciations --train all"
    splits = prepare_words("a", argv).splits  # the assignment's share a few spellings
    assert [len(splits[split]) for split in SPLITS] == [75049, 1000, 1000]


# ----------------------------------------------------------------------------------------------
# command lines

PHOTOGRAPHS, WORDS = prepare_landscapes.main, prepare_pronunciations.main

BAD_COMMANDS = {
    "photographs, no source": (PHOTOGRAPHS, "", "required"),
    "photographs, two sources": (PHOTOGRAPHS, "--archive a --folder b", "not allowed"),
    "photographs, output folder": (PHOTOGRAPHS, "--archive a --output .", "ends in .npz"),
    "photographs, no .npz": (PHOTOGRAPHS, "--archive a --output x", "ends in .npz"),
    "words, no source": (WORDS, "", "required"),
    "words, two sources": (WORDS, "--tsv x --language y", "not allowed"),
    "words, a path as a language": (WORDS, "--language ../x", "is not a name"),
    "words, too few": (WORDS, f"{LIST} --train 400", "train needs 400, has 64"),
    "words, none remain": (WORDS, "--tsv list.tsv --test 73 --valid 7 --train all", "has 0"),
    "words, output over the list": (WORDS, "--tsv ./train.tsv", "would be overwritten"),
    "words, output in a file": (WORDS, f"{LIST} --output_dir list.tsv", "cannot be"),
    "words, sizes with --keep": (WORDS, "--tsv x --keep y --test 3", "leave out --valid"),
    "words, --keep of the output": (WORDS, "--tsv list.tsv --keep .", "its own training pairs"),
    "words, --keep of no folder": (WORDS, "--tsv list.tsv --keep x", "test.tsv: no such file"),
}


@pytest.mark.parametrize(("main", "argv", "message"), **table(BAD_COMMANDS))
def test_bad_commands_write_nothing(folder, fails, main, argv, message):
    write_list(folder / "list.tsv")
    before = contents(folder)
    output = ["--output_dir", "."] if main is WORDS else ["--output", "x.npz"]
    assert message in fails(main, [*output, *argv.split()])
    assert contents(folder) == before


# ----------------------------------------------------------------------------------------------
# downloading


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; of files called cut*, only the first half."""

    def log_message(self, *args):
        pass

    def copyfile(self, source, outputfile):
        content = source.read()
        outputfile.write(content[: len(content) // 2] if "/cut" in self.path else content)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server that has archive.zip, xyz.tsv, cut.zip and cut.tsv."""
    folder = tmp_path_factory.mktemp("server")
    for archive, words in (("archive.zip", "xyz.tsv"), ("cut.zip", "cut.tsv")):
        write_zip(folder / archive, ENTRIES)
        write_list(folder / words)
    handler = partial(Server, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_downloading_photographs(server, capsys):
    Path("intel-image-classification.zip").write_bytes(b"damaged")  # it is replaced
    downloaded = prepare(f"--download --url {server}/archive.zip")
    assert "Downloading" in capsys.readouterr().out
    assert class_counts(downloaded["val"]) == [1, 1, 1, 2, 2, 2]
    prepare("--download --url nonsense")
    assert "is already there" in capsys.readouterr().out


def test_downloading_a_list_that_does_not_exist(server, fails):
    line = fails(WORDS, f"--language abc --url {server}/{{language}}.tsv --output_dir x".split())
    assert f"{server}/abc.tsv: HTTP Error 404" in line
    assert "the names of the lists are at https://github.com/CUNY-CL/wikipron/tree/" in line


def test_zero_width_spaces_of_downloaded_lists_are_dropped():
    Path("wikipron-xyz.tsv").write_text("a\u200bb\tk\nc\td\ne\tf\n", encoding="utf-8")
    argv = "--language xyz --output_dir . --train all --valid 1 --test 1"
    WORDS(argv.split())
    splits = utils.load_pronunciations(Path()).splits.values()
    assert {spelling for pairs in splits for _, spelling in pairs} == {"ab", "c", "e"}


def test_downloading_a_list(server):
    argv = f"{SIZES} --language xyz --url"
    data = prepare_words("a", f"{argv} {server}/{{language}}.tsv")
    assert data.fingerprint == prepare_words("b", LIST).fingerprint
    assert data.fingerprint == prepare_words("a", f"{argv} nonsense").fingerprint


BAD_ADDRESSES = ("{server}/nothing.zip", "{server}/cut.zip", "{server}/cut.tsv",
                 "http://127.0.0.1:9/x.zip", "nonsense")  # fmt: skip
DOWNLOADS = {
    "photographs": (PHOTOGRAPHS, "--download --output out/x.npz --url"),
    "words": (WORDS, "--language xyz --output_dir out --url"),
}


@pytest.mark.parametrize(("main", "argv"), **table(DOWNLOADS))
@pytest.mark.parametrize("url", BAD_ADDRESSES)
def test_failed_downloads_leave_nothing(server, fails, main, argv, url):
    url = url.format(server=server)
    assert url in fails(main, [*argv.split(), url])
    assert contents("out") == {}


# ----------------------------------------------------------------------------------------------
# the built-in samples


def test_sample_landscapes():
    data = sample.draw_landscapes()
    assert (data.name, data.fingerprint) == ("sample", "da5f87688616")  # records depend on it
    for split, count in sample.IMAGE_COUNTS.items():
        assert class_counts(data.splits[split]) == [count // 6] * 6
    distinct = {image.numpy().tobytes() for images, _ in data.splits.values() for image in images}
    assert len(distinct) == sum(sample.IMAGE_COUNTS.values())


def test_sample_pronunciations():
    data = sample.choose_pronunciations()
    assert (data.name, data.fingerprint) == ("sample", "134c9cc346f3")  # records depend on it
    assert data.fingerprint != sample.choose_pronunciations(seed=1).fingerprint
    assert_split(data, *sample.PAIR_COUNTS.values())
    phonemes = {phoneme for sound, _ in data.splits["train"] for phoneme in sound}
    assert phonemes == set(sample.IPA.values())
