"""Whose folder it is: that of another run or of no run is refused, one's own is emptied or gone on with; rows."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from poisonshield.engine.runfolder import RunFolder
from poisonshield.errors import BusyError, ConfigError

RECORD = {
    "seed": 1,
    "run": {"dir": "runs/a", "overwrite": False},
    "data": {"train": "mini", "milestones": (0.6, 0.9), "poison": None, "extra": {}},
    "defenses": [{"name": "vespr", "eps": "8/255"}],
    "engine": {"epochs": 2, "resume": False},
}
ROW = {
    "data": "mini", "poison": "lsp", "method": "simclr", "defense": "vespr", "seed": 1,
    "test_top1": 80.5, "knn_top1": 70.0, "linear_top1": None, "steps": 100, "seconds": 12.5,
}  # fmt: skip
IDENTITY = ("data", "poison", "method", "defense", "seed")
MAKES = {"makes": ("pictures", "sheet.png"), "keeps": ("poisoned*",)}


def changed(**leaves):
    """RECORD with some leaves changed, e.g. data__train="other"; None drops nothing, it is a value."""
    record = json.loads(json.dumps(RECORD))
    for path, value in leaves.items():
        *parents, last = path.split("__")
        here = record
        for part in parents:
            here = here[int(part) if part.isdigit() else part]
        here[last] = value
    return record


@pytest.fixture
def folder(tmp_path):
    """A run's folder as it is after that run: settings, metrics, results, what its experiment makes, and two others."""
    folder = RunFolder(tmp_path / "run", **MAKES)
    folder.claim(RECORD, resume=False)
    folder.metrics.write_text('{"step": 1}\n')
    folder.add_result(ROW, identity=IDENTITY)
    for name in ("checkpoints/.step-00000001.tmp", "export/method.safetensors", "tensorboard/events.out.tfevents.1",
                 "pictures/ring/recon-000.png", "poisoned.set/file"):  # fmt: skip
        (folder.path / name).parent.mkdir(parents=True)
        (folder.path / name).write_text("x")
    (folder.path / "sheet.png").write_text("x")
    (folder.path / "notes.txt").write_text("mine")
    return folder


def left(folder):
    return sorted(p.name for p in folder.path.iterdir() if p != folder.list)


def made(folder):
    return json.loads(folder.list.read_text())["made"]


ALL = [
    "checkpoints",
    "config.yaml",
    "export",
    "metrics.jsonl",
    "notes.txt",
    "pictures",
    "poisoned.set",
    "results.json",
    "sheet.png",
    "tensorboard",
]
EMPTIED = ["config.yaml", "notes.txt", "poisoned.set"]


def test_settings_are_written_as_plain_yaml(tmp_path):
    folder = RunFolder(tmp_path / "a" / "b")
    folder.claim({**RECORD, "path": Path("x/y")}, resume=False)
    plain = json.loads(json.dumps(RECORD))
    assert yaml.safe_load(folder.config.read_text()) == {**plain, "path": "x/y"}
    assert list(yaml.safe_load(folder.config.read_text()))[:2] == ["seed", "run"]


@pytest.mark.parametrize("resume", [False, "auto", "runs/b"])
def test_empty_folder_is_free(tmp_path, resume):
    assert RunFolder(tmp_path / "new").check(RECORD, resume=resume) is (resume is False)
    assert not (tmp_path / "new").exists()  # a check leaves no trace


def test_results_of_the_same_settings_are_not_thrown_away_by_starting_again(folder):
    with pytest.raises(ConfigError, match="holds a run of these settings already.\n  Go on with engine.resume=auto"):
        folder.claim(RECORD, resume=False)
    assert left(folder) == ALL


def test_checkpoints_alone_are_kept_too(folder):
    folder.results.unlink()
    (folder.checkpoints / "step-00000004").mkdir()
    with pytest.raises(ConfigError, match="run.overwrite=true"):
        folder.check(RECORD, resume=False)


def test_run_that_left_neither_starts_anew_in_an_emptied_folder(folder, caplog):
    folder.results.unlink()
    with caplog.at_level(logging.WARNING, "poisonshield"):
        folder.claim(RECORD, resume=False)
    assert left(folder) == EMPTIED and "Starting anew: removing" in caplog.text


@pytest.mark.parametrize("resume", ["auto", "elsewhere/checkpoints/step-00000010"])
def test_resumed_run_of_the_same_settings_keeps_everything(folder, resume, caplog):
    with caplog.at_level(logging.WARNING, "poisonshield"):
        folder.claim(RECORD, resume=resume)
    assert left(folder) == ALL and not caplog.text


@pytest.mark.parametrize(
    "leaf",
    [
        {"run__dir": "runs/moved"}, {"run__overwrite": True}, {"engine__resume": "auto"},
        {"data__milestones": [0.6, 0.9]}, {"seed": 1.0},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("resume", [False, "auto"])
def test_how_a_run_is_started_is_not_one_of_its_settings(folder, leaf, resume, caplog):
    folder.results.unlink()
    with caplog.at_level(logging.WARNING, "poisonshield"):
        folder.check(changed(**leaf), resume=resume)
    assert not caplog.text


@pytest.mark.parametrize(
    ("leaf", "named"),
    [
        ({"seed": 2}, "seed"),
        ({"data__train": "other"}, "data.train"),
        ({"data__poison": "lsp"}, "data.poison"),
        ({"data__milestones": [0.6, 0.8]}, "data.milestones.1"),
        ({"defenses__0__eps": "4/255"}, "defenses.0.eps"),
        ({"defenses": []}, "defenses, defenses.0.name, defenses.0.eps"),
        ({"data__window": 3}, "data.window"),
    ],
    ids=str,
)
@pytest.mark.parametrize("resume", [False, "auto"])
def test_run_of_other_settings_is_refused_by_name(folder, leaf, named, resume):
    with pytest.raises(ConfigError, match="holds a run with other settings") as error:
        folder.claim(changed(**leaf), resume=resume)
    assert f"other settings: {named}.\n" in str(error.value) and "run.overwrite=true" in str(error.value)
    assert left(folder) == ALL and yaml.safe_load(folder.config.read_text())["seed"] == 1


def test_setting_that_is_gone_is_a_change(folder):
    record = changed()
    del record["data"]["train"]
    with pytest.raises(ConfigError, match=r"other settings: data\.train\."):
        folder.check(record, resume="auto")


@pytest.mark.parametrize("resume", [False, "auto"])
def test_setting_that_is_null_and_one_that_is_not_there_are_the_same(folder, resume):
    """So that a setting which came with a later version, null by default, changes no older run, nor its going away."""
    folder.results.unlink()
    folder.check(changed(data__later=None), resume=resume)
    record = changed()
    del record["data"]["poison"]
    folder.check(record, resume=resume)
    with pytest.raises(ConfigError, match=r"other settings: data\.later\."):
        folder.check(changed(data__later=False), resume=resume)


def test_longer_run_may_go_on_and_says_so_but_not_start_anew(folder, caplog):
    longer = changed(engine__epochs=3)
    with caplog.at_level(logging.WARNING, "poisonshield"):
        folder.claim(longer, resume="auto")
    assert left(folder) == ALL and "changed settings: engine.epochs." in caplog.text
    assert yaml.safe_load(folder.config.read_text())["engine"]["epochs"] == 3
    with pytest.raises(ConfigError, match="engine.epochs"):
        folder.claim(changed(engine__epochs=4), resume=False)


def test_explicit_checkpoint_is_taken_at_its_word(folder, caplog):
    with caplog.at_level(logging.WARNING, "poisonshield"):
        folder.claim(changed(seed=2), resume="runs/b")
    assert left(folder) == ALL and "changed settings: seed." in caplog.text


@pytest.mark.parametrize(
    ("record", "resume", "emptied"),
    [
        (changed(seed=2), False, True),
        (changed(seed=2), "auto", True),
        (RECORD, False, True),
        (RECORD, "auto", False),  # the same run, started again with the same command after it was stopped
    ],
    ids=["other", "other, resumed", "same", "same, resumed"],
)
def test_overwrite_discards_another_run_but_not_its_own_progress(folder, record, resume, emptied):
    RunFolder(folder.path, overwrite=True, **MAKES).claim(record, resume=resume)
    assert left(folder) == (EMPTIED if emptied else ALL)
    assert yaml.safe_load(folder.config.read_text())["seed"] == record["seed"]


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", "just words"])
def test_unreadable_settings_are_a_worded_error(folder, text):
    folder.config.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml is not readable as a run's settings|holds a run with other"):
        folder.check(RECORD, resume="auto")


def test_what_runs_make_is_written_down_and_stays_so(folder):
    every = ["checkpoints", "export", "metrics.jsonl", "results.json", "tensorboard"]
    assert made(folder) == sorted([*every, "pictures", "sheet.png"])
    RunFolder(folder.path, makes=("table.csv",)).claim(RECORD, resume="auto")
    assert made(folder) == sorted([*every, "pictures", "sheet.png", "table.csv"])


def test_experiment_of_another_kind_removes_what_the_list_names_and_no_more(folder):
    """It knows neither the pictures nor the table, and finds the first on the list and the second not."""
    (folder.path / "table.csv").write_text("mine")
    RunFolder(folder.path, overwrite=True).claim(changed(seed=2), resume=False)
    assert left(folder) == ["config.yaml", "notes.txt", "poisoned.set", "table.csv"]


def test_what_somebody_put_into_the_runs_own_folders_stays(folder, caplog):
    theirs = ["checkpoints/best.pt", "export/notes.txt", "pictures/ring/sketch.psd", "tensorboard/other"]
    for name in theirs:
        (folder.path / name).write_text("mine")
    RunFolder(folder.path, overwrite=True, **MAKES).claim(changed(seed=2), resume=False)
    kept = sorted(p.relative_to(folder.path).as_posix() for p in folder.path.glob("*/**/*") if p.is_file())
    assert kept == sorted([*theirs, "poisoned.set/file"]) and "export stays: it holds what no run made" in caplog.text


def test_folder_that_was_marked_is_a_runs_whatever_is_put_there_before_the_run(tmp_path):
    folder = RunFolder(tmp_path / "run", **MAKES)
    folder.mark()
    (folder.path / "anything").touch()
    folder.claim(RECORD, resume=False)
    assert left(folder) == ["anything", "config.yaml"] and "sheet.png" in made(folder)
    (tmp_path / "other").touch()
    with pytest.raises(ConfigError, match="holds no run, but other things: other, run"):
        RunFolder(tmp_path).mark()


@pytest.mark.parametrize("names", [["pictures"], ["validation", "checkpoints"]], ids=str)
def test_folder_of_a_run_that_wrote_no_list_counts_as_a_runs(folder, names):
    """Runs of earlier versions: what they made is known, and what this experiment makes was not on any list."""
    folder.list.unlink()
    for name in names:
        (folder.path / name).mkdir(exist_ok=True)
    assert folder.check(RECORD, resume="auto") is False
    with pytest.raises(ConfigError, match="holds a run of these settings already"):
        folder.check(RECORD, resume=False)
    RunFolder(folder.path, overwrite=True).claim(changed(seed=2), resume=False)
    assert left(folder) == ["config.yaml", "notes.txt", "pictures", "poisoned.set", "sheet.png"]
    assert "validation" in made(folder)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("resume", [False, "auto", "elsewhere/checkpoints/step-00000010"])
@pytest.mark.parametrize("config", [None, "learning_rate: 0.1\n", "run: 3\nengine: {}\n", "- run.dir\n"], ids=str)
def test_folder_that_holds_no_run_is_refused_and_left_as_it_is(tmp_path, config, resume, overwrite):
    for name in ("checkpoints", "export"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "work of years").write_text("x")
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=r"holds no run, but other things: checkpoints, (config\.yaml, )?export\.\n"):
        RunFolder(tmp_path, overwrite=overwrite).claim(RECORD, resume=resume)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_long_list_of_other_things_is_cut(tmp_path):
    for name in "abcdefg":
        (tmp_path / name).touch()
    with pytest.raises(
        ConfigError, match=r"other things: a, b, c, d, \.\.\.\.\n  A run starts in a folder that is new"
    ):
        RunFolder(tmp_path).check(RECORD, resume=False)


def test_what_the_experiment_keeps_and_hidden_files_may_be_there_before_the_run(tmp_path):
    """A poisoned set is made before the folder is claimed, and a start that was killed may have left a draft."""
    (tmp_path / "poisoned.set").mkdir()
    (tmp_path / ".config.yaml.tmp").touch()
    RunFolder(tmp_path, **MAKES).claim(RECORD, resume=False)
    assert (tmp_path / "poisoned.set").is_dir() and (tmp_path / "config.yaml").is_file()


def test_run_that_was_killed_between_list_and_settings_goes_on(folder):
    folder.config.unlink()
    folder.results.unlink()
    folder.claim(RECORD, resume="auto")
    assert left(folder) == [name for name in ALL if name != "results.json"]


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"made": []}', '{"made": ["../other"]}', '{"made": [".."]}', '{"made": [""]}', '{"made": [3]}',
     '{"made": "a"}', '{"made": ["/etc"]}'],
)  # fmt: skip
def test_list_that_is_damaged_or_names_what_lies_elsewhere_is_refused(folder, text):
    folder.list.write_text(text)
    with pytest.raises(ConfigError, match="is not readable as names that runs have made"):
        RunFolder(folder.path, overwrite=True).claim(changed(seed=2), resume=False)
    assert left(folder) == ALL


def test_results_are_rows_as_given(tmp_path):
    folder = RunFolder(tmp_path / "run")
    row = dict(reversed(ROW.items()))
    folder.add_result(row, identity=IDENTITY)
    (found,) = json.loads(folder.results.read_text())
    assert list(found) == list(row) and found == row


def test_row_of_the_same_run_is_replaced_and_of_another_is_added(tmp_path):
    folder = RunFolder(tmp_path)
    rows = [ROW, {**ROW, "seed": 2}, {**ROW, "poison": "ar"}, {**ROW, "defense": "none"}, {**ROW, "method": "moco"}]
    for row in rows:
        folder.add_result(row, identity=IDENTITY)
    assert json.loads(folder.results.read_text()) == rows
    better = {**ROW, "seed": 2, "test_top1": 90.0}
    folder.add_result(better, identity=IDENTITY)
    assert json.loads(folder.results.read_text()) == [rows[0], *rows[2:], better]


def test_identity_is_what_the_caller_says(tmp_path):
    folder = RunFolder(tmp_path)
    for row in ({"word": "a", "score": 1}, {"word": "b", "score": 2}, {"word": "a", "score": 3}):
        folder.add_result(row, identity=("word",))
    assert json.loads(folder.results.read_text()) == [{"word": "b", "score": 2}, {"word": "a", "score": 3}]


@pytest.mark.parametrize("key", IDENTITY)
def test_row_without_a_key_that_identifies_it_is_refused(tmp_path, key):
    with pytest.raises(ConfigError, match=f"a result row is known by data, poison, .*; this one has no {key}."):
        RunFolder(tmp_path).add_result({k: v for k, v in ROW.items() if k != key}, identity=IDENTITY)
    assert not (tmp_path / "results.json").exists()


HOLD = """
import sys, time
from poisonshield.engine.runfolder import RunFolder
with RunFolder(sys.argv[1]).held():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def held_by_another(tmp_path):
    """A folder that another process works in, and that process."""
    folder = tmp_path / "a" / "b"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield folder, process
    process.kill()
    process.wait()
    process.stdout.close()


def test_folder_that_another_process_works_in_is_refused_until_it_is_gone(held_by_another):
    """faults B: two runs in one folder. That of a process that was killed is taken over."""
    path, process = held_by_another
    with pytest.raises(BusyError, match=f"is in use: process {process.pid} on "), RunFolder(path).held():
        raise AssertionError("two hold it")
    process.kill()
    process.wait()
    with RunFolder(path).held() as _, RunFolder(path).held():
        RunFolder(path).claim(RECORD, resume=False)  # the lock is no other's file
    assert sorted(p.name for p in path.iterdir()) == [".poisonshield.json", "config.yaml"]


def test_folder_in_which_nothing_came_about_is_not_left_behind(tmp_path):
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path / "a" / "b").held():
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())


def test_of_processes_that_have_not_met_none_takes_the_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with RunFolder(tmp_path / "run").held():
        assert not (tmp_path / "run").exists()


def test_link_that_a_run_was_given_is_removed_and_what_it_points_to_stays(folder, tmp_path):
    """Checkpoints on a larger disk."""
    shutil.rmtree(folder.checkpoints)
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "file").touch()
    folder.checkpoints.symlink_to(tmp_path / "large")
    RunFolder(folder.path, overwrite=True, **MAKES).claim(changed(seed=2), resume=False)
    assert left(folder) == EMPTIED and (tmp_path / "large" / "file").exists()


PLACES = {"places": ("data.train",)}


@pytest.fixture
def trained(tmp_path):
    """The folder of a run that knew the digest of its data."""
    folder = RunFolder(tmp_path / "run", **PLACES)
    folder.digests = {"data.train": "d1"}
    folder.claim(RECORD, resume=False)
    return folder.path


@pytest.mark.parametrize("overwrite", [False, True])
def test_data_that_lies_elsewhere_is_the_same_by_its_digest(trained, overwrite, caplog):
    """faults B: data moved to another mount."""
    folder = RunFolder(trained, overwrite=overwrite, **PLACES)
    moved = changed(data__train="/mnt/other/mini")
    assert folder.check(moved, resume="auto") is False  # before it is opened nobody knows better
    folder.digests = {"data.train": "d1"}
    with caplog.at_level(logging.WARNING, "poisonshield"):
        folder.claim(moved, resume="auto")
    assert yaml.safe_load(folder.config.read_text())["data"]["train"] == "/mnt/other/mini" and not caplog.text


@pytest.mark.parametrize("train", ["mini", "/mnt/other/mini"])
def test_other_data_is_refused_wherever_it_lies(trained, train):
    folder = RunFolder(trained, **PLACES)
    folder.digests = {"data.train": "d2"}
    with pytest.raises(ConfigError, match="data.train"):
        folder.claim(changed(data__train=train), resume="auto")
    assert yaml.safe_load(folder.config.read_text()) == RECORD | {"data": RECORD["data"] | {"milestones": [0.6, 0.9]}}
    assert RunFolder(trained, overwrite=True, **PLACES).check(changed(data__train="elsewhere"), resume=False) is True


def test_run_without_digests_is_held_to_the_place_of_its_data(tmp_path, monkeypatch):
    """As earlier versions wrote it; they wrote paths as they were given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    RunFolder("run", **PLACES).claim(changed(data__train="photos"), resume=False)
    assert RunFolder("run", **PLACES).check(changed(data__train=str(tmp_path / "photos")), resume="auto") is False
    with pytest.raises(ConfigError, match=r"other settings: data\.train\."):
        RunFolder("run", **PLACES).check(changed(data__train="/mnt/photos"), resume="auto")
