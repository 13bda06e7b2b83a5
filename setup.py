"""Builds the package; all metadata is in pyproject.toml.

POISONSHIELD_BUILD_CUDA decides about the compiled CUDA operators in csrc: `auto` (default) builds them where torch can
be imported and an nvcc of its CUDA version is found, and otherwise installs the pure package; `0` never; `1` builds or
fails. A GPU is not needed. The reason for a pure package is kept for `poisonshield doctor`. Building needs
`pip install --no-build-isolation`, since torch is not fetched a second time for it. TORCH_CUDA_ARCH_LIST overrides
9.0+PTX. Either way the shipped configs go into the package: configs/ becomes poisonshield/configs.

The CPU library in csrc/cpu needs a C++ compiler alone. Where it cannot be compiled the package is installed without it,
and the reason is kept as well.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
REASON = ROOT / "poisonshield" / "_no_cuda.txt"


class CannotBuild(Exception):
    """Why the CUDA operators cannot be built here, and the way out."""


class BuildWithConfigs(build_py):
    """Copies configs/ into the package. In a checkout and an editable install they stay where they are."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for target, source in self.configs().items():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target)

    def configs(self):
        """Built file -> file of the checkout, relative to it."""
        folder = Path(self.build_lib, "poisonshield")
        return {str(folder / p): str(p) for p in sorted(Path("configs").glob("**/*")) if p.is_file()}

    def get_outputs(self, include_bytecode=True):
        """All files that are built."""
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, *self.configs()]

    def get_output_mapping(self):
        """The same with their sources, which a strict editable install links."""
        return {**super().get_output_mapping(), **self.configs()}


CPU_LIBRARY = Extension(
    "poisonshield._cpu",  # no module of Python's: ops/native.py loads it
    sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cpu").glob("*.cpp")),
    depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h")),
    language="c++",
    # No product may be fused with a sum: exact mode needs it, and all processors then give the same bits.
    extra_compile_args=["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    + ["-fvisibility=hidden", "-Wno-psabi", "-pthread"],
    extra_link_args=["-pthread"],
    optional=True,
    py_limited_api=True,
)


def building(parent):
    """The build_ext class `parent`, which goes on without the CPU library where it cannot be compiled."""

    class BuildWithCpuLibrary(parent):
        def build_extension(self, ext):
            if ext is not CPU_LIBRARY:
                super().build_extension(ext)
                return
            in_place = self.inplace or self.editable_mode
            reason = (ROOT if in_place else Path(self.build_lib)) / "poisonshield" / "_no_cpu.txt"
            reason.unlink(missing_ok=True)
            try:
                super().build_extension(ext)
            except Exception as err:  # whatever a missing or an old compiler leads to
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
                told = f"it needs g++ or clang++ with C++17, and compiling it gave: {str(err).splitlines()[0]}"
                print(f"warning: the CPU library is not built, and the ops run without it: {told}", file=sys.stderr)
                reason.parent.mkdir(parents=True, exist_ok=True)
                reason.write_text(f"{told}\n")

    return BuildWithCpuLibrary


def toolkit():
    """The root of the CUDA toolkit and its version. nvcc on PATH may be a script elsewhere, so it is asked itself."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(named, "bin", "nvcc")) if named else shutil.which("nvcc")
    if nvcc is None or not Path(nvcc).is_file():
        raise CannotBuild(f"no nvcc {'in ' + named if named else 'on PATH'}: install a CUDA toolkit or set CUDA_HOME")
    version = re.search(
        r"release (\d+)\.(\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    )
    steps = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", steps, re.MULTILINE)
    if version is None or top is None:
        raise CannotBuild(f"{nvcc} does not tell its version and root: set CUDA_HOME to the toolkit")
    bin_folder = re.search(r"^#\$ _HERE_=(.*)$", steps, re.MULTILINE)
    return Path(bin_folder[1]).parent if bin_folder else Path(top[1]).resolve(), version[1]


def extension():
    """Arguments for setup() that build `poisonshield/_C.abi3.so`. Raises CannotBuild."""
    try:
        import torch
    except ImportError as err:
        raise CannotBuild("torch cannot be imported while building: use pip install --no-build-isolation") from err
    root, major = toolkit()
    if torch.version.cuda is None:
        raise CannotBuild("this torch is built without CUDA: install its CUDA build")
    if torch.version.cuda.split(".")[0] != major:
        raise CannotBuild(f"nvcc is of CUDA {major} and torch of {torch.version.cuda}: install a toolkit of torch's")
    os.environ["CUDA_HOME"] = str(root)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0+PTX")
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = str(root)  # read when imported, perhaps before it was set
    stable = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030A0000", "-DUSE_CUDA"]
    module = cpp_extension.CUDAExtension(
        "poisonshield._C",
        sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.c*")),
        include_dirs=[str(ROOT / "csrc" / "include")],
        library_dirs=[str(p) for p in runtime_folders(root)],
        extra_compile_args={"cxx": ["-O2", "-std=c++20", *stable], "nvcc": ["-O3", "-std=c++20", *stable]},
        py_limited_api=True,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


def runtime_folders(root):
    """A folder with a plain `libcudart.so` where the toolkit has none: packages ship it as libcudart.so.13 alone."""
    if any((root / lib / "libcudart.so").exists() for lib in ("lib64", "lib", "targets/x86_64-linux/lib")):
        return []
    import torch

    site = Path(torch.__file__).parents[1]
    for found in [*root.glob("**/libcudart.so.*"), *site.glob("nvidia/**/libcudart.so.*")]:
        folder = ROOT / "build" / "cudart"
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / "libcudart.so"
        link.unlink(missing_ok=True)
        link.symlink_to(found)
        return [folder]
    return []


def choice():
    wanted = os.environ.get("POISONSHIELD_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"POISONSHIELD_BUILD_CUDA={wanted!r} is none of auto, 0, 1.")
    try:
        if wanted == "0":
            raise CannotBuild("POISONSHIELD_BUILD_CUDA=0 when it was installed")
        arguments = extension()
        REASON.unlink(missing_ok=True)
        return arguments
    except CannotBuild as err:
        if wanted == "1":
            sys.exit(f"POISONSHIELD_BUILD_CUDA=1, and the CUDA operators cannot be built: {err}.")
        if wanted == "auto":
            print(f"warning: the pure package is built, without CUDA operators: {err}", file=sys.stderr)
        REASON.write_text(f"{err}\n")
        return {}


arguments = choice()
commands = arguments.get("cmdclass", {})
setup(
    ext_modules=[*arguments.get("ext_modules", []), CPU_LIBRARY],
    cmdclass={"build_py": BuildWithConfigs, "build_ext": building(commands.get("build_ext", build_ext))},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
