"""Nothing that we did not make is removed or changed, by any command, asked to overwrite or not.

Each command writes into a folder that holds somebody's files: first while only they are there, and once more, asked to
overwrite, after they were put beside what the command made itself.
"""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from poisonshield import world
from poisonshield.cli import COMMANDS, app
from poisonshield.data import open_dataset
from poisonshield.errors import PoisonShieldError
from poisonshield.models.diffusion.embeddings import Learned, save_embedding
from poisonshield.models.diffusion.pipeline import LatentDiffusion

SMALL = (
    "engine.max_steps=1", "engine.device=cpu", "model.widths=[8,8,8,8]", "method.hidden=8", "method.out=8",
    "data.batch_size=8", "defenses.0.attack.steps=1", "evaluate.robust=null", "evaluate.knn=null",
    "evaluate.linear=null",
)  # fmt: skip

STRANGERS = (
    "notes.txt", ".hidden", "holiday.jpg", "a.png", "a.json", "config.yaml.bak", "shard-00000.tar", "shard-00009.tar",
    "checkpoints/theirs.pt", "checkpoints/step-x/w.pt", "export/theirs.txt", "validation/theirs.txt",
    "pictures/holiday.jpg", "tensorboard/theirs", "train/theirs.txt", "test/theirs.txt", "masks/theirs.png",
    "sheet.png", "totals.png", "sensitivity.json", "profile.json", "survival.json", "generate.json",
    "00-a-ring/000.png", "masks.png", "concepts/ball/a.mask.png", "concepts/theirs.txt",
    "poisoned/theirs.txt", "ball/theirs.png", "vespr/theirs.txt", "kill-0/theirs.txt",
)  # fmt: skip
"""Names such as commands use, and others."""


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Two photos in a concept's folder, a learned word's file, a class-folder tree, and configs."""
    root = tmp_path_factory.mktemp("given")
    for name in ("a", "b"):
        pixels = (world.render(ord(name)).x * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        for folder in ("ball", "tree/one", "tree/two"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / folder / f"{name}.png")
    vector = LatentDiffusion.load("tiny").word_vector("ring")
    save_embedding(Learned("<toy>", vector[None]), root / "word.safetensors")
    (root / "grid.yaml").write_text(
        "base: defend/vespr_cifar10_mini\ndir: unused\nblocks:\n  - training:\n      ours: "
        + json.dumps({key: json.loads(value) for key, value in (text.split("=") for text in SMALL[:1])})
    )
    return root


def commands(given, out):
    """What is typed for each command that writes a folder; `--overwrite` goes where there is such an option."""
    photos, word = str(given / "ball"), str(given / "word.safetensors")
    run = f"run.dir={out}"
    return {
        "train": ["train", "defend/vespr_cifar10_mini", run, *SMALL],
        "poison": ["poison", "poison/lsp_cifar10_mini", run],
        "data": ["data", "import", str(given / "tree"), "-o", str(out)],
        "protect": ["protect", photos, "-o", str(out), "--steps", "1"],
        "masks": ["masks", photos, "-o", str(out), "--mask", "box", "--purifier", "none", "--size", "64"],
        "generate": ["generate", "-o", str(out), "--prompt", "a ring", "--count", "1", "--steps", "1"],
        "sensitivity": ["sensitivity", photos, "--embedding", word, "-o", str(out), "--timestep", "500",
                        "--noises", "1", "--probes", "1"],
        "profile": ["profile", photos, "--embedding", word, "-o", str(out), "--bins", "1", "--noises", "2"],
        "survival": ["survival", photos, photos, "--purifier", "jpeg:75", "-o", str(out / "survival.json")],
        "convert": ["convert", word, "-o", str(out / "word.safetensors")],
        "chaos": ["chaos", "defend/vespr_cifar10_mini", "-o", str(out), "--kills", "0", "--fault", "slow_reader"],
        "demo": ["demo", "szt", "-o", str(out)],
    }  # fmt: skip


NO_FOLDER = {"bench", "doctor", "evaluate", "grid", "names"}
"""Commands that write no folder of their choice: bench adds rows to a CSV, evaluate writes into a run, and a grid's
folder stands in its file (tests/commands/test_grid.py)."""
OVERWRITE = {"train": "run.overwrite=true", "poison": "run.overwrite=true"} | dict.fromkeys(
    ("data", "protect", "masks", "generate"), "--overwrite"
)
SLOW = {"demo"}
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in sorted(commands(Path(), Path()))]


def put_strangers(folder):
    """Those of the strangers' files that do not stand in a file's way, and their bytes."""
    put = {}
    for name in STRANGERS:
        path = folder / name
        if path.exists() or any(parent.is_file() for parent in path.parents):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{name} is not yours".encode())
        put[path] = path.read_bytes()
    return put


def run(arguments):
    """Whether the command did it; errors must be ours."""
    result = CliRunner().invoke(app, arguments)
    if result.exit_code and not isinstance(result.exception, SystemExit):
        assert isinstance(result.exception, PoisonShieldError), (result.exception, result.output)
    return result.exit_code == 0


def lost(put):
    return [str(path) for path, content in put.items() if not path.is_file() or path.read_bytes() != content]


def test_every_command_is_asked(tmp_path):
    assert set(commands(tmp_path, tmp_path)) | NO_FOLDER == set(COMMANDS.names())


@pytest.mark.parametrize("name", NAMES)
def test_folder_of_somebody_else_keeps_every_file(given, tmp_path, name):
    out = tmp_path / "out"
    put = put_strangers(out)
    arguments = commands(given, out)[name]
    for extra in ([], [OVERWRITE[name]] if name in OVERWRITE else []):
        run([*arguments, *extra])
        assert lost(put) == []


@pytest.mark.parametrize("name", sorted({*commands(Path(), Path())} - {"chaos", "demo"}))
def test_files_put_beside_ours_are_kept_when_ours_are_replaced(given, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    arguments = commands(given, out)[name]
    assert run(arguments)
    put = put_strangers(out)
    for extra in ([], [OVERWRITE[name]] if name in OVERWRITE else []):
        run([*arguments, *extra])
        assert lost(put) == []


def test_bundled_data_are_never_written(tmp_path):
    folder = open_dataset("cifar10-mini", "train").folder
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    run(["data", "import", str(folder), "-o", str(tmp_path / "out")])
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
