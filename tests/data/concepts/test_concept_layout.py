"""Which file is a picture, a mask or a text of which concept, in folders and tars."""

import io
import json
import tarfile

import pytest
from made import array, disc, save
from PIL import Image

from poisonshield.data.concepts.reader import load_concepts
from poisonshield.data.concepts.writer import write_concepts
from poisonshield.errors import DataError
from poisonshield.world.rendered import rendered_concepts


def test_a_tar_of_others_without_json_goes_by_its_folders(tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        for name in ("cup/0.png", "cup/1.png", "hat/0.png"):
            file = io.BytesIO()
            Image.fromarray(array()).save(file, "PNG")
            info = tarfile.TarInfo(name)
            info.size = len(file.getvalue())
            tar.addfile(info, io.BytesIO(file.getvalue()))
    found = load_concepts(tmp_path, size=16)
    assert {c.name: len(c.images) for c in found} == {"cup": 2, "hat": 1}


@pytest.mark.parametrize("damage", ["cut", "header"])
def test_a_damaged_tar_is_refused_by_name(tmp_path, damage):
    write_concepts(rendered_concepts(3, seed=1, kinds=[("yellow", "ring")]), tmp_path / "a.tar")
    data = bytearray((tmp_path / "a.tar").read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    else:
        with tarfile.open(tmp_path / "a.tar") as tar:
            at = tar.getmembers()[3].offset
        data[at : at + 200] = b"x" * 200
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match="a.tar cannot be read as a tar.*Copy it again"):
        load_concepts(tmp_path / "a.tar", size=16)


def test_json_beside_a_picture_gives_caption_and_group(concept_folders):
    (concept_folders / "cup" / "0.json").write_text(json.dumps({"caption": "a blue cup", "group": "od"}))
    cup = load_concepts(concept_folders, size=16, names=["cup"], group="od")[0]
    assert (cup.group, cup.images[0].caption, cup.images[1].caption) == ("od", "a blue cup", "")
    (concept_folders / "cup" / "0.json").write_text("[1]")
    with pytest.raises(DataError, match="0.json: a table with the texts"):
        load_concepts(concept_folders, size=16)


def test_novel_concepts_have_captions_from_file_names_and_groups_by_name(tmp_path):
    for name in ("CokeCan", "FishDoll", "Other"):
        caption = f"a photo of {name}. on a table"
        save(tmp_path / name / "512x512" / f"{caption}.png", array())
        save(tmp_path / name / "SAM_masks" / f"{caption}.png", disc())
    all_of_them = load_concepts(tmp_path, size=16, masks="file")
    assert {c.name: c.group for c in all_of_them} == {"CokeCan": "id", "FishDoll": "od", "Other": None}
    assert all_of_them[0].images[0].caption == "a photo of CokeCan. on a table"
    assert "#" not in all_of_them[0].images[0].key and all_of_them[0].images[0].stem == "a photo of CokeCan_ on a table"
    assert [c.name for c in load_concepts(tmp_path, size=16, group="id")] == ["CokeCan"]
    assert [c.name for c in load_concepts(tmp_path, size=16, group="od")] == ["FishDoll"]
    with pytest.raises(DataError, match="no concept of group 'id'.*Use group: all"):
        load_concepts(tmp_path, size=16, group="id", names=["Other"])
    save(tmp_path / "CokeCan" / "original" / "a photo of CokeCan. on a table.png", array(40, 60))
    with pytest.raises(DataError, match="(?s)have one name.*move the folder of other versions"):
        load_concepts(tmp_path, size=16)
