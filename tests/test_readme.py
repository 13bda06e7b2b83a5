"""What README promises: its example poison works from one file, its commands exist, its files are there."""

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import poisonshield.poisons
from poisonshield.batch import Batch
from poisonshield.build import METHODS, POISONS, read_run
from poisonshield.cli import app
from poisonshield.poisons._measured import MeasuredBudget

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def stripes(tmp_path, monkeypatch):
    """The example, saved as one file where poisons are looked for."""
    (code,) = [b for b in BLOCKS if "class Stripes(Poison)" in b]
    (tmp_path / "stripes.py").write_text(code)
    monkeypatch.setattr(poisonshield.poisons, "__path__", [*poisonshield.poisons.__path__, str(tmp_path)])
    return "stripes"


def test_example_poison_works_in_a_config_and_keeps_its_budget(stripes):
    run = read_run(ROOT / "configs/poison/lsp_cifar10_mini.yaml", [f"data.poison={stripes}"])
    assert run.poison_label == "stripes"
    poison = POISONS.get(stripes)(run.poison.config, num_classes=3, image_size=(8, 8), seed=0)
    x = torch.randint(0, 256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(0)) / 255
    batch = Batch(tuple("abcdef"), x, y=torch.arange(6) % 3)
    budget = MeasuredBudget(poison)
    budget.add(batch, poison.apply(batch).x)
    assert budget.record()["linf_levels"] == 8
    delta = poison.delta(batch)
    assert torch.equal(delta[0], delta[3]) and not torch.equal(delta[0], delta[1])


def test_library_example_runs():
    (code,) = [b for b in BLOCKS if "import ShardStream" in b]
    names = {}
    exec(code, names)
    assert {"PGD", "ShardStream", "open_dataset", "infonce"} <= names.keys()


def test_every_command_and_file_that_is_named_exists():
    for command in set(re.findall(r"^ {4}poisonshield (\w+(?: import| verify)?)", README, re.MULTILINE)):
        assert CliRunner().invoke(app, [*command.split(), "--help"]).exit_code == 0, command
    paths = set(re.findall(r"(?:configs|launch)/[\w/.]+\w", README))
    assert len(paths) > 5
    assert not [p for p in paths if not (ROOT / p).exists()]
    configs = set(re.findall(r"`((?:defend|evaluate|grid|poison)/\w+)`", README))
    assert configs and not [c for c in configs if not (ROOT / "configs" / f"{c}.yaml").exists()]


def test_every_poison_and_method_is_in_a_table():
    tables = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    assert set(tables) == {*POISONS.names(), *METHODS.names()}


def test_test_command_is_the_one_that_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    install, test = re.search(r"^ {4}(pip install '\.\[test\]') && (pytest)$", README, re.MULTILINE).groups()
    assert ci.rstrip().endswith(test) and "pip install --quiet '.[test]'" in ci and install.endswith("'.[test]'")
