"""`poisonshield names`: every file of a kind is a row, a newcomer's too, and the cells are what its class declares."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import poisonshield.poisons
from poisonshield.api.names import KINDS, draw_table, find_names
from poisonshield.cli import app
from poisonshield.errors import ConfigError

PACKAGE = Path(poisonshield.poisons.__file__).parents[1]
FOLDERS = {
    "poisons": "poisons",
    "diffusion-poisons": "poisons/diffusion",
    "defenses": "defenses",
    "diffusion-defenses": "defenses/diffusion",
    "methods": "methods",
    "diffusion-methods": "methods/diffusion",
    "attacks": "attacks",
    "masks": "defenses/diffusion/masks",
    "evaluations": "evals",
    "diffusion-evaluations": "evals/diffusion",
    "backends": "engine/backends",
}
NEWCOMER = '''
from poisonshield.poisons.base import KeyedPoison


class Dots(KeyedPoison):
    """Every class gets a|b dots.

    Further lines are not shown.
    """

    name, norm, grain = "dots", "l0", "class"
'''


def run(*arguments):
    return CliRunner().invoke(app, ["names", *arguments])


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_of_a_kind_is_a_row_with_all_cells_filled(kind):
    rows = find_names(kind)
    files = {path.stem for path in (PACKAGE / FOLDERS[kind]).glob("*.py")} - {"__init__", "base"}
    assert [row["name"] for row in rows] == sorted(files)
    assert len({tuple(row) for row in rows}) == 1 and all(text.strip() for row in rows for text in row.values())


def test_cells_are_what_classes_declare():
    rows = {kind: {row["name"]: row for row in find_names(kind)} for kind in KINDS}
    lsp = rows["poisons"]["lsp"]
    assert (lsp["norm"], lsp["a pattern for each"], lsp["source"]) == ("l2", "sample", "2111.00898")
    assert lsp["what it does"].startswith("delta = squares of z")
    assert rows["poisons"]["convolution"]["norm"] == "none"
    assert rows["attacks"]["apgd"]["norms"] == "linf, l2" and rows["attacks"]["fgsm"]["options"] == "-"
    assert rows["defenses"]["jpeg"]["purifier"] == "yes" and rows["defenses"]["vespr"]["purifier"] == "no"
    assert rows["methods"]["supervised"]["classifier"] == "yes" and rows["methods"]["simclr"]["views"] == "2"
    assert rows["masks"]["attention"]["looks for a word"] == "yes"
    assert rows["evaluations"]["lipschitz"]["by default"] == "off"
    assert rows["backends"]["deepspeed"]["ZeRO stages"] == "0, 1, 2, 3"


def test_a_newcomers_file_is_a_row_at_once_and_bars_do_not_break_the_table(tmp_path, monkeypatch):
    (tmp_path / "dots.py").write_text(NEWCOMER)
    monkeypatch.setattr(poisonshield.poisons, "__path__", [*poisonshield.poisons.__path__, str(tmp_path)])
    told = run("poisons").stdout
    assert "| `dots` | Every class gets a\\|b dots. | l0 | class | this project |" in told.splitlines()


def test_the_command_prints_one_kind_or_all_as_markdown():
    alone = run("attacks")
    assert alone.exit_code == 0 and alone.stdout.strip() == draw_table("attacks")
    everything = run()
    assert all(draw_table(kind) in everything.stdout for kind in KINDS)
    for table in re.findall(r"(?:^\|.*\n?)+", everything.stdout, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_an_unknown_kind_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'poison' is no kind of name. Did you mean poisons\?  Known: poisons, "):
        find_names("poison")
