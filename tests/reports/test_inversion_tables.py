"""Tables of learned words: recovery and cost that a hand can check, groups and folds apart, older rows still read."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from poisonshield.models.diffusion.embeddings import Learned, save_embedding
from poisonshield.reports.inversion_tables import LearnedRun, add_word_distances, columns, concept_table, flat, table
from poisonshield.runs import read_experiment

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "invert" / "rendered.yaml"
CONCEPTS = {"cup": "id", "hat": "id", "fox": "od", "owl": "od"}


def rows(value, *, seed=0, by="fidelity", **more):
    """A row for each concept; `value` is one number, or a number for each concept."""
    value = value if isinstance(value, dict) else dict.fromkeys(CONCEPTS, value)
    return [{"concept": c, "group": g, "seed": seed, by: value[c], **more} for c, g in CONCEPTS.items()]


def place(poison, defense, found, **axes):
    return {"poison": poison, "defense": defense, **axes}, found


def spread(at):
    """About `at`, so that intervals are not empty."""
    return {c: at + 0.01 * i for i, c in enumerate(CONCEPTS)}


def names(rows):
    """{key: head} of the columns that tables of these rows have."""
    return {number.key: number.title for number in columns(rows)}


def cells(text, *starts):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {' | '.join(starts)} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][len(starts) :]


GRID = [
    place("clean", "none", rows(spread(0.8))),
    place("clean", "szt", rows(spread(0.7))),
    place("advdm", "none", rows(spread(0.4))),
    place("advdm", "szt", rows(spread(0.6))),
]


def test_recovery_and_cost_are_shares_of_means_and_groups_stand_apart():
    text = table(GRID)
    assert cells(text, "szt", "all") == ["0.10 (0.10 to 0.10)", "0.50 (0.50 to 0.50)"]
    assert cells(text, "szt", "id") == cells(text, "szt", "od") == ["0.10 (0.10 to 0.10)", "0.50 (0.50 to 0.50)"]
    assert cells(text, "none", "all") == ["0.00 (0.00 to 0.00)", "0.00 (0.00 to 0.00)"]
    assert "By fidelity, over concepts and seeds" in text


def test_groups_differ_where_the_defense_does():
    found = rows({"cup": 0.8, "hat": 0.81, "fox": 0.42, "owl": 0.43})  # brings all back within, nothing outside
    text = table([*GRID[:3], place("advdm", "szt", found)])
    assert cells(text, "szt", "id")[1].startswith("1.00") and cells(text, "szt", "od")[1].startswith("0.00")
    assert cells(text, "szt", "id")[0] == cells(text, "szt", "od")[0] == "0.10 (0.10 to 0.10)"


def test_one_group_makes_no_column():
    only = [(labels, [r | {"group": "od"} for r in found]) for labels, found in GRID]
    assert "concepts |" not in table(only).splitlines()[0] and cells(table(only), "szt")[1].startswith("0.50")


def test_axes_beside_poison_and_defense_make_tables_of_their_own():
    short = [(labels | {"steps": "short"}, found) for labels, found in GRID]
    long = [(labels | {"steps": "long"}, found) for labels, found in GRID[:3]]
    text = table([*short, *long, place("advdm", "szt", rows(spread(0.8)), steps="long")])
    first, second = text.split("steps: short")[1].split("steps: long")
    assert cells(first, "szt", "all")[1].startswith("0.50") and cells(second, "szt", "all")[1].startswith("1.00")


def test_folds_of_one_place_count_each():
    """Five values of one concept and seed, told apart by the picture that was left out: an interval over them all."""
    fold = lambda at: [
        {"concept": "cup", "group": None, "seed": 0, "left_out": k, "fidelity": at + 0.01 * k} for k in range(5)
    ]
    text = table(
        [place("clean", "none", fold(0.8)), place("advdm", "none", fold(0.4)), place("advdm", "szt", fold(0.6))]
    )
    assert cells(text, "szt") == ["-", "0.50 (0.50 to 0.50)"]


def test_without_a_judge_the_effect_is_read_off_a_feature_network_and_else_off_latents():
    scored = {
        "networks": {"dino_i": {"status": "ok", "value": 0.5, "network": "d"}, "clip_i": {"status": "unavailable"}}
    }
    known = [flat(row) for row in rows(None, **scored)]
    assert known[0]["dino_i"] == 0.5 and "clip_i" not in known[0] and names(known)["dino_i"] == "dino i"
    dino = [
        (labels, [r | {"fidelity": None, "dino_i": r["fidelity"], **scored} for r in found]) for labels, found in GRID
    ]
    assert "By dino i" in table(dino) and cells(table(dino), "szt", "all")[1].startswith("0.50")
    latent = [
        (labels, [{**r, "fidelity": None, "latent_cosine": r["fidelity"]} for r in found]) for labels, found in GRID
    ]
    assert "By latent cosine" in table(latent)


def test_columns_are_the_always_shown_then_the_known_in_a_fixed_order():
    always = ["fidelity", "shown, %", "feature distance", "colour distance", "latent cosine", "high frequencies"]
    assert list(names([{"fidelity": 0.5, "round_trip_error": 0.1}]).values()) == always
    scores = {"other_i": {"status": "ok", "value": 0.5}, "dino_i": {"status": "ok", "value": 0.4}}
    row = flat({"brisque": 1.0, "word_l2": 2.0, "mask_area": 0.5, "dino_i": None, "networks": scores})
    assert list(names([row]).values())[6:] == ["BRISQUE", "dino i", "mask area", "distance to clean word", "other i"]


def test_no_table_without_clean_training_or_without_numbers():
    assert table(GRID[2:]) == "" and table([]) == ""
    assert table([(labels, [r | {"fidelity": None} for r in found]) for labels, found in GRID]) == ""


def test_columns_that_no_row_fills_are_left_out_and_older_rows_do_not_miss_them():
    old = {"concept": "cup", "group": None, "seed": 0, "fidelity": 0.5}
    assert "brisque" not in names([old]) and "mask_iou" not in names([old | {"mask_iou": None}])
    found = names([old, old | {"brisque": 30.0, "mask_iou": 0.9}])
    assert found["brisque"] == "BRISQUE" and found["mask_iou"] == "mask IoU"
    word = {"word": {"nearest": [[["ring", 0.4], ["o", 0.3]], [["yellow", 0.5]]]}}
    text = concept_table([old | word, old | {"concept": "hat", "group": "od", "brisque": 31.25} | word])
    assert cells(text, "cup")[:2] == ["-", "0.500"] and cells(text, "cup")[-2:] == ["-", "ring, yellow"]
    assert cells(text, "hat")[-2:] == ["31.25", "ring, yellow"]


@pytest.fixture
def learned(tmp_path):
    """`learned(poison, defense, seed, vectors)`: a run whose word is on disk."""

    def make(poison, defense, seed, vectors, **axes):
        folder = tmp_path / f"{poison}-{defense}-{seed}"
        if vectors is not None:
            save_embedding(Learned("<cup>", torch.tensor(vectors)), folder / "cup.safetensors")
        labels = {"poison": poison, "defense": defense, **axes}
        return LearnedRun(labels, seed, [{"concept": "cup"}], lambda concept: folder / f"{concept}.safetensors")

    return make


def test_words_are_compared_with_the_clean_run_of_their_seed(learned):
    runs = {
        "clean": learned("clean", "none", 0, [[1.0, 0.0], [0.0, 0.0]]),
        "other seed": learned("clean", "none", 1, [[0.0, 1.0], [0.0, 0.0]]),
        "poisoned": learned("advdm", "none", 0, [[1.0, 0.0], [0.0, 1.0]]),
        "defended": learned("advdm", "szt", 1, [[0.0, 3.0], [0.0, 0.0]]),
        "other shape": learned("advdm", "szt", 0, [[1.0, 0.0]]),
        "no file": learned("clean", "szt", 0, None),
        "other axis": learned("mist", "none", 0, [[1.0, 0.0], [0.0, 0.0]], steps="long"),
    }
    add_word_distances(list(runs.values()))
    told = {name: run.rows[0] for name, run in runs.items()}
    assert told["poisoned"] == {"concept": "cup", "word_cosine": pytest.approx(0.5**0.5, abs=1e-4), "word_l2": 1.0}
    assert told["defended"] == {"concept": "cup", "word_cosine": 1.0, "word_l2": 2.0}
    assert all(told[n] == {"concept": "cup"} for n in ("clean", "other seed", "other shape", "no file", "other axis"))


def test_a_grid_of_inversions_with_older_rows_and_records_is_read(tmp_path):
    """Runs that were finished before newer settings and readouts existed: their cells keep their numbers."""
    path = tmp_path / "grid.yaml"
    path.write_text(
        f"base: {CONFIG}\ndir: {tmp_path / 'runs'}\nseeds: [0, 1]\nblocks:\n"
        "  - poison: {clean: {}, advdm: {data.poison: {name: advdm}}}\n"
        "    defense: {none: {}}\n    data.batch_size: [2]\n"
    )
    grid = read_experiment(path)
    for i, cell in enumerate(grid.cells):
        folder = cell.run.folder
        folder.claim(cell.run.record, resume=False)
        record = yaml.safe_load(folder.config.read_text())
        del record["data"]["mask_reference"], record["data"]["left_out"]
        folder.config.write_text(yaml.safe_dump(record))
        row = {
            "concept": "yellow_ring",
            "group": "od",
            "poison": "p",
            "seed": cell.seed,
            "fidelity": 0.8 - 0.1 * i,
            "seconds": 3,
        }
        folder.results.write_text(json.dumps([row]))
    text = grid.table()
    assert "| clean | none | 2 | 0.75 (0.70 to 0.80) |" in text and text.count("2 of 2") == 2
    assert "data.batch_size: 2" in text and cells(text, "none")[1].startswith("0.00")
    grid.write_tables()
    assert "od,0.8," in (tmp_path / "runs" / "results.csv").read_text()


def test_folds_are_one_line_of_a_grid_and_rows_of_their_own_in_its_file(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(
        f"base: {CONFIG}\ndir: {tmp_path / 'runs'}\nseeds: [0]\nsettings: {{data.train: photos, data.concepts: null}}\n"
        "blocks:\n  - poison: {clean: {}, advdm: {data.poison: {name: advdm}}}\n    defense: {none: {}}\n"
        "    data.left_out: [0, 1, 2]\n"
    )
    grid = read_experiment(path)
    for cell in grid.cells:
        cell.run.folder.claim(cell.run.record, resume=False)
        fold = cell.run.settings.data.left_out
        row = {"concept": "cup", "group": None, "seed": 0, "left_out": fold, "latent_cosine": 0.1 * fold, "seconds": 3}
        cell.run.folder.results.write_text(
            json.dumps([row | ({"latent_cosine": 0.0} if cell.labels["poison"] == "advdm" else {})])
        )
    text = grid.table()
    assert "| clean | none | - | - | - | - | 0.10 (0.00 to 0.20) | - | 3 | 3 of 3 |" in text
    assert "By latent cosine" in text and "left_out" not in text
    grid.write_tables()
    assert (tmp_path / "runs" / "results.csv").read_text().count("\nclean,none,") == 3
