"""Full disks, folders that cannot be written, memory that is short, damaged and hostile files: one
clear line, status 2, and what was there before stays."""

import errno
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hw2_q2
import hw2_q3
import utils
from data import prepare_landscapes, prepare_pronunciations
from tests.conftest import CONFIG, save_checkpoint
from utils import UserError

resource = pytest.importorskip("resource", reason="limits as POSIX has them")


@pytest.fixture
def scripts(landscapes_path, tmp_path):
    """{question: (main, arguments of a small run)}."""
    words = tmp_path / "words"
    words.mkdir()
    for name in ("train", "valid", "test"):
        text = "k æ t\tcat\nd ɔ ɡ\tdog\nk ʌ p\tcup\n"
        (words / f"{name}.tsv").write_text(text, encoding="utf-8")
    q2 = f"-epochs 2 -threads 1 -data_path {landscapes_path} -output_dir {tmp_path / 'out'}"
    q3 = f"--use_attn --n_epochs 2 --hidden_size 8 --threads 1 --data_dir {words}"
    return {
        "q2": (hw2_q2.main, q2.split()),
        "q3": (hw2_q3.main, [*q3.split(), "--output_dir", str(tmp_path / "out")]),
    }


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


QUESTIONS = {"q2": "-", "q3": "--"}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_full_disk(scripts, question, tmp_path, fails):
    """No file may grow beyond 2,000 bytes: the checkpoint of the first epoch fails."""
    main, argv = scripts[question]
    main(argv)
    before = contents(tmp_path / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        line = fails(main, [*argv, f"{QUESTIONS[question]}restart"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written" in line
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EIO])
def test_a_folder_that_cannot_be_written(scripts, question, code, monkeypatch, tmp_path, fails):
    main, argv = scripts[question]

    def fail(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", fail)
    line = fails(main, argv)
    assert "cannot be written" in line
    assert os.strerror(code) in line
    assert not [path for path in contents(tmp_path / "out") if path.suffix != ".lock"]


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_file_where_the_folder_should_be(scripts, question, tmp_path, fails):
    main, argv = scripts[question]
    (tmp_path / "out").write_text("mine")
    assert "cannot be written" in fails(main, argv)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_figure_that_cannot_be_written(scripts, tmp_path, fails, capsys):
    """The record and the checkpoint are safe; the same command goes on at the end."""
    main, argv = scripts["q2"]
    main(argv)
    (figure,) = tmp_path.glob("out/figures/q2-*/confusion-matrix.png")
    figure.unlink()
    figure.mkdir()
    assert "confusion-matrix.png: cannot be written" in fails(main, argv)
    (record,) = tmp_path.glob("out/figures/runs/*")
    assert "final" in utils.load_record(record)
    figure.rmdir()
    main(argv)
    assert "Going on after epoch 2" in capsys.readouterr().out
    assert figure.is_file()


@pytest.mark.parametrize("question", QUESTIONS)
def test_memory_that_is_short(scripts, question, monkeypatch, fails):
    """An allocation that no machine can make, in place of a step on too large a batch."""
    main, argv = scripts[question]
    script = {"q2": hw2_q2, "q3": hw2_q3}[question]
    monkeypatch.setattr(script, "make_step", lambda *_: lambda *_: torch.empty(2**50))
    assert "out of memory; a smaller batch size" in fails(main, argv)


def test_other_errors_of_torch_are_not_hidden():
    def main():
        raise RuntimeError("mat1 and mat2 must have the same memory format")

    with pytest.raises(RuntimeError, match="mat1"):
        utils.run_script(main)


def test_a_run_has_one_process(scripts, tmp_path, fails):
    main, argv = scripts["q3"]
    main(argv)
    (checkpoint,) = tmp_path.glob("out/checkpoints/*.pt")
    with utils.only_here(utils.Run("x", {}, tmp_path, checkpoint)):
        assert "another process is training this run" in fails(main, argv)
    main(argv)


def test_checkpoints_of_other_runs_and_networks(scripts, tmp_path, fails):
    """Unfinished ones under the run's name: of other options, another recipe, another network."""
    main, argv = scripts["q3"]
    main(argv)
    (path,) = tmp_path.glob("out/checkpoints/*.pt")
    saved = utils.load_checkpoint(path) | {"finished": False}
    config = saved["config"]
    others = {
        "belongs to another run": [
            {"config": config | {"options": config["options"] | {"lr": 0.1}}},
            {"config": config | {"recipe": config["recipe"] - 1}},
            {"config": config | {"data": config["data"] | {"fingerprint": "0" * 12}}},
        ],
        "of another network": [
            {"model": {}},
            {"model": saved["model"] | {"decoder.cell.bias_ih": torch.zeros(3)}},
            {"optimizer": {}},
            {"optimizer": {"state": {}, "param_groups": []}},
        ],
    }
    for message, changes in others.items():
        for change in changes:
            utils.save_checkpoint(path, **saved | change)
            before = path.read_bytes()
            line = fails(main, argv)
            assert message in line
            assert path.name in line
            assert path.read_bytes() == before


def test_optimizers_that_would_write_beyond_their_tensors(scripts, tmp_path, fails):
    """torch loads such states without a look, and its fast steps corrupt the memory."""
    main, argv = scripts["q3"]
    main(argv)
    (path,) = tmp_path.glob("out/checkpoints/*.pt")
    saved = utils.load_checkpoint(path) | {"finished": False}
    state, [group] = saved["optimizer"]["state"], saved["optimizer"]["param_groups"]
    spoiled = [
        {"state": state | {1: state[1] | {"exp_avg": torch.zeros(3)}}},
        {"state": state | {1: state[1] | {"exp_avg": torch.zeros(())}}},
        {"state": state | {1: state[1] | {"another": torch.zeros(())}}},
        {"state": state | {1: {k: v for k, v in state[1].items() if k != "exp_avg"}}},
        {"state": state | {99: state[1]}},
        {"param_groups": [group | {"lr": "much"}]},
        {"param_groups": [{k: v for k, v in group.items() if k != "betas"}]},
        {"param_groups": []},
    ]
    for change in spoiled:
        utils.save_checkpoint(path, **saved | {"optimizer": saved["optimizer"] | change})
        assert "of another network" in fails(main, argv)


def test_a_lost_record_costs_no_training(scripts, tmp_path, capsys):
    main, argv = scripts["q2"]
    main(argv)
    (path,) = tmp_path.glob("out/figures/runs/*")
    before = utils.load_record(path)
    path.unlink()
    capsys.readouterr()
    main(argv)
    assert "Going on after epoch 2" in capsys.readouterr().out
    assert utils.load_record(path)["final"] == before["final"]


def test_a_record_that_cannot_be_read_just_now_is_not_set_aside(tmp_path, monkeypatch):
    utils.save_record(tmp_path / "r.json", {"config": CONFIG})

    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "read_bytes", fail)
        with pytest.raises(UserError, match="cannot be read"):
            utils.read_or_set_aside(tmp_path / "r.json")
    assert utils.read_or_set_aside(tmp_path / "r.json") == {"config": CONFIG}


def test_checkpoints_that_are_none_are_passed_over(scripts, tmp_path, capsys):
    """By the choice of the best, and refused where they are asked for by name."""
    main, argv = scripts["q3"]
    main(argv)
    (path,) = tmp_path.glob("out/checkpoints/*.pt")
    saved, config = utils.load_checkpoint(path), utils.load_checkpoint(path)["config"]
    changes = {
        "columns": {"history": {}},
        "words": {"seconds": ["x", "y"]},
        "options": {"config": config | {"options": config["options"] | {"layers": 2**70}}},
        "symbols": {"symbols": {"source": [1, 2], "target": []}},
        "bytes": {},
    }
    for name, change in changes.items():
        odd = path.with_name(f"q3-{name}.pt")
        utils.save_checkpoint(odd, **saved | change)
        if name == "bytes":
            odd.write_bytes(b"PK")
        else:
            with pytest.raises(UserError, match=name):
                hw2_q3.load_speller(odd, "cpu")
        if name in ("options", "symbols"):
            odd.unlink()  # their scores are as good as the others'
    capsys.readouterr()
    main(["spell", "k æ t", "--output_dir", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert out.startswith("k æ t\t")
    assert err.count("is passed over") == 3
    assert f"Model: {path}" in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, as Linux has it")
def test_output_to_a_full_disk():
    """As `python hw2_q2.py -count_params > /dev/full`."""
    command = [sys.executable, "hw2_q2.py", "-count_params"]
    with open("/dev/full", "w") as full:
        pipes = {"stdout": full, "stderr": subprocess.PIPE, "text": True}
        done = subprocess.run(command, cwd=utils.ROOT, **pipes)
    assert done.returncode == 2
    assert re.fullmatch(r"hw2_q2.py: error: .*No space left on device\n", done.stderr)


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_standard_streams_that_are_closed(monkeypatch, name):
    monkeypatch.setattr(sys, name, None)
    seen = []
    utils.run_script(lambda: seen.append([*sys.stdin] if name == "stdin" else print("x")))
    assert len(seen) == 1


def test_messages_are_one_line_that_no_terminal_obeys():
    text = str(UserError("a\nb \x1b[31m \u202e" + "c" * 1000))
    assert text.isprintable()
    assert len(text) == 500
    assert text.startswith(r"a\nb \x1b[31m \u202e")


def test_symbols_that_look_like_mathematics(scripts, tmp_path):
    """matplotlib would read what stands between two dollar signs, and fail."""
    main, argv = scripts["q3"]
    (tmp_path / "words" / "test.tsv").write_text("k $\\bad$ t\tc$\\a$t\n", encoding="utf-8")
    main(argv)
    assert list(tmp_path.glob("out/figures/q3-*/attention.png"))


def test_flipped_bits(scripts, tmp_path, fails):
    """In a checkpoint's weights, where torch itself sees nothing, and in a record's digits."""
    main, argv = scripts["q3"]
    main(argv)
    (checkpoint,) = tmp_path.glob("out/checkpoints/*.pt")
    content = bytearray(checkpoint.read_bytes())
    with zipfile.ZipFile(checkpoint) as file:
        entry = max(file.infolist(), key=lambda entry: entry.file_size)
    content[entry.header_offset + entry.file_size // 2] ^= 1
    checkpoint.write_bytes(content)
    assert "wrong checksum" in fails(main, ["test", *argv])

    (path,) = tmp_path.glob("out/figures/runs/*")
    text = path.read_text()
    path.write_text(re.sub(r"0\.(\d)", lambda m: f"0.{9 - int(m[1])}", text, count=1))
    with pytest.raises(UserError, match="damaged, or changed by hand"):
        utils.load_record(path)


# ----------------------------------------------------------------------------------------------
# hostile files


def test_a_file_that_unpacks_to_too_much(tmp_path, landscapes_path):
    """Its directory says 5 GiB; nothing of it is read."""
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(landscapes_path) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
        new.filelist[0].file_size = 5 * 2**30
    with pytest.raises(UserError, match=r"unpacks to 5\.0 GiB"):
        utils.load_landscapes(path)


def test_an_array_that_claims_to_be_huge(tmp_path, arrays):
    header = io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": (10**12, 48, 48, 3)}
    np.lib.format.write_array_header_1_0(header, description)
    np.savez(tmp_path / "x.npz", **{k: v for k, v in arrays.items() if k != "train_images"})
    with zipfile.ZipFile(tmp_path / "x.npz", "a") as file:
        file.writestr("train_images.npy", header.getvalue())
    with pytest.raises(UserError, match=r"not a readable \.npz"):
        utils.load_landscapes(tmp_path / "x.npz")


def test_a_compressed_checkpoint_is_refused(tmp_path):
    """torch writes none; small ones could unpack to any size."""
    save_checkpoint(tmp_path / "c.pt", model={"w": torch.zeros(10**5)}, config=CONFIG)
    with (
        zipfile.ZipFile(tmp_path / "c.pt") as old,
        zipfile.ZipFile(tmp_path / "d.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(UserError, match="compressed"):
        utils.load_checkpoint(tmp_path / "d.pt")


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_pictures_of_absurd_dimensions(tmp_path, side):
    """100 and 400 million pixels, in a few kilobytes."""
    Image.new("1", (side, side)).save(tmp_path / "x.png")
    with pytest.raises(UserError, match="decompression bomb"):
        utils.read_picture(tmp_path / "x.png")


def test_sixteen_bits_keep_their_shades(tmp_path):
    shades = np.linspace(0, 65535, 48 * 48).astype(np.uint16).reshape(48, 48)
    Image.fromarray(shades).save(tmp_path / "x.png")
    found = utils.read_picture(tmp_path / "x.png")
    assert torch.equal(found[0], torch.from_numpy((shades // 257).astype(np.uint8)))


def test_of_an_animation_the_first_picture(tmp_path):
    frames = [Image.new("RGB", (48, 48), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert utils.read_picture(tmp_path / "x.gif")[:, 5, 5].tolist() == [255, 0, 0]


def test_words_of_megabytes(tmp_path, scripts):
    for text in ("k " * 10**6 + "\tcat", "k æ t\t" + "t" * 10**6):
        (tmp_path / "x.tsv").write_text(f"k æ t\tcat\n{text}\n", encoding="utf-8")
        with pytest.raises(UserError, match="line 2: a field of more than 1,000 characters"):
            utils.read_tsv(tmp_path / "x.tsv")
    main, argv = scripts["q3"]
    main(argv)
    with pytest.raises(UserError, match="a word of more than 1,000 characters"):
        main(["spell", "k " * 1001, "--output_dir", str(tmp_path / "out")])


# ----------------------------------------------------------------------------------------------
# command lines

WRONG = "-1", "nan", "inf", "1e400", "-1e400", "9" * 30, "0x10", "many", "1 2", " "
OPTIONS = [  # that take a number or a name: (main, name)
    (script.main, action.option_strings[0])
    for script in (hw2_q2, hw2_q3)
    for action in script.make_parser()._actions
    if action.option_strings and (action.choices or action.type not in (None, Path))
]
OPTIONS += [(prepare_pronunciations.main, name) for name in ("--train", "--valid", "--test")]
OPTIONS += [(main, "--seed") for main in (prepare_landscapes.main, prepare_pronunciations.main)]


@pytest.mark.parametrize(("main", "name"), OPTIONS)
def test_every_wrong_value_is_refused_by_name_with_what_is_right(main, name, fails):
    for value in WRONG:
        line = fails(main, [name, value])
        assert f"argument {name}: " in line
        assert re.search(r"is not a (whole )?number in [\[(].+, .+[\])]|choose from", line)


def test_the_readme_says_how_long_the_long_runs_were():
    text = (utils.ROOT / "README.md").read_text(encoding="utf-8")
    long_runs = json.loads((utils.ROOT / "figures" / "long_runs.json").read_text())
    kills, first, again = (run["tests"] for run in long_runs["runs"])
    assert all(test["passed"] for test in kills.values())
    assert f"| {sum(test['kills'] for test in kills.values())} kills |" in text
    fuzzed = first | again  # as mended
    assert all(test["passing"] == 100_000 and not test["failing"] for test in fuzzed.values())
    assert f"| {len(fuzzed)} x 100,000 inputs |" in text
    assert f"-k wrong_value` | {len(OPTIONS) * len(WRONG)} wrong values |" in text
    for run in long_runs["runs"]:
        assert run["commit"] in text


HALF = pytest.param("\ud800", marks=pytest.mark.skipif(os.name == "nt", reason="a name there"))


@pytest.mark.parametrize("word", [HALF, "a\0b"])
@pytest.mark.parametrize(
    ("main", "name"),
    [
        (hw2_q2.main, "-data_path"),
        (hw2_q3.main, "--data_dir"),
        (prepare_landscapes.main, "--archive"),
        (prepare_pronunciations.main, "--tsv"),
    ],
)
def test_paths_that_no_system_has(main, name, word, fails):
    assert "has a character that no file's name can have" in fails(main, [name, word])


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (hw2_q2.main, ["-learning_rat", "0.1"]),
        (hw2_q2.main, ["-epoch=3"]),
        (hw2_q3.main, ["--use_att"]),
        (hw2_q3.main, ["--beam_siz", "5", "test"]),
    ],
)
def test_shortened_names_are_unknown(main, words, fails):
    name = words[0].partition("=")[0]
    line = fails(main, words)
    assert f"unknown argument {words[0]}; did you mean {name}" in line


@pytest.mark.parametrize("dash", ["-", "--"])
@pytest.mark.parametrize("words", ["n_seeds 2", "only x", "dry_run", "figure_format pdf"])
def test_options_of_the_report_need_it(dash, words, fails):
    main = {"-": hw2_q2.main, "--": hw2_q3.main}[dash]
    assert f"goes with {dash}report" in fails(main, f"{dash}{words}".split())


@pytest.mark.parametrize(
    ("main", "line"),
    [
        (hw2_q2.main, "-report -epochs 1"),
        (hw2_q2.main, "-report -predict x.jpg"),
        (hw2_q2.main, "-report -recipe best"),
        (hw2_q3.main, "--report --direction g2p"),
        (hw2_q3.main, "test --report"),
        (hw2_q3.main, "spell x --report"),
    ],
)
def test_the_report_trains_systems_of_its_own(main, line, fails):
    name = line.replace("report", "").strip("- ").split()[0]
    assert re.search(rf"own: it goes without -*({name}|mode)", fails(main, line.split()))
