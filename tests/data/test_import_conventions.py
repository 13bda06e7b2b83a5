"""faults D: shards in the conventions of other tools are read as they are meant, and what was found is told."""

import gzip
import io
import itertools
import json
import tarfile

import pytest
from made import contents, picture, plant, write_tar

from poisonshield.data import ShardSet
from poisonshield.data.importer import import_data
from poisonshield.data.summary import Summary
from poisonshield.errors import DataError


@pytest.fixture
def bring(tmp_path):
    """bring(members, ...) -> ({key: class name}, summary) of an import of one tar, or of {name: members}."""
    number = itertools.count()

    def call(tars, beside=None, **settings):
        place = tmp_path / str(next(number))
        plant(place / "src", beside or {})
        (place / "src").mkdir(parents=True, exist_ok=True)
        for name, members in (tars if isinstance(tars, dict) else {"x-0.tar": tars}).items():
            write_tar(place / "src" / name, members, "w:gz" if name.endswith("gz") else "w")
        summary = Summary("src")
        manifests = import_data(place / "src", place / "out", summary=summary, **settings)
        labels = {}
        for split in manifests:
            shards = ShardSet.open(place / "out" / split)
            labels |= {k: shards.classes[y] for k, y in zip(shards.keys, shards.labels.tolist(), strict=True)}
        return labels, summary

    return call


PNG, JPEG, WEBP = (picture(kind=kind) for kind in ("PNG", "JPEG", "WEBP"))


def js(**fields):
    return json.dumps(fields).encode()


CONVENTIONS = {
    "png and json, numbers": [("0.png", PNG), ("0.json", js(label=1)), ("1.png", PNG), ("1.json", js(label=0))],
    "png and json, names": [("0.png", PNG), ("0.json", js(label="dog")), ("1.png", PNG), ("1.json", js(label="cat"))],
    "another key": [("0.png", PNG), ("0.json", js(class_name="dog", w=3)),
                    ("1.png", PNG), ("1.json", js(class_name="cat"))],
    "txt, names": [("0.jpg", JPEG), ("0.txt", b"dog\n"), ("1.jpg", JPEG), ("1.txt", b"cat\n")],
    "txt, names of two words": [("0.jpg", JPEG), ("0.txt", b"red dog"), ("1.jpg", JPEG), ("1.txt", b"black cat")],
    "txt, numbers": [("0.jpg", JPEG), ("0.txt", b"1\n"), ("1.jpg", JPEG), ("1.txt", b"0")],
    "cls, names": [("0.jpg", JPEG), ("0.cls", b"dog"), ("1.jpg", JPEG), ("1.cls", b"cat")],
    "folders": [("dog/0.jpg", JPEG), ("cat/1.jpg", JPEG)],
    "folders below others": [("./set/v1/dog/0.jpg", JPEG), ("./set/v1/cat/1.jpg", JPEG)],
    "webp": [("0.webp", WEBP), ("0.cls", b"1"), ("1.webp", WEBP), ("1.cls", b"0")],
    "input and target": [("0.input.jpg", JPEG), ("0.target.cls", b"1"), ("1.input.jpg", JPEG), ("1.target.cls", b"0")],
    "image and label": [("0.image.jpg", JPEG), ("0.label.cls", b"1"), ("1.image.jpg", JPEG), ("1.label.cls", b"0")],
    "image and label.txt": [("0.image.jpg", JPEG), ("0.label.txt", b"dog"),
                            ("1.image.jpg", JPEG), ("1.label.txt", b"cat")],
    "a mask beside": [("0.jpg", JPEG), ("0.mask.png", PNG), ("0.cls", b"1"), ("1.jpg", JPEG), ("1.cls", b"0")],
    "upper case": [("0.JPG", JPEG), ("0.CLS", b"1"), ("1.JPEG", JPEG), ("1.Cls", b"0")],
}  # fmt: skip


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_conventions_are_found_by_themselves_and_told(bring, convention):
    labels, summary = bring(CONVENTIONS[convention])
    wanted = ["dog", "cat"] if set(labels.values()) == {"dog", "cat"} else ["1", "0"]
    wanted = ["red dog", "black cat"] if "two words" in convention else wanted
    assert list(labels.values()) == wanted
    assert [key.rpartition("/")[2] for key in labels] == ["0", "1"]
    assert summary.choices[0].startswith("labels are ")
    assert summary.classes == {"": dict.fromkeys(sorted(wanted), 1)}


def test_output_of_img2dataset_is_unlabelled_as_its_texts_are_captions(bring):
    members = []
    for i in range(4):
        described = js(
            caption=f"cat {i}", url="https://example.org", key=f"{i:09}", status="success", width=6, height=5
        )
        members += [(f"{i:09}.jpg", JPEG), (f"{i:09}.txt", b"cat %d" % i), (f"{i:09}.json", described)]
    labels, summary = bring({"00000.tar": members}, beside={"00000_stats.json": b"{}", "00000.parquet": b""})
    assert set(labels.values()) == {"unlabelled"} and len(labels) == 4
    assert "the .txt of each sample is a caption: all images are one class, 'unlabelled'" in summary.choices[0]
    labels, _ = bring(members, label="json.width")
    assert set(labels.values()) == {"6"}


def test_captions_alone_are_no_classes_and_what_may_be_both_is_asked(bring):
    long = [
        m for i in range(3) for m in ((f"{i}.jpg", JPEG), (f"{i}.txt", b"a photograph of a cat on a red mat, %d" % i))
    ]
    assert set(bring(long)[0].values()) == {"unlabelled"}
    short = [m for i in range(12) for m in ((f"{i}.jpg", JPEG), (f"{i}.txt", b"cat %d" % i))]
    with pytest.raises(DataError, match="txt of all 12 samples differ, such as 'cat 0': are they captions or classes"):
        bring(short)
    assert len(set(bring(short, label="txt")[0].values())) == 12
    assert set(bring(short, label="none")[0].values()) == {"unlabelled"}


def test_images_without_labels_are_one_class(bring):
    labels, summary = bring([("0.jpg", JPEG), ("1.png", PNG)])
    assert labels == {"0": "unlabelled", "1": "unlabelled"}
    assert summary.choices[0].startswith("no sample has a label: all images are one class, 'unlabelled'.")
    assert set(bring(CONVENTIONS["txt, names"], label="none")[0].values()) == {"unlabelled"}


@pytest.mark.parametrize(
    ("settings", "labels"),
    [
        ({"label": "json.meta.id"}, ["8", "7"]),
        ({"label": ".fine.cls"}, ["0", "1"]),
        ({"label": "coarse.cls", "image": "left.jpg"}, ["1", "1"]),
        ({"label": "name.txt", "image": ".right.png"}, ["a", "b"]),
        ({"label": "folder", "image": "left.jpg"}, ["f", "g"]),
    ],
)
def test_fields_are_chosen_by_the_options(bring, settings, labels):
    members = []
    for i, folder in enumerate("fg"):
        members += [
            (f"{folder}/{i}.left.jpg", JPEG), (f"{folder}/{i}.right.png", PNG), (f"{folder}/{i}.fine.cls", b"%d" % i),
            (f"{folder}/{i}.coarse.cls", b"1"), (f"{folder}/{i}.name.txt", b"ab"[i : i + 1]),
            (f"{folder}/{i}.json", js(meta={"id": 8 - i})),
        ]  # fmt: skip
    if "image" not in settings:
        with pytest.raises(
            DataError, match=r"has 2 images, one was wanted. Its fields: .*\n  Say which: --image left.jpg"
        ):
            bring(members, **settings)
        settings = settings | {"image": "left.jpg"}
    found, summary = bring(members, **settings)
    assert list(found) == ["f/0", "g/1"] and list(found.values()) == labels
    assert "as --label says" in summary.choices[0]
    with pytest.raises(
        DataError, match=r"2 fields that may be its label; its fields: .*\n  Say which: --label fine.cls"
    ):
        bring(members, image="left.jpg")


@pytest.mark.parametrize(
    ("members", "key"),
    [
        ([("img.v6.jpg", JPEG), ("img.v6.cls", b"0"), ("img.v7.jpg", JPEG), ("img.v7.cls", b"1")], "img_v6"),
        ([("img.v6.jpg", JPEG), ("img.v7.jpg", JPEG)], "img_v6"),
        (
            [("a/img.v6.final.jpg", JPEG), ("a/img.v6.final.cls", b"0"), ("b.jpg", JPEG), ("b.cls", b"1")],
            "a/img_v6_final",
        ),
        ([("v1.0/a.jpg", JPEG), ("v1.0/a.cls", b"0"), ("v1.0/b.jpg", JPEG), ("v1.0/b.cls", b"1")], "v1_0/a"),
    ],
)
def test_keys_with_dots_keep_them_as_underscores(bring, members, key):
    """faults A: `img.v6` (webdataset#237): 6 of 10 samples came, rc 0."""
    labels, _ = bring(members)
    assert len(labels) == 2 and key in labels


def test_keys_with_dots_far_apart_are_samples_of_their_own(bring):
    members = [
        m for i in range(10) for m in ((f"img{i % 2}.v{i}.jpg", JPEG), (f"img{i % 2}.v{i}.cls", b"%d" % (i % 3)))
    ]
    labels, _ = bring(members)
    assert labels == {f"img{i % 2}_v{i}": str(i % 3) for i in range(10)}


TROUBLE = {
    "one without": [("0.jpg", JPEG), ("0.cls", b"1"), ("1.jpg", JPEG), ("1.json", b"{}")],
    "no number": [("0.jpg", JPEG), ("0.cls", b"1"), ("1.jpg", JPEG), ("1.cls", b"cat"), ("1.json", b"{}")],
    "no class": [("0.jpg", JPEG), ("0.cls", b"1"), ("1.jpg", JPEG), ("1.cls", b"100000"), ("1.json", b"{}")],
    "json without": [("0.jpg", JPEG), ("0.json", js(label=1)), ("1.jpg", JPEG), ("1.json", b"{}")],
    "json with a list": [("0.jpg", JPEG), ("0.json", js(label=1)), ("1.jpg", JPEG), ("1.json", js(label=[1]))],
    "txt missing": [("0.jpg", JPEG), ("0.txt", b"cat"), ("1.jpg", JPEG), ("1.json", b"{}")],
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_trouble_with_labels_names_the_shard_and_the_fields_found(bring, trouble):
    """It said "the manifest names 100000 classes" where there was no manifest."""
    with pytest.raises(DataError, match=r"^sample 1 in x-0.tar has label '.*its fields: \.jpg, .*\.json") as caught:
        bring(TROUBLE[trouble])
    assert "manifest" not in str(caught.value) and "--label" in str(caught.value)


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe", b"[" * 100_000], ids=["cut", "binary", "deep"])
def test_damaged_json_is_refused(bring, data):
    with pytest.raises(DataError, match="the .json of sample 0 in x-0.tar is not readable JSON"):
        bring([("0.jpg", JPEG), ("0.json", data)])


def test_damaged_json_beside_a_label_of_its_own_matters_to_nobody(bring):
    assert bring([("0.jpg", JPEG), ("0.cls", b"0"), ("0.json", b"{")])[0] == {"0": "0"}


def test_files_of_a_sample_that_lie_apart_are_refused_and_not_taken_for_unlabelled(bring):
    with pytest.raises(DataError, match="files of sample a do not follow each other .its image is in x-0.tar"):
        bring([("a.jpg", JPEG), ("b.jpg", JPEG), ("a.cls", b"0"), ("b.cls", b"1")])
    with pytest.raises(DataError, match="no image has a label, and there are labels without an image, such as of y/0"):
        bring([("x/0.jpg", JPEG), ("y/0.cls", b"0")])
    assert len(bring([("x/0.jpg", JPEG), ("y/0.cls", b"0")], label="none")[0]) == 1


@pytest.mark.parametrize("data", [b"[1]", b"3", b'"label"', b"null"])
def test_json_without_fields_holds_no_label(bring, data):
    assert bring([("0.jpg", JPEG), ("0.json", data)])[0] == {"0": "unlabelled"}


def test_class_list_names_and_chooses_classes_of_tars(bring, tmp_path):
    (tmp_path / "list").write_text("dog Hund\ncat\n")
    labels, _ = bring(CONVENTIONS["txt, names"], class_list=tmp_path / "list")
    assert labels == {"0": "Hund", "1": "cat"}
    (tmp_path / "list").write_text("cat\n")
    labels, summary = bring(CONVENTIONS["folders"], class_list=tmp_path / "list")
    assert labels == {"cat/1": "cat"}
    assert summary.left_out == {"samples of classes that the class list does not name": ["dog/0"]}


def test_a_test_split_of_tars_may_lack_classes_and_may_not_have_others(bring):
    train = CONVENTIONS["txt, names"]
    labels, _ = bring({"x-train-0.tar": train, "x-val-0.tar": [("7.jpg", JPEG), ("7.txt", b"dog")]})
    assert labels == {"train-0": "dog", "train-1": "cat", "test-7": "dog"}
    with pytest.raises(
        DataError, match="sample 7 in x-val-0.tar has label 'eel', one of the classes cat, dog was wanted"
    ):
        bring({"x-train-0.tar": train, "x-val-0.tar": [("7.jpg", JPEG), ("7.txt", b"eel")]})


def test_folders_are_classes_in_each_split_by_itself(bring):
    made = {
        "train/0.tar": [("train/cat/0.jpg", JPEG), ("train/dog/1.jpg", JPEG)],
        "val/0.tar": [("val/dog/2.jpg", JPEG)],
    }
    labels, _ = bring(made, beside={"train/x": b"", "val/x": b""})
    assert labels == {"train/cat/0": "cat", "train/dog/1": "dog", "val/dog/2": "dog"}


def test_hidden_files_of_a_tar_are_left_out_and_told(bring):
    members = [
        ("0.jpg", JPEG),
        ("0.cls", b"0"),
        ("._0.jpg", b"x"),
        ("__MACOSX/0.jpg", b"x"),
        (".ipynb_checkpoints/1.jpg", JPEG),
    ]
    labels, summary = bring(members)
    assert labels == {"0": "0"} and "left out of tars: 3 hidden files" in summary.choices


def test_files_of_tars_keep_their_bytes(bring, tmp_path):
    bring(CONVENTIONS["image and label"])
    (out,) = tmp_path.glob("*/out")
    assert contents(out / "shard-00000.tar") == {"0.jpg": JPEG, "0.cls": b"1", "1.jpg": JPEG, "1.cls": b"0"}


def test_an_image_field_that_is_not_there_is_told_with_what_is(bring):
    with pytest.raises(
        DataError, match=r"no image came .*: 1 .jpg, 1 no image. Samples have no .input.jpg, as --image says"
    ):
        bring([("0.jpg", JPEG), ("0.cls", b"0")], image="input.jpg")


# faults C: what is unpacked is bounded.


def bomb(path, members, mebibytes):
    """A .tar.gz of some kilobytes with one file of many; written by hand, as tarfile wants the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb", compresslevel=9) as file:
        for name, kind in members:
            info = tarfile.TarInfo(name)
            info.size, info.type = mebibytes * 2**20, kind
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            for _ in range(mebibytes):
                file.write(bytes(2**20))
        file.write(bytes(1024))  # the end mark
    return path


@pytest.mark.parametrize("name", ["a.png", "a.cls", "a.json"])
def test_large_files_in_a_small_tar_are_refused_unread(tmp_path, monkeypatch, name):
    """4 MB of gz with a member of 4 GB."""
    bomb(tmp_path / "src" / "x.tar.gz", [(name, tarfile.REGTYPE)], 20)
    monkeypatch.setattr("poisonshield.data.tars.file_in", None)
    with pytest.raises(DataError, match=rf"^{name} in .* has 20 MiB, .* MiB at most were wanted"):
        import_data(tmp_path / "src", tmp_path / "out", max_member_mib=16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME], ids=["pax header", "long name"])
def test_large_headers_in_a_small_tar_are_refused_unread(tmp_path, kind):
    bomb(tmp_path / "src" / "x.tar.gz", [("a", kind)], 20)
    with pytest.raises(DataError, match=r"x.tar.gz cannot be read as a tar: a header of 20,971,520 bytes"):
        import_data(tmp_path / "src", tmp_path / "out")


def test_a_file_with_holes_that_claims_terabytes_is_refused(tmp_path):
    info = tarfile.TarInfo("a.png")
    info.size = 512
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**44)}
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(b"1\n0\n0\n".ljust(512, b"\0")))
    plant(tmp_path / "src", {"x.tar": file.getvalue()})
    with pytest.raises(DataError, match="a.png in .* has 16,777,216 MiB"):
        import_data(tmp_path / "src", tmp_path / "out")


def test_other_fields_of_any_size_are_passed_over(tmp_path):
    bomb(tmp_path / "src" / "x.tar.gz", [("a.mp4", tarfile.REGTYPE)], 20)
    write_tar(tmp_path / "src" / "y.tar", [("a.png", PNG), ("a.cls", b"0")])
    summary = Summary("src")
    assert import_data(tmp_path / "src", tmp_path / "out", summary=summary)[""].samples == 1
    assert "left out of tars: 1 .mp4" in summary.choices


def test_a_picture_file_beyond_the_bound_is_refused(tmp_path):
    plant(tmp_path / "src", {"a/0.png": 0, "a/1.bmp": bytes(2**20 + 1)})
    with pytest.raises(DataError, match="1.bmp is larger than 1,048,576 bytes"):
        import_data(tmp_path / "src", tmp_path / "out", max_member_mib=1)


def test_escape_sequences_in_a_tar_reach_no_terminal(bring):
    with pytest.raises(DataError) as caught:
        bring([("\x1b[2Ja.png", PNG), ("\x1b[2Ja.jpg", JPEG)])
    assert "\x1b" not in str(caught.value)
    _, summary = bring([("a.png", PNG), ("a.\x1b[2J", b"")])
    assert "\x1b" not in "".join(summary.lines())
    with pytest.raises(DataError, match="key '.x1b.2Ja' is unfit"):
        bring([("\x1b[2Ja.png", PNG)])
