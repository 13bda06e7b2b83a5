"""The compiled JPEG kernels in poisonshield/_C*.so: shared memory, and the width of loads and stores."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import poisonshield
from poisonshield.ops import extension

KERNELS = ("code_whole", "decode_units", "join_planes", "return_whole", "return_units")
SHARED = {"return_units": 24 << 10}  # bytes of a thread block, at most; 12 KiB where none is named


def tool():
    """cuobjdump of the toolkit, or that which comes with Triton."""
    found = importlib.util.find_spec("triton")
    beside = Path(found.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if found else None
    return shutil.which("cuobjdump") or (str(beside) if beside is not None and beside.is_file() else None)


def told(option):
    """What the tool tells of each JPEG kernel: {name without parameters: [text of each of its variants]}."""
    if tool() is None:
        pytest.skip("needs cuobjdump")
    modules = sorted(Path(poisonshield.__file__).parent.glob("_C*.so"))
    if not modules:
        pytest.skip(str(extension.missing()))
    done = subprocess.run([tool(), option, str(modules[0])], capture_output=True, text=True, check=True)
    kernels = {}
    for part in re.split(r"\bFunction\s*:?\s*", done.stdout)[1:]:
        for name in KERNELS:
            if f"{len(name)}{name}I" in part.split("\n", 1)[0]:
                kernels.setdefault(name, []).append(part)
    if not kernels:
        pytest.skip(f"{modules[0].name} is of an older source, without these kernels")
    return kernels


def test_thread_blocks_share_little_enough_for_several_on_a_processor():
    """A processor has 227 KiB; registers are looked at for all kernels together, in test_extension.py."""
    kernels = told("-res-usage")
    assert kernels.keys() == set(KERNELS)
    for name, variants in kernels.items():
        assert len(variants) >= 3
        for text in variants:
            assert int(re.search(r"SHARED:(\d+)", text)[1]) <= SHARED.get(name, 12 << 10), text


@pytest.mark.slow
def test_pixels_are_read_and_written_in_whole_words():
    for name, variants in told("-sass").items():
        for text in variants:
            symbol = text.split("\n", 1)[0]
            pixels = "64" if "EhEEv" in symbol else "128"  # 8-bit, or not
            planes = "64" if "Exact" in symbol else "128"  # bytes, or float32
            read, written = planes if name == "join_planes" else pixels, planes if name == "decode_units" else pixels
            assert re.search(rf"LDG\.E\S*\.{read}\b", text), symbol
            assert re.search(rf"STG\.E\S*\.{written}\b", text), symbol
            assert not re.search(r"\b(LDL|STL)\b", text), symbol
