"""The README's examples of a new purifier and a new mask: each is one file that is found and does what it says."""

import re
from pathlib import Path

import pytest
import torch

import poisonshield.defenses
import poisonshield.defenses.diffusion.masks
from poisonshield.batch import Batch
from poisonshield.defenses.diffusion.szt import MASKS
from poisonshield.registry import Registry
from poisonshield.runs import read_experiment

README = Path(poisonshield.defenses.__file__).with_name("README.md").read_text()
CONFIG = "invert/szt_rendered"


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Saves an example as one file where its kind is looked for, and gives its name."""

    def save(name, package):
        (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if f'"{name}"' in block]
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
        return name

    return save


def test_example_purifier_works_in_a_config_alone_and_within_szt(saved):
    halved = saved("halved", poisonshield.defenses)
    assert read_experiment(CONFIG, [f"defenses=[{halved}]", "data.masks=null"]).defense_label == "halved"
    within = read_experiment(CONFIG, [f"defenses.0.purifier={halved}"])
    assert within.defense_label == "szt(halved, t500, mask, mask_floor 0.3, mask_dilate 2)"
    cls, x = Registry("poisonshield.defenses", kind="defense").get(halved), torch.rand(2, 3, 13, 22)
    out = cls(cls.Config()).before(Batch(("a", "b"), x)).x
    assert out.shape == x.shape and torch.equal((out * 255).round() / 255, out)
    assert out.std() < 0.8 * x.std()


def test_example_mask_is_found_in_a_config_and_marks_what_is_bright(saved):
    bright = saved("bright", poisonshield.defenses.diffusion.masks)
    run = read_experiment(CONFIG, [f"defenses.0.mask={bright}", "data.masks=null"])
    assert run.defense_label == "szt(jpeg50, t500, bright, mask_floor 0.3, mask_dilate 2)"
    x = torch.full((1, 3, 16, 16), 0.2)
    x[:, :, 4:9, 5:12] = 0.7
    mask = MASKS.get(bright)()(Batch(("a",), x), None, None)
    assert torch.equal(mask, (x[:, :1] > 0.5).float())
