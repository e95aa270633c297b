"""Making the data files: preparing photographs, downloading them, the built-in sample."""

import http.server
import io
import stat
import threading
import zipfile
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import utils
from data import prepare_landscapes, prepare_pronunciations, sample
from utils import CLASSES

COUNTS = {"buildings": 11, "forest": 12, "glacier": 13, "mountain": 14, "sea": 15, "street": 16}


def picture(seed, size=(60, 50)):
    """The bytes of a random picture, the same for the same seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def entries():
    """{path: bytes} of a small archive laid out as Kaggle's: 81 training, 12 test pictures."""
    found = {}
    for label, (name, count) in enumerate(COUNTS.items()):
        for i in range(count):
            found[f"seg_train/seg_train/{name}/{i}.png"] = picture(1000 * label + i)
        for i in range(2):
            found[f"seg_test/seg_test/{name}/t{i}.png"] = picture(1000 * label + 500 + i)
    found["seg_pred/seg_pred/5.jpg"] = picture(9)
    found["seg_train/seg_train/readme.txt"] = b"not a picture"
    return found


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("kaggle") / "archive.zip"
    write_zip(path, entries())
    return path


def write_zip(path, content):
    with zipfile.ZipFile(path, "w") as file:
        for name, data in content.items():
            file.writestr(name, data)


def prepare(*argv):
    prepare_landscapes.main([str(word) for word in argv])


# ----------------------------------------------------------------------------------------------
# preparing


def test_archive_and_folder_give_the_same_file(archive, tmp_path, capsys):
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "unpacked")
    prepare("--archive", archive, "--output", tmp_path / "a.npz")
    prepare("--folder", tmp_path / "unpacked", "--output", tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    loaded = utils.load_landscapes(tmp_path / "a.npz")
    # ceil(.1 * 81) = 9 validation pictures, the quotas 1.22, 1.33, 1.44, 1.56, 1.67, 1.78
    # rounded down to 6 and the 3 left given to the largest remainders
    assert torch.bincount(loaded.splits["val"][1]).tolist() == [1, 1, 1, 2, 2, 2]
    assert torch.bincount(loaded.splits["train"][1]).tolist() == [10, 11, 12, 12, 13, 14]
    assert torch.bincount(loaded.splits["test"][1]).tolist() == [2] * 6
    output = capsys.readouterr().out
    assert "no picture stands twice" in output
    assert "seg_pred" not in output


def test_pictures_keep_their_labels_and_pixels(archive, tmp_path):
    prepare("--archive", archive, "--output", tmp_path / "a.npz")
    images, labels = utils.load_landscapes(tmp_path / "a.npz").splits["test"]
    for label in range(6):
        expected = {
            utils.read_picture(io.BytesIO(picture(1000 * label + 500 + i))).numpy().tobytes()
            for i in range(2)
        }
        assert {image.numpy().tobytes() for image in images[labels == label]} == expected


def test_the_seed_chooses_the_validation_pictures(archive, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare("--archive", archive, "--output", tmp_path / f"{name}.npz", "--seed", seed)
    a, b, c = ((tmp_path / f"{name}.npz").read_bytes() for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize("size", [1, 7, 10, 14034, 14039])
def test_validation_has_a_tenth_rounded_up(size):
    labels = torch.arange(size) % 6
    mask = prepare_landscapes.split_validation(labels, seed=0)
    assert mask.sum() == -(-size // 10)
    shares = torch.bincount(labels[mask], minlength=6) - torch.bincount(labels, minlength=6) / 10
    assert shares.abs().max() <= 1


def test_audit_names_duplicates_and_can_drop_them(tmp_path, capsys):
    content = entries()
    train, test = "seg_train/seg_train", "seg_test/seg_test"
    content[f"{train}/sea/twin.png"] = content[f"{train}/sea/0.png"]
    content[f"{train}/mountain/two_labels.png"] = content[f"{train}/glacier/0.png"]
    content[f"{train}/forest/leak.png"] = content[f"{test}/forest/t0.png"]
    write_zip(tmp_path / "x.zip", content)
    prepare("--archive", tmp_path / "x.zip", "--output", tmp_path / "x.npz")
    lines = capsys.readouterr().out.splitlines()
    assert "  twice: train/sea/0.png = train/sea/twin.png" in lines
    pair = "train/glacier/0.png = train/mountain/two_labels.png"
    assert f"  twice, under two labels: {pair}" in lines
    assert "  in training and test: train/forest/leak.png = test/forest/t0.png" in lines
    assert any(line.startswith("Audit: ") and "1 twice, under" in line for line in lines)

    prepare("--archive", tmp_path / "x.zip", "--output", tmp_path / "y.npz", "--drop_duplicates")
    splits = utils.load_landscapes(tmp_path / "y.npz").splits
    left = torch.bincount(torch.cat((splits["train"][1], splits["val"][1]))).tolist()
    assert left == [11, 12, 12, 14, 15, 16]  # both of the pair under two labels are gone
    assert len(splits["test"][1]) == 12


def test_broken_pictures_are_named_counted_and_left_out(tmp_path, capsys):
    content = entries()
    content["seg_train/seg_train/sea/0.png"] = b"not a picture"
    content["seg_test/seg_test/sea/t0.png"] = content["seg_test/seg_test/sea/t0.png"][:300]
    write_zip(tmp_path / "x.zip", content)
    prepare("--archive", tmp_path / "x.zip", "--output", tmp_path / "x.npz")
    output = capsys.readouterr().out
    assert "broken, left out: train/sea/0.png" in output
    assert "broken, left out: test/sea/t0.png" in output
    assert "2 broken pictures left out" in output
    assert len(utils.load_landscapes(tmp_path / "x.npz").splits["test"][1]) == 11


def a_link(path):
    write_zip(path, entries())
    with zipfile.ZipFile(path, "a") as file:
        entry = zipfile.ZipInfo("seg_train/seg_train/sea/link.png")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(entry, "/etc/passwd")


def a_bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("seg_train/seg_train/sea/big.png", bytes(65 * 2**20))


def with_entry(name):
    return lambda path: write_zip(path, entries() | {name: picture(1)})


def patched(mark, offset, byte):
    """Write an archive with a byte of its directory changed, `offset` after the last `mark`."""

    def write(path):
        write_zip(path, entries() | {"seg_train/é.png": picture(1)})
        content = bytearray(path.read_bytes())
        place = content.rindex(mark) + offset
        content[place : place + 1] = byte
        path.write_bytes(content)

    return write


HOSTILE = {
    "a parent path": (with_entry("seg_train/../../sea/x.png"), "path"),
    "a parent path, backslashes": (with_entry("seg_train\\..\\..\\x.png"), "path"),
    "an absolute path": (with_entry("/seg_train/sea/x.png"), "path"),
    "a drive": (with_entry("C:/seg_train/sea/x.png"), "path"),
    "a link": (a_link, "is a link"),
    "an absurd size": (a_bomb, "unpacks to 65 MiB"),
    "of a later version": (patched(b"PK\x01\x02", 6, b"\x63"), "not a readable zip"),
    "a name that is no UTF-8": (patched("é".encode(), 0, b"\xff"), "not a readable zip"),
    "not a zip": (lambda path: path.write_bytes(b"hello"), "not a readable zip"),
    "empty": (lambda path: path.write_bytes(b""), "not a readable zip"),
    "missing": (lambda path: None, "not a readable zip"),
    "without pictures": (lambda path: write_zip(path, {"a.txt": b""}), "no train pictures found"),
}


@pytest.mark.parametrize(("write", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_archives_are_refused(tmp_path, fails, write, message):
    write(tmp_path / "x.zip")
    (tmp_path / "out.npz").write_text("earlier")
    argv = ["--archive", tmp_path / "x.zip", "--output", tmp_path / "out.npz"]
    assert message in fails(prepare_landscapes.main, argv)
    assert (tmp_path / "out.npz").read_text() == "earlier"


def test_truncated_archive(tmp_path, archive, fails):
    (tmp_path / "x.zip").write_bytes(archive.read_bytes()[:-2000])
    argv = ["--archive", tmp_path / "x.zip", "--output", tmp_path / "out.npz"]
    assert "not a readable zip" in fails(prepare_landscapes.main, argv)
    assert not (tmp_path / "out.npz").exists()


def test_missing_folder(tmp_path, fails):
    assert "no such folder" in fails(prepare_landscapes.main, ["--folder", tmp_path / "none"])


@pytest.mark.parametrize("argv", [[], ["--archive", "a", "--folder", "b"], ["--folders", "x"]])
def test_wrong_command_lines(argv, fails):
    fails(prepare_landscapes.main, argv)


def test_real_photographs(real_data, tmp_path, capsys):
    archive = real_data / "intel_scenes_48px.zip"
    prepare("--archive", archive, "--output", tmp_path / "real.npz")
    splits = utils.load_landscapes(tmp_path / "real.npz").splits
    assert [len(splits[split][1]) for split in utils.SPLITS] == [12635, 1404, 3000]
    assert torch.bincount(splits["test"][1]).tolist() == [437, 474, 553, 525, 510, 501]
    output = capsys.readouterr().out
    counts = "10 twice, under two labels; 3 in training and test, under two labels; 5 twice"
    assert f"Audit: {counts}" in output


# ----------------------------------------------------------------------------------------------
# downloading


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; a file called cut.zip stops in its middle."""

    def log_message(self, *args):
        pass

    def copyfile(self, source, outputfile):
        content = source.read()
        outputfile.write(content[: len(content) // 2] if "cut" in self.path else content)


@pytest.fixture
def server(archive):
    handler = partial(Server, directory=archive.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_download(server, archive, tmp_path, capsys):
    argv = "--download", "--url", f"{server}/archive.zip", "--output", tmp_path / "x.npz"
    prepare(*argv)
    prepare("--archive", archive, "--output", tmp_path / "y.npz")
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "y.npz").read_bytes()
    capsys.readouterr()
    prepare(*argv)  # does not fetch again what is there, whole
    output = capsys.readouterr().out
    assert "is there already" in output
    assert "Downloading" not in output


def test_download_replaces_a_broken_archive(server, tmp_path):
    (tmp_path / "intel-image-classification.zip").write_bytes(b"half a download")
    prepare("--download", "--url", f"{server}/archive.zip", "--output", tmp_path / "x.npz")
    assert (tmp_path / "x.npz").exists()


@pytest.mark.parametrize("page", ["nothing.zip", "cut.zip"])
def test_failed_download(server, archive, tmp_path, fails, page):
    (archive.parent / "cut.zip").write_bytes(archive.read_bytes())
    argv = ["--download", "--url", f"{server}/{page}", "--output", tmp_path / "x.npz"]
    assert page in fails(prepare_landscapes.main, argv)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x.zip", "nonsense", "nonsense://x"])
def test_bad_address(url, tmp_path, fails):
    argv = ["--download", "--url", url, "--output", tmp_path / "x.npz"]
    assert url in fails(prepare_landscapes.main, argv)
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------
# the built-in sample


def test_sample_repeats_itself_and_is_balanced():
    data = sample.draw_landscapes()
    assert data.name == "sample"
    assert data.fingerprint == sample.draw_landscapes().fingerprint
    assert data.fingerprint != sample.draw_landscapes(seed=1).fingerprint
    for split, size in sample.SAMPLE_SIZES.items():
        images, labels = data.splits[split]
        assert images.shape == (size, 3, 48, 48)
        assert images.dtype == torch.uint8
        assert torch.bincount(labels).tolist() == [size // 6] * 6
    digests = [image.numpy().tobytes() for images, _ in data.splits.values() for image in images]
    assert len(set(digests)) == sum(sample.SAMPLE_SIZES.values())


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_can_be_drawn_many_times(name):
    for seed in range(30):
        drawn = sample.draw_landscape(name, np.random.default_rng(seed))
        assert drawn.shape == (48, 48, 3)
        assert drawn.std() > 3  # something is there


def test_sample_words():
    data = sample.choose_pronunciations()
    assert data.name == "sample"
    assert data.fingerprint == sample.choose_pronunciations().fingerprint
    assert {split: len(pairs) for split, pairs in data.splits.items()} == sample.PAIRS
    spellings = [word for pairs in data.splits.values() for _, word in pairs]
    assert len(set(spellings)) == len(spellings)  # no word on two sides
    known = set(sample.IPA.values())
    assert all(set(sound) <= known for sound, _ in data.splits["train"])


@pytest.mark.parametrize(
    ("phone", "ipa"),
    [("AH0", "ə"), ("AH1", "ʌ"), ("ER0", "ɚ"), ("ER2", "ɝ"), ("IY1", "i"), ("CH", "t͡ʃ")],
)
def test_arpabet_in_ipa(phone, ipa):
    assert sample.to_ipa(phone) == ipa


# ----------------------------------------------------------------------------------------------
# preparing pronunciations


def write_wikipron(path, words=60):
    """`words` spellings, every third of them with two pronunciations."""
    lines = []
    for i in range(words):
        lines += [f"word{i}\tw ɜ {i}\n"] + [f"word{i}\tw ɚ {i}\n"] * (i % 3 == 0)
    path.write_bytes("".join(lines).encode())


def prepare_words(folder, *argv):
    sizes = ["--train", 40, "--valid", 7, "--test", 9]
    argv = [*sizes, "--output_dir", folder, *argv]
    prepare_pronunciations.main([str(word) for word in argv])
    return utils.load_pronunciations(folder)


def test_pronunciations_are_split_by_spelling(tmp_path, capsys):
    write_wikipron(tmp_path / "all.tsv")
    data = prepare_words(tmp_path / "a", "--tsv", tmp_path / "all.tsv")
    assert [len(data.splits[split]) for split in utils.SPLITS] == [40, 7, 9]
    words = [{word for _, word in data.splits[split]} for split in utils.SPLITS]
    assert not (words[0] & words[1] or words[0] & words[2] or words[1] & words[2])
    pairs = {(sound, word) for pairs in data.splits.values() for sound, word in pairs}
    assert len(pairs) == 56
    assert all(sound[0] == "w" and word == f"word{sound[2]}" for sound, word in pairs)
    again = prepare_words(tmp_path / "b", "--tsv", tmp_path / "all.tsv")
    assert again.fingerprint == data.fingerprint
    other = prepare_words(tmp_path / "c", "--tsv", tmp_path / "all.tsv", "--seed", 1)
    assert other.fingerprint != data.fingerprint
    assert "Wrote 40 pairs" in capsys.readouterr().out


def test_all_that_is_left_can_be_trained_on(tmp_path):
    write_wikipron(tmp_path / "all.tsv")
    data = prepare_words(tmp_path, "--tsv", tmp_path / "all.tsv", "--train", "all")
    assert [len(data.splits[split]) for split in utils.SPLITS] == [80 - 16, 7, 9]


def test_other_words_that_are_there_are_not_replaced_unasked(tmp_path, fails):
    write_wikipron(tmp_path / "all.tsv")
    argv = ["--tsv", tmp_path / "all.tsv"]
    first = prepare_words(tmp_path / "a", *argv).fingerprint
    assert prepare_words(tmp_path / "a", *argv).fingerprint == first  # the same again
    sizes = "--train", 40, "--valid", 7, "--test", 9, "--output_dir", tmp_path / "a"
    line = fails(prepare_pronunciations.main, [*argv, *sizes, "--seed", 1])
    assert "train.tsv: has other words; --replace" in line
    assert utils.load_pronunciations(tmp_path / "a").fingerprint == first
    assert prepare_words(tmp_path / "a", *argv, "--seed", 1, "--replace").fingerprint != first


def test_more_to_train_on_for_the_same_test_words(tmp_path):
    write_wikipron(tmp_path / "all.tsv")
    few = prepare_words(tmp_path / "few", "--tsv", tmp_path / "all.tsv")
    (tmp_path / "few" / "valid.tsv").write_text("w ɜ x\tword of another list\n")
    argv = ["--tsv", tmp_path / "all.tsv", "--keep", tmp_path / "few", "--train", "all"]
    argv += ["--output_dir", tmp_path / "more"]
    prepare_pronunciations.main(list(map(str, argv)))
    data = utils.load_pronunciations(tmp_path / "more")
    assert data.splits["test"] == few.splits["test"]
    assert data.splits["val"] == [(("w", "ɜ", "x"), "word of another list")]
    tested = {word for _, word in few.splits["test"]}
    words = {f"word{i}" for i in range(60)}
    assert {word for _, word in data.splits["train"]} == words - tested
    assert len(data.splits["train"]) == 80 - 9


def test_downloading_a_language(tmp_path):
    served = tmp_path / "served"
    served.mkdir()
    write_wikipron(served / "xyz_latn_broad.tsv")
    handler = partial(Server, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{running.server_port}/{{language}}.tsv"
        argv = ["--language", "xyz_latn_broad", "--url", url]
        data = prepare_words(tmp_path / "a", *argv)
        running.shutdown()
    assert len(data.splits["train"]) == 40
    # the list is kept, so another split needs no network
    assert prepare_words(tmp_path / "a", *argv).fingerprint == data.fingerprint


BAD_LISTS = {
    "too few words": (["--tsv", "{all}", "--train", 400], "too few pronunciations"),
    "none left": (["--tsv", "{all}", "--test", 73, "--train", "all"], "too few pronunciations"),
    "no file": (["--tsv", "none.tsv"], "no such file"),
    "no source": ([], "required"),
    "two sources": (["--tsv", "x", "--language", "y"], "not allowed"),
    "sizes of what is kept": (["--tsv", "{all}", "--keep", "x"], "neither --valid nor --test"),
    "no name": (["--language", ""], "is no name"),
    "no size": (["--tsv", "{all}", "--valid", 0], "--valid"),
    "size in words": (["--tsv", "{all}", "--train", "most"], "--train"),
    "no server": (["--language", "x", "--url", "http://127.0.0.1:9/x"], "127.0.0.1"),
}


@pytest.mark.parametrize(("argv", "message"), BAD_LISTS.values(), ids=BAD_LISTS)
def test_bad_lists_of_words(argv, message, tmp_path, fails):
    write_wikipron(tmp_path / "all.tsv")
    sizes = ["--train", 40, "--valid", 7, "--test", 9, "--output_dir", tmp_path / "out"]
    argv = [str(word).format(all=tmp_path / "all.tsv") for word in (*sizes, *argv)]
    assert message in fails(prepare_pronunciations.main, argv)
    assert not list(tmp_path.glob("out/*"))


def test_lists_that_would_overwrite_what_they_are_made_of(tmp_path, fails):
    write_wikipron(tmp_path / "train.tsv")
    before = (tmp_path / "train.tsv").read_bytes()
    argv = ["--tsv", tmp_path / "train.tsv", "--output_dir", tmp_path]
    assert "would be overwritten" in fails(prepare_pronunciations.main, argv)
    argv = ["--tsv", tmp_path / "all.tsv", "--keep", tmp_path, "--output_dir", tmp_path]
    assert "--keep needs another folder" in fails(prepare_pronunciations.main, argv)
    argv = ["--tsv", tmp_path / "train.tsv", "--keep", "none", "--output_dir", tmp_path / "x"]
    assert "test.tsv: no such file" in fails(prepare_pronunciations.main, argv)
    assert (tmp_path / "train.tsv").read_bytes() == before


def test_the_three_lists_take_their_names_together(tmp_path, monkeypatch):
    """A disk that is full at the last of them leaves the earlier ones."""
    write_wikipron(tmp_path / "all.tsv")
    prepare_words(tmp_path / "out", "--tsv", tmp_path / "all.tsv")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    real, written = utils.write_file, []

    def write_file(path, write):
        written.append(path)
        if len(written) == 3:
            raise utils.UserError("the disk is full")
        real(path, write)

    monkeypatch.setattr(utils, "write_file", write_file)
    with pytest.raises(utils.UserError, match="full"):
        prepare_words(tmp_path / "out", "--tsv", tmp_path / "all.tsv", "--seed", 1, "--replace")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("output", [".", "", "data"])
def test_photographs_need_the_name_of_a_file(output, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    argv = ["--archive", "x.zip", "--output", output]
    assert "is a folder, not the name of a file" in fails(prepare_landscapes.main, argv)


@pytest.mark.parametrize(
    "language", ["eng_latn_us_broad", "eng_latn_uk_broad", "por_latn_po_broad"]
)
def test_real_wikipron(real_data, tmp_path, language):
    tsv = real_data / "wikipron" / f"{language}.tsv"
    prepare_pronunciations.main(["--tsv", str(tsv), "--output_dir", str(tmp_path)])
    data = utils.load_pronunciations(tmp_path)
    assert [len(data.splits[split]) for split in utils.SPLITS] == [10000, 1000, 1000]
    words = [{word for _, word in data.splits[split]} for split in utils.SPLITS]
    assert not (words[0] & words[1] or words[0] & words[2] or words[1] & words[2])


def test_all_of_wikipron_beside_the_assignments_words(real_data, tmp_path):
    tsv = real_data / "wikipron" / "eng_latn_us_broad.tsv"
    kept = str(real_data / "pronunciations")
    argv = ["--tsv", str(tsv), "--train", "all", "--keep", kept, "--output_dir", str(tmp_path)]
    prepare_pronunciations.main(argv)
    data = utils.load_pronunciations(tmp_path)
    assert [len(data.splits[split]) for split in utils.SPLITS] == [75049, 1000, 1000]
