"""What names a picture and a concept: keys and digests follow the pixels, and names that keys cannot hold are refused."""

import pytest
import torch
from made import array, save

from poisonshield.data.concept_reader import load_concepts
from poisonshield.data.concepts import Concept, ConceptImage
from poisonshield.errors import DataError


def test_the_key_and_the_digest_follow_the_pixels(concept_folders):
    before = load_concepts(concept_folders, size=16, masks="file")[0]
    save(concept_folders / "cup" / "0.png", array(seed=99))
    after = load_concepts(concept_folders, size=16, masks="file")[0]
    assert before.images[0].key != after.images[0].key and before.images[1].key == after.images[1].key
    assert before.digest != after.digest
    without = load_concepts(concept_folders, size=16)[0]
    assert without.images[0].key == after.images[0].key and without.digest != after.digest


def test_names_that_keys_cannot_hold_and_equal_pictures_are_refused():
    pixels = torch.zeros(3, 4, 4, dtype=torch.uint8)
    for name in ("a#b", "a/b", "", ".a", "Mask"):
        with pytest.raises(DataError, match="cannot name a concept"):
            Concept.of(name, [ConceptImage.of("a", "0", pixels)])
    with pytest.raises(DataError, match="twice"):
        Concept.of("a", [ConceptImage.of("a", "0", pixels), ConceptImage.of("a", "0", pixels)])
