"""What is written reads back equal, to the byte and by others."""

import io
import json

import numpy as np
import pytest
import torch
from made import equal_concepts
from PIL import Image

from poisonshield.data.concepts import Concept, ConceptImage
from poisonshield.data.concepts.reader import load_concepts
from poisonshield.data.concepts.writer import write_concepts
from poisonshield.errors import DataError
from poisonshield.world.rendered import rendered_concepts


@pytest.mark.parametrize("target", ["out", "out.tar"])
def test_what_is_written_reads_back_equal(tmp_path, concept_folders, target):
    made = (*load_concepts(concept_folders, size=16, masks="file"), *rendered_concepts(2, seed=3, size=16))
    about = {made[0].images[0].key: {"poison": "advdm", "eps_px": 8 / 255}}
    write_concepts(made, tmp_path / target, about=about)
    back = load_concepts(tmp_path / target, size=16, masks="file", names=[c.name for c in made])
    equal_concepts(made, back)
    with pytest.raises(DataError, match="exists already"):
        write_concepts(made, tmp_path / target)
    if target == "out":
        assert json.loads((tmp_path / "out/cup/0.json").read_text())["poison"] == "advdm"
    assert not list(tmp_path.glob("*.tmp"))


def test_equal_concepts_are_written_as_equal_bytes_that_webdataset_groups(tmp_path):
    import webdataset as wds

    made = rendered_concepts(2, seed=1, kinds=[("yellow", "ring")])
    write_concepts(made, tmp_path / "a.tar")
    write_concepts(made, tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    samples = list(wds.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [s["__key__"] for s in samples] == ["yellow_ring/00", "yellow_ring/01"]
    assert json.loads(samples[0]["json"]) == {"concept": "yellow_ring", "group": "od", "caption": "a yellow ring"}
    pixels = np.array(Image.open(io.BytesIO(samples[1]["png"])))
    assert np.array_equal(pixels, made[0].images[1].pixels.permute(1, 2, 0).numpy())
    assert "mask.png" in samples[0]


def test_more_fields_for_a_picture_that_is_not_there_are_refused(tmp_path):
    pixels = torch.zeros(3, 4, 4, dtype=torch.uint8)
    with pytest.raises(DataError, match="no key of these"):
        write_concepts([Concept.of("a", [ConceptImage.of("a", "0", pixels)])], tmp_path / "w", about={"b/0@": {}})
