"""The README's examples of new poisons: each is one file that is found, built, and keeps its budget."""

import re
from pathlib import Path

import pytest
import torch
from poisons.diffusion.photos import pictures

import poisonshield.poisons
import poisonshield.poisons.diffusion
from poisonshield.batch import Batch
from poisonshield.poisons.diffusion.attack.manifest import check_budget
from poisonshield.poisons.release.measured import MeasuredBudget
from poisonshield.poisons.release.recipe import load_recipe, save_recipe
from poisonshield.registry import Registry
from poisonshield.runs import read_experiment

README = Path(poisonshield.poisons.__file__).with_name("README.md").read_text()


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Saves an example as one file where its half is looked for, and gives its class."""

    def save(name, package):
        (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if f'"{name}"' in block]
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
        return Registry(package.__name__, kind="poison").get(name)

    return save


def test_example_for_classifiers_is_found_and_becomes_a_recipe(saved, tmp_path):
    cls = saved("stripes", poisonshield.poisons)
    poison = cls(cls.Config(), num_classes=3, image_size=(8, 8), seed=0)
    batch = Batch(tuple("abcdef"), torch.full((6, 3, 8, 8), 0.5), y=torch.arange(6) % 3)
    released = poison.apply(batch).x
    assert (released - (batch.x * 255).round() / 255).abs().max() == pytest.approx(8 / 255)
    assert torch.equal(released[0], released[3]) and not torch.equal(released[0], released[1])
    budget = MeasuredBudget(poison)
    budget.add(batch, released)
    assert budget.record()["linf_levels"] == 8
    path = save_recipe(poison, tmp_path / "stripes.poison.safetensors", classes=("x", "y", "z"), data="0" * 64)
    again = load_recipe(path, classes=("x", "y", "z"), image_size=(8, 8))
    assert torch.equal(again.apply(batch).x, released)


@pytest.mark.parametrize(
    ("name", "package", "config", "settings"),
    [
        ("stripes", poisonshield.poisons, "poison/lsp_cifar10_mini", "stripes"),
        ("flat", poisonshield.poisons.diffusion, "invert/szt_rendered", "{name: flat, eps_levels: 6}"),
    ],
)
def test_the_name_of_an_example_works_in_a_config(saved, name, package, config, settings):
    saved(name, package)
    assert read_experiment(config, [f"data.poison={settings}"]).poison_label == name


def test_example_for_diffusion_models_is_found_and_raises_what_it_says(saved, fitted):
    cls = saved("flat", poisonshield.poisons.diffusion)
    images = pictures(2)
    poison = cls(cls.Config(eps_levels=6, steps=12), model=fitted)
    changed = poison.perturb(images)
    assert all(3 < check_budget(poison, key, x, changed[key])["max"] <= 6 for key, x in images.items())
    before, after = (poison.measure(x, draws=2) for x in (images, changed))
    assert all(after[key] > before[key] + 0.1 * abs(before[key]) for key in images)
