"""The README's examples of new poisons: each is one file that is found, built, and keeps its budget."""

import re
from pathlib import Path

import pytest
import torch
from poisons.diffusion.photos import pictures

import poisonshield.poisons
import poisonshield.poisons.diffusion
from poisonshield.batch import Batch
from poisonshield.poisons.release.recipe import load_recipe, save_recipe
from poisonshield.registry import Registry

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
    path = save_recipe(poison, tmp_path / "stripes.poison.safetensors", classes=("x", "y", "z"), data="0" * 64)
    again = load_recipe(path, classes=("x", "y", "z"), image_size=(8, 8))
    assert torch.equal(again.apply(batch).x, released)


def test_example_for_diffusion_models_is_found_and_raises_what_it_says(saved, fitted):
    cls = saved("flat", poisonshield.poisons.diffusion)
    images = pictures(2)
    poison = cls(cls.Config(eps_levels=6, steps=12), model=fitted)
    changed = poison.perturb(images)
    assert all(0 < (changed[key].int() - x.int()).abs().max() <= 6 for key, x in images.items())
    before, after = (poison.measure(x, draws=2) for x in (images, changed))
    assert all(after[key] > before[key] for key in images)
