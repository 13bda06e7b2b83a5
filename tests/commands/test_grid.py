"""A grid expands as written, is checked whole before it starts, keeps what is done, and its table adds up."""

import csv
import json
from pathlib import Path

import pytest

from poisonshield.errors import ConfigError, DataError
from poisonshield.runs import read_experiment
from poisonshield.runs.classify import Classify

HEAD = """
base: {base}
dir: {dir}
seeds: [0, 1]
settings: {{engine.epochs: 1}}
blocks:
"""
BLOCKS = """
  - poison:
      none: {data.poison: null}
      lsp: {data.poison: {name: lsp}}
    training:
      supervised: {method: {name: supervised}, defenses: []}
      vespr: {}
"""
MINI = str(Path(__file__).resolve().parents[2] / "configs" / "defend" / "vespr_cifar10_mini.yaml")
GRIDS = sorted(Path(MINI).parents[1].glob("grid/*.yaml"))


def write(tmp_path, blocks=BLOCKS):
    path = tmp_path / "grid.yaml"
    path.write_text(HEAD.format(base=MINI, dir=tmp_path / "runs") + blocks)
    return path


@pytest.fixture
def pretend(monkeypatch):
    """Training that takes no time: writes a row whose accuracy is 10 * seed + 1, and notes what was asked."""
    asked = []

    def train(run):
        folder = run.folder
        folder.claim(run.record, resume="auto")
        asked.append(run.settings.run.dir)
        top1 = None if run.method.name != "supervised" and not run.defenses else 10.0 * run.seed + 1
        row = {"data": "d", "poison": run.poison_label, "method": run.method.name, "defense": run.defense_label}
        numbers = {"test_top1": top1, "knn_top1": 5.0, "linear_top1": 7.0, "steps": 3, "seconds": 2.0}
        folder.add_result({**row, "seed": run.seed, **numbers}, identity=("seed",))
        return folder.path

    monkeypatch.setattr(Classify, "train", train)
    return asked


def run_grid(path, overrides=(), *, part="1/1", only_list=False):
    """The table, after training what is not done, as the command does it."""
    grid = read_experiment(path, overrides)
    if not only_list:
        grid.train_part(part)
    return grid.table()


def test_blocks_are_products_and_stand_side_by_side(tmp_path):
    cells = read_experiment(write(tmp_path, BLOCKS + "  - defenses.0.eps: [0, 4/255]\n")).cells
    assert len(cells) == (2 * 2 + 2) * 2
    assert [c.run.defenses[0].config.eps for c in cells[-4:]] == [0.0, 0.0, 4 / 255, 4 / 255]
    assert {c.labels["training"] for c in cells[:8]} == {"supervised", "vespr"}
    assert len({c.run.folder.path for c in cells}) == len(cells) and all(
        c.run.settings.engine.epochs == 1 for c in cells
    )
    assert [c.seed for c in cells[:2]] == [0, 1] and cells[1].run.seed == 1


@pytest.mark.parametrize("path", GRIDS, ids=lambda p: p.stem)
def test_every_shipped_grid_is_valid(path):
    cells = read_experiment(path).cells
    assert len(cells) >= 4


def test_finished_runs_are_kept_and_the_rest_is_trained(tmp_path, pretend):
    path = write(tmp_path)
    table = run_grid(path)
    assert len(pretend) == 8 and table.count("2 of 2") == 4
    assert run_grid(path) == table and len(pretend) == 8
    (tmp_path / "runs/poison=lsp,training=vespr/seed-1/results.json").unlink()
    assert "1 of 2" in run_grid(path, only_list=True) and len(pretend) == 8
    assert run_grid(path) == table and len(pretend) == 9 and pretend[-1].endswith("training=vespr/seed-1")


def test_table_gives_mean_and_range_over_seeds_and_the_worst_poison(tmp_path, pretend):
    more = BLOCKS.replace(
        "lsp: {data.poison: {name: lsp}}",
        "lsp: {data.poison: {name: lsp}}\n      regions: {data.poison: {name: regions}}",
    )
    table = run_grid(write(tmp_path, more))
    assert "| lsp | vespr | 6.0 (1.0 to 11.0) | 5.0 (5.0 to 5.0) | 7.0 (7.0 to 7.0) | 2 | 2 of 2 |" in table
    assert "| vespr | 6.0 | 6.0 |" in table
    assert (tmp_path / "runs/table.md").read_text() == table + "\n"
    rows = list(csv.DictReader((tmp_path / "runs/results.csv").open()))
    assert len(rows) == 12 and {r["poison"] for r in rows} == {"none", "lsp", "regions"}


def test_parts_share_the_runs_between_jobs(tmp_path, pretend):
    path = write(tmp_path)
    run_grid(path, part="1/3")
    assert len(pretend) == 3
    run_grid(path, part="2/3")
    run_grid(path, part="3/3")
    assert len(pretend) == len(set(pretend)) == 8
    for text in ("0/3", "4/3", "half"):
        with pytest.raises(ConfigError, match="for example 2/4"):
            run_grid(path, part=text)


def test_one_failed_run_does_not_stop_the_others(tmp_path, pretend, monkeypatch):
    honest = Classify.train

    def train(run):
        if run.method.name == "supervised" and run.seed == 1:
            raise DataError("loss is nan at step 3")
        return honest(run)

    monkeypatch.setattr(Classify, "train", train)
    with pytest.raises(ConfigError, match="2 of 8 runs failed") as caught:
        run_grid(write(tmp_path))
    assert "loss is nan at step 3" in str(caught.value) and len(pretend) == 6
    assert "1 of 2" in (tmp_path / "runs/table.md").read_text()


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ("  - defenses.0.epss: [0]\n", "epss=0, run|not a setting of vespr"),
        ("  - training: {}\n", "the axis training is empty"),
        ("  - a: {'x:': {seed: 1}, 'x ': {seed: 2}}\n", "Name their axes"),
        ("  - training: {vespr: [1]}\n", "training"),
    ],
)
def test_mistakes_are_found_before_anything_runs(tmp_path, pretend, blocks, words):
    with pytest.raises(ConfigError, match=words):
        run_grid(write(tmp_path, BLOCKS + blocks))
    assert pretend == []


def test_run_trained_with_other_settings_is_not_taken_for_ours(tmp_path, pretend):
    path = write(tmp_path)
    run_grid(path)
    with pytest.raises(ConfigError, match="other settings"):
        run_grid(path, ["settings={engine.epochs: 1, optimizer.lr: 0.5}"])
    assert json.loads((tmp_path / "runs/poison=none,training=vespr/seed-0/results.json").read_text())
