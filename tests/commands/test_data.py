"""`poisonshield data import` and `data verify` as a user types them: what they print, write, and exit with."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from poisonshield.cli import main
from poisonshield.commands import data
from poisonshield.data.manifest import Manifest


def png(seed=0, size=(6, 5)):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def src(tmp_path):
    """A class-folder tree with two splits, 3 images of each class in each."""
    for split in ("train", "val"):
        for c in ("cat", "dog"):
            folder = tmp_path / "src" / split / c
            folder.mkdir(parents=True)
            for i in range(3):
                (folder / f"{i}.png").write_bytes(png(i, (20, 24)))
    return tmp_path / "src"


@pytest.fixture
def run(capsys, monkeypatch):
    """run(*arguments) -> (exit status, standard output, standard error)."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        with pytest.raises(SystemExit) as left:
            main([str(a) for a in arguments])
        printed = capsys.readouterr()
        return left.value.code or 0, printed.out, printed.err

    return call


def members(folder):
    """Names of all files in the shards of one data set."""
    names = []
    for shard in json.loads((folder / "manifest.json").read_text())["shards"]:
        with tarfile.open(folder / shard) as tar:
            names += tar.getnames()
    return names


def test_import_writes_a_data_set_that_verify_finds_sound(run, src, tmp_path):
    status, out, err = run("data", "import", src, "--out", tmp_path / "set")
    assert (status, err) == (0, "")
    for split in ("train", "test"):
        row = next(line for line in out.splitlines() if f"set/{split}" in line)
        assert "6" in row and "20x24" in row
        assert len(members(tmp_path / "set" / split)) == 12
    status, out, err = run("data", "verify", tmp_path / "set")
    assert (status, err) == (0, "")
    assert "set/train: 6 samples in 1 shards are sound." in out and "set/test: 6 samples in 1 shards are sound." in out


def test_options_of_import_reach_what_is_written(run, src, tmp_path):
    (tmp_path / "classes.txt").write_text("dog\n")
    options = ["--size", 16, "--jpeg-quality", 80, "--samples-per-shard", 2, "--class-list", tmp_path / "classes.txt"]
    assert run("data", "import", src, "--out", tmp_path / "set", *options)[0] == 0
    manifest = json.loads((tmp_path / "set" / "train" / "manifest.json").read_text())
    assert manifest["image_size"] == [16, 16] and manifest["classes"] == ["dog"]
    assert "JPEG of quality 80" in manifest["provenance"]
    assert [info["samples"] for info in manifest["shards"].values()] == [2, 1]
    assert sorted(members(tmp_path / "set" / "train"))[::2] == [f"train/dog/{i}.cls" for i in range(3)]
    assert sorted(members(tmp_path / "set" / "train"))[1::2] == [f"train/dog/{i}.jpg" for i in range(3)]


def test_sizes_that_differ_are_pointed_out(run, src, tmp_path):
    (src / "train" / "cat" / "0.png").write_bytes(png(0, (9, 9)))
    status, out, _ = run("data", "import", src, "--out", tmp_path / "set")
    assert status == 0 and "Image sizes differ" in out and "--size" in out


def test_broken_image_ends_import_with_its_name_and_skip_broken_goes_on(run, src, tmp_path):
    (src / "val" / "dog" / "1.png").write_bytes(png()[:60])
    status, out, err = run("data", "import", src, "--out", tmp_path / "set")
    assert status == 1 and err.startswith("DataError: 1 images cannot be decoded") and "sample val/dog/1" in err
    assert "Traceback" not in err + out and not (tmp_path / "set").exists()
    assert run("data", "import", src, "--out", tmp_path / "set", "--skip-broken")[0] == 0
    assert "val/dog/1.png" not in members(tmp_path / "set" / "test")


def test_import_says_what_was_read_left_out_and_chosen(run, src, tmp_path):
    """faults A: `--skip-broken` stood in manifest.json only; class names and counts were never shown."""
    (src / "train" / "cat" / "0.png").write_bytes(png()[:60])
    (src / "train" / "dog" / "[b]notes.txt").write_text("")
    (src / "test" / "cat").mkdir(parents=True)
    (src / "test" / "cat" / "0.png").write_bytes(png(0, (20, 24)))
    status, out, err = run("data", "import", src, "--out", tmp_path / "set", "--skip-broken")
    assert (status, err) == (0, "")
    assert out.splitlines()[:7] == [
        f"{src}: read 6 images.",
        "train: 2 classes: cat 2, dog 3.",
        "test: 2 classes: cat 1, dog 0.",
        "left out: 1 validation splits, as there is a test split (import it alone to have it): val.",
        "left out: 1 files that are no images: train/dog/[b]notes.txt.",
        "left out: 1 classes of train, without an image in test: dog.",
        "left out: 1 broken images: train/cat/0.",
    ]
    assert "train is the train split, test the test split." in out


def test_escape_sequences_of_a_manifest_reach_no_terminal(run, src, tmp_path):
    """faults C: `data verify` on a manifest with escape sequences."""
    run("data", "import", src, "--out", tmp_path / "set")
    path = tmp_path / "set" / "test" / "manifest.json"
    whole = json.loads(path.read_text())
    steer = "\x1b[2J\x9b1m\u202e"
    for changes in (
        {"poison": {"name": steer}}, {"provenance": steer}, {"classes": [steer, "b"]}, {steer: 1},
        {"shards": {f"{steer}.tar": next(iter(whole["shards"].values()))}}, {"format": steer}, {"image_size": steer},
        {"poison": {steer: steer}},
    ):  # fmt: skip
        path.write_text(json.dumps(whole | changes))
        _, out, err = run("data", "verify", tmp_path / "set" / "test")
        assert not set(steer) & set(out + err) & set("\x1b\x9b\u202e"), changes


def test_fields_of_tars_are_options(run, tmp_path):
    (tmp_path / "src").mkdir()
    with tarfile.open(tmp_path / "src" / "x.tar", "w") as tar:
        for name, content in (("0.in.png", png()), ("0.out.png", png()), ("0.json", b'{"kind": {"id": 1}}')):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    asked = ["data", "import", tmp_path / "src", "--out", tmp_path / "set"]
    status, _, err = run(*asked)
    assert status == 1 and "Say which: --image in.png" in err
    status, out, _ = run(*asked, "--image", "in.png", "--label", "json.kind.id", "--max-member-mib", 1)
    assert status == 0 and "labels are json.kind.id of each sample, as --label says." in out
    assert sorted(members(tmp_path / "set")) == ["0.cls", "0.png"]


def test_pixel_limit_is_an_option(run, src, tmp_path):
    status, _, err = run("data", "import", src, "--out", tmp_path / "set", "--max-megapixels", 0.0004)
    assert status == 1 and "claims 24x20 pixels, 400 pixels at most were wanted" in err
    status, _, err = run("data", "import", src, "--out", tmp_path / "set", "--max-megapixels", 500)
    assert status == 1 and "max_pixels is 500,000,000: 1 to 134,217,728 was wanted" in err
    status, _, err = run("data", "import", src, "--out", tmp_path / "set", "--max-member-mib", 0)
    assert status == 1 and "max_member_mib is 0, at least 1 was wanted" in err


def test_import_over_a_data_set_needs_overwrite(run, src, tmp_path):
    assert run("data", "import", src, "--out", tmp_path / "set")[0] == 0
    status, _, err = run("data", "import", src, "--out", tmp_path / "set")
    assert status == 1 and "already holds a data set" in err
    assert run("data", "import", src, "--out", tmp_path / "set", "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{tmp}/gone", "--out", "{tmp}/set"], "DataError: source {tmp}/gone is not a folder"),
        (["{src}", "--out", "{src}/set"], "DataError: output {src}/set lies in the source"),
        (["pipe:cat x.tar", "--out", "{tmp}/set"], "DataError: source 'pipe:cat x.tar' is a command to run"),
        (["{src}", "--out", "s3://bucket/set"], "is an address, a local path was wanted"),
        (["{src}", "--out", "{tmp}/set", "--size", "0"], "ConfigError: size is 0, at least 1 pixel was wanted"),
        (["{src}", "--out", "{tmp}/set", "--jpeg-quality", "80"], "ConfigError: jpeg_quality is 80"),
        (["{src}", "--out", "{tmp}/set", "--samples-per-shard", "0"], "ConfigError: samples_per_shard is 0"),
        (["{src}", "--out", "{tmp}/set", "--class-list", "{tmp}/no"], "DataError: class list {tmp}/no cannot be read"),
    ],
)
def test_mistake_in_import_is_worded_and_ends_with_status_1(run, src, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    given = [a.format(src=src, tmp=tmp_path) for a in arguments]
    status, out, err = run("data", "import", *given)
    assert status == 1 and words.format(src=src, tmp=tmp_path) in err and "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["src"]
    assert sorted(p.name for p in src.iterdir()) == ["train", "val"]


@pytest.mark.parametrize("arguments", ["", "{src}", "{src} --out x --sise 8", "{src} --out x --size big"])
def test_command_line_that_does_not_parse_ends_with_status_2(run, src, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert run("data", "import", *arguments.format(src=src).split())[0] == 2
    assert not (tmp_path / "x").exists()


def test_verify_lists_every_problem_of_every_split_and_ends_with_status_1(run, src, tmp_path):
    run("data", "import", src, "--out", tmp_path / "set")
    for split, position in (("train", 800), ("test", 900)):
        path = tmp_path / "set" / split / "shard-00000.tar"
        blob = bytearray(path.read_bytes())
        start = blob.index(b"\x89PNG")
        blob[start + position] ^= 0x55
        path.write_bytes(blob)
    status, out, err = run("data", "verify", tmp_path / "set")
    assert status == 1 and "4 problems" in out and err == ""
    assert out.count("shard shard-00000.tar is not the one in the manifest") == 2
    assert "sample train/cat/0 in shard-00000.tar" in out and "sample val/cat/0 in shard-00000.tar" in out
    assert "are sound" not in out


def test_verify_of_one_split_leaves_the_other_alone(run, src, tmp_path):
    run("data", "import", src, "--out", tmp_path / "set")
    (tmp_path / "set" / "train" / "shard-00000.tar").unlink()
    status, out, _ = run("data", "verify", tmp_path / "set" / "test")
    assert status == 0 and "are sound" in out
    status, out, _ = run("data", "verify", tmp_path / "set")
    assert status == 1 and "shards in the manifest are missing: shard-00000.tar" in out and "set/test: 6 samples" in out


def test_verify_says_that_a_sound_set_is_poisoned(run, src, tmp_path):
    run("data", "import", src, "--out", tmp_path / "set")
    path = tmp_path / "set" / "test" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"poison": {"name": "lsp"}}))
    status, out, _ = run("data", "verify", tmp_path / "set" / "test")
    assert status == 0 and "are sound, poisoned by lsp." in out


@pytest.mark.parametrize("name", ["empty", "gone"])
def test_verify_of_no_data_set_is_refused(run, tmp_path, name):
    (tmp_path / "empty").mkdir()
    status, _, err = run("data", "verify", tmp_path / name)
    assert status == 1 and err.startswith(f"DataError: {tmp_path / name} has no manifest.json, nor has a folder in it")


def test_folders_with_brackets_in_their_names_are_printed_as_they_are(run, src, tmp_path):
    status, out, _ = run("data", "import", src, "--out", tmp_path / "[bold]set[/x]")
    assert status == 0 and "[bold]set[/x]/train" in out
    status, out, _ = run("data", "verify", tmp_path / "[bold]set[/x]")
    assert status == 0 and "[bold]set[/x]/train: 6 samples" in out


def test_commands_write_what_they_say_and_find_it_sound(src, tmp_path, capsys):
    data.import_data(src, tmp_path / "set", samples_per_shard=4)
    manifests = {p.parent.name: Manifest.load(p.parent) for p in (tmp_path / "set").glob("*/manifest.json")}
    for split, manifest in manifests.items():
        for name, info in manifest.shards.items():
            stored = (tmp_path / "set" / split / name).read_bytes()
            assert info.sha256 == hashlib.sha256(stored).hexdigest()
    assert [i.samples for i in manifests["train"].shards.values()] == [4, 2]
    data.verify(tmp_path / "set")
    assert capsys.readouterr().out.count("are sound") == len(manifests) >= 1
