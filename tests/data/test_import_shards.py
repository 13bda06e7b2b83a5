"""Import of other people's tars: what is in them arrives unchanged, and what is cut, linked or pickled does not."""

import gzip
import hashlib
import json
import pickle
import tarfile

import pytest
from made import array_of, chw, contents, link, picture, plant, write_tar

from poisonshield.data import ShardSet
from poisonshield.data.importer import import_data
from poisonshield.data.summary import Summary
from poisonshield.data.writer import ShardWriter
from poisonshield.errors import DataError


def labels_of(folder):
    """{key: class name} of a data set."""
    shards = ShardSet.open(folder)
    return {k: shards.classes[y] for k, y in zip(shards.keys, shards.labels.tolist(), strict=True)}


@pytest.fixture
def src(tmp_path):
    return tmp_path / "src"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def sample(key, label=0, seed=0, field="png"):
    return [(f"{key}.{field}", picture(seed, kind="PNG" if field == "png" else "JPEG")), (f"{key}.cls", b"%d" % label)]


def tars(src, made, mode="w"):
    """Write {file name: members} to src."""
    src.mkdir(parents=True, exist_ok=True)
    for name, members in made.items():
        write_tar(src / name, members, "w:gz" if name.endswith("gz") else mode)
    return src


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tgz"])
def test_tars_become_a_data_set_with_their_bytes_and_labels(src, out, ending):
    members = {f"x-0.{ending}": sample("a", 0, 1) + sample("b/c", 2, 2, "JPG"), f"x-1.{ending}": sample("d", 1, 3)}
    manifest = import_data(tars(src, members), out)[""]
    assert manifest.samples == 3 and manifest.classes == ("0", "1", "2") and manifest.image_size == (6, 5)
    assert labels_of(out) == {"a": "0", "b/c": "2", "d": "1"}
    files = contents(out / "shard-00000.tar")
    assert files["a.png"] == picture(1) and files["b/c.jpg"] == picture(2, kind="JPEG")
    assert "from tar shards of src (2 files)" in manifest.provenance


@pytest.mark.parametrize("form", ["x-{}-0.tar", "{}-0.tar"])
def test_tars_that_name_their_split_are_told_apart_and_keys_begin_with_it(src, out, form):
    made = {form.format("train"): sample("0", 0) + sample("1", 1), form.format("val"): sample("0", 0, 5)}
    manifests = import_data(tars(src, made), out)
    assert {s: m.samples for s, m in manifests.items()} == {"train": 2, "test": 1}
    assert labels_of(out / "train") == {"train-0": "0", "train-1": "1"}
    assert list(labels_of(out / "test")) == ["test-0"]
    assert manifests["train"].classes == manifests["test"].classes == ("0", "1")  # though no test label is 1


def test_tars_in_folders_of_splits_are_told_apart(src, out):
    tars(src / "train", {"0.tar": sample("a", 0) + sample("b", 1)})
    tars(src / "val", {"0.tar": sample("c", 0)})
    manifests = import_data(src, out)
    assert labels_of(out / "train") == {"a": "0", "b": "1"} and labels_of(out / "test") == {"c": "0"}
    assert manifests["test"].classes == ("0", "1")


def test_tars_of_which_only_some_name_a_split_are_refused(src, out):
    tars(src, {"x-train-0.tar": sample("a"), "rest-0.tar": sample("b")})
    with pytest.raises(DataError, match="some tars name a split and some do not, such as rest-0.tar"):
        import_data(src, out)
    assert import_data(src, out, pattern="*-train-*")["train"].samples == 1


def test_pattern_chooses_tars_and_may_mean_one_split_only(src, out):
    tars(src / "train", {"a-0.tar": sample("a"), "b-0.tar": sample("b")})
    tars(src / "test", {"c-0.tar": sample("c")})
    assert {s: m.samples for s, m in import_data(src, out, pattern="b-*").items()} == {"train": 1}
    assert list(labels_of(out / "train")) == ["b"] and not (out / "test").exists()


def test_pattern_that_matches_nothing_is_refused(src, out):
    tars(src, {"x-0.tar": sample("a")})
    with pytest.raises(DataError, match="no tar in .* matches the pattern 'y-[*]'"):
        import_data(src, out, pattern="y-*")
    plant(src / "tree", {"cat/0.png": 0})
    with pytest.raises(DataError, match="no tar in .* matches the pattern"):
        import_data(src / "tree", out, pattern="*.tar")


def test_other_fields_are_left_out_unread_and_counted(src, out):
    class Bomb:
        def __reduce__(self):
            return (exec, ("raise AssertionError('a pickle was opened')",))

    made = sample("a") + [("a.json", b"{}"), ("a.pyd", pickle.dumps(Bomb()))] + sample("b") + [("b.json", b"{}")]
    made += [("c.json", b"{}"), ("d.cls", b"0")]
    provenance = import_data(tars(src, {"x.tar": made}), out)[""].provenance
    assert "left out: 3 .json, 1 .pyd, 1 no image" in provenance and list(labels_of(out)) == ["a", "b"]


def test_tars_without_any_image_are_refused_telling_what_they_hold(src, out):
    tars(src, {"x.tar": [("a.pyd", b""), ("a.cls", b"0"), ("b.txt", b"")]})
    with pytest.raises(DataError, match=r"no image came from tar shards of src.*: 1 .pyd, 1 .txt, 1 no image"):
        import_data(src, out)
    assert not out.exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
@pytest.mark.parametrize("name", ["b.png", "b.cls"])
def test_links_in_a_tar_are_refused_and_not_passed_over(src, out, kind, name):
    made = [m for m in sample("b") if m[0] != name]
    tars(src, {"x.tar": sample("a") + made + [link(name, kind, "a.png")]})
    with pytest.raises(DataError, match=f"^{name} in .*x.tar is a link or a device"):
        import_data(src, out)
    assert not out.exists()


def test_two_images_of_a_sample_are_refused(src, out):
    tars(src, {"x.tar": [("a.jpg", picture(kind="JPEG")), *sample("a")]})
    with pytest.raises(DataError, match="^sample a in .*x.tar has 2 images, one was wanted"):
        import_data(src, out)


@pytest.mark.parametrize("second", ["a.png", "a.PNG", "a.cls"])
def test_file_that_comes_twice_in_a_sample_is_refused(src, out, second):
    tars(src, {"x.tar": [*sample("a"), (second, b"0")]})
    with pytest.raises(DataError, match=f"x.tar cannot be read as a tar: {second}: duplicate"):
        import_data(src, out)


def test_keys_that_two_tars_share_begin_with_the_name_of_their_tar(src, out):
    """faults D: "import makes unique keys", import refused: a circle."""
    tars(src, {"x-0.tar": sample("a") + sample("b"), "x-1.v2.tar.gz": sample("c", 1) + sample("b", 1, 3)})
    summary = Summary("src")
    import_data(src, out, summary=summary)
    assert labels_of(out) == {"x-0/a": "0", "x-0/b": "0", "x-1_v2/c": "1", "x-1_v2/b": "1"}
    assert "the same keys come in several shards: each key begins with the name of its shard." in summary.choices


def test_key_that_comes_twice_in_one_tar_is_refused(src, out):
    tars(src, {"x-0.tar": sample("a") + sample("b") + sample("a", seed=3)})
    with pytest.raises(DataError, match="^sample a is written twice"):
        import_data(src, out)
    tars(src, {"x-0.tar": sample("a_b") + sample("a.b")})
    with pytest.raises(DataError, match="^sample a_b is written twice"):
        import_data(src, out)
    assert not out.exists()


@pytest.mark.parametrize("text", [b"", b"cat", b"-1", b"1.5", b"100000"])
def test_label_that_is_no_class_is_refused(src, out, text):
    tars(src, {"x.tar": sample("a") + [("b.png", picture()), ("b.cls", text)]})
    with pytest.raises(DataError, match="^sample b in x.tar has label "):
        import_data(src, out)


def test_label_beyond_the_class_list_is_refused(src, out, tmp_path):
    tars(src, {"x.tar": sample("a", 0) + sample("b", 2)})
    (tmp_path / "list.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match="^sample b in x.tar has label '2', a number from 0 to 1 was wanted"):
        import_data(src, out, class_list=tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("cat\ndog\neel\n")
    import_data(src, out, class_list=tmp_path / "list.txt")
    assert labels_of(out) == {"a": "cat", "b": "eel"}


def test_sample_without_label_is_refused(src, out):
    tars(src, {"x.tar": sample("a") + [("b.png", picture())]})
    with pytest.raises(DataError, match="^sample b in x.tar has label ''"):
        import_data(src, out)


def test_names_as_tar_gives_them_in_a_folder_become_keys(src, out):
    tars(src, {"x.tar": sample("./a") + sample("./v1.0/b")})
    import_data(src, out)
    assert list(labels_of(out)) == ["a", "v1_0/b"]


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_tar_that_was_cut_anywhere_is_refused_and_never_taken_for_a_shorter_one(src, out, ending):
    name = f"x.{ending}"
    tars(src, {name: sample("a") + sample("b") + sample("c")})
    whole = (src / name).read_bytes()
    end = len(whole)
    if ending == "tar":
        with tarfile.open(src / name) as tar:
            end = max(m.offset_data + 512 for m in tar)  # what follows is the end mark
    for length in sorted({0, 1, 511, 512, 513, 1024, 1536, 2048, end - 1, end, *range(100, end, 173)}):
        if length < len(whole):
            (src / name).write_bytes(whole[:length])
            with pytest.raises(DataError, match=f"{name} cannot be read as a tar"):
                import_data(src, out)
    assert not out.exists()


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_tar_with_a_damaged_header_is_refused(src, out, ending):
    plain = write_tar(src.with_suffix(".tar"), sample("a") + sample("b") + sample("c"))
    with tarfile.open(plain) as tar:
        header = tar.getmember("b.png").offset
    data = bytearray(plain.read_bytes())
    data[header + 3] ^= 1
    src.mkdir()
    (src / f"x.{ending}").write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    with pytest.raises(DataError, match=r"cannot be read as a tar after sample a|cannot be read as a tar: "):
        import_data(src, out)


def test_gzip_with_a_wrong_checksum_is_refused(src, out):
    tars(src, {"x.tar.gz": sample("a")})
    data = bytearray((src / "x.tar.gz").read_bytes())
    data[-6] ^= 1
    (src / "x.tar.gz").write_bytes(data)
    with pytest.raises(DataError, match="x.tar.gz cannot be read as a tar"):
        import_data(src, out)


# Tars with a manifest.json beside them.


def beside(src, **fields):
    (src / "manifest.json").write_text(json.dumps(fields))
    return src


def test_manifest_of_others_gives_class_names_and_provenance(src, out):
    tars(src, {"x.tar": sample("a", 1)})
    beside(src, classes=["cat", "dog", "eel"], provenance="found in a box", samples=1, licence="none")
    manifest = import_data(src, out)[""]
    assert manifest.classes == ("cat", "dog", "eel") and "they say: found in a box" in manifest.provenance
    assert labels_of(out) == {"a": "dog"}


def test_hashes_of_others_are_compared(src, out):
    tars(src, {"x.tar": sample("a"), "y.tar": sample("b")})
    right = {n: {"sha256": hashlib.sha256((src / n).read_bytes()).hexdigest()} for n in ("x.tar", "y.tar")}
    beside(src, shards=right | {"y.tar": {"sha256": "0" * 64}})
    with pytest.raises(DataError, match="y.tar does not have the sha256 that .*manifest.json gives"):
        import_data(src, out)
    beside(src, shards=right | {"y.tar": {"samples": 1}})
    assert import_data(src, out)[""].samples == 2


def test_tars_that_the_manifest_names_and_that_are_missing_are_named(src, out):
    tars(src, {"x.tar": sample("a")})
    beside(src, shards={"x.tar": {}, "y.tar": {}})
    with pytest.raises(DataError, match="lacks 1 of 2 tars in its manifest: y.tar"):
        import_data(src, out)
    assert import_data(src, out, pattern="x*")[""].samples == 1


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"classes": 10}', '{"classes": {"cat": 0}}', '{"shards": ["x.tar"]}', "\udcff"]
)
def test_manifest_of_others_that_makes_no_sense_is_refused(src, out, text):
    tars(src, {"x.tar": sample("a")})
    (src / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match="manifest.json is not a manifest"):
        import_data(src, out)
    assert not out.exists()


def test_class_names_that_come_twice_are_refused(src, out):
    beside(tars(src, {"x.tar": sample("a")}), classes=["cat", "cat"])
    with pytest.raises(DataError, match="class name 'cat' comes twice"):
        import_data(src, out)


def poisoned(folder, size=(16, 16)):
    with ShardWriter(folder, classes=["a"], image_size=size, poison={"name": "lsp", "eps": "8/255"}) as writer:
        writer.write("k", chw(array_of(0, size)), 0)
    return folder


def test_poisoned_set_stays_marked_and_says_when_it_was_resized(src, out, tmp_path):
    poisoned(src)
    assert import_data(src, out)[""].poison == {"name": "lsp", "eps": "8/255"}
    assert ShardSet.open(out).decode(0).equal(chw(array_of(0, (16, 16))))
    resized = import_data(src, tmp_path / "small", size=8)[""].poison
    assert resized["name"] == "lsp" and "no longer holds" in resized["altered"]


def test_poisoned_set_cannot_be_made_lossy(src, out):
    with pytest.raises(DataError, match="^sample k would be stored as lossy .jpg in a poisoned data set"):
        import_data(poisoned(src), out, size=8, jpeg_quality=90)
    assert not out.exists()


def test_own_data_set_with_splits_can_be_imported_again(src, out, tmp_path):
    plant(src, {f"{split}/{c}/{i}.png": i for split in ("train", "test") for c in ("cat", "dog") for i in range(2)})
    import_data(src, out)
    manifests = import_data(out, tmp_path / "again")
    for split in ("train", "test"):
        first, second = ShardSet.open(out / split), ShardSet.open(tmp_path / "again" / split)
        assert first.keys == second.keys and first.classes == second.classes and first.digest == second.digest
    assert "they say: from the class-folder tree src/train" in manifests["train"].provenance


def test_real_shards_are_imported_with_their_labels(cifar10_folder, out):
    name = "cifar10-test-00001.tar.gz"
    manifests = import_data(cifar10_folder, out, pattern=name)
    info = json.loads((cifar10_folder / "manifest.json").read_text())
    assert list(manifests) == ["test"] and manifests["test"].samples == info["shards"][name]["samples"]
    assert list(manifests["test"].classes) == info["classes"] and manifests["test"].image_size == (32, 32)
    theirs = contents(cifar10_folder / name)
    ours = {}
    for shard in manifests["test"].shards:
        ours |= contents(out / "test" / shard)
    assert ours == {f"test-{k}": v for k, v in theirs.items() if k.endswith((".jpg", ".cls"))}
