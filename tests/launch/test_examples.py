"""Every example runs as its first lines say, from another working folder, and what it prints means what it claims."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "launch" / "examples"


def run(name, *arguments, cwd):
    """What an example prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(text):
    return [float(n) for n in re.findall(r"\d+\.\d+", text)]


def test_pgd_lowers_accuracy_within_its_budget(tmp_path):
    told = run("pgd_loop.py", "--train-steps", "60", "--pictures", "128", "--eps-levels", "6", cwd=tmp_path)
    clean, attacked, change = numbers(told)
    assert clean > 20 and attacked < clean - 8 and 5.9 < change <= 6


def test_a_learned_word_fits_unseen_pictures_better_than_the_one_it_started_from(tmp_path):
    told = run("textual_inversion.py", "--steps", "8", "--out", "ring.safetensors", cwd=tmp_path)
    before, after = numbers(told)
    assert after < before - 0.003
    ((word, vector),) = load_file(tmp_path / "ring.safetensors").items()
    assert word == "<ring-thing>" and vector.dim() == 1 and vector.isfinite().all()


def test_vespr_trusts_the_planted_stripes_less_than_supervised_training(tmp_path):
    told = run("vespr_plain.py", "--steps", "40", "--pictures", "800", cwd=tmp_path)
    (_, fooled), (_, less_fooled) = (numbers(line) for line in told.splitlines())
    assert fooled > less_fooled + 15  # on pictures with the stripes; clean accuracy needs more steps


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_each_example_names_its_command_is_tested_here_and_listed_in_the_readme(path):
    source, (command,) = (
        path.read_text(),
        re.findall(rf"^    python launch/examples/{path.name}(.*)$", path.read_text(), re.M),
    )
    assert all(f'"{option}"' in source for option in re.findall(r"--[\w-]+", command))
    assert f'run("{path.name}"' in Path(__file__).read_text()
    assert f"launch/examples/{path.name}" in (ROOT / "launch" / "README.md").read_text()
