"""Whatever a file or a command line holds, it is taken as valid or refused with the project's one
error: `--fuzz 100000` for a long search."""

import contextlib
import io
import shutil
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

import hw2_q2
import hw2_q3
import utils
from data import prepare_landscapes, prepare_pronunciations
from tests.conftest import CONFIG
from utils import UserError

ODD_TEXT = st.text(max_size=40) | st.sampled_from(
    [
        "",
        "-",
        "--",
        "0",
        "-1",
        "nan",
        "inf",
        "1e999",
        "9" * 400,
        "\ud800",
        "\0",
        "=",
        "\u202e",
        "1 2",
    ]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def spoiled(content):
    """`content` with some bytes replaced, some cut out of it, or other bytes altogether."""
    places = st.integers(0, len(content) - 1)
    edits = st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=8)

    def replace(edits):
        result = bytearray(content)
        for place, byte in edits:
            result[place] = byte
        return bytes(result)

    cuts = st.tuples(places, places).map(lambda cut: content[: min(cut)] + content[max(cut) :])
    return edits.map(replace) | cuts | st.binary(max_size=200)


def taken_or_refused(read, *arguments):
    """read(...), or None where it raises UserError, with a message of one line."""
    try:
        return read(*arguments)
    except UserError as error:
        assert str(error)
        assert "\n" not in str(error)
        return None


# ----------------------------------------------------------------------------------------------
# data

PIXELS = np.zeros((2, 48, 48, 3), np.uint8)
NPZ = io.BytesIO()
np.savez(
    NPZ,
    **{f"{split}_images": PIXELS for split in utils.SPLITS},
    **{f"{split}_labels": np.array([0, 5]) for split in utils.SPLITS},
)
KINDS = "u1", "i8", "f2", "f4", "f8", "b1", "c8", "U3", "S2", "M8[s]"
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 48, 6912]), max_size=4).filter(
    lambda shape: np.prod(shape, dtype=float) < 10**5
)


def assert_landscapes(found):
    for images, labels in found.splits.values():
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, 48, 48)
        assert labels.dtype == torch.int64
        assert len(labels) == len(images) > 0


@given(content=spoiled(NPZ.getvalue()))
def test_spoiled_landscapes(folder, content):
    (folder / "x.npz").write_bytes(content)
    if found := taken_or_refused(utils.load_landscapes, folder / "x.npz"):
        assert_landscapes(found)


@given(
    which=st.sampled_from(["train_images", "train_labels", "test_images"]),
    shape=SHAPES,
    kind=st.sampled_from(KINDS),
    fill=st.sampled_from([0, 1, 255, -1, 6, float("nan"), float("inf")]),
)
def test_landscapes_of_any_shape_and_type(folder, which, shape, kind, fill):
    arrays = dict(np.load(io.BytesIO(NPZ.getvalue())))
    with contextlib.suppress(ValueError, OverflowError, TypeError), np.errstate(all="ignore"):
        arrays[which] = np.full(shape, fill).astype(kind)
    np.savez(folder / "x.npz", **arrays)
    if found := taken_or_refused(utils.load_landscapes, folder / "x.npz"):
        assert_landscapes(found)


def encoded(picture, ending):
    content = io.BytesIO()
    picture.save(content, ending)
    return content.getvalue()


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8))
PICTURES = [encoded(PICTURE, kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP")]


@given(content=st.sampled_from(PICTURES).flatmap(spoiled))
def test_spoiled_pictures(content):
    found = taken_or_refused(utils.read_picture, io.BytesIO(content))
    assert found is None or (found.shape == (3, 48, 48) and found.dtype == torch.uint8)


ARCHIVE = io.BytesIO()
with zipfile.ZipFile(ARCHIVE, "w", zipfile.ZIP_DEFLATED) as file:
    for split in ("train", "test"):
        for name in utils.CLASSES:
            file.writestr(f"seg_{split}/seg_{split}/{name}/1.png", PICTURES[0])


@given(content=spoiled(ARCHIVE.getvalue()))
def test_spoiled_archives(folder, content):
    (folder / "x.zip").write_bytes(content)
    argv = ["--archive", str(folder / "x.zip"), "--output", str(folder / "out.npz")]
    (folder / "out.npz").unlink(missing_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        taken_or_refused(prepare_landscapes.main, argv)
    if (folder / "out.npz").exists():
        assert_landscapes(utils.load_landscapes(folder / "out.npz"))


LINES = st.lists(
    st.tuples(st.text(max_size=12), st.sampled_from(["\t", "\t\t", " ", ""]), st.text(max_size=12))
    | st.tuples(st.just("k æ t"), st.just("\t"), st.just("cat")),
    max_size=5,
).map(lambda rows: "\n".join(map("".join, rows)).encode("utf-8", "surrogatepass"))


@given(content=LINES | st.binary(max_size=100))
def test_lists_of_words(folder, content):
    for name in ("train.tsv", "valid.tsv", "test.tsv"):
        (folder / name).write_bytes(content)
    if found := taken_or_refused(utils.load_pronunciations, folder):
        for sound, word in found.splits["train"]:
            assert sound
            assert all(sound)
            assert word == word.strip() != ""
        "\n".join(hw2_q3.audit(found)).encode()


@given(content=LINES | st.binary(max_size=100))
def test_wikipron(folder, content):
    (folder / "wiki.tsv").write_bytes(content)
    argv = f"--tsv {folder / 'wiki.tsv'} --output_dir {folder / 'split'} --valid 1 --test 1"
    shutil.rmtree(folder / "split", ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):
        taken_or_refused(prepare_pronunciations.main, [*argv.split(), "--train", "all"])
    if (folder / "split").exists():
        splits = utils.load_pronunciations(folder / "split").splits.values()
        spellings = [{word for _, word in pairs} for pairs in splits]
        assert all(spellings)
        assert sum(map(len, spellings)) == len(set.union(*spellings))


# ----------------------------------------------------------------------------------------------
# records and checkpoints

RECORD = {"config": CONFIG, "history": {"val_cer": [0.5]}, "measured": {"seconds": [1.0]}}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=5), inside),
    max_leaves=10,
)


@given(data=st.data())
def test_spoiled_records(folder, data):
    utils.save_record(folder / "r.json", RECORD)
    (folder / "r.json").write_bytes(data.draw(spoiled((folder / "r.json").read_bytes())))
    found = taken_or_refused(utils.load_record, folder / "r.json")
    assert found in (None, RECORD)  # a change in the white space is none


@given(config=JSON | st.fixed_dictionaries(dict.fromkeys(CONFIG, JSON)))
def test_records_of_anything(folder, config):
    with contextlib.suppress(UserError, UnicodeEncodeError):
        utils.save_record(folder / "any.json", {"config": config})
        found = taken_or_refused(utils.load_record, folder / "any.json")
        assert found is None or isinstance(found["config"]["data"]["name"], str)


def small_checkpoint():
    """What a small speller's checkpoint holds."""
    options = {"use_attn": True, "hidden_size": 2, "dropout": 0.1}
    vocabularies = [hw2_q3.Vocabulary([*hw2_q3.SPECIAL, *symbols]) for symbols in ("kæt", "cat")]
    model = hw2_q3.build_model(options, *vocabularies)
    weights = model.state_dict()
    return {
        "config": CONFIG | {"question": "q3", "options": options},
        "history": {"val_cer": [0.5]},
        "seconds": [1.0],
        "finished": False,
        "model": weights,
        "optimizer": torch.optim.Adam(model.parameters()).state_dict(),
        "best": weights,
        "symbols": dict(zip(("source", "target"), (v.symbols for v in vocabularies))),
    }


CONTENT, CHECKPOINT = small_checkpoint(), io.BytesIO()
torch.save(CONTENT, CHECKPOINT)


def use_checkpoint(path):
    """Read a checkpoint in every way the scripts do."""
    for mmap in (True, False):
        saved = taken_or_refused(utils.load_checkpoint, path, "cpu", mmap)
    for load in (hw2_q2.load_network, hw2_q3.load_speller):
        taken_or_refused(load, path, "cpu")
    if saved:
        run = utils.Run("x", saved["config"], checkpoint_file=path)
        model = torch.nn.Linear(2, 2)
        taken_or_refused(utils.continue_run, run, model, torch.optim.Adam(model.parameters()))
    return saved


@given(content=spoiled(CHECKPOINT.getvalue()))
def test_spoiled_checkpoints(folder, content):
    (folder / "c.pt").write_bytes(content)
    use_checkpoint(folder / "c.pt")


@given(data=st.data())
def test_checkpoints_with_another_pickle_in_them(folder, data):
    """The archive is whole, and its checksums are right."""
    with (
        zipfile.ZipFile(CHECKPOINT) as old,
        zipfile.ZipFile(folder / "p.pt", "w") as new,
    ):
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = data.draw(spoiled(content))
            new.writestr(entry, content)
    use_checkpoint(folder / "p.pt")


@given(
    name=st.sampled_from(["config", "history", "seconds", "finished", "model", "best", "symbols"]),
    value=JSON,
)
def test_checkpoints_of_anything(folder, name, value):
    torch.save(CONTENT | {name: value}, folder / "v.pt")
    use_checkpoint(folder / "v.pt")


# ----------------------------------------------------------------------------------------------
# command lines

PARSERS = {
    "q2": hw2_q2.parse_options,
    "q3": hw2_q3.parse_options,
    "landscapes": prepare_landscapes.parse_options,
    "pronunciations": prepare_pronunciations.parse_options,
}
OPTIONS = sorted({*hw2_q2.make_parser()._option_string_actions} - {"-h", "--help"})
OPTIONS += sorted({*hw2_q3.make_parser()._option_string_actions} - {"-h", "--help"})
OPTIONS += [
    "best",
    "resnet",
    "flip",
    "mirror",
    "one_cycle",
    "g2p",
    "train",
    "test",
    "spell",
]
OPTIONS += ["--archive", "--tsv", "--language", "--train", "-learning_rat", "--use-attn"]


@pytest.mark.parametrize("name", PARSERS)
@example(words=["-recipe", "best", "-seed", "1", "2", "-augment"])
@example(words=["-model", "resnet", "-recipe", "best", "-momentum", "0"])
@example(words=["--recipe", "best", "--ensemble", "--seed", "1", "2"])
@example(words=["--direction", "g2p", "--use_attn", "--input_feeding", "--clip", "2"])
@example(words=["-\n"])
@example(words=["--tsv", "\ud800"])
@example(words=["-data_path", "\0"])
@given(words=st.lists(st.sampled_from(OPTIONS) | ODD_TEXT | st.integers().map(str), max_size=6))
def test_command_lines(name, words):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            options = PARSERS[name](words)
        except SystemExit as stop:
            assert stop.code == 2
            [line] = errors.getvalue().split("\n")[:-1]
            assert "error: " in line
        else:
            repeats_itself(name, options)


def repeats_itself(name, options):
    """Each run that the options of a question ask for is that of its recorded command."""
    if name == "q2":
        script, several = hw2_q2, utils.each(options, "learning_rate", "seed")
    elif name == "q3":
        script, several = hw2_q3, [*hw2_q3.members(options), *[options] * options.ensemble]
    else:
        return
    for one in several:
        chosen = script.run_options(one)
        words = script.command(chosen).split()[2:]
        assert script.run_options(script.parse_options(words)) == chosen
