"""The compiled CUDA operators: what can be known of them without a GPU, and how the build decides."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from poisonshield.ops import extension, info

ROOT = Path(__file__).resolve().parents[2]

# Registers of a thread, at most, of each kernel for sm_90.
REGISTERS = {
    "linf_step": 96,
    "linf_start": 72,
    "ball_sums": 80,
    "ball_step": 104,
    "noise_sums": 40,
    "ball_start": 48,
    "noising": 64,
    "loss_and_gradient": 80,
    "add_rows": 40,
    "code_whole": 64,
    "decode_units": 64,
    "join_planes": 64,
    "return_whole": 128,
    "return_units": 112,
}


@pytest.fixture(scope="module")
def library():
    reason = extension.missing()
    if reason:
        pytest.skip(reason)
    (path,) = Path(extension.__file__).parents[1].glob("_C*.so")
    return path


def test_it_loads_without_a_gpu_and_shows_its_schemas(library):
    assert library.name == "_C.abi3.so"
    ops = torch.ops.poisonshield_cuda
    declared = re.findall(r'^\s+"(\w+)\(', (ROOT / "csrc" / "bindings.cpp").read_text(), re.MULTILINE)
    assert len(declared) >= 6
    schemas = {name: str(getattr(ops, name).default._schema) for name in declared}
    assert "Tensor(a!) x" in schemas["linf_step_"] and "Tensor(b!) sums" in schemas["ball_step_"]
    assert schemas["noising_"].endswith("-> ()")
    if not torch.cuda.is_available():
        assert info()["cuda"] == "no CUDA device"


def test_cpu_tensors_are_refused(library):
    x, one = torch.zeros(1, 3, 4, 4), torch.ones(1)
    with pytest.raises(NotImplementedError, match="poisonshield_cuda::linf_step_"):
        torch.ops.poisonshield_cuda.linf_step_(
            x, x.clone(), x.clone(), one, 0.0, one, 0.0, None, None, None, None, 0.0, 1.0, 1
        )


def test_kernels_use_registers_alone(library):
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-res-usage", library], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    seen = set()
    for name, registers, stack, local in found:
        (kernel,) = (k for k in REGISTERS if re.search(rf"\d{k}", name))
        seen.add(kernel)
        print(kernel, registers, stack, local)
        assert int(registers) <= REGISTERS[kernel] and int(stack) == int(local) == 0, name
    assert seen == set(REGISTERS)


def test_the_shared_generator_is_the_same_in_cpp(tmp_path):
    """csrc/include/philox.cuh compiled as plain C++ draws what random.py draws."""
    from poisonshield.random import philox_uniform, philox_words

    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    (tmp_path / "main.cpp").write_text(
        '#include "philox.cuh"\n#include <cstdio>\nint main() {\n'
        "  const poisonshield::Stream s{-5, 7, (int64_t(3) << 40) + 11, 4000000000};\n"
        "  for (uint32_t i = 0; i < 9; ++i)\n"
        '    printf("%u %.9g\\n", poisonshield::philox(s, i / 4).w[i % 4], poisonshield::uniform_at(s, i));\n}\n'
    )
    program = tmp_path / "main"
    subprocess.run([compiler, "-I", ROOT / "csrc" / "include", tmp_path / "main.cpp", "-o", program], check=True)
    rows = [line.split() for line in subprocess.run([program], capture_output=True, text=True).stdout.splitlines()]
    ids = torch.tensor([(3 << 40) + 11])
    assert [int(w) for w, _ in rows] == philox_words(9, seed=-5, ids=ids, offset=7, stream=4000000000)[0].tolist()
    u = philox_uniform((1, 9), -5, 7, sample_ids=ids, stream=4000000000)
    assert torch.equal(torch.tensor([float(v) for _, v in rows]), u[0])


@pytest.fixture
def checkout(tmp_path):
    """What setup.py needs, in a place where it may write its reason."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "poisonshield").mkdir()
    (tmp_path / "poisonshield" / "__init__.py").write_text('__version__ = "0"\n')
    return tmp_path


def configure(checkout, **environment):
    """Run setup.py as far as its name, which is after it has decided what to build."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("POISONSHIELD", "CUDA_"))}
    return subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=checkout, env=clean | environment, capture_output=True, text=True
    )


def reason(checkout):
    return (checkout / "poisonshield" / "_no_cuda.txt").read_text().strip()


def test_zero_builds_the_pure_package_and_keeps_the_reason(checkout):
    done = configure(checkout, POISONSHIELD_BUILD_CUDA="0")
    assert done.returncode == 0 and "warning: the pure package" not in done.stderr
    assert reason(checkout) == "POISONSHIELD_BUILD_CUDA=0 when it was installed"


def test_auto_without_nvcc_builds_the_pure_package_and_says_why(checkout):
    done = configure(checkout, PATH="/usr/bin:/bin")
    if shutil.which("nvcc", path="/usr/bin:/bin"):
        pytest.skip("nvcc lies in /usr/bin")
    assert done.returncode == 0 and "warning: the pure package is built, without CUDA operators: no nvcc" in done.stderr
    assert reason(checkout) == "no nvcc on PATH: install a CUDA toolkit or set CUDA_HOME"


def test_one_without_nvcc_fails_with_the_reason(checkout):
    done = configure(checkout, POISONSHIELD_BUILD_CUDA="1", CUDA_HOME=str(checkout))
    assert done.returncode != 0
    assert f"the CUDA operators cannot be built: no nvcc in {checkout}" in done.stderr


def test_other_choices_are_refused(checkout):
    done = configure(checkout, POISONSHIELD_BUILD_CUDA="yes")
    assert done.returncode != 0 and "POISONSHIELD_BUILD_CUDA='yes' is none of auto, 0, 1." in done.stderr


def test_without_torch_the_way_out_is_named(checkout):
    (checkout / "torch.py").write_text("raise ImportError\n")
    done = configure(checkout, POISONSHIELD_BUILD_CUDA="1", PYTHONPATH=str(checkout))
    assert done.returncode != 0 and "use pip install --no-build-isolation" in done.stderr


def test_without_a_compiler_the_package_is_built_and_the_reason_is_kept(checkout):
    """The CPU library is optional."""
    shutil.copytree(ROOT / "csrc" / "cpu", checkout / "csrc" / "cpu")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CUDA_")}
    absent = {"CC": "/absent/cc", "CXX": "/absent/c++", "POISONSHIELD_BUILD_CUDA": "0"}
    command = [sys.executable, "setup.py", "build", "--build-base", "made", "--build-lib", "made/lib"]
    done = subprocess.run(command, cwd=checkout, env=clean | absent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning: the CPU library is not built" in done.stderr
    told = (checkout / "made" / "lib" / "poisonshield" / "_no_cpu.txt").read_text()
    assert told.startswith("it needs g++ or clang++ with C++17, and compiling it gave: ") and "/absent/c" in told
    assert not list((checkout / "made" / "lib" / "poisonshield").glob("_cpu*.so"))


def test_doctor_tells_the_reason():
    from poisonshield.api.doctor import report

    facts = report()["op backends"]
    assert facts["cuda"] == info()["cuda"] and {"nvcc", "C++ compiler"} <= set(facts)
    json.dumps(facts)
