"""What a learned word is compared with, and what szt noted of its masks."""

import json

import pytest
import torch

from poisonshield.data.concepts import Concept, ConceptImage
from poisonshield.data.concepts.writer import write_concepts
from poisonshield.defenses.diffusion.szt import SZT
from poisonshield.defenses.jpeg import JPEG
from poisonshield.errors import DataError
from poisonshield.reports.sheets import write_pictures
from poisonshield.runs import read_experiment
from poisonshield.runs.parts.reading import average_mask_numbers, read_references


def concept(name, level, stems=("a", "b", "c")):
    """Each picture a shade of its own."""
    shades = [torch.full((3, 16, 16), level + i, dtype=torch.uint8) for i in range(len(stems))]
    return Concept.of(name, [ConceptImage.of(name, stem, x) for stem, x in zip(stems, shades, strict=True)])


def run(tmp_path, *overrides):
    given = [f"data.train={json.dumps(str(tmp_path / 'photos'))}", "data.concepts=null", *overrides]
    return read_experiment("configs/invert/rendered.yaml", given)


def shades(pictures):
    return [round(float(x.mean()) * 255) for x in pictures]


def test_a_folders_own_pictures_are_the_references_or_the_one_left_out(tmp_path):
    cup = concept("cup", 10)
    assert shades(read_references(run(tmp_path), cup)) == [10, 11, 12]
    assert shades(read_references(run(tmp_path, "data.left_out=1"), cup)) == [11]


def test_clean_pictures_are_found_by_name_and_the_left_out_one_by_its_stem(tmp_path):
    write_concepts([concept("cup", 100, ("b", "c", "x")), concept("hat", 200)], tmp_path / "clean")
    clean = f"generate.clean={json.dumps(str(tmp_path / 'clean'))}"
    assert shades(read_references(run(tmp_path, clean), concept("cup", 10))) == [100, 101, 102]
    assert shades(read_references(run(tmp_path, clean, "data.left_out=1"), concept("cup", 10))) == [100]
    with pytest.raises(DataError, match="no picture a of cup"):
        read_references(run(tmp_path, clean, "data.left_out=0"), concept("cup", 10))
    with pytest.raises(DataError, match="no concept fox. It has: cup, hat"):
        read_references(run(tmp_path, clean), concept("fox", 10))


def test_a_single_clean_concept_is_meant_whatever_its_name_unless_several_are_learned(tmp_path):
    write_concepts([concept("originals", 100)], tmp_path / "clean")
    settings = run(tmp_path, f"generate.clean={json.dumps(str(tmp_path / 'clean'))}")
    assert shades(read_references(settings, concept("cup", 10))) == [100, 101, 102]
    with pytest.raises(DataError, match="no concept cup"):
        read_references(settings, concept("cup", 10), alone=False)


def test_mask_values_are_means_over_the_concepts_own_pictures():
    szt = SZT(SZT.Config())
    szt.areas = {"cup/a@1": 0.2, "cup/b@2": 0.4, "hat/a@3": 0.9}
    szt.ious = {"cup/a@1": 0.5, "cup/b@2": 1.0}
    assert average_mask_numbers([JPEG(JPEG.Config()), szt], "cup", compared=True) == {
        "mask_area": pytest.approx(0.3),
        "mask_iou": 0.75,
    }
    assert average_mask_numbers([szt], "cup", compared=False) == {"mask_area": pytest.approx(0.3), "mask_iou": None}
    assert average_mask_numbers([szt], "fox", compared=True) == average_mask_numbers([], "cup", compared=True) == {
        "mask_area": None, "mask_iou": None,
    }  # fmt: skip


def test_concepts_whose_names_look_alike_have_folders_of_their_own(tmp_path):
    x = torch.zeros(1, 3, 8, 8)
    write_pictures(tmp_path / "pictures", {"a b": {"recon": x}, "a_b": {"recon": x}})
    assert sorted(p.parent.name for p in tmp_path.rglob("*.png")) == ["a b", "a_b"]
