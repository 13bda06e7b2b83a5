"""Config files: merging, overrides, and every complaint with its file, line and way out."""

from typing import Annotated, ClassVar

import pytest
from pydantic import Field

from poisonshield.config import Checker, Choice, From, Number, Pixels, Settings, Tree, dump, load_tree
from poisonshield.errors import ConfigError
from poisonshield.registry import Registry


class Inner(Settings):
    size: int = 3


class Demo(Settings):
    eps: Pixels = 4 / 255
    steps: int = 10
    rate: Number = 0.5
    inner: Inner = Inner()


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return path


def check(tree, schema=Demo):
    checker = Checker(tree)
    out = checker.settings(schema, (), tree.values, owner="demo")
    checker.finish()
    return out


def test_child_extends_parent_and_overrides_win(tmp_path):
    write(tmp_path, "base.yaml", "eps: 8/255\nsteps: 3\ninner:\n  size: 5\n")
    child = write(tmp_path, "child.yaml", "extends: base.yaml\nsteps: 4\n")
    config = check(load_tree(child, ["inner.size=7"]))
    assert (config.eps, config.steps, config.inner.size) == (8 / 255, 4, 7)


def test_fraction_is_kept_in_the_record(tmp_path):
    tree = load_tree(write(tmp_path, "a.yaml", "eps: 8/255\n"))
    assert dump(check(tree), tree.values) == {"eps": "8/255", "steps": 10, "rate": 0.5, "inner": {"size": 3}}


def test_unknown_key_names_file_line_and_nearest(tmp_path):
    path = write(tmp_path, "a.yaml", "steps: 1\ninner:\n  sise: 2\n")
    with pytest.raises(ConfigError) as err:
        check(load_tree(path))
    assert f"{path}:3: inner.sise is not a setting of inner. Did you mean size?  Settings: size" in str(err.value)


class Absent(Settings):
    inner: Inner | None = None


def test_unknown_key_of_a_block_that_may_be_null_names_the_nearest_too(tmp_path):
    path = write(tmp_path, "a.yaml", "inner:\n  sise: 2\n")
    with pytest.raises(ConfigError, match=r"inner.sise is not a setting of inner. Did you mean size\?  Settings: size"):
        check(load_tree(path), Absent)


def test_all_problems_come_at_once(tmp_path):
    path = write(tmp_path, "a.yaml", "eps: 4\nsteps: many\nstep: 1\n")
    with pytest.raises(ConfigError) as err:
        check(load_tree(path))
    lines = str(err.value).splitlines()
    assert len(lines) == 3
    assert "a.yaml:1: eps: 4 is outside [0, 1]: budgets are in pixel units. Did you mean 4/255?" in lines[0]
    assert "a.yaml:2: steps:" in lines[1] and "'many'" in lines[1]
    assert "a.yaml:3: step is not a setting of demo. Did you mean steps?" in lines[2]


def test_fraction_with_zero_below_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="divides by zero"):
        check(load_tree(write(tmp_path, "a.yaml", "eps: 8/0\n")))


def test_override_into_a_list_entry(tmp_path):
    path = write(tmp_path, "a.yaml", "defenses:\n  - name: vespr\n    eps: 8/255\n")
    tree = load_tree(path, ["defenses.0.eps=2/255"])
    assert tree.values["defenses"] == [{"name": "vespr", "eps": "2/255"}]
    assert tree.where(("defenses", 0, "eps")) == "command line: defenses.0.eps=2/255"


def test_override_outside_a_list_is_refused(tmp_path):
    path = write(tmp_path, "a.yaml", "defenses: []\n")
    with pytest.raises(ConfigError, match="defenses.0 does not exist; the list has 0 entries"):
        load_tree(path, ["defenses.0.eps=1/255"])


def test_override_without_equals_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="Write key.path=value"):
        load_tree(write(tmp_path, "a.yaml", "seed: 1\n"), ["seed"])


@pytest.mark.parametrize("how", ["override", "extends"])
def test_changed_name_starts_its_block_afresh(tmp_path, how):
    base = write(tmp_path, "base.yaml", "method:\n  name: simclr\n  temperature: 0.2\n")
    if how == "override":
        tree = load_tree(base, ["method.name=supervised"])
    else:
        tree = load_tree(write(tmp_path, "b.yaml", "extends: base.yaml\nmethod:\n  name: supervised\n"))
    assert tree.values == {"method": {"name": "supervised"}}


def test_same_name_keeps_its_block(tmp_path):
    base = write(tmp_path, "base.yaml", "method:\n  name: simclr\n  temperature: 0.2\n")
    assert load_tree(base, ["method.name=simclr"]).values["method"]["temperature"] == 0.2


def test_missing_file_and_missing_parent_are_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml does not exist"):
        load_tree(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="named by `extends:`"):
        load_tree(write(tmp_path, "a.yaml", "extends: gone.yaml\n"))


def test_circular_extends_is_refused(tmp_path):
    write(tmp_path, "a.yaml", "extends: b.yaml\n")
    with pytest.raises(ConfigError, match="leads back"):
        load_tree(write(tmp_path, "b.yaml", "extends: a.yaml\n"))


def test_key_that_stands_twice_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"a.yaml:2: seed stands twice"):
        load_tree(write(tmp_path, "a.yaml", "seed: 1\nseed: 2\n"))


def test_broken_yaml_names_file_and_line(tmp_path):
    with pytest.raises(ConfigError, match=r"a.yaml:2: not valid YAML: .*expected"):
        load_tree(write(tmp_path, "a.yaml", "a: [1\n"))


class FakeRegistry:
    kind = "defense"

    class Thing:
        Config: ClassVar = Demo

    def names(self):
        return ["vespr"]

    def get(self, name):
        assert name == "vespr"
        return self.Thing


def test_choice_picks_the_class_and_checks_its_settings(tmp_path):
    path = write(tmp_path, "a.yaml", "defenses:\n  - name: vespr\n    step: 3\n  - name: vesper\n  - {}\n")
    checker = Checker(load_tree(path))
    for i, block in enumerate(checker.tree.values["defenses"]):
        checker.choice((FakeRegistry(),), ("defenses", i), block)
    with pytest.raises(ConfigError) as error:
        checker.finish()
    problems = str(error.value).splitlines()
    assert len(problems) == len(checker.problems) == 3
    assert "a.yaml:3: defenses[0].step is not a setting of vespr. Did you mean steps?" in problems[0]
    assert "a.yaml:4: defenses[1].name: 'vesper' is not a defense. Did you mean vespr?" in problems[1]
    assert "defenses[2] needs `name:`" in problems[2]


class Holder(Settings):
    """A Config with a setting that picks a class."""

    poison: Annotated[Choice, From(Registry("poisonshield.poisons", kind="poison"))] = Field(
        "lsp", validate_default=True
    )


def test_a_setting_may_pick_a_class_by_name_or_by_block_and_is_written_down_whole():
    assert Holder().poison.name == "lsp"
    holder = Holder.model_validate({"poison": {"name": "regions", "eps": "4/255"}})
    assert holder.poison.cls.name == "regions" and holder.poison.config.eps == 4 / 255
    written = dump(holder, {"poison": {"name": "regions", "eps": "4/255"}})
    assert written["poison"]["name"] == "regions" and written["poison"]["eps"] == "4/255"
    assert Holder.model_validate(written).poison == holder.poison


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("regoins", "Did you mean regions"),
        ({"name": "regions", "epz": 1}, "epz is not a setting of regions.*Did you mean eps"),
        (3, "a block with `name:`"),
    ],
)
def test_a_picked_class_is_refused_in_words(value, told):
    tree = Tree({"poison": value}, {("poison",): "a.yaml:7"})
    checker = Checker(tree)
    assert checker.settings(Holder, (), tree.values, owner="a holder") is None
    with pytest.raises(ConfigError, match=rf"a.yaml:7: poison: .*{told}"):
        checker.finish()


class Newer(Settings):
    """A Config whose setting had another name."""

    renamed: ClassVar[dict[str, str]] = {"alpha": "attack.step_size"}
    step_size: int = 1


def test_a_setting_of_an_earlier_version_is_told_its_new_name():
    checker = Checker(Tree({"alpha": 2}, {("alpha",): "old.yaml:3"}))
    assert checker.settings(Newer, ("defenses", 0), {"alpha": 2}, owner="vespr") is None
    with pytest.raises(ConfigError, match=r"defenses\[0\].alpha is called defenses\[0\].attack.step_size now"):
        checker.finish()


@pytest.mark.parametrize(
    ("child", "overrides", "later"),
    [
        ("b: {c: 3}\n", [], False),  # nothing changed
        ("a: 1\n", [], False),  # said again
        ("a: 2\n", [], True),
        ("a: 2\nb: {c: 3}\n", [], False),
        ("a: 2\nb: null\n", [], False),
        ("", ["a=2"], True),
        ("a: 2\nb: {c: 3}\n", ["a=1"], True),
        ("", ["a=2", "b.c=2"], False),  # said on purpose, though it is what stood there
        ("", ["b={c: 2}", "a=2"], False),
        ("", ["b=null", "a=2"], False),
    ],
)
def test_a_tree_knows_what_was_changed_after_something_else_was_said(tmp_path, child, overrides, later):
    write(tmp_path, "base.yaml", "a: 1\nb: {c: 2}\n")
    tree = load_tree(write(tmp_path, "child.yaml", "extends: base.yaml\n" + child), overrides)
    assert tree.is_later(("a",), ("b",)) == later
