"""Nothing in folders and tars of concepts is left out, or taken for a photo, without a word."""

import gzip
import io
import tarfile

import pytest
from made import array, disc, encoded, save, write_tar

from poisonshield.data.concepts import tar_samples
from poisonshield.data.concepts.reader import load_concepts
from poisonshield.data.summary import Summary
from poisonshield.errors import DataError


def read(root, **how):
    """Stems by concept, captions by stem, and what was told."""
    summary = Summary("set")
    concepts = load_concepts(root, size=16, summary=summary, **how)
    stems = {c.name: [i.stem for i in c.images] for c in concepts}
    captions = {i.stem: i.caption for c in concepts for i in c.images}
    return stems, captions, "\n".join(summary.lines())


@pytest.fixture
def photos(tmp_path):
    """Two photos with nothing beside them."""
    for name in ("00", "01"):
        save(tmp_path / "toy" / f"{name}.png", array())
    return tmp_path / "toy"


MASK_NAMES = ["{}-masklabel.png", "{}_mask.png", "{}-mask.png", "{}.mask.png", "mask/{}.png", "masks/{}_mask.png"]


@pytest.mark.parametrize("name", MASK_NAMES)
def test_masks_of_other_tools_are_never_learned_as_photos(photos, name):
    """Row `00-masklabel.png` beside `00.png`, `data.masks=null`."""
    for stem in ("00", "01"):
        save(photos / name.format(stem), disc())
    stems, _, told = read(photos)
    assert stems == {"toy": ["00", "01"]}
    assert "left out: 2 mask files, which no setting asks for" in told
    stems, _, told = read(photos, masks="file")
    assert stems == {"toy": ["00", "01"]} and "2 pictures, 2 masks" in told


@pytest.mark.parametrize("name", MASK_NAMES)
def test_masks_of_other_tools_are_known_in_tars_too(tmp_path, name):
    members = [(f"cup/{s}.png", encoded(array())) for s in ("00", "01")]
    members += [(f"cup/{name.format(s)}", encoded(disc())) for s in ("00", "01")]
    write_tar(tmp_path / "a.tar", members)
    stems, _, told = read(tmp_path / "a.tar", masks="file")
    assert stems == {"cup": ["00", "01"]} and "2 pictures, 2 masks" in told


def test_a_photo_of_a_mask_is_a_photo(tmp_path):
    """Only a photo that is called like the rest of the name makes `_mask` a mask."""
    for name in ("red_mask", "blue_mask"):
        save(tmp_path / "carnival" / f"{name}.png", array())
    assert read(tmp_path / "carnival")[0] == {"carnival": ["blue_mask", "red_mask"]}


def test_captions_beside_photos_are_read(photos):
    """Row "`IMG.txt` captions beside photos"."""
    (photos / "00.txt").write_text("a toy on\n a table\n", encoding="utf-8-sig")
    (photos / "01.caption").write_text("a toy in the rain")
    _, captions, told = read(photos)
    assert captions == {"00": "a toy on a table", "01": "a toy in the rain"} and "2 captions" in told
    (photos / "00.json").write_text('{"caption": "another"}')
    _, captions, told = read(photos)
    assert captions["00"] == "another" and "captions of" in told and "taken is 'another'" in told
    (photos / "00.txt").write_bytes(b"\xe4\xf6\xfc")
    with pytest.raises(DataError, match="00.txt is not UTF-8"):
        read(photos)


def test_captions_in_tars_are_read(tmp_path):
    """Row "`IMG.txt` captions beside photos, and in tars"."""
    write_tar(tmp_path / "a.tar", [("cup/0.png", encoded(array())), ("cup/0.txt", b"a cup"), ("cup/9.txt", b"lost")])
    _, captions, told = read(tmp_path / "a.tar")
    assert captions == {"0": "a cup"} and "left out: 1 texts without a photo: cup/9.txt" in told


def test_hidden_folders_are_hidden_and_told_at_every_depth(photos):
    """Row "`.ipynb_checkpoints/` in a class folder", for concepts."""
    save(photos / ".ipynb_checkpoints" / "00-checkpoint.png", array())
    save(photos / "deeper" / ".cache" / "x.png", array())
    (photos / ".DS_Store").write_bytes(b"x")
    stems, _, told = read(photos)
    assert stems == {"toy": ["00", "01"]} and "left out: 3 hidden files or folders" in told
    assert ".ipynb_checkpoints" in told and "deeper/.cache" in told


def test_hidden_folders_are_hidden_in_tars(tmp_path):
    names = ("./cup/0.png", "cup/.ipynb_checkpoints/0-checkpoint.png", "__MACOSX/cup/._0.png")
    write_tar(tmp_path / "a.tar", [(name, encoded(array())) for name in names])
    stems, _, told = read(tmp_path / "a.tar")
    assert stems == {"cup": ["0"]} and "2 hidden files or folders" in told


def test_what_is_no_picture_is_named(photos):
    """Row "HEIC ... left out; a word learned from 1 of 5 photos": every file is read, refused or named."""
    (photos / "film.mp4").write_bytes(b"x")
    (photos / "raw.cr2").write_bytes(b"x")
    (photos / "02.txt").write_text("lost")
    save(photos / "masks" / "77.png", disc())
    _, _, told = read(photos)
    assert "2 files that are no pictures by their ending: toy/film.mp4, toy/raw.cr2" in told
    assert "1 texts without a photo: toy/02.txt" in told and "1 masks without a photo: toy/masks/77.png" in told
    assert "read 1 concepts, 2 pictures" in told and "pictures by concept: toy 2" in told


def test_concepts_that_are_not_asked_for_and_empty_folders_are_named(photos):
    save(photos.parent / "hat" / "0.png", array())
    (photos.parent / "empty").mkdir()
    (photos.parent / "notes.md").write_text("x")
    _, _, told = read(photos.parent, names=["toy"])
    assert "1 concepts that no setting asks for: hat" in told
    assert "1 folders without a picture: empty" in told and "notes.md" in told


def test_a_pipe_beside_a_photo_is_not_waited_for(photos):
    """Row "manifest.json as a FIFO", for what lies beside photos."""
    import os

    os.mkfifo(photos / "00.json")
    assert read(photos)[0] == {"toy": ["00", "01"]}


def test_nested_json_is_refused_in_words(photos):
    (photos / "00.json").write_text("[" * 200_000)
    with pytest.raises(DataError, match="00.json is not JSON"):
        read(photos)


def packed(path, members):
    """A .tar.gz of (name, size) members of zeros, made without holding them."""
    with gzip.open(path, "wb", compresslevel=1) as file, tarfile.open(fileobj=file, mode="w|") as tar:
        for name, size in members:
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(bytes(size)))
    return path


def test_members_and_compressed_tars_are_bounded(tmp_path, monkeypatch):
    """Row "4 MB gz with a 4 GB member"."""
    monkeypatch.setattr(tar_samples, "MAX_MEMBER", 2**16)
    monkeypatch.setattr(tar_samples, "MAX_TAR", 2**18)
    with pytest.raises(DataError, match="cup/0.png in .*131,072 bytes, and 65,536 are the most"):
        read(packed(tmp_path / "a.tar.gz", [("cup/0.png", 2**17)]))
    with pytest.raises(DataError, match="unpacks to more than 262,144 bytes"):
        read(packed(tmp_path / "b.tar.gz", [(f"cup/{i}.png", 2**15) for i in range(10)]))
    with pytest.raises(DataError, match="unpacks to more than"):
        read(packed(tmp_path / "c.tar.gz", [("cup/film.mp4", 2**20)]))


def test_a_header_that_claims_much_is_refused_before_it_is_read(tmp_path, monkeypatch):
    """A further instance: the name of a member may be as long as its header says, and is read before anything else."""
    monkeypatch.setattr(tar_samples, "MAX_MEMBER", 2**16)
    with gzip.open(tmp_path / "a.tar.gz", "wb", compresslevel=1) as file:
        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**20
        file.write(info.tobuf(tarfile.GNU_FORMAT) + bytes(2**20))
    with pytest.raises(DataError, match="cannot be read as a tar .a part claims"):
        read(tmp_path / "a.tar.gz")


def test_a_name_with_more_dots_in_a_tar_is_refused(tmp_path):
    """Row "keys such as `img.v6`", for concepts: what a WebDataset calls another field is no photo of its own."""
    write_tar(tmp_path / "a.tar", [(f"cup/0.{field}.png", encoded(array())) for field in ("input", "target")])
    with pytest.raises(DataError, match="a key ends at its first dot"):
        read(tmp_path / "a.tar")


def test_what_lies_beside_tars_is_named_or_refused(tmp_path):
    """Row "`.tar.zst` beside `.tar`"."""
    write_tar(tmp_path / "a.tar", [("cup/0.png", encoded(array()))])
    write_tar(tmp_path / "b.tar.xz", [("cup/1.png", encoded(array(seed=1)))], "w:xz")
    (tmp_path / "c.tar.zst").write_bytes(b"x")
    stems, _, told = read(tmp_path)
    assert stems == {"cup": ["0", "1"]} and "1 files or folders beside the tars: c.tar.zst" in told
    save(tmp_path / "stray.png", array())
    with pytest.raises(DataError, match="stray.png lies beside .*a.tar: which of them"):
        read(tmp_path)


def test_what_is_neither_folder_nor_file_is_refused(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a folder nor a plain file"):
        read(tmp_path / "pipe")


def test_pictures_of_one_name_in_two_spellings_in_a_tar_are_refused(tmp_path):
    write_tar(tmp_path / "c.tar", [("ring/a.png", encoded(array())), ("ring/a.PNG", encoded(array()))])
    with pytest.raises(DataError, match="is in it twice"):
        load_concepts(tmp_path / "c.tar", size=16)
