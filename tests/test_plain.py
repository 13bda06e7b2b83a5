"""What a stranger's text can do to a terminal: nothing."""

import pytest

from poisonshield.plain import is_plain, plain, plain_values


@pytest.mark.parametrize("text", ["", "cat", "Käuzchen", "猫 🐈", "a\u200db", "किताब", "a\u00adb", "it's [bold]"])
def test_names_of_people_stay_as_they_are(text):
    assert is_plain(text) and plain(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\x9b2J", "\\x9b2J"),
        ("a\u202egpj.exe", "a\\u202egpj.exe"),
        ("a\u2028b\x00\x7f", "a\\u2028b\\x00\\x7f"),
        ("\ud800", "\\ud800"),
    ],
)
def test_what_steers_a_terminal_is_written_out(text, shown):
    assert not is_plain(text) and plain(text) == shown
    shown.encode()


def test_texts_within_json_are_written_out_too():
    assert plain_values({"a\x1b": ["b\x07", {"c": 1, "d": None}]}) == {"a\\x1b": ["b\\x07", {"c": 1, "d": None}]}
