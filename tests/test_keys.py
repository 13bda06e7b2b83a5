"""The key language: what is read is what was written, and the other way round."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poisonshield.errors import DataError
from poisonshield.keys import RESERVED, Key, picture_of, slot_of

names = st.text(st.characters(exclude_characters=RESERVED), max_size=12)
numbers = st.integers(min_value=0, max_value=10**12)
pictures = st.builds(Key, names.filter(bool), names, st.text("0123456789abcdef", min_size=1, max_size=8), st.booleans())
redrawn = st.builds(
    lambda key, background: replace(key, background=background), pictures, st.none() | numbers | pictures
)
keys = st.builds(lambda key, slot: replace(key, slot=slot), redrawn, st.none() | numbers)


@given(keys)
def test_parse_undoes_str(key):
    assert Key.parse(str(key)) == key


@given(st.from_regex(r"[ab~]{1,3}/[ab~on]{0,4}@[0-9a-f]{1,3}(:flip)?(~noise[0-9]+|~on~[ab]/[ab]@1(:flip)?)?(#[0-9]+)?"))
def test_str_undoes_parse_of_every_text_that_is_taken(text):
    try:
        key = Key.parse(text)
    except DataError:
        return
    assert str(key) == text


@given(keys)
def test_the_picture_is_the_key_without_its_slot(key):
    assert key.picture == replace(key, slot=None)
    assert picture_of(str(key)) == str(key.picture)
    if key.slot is not None:
        assert slot_of(str(key)) == key.slot


def test_a_key_is_read_as_its_drawing_shows():
    assert Key.parse("hat/red 3@5f0e1c2a:flip~noise4#7") == Key("hat", "red 3", "5f0e1c2a", True, 4, 7)
    other = Key("hat", "red 1", "77ab01cd")
    assert Key.parse("hat/red 3@5f0e1c2a~on~hat/red 1@77ab01cd#0") == Key("hat", "red 3", "5f0e1c2a", False, other, 0)


@pytest.mark.parametrize(
    "text", ["", "train/dog/3", "test-00042", "a/b", "a/b@", "a/b@12#", "a/b@12#x", "a/b@12#01", "a/b@12~noise",
             "a/b@XY", "/b@12", "a/b@12:flop", "a/b@12~on~c#1", "a/b@12#1~noise2", "a/b@12#1\n", "a/b@12#٣"],
)  # fmt: skip
def test_other_texts_are_no_keys(text):
    with pytest.raises(DataError, match="is no key of a concept's picture"):
        Key.parse(text)


@pytest.mark.parametrize(
    "parts", [("a/b", "c", "12"), ("", "c", "12"), ("a", "c#1", "12"), ("a", "c", "12~noise3"), ("a", "c", ""),
              ("a", "c", "12", False, -1), ("a", "c", "12", False, None, -1),
              ("a", "c", "12", False, Key("a", "d", "34", slot=1))],
)  # fmt: skip
def test_parts_that_no_key_holds_are_refused(parts):
    with pytest.raises(DataError, match="cannot name a concept"):
        Key(*parts)


@pytest.mark.parametrize("name", ["train/dog/3", "7", "a"])
def test_plain_names_stand_for_their_pixels_and_have_no_slot(name):
    assert picture_of(name) == name and picture_of(f"{name}#12") == name and slot_of(f"{name}#12") == 12
    with pytest.raises(DataError, match="has no slot"):
        slot_of(name)
