"""Shipped configs by name: from any working folder, beside files of one's own, with the nearest names for a typo."""

from pathlib import Path

import pytest

from poisonshield.cli import main
from poisonshield.config import configs_folder, find_config, load_tree, shipped_configs
from poisonshield.config import shipped as module
from poisonshield.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
VESPR = CONFIGS / "defend" / "vespr_cifar10_mini.yaml"
SPELLINGS = ("defend/vespr_cifar10_mini", "defend/vespr_cifar10_mini.yaml", "configs/defend/vespr_cifar10_mini.yaml")


def stands_for(found, file):
    """Whether `found` is `file` of the source tree, or its copy in an installed package."""
    return found.relative_to(configs_folder()) == file.relative_to(CONFIGS) and found.read_bytes() == file.read_bytes()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_file_of_the_folder_is_listed_and_found(elsewhere):
    files = {str(p.relative_to(CONFIGS))[: -len(".yaml")]: p for p in CONFIGS.glob("**/*.yaml")}
    assert shipped_configs() == sorted(files) and len(files) > 20
    for name, file in files.items():
        assert stands_for(find_config(name), file)


@pytest.mark.parametrize("name", SPELLINGS)
def test_each_spelling_names_the_same_file_in_any_working_folder(elsewhere, name):
    assert stands_for(find_config(name), VESPR) and stands_for(find_config(Path(name)), VESPR)


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_file_of_ones_own_wins_over_a_shipped_one(elsewhere, name):
    own = elsewhere / name
    own.parent.mkdir(parents=True)
    own.write_text("seed: 7\n")
    assert find_config(name) == Path(name) and load_tree(name).values == {"seed": 7}


def test_a_folder_of_that_name_is_not_taken_for_the_config(elsewhere):
    (elsewhere / "invert" / "szt").mkdir(parents=True)
    assert stands_for(find_config("invert/szt"), CONFIGS / "invert" / "szt.yaml")


def test_parents_are_looked_for_beside_the_shipped_file(elsewhere):
    assert load_tree("defend/vespr_cifar10_mini", ["seed=5"]).values == load_tree(VESPR, ["seed=5"]).values


@pytest.mark.parametrize(
    ("command", "config", "more"),
    [("train", "defend/vespr_cifar10_mini", "--print-config"), ("grid", "grid/vespr_cifar10_mini", "--list")],
)
def test_commands_take_a_name_for_the_path_that_it_stands_for(elsewhere, capsys, command, config, more):
    told = []
    for spelling in (config, str(CONFIGS / f"{config}.yaml")):
        with pytest.raises(SystemExit) as end:
            main([command, spelling, more])
        told.append(capsys.readouterr().out)
        assert end.value.code in (0, None)
    assert told[0] == told[1] and len(told[0].splitlines()) > 10


@pytest.mark.parametrize(
    ("typo", "near"),
    [
        ("defend/vespr_in10", "Did you mean defend/vespr_in100"),
        ("configs/defnd/vespr_in100.yaml", "Did you mean defend/vespr_in100"),
        ("vespr_in100", "Did you mean defend/vespr_in100"),
        ("szt", "Did you mean invert/szt"),
        ("qqq.yaml", "Shipped: base_cifar10, "),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(elsewhere, typo, near):
    with pytest.raises(ConfigError, match=f"{typo} does not exist, .*{near}"):
        find_config(typo)


@pytest.mark.parametrize("path", ["/nowhere/configs/defend/vespr_in100.yaml", "../configs/defend/vespr_in100.yaml"])
def test_a_path_elsewhere_is_not_taken_for_a_name(elsewhere, path):
    with pytest.raises(ConfigError, match="does not exist"):
        find_config(path)


def test_an_installed_package_looks_inside_itself_first(elsewhere, monkeypatch):
    for place, seed in (("site/poisonshield/configs/defend", 1), ("site/configs/defend", 2)):
        folder = elsewhere / place
        folder.mkdir(parents=True)
        (folder / "one.yaml").write_text(f"seed: {seed}\n")
    monkeypatch.setattr(module, "_PACKAGE", elsewhere / "site" / "poisonshield")
    assert configs_folder() == elsewhere / "site/poisonshield/configs"
    assert shipped_configs() == ["defend/one"] and load_tree("defend/one").values == {"seed": 1}


def test_an_installation_without_configs_says_so(elsewhere, monkeypatch):
    monkeypatch.setattr(module, "_PACKAGE", elsewhere / "site" / "poisonshield")
    with pytest.raises(ConfigError, match="Install the package again"):
        find_config("defend/one")
