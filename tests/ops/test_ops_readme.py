"""The examples of poisonshield/ops/README.md run as they stand, and do what they say."""

import re
from pathlib import Path

import torch

import poisonshield.ops

README = (Path(poisonshield.ops.__file__).parent / "README.md").read_text()
TRANSFORM, ATTACK, INVERSION = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(code):
    names = {}
    exec(code, names)
    return names


def test_the_transform_compresses_some_images():
    names = run(TRANSFORM)
    assert names["images"].shape == (8, 3, 64, 64)
    assert names["image"].shape == (3, 64, 64) and names["label"] == 3


def test_the_attack_raises_the_loss_inside_its_ball():
    names = run(ATTACK)
    loss = lambda v: torch.nn.functional.cross_entropy(names["model"](v), names["y"])  # noqa: E731
    assert loss(names["x_adv"]) > loss(names["x"]) + 0.01
    assert (names["x_adv"] - names["x"]).abs().max() <= 8 / 255 + 1e-6


def test_the_inversion_learns_from_the_concept_alone():
    names = run(INVERSION)
    assert names["loss"] > 0 and names["denoiser"].weight.grad.abs().sum() > 0


def test_the_first_table_names_public_functions():
    """Not all of them must be there: a new op is a folder and no line elsewhere."""
    table = README[: README.index("A backend is chosen")]
    named = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE))))
    assert {"jpeg", "JPEG", "pgd_step_", "masked_diffusion_loss"} <= named <= set(poisonshield.ops.__all__)


def test_every_public_name_explains_itself():
    silent = [name for name in poisonshield.ops.__all__ if not getattr(poisonshield.ops, name).__doc__]
    assert not silent
