"""A stranger's YAML: what it may grow to is bounded, and whatever is refused is told with file and line."""

import os
import time

import pytest

from poisonshield.config import load_tree
from poisonshield.config import reading as module
from poisonshield.config.reading import MAX_BYTES, MAX_DEPTH, MAX_VALUES
from poisonshield.config.tree import MAX_PARENTS
from poisonshield.errors import ConfigError

LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"seed: 1\nname: caf\xe9\n", r"a.yaml:2: the byte 0xe9 is not UTF-8"),  # faults C: a config in Latin-1
        ("name: a\n".encode("utf-16"), r"a.yaml:1: the byte 0xff is not UTF-8"),
        (b"seed: 1\nname: a\0b\n", r"a.yaml:2: not valid YAML: the character U\+0000"),
        (b'seed: 1\nname: "a\\0b"\n', r"a.yaml:2: a text holds the character U\+0000"),
        (b'seed: 1\nname: "\\ud800"\n', r"a.yaml:2: a text holds the character U\+D800"),
        (b"seed: 1\nname: \x1b[31m\n", r"a.yaml:2: not valid YAML: the character U\+001B"),
        (b"seed: 18446744073709551616\n", r"a.yaml:1: 18446744073709551616 is beyond 64 bits"),  # faults C: a seed
        (b"a: 1\nseed: -9223372036854775809\n", r"a.yaml:2: -9223372036854775809 is beyond 64 bits"),
        (b"seed: " + b"9" * 5000, r"a.yaml:1: 9+\.\.\. \(5,000 characters\) is no whole number"),
        (b"seed: 0x" + b"f" * 5000, r"a.yaml:1: .*is beyond 64 bits"),
        (b"a: " + b"[" * 2000, rf"a.yaml:1: not valid YAML: tables or lists stand within .* {MAX_DEPTH} deep"),
        (b"a: &a [*a]\n", r"a.yaml:1: tables or lists stand within each other"),
        (b"a: &a {b: *a}\n", r"a.yaml:1: tables or lists stand within each other"),
        (LAUGHS.encode(), rf"a.yaml:\d: more than {MAX_VALUES:,} values, with every alias"),  # faults C: billion laughs
        (b"a: 1\nb: !!python/object/apply:os.system [true]\n", r"a.yaml:2: the tag .*os.system is not read"),
        (b"a: 1\nb: !!python/object:os.x {a: 1}\n", r"a.yaml:2: the tag .* is not read"),
        (b"a: 1\nb: !!set {a, b}\n", r"a.yaml:2: the tag .*set is not read"),
        (b"a: 1\nb: !mine 3\n", r"a.yaml:2: the tag !mine is not read"),
        (b"a: !!binary aGk=\n", r"a.yaml:1: the tag .*binary is not read"),
        (b"a: !!int many\n", r"a.yaml:1: many is no whole number"),
        (b"a: !!bool many\n", r"a.yaml:1: many is no value that can be read"),
        (b"a: 1\n[1, 2]: 3\n", r"a.yaml:2: a key is a name"),
        (b"a: 1\n? {x: 1}\n: 3\n", r"a.yaml:2: a key is a name"),
        (b'a: "\\U99999999"\n', r"a.yaml:1: not valid YAML"),
        (b"%YAML " + b"9" * 5000 + b".1\n---\na: 1\n", r"a.yaml:1: not valid YAML"),
        (b"a: 1\n---\nb: 2\n", r"a.yaml:2: not valid YAML"),
        (b"extends: [b.yaml]\n", r"a.yaml:1: extends names one file, not a list"),
        (b"extends: " + b"b" * 5000, r"does not exist \(named by"),
        (b"#" * (MAX_BYTES + 1), rf"larger than {MAX_BYTES:,} bytes"),
    ],
)
def test_a_hostile_config_is_refused_with_file_and_line(tmp_path, content, told):
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=told) as err:
        load_tree(path)
    assert len(str(err.value)) < 2000 + 5000


def test_a_config_that_is_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match=r"config .*a.yaml is no plain file"):
        load_tree(tmp_path / "a.yaml")


def test_a_chain_of_parents_is_bounded(tmp_path):
    for i in range(MAX_PARENTS + 2):
        (tmp_path / f"{i}.yaml").write_text(f"extends: {i + 1}.yaml\n")
    with pytest.raises(ConfigError, match=f"leads through {MAX_PARENTS} files"):
        load_tree(tmp_path / "0.yaml")


@pytest.mark.parametrize(
    "value", ["[" * 2000, "9" * 5000, '"\\U99999999"', "!!python/name:os.system x", "a: b: c", "\0"]
)
def test_an_override_is_read_by_the_same_rules(tmp_path, value):
    (tmp_path / "a.yaml").write_text("seed: 1\n")
    with pytest.raises(ConfigError, match=r"seed="):
        load_tree(tmp_path / "a.yaml", [f"seed={value}"])


@pytest.mark.parametrize("key", [".".join("a" * 1000), "defenses." + "9" * 5000, "defenses.²"])
def test_a_path_that_leads_nowhere_is_worded(tmp_path, key):
    (tmp_path / "a.yaml").write_text("defenses: [{name: vespr}]\n")
    with pytest.raises(ConfigError, match="deep|does not exist"):
        load_tree(tmp_path / "a.yaml", [f"{key}=1"])


def test_aliases_merge_keys_and_dates_stay_what_people_mean(tmp_path):
    (tmp_path / "a.yaml").write_text("day: 2001-13-45\nattack: &one {steps: 3}\nother: *one\nmark: =\nempty:\n")
    attack = {"steps": 3}
    assert load_tree(tmp_path / "a.yaml").values == {
        "day": "2001-13-45", "attack": attack, "other": attack, "mark": "=", "empty": None,
    }  # fmt: skip


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfseed: 1\n")
    assert load_tree(tmp_path / "a.yaml").values == {"seed": 1}


def test_the_largest_config_is_read_within_seconds(tmp_path):
    """The most values that are taken, over a parent with the same keys, each place compared once."""
    lines = "".join(f"key{i}: 1\n" for i in range(module.MAX_VALUES - 10))
    (tmp_path / "base.yaml").write_text(lines)
    (tmp_path / "a.yaml").write_text("extends: base.yaml\n" + lines)
    start = time.perf_counter()
    assert len(load_tree(tmp_path / "a.yaml").values) == module.MAX_VALUES - 10
    assert time.perf_counter() - start < 60
