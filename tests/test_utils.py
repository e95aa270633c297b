"""Loading data, seeding, records and checkpoints, the command line, captured steps, many runs."""

import argparse
import io
import math
import pickle
import shutil
import subprocess
import sys
import time
import zipfile
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import utils
from tests.conftest import CONFIG, save_checkpoint
from utils import UserError

# ----------------------------------------------------------------------------------------------
# loading landscapes


def nchw(images):
    return images.transpose(0, 3, 1, 2)


LAYOUTS = {
    "channels last": lambda images: images,
    "channels first": nchw,
    "flattened": lambda images: images.reshape(len(images), -1),
    "floats in 0..1": lambda images: images.astype(np.float32) / 255,
    "doubles in 0..255, channels first": lambda images: nchw(images).astype(np.float64),
    "halves in 0..1, flattened": lambda images: (images / 255).astype(np.float16).reshape(-1, 6912),
    "Fortran order": np.asfortranarray,
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_gives_the_same_pictures(tmp_path, arrays, landscapes, layout):
    changed = {k: layout(v) if k.endswith("images") else v for k, v in arrays.items()}
    np.savez_compressed(tmp_path / "x.npz", **changed)
    loaded = utils.load_landscapes(tmp_path / "x.npz")
    for split in utils.SPLITS:
        images, labels = loaded.splits[split]
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert torch.equal(images, landscapes.splits[split][0])
        assert torch.equal(labels, landscapes.splits[split][1])
    assert loaded.fingerprint == landscapes.fingerprint
    assert loaded.name == "photographs"


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.int64])
def test_labels_may_be_a_column_of_any_whole_numbers(tmp_path, arrays, landscapes, kind):
    changed = {k: v[:, None].astype(kind) if k.endswith("labels") else v for k, v in arrays.items()}
    np.savez(tmp_path / "x.npz", **changed)
    assert utils.load_landscapes(tmp_path / "x.npz").fingerprint == landscapes.fingerprint


def test_fingerprint_changes_with_one_pixel_and_one_label(landscapes):
    images, labels = landscapes.splits["val"]
    for changed in ((images.clone(), labels), (images, labels.clone())):
        changed[0][3, 1, 5, 7] += changed[0] is not images
        changed[1][0] += changed[1] is not labels
        other = utils.Landscapes(landscapes.splits | {"val": changed})
        assert other.fingerprint != landscapes.fingerprint


def with_nan(images):
    images = images.astype(np.float32)
    images[0, 0, 0, 0] = math.nan
    return images


BAD_ARRAYS = {
    "no key": ("val_labels", None, "has no val_labels"),
    "pictures of 32 pixels": ("test_images", lambda a: a[:, :32, :32], "shape"),
    "grey pictures": ("train_images", lambda a: a[..., 0], "shape"),
    "no axis": ("train_images", lambda a: np.uint8(3), "shape"),
    "int64 pictures": ("train_images", lambda a: a.astype(np.int64), "type int64"),
    "pictures of strings": ("train_images", lambda a: a.astype(str), "type"),
    "NaN": ("val_images", with_nan, "nan"),
    "floats up to 256": ("val_images", lambda a: a.astype(np.float32) * 0 + 256, "256"),
    "negative floats": ("val_images", lambda a: a * -1.0, "values from"),
    "no pictures": ("val_images", lambda a: a[:0], "no pictures"),
    "label 6": ("train_labels", lambda a: a + 1, "labels 1 to 6"),
    "label -1": ("train_labels", lambda a: a - 1, "labels -1 to 4"),
    "float labels": ("train_labels", lambda a: a * 1.0, "type float64"),
    "one-hot labels": ("train_labels", lambda a: np.eye(6, dtype=int)[a], "shape"),
    "a label too few": ("test_labels", lambda a: a[:-1], "12 test_images but 11 test_labels"),
}


@pytest.mark.parametrize(("key", "change", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_bad_arrays_are_named(tmp_path, arrays, key, change, message):
    changed = {k: v for k, v in arrays.items() if change or k != key}
    if change:
        changed[key] = change(arrays[key])
    np.savez(tmp_path / "x.npz", **changed)
    with pytest.raises(UserError, match=message) as error:
        utils.load_landscapes(tmp_path / "x.npz")
    assert "x.npz" in str(error.value)
    assert key in str(error.value)


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def write_pickle(path, arrays):
    objects = np.array([Bomb(path.with_name("exploded"))], dtype=object)
    np.savez(path, **arrays | {"val_images": objects})


BAD_FILES = {
    "missing": lambda path, arrays: None,
    "empty": lambda path, arrays: path.write_bytes(b""),
    "text": lambda path, arrays: path.write_text("not an npz"),
    "a folder": lambda path, arrays: path.mkdir(),
    "one array": lambda path, arrays: np.save(path.open("wb"), arrays["val_images"]),
    "a bare pickle": lambda path, arrays: path.write_bytes(
        pickle.dumps(Bomb(path.parent / "exploded"))
    ),
    "pickled objects": write_pickle,
    "another zip": lambda path, arrays: zipfile.ZipFile(path, "w").writestr("a.txt", "hello"),
}


@pytest.mark.parametrize("write", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_named_and_never_run(tmp_path, arrays, write):
    write(tmp_path / "x.npz", arrays)
    with pytest.raises(UserError, match=r"x\.npz"):
        utils.load_landscapes(tmp_path / "x.npz")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.999])
def test_truncated_file(tmp_path, landscapes_path, share):
    content = landscapes_path.read_bytes()
    (tmp_path / "x.npz").write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"x\.npz"):
        utils.load_landscapes(tmp_path / "x.npz")


def test_flipped_byte(tmp_path, landscapes_path):
    content = bytearray(landscapes_path.read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(UserError, match="CRC"):
        utils.load_landscapes(tmp_path / "x.npz")


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK", "P", "1", "LA"])
def test_pictures_of_every_mode_and_size(tmp_path, mode):
    ending = "tiff" if mode == "CMYK" else "png"
    Image.new("RGB", (97, 33), (200, 0, 0)).convert(mode).save(tmp_path / f"x.{ending}")
    picture = utils.read_picture(tmp_path / f"x.{ending}")
    assert picture.dtype == torch.uint8
    assert picture.shape == (3, 48, 48)
    grey = mode in ("L", "LA", "1")  # a black-and-white picture is a pattern of both
    expected = [60, 60, 60] if grey else [200, 0, 0]
    assert picture.float().mean((1, 2)).tolist() == pytest.approx(expected, abs=1)


def test_formats_that_this_pillow_lacks_do_not_hinder_the_others(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.new("RGB", (48, 48)).save(path)
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    assert utils.read_picture(path).shape == (3, 48, 48)


def test_a_picture_of_floats_is_refused(tmp_path):
    Image.new("F", (60, 60), 0.5).save(tmp_path / "x.tiff")
    with pytest.raises(UserError, match="pixels are floats, of which nothing says"):
        utils.read_picture(tmp_path / "x.tiff")


def test_a_picture_taken_with_the_camera_turned(tmp_path):
    """Its file says so: left is red, and a quarter turn to the right makes that the top."""
    picture = Image.new("RGB", (96, 96), (0, 0, 255))
    picture.paste((255, 0, 0), (0, 0, 48, 96))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "x.jpg", exif=exif)
    red, _, blue = utils.read_picture(tmp_path / "x.jpg").float()
    assert red[:20].mean() > 240 > 20 > red[28:].mean()
    assert blue[28:].mean() > 240 > 20 > blue[:20].mean()


def test_small_pictures_are_read_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    assert np.array_equal(utils.read_picture(file).permute(1, 2, 0), pixels)


def test_shrinking_averages(tmp_path):
    stripes = np.zeros((480, 480, 3), np.uint8)
    stripes[:, ::2] = 255  # without antialiasing every pixel would be 0 or 255
    Image.fromarray(stripes).save(tmp_path / "x.png")
    picture = utils.read_picture(tmp_path / "x.png")
    assert picture.min() > 110
    assert picture.max() < 145


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_broken_picture(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.png: not a readable picture"):
        utils.read_picture(tmp_path / "x.png")


# ----------------------------------------------------------------------------------------------
# seeding, devices, command line


def test_seeds_repeat_and_differ_by_seed_and_epoch():
    def draw(*seed):
        utils.seed_everything(*seed)
        return tuple(torch.rand(4).tolist())

    assert draw(1, 2) == draw(1, 2)
    assert len({draw(seed, epoch) for seed in range(5) for epoch in range(5)}) == 25


@pytest.mark.parametrize("name", ["cuda:99", "abacus", "meta"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(UserError, match=name):
        utils.prepare_device(name)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", "", "nan", "inf", "11", "1e1"])
def test_numbers_out_of_range_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"a whole number in \[1, 10\]"):
        utils.number(int, 1, 10)(text)


def test_open_ends_of_ranges():
    share = utils.number(float, 0, 1, low_open=True, high_open=True)
    assert share("0.5") == 0.5
    for text in ("0", "1", "nan"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"in \(0, 1\)"):
            share(text)


def test_unknown_option_suggests_the_nearest(capsys):
    parser = utils.Parser(prog="x")
    parser.add_argument("-learning_rate")
    with pytest.raises(SystemExit):
        parser.parse_args(["-leaning_rate", "1"])
    assert "did you mean -learning_rate?" in capsys.readouterr().err


def test_interrupted_script_says_how_to_go_on(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        utils.run_script(main)
    assert stop.value.code == 130
    assert "run the same command again" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------
# run records and checkpoints


def test_names_depend_on_the_configuration_alone(tmp_path):
    config = {"options": {"lr": 0.1, "seed": 1}, "data": {"name": "a", "fingerprint": "b"}}
    run = utils.Run("q2", config)
    assert run.name == utils.Run("q2", dict(reversed(config.items())), tmp_path).name
    assert run.name != utils.Run("q2", config | {"recipe": 2}).name


def test_failed_write_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")

    def write(file):
        file.write_text("new, but only ha")
        raise OSError("No space left on device")

    with pytest.raises(UserError, match="No space left"):
        utils.write_file(path, write)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_interrupted_write_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")

    def write(file):
        file.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        utils.write_file(path, write)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_writing_where_a_file_stands_in_the_way(tmp_path):
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        utils.write_file(tmp_path / "folder" / "x", lambda file: file.write_text("x"))


@pytest.mark.parametrize(("system", "tries"), [("nt", 3), ("posix", 1)])
def test_a_move_that_is_denied_is_tried_again_on_windows(monkeypatch, system, tries):
    """There nobody can replace a file that another process reads at the moment."""
    calls = []

    def deny_twice(source, path):
        calls.append((source, path))
        if len(calls) < 3:
            raise PermissionError("busy")

    with monkeypatch.context() as patch:
        patch.setattr(utils.os, "replace", deny_twice)
        patch.setattr(utils.time, "sleep", lambda seconds: None)
        patch.setattr(utils.os, "name", system)
        error = None
        try:
            utils._replace("a", "b")
        except PermissionError as caught:
            error = caught
    assert calls == [("a", "b")] * tries
    assert (error is None) == (system == "nt")


def test_a_run_goes_on_on_another_device(tmp_path):
    """What an optimizer needs of its device, such as `capturable` on a GPU, is its own."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5, fused=True)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    run = utils.Run("x", CONFIG, tmp_path)
    utils.save_run(run, model, optimizer, {}, [])
    other = torch.optim.Adam(model.parameters(), lr=0.1, capturable=True, foreach=False)
    utils.continue_run(run, model, other)
    [group] = other.param_groups
    assert (group["lr"], group["capturable"], group["fused"]) == (0.5, True, None)
    assert other.state[model.weight]["exp_avg"].abs().sum() > 0


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_run_says_which_code_made_it(tmp_path, monkeypatch):
    def git(*words):
        who = "-c", "user.name=a", "-c", "user.email=a@b.c"
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    def commit():
        utils.commit.cache_clear()
        return utils.measured(torch.device("cpu"), [])["commit"]

    monkeypatch.setattr(utils, "ROOT", tmp_path)
    assert commit() is None
    git("init")
    assert commit() is None  # nothing is committed
    (tmp_path / "file.py").write_text("1")
    (tmp_path / "notes").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    git("tag", "-m", "a tag", "v1")
    clean = commit()
    head = tmp_path / ".git" / "refs" / "heads"
    assert next(head.iterdir()).read_text().startswith(clean) and len(clean) >= 7
    (tmp_path / "notes").write_text("2")
    assert commit() == clean  # the code is the same
    (tmp_path / "file.py").write_text("2")
    assert commit() == f"{clean}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert utils.measured(torch.device("cpu"), [])["commit"] == f"{clean}-dirty"  # still
    assert commit() is None  # no git
    utils.commit.cache_clear()


def test_record_round_trip(tmp_path):
    record = {"config": CONFIG, "history": {"loss": [0.1, 1e-300, 3.0]}, "text": "ʃ\n"}
    utils.save_record(tmp_path / "r.json", record)
    assert utils.load_record(tmp_path / "r.json") == record
    assert len((tmp_path / "r.json").read_text().splitlines()) == len(record) + 3


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1}', "[" * 10**5, "\udcff"])
def test_broken_record(tmp_path, content):
    (tmp_path / "r.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"r\.json"):
        utils.load_record(tmp_path / "r.json")


def test_checkpoint_round_trip(tmp_path):
    weights = {"w": torch.randn(3, 4), "n": torch.tensor(3)}
    save_checkpoint(tmp_path / "c.pt", config=CONFIG | {"recipe": 7}, model=weights)
    loaded = utils.load_checkpoint(tmp_path / "c.pt")
    assert loaded["config"] == CONFIG | {"recipe": 7}
    assert torch.equal(loaded["model"]["w"], weights["w"])


BAD_CHECKPOINTS = {
    "missing": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Bomb(path.parent / "exploded"))),
    "code": lambda path: torch.save(Bomb(path.parent / "exploded"), path),
    "another's": lambda path: torch.save({"state_dict": {}}, path),
    "a tensor": lambda path: torch.save(torch.ones(3), path),
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("write", BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS)
def test_bad_checkpoints_are_named_and_never_run(tmp_path, write):
    write(tmp_path / "c.pt")
    with pytest.raises(UserError, match=r"c\.pt"):
        utils.load_checkpoint(tmp_path / "c.pt")
    assert not (tmp_path / "exploded").exists()


def test_truncated_checkpoint(tmp_path):
    path = tmp_path / "c.pt"
    save_checkpoint(path, model={"w": torch.randn(1000)})
    content = path.read_bytes()
    for share in (0.1, 0.5, 0.95):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(UserError, match=r"c\.pt"):
            utils.load_checkpoint(path)


# ----------------------------------------------------------------------------------------------
# learning rates


def rates(begun, calls):
    """The rates that `calls` steps find, of 1,000, `begun` of which are past; the peak is 2."""
    weight, seen = torch.zeros(1, requires_grad=True), []
    optimizer = torch.optim.SGD([weight], lr=2.0)
    step = utils.one_cycle(
        lambda: seen.append(optimizer.param_groups[0]["lr"]), optimizer, 2.0, begun, 1000
    )
    for _ in range(calls):
        step()
    return seen


def test_one_cycle_goes_up_and_down_once():
    seen = rates(0, 1000)
    top = seen.index(max(seen))
    assert (top, max(seen)) == (300, pytest.approx(2, rel=1e-4))
    assert all(a < b for a, b in zip(seen[:300], seen[1:301]))
    assert all(a > b for a, b in zip(seen[300:], seen[301:]))
    assert seen[150] == pytest.approx(1, abs=0.01)
    assert seen[650] == pytest.approx(1, abs=0.01)
    assert 0 < seen[-1] < 1e-5
    assert 0 < seen[0] < 0.01


def test_one_cycle_goes_on_where_it_was():
    assert rates(400, 5) == rates(0, 405)[400:]


# ----------------------------------------------------------------------------------------------
# captured steps


def small_network():
    torch.manual_seed(0)
    # No bias before batch norm: its gradient is rounding noise, which Adam makes whole steps of.
    first = nn.Linear(5, 7, bias=False)
    return nn.Sequential(first, nn.BatchNorm1d(7), nn.Dropout(0.5), nn.Linear(7, 1))


def train_small(graphed, device):
    """A network trained for some steps on batches of two sizes, and its totals."""
    model = small_network().to(device)
    cuda = device == "cuda"
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, capturable=cuda)
    totals = torch.zeros(1, device=device)

    def step(x):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.add_(loss.detach())

    run = utils.GraphedStep(step, model, optimizer, totals) if graphed else step
    torch.manual_seed(1)
    for batch in torch.randn(20, 5).to(device).split(6):
        run(batch)
    return model, totals


def assert_same(first, second):
    for a, b in zip(first[0].state_dict().values(), second[0].state_dict().values()):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(first[1], second[1])


def test_rehearsals_leave_no_trace(monkeypatch):
    """All but the capture itself, which is CUDA's: buffers, rehearsals, putting back."""
    monkeypatch.setattr(utils, "record_graph", lambda step, inputs: lambda: step(*inputs))
    assert_same(train_small(True, "cpu"), train_small(False, "cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_steps_equal_plain_ones_on_cuda():
    assert_same(train_small(True, "cuda"), train_small(False, "cuda"))


# ----------------------------------------------------------------------------------------------
# loading pronunciations


def write_words(folder, **files):
    for name in ("train", "valid", "test"):
        content = files.get(name, "k æ t\tcat\n")
        content = content if isinstance(content, bytes) else content.encode()
        (folder / f"{name}.tsv").write_bytes(content)
    return folder


CAT, CAFE = (("k", "æ", "t"), "cat"), (("k", "a", "f", "e"), "caf\u00e9")

GOOD_WORDS = {
    "plain": ("k æ t\tcat\nk a f e\tcafé\n", [CAT, CAFE]),
    "no newline at the end": ("k æ t\tcat", [CAT]),
    "Windows's line ends": ("k æ t\tcat\r\nk a f e\tcafé\r\n", [CAT, CAFE]),
    "byte order mark": (b"\xef\xbb\xbf" + "k æ t\tcat\n".encode(), [CAT]),
    "decomposed accents": ("k a f e\tcafe\u0301\n", [CAFE]),
    "spaces at the ends and doubled": (" k  æ t \t cat \n", [CAT]),
    "the same word twice": ("k æ t\tcat\nk æ t\tcat\n", [CAT, CAT]),
}


@pytest.mark.parametrize(("text", "expected"), GOOD_WORDS.values(), ids=GOOD_WORDS)
def test_pronunciations_are_read(tmp_path, text, expected):
    data = utils.load_pronunciations(write_words(tmp_path, valid=text))
    assert data.splits["val"] == expected
    assert data.splits["train"] == data.splits["test"] == [CAT]
    assert data.name == "pronunciations"


BAD_WORDS = {
    "empty": ("", "is empty"),
    "a line without tab": ("k æ t\tcat\nk æ t cat\n", "line 2: 1 fields"),
    "three fields": ("k æ t\tcat\t1\n", "line 1: 3 fields"),
    "a blank line": ("k æ t\tcat\n\nk æ t\tcat\n", "line 2: 1 fields"),
    "no spelling": ("k æ t\t\n", "line 1: an empty field"),
    "no phonemes": (" \tcat\n", "line 1: an empty field"),
    "a control character": ("k æ t\tc\x07at\n", "line 1: a control character"),
    "a lone carriage return": ("k æ t\tcat\rk æ t\tcat\n", "line 1: 3 fields"),
    "hidden text": ("k æ t\tcat\nk æ t\tc\u202eat\n", "line 2: a control character"),
    "Latin-1": (
        b"k a f e\tcaf\n" + "k a f e\tcafé\n".encode("latin-1"),
        "line 2: not UTF-8",
    ),
    "a surrogate": (b"k a\t\xed\xa0\x80\n", "line 1: not UTF-8"),
}


@pytest.mark.parametrize(("content", "message"), BAD_WORDS.values(), ids=BAD_WORDS)
def test_bad_pronunciations_are_named_with_their_line(tmp_path, content, message):
    write_words(tmp_path, test=content)
    with pytest.raises(UserError, match=message) as error:
        utils.load_pronunciations(tmp_path)
    assert "test.tsv" in str(error.value)


def test_a_missing_list_of_words(tmp_path):
    (write_words(tmp_path) / "valid.tsv").unlink()
    with pytest.raises(UserError, match=r"valid\.tsv: no such file"):
        utils.load_pronunciations(tmp_path)
    (tmp_path / "valid.tsv").mkdir()
    with pytest.raises(UserError, match=r"valid\.tsv: cannot be read"):
        utils.load_pronunciations(tmp_path)


def test_fingerprint_of_words(tmp_path):
    first = utils.load_pronunciations(write_words(tmp_path)).fingerprint
    assert utils.load_pronunciations(write_words(tmp_path)).fingerprint == first
    other = utils.load_pronunciations(write_words(tmp_path, test="k æ t\tcats\n"))
    assert other.fingerprint != first


# ----------------------------------------------------------------------------------------------
# running many runs

# A script in place of a training: it does as its second word says, and its first is its record.
SCRIPT = """
import hashlib, json, os, pathlib, signal, sys, time
path, behaviour = pathlib.Path(sys.argv[1]), sys.argv[2]
with open(path.with_suffix(".started"), "a") as log:
    print(time.time(), file=log)
if behaviour == "fail":
    sys.exit("script.py: error: no luck")
if behaviour == "nothing":
    sys.exit()
if behaviour == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "wait":
    time.sleep(60)
if behaviour == "meet":  # until two are there at once
    until = time.time() + 30
    while len(list(path.parent.glob("*.started"))) < 2 and time.time() < until:
        time.sleep(0.01)
data = {"name": "photographs", "fingerprint": "0"}
config = {"question": "q2", "recipe": 1, "options": {}, "data": data}
record = {"config": config, "history": {}, "measured": {"date": time.time()}}
record |= {"diverged_in_epoch": 2} if behaviour == "diverge" else {"final": behaviour}
text = json.dumps(record, sort_keys=True)
checksum = hashlib.sha256(text.encode()).hexdigest()[:16]
path.write_text(json.dumps(record | {"checksum": checksum}))
sys.exit(2 if behaviour == "diverge" else 0)
"""


@pytest.fixture
def make_tasks(tmp_path):
    """make_tasks(behaviour, ...) -> a task for each."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "figures" / "runs").mkdir(parents=True)

    def make(*behaviours):
        runs = [utils.Run(f"run{i}", {}, tmp_path) for i in range(len(behaviours))]
        script = str(tmp_path / "script.py")
        return [utils.Task(r, (script, str(r.record), b), 3) for r, b in zip(runs, behaviours)]

    return make


def run_many(tasks, **options):
    defaults = {"jobs": None, "scheduler": None, "restart": False, "device": "cpu"}
    return utils.run_many(
        tasks,
        lambda record: f"ended: {record.get('final', 'diverged')}",
        argparse.Namespace(**defaults | options),
    )


def starts(task):
    log = task.run.record.with_suffix(".started")
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_runs_side_by_side_in_order(make_tasks, capsys):
    tasks = make_tasks("meet", "meet")
    assert [record["final"] for record in run_many(tasks, jobs=2)] == ["meet", "meet"]
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines) == sorted(f"{task.run.name}: ended: meet" for task in tasks)


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_by_default_as_many_runs_as_cores(make_tasks, monkeypatch, device):
    monkeypatch.setattr(utils, "cores", lambda: {0, 1})
    tasks = make_tasks("meet", "meet")
    run_many(tasks, device=device)
    begun = [float(task.run.record.with_suffix(".started").read_text()) for task in tasks]
    assert abs(begun[0] - begun[1]) < 20  # they met, or the first would have waited 30 seconds


def test_a_run_that_fails_takes_no_other_along(make_tasks, capsys):
    tasks = make_tasks("good", "fail", "die", "diverge", "nothing", "good")
    with pytest.raises(UserError, match="3 of 6 runs failed; the same command"):
        run_many(tasks, jobs=1)
    lines = capsys.readouterr().out.splitlines()
    ends = "ended: good", "script.py: error: no luck", "ended with status -9", "ended: diverged"
    ends += "left no record here; do the machines share this folder?", "ended: good"
    assert lines == [f"{t.run.name}: {e}" for t, e in zip(tasks, ends, strict=True)]


def test_the_next_call_does_what_is_left(make_tasks, capsys):
    with pytest.raises(UserError):
        run_many(make_tasks("good", "fail", "diverge"))
    capsys.readouterr()
    tasks = make_tasks("good", "good", "diverge")
    assert [record.get("final") for record in run_many(tasks)] == ["good", "good", None]
    assert [starts(task) for task in tasks] == [1, 2, 1]
    assert capsys.readouterr().out.count("(from its record)") == 2
    run_many(tasks, restart=True)
    assert [starts(task) for task in tasks] == [2, 3, 2]


def test_runs_begun_anew_do_not_pass_for_done(make_tasks, capsys):
    """What they were before does not hide that they failed."""
    tasks = make_tasks("good", "diverge")
    run_many(tasks)
    capsys.readouterr()
    again = make_tasks("fail", "die")
    with pytest.raises(UserError, match="2 of 2 runs failed; the same command, without restart"):
        run_many(again, restart=True)
    assert "ended: diverged" not in capsys.readouterr().out


def test_a_run_begun_anew_and_interrupted_is_not_passed_over(make_tasks):
    tasks = make_tasks("good", "diverge", "good")
    run_many(tasks)
    for task in tasks[:2]:
        unfinished = {"config": CONFIG, "history": {}, "seconds": [], "finished": False}
        utils.save_checkpoint(task.run.checkpoint, **unfinished, model={}, optimizer={})
    with pytest.raises(UserError, match="1 of 3 runs failed"):  # it leaves it unfinished again
        run_many(tasks)
    assert [starts(task) for task in tasks] == [2, 1, 1]
    utils.finish_run(tasks[0].run)
    assert utils.finished_record(tasks[0].run)["final"] == "good"


def test_a_broken_record_is_set_aside_and_its_run_repeated(make_tasks, capsys):
    [task] = make_tasks("good")
    task.run.record.write_text('{"config": {}, "final')
    assert run_many([task])[0]["final"] == "good"
    assert task.run.record.with_suffix(".broken").exists()
    assert "set aside" in capsys.readouterr().err


def test_a_record_without_scores_is_not_the_end(make_tasks):
    [task] = make_tasks("good")
    utils.save_record(task.run.record, {"config": CONFIG, "history": {}})
    assert utils.finished_record(task.run) is None
    assert run_many([task])[0]["final"] == "good"


def test_an_interrupt_ends_all_runs(make_tasks, monkeypatch):
    """Those under way are ended, those to come are not begun."""
    tasks = make_tasks("wait", "good", "wait", "wait")
    monkeypatch.setattr(utils.tqdm, "write", Mock(side_effect=KeyboardInterrupt))
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_many(tasks, jobs=2)
    assert time.monotonic() - began < 30
    assert not any(t.run.record.exists() for t in tasks if "wait" in t.arguments)
    with utils._Children() as children:
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        children.running.add(process)
    assert process.returncode is not None  # none is left behind


def test_the_bar_counts_epochs(make_tasks):
    [task] = make_tasks("good")
    assert task.epochs_done() == 0
    save_checkpoint(task.run.checkpoint, seconds=[1.0, 2.0])
    assert task.epochs_done() == 2


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense://", "127.0.0.1"])
def test_no_scheduler_there(make_tasks, monkeypatch, address):
    client = pytest.importorskip("dask.distributed").Client
    impatient = lambda address, timeout: client(address, timeout=0.2)  # noqa: E731
    monkeypatch.setattr("dask.distributed.Client", impatient)
    with pytest.raises(UserError, match="no Dask scheduler at"):
        run_many(make_tasks("good"), scheduler=address)


def test_a_cluster_of_two_workers(make_tasks, capsys):
    """Both workers have one thread, and the runs wait for each other: both take part."""
    distributed = pytest.importorskip("dask.distributed")
    how = {"n_workers": 2, "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": None}
    with distributed.LocalCluster(**how) as cluster:
        tasks = make_tasks("meet", "meet", "fail")
        with pytest.raises(UserError, match="1 of 3 runs failed"):
            run_many(tasks, scheduler=cluster.scheduler_address)
    assert [utils.finished_record(t.run)["final"] for t in tasks[:2]] == ["meet", "meet"]
    assert "no luck" in capsys.readouterr().out


def test_without_dask_the_scheduler_option_says_what_to_install(make_tasks, monkeypatch):
    monkeypatch.setitem(sys.modules, "dask.distributed", None)
    with pytest.raises(UserError, match=r'pip install "dask\[distributed\]"'):
        run_many(make_tasks("good"), scheduler="tcp://127.0.0.1:1")


def test_several_values_make_several_options():
    parser = utils.Parser()
    parser.add_argument("-x", nargs="+", type=int, action=utils.OneOrMore, default=7)
    parser.add_argument("-y", action="store_true")
    parser.add_argument("-no_z", dest="z", action="store_false")
    assert parser.parse_args([]).x == 7
    assert parser.parse_args(["-x", "3"]).x == 3
    several = parser.parse_args(["-x", "3", "4", "3", "-y", "-no_z"])
    assert several.x == [3, 4]
    assert [o.x for o in utils.each(several, "x", "y")] == [3, 4]
    assert parser.arguments(vars(several)) == ["-x", "3", "4", "-y", "-no_z"]
    assert parser.arguments({"x": 7, "y": False, "z": True}) == []
