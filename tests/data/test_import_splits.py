"""faults A: folders and tars of splits are known however they are spelled, what is chosen is told, else it is asked."""

import itertools

import pytest
from made import picture, plant, write_tar

from poisonshield.data import ShardSet
from poisonshield.data.importer import import_data
from poisonshield.data.splits import split_of
from poisonshield.data.summary import Summary
from poisonshield.errors import DataError


@pytest.fixture
def bring(tmp_path):
    """bring({path: bytes or seed}) -> ({split: keys}, summary) of an import of these files."""
    number = itertools.count()

    def call(files, **settings):
        place = tmp_path / str(next(number))
        plant(place / "src", files)
        summary = Summary("src")
        manifests = import_data(place / "src", place / "out", summary=summary, **settings)
        return {split: list(ShardSet.open(place / "out" / split).keys) for split in manifests}, summary

    return call


@pytest.mark.parametrize("train", ["Train", "TRAIN", "training_set", "train2017", "Training", "train-images"])
@pytest.mark.parametrize("test", ["Test", "VAL", "test_set", "val2017", "Validation", "dev", "eval"])
def test_splits_of_any_spelling_are_splits(bring, train, test):
    splits, summary = bring({f"{train}/cat/0.png": 0, f"{train}/dog/1.png": 1, f"{test}/cat/2.png": 2})
    assert splits == {"train": [f"{train}/cat/0", f"{train}/dog/1"], "test": [f"{test}/cat/2"]}
    assert f"{train} is the train split, {test} the test split." in summary.choices


@pytest.mark.parametrize("name", ["trained", "tests", "validate", "retrain", "train2", "settest", ""])
def test_other_words_are_no_splits(name):
    assert split_of(name) is None


def test_of_train_val_and_test_the_choice_is_told(bring):
    splits, summary = bring({f"{s}/cat/0.png": 0 for s in ("train", "val", "test")})
    assert splits == {"train": ["train/cat/0"], "test": ["test/cat/0"]}
    assert summary.left_out == {
        "validation splits, as there is a test split (import it alone to have it)": ["val"]
    } and summary.choices == ["train is the train split, test the test split."]


@pytest.mark.parametrize("names", [("val", "test"), ("Test",), ("validation",), ("TEST", "Valid")])
def test_splits_without_train_are_asked_about(bring, names):
    with pytest.raises(DataError, match=f"(?s){sorted(names)[0]}.*nothing called train. Are they splits or classes"):
        bring({f"{name}/cat/0.png": 0 for name in names})


def test_a_class_list_says_that_they_are_classes(bring, tmp_path):
    (tmp_path / "list").write_text("val\ntest\n")
    splits, summary = bring({"val/0.png": 0, "test/1.png": 1}, class_list=tmp_path / "list")
    assert splits == {"": ["val/0", "test/1"]}
    assert bring({"train/0.png": 0, "bus/1.png": 1})[1].classes[""] == {"bus": 1, "train": 1}


def test_two_folders_of_one_split_are_asked_about(bring):
    with pytest.raises(DataError, match="holds Train and training, which are both the train split"):
        bring({"Train/cat/0.png": 0, "training/cat/0.png": 1, "test/cat/0.png": 2})


def test_folders_beside_splits_are_told(bring):
    splits, summary = bring({"train/cat/0.png": 0, "test/cat/0.png": 1, "extra/cat/2.png": 2})
    assert list(splits) == ["train", "test"] and summary.left_out == {"folders beside the splits": ["extra"]}


def test_one_folder_too_high_is_warned_of(bring):
    """`data import ../data`: 4,141 samples, "2 classes"."""
    files = {f"{name}/{split}/cat/0.png": 0 for name in ("birds", "fish") for split in ("train", "val")}
    splits, summary = bring(files)
    assert len(splits[""]) == 4 and summary.classes == {"": {"birds": 2, "fish": 2}}
    assert any(c.startswith("warning: the classes birds, fish hold only train, val") for c in summary.choices)
    assert not any("warning" in c for c in bring({"birds/0.png": 0, "fish/deep/1.png": 1})[1].choices)


def test_hidden_and_junk_folders_are_hidden_at_every_depth_and_told(bring):
    """`.ipynb_checkpoints/` in a class folder (vision#2831)."""
    hidden = [
        ".ipynb_checkpoints/x-checkpoint.png", "train/.ipynb_checkpoints/y.png", "train/cat/.ipynb_checkpoints/z.png",
        "train/cat/deep/.ipynb_checkpoints/w.png", "train/cat/._0.png", "__MACOSX/train/cat/0.png",
        "train/cat/@eaDir/0.png",
    ]  # fmt: skip
    splits, summary = bring({"train/cat/0.png": 0, **dict.fromkeys(hidden, 1)})
    assert splits == {"train": ["train/cat/0"]} and summary.classes == {"train": {"cat": 1}}
    assert summary.left_out == {
        "hidden, linked or special files and folders": [
            "train/cat/._0.png", "train/cat/.ipynb_checkpoints", "train/cat/@eaDir",
            "train/cat/deep/.ipynb_checkpoints",
        ]
    }  # fmt: skip


def test_files_that_are_no_images_and_archives_are_named(bring):
    splits, summary = bring({"cat/0.png": 0, "cat/notes.txt": b"", "more.zip": b"", "1.png": 1})
    assert summary.left_out == {
        "files that are no images": ["cat/notes.txt"],
        "images outside the class folders": ["1.png"],
        "archives that are not read (unpack them first)": ["more.zip"],
    }
    with pytest.raises(DataError, match="archives that are not read, such as x-0.tar.zst: unpack them first"):
        bring({"x-0.tar.zst": b"", "x-1.tar.zst": b""})


def test_a_folder_of_images_is_one_class_without_labels(bring):
    """faults D: unlabelled images for self-supervision (solo-learn#94, #374)."""
    splits, summary = bring({"0.png": 0, "1.png": 1})
    assert splits == {"": ["0", "1"]} and summary.classes == {"": {"unlabelled": 2}}
    assert "src has no labels: all of its images are one class, 'unlabelled'." in summary.choices
    splits, _ = bring({"train/0.png": 0, "val/1.png": 1})
    assert splits == {"train": ["train/0"], "test": ["val/1"]}
    splits, summary = bring({"cat/0.png": 0, "dog/deep/1.png": 1, "2.png": 2}, label="none")
    assert splits == {"": ["2", "cat/0", "dog/deep/1"]} and summary.classes == {"": {"unlabelled": 3}}


def test_a_flat_test_split_beside_classes_is_refused(bring):
    with pytest.raises(DataError, match="test holds images and no class folders.*\n.*--label none"):
        bring({"train/cat/0.png": 0, "train/dog/0.png": 0, "test/1.png": 1})


def test_fields_of_tars_mean_nothing_for_folders(bring):
    for settings in ({"image": "jpg"}, {"label": "cls"}):
        with pytest.raises(DataError, match="holds no tars, and --image and --label name fields of tars"):
            bring({"cat/0.png": 0}, **settings)


# Tars of splits.


@pytest.fixture
def bring_tars(tmp_path):
    number = itertools.count()

    def call(names, beside=(), **settings):
        src = tmp_path / f"tars {next(number)}"
        src.mkdir()
        for i, name in enumerate(names):
            (src / name).parent.mkdir(exist_ok=True)
            write_tar(
                src / name, [(f"{i}.png", picture(i)), (f"{i}.cls", b"0")], "w:gz" if name.endswith("gz") else "w"
            )
        plant(src, dict.fromkeys(beside, b""))
        out, summary = src.with_name(f"{src.name} out"), Summary("src")
        manifests = import_data(src, out, summary=summary, **settings)
        return {split: list(ShardSet.open(out / split).keys) for split in manifests}, summary

    return call


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["x-Train-0.tar", "x-TEST-0.tar"], {"train": ["train-0"], "test": ["test-1"]}),
        (["x_train_0.tar", "x_test_0.tar"], {"train": ["train-0"], "test": ["test-1"]}),
        (["train.tar", "val.tar"], {"train": ["train-0"], "test": ["test-1"]}),
        (["x_train_0.tar", "x_train_1.tar"], {"": ["0", "1"]}),
        (["x-val-0.tar"], {"test": ["test-0"]}),
        (["X.TAR", "Y.Tar"], {"": ["0", "1"]}),
        (["Train/0.tar", "Validation/0.tar"], {"train": ["0"], "test": ["1"]}),
    ],
)
def test_tars_of_any_spelling_are_told_apart(bring_tars, names, splits):
    assert bring_tars(names)[0] == splits


def test_tars_of_val_are_not_mixed_with_those_of_test(bring_tars):
    splits, summary = bring_tars(["x-train-0.tar", "x-val-0.tar", "x-test-0.tar"])
    assert splits == {"train": ["train-0"], "test": ["test-2"]}
    assert list(summary.left_out.values()) == [["x-val-0.tar"]]
    with pytest.raises(DataError, match="nothing called train. Are they splits or classes"):
        bring_tars(["x-val-0.tar", "x-test-0.tar"])


def test_archives_and_folders_beside_tars_are_named(bring_tars):
    """faults A: `.tar.zst` beside `.tar` was passed over."""
    splits, summary = bring_tars(["x-0.tar"], beside=["x-1.tar.zst", "x-2.tar.xz", "cat/0.png"])
    assert splits == {"": ["0"]}
    assert summary.left_out == {
        "archives that are not read (unpack them first)": ["x-1.tar.zst", "x-2.tar.xz"],
        "folders beside the tars": ["cat"],
    }
