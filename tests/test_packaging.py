"""What is released: the source distribution builds everything, and the wheel that is built from it runs alone."""

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ONLY_IN_GIT = {".gitattributes", ".gitignore"}


def tracked():
    """All files of the checkout that git knows, relative to it; the test is skipped where there is no git."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).exists()]


def build(kind, source, out):
    """The file that setuptools builds from a folder: kind sdist or wheel, without CUDA operators."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    environment = os.environ | {"POISONSHIELD_BUILD_CUDA": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The unpacked source distribution of a clean copy of the checkout."""
    place = tmp_path_factory.mktemp("packaging")
    for name in tracked():
        (place / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, place / "checkout" / name)
    archive = build("sdist", place / "checkout", place)
    with tarfile.open(archive) as tar:
        tar.extractall(place, filter="data")
    return place / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist):
    """The wheel that is built from it."""
    return build("wheel", sdist, sdist.parent)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder for PYTHONPATH with the wheel's files."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


def run_installed(installed, code, cwd):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_source_distribution_holds_every_file_of_the_checkout(sdist):
    held = {p.relative_to(sdist).as_posix() for p in sdist.rglob("*") if p.is_file()}
    assert set(tracked()) - ONLY_IN_GIT <= held
    extra = held - set(tracked())
    assert all(name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name for name in extra), extra


def test_git_ignores_no_source_file():
    """poisonshield/runs/ is a part of the package; runs/ at the top is where trainings go."""
    tracked()
    command = [
        "git",
        "check-ignore",
        "--no-index",
        "poisonshield/runs/a.py",
        "tests/runs/a.py",
        "poisonshield/build/a.py",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "" and done.returncode == 1, done.stdout + done.stderr


def test_every_file_that_the_compiled_sources_include_is_in_the_source_distribution(sdist):
    included = {
        (p, line.split('"')[1])
        for p in (sdist / "csrc").rglob("*.[ch]*")
        for line in p.read_text().splitlines()
        if line.startswith(('#include "', "#define POISONSHIELD_KERNELS"))
    }
    assert {"launch.cuh", "philox.cuh", "levels.h", "jpeg_kernels.h", "pgd_kernels.h"} <= {name for _, name in included}
    for source, name in included:
        assert (source.parent / name).is_file() or (sdist / "csrc" / "include" / name).is_file(), (source, name)


def test_the_wheel_holds_configs_and_all_files_that_the_package_reads(wheel):
    with zipfile.ZipFile(wheel) as file:
        held = set(file.namelist())
    package = {n for n in tracked() if n.startswith("poisonshield/")}
    configs = {f"poisonshield/{n}" for n in tracked() if n.startswith("configs/")}
    assert package | configs <= held and len(configs) > 20
    for name in (
        "poisonshield/py.typed",
        "poisonshield/ops/README.md",
        "poisonshield/data/bundled/cifar10-mini/train/shard-00000.tar.gz",
        "poisonshield/models/diffusion/tiny/unet/diffusion_pytorch_model.safetensors",
        "poisonshield/reports/templates/report.html",
        "poisonshield/_no_cuda.txt",
    ):
        assert name in held, name
    rest = {n for n in held - package - configs if ".dist-info/" not in n}
    cpu = {n for n in rest if n in ("poisonshield/_cpu.abi3.so", "poisonshield/_no_cpu.txt")}
    assert len(cpu) == 1 and rest == {"poisonshield/_no_cuda.txt", *cpu}, rest  # neither tests nor launch files


def test_the_wheel_tells_who_wrote_it_and_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as file:
        (name,) = (n for n in file.namelist() if n.endswith(".dist-info/METADATA"))
        told = email.message_from_bytes(file.read(name))
        scripts = file.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert told["Author"] == "The poisonshield authors" and told["License-Expression"] == "Apache-2.0"
    assert told["License-File"] == "LICENSE" and "Typing :: Typed" in told.get_all("Classifier")
    assert set(told.get_all("Provides-Extra")) >= {"opencv", "brisque", "deepspeed", "tensorboard", "test", "dev"}
    assert "poisonshield = poisonshield.cli:main" in scripts


def test_an_installed_package_finds_its_own_configs_by_name(installed, tmp_path):
    told = run_installed(
        installed,
        "from poisonshield.config import find_config, load_tree, shipped_configs\n"
        "name = 'defend/vespr_in100'\n"
        "print(find_config(name), len(shipped_configs()), load_tree(name).values['seed'])",
        tmp_path,
    )
    path, count, seed = told.split()
    assert path == str(installed / "poisonshield/configs/defend/vespr_in100.yaml")
    assert int(count) == len(list((ROOT / "configs").glob("**/*.yaml"))) and seed == "0"


def test_an_installed_command_prints_the_settings_of_a_named_config(installed, tmp_path):
    code = "from poisonshield.cli import main; main(['train', 'defend/vespr_cifar10_mini', '--print-config'])"
    assert "vespr" in run_installed(installed, code, tmp_path)
