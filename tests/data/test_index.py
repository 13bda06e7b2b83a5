"""The index of a tar: every image where tarfile finds it, and everything that is no image or label refused unread."""

import io
import pickle
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import link, write_tar
from webdataset.tariterators import base_plus_ext

from poisonshield.data.index import Index, index_tar, parse_label, refuse_repeated_keys, split_name
from poisonshield.errors import DataError


def index_of(members, *, classes=3, number=0):
    """Index of members (bytes need not be images: the index does not look at pixels) and the tar's bytes."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    data = file.getvalue()
    return index_tar(io.BytesIO(data), number=number, name="s-0.tar", classes=classes), data


def sample(key, label=0, field="png", data=b"pixels"):
    return [(f"{key}.{field}", data), (f"{key}.cls", str(label).encode())]


NAME = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=12)


@given(NAME)
def test_names_are_split_where_webdataset_splits_them(name):
    key, extension = base_plus_ext(name)
    if key is not None:
        assert split_name(name) == (key, extension.lower())


KEYS = st.lists(
    st.text(st.characters(codec="utf-8", categories=("L", "N"), include_characters="/-_ "), min_size=1, max_size=150)
    .filter(lambda k: k.strip("/ ") == k and k.isprintable()),  # tarfile itself strips slashes at the ends
    min_size=1,
    max_size=8,
    unique=True,
)  # fmt: skip


@given(KEYS, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_each_image_lies_where_the_index_says_in_any_order_of_members(keys, random):
    fields = [random.choice(["png", "jpg", "jpeg", "PNG", "Jpg"]) for _ in keys]
    images = {k: random.randbytes(random.randint(0, 1500)) for k in keys}
    members = [m for i, k in enumerate(keys) for m in sample(k, i % 3, fields[i], images[k])]
    random.shuffle(members)
    index, data = index_of(members, number=4)
    assert sorted(index.keys) == sorted(keys)
    assert [k for k in index.keys] == [split_name(n)[0] for n, _ in members if not n.endswith(".cls")]
    for i, key in enumerate(index.keys):
        assert data[index.offset[i] : index.offset[i] + index.length[i]] == images[key]
        assert index.labels[i] == keys.index(key) % 3 and index.shard[i] == 4
        assert ("jpg", "jpeg", "png")[index.codec[i]] == fields[keys.index(key)].lower()


def test_folders_in_a_tar_are_passed_over():
    folder = tarfile.TarInfo("a/b")
    folder.type = tarfile.DIRTYPE
    assert index_of([folder, *sample("a/b/0")])[0].keys == ("a/b/0",)


class Bomb:
    """Unpickling this is noticed."""

    went_off = False

    def __reduce__(self):
        return (setattr, (Bomb, "went_off", True))


@pytest.mark.parametrize("field", ["pyd", "pkl", "PKL", "pickle", "pth", "pt", "npy", "npz", "jpg.pkl", "cls.pyd"])
def test_pickled_fields_are_refused_without_being_read(field):
    with pytest.raises(DataError, match=rf"^field .{field.lower()} of sample a in s-0.tar is a pickled or binary"):
        index_of([*sample("a"), (f"a.{field}", pickle.dumps(Bomb()))])
    assert not Bomb.went_off


@pytest.mark.parametrize("field", ["txt", "json", "webp", "left.jpg", "cls2", "jpg~"])
def test_unknown_fields_are_refused(field):
    with pytest.raises(DataError, match=f"^field .{field} of sample a in s-0.tar is not known"):
        index_of([*sample("a"), (f"a.{field}", b"")])


def test_file_without_extension_is_refused():
    with pytest.raises(DataError, match="of sample README in s-0.tar is not known"):
        index_of([*sample("a"), ("README", b"hello")])


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
@pytest.mark.parametrize("name", ["a.png", "a.cls"])
def test_links_and_devices_are_refused(kind, name):
    members = [m for m in sample("a") if m[0] != name] + [link(name, kind)]
    with pytest.raises(DataError, match=f"^{name} in s-0.tar is a link or a device"):
        index_of(members)


@pytest.mark.parametrize(
    "text", [b"", b" ", b"cat", b"-1", b"+1", b"1.0", b"1e1", b"3", b"2 1", "²".encode(), b"0" * 10]
)
def test_labels_outside_the_classes_are_refused(text):
    with pytest.raises(DataError, match=r"^sample a in s-0.tar has label .*, a number from 0 to 2 was wanted"):
        index_of([("a.png", b""), ("a.cls", text)])


@given(st.integers(-50, 50), st.integers(1, 40), st.sampled_from(["{}", "{}\n", " {} \r\n", "0{}"]))
def test_a_label_is_taken_if_and_only_if_a_class_has_it(label, classes, form):
    text = form.format(label).encode()
    if 0 <= label < classes:
        assert parse_label(text, classes=classes, key="a", shard="s") == label
    else:
        with pytest.raises(DataError, match=f"a number from 0 to {classes - 1} was wanted"):
            parse_label(text, classes=classes, key="a", shard="s")


@pytest.mark.parametrize("second", ["a.png", "a.jpg", "a.cls"], ids=["same file", "two images", "two labels"])
def test_second_image_or_label_of_a_key_is_refused(second):
    with pytest.raises(DataError, match="^sample a appears twice, the second time in s-0.tar"):
        index_of([*sample("a"), *sample("b"), (second, b"1")])


def test_image_without_label_and_label_without_image_are_refused():
    with pytest.raises(DataError, match=r"^sample b in s-0.tar has no .cls label \(2 such\)"):
        index_of([*sample("a"), ("b.png", b""), ("c.png", b"")])
    with pytest.raises(DataError, match=r"^sample b in s-0.tar has no image \(1 such\)"):
        index_of([*sample("a"), ("b.cls", b"1")])


@pytest.mark.parametrize("key", ["v1.0/a", "./a", "a\nb", "a\x7f", "a\u2028b"])
def test_keys_with_dots_or_control_characters_are_refused(key):
    with pytest.raises(DataError, match="keys have no dots and no control characters"):
        index_of(sample(key))


def test_tar_that_is_none_raises_no_other_error_than_tarfiles():
    with pytest.raises(tarfile.TarError):
        index_tar(io.BytesIO(b"\x89PNG" * 300), number=0, name="s-0.tar", classes=3)


def test_key_in_two_shards_is_refused_naming_the_second():
    keys, shard = ("a", "b", "c", "b"), np.array([0, 0, 1, 1])
    with pytest.raises(DataError, match="^sample b appears twice, the second time in s-1.tar"):
        refuse_repeated_keys(keys, shard, ["s-0.tar", "s-1.tar"])
    refuse_repeated_keys(keys[:3], shard[:3], ["s-0.tar", "s-1.tar"])


@pytest.fixture
def saved(tmp_path):
    members = [m for i in range(5) for m in sample(f"ä/{i}", i % 3, data=b"x" * i)]
    index = Index.join([index_of(members, number=0)[0], index_of(sample("last", 2), number=1)[0]])
    index.save(tmp_path / ".index.npz", stamp="s1")
    return index, tmp_path / ".index.npz"


def test_joined_index_holds_the_parts_in_order(saved):
    index, _ = saved
    assert index.keys == ("ä/0", "ä/1", "ä/2", "ä/3", "ä/4", "last")
    assert index.shard.tolist() == [0] * 5 + [1] and index.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert index.length.tolist() == [0, 1, 2, 3, 4, 6]


def test_saved_index_is_loaded_again_under_its_own_stamp_only(saved):
    index, path = saved
    again = Index.load(path, stamp="s1")
    assert again.keys == index.keys
    for name in Index.ARRAYS:
        assert np.array_equal(getattr(again, name), getattr(index, name))
    assert Index.load(path, stamp="s2") is None
    assert Index.load(path.with_name("gone.npz"), stamp="s1") is None
    assert [p.name for p in path.parent.iterdir()] == [".index.npz"]


def test_saved_index_that_was_cut_anywhere_counts_as_none(saved):
    _, path = saved
    whole = path.read_bytes()
    for length in [*range(0, 40), *range(40, len(whole), 97)]:
        path.write_bytes(whole[:length])
        assert Index.load(path, stamp="s1") is None, f"cut to {length} of {len(whole)} bytes"


def test_saved_index_with_objects_in_it_is_not_unpickled(saved):
    index, path = saved
    arrays = {name: getattr(index, name) for name in Index.ARRAYS}
    arrays["labels"] = np.array([Bomb()] * 6, dtype=object)
    with open(path, "wb") as f:
        np.savez(f, keys=np.frombuffer(b"a\nb\nc\nd\ne\nf", np.uint8), stamp=np.array("s1"), **arrays)
    assert Index.load(path, stamp="s1") is None and not Bomb.went_off


def test_array_file_in_place_of_a_saved_index_counts_as_none(saved):
    _, path = saved
    with open(path, "wb") as f:
        np.save(f, np.arange(3))
    assert Index.load(path, stamp="s1") is None


def test_failed_save_leaves_the_old_index_and_nothing_else(saved, monkeypatch):
    index, path = saved
    before = path.read_bytes()

    def full_disk(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="no space left"):
        index.save(path, stamp="s2")
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [".index.npz"]


def test_index_of_a_file_equals_that_of_its_bytes(tmp_path):
    path = write_tar(tmp_path / "s-0.tar", [*sample("a"), *sample("b", 2)])
    with open(path, "rb") as file:
        index = index_tar(file, number=0, name="s-0.tar", classes=3)
    with tarfile.open(path) as tar:
        assert index.offset.tolist() == [m.offset_data for m in tar if m.name.endswith(".png")]
