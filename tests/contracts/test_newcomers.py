"""A new thing is one file: each example of CONTRIBUTING.md, alone in a copy of the package, is used and tested there.

All of them are written into one copy and no other line is. A config or a command then uses each by its name, and the
contract tests find it. The copy's own tests run in a process that knows the copy alone.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
EXAMPLES = dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", TEXT, re.DOTALL))

# By kind: the example's name, and the contract tests that have to find it.
NEWCOMERS = {
    "poison": ("tint", "test_poisons.py"),
    "diffusion poison": ("haze", "test_poisons.py"),
    "defense": ("view_noise", "test_methods_and_defenses.py"),
    "purifier": ("pixelate", "test_purifiers.py"),
    "mask": ("vivid", "test_masks.py"),
    "method": ("bare_contrast", "test_methods_and_defenses.py"),
    "inversion": ("anchored_inversion", "test_inversions.py"),
    "evaluation": ("dead_features", "test_evaluations.py"),
    "attack": ("momentum", "test_attacks.py"),
    "op": ("halve", "test_ops.py"),
}
# What else looks at every file, or at everything that a folder holds.
LOOKS_AT_ALL = ("tests/test_floors.py", "tests/ops/test_ops_readme.py", "tests/evals/test_evaluate_settings.py")

QUICK = ["engine.device=cpu", "engine.log_every_steps=1", "engine.max_steps=2"]
COMMANDS = {
    "poison": ["poison", "poison/lsp_cifar10_mini", "data.poison={name: tint, eps: 6/255}", "release.format=recipe",
               "run.dir=tint"],
    "train": ["train", "defend/vespr_cifar10_mini", *QUICK, "method={name: bare_contrast, temperature: 0.5}",
              "data.poison={name: tint, eps: 6/255}", "model.widths=[8,8,8,8]", "run.dir=run",
              "defenses=[{name: pixelate, cell: 4}, {name: view_noise, sigma: 2/255},"
              " {name: vespr, attack: {name: momentum, steps: 1}}]",
              "evaluate={robust: {attack: {name: momentum, steps: 1}, samples: 50}, linear: null, alignment: null}"],
    "evaluate": ["evaluate", "run", "evaluate.dead_features.least=1e-3", "evaluate.robust.attack.keep=0.5"],
    "invert": ["train", "invert/szt_rendered", *QUICK, "method.name=anchored_inversion", "method.anchor=0.1",
               "data.count=2", "data.batch_size=2", "data.masks=null", "data.mask_reference=file",
               "data.poison={name: haze, eps_levels: 6, steps: 2}", "defenses.0.purifier=pixelate:4",
               "defenses.0.mask={name: vivid, least: 0.3}", "generate.count=1", "generate.steps=1", "run.dir=word"],
    "masks": ["masks", "photos", "--mask", "vivid:0.3", "--size", "32", "--out", "masked"],
    "protect": ["protect", "photos", "--method", "haze", "--steps", "2", "--out", "protected"],
}  # fmt: skip
# What the page itself tells people to type: its trainings are read to the last setting.
TYPED = [shlex.split(line)[1:] for line in re.findall(r"^ {4}(poisonshield train .*)$", TEXT, re.MULTILINE)]
COMMANDS |= {" ".join(words): list(dict.fromkeys([*words, "--print-config"])) for words in TYPED}
# One process for all, since each start costs seconds.
RUN_ALL = """
import json, sys, traceback
import poisonshield
from typer.testing import CliRunner
from poisonshield.cli import app
from poisonshield.ops import halve
import torch
said = {"package": poisonshield.__file__, "op": halve(torch.tensor([8.0]), times=3).item()}
for name, arguments in json.load(open("commands.json")).items():
    done = CliRunner().invoke(app, arguments)
    told = "".join(traceback.format_exception(*done.exc_info)) if done.exit_code else ""
    said[name] = [done.exit_code, done.output + told]
json.dump(said, open("said.json", "w"))
"""


def mirror(source, target):
    """A folder again: modules are copied, since they look around from where they lie, and data is linked."""
    for path in source.rglob("*"):
        if path.is_dir() or path.suffix in (".so", ".pyc") or path == Path(__file__):
            continue
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".py":
            shutil.copy(path, place)
        else:
            place.symlink_to(path)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package and its tests, with the examples of CONTRIBUTING.md and no line more."""
    root = tmp_path_factory.mktemp("copy")
    for folder in ("poisonshield", "tests"):
        mirror(ROOT / folder, root / folder)
    for name in ("configs", "launch", "csrc", "pyproject.toml", "README.md", "CONTRIBUTING.md"):
        (root / name).symlink_to(ROOT / name)
    for path, code in EXAMPLES.items():
        (root / path).parent.mkdir(exist_ok=True)  # an op is a folder; every other folder is there
        (root / path).write_text(code)
    return root


def python(copy, *arguments, cwd=None):
    """The finished process of a Python that knows the copy alone."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(copy)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd or copy, env=environment, capture_output=True, text=True
    )


def pytest_in(copy, *arguments):
    """{test: PASSED, SKIPPED, ...} of the copy's tests; fails with their words if one of them does."""
    done = python(copy, "-m", "pytest", "-v", "-p", "no:cacheprovider", *arguments)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return dict(re.findall(r"^(tests/\S+) (PASSED|SKIPPED)", done.stdout, re.MULTILINE))


@pytest.fixture(scope="module")
def found(copy):
    """What the contract tests of every kind say of the newcomers, and of the package with them in it."""
    names = [name for name, _ in NEWCOMERS.values()]
    return pytest_in(
        copy, "tests/contracts", "tests/defenses/test_purifiers.py", *LOOKS_AT_ALL,
        "-k", " or ".join([*names, *(Path(path).stem for path in LOOKS_AT_ALL), "which_defenses", "has_an_example"]),
    )  # fmt: skip


@pytest.fixture(scope="module")
def used(copy, tmp_path_factory):
    """(folder, {command: what it said}) of every command in COMMANDS, one after the other."""
    folder = tmp_path_factory.mktemp("used")
    (folder / "photos").mkdir()
    for i in range(2):
        x = torch.full((32, 32, 3), 120, dtype=torch.uint8)
        x[6 + i : 20, 8:26] = torch.tensor([220, 40, 30], dtype=torch.uint8)
        Image.fromarray(x.numpy()).save(folder / "photos" / f"{i}.png")
    (folder / "commands.json").write_text(json.dumps(COMMANDS))
    done = python(copy, "-c", RUN_ALL, cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = json.loads((folder / "said.json").read_text())
    assert Path(said["package"]).is_relative_to(copy)
    for name in COMMANDS:
        assert said[name][0] == 0, f"{name}: {said[name][1][-3000:]}"
    return folder, said


def read(path):
    return json.loads(path.read_text())


def test_every_kind_has_an_example_at_the_path_where_its_name_is_looked_for():
    names = {Path(path).stem for path in EXAMPLES} | {Path(path).parent.name for path in EXAMPLES}
    assert {name for name, _ in NEWCOMERS.values()} <= names
    assert {Path(path).name for path in EXAMPLES if "/ops/" in path} == {
        "reference.py", "__init__.py", "triton_kernels.py"
    }  # fmt: skip
    assert not [path for path in EXAMPLES if (ROOT / path).exists()]


@pytest.mark.parametrize("kind", NEWCOMERS)
def test_the_contract_tests_find_it_and_it_keeps_the_contract(kind, found):
    name, file = NEWCOMERS[kind]
    outcomes = [outcome for test, outcome in found.items() if f"/{file}::" in test and name in test.partition("::")[2]]
    assert outcomes.count("PASSED") >= 4 and outcomes.count("SKIPPED") <= 1, found


def test_floors_readmes_and_settings_hold_with_all_of_them(found):
    for file in LOOKS_AT_ALL:
        assert [outcome for test, outcome in found.items() if test.startswith(file)].count("PASSED") > 3, file
    assert found["tests/contracts/test_ops.py::test_every_op_has_an_example"] == "PASSED"


def test_poison_is_written_from_a_config(used):
    folder, said = used
    assert (folder / "tint" / "tint.poison.safetensors").is_file()
    row = read(folder / "run" / "results.json")[0]
    assert row["poison"] == "tint" and "eps: 6/255" in (folder / "run" / "config.yaml").read_text()


def test_method_defense_purifier_and_attack_train_from_a_config(used):
    folder, _ = used
    row = read(folder / "run" / "results.json")[-1]
    assert (row["method"], row["defense"], row["steps"]) == ("bare_contrast", "pixelate+view_noise+vespr", 2)
    config = (folder / "run" / "config.yaml").read_text()
    assert "name: momentum" in config and "keep: 1.0" in config and "temperature: 0.5" in config


def test_evaluation_gives_its_number_and_takes_its_settings_and_an_attack(used):
    folder, said = used
    measured = read(folder / "run" / "evaluation.json")
    assert 0 <= measured["dead_features"]["dead_features"] <= 100 and measured["robust"]["robust_top1"] is not None
    assert measured["settings"]["dead_features"] == {"least": 1e-3}
    assert measured["settings"]["robust"]["attack"]["keep"] == 0.5
    assert re.search(r"^dead_features +[\d.]+ % features: dead features$", said["evaluate"][1], re.MULTILINE)
    assert (folder / "run" / "probes.png").is_file()


def test_inversion_diffusion_poison_purifier_and_mask_train_a_word_from_a_config(used):
    folder, _ = used
    (row,) = read(folder / "word" / "results.json")
    assert (row["poison"], row["steps"]) == ("haze", 2) and 0 < row["mask_iou"] <= 1
    assert "pixelate cell 4" in row["defense"] and "vivid least 0.3" in row["defense"]
    assert "anchor: 0.1" in (folder / "word" / "config.yaml").read_text()
    assert list((folder / "word" / "export").glob("*/learned_embeds.safetensors"))


def test_mask_with_a_setting_and_diffusion_poison_are_known_to_their_commands(used):
    folder, _ = used
    assert len(list((folder / "masked" / "concepts").rglob("*.mask.png"))) == 2
    assert len(list((folder / "protected").rglob("*.png"))) == 2


def test_what_the_page_tells_people_to_type_is_a_config(used):
    said = {" ".join(words): used[1][" ".join(words)][1] for words in TYPED}
    for name in ("view_noise", "pixelate", "vivid", "bare_contrast", "anchored_inversion", "momentum"):
        assert [text for typed, text in said.items() if name in typed and f"name: {name}" in text], name


def test_op_is_a_public_function_and_its_kernel_is_compiled(copy, used):
    assert used[1]["op"] == 1.0
    done = python(copy, "tests/ops/aot.py", "halve")
    assert done.returncode == 0 and '"case": "halves"' in done.stdout, done.stderr[-3000:]


def test_examples_are_formatted_and_clean(copy):
    pytest.importorskip("ruff")
    for command in (["check"], ["format", "--check"]):
        done = python(copy, "-m", "ruff", *command, "--no-cache", *EXAMPLES)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_no_other_test_has_to_know_of_them(copy):
    """What scans folders, and what trains, with everything in it: minutes. README's own tables are left out."""
    pytest_in(
        copy, "tests/contracts", "tests/attacks", "tests/config", "tests/defenses", "tests/evals", "tests/methods",
        "tests/poisons", "tests/reports", "tests/commands/test_train.py", "tests/commands/test_evaluate.py",
        "tests/commands/test_masks_command.py", "tests/test_config.py", "tests/test_experiments.py",
        "tests/test_mistakes.py", "tests/test_methods_resume.py", "tests/test_methods_on_ranks.py",
    )  # fmt: skip
