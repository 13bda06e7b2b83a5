"""What names a picture and a concept: keys and digests follow the pixels; names that keys cannot hold are refused."""

import pytest
import torch
from made import array, save

from poisonshield.data.concepts import Concept, ConceptImage
from poisonshield.data.concepts.reader import load_concepts
from poisonshield.errors import DataError


def test_the_key_and_the_digest_follow_the_pixels(concept_folders):
    before = load_concepts(concept_folders, size=16, masks="file")[0]
    save(concept_folders / "cup" / "0.png", array(seed=99))
    after = load_concepts(concept_folders, size=16, masks="file")[0]
    assert before.images[0].key != after.images[0].key and before.images[1].key == after.images[1].key
    assert before.digest != after.digest
    without = load_concepts(concept_folders, size=16)[0]
    assert without.images[0].key == after.images[0].key and without.digest != after.digest


def test_each_picture_can_be_left_out_by_its_number_among_the_stems():
    images = [ConceptImage.of("a", stem, torch.full((3, 4, 4), i, dtype=torch.uint8)) for i, stem in enumerate("cab")]
    whole = Concept.of("a", images, "od")
    left = {whole.leave_out(k)[1].stem: [i.stem for i in whole.leave_out(k)[0].images] for k in range(3)}
    assert left == {"a": ["c", "b"], "b": ["c", "a"], "c": ["a", "b"]}
    rest, _ = whole.leave_out(1)
    assert (rest.name, rest.group) == ("a", "od") and rest.digest != whole.digest
    for concept, number in ((whole, 3), (Concept.of("a", images[:1]), 0)):
        with pytest.raises(DataError, match=f"picture {number} of a cannot be left out: it has"):
            concept.leave_out(number)


def test_names_that_keys_cannot_hold_and_equal_pictures_are_refused():
    pixels = torch.zeros(3, 4, 4, dtype=torch.uint8)
    for name in ("a#b", "a/b", "", ".a", "Mask"):
        with pytest.raises(DataError, match="cannot name a concept"):
            Concept.of(name, [ConceptImage.of("a", "0", pixels)])
    with pytest.raises(DataError, match="twice"):
        Concept.of("a", [ConceptImage.of("a", "0", pixels), ConceptImage.of("a", "0", pixels)])
