"""What the READMEs promise: examples work from one file, commands and their settings exist, files are there."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer.main
from typer.testing import CliRunner

import poisonshield.defenses
import poisonshield.defenses.diffusion.masks
import poisonshield.poisons
import poisonshield.poisons.diffusion
from poisonshield import world
from poisonshield.api import resolve_config
from poisonshield.batch import Batch
from poisonshield.cli import app
from poisonshield.defenses.diffusion.szt import GIVEN, MASKS, SZT
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.poisons.diffusion.attack.manifest import check_budget
from poisonshield.poisons.diffusion.attack.presets import PRESETS, SPELLINGS, resolve
from poisonshield.poisons.release.measured import MeasuredBudget
from poisonshield.runs import read_experiment
from poisonshield.runs.classify import Classify
from poisonshield.runs.invert import Invert

DEFENSES = Classify.defenses_from[0]
DIFFUSION_DEFENSES = Invert.defenses_from[0]
DIFFUSION_POISONS = Invert.poisons
METHODS = Classify.methods
POISONS = Classify.poisons

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "poisonshield"
PLACES = {
    "top": ROOT,
    "launch": ROOT / "launch",
    "methods": PACKAGE / "methods",
    "defenses": PACKAGE / "defenses",
    "poisons": PACKAGE / "poisons" / "diffusion",
}
TEXTS = {name: (place / "README.md").read_text() for name, place in PLACES.items()}
README = TEXTS["top"]
CALLS = [
    shlex.split(line, comments=True)
    for text in TEXTS.values()
    for line in re.findall(r"^ {4}(?:.*&& )?(poisonshield .*)$", text.replace("\\\n", " "), re.MULTILINE)
]
WORD, IMAGES = "invert/szt", "defend/vespr_cifar10_mini"
NAMED = (
    ("top", WORD, "data.masks=alpha defenses.0.mask=alpha"),
    ("top", WORD, "data.masks=null defenses.0.mask=grabcut"),
    ("top", WORD, "defenses.0.t_min=auto"),
    ("defenses", WORD, "defenses.0.purifier=median"),
    ("top", IMAGES, "engine.resume=auto"),
    ("methods", IMAGES, "views.local=4 views.local_size=16"),
    ("methods", IMAGES, "evaluate.watch_pairs=256"),
    ("launch", IMAGES, "model.batch_norm=local"),
)


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def block(name, words):
    (code,) = [b for b in blocks(TEXTS[name]) if words in b]
    return code


def column(text, head):
    """The names in the first column of the table whose head is this."""
    (table,) = re.findall(rf"^\| {re.escape(head)} \|.*\n\|.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [name for row in table.splitlines() for name in re.findall(r"`([\w/.-]+)`", row.split("|")[1])]


@pytest.fixture
def as_file(tmp_path, monkeypatch):
    """Saves an example as one file where its kind is looked for."""

    def save(code, name, package):
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
        return name

    return save


def pictures():
    return torch.stack([(world.render(i).x * 255).round() for i in range(2)]).to(torch.uint8)


def test_example_poison_works_in_a_config_and_keeps_its_budget(as_file):
    stripes = as_file(block("top", "class Stripes(KeyedPoison)"), "stripes", poisonshield.poisons)
    run = read_experiment(ROOT / "configs/poison/lsp_cifar10_mini.yaml", [f"data.poison={stripes}"])
    assert run.poison_label == "stripes"
    poison = POISONS.get(stripes)(run.poison.config, num_classes=3, image_size=(8, 8), seed=0)
    x = torch.randint(0, 256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(0)) / 255
    batch = Batch(tuple("abcdef"), x, y=torch.arange(6) % 3)
    budget = MeasuredBudget(poison)
    budget.add(batch, poison.apply(batch).x)
    assert budget.record()["linf_levels"] == 8
    delta = poison.delta(batch)
    assert torch.equal(delta[0], delta[3]) and not torch.equal(delta[0], delta[1])


def test_example_diffusion_poison_works_in_a_config_and_raises_its_objective_within_its_budget(as_file):
    flat = as_file(block("top", "class Flat(DiffusionPoison)"), "flat", poisonshield.poisons.diffusion)
    run = read_experiment(ROOT / "configs/invert/szt_rendered.yaml", [f"data.poison={{name: {flat}, eps_levels: 6}}"])
    assert run.poison_label == "flat"
    cls, config = resolve(flat, None, {"eps_levels": 6, "steps": 12})
    poison, photos = cls(config, model=LatentDiffusion.load("tiny")), dict(zip("ab", pictures(), strict=True))
    changed = poison.perturb(photos, micro_batch=2)
    assert all(3 < check_budget(poison, key, photos[key], changed[key])["max"] <= 6 for key in photos)
    before, after = (poison.measure(x, draws=2) for x in (photos, changed))
    assert all(after[key] > before[key] + 0.1 * abs(before[key]) for key in photos)


def test_example_purifier_works_in_a_config_alone_and_within_szt(as_file):
    halved = as_file(block("defenses", "class Halved(Defense)"), "halved", poisonshield.defenses)
    config = ROOT / "configs/invert/szt_rendered.yaml"
    assert read_experiment(config, [f"defenses=[{halved}]", "data.masks=null"]).defense_label == "halved"
    assert (
        read_experiment(config, [f"defenses.0.purifier={halved}"]).defense_label
        == "szt(halved, t500, mask, mask_floor 0.3, mask_dilate 2)"
    )
    cls, x = DEFENSES.get(halved), torch.rand(2, 3, 13, 22)
    out = cls(cls.Config()).before(Batch(("a", "b"), x)).x
    assert out.shape == x.shape and torch.equal((out * 255).round() / 255, out)
    assert out.std() < 0.8 * x.std()


def test_example_mask_is_found_and_marks_what_is_bright(as_file):
    bright = as_file(block("defenses", "class Bright(MaskProvider)"), "bright", poisonshield.defenses.diffusion.masks)
    x = torch.full((1, 3, 16, 16), 0.2)
    x[:, :, 4:9, 5:12] = 0.7
    mask = MASKS.get(bright)()(Batch(("a",), x), None, None)
    assert torch.equal(mask, (x[:, :1] > 0.5).float())


def test_library_examples_run():
    names = {}
    exec(block("top", "import ShardStream"), names)
    assert {"PGD", "ShardStream", "open_dataset", "infonce", "train_many", "semantic_sensitivity"} <= names.keys()
    exec(block("poisons", "import AdvDM"), names)
    change = (names["changed"]["mug"].int() - names["photos"]["mug"].int()).abs().max()
    assert 0 < change <= 8 and names["after"] > names["before"]


def test_example_of_textual_inversion_runs_in_short():
    code = block("methods", "train_many(")
    for long, short in (
        ("steps=300", "steps=2"),
        ("seed=0))", "seed=0), steps=2)"),
        ("[600]", "[600], probes=2, noises=1"),
    ):
        assert code.count(long) == 1
        code = code.replace(long, short)
    names = {}
    exec(code, names)
    assert names["x"].shape == (2, 3, 64, 64) and names["maps"].shape == (1, 1, 16, 16)
    assert names["learned"]["my toy"].token == "<my-toy>"


def test_every_command_exists_and_has_the_options_that_are_given():
    assert len(CALLS) > 20
    known = typer.main.get_command(app)
    for _, *words in CALLS:
        command = known
        while hasattr(command, "commands"):
            name, *words = words
            assert name in command.commands, name
            command = command.commands[name]
        options = {o for p in command.params for o in p.opts} | {"--help"}
        assert not [w for w in words if w.startswith("-") and w not in options], words
    assert CliRunner().invoke(app, ["--help"]).exit_code == 0


def test_every_training_command_has_settings_that_its_config_takes():
    given = [(words[2], words[3:]) for words in CALLS if words[1] in ("train", "poison") and "CONFIG" not in words]
    assert len(given) >= 6
    for config, overrides in given:
        resolve_config(ROOT / config, overrides)


@pytest.mark.parametrize(("where", "config", "settings"), NAMED)
def test_settings_that_are_named_by_themselves_exist(where, config, settings):
    assert f"`{settings}`" in TEXTS[where]
    resolve_config(ROOT / f"configs/{config}.yaml", shlex.split(settings))


def test_every_file_that_is_named_exists():
    paths = {p for text in TEXTS.values() for p in re.findall(r"\b(?:configs|launch|poisonshield)/[\w/.]+\.\w+", text)}
    made_by_the_reader = {f"poisonshield/{p}.py" for p in ("poisons/stripes", "poisons/diffusion/flat")}
    made_by_the_reader |= {f"poisonshield/defenses/{p}.py" for p in ("halved", "diffusion/masks/bright")}
    assert len(paths) > 15 and made_by_the_reader < paths
    assert not [p for p in paths - made_by_the_reader if not (ROOT / p).exists()]
    assert not [p for p in made_by_the_reader if (ROOT / p).exists()]
    kinds = {folder.name for folder in (ROOT / "configs").iterdir() if folder.is_dir()}
    named = {n for text in TEXTS.values() for n in re.findall(rf"`((?:{'|'.join(kinds)})/\w+)`", text)}
    assert not [c for c in named if not (ROOT / "configs" / f"{c}.yaml").exists()]
    every = {f"invert/{path.stem}" for path in (ROOT / "configs" / "invert").iterdir()}
    assert set(column(README, "config")) == every


def test_every_poison_method_and_defense_is_in_a_table():
    assert set(column(README, "`data.poison.name`")) == set(POISONS.names())
    assert set(column(README, "`--method`")) == set(DIFFUSION_POISONS.names())
    assert set(column(TEXTS["poisons"], "name")) == set(DIFFUSION_POISONS.names())
    assert set(column(TEXTS["methods"], "`method.name`")) == set(METHODS.names())
    assert set(column(TEXTS["defenses"], "name")) == {
        *DEFENSES.names(), *(f"diffusion/{name}" for name in DIFFUSION_DEFENSES.names())
    }  # fmt: skip
    assert set(column(TEXTS["defenses"], "`szt.mask`")) == {*GIVEN, *MASKS.names()}


def test_settings_spellings_and_presets_are_those_of_the_code():
    assert set(column(TEXTS["defenses"], "setting")) == set(SZT.Config.model_fields)
    described = {n for n in re.findall(r"`([\w+-]+)`", TEXTS["poisons"].partition("## From the command line")[2])}
    assert {s for s in SPELLINGS if s.rstrip("+-") not in DIFFUSION_POISONS.names()} <= described
    presets = [n if not n.startswith("-") else f"diff-protect{n}" for n in column(TEXTS["poisons"], "preset")]
    assert set(presets) == set(PRESETS)


def test_install_and_test_commands_are_the_ones_that_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^ {4}pip install \. && poisonshield demo$", README, re.MULTILINE)
    install, test = re.search(r"^ {4}(pip install '\.\[test\]') && (pytest -n auto)$", README, re.MULTILINE).groups()
    assert ci.rstrip().endswith(test) and "pip install --quiet '.[test]'" in ci and install.endswith("'.[test]'")
