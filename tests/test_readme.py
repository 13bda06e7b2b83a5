"""What the READMEs promise: examples run, commands and their settings exist, files and links are there."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from poisonshield.api import resolve_config
from poisonshield.api.names import KINDS
from poisonshield.cli import app
from poisonshield.config import find_config, shipped_configs
from poisonshield.defenses.diffusion.szt import GIVEN, MASKS, SZT
from poisonshield.poisons.diffusion.attack.presets import PRESETS, SPELLINGS
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
    "poisons": PACKAGE / "poisons",
    "diffusion poisons": PACKAGE / "poisons" / "diffusion",
    "data": PACKAGE / "data",
    "engine": PACKAGE / "engine",
    "ops": PACKAGE / "ops",
    "tiny": PACKAGE / "models" / "diffusion" / "tiny",
}
TEXTS = {name: (place / "README.md").read_text() for name, place in PLACES.items()}
PLACES["results"] = ROOT / "configs" / "grid"
TEXTS["results"] = (PLACES["results"] / "RESULTS.md").read_text()
README = TEXTS["top"]
CALLS = [
    shlex.split("".join(line), comments=True)
    for text in TEXTS.values()
    for line in re.findall(
        r"^ {4,}(?:.*&& )?(poisonshield .*)$|`(poisonshield [^`]+)`", text.replace("\\\n", " "), re.MULTILINE
    )
]
WORD, IMAGES = "invert/szt", "defend/vespr_cifar10_mini"
NAMED = (
    ("defenses", WORD, "data.masks=alpha defenses.0.mask=alpha"),
    ("defenses", WORD, "data.masks=null defenses.0.mask=grabcut"),
    ("defenses", WORD, "data.masks=null 'defenses.0.mask={name: box, side: .5}'"),
    ("defenses", WORD, "defenses.0.t_min=auto"),
    ("defenses", WORD, "defenses.0.purifier=median"),
    ("defenses", IMAGES, "defenses.0.attack.steps=5"),
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


def test_library_examples_run():
    names = {}
    exec(block("top", "import ShardStream"), names)
    assert {"PGD", "ShardStream", "open_dataset", "infonce", "train_many", "semantic_sensitivity"} <= names.keys()
    exec(block("diffusion poisons", "import AdvDM"), names)
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
    assert len(CALLS) > 50
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
    """Of train, poison and grid, with the config as it is written; launchers take the same."""
    lines = [line for text in TEXTS.values() for line in text.replace("\\\n", " ").splitlines()]
    launched = [shlex.split(line.split("launch/slurm/train.sbatch")[1]) for line in lines if "train.sbatch" in line]
    given = [(words[2], words[3:]) for words in CALLS if words[1] in ("train", "poison", "grid") and words[2:]]
    given += [(words[0], words[1:]) for words in launched]
    given = [(config, rest) for config, rest in given if config != "CONFIG"]
    assert len(given) >= 14
    for config, rest in given:
        resolve_config(config, [word for word in rest if not word.startswith("-")])


@pytest.mark.parametrize(("where", "config", "settings"), NAMED)
def test_settings_that_are_named_by_themselves_exist(where, config, settings):
    assert f"`{settings}`" in TEXTS[where]
    resolve_config(config, shlex.split(settings))


def test_every_file_that_is_named_exists():
    paths = {p for text in TEXTS.values() for p in re.findall(r"\b(?:configs|launch|poisonshield)/[\w/.]+\.\w+", text)}
    made_by_the_reader = {f"poisonshield/defenses/{p}.py" for p in ("halved", "diffusion/masks/bright")}
    assert len(paths) > 8 and made_by_the_reader < paths
    assert not [p for p in paths - made_by_the_reader if not (ROOT / p).exists()]
    assert not [p for p in made_by_the_reader if (ROOT / p).exists()]
    folders = {p for text in TEXTS.values() for p in re.findall(r"`((?:configs|launch|poisonshield)/[\w/]*)`", text)}
    assert len(folders) > 8 and not [p for p in folders if not (ROOT / p).exists()]


def test_every_config_that_is_named_is_shipped():
    kinds = {name.partition("/")[0] for name in shipped_configs() if "/" in name}
    named = {n for text in TEXTS.values() for n in re.findall(rf"`((?:{'|'.join(kinds)})/\w+)`", text)}
    assert len(named) > 12
    for name in named:
        find_config(name)


def test_every_link_leads_somewhere_and_no_picture_is_fetched():
    for name, text in TEXTS.items():
        targets = re.findall(r"\]\((?!https?://)([^)]+)\)", text)
        assert not [t for t in targets if not (PLACES[name] / t).exists()], name
        assert not re.search(r"!\[[^]]*\]\(http", text), name
    (picture,) = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert 0 < (ROOT / picture).stat().st_size < 200_000


def test_tables_name_nothing_that_is_not_there():
    """They need not name everything: `poisonshield names` does, so a newcomer needs no line here."""
    assert set(column(TEXTS["poisons"], "`data.poison.name`")) <= set(POISONS.names())
    assert set(column(TEXTS["diffusion poisons"], "name")) <= set(DIFFUSION_POISONS.names())
    assert set(column(TEXTS["methods"], "`method.name`")) <= set(METHODS.names())
    assert set(column(TEXTS["defenses"], "name")) <= {
        *DEFENSES.names(), *(f"diffusion/{name}" for name in DIFFUSION_DEFENSES.names())
    }  # fmt: skip
    assert set(column(TEXTS["defenses"], "`szt.mask`")) <= {*GIVEN, *MASKS.names()}
    told = [kind for words in CALLS if words[1] == "names" for kind in words[2:]]
    assert {"poisons", "diffusion-poisons", "defenses", "methods", "attacks", "masks", "evaluations"} <= set(told)
    assert set(told) <= set(KINDS)


def test_figures_of_the_readme_stand_in_the_tables_of_results():
    figures = set(re.findall(r"\b\d+\.\d+\b", README.partition("## Three figures")[2].partition("Means over")[0]))
    assert len(figures) >= 8 and figures <= set(re.findall(r"\b\d+\.\d+\b", TEXTS["results"]))


def test_settings_spellings_and_presets_are_those_of_the_code():
    assert set(column(TEXTS["defenses"], "setting")) == set(SZT.Config.model_fields)
    described = {
        n for n in re.findall(r"`([\w+-]+)`", TEXTS["diffusion poisons"].partition("## From the command line")[2])
    }
    assert {s for s in SPELLINGS if s.rstrip("+-") not in DIFFUSION_POISONS.names()} <= described
    presets = [n if not n.startswith("-") else f"diff-protect{n}" for n in column(TEXTS["diffusion poisons"], "preset")]
    assert set(presets) == set(PRESETS)


def test_install_and_test_commands_are_the_ones_that_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^ {4}pip install \. && poisonshield demo$", README, re.MULTILINE)
    install, test = re.search(r"^ {4}(pip install '\.\[test\]') && (pytest -n auto)$", README, re.MULTILINE).groups()
    assert ci.rstrip().endswith(test) and "pip install --quiet '.[test]'" in ci and install.endswith("'.[test]'")
