"""Shared by all tests: where the optional real data is, and one thread, so that sums do not depend on the machine's cores."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # tiny.py and dist.py
torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def cifar10_folder() -> Path:
    """CIFAR-10 as tar shards of JPEG next to the checkout; the test is skipped without it."""
    folder = SHARED / "cifar10"
    if not (folder / "manifest.json").is_file():
        pytest.skip(f"needs CIFAR-10 shards in {folder}")
    return folder
