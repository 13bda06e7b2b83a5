"""Shared by all tests: where the optional real data is, and one thread, so that sums are the same on every machine."""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Triton's functions decide when they are imported whether they are interpreted or compiled, so that a process has one
# way for all tests: the interpreter without a GPU, and with one where TRITON_INTERPRET=1 asks for it.
INTERPRETING = os.environ.pop("TRITON_INTERPRET", None) == "1" or not torch.cuda.is_available()
if INTERPRETING:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language  # noqa: F401

    del os.environ["TRITON_INTERPRET"]

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="poisonshield-tests-")  # no test writes into the user's own
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

sys.path.insert(0, str(Path(__file__).parent))  # tiny.py and dist.py
torch.set_num_threads(1)

SLOW_TIMEOUT_S = 5400
LARGEST_KEPT = 4096  # bytes of an encoded image


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests get hours where others get the minutes of pyproject.toml; GPU tests run on compiled kernels alone."""
    interpreted = "Triton kernels are interpreted in this process"
    absent = interpreted if torch.cuda.is_available() else "needs a CUDA device"
    for item in items:
        if INTERPRETING and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=absent))
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))


SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def cifar10_folder() -> Path:
    """CIFAR-10 as tar shards of JPEG next to the checkout; the test is skipped without it."""
    folder = SHARED / "cifar10"
    if not (folder / "manifest.json").is_file():
        pytest.skip(f"needs CIFAR-10 shards in {folder}")
    return folder


@pytest.fixture(scope="session", autouse=True)
def small_images_are_decoded_once() -> Iterator[None]:
    """Many tests read the same 6,000 bundled images: the first in a process decodes them, the others get copies."""
    kept: dict[tuple[bytes, str], torch.Tensor] = {}

    def decode(data: bytes, extension: str, *, name: str) -> torch.Tensor:
        if len(data) > LARGEST_KEPT:
            return whole(data, extension, name=name)
        if (data, extension) not in kept:
            kept[data, extension] = whole(data, extension, name=name)  # raises with this name, and keeps nothing
        return kept[data, extension].clone()

    from poisonshield.data import shards

    whole = shards.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "decode", decode)
        yield


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton kernels run in Triton's interpreter, on CPU tensors: backend="triton" works without a GPU.

    Skipped where the process compiles them for its GPU: an interpreted one that stayed would pass for a compiled one.
    """
    if not INTERPRETING:
        pytest.skip("Triton kernels are compiled in this process. TRITON_INTERPRET=1 pytest ... interprets them.")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    yield


@pytest.fixture(scope="session")
def dreambooth_folder() -> Path:
    """DreamBooth photographs, one folder a subject, next to the checkout; the test is skipped without them."""
    folder = SHARED / "dreambooth"
    if not folder.is_dir():
        pytest.skip(f"needs DreamBooth photographs in {folder}")
    return folder
