"""Compiles csrc/*.cu as plain C++ with address and undefined-behaviour sanitizers, and runs scripts on it.

    library = emulate.build(tmp_path, "pgd")          # csrc/pgd.cu with the schemas of csrc/bindings.cpp
    emulate.run(library, "script.py", "argument")     # its standard output; raises AssertionError with what it told

In the script `torch.ops.load_library(sys.argv[1])` gives torch.ops.poisonshield_cuda, whose operators then take tensors
of the CPU: kernels, launches and checks are those of the source. `cuda_runtime.h` beside this file tells how.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CSRC = ROOT / "csrc"

# Most of the time goes into compiling, so that nothing is optimized.
FLAGS = ["-std=c++20", "-O0", "-g1", "-ffp-contract=off", "-Wno-psabi"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]
REWRITES = (
    (r"([\w:]+(?:<[^<>;]*>)?)<<<(.*?)>>>\s*\(", r"emulate::launch(\1, \2)("),
    (r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];", r"auto* const \2 = emulate::dynamic_shared<\1>();"),
    # Any device's tensors, so that what a kernel file checks of them is seen too.
    (r"STABLE_TORCH_LIBRARY_IMPL\((\w+), CUDA,", r"STABLE_TORCH_LIBRARY_IMPL(\1, CompositeExplicitAutograd,"),
)


def missing():
    """Why nothing can be emulated here, or None."""
    if shutil.which("g++") is None:
        return "needs g++"
    if not _sanitizer().is_absolute():
        return "needs libasan of g++"
    return None


def rewritten(source):
    """A .cu file's text as C++; lines keep their numbers."""
    for pattern, by in REWRITES:
        source = re.sub(pattern, by, source, flags=re.DOTALL)
    return source


def program(folder, source):
    """folder/program of a whole CUDA source with a `main`. Raises AssertionError with the compiler's words."""
    path = Path(folder, "program.cpp")
    path.write_text(rewritten(source))
    _run(["g++", *FLAGS, *SANITIZERS, f"-I{HERE}", path, "-o", path.with_suffix("")])
    return path.with_suffix("")


def build(folder, *stems):
    """folder/emulated.so of csrc/<stem>.cu and csrc/bindings.cpp. Raises AssertionError with the compiler's words."""
    import torch

    sources = []
    for path in [CSRC / "bindings.cpp", *(CSRC / f"{stem}.cu" for stem in stems)]:
        sources.append(Path(folder, f"{path.stem}.cpp"))
        sources[-1].write_text(f'#include "stable_torch.h"\n#line 1 "{path}"\n{rewritten(path.read_text())}')
    installed = Path(torch.__file__).parent
    places = [f"-I{HERE}", f"-I{CSRC / 'include'}", "-isystem", installed / "include"]
    libraries = [f"-L{installed / 'lib'}", "-ltorch_cpu"]
    defines = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    library = Path(folder, "emulated.so")
    _run(["g++", "-shared", "-fPIC", *FLAGS, *SANITIZERS, *defines, *places, *sources, *libraries, "-o", library])
    return library


def run(library, script, *arguments, descending=False):
    """What `python script library arguments` prints. Raises AssertionError with its errors, a sanitizer's included."""
    preload = f"{_sanitizer()} {_file('libstdc++.so')}"  # the sanitizer must come before all that allocates
    options = {
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "EMULATE_ORDER": "descending" if descending else "ascending",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    return _run([sys.executable, script, library, *arguments], os.environ | options)


def _run(command, environment=None):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, (
        f"{command[0]} ended with {done.returncode}:\n{done.stdout[-1000:]}{done.stderr[-5000:]}"
    )
    return done.stdout


def _file(name):
    return Path(subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip())


def _sanitizer():
    return _file("libasan.so")
