"""What this machine has, and what poisonshield would do on it. Changes nothing."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys

import torch

from poisonshield import __version__, ops
from poisonshield.data import bundled_names
from poisonshield.engine.backends.base import Backend
from poisonshield.engine.settings import backends

_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "triton",
    "deepspeed",
    "diffusers",
    "webdataset",
    "safetensors",
    "pydantic",
    "tensorboard",
)


def report() -> dict[str, dict[str, str]]:
    """Facts by section: versions, devices, engine backends, op backends, launchers, data."""
    return {
        "versions": {"poisonshield": __version__, "python": platform.python_version()}
        | {p: _version(p) for p in _PACKAGES},
        "devices": _devices(),
        "engine backends": {name: _backend(name) for name in backends.names()},
        "op backends": ops.info() | _compilers(),
        "launch": _launch(),
        "data": {"bundled": ", ".join(bundled_names()) or "none: the installation is incomplete"},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    facts = {"cpu": f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"}
    if not torch.cuda.is_available():
        reason = "torch is built without CUDA" if torch.version.cuda is None else "torch sees no GPU or driver"
        return facts | {"cuda": f"none ({reason}); training runs on the CPU"}
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        facts[f"cuda:{i}"] = f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}"
    return facts


def _backend(name: str) -> str:
    backend: type[Backend] = backends.get(name)
    for package in backend.packages:
        if importlib.util.find_spec(package) is None:
            return f"not installed: pip install '.[{package}]'"
    return f"ready: {backend.summary}"


def _compilers() -> dict[str, str]:
    names = {"nvcc": ("nvcc",), "C++ compiler": (os.environ.get("CXX") or "g++", "clang++")}
    return {name: next((p for c in tried if (p := shutil.which(c))), "not found") for name, tried in names.items()}


def _launch() -> dict[str, str]:
    facts = {}
    for command in ("torchrun", "deepspeed", "srun", "pdsh"):
        beside = os.path.join(os.path.dirname(sys.executable), command)
        path = shutil.which(command) or (beside if os.path.exists(beside) else None)
        facts[command] = path or "not found"
    given = {
        k: os.environ[k] for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "SLURM_JOB_ID") if k in os.environ
    }
    facts["environment"] = ", ".join(f"{k}={v}" for k, v in given.items()) or "no launcher: one process"
    distributed = torch.distributed.is_available()
    facts["process groups"] = (
        "gloo" + (", nccl" if torch.distributed.is_nccl_available() else "") if distributed else "torch lacks them"
    )
    return facts
