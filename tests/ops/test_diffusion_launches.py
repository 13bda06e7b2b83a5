"""What a call of the diffusion kernels costs beside its kernels, and the integers that they are launched with."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from poisonshield.ops import extension, masked_diffusion_loss, q_sample
from poisonshield.ops.diffusion import cuda_binding, reference

pytestmark = pytest.mark.usefixtures("interpreted")
HERE = Path(__file__).parent
SHAPE = (3, 4, 8, 6)
ALPHAS = torch.linspace(0.999, 0.01, 50)
LAYOUTS = {"rows": torch.contiguous_format, "sites": torch.channels_last}


def made(*shape, seed=0, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


class Passes(TorchDispatchMode):
    """Names of the operators that go through memory; those of the CUDA library are counted and not run."""

    def __init__(self, least=0):
        super().__init__()
        self.least, self.names = least, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith("poisonshield_cuda"):
            self.names.append(name)
            return None
        out = func(*args, **kwargs or {})
        made = out if isinstance(out, tuple) else (out,)
        views = func.is_view or "empty" in name
        if not views and any(isinstance(v, torch.Tensor) and v.numel() >= self.least for v in made):
            self.names.append(name)
        return out


class Launches:
    """Stands for a kernel; counts its launches."""

    def __init__(self):
        self.count = 0

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **options):
        self.count += 1


def noising(layout):
    x0, noise = (made(*SHAPE, seed=s).to(memory_format=LAYOUTS[layout]) for s in range(2))
    stream = torch.tensor(0)
    return reference.NoisingArguments(
        x0, torch.tensor([0, 20, 49]), ALPHAS, noise, stream, stream, stream, False, torch.float32
    )


def loss(layout):
    (example, _) = reference.examples()["diffusion_loss"]
    pred, target = (made(*SHAPE, seed=s).to(memory_format=LAYOUTS[layout]) for s in range(2))
    mask = made(3, 1, 8, 6, seed=2).clamp(min=0)
    return example._replace(pred=pred, target=target, x0=None, noise=None, mask=mask, weight=None, gamma=0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("drawn", [False, True])
def test_a_result_of_the_cuda_kernels_is_written_once(layout, drawn):
    if extension.missing():
        pytest.skip(extension.missing())
    args, of_loss = noising(layout), loss(layout)
    with Passes(args.x0.numel()) as passes:
        cuda_binding.q_sample(args._replace(noise=None, return_noise=True) if drawn else args)
    assert passes.names == ["poisonshield_cuda::noising_"]
    with Passes(args.x0.numel()) as passes:
        cuda_binding.diffusion_loss(of_loss)
    assert passes.names == ["poisonshield_cuda::loss_"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_result_of_the_triton_kernels_is_written_once(layout, monkeypatch):
    kernels = pytest.importorskip("poisonshield.ops.diffusion.triton_kernels")
    launches = Launches()
    for name in ("noising", "loss_and_gradient"):
        monkeypatch.setattr(kernels, name, launches)
    args, of_loss = noising(layout), loss(layout)
    with Passes(args.x0.numel()) as passes:
        kernels.q_sample(args)
        kernels.q_sample(args._replace(noise=None, return_noise=True))
        kernels.diffusion_loss(of_loss)
    assert launches.count == 3 and not passes.names


def test_what_must_be_copied_still_is():
    """Another order of memory than the two that kernels know."""
    kernels = pytest.importorskip("poisonshield.ops.diffusion.triton_kernels")
    args = noising("rows")
    args = args._replace(x0=args.x0.transpose(2, 3).contiguous().transpose(2, 3))
    with Passes(args.x0.numel()) as passes, pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "noising", Launches())
        out, _ = kernels.q_sample(args)
    assert out.stride() == args.x0.stride() and passes.names == ["aten::copy_"] * 2


def test_the_public_functions_add_no_pass_of_their_own():
    """On tensors whose numbers nobody may look at, as on a GPU."""
    x0, noise, pred = (made(*SHAPE, seed=s, device="meta") for s in range(3))
    t, alphas = torch.zeros(3, dtype=torch.int64, device="meta"), ALPHAS.to("meta")
    mask = torch.ones(3, 1, 8, 6, device="meta")
    with Passes() as passes:
        q_sample(x0, t, alphas, noise=noise)
    assert passes.names == ["poisonshield::q_sample"]
    with Passes() as passes:
        out = masked_diffusion_loss(pred.requires_grad_(), target=noise, mask=mask)
    assert passes.names == ["poisonshield::diffusion_loss", "aten::sum"]
    with Passes(x0.numel()) as passes:
        out.backward()
    assert passes.names == ["aten::mul.Tensor"]  # by what comes from above


def test_a_kernel_of_ones_compiles():
    """Triton makes a constant of an integer argument that is 1, on which methods of tensors do not work."""
    pytest.importorskip("triton")
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import json
from aot import compiled
from poisonshield.ops.diffusion.triton_kernels import aot_cases
for name, kernel, signature, constants, options, even in aot_cases():
    if name in ("noising_drawn", "noising_drawn_sites", "loss_v", "loss_given_sites"):
        ones = dict.fromkeys((n for n, kind in signature.items() if kind == "i32"), 1)
        signature |= dict.fromkeys(ones, "constexpr")
        even = [n for n in even if n not in ones]
        made = compiled(kernel, signature, constants | ones, options, even)
        print(json.dumps([name, len(ones), len(made.asm["cubin"])]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=clean, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [ones for _, ones, _ in found] == [3, 3, 6, 6] and all(size for *_, size in found)


def test_a_mask_may_lie_beyond_two_gigabytes():
    """Its third row begins where 32 bits end, and wrong ones lead to the other half, which nobody wrote."""
    from poisonshield.ops.diffusion import triton_kernels as kernels

    step, (count, inner) = 2**30, (24, 6)
    mask = torch.empty(4 * step + count, dtype=torch.uint8)[2 * step :]  # what nobody touches takes no memory
    for row in range(3):
        mask[row * step : row * step + count] = row
    pred, target, ones = made(3, count), made(3, count, seed=1), torch.ones(3)
    sums, nothing, word = torch.empty(3, 1), torch.empty(0), torch.tensor(0)
    kernels.loss_and_gradient[(1, 3)](
        pred, target, target, target, mask, word, ALPHAS, word, word, word, ones, nothing, sums,
        1.0, count, 4, inner, step, inner, 1,
        SITES=False, KIND=0, DRAW=False, LOSS=0, HAS_MASK=True, GRAD=False, BLOCK=32,
    )  # fmt: skip
    expected = (pred - target).square().sum(1) * torch.arange(3)
    torch.testing.assert_close(sums[:, 0], expected)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 1), (1, 4, 1), (2, 1, 3, 3)])
@pytest.mark.parametrize("drawn", [False, True])
def test_sizes_of_one_equal_the_reference(shape, drawn):
    pred, x0 = made(*shape), made(*shape, seed=1)
    source = {"seed": 3} if drawn else {"noise": made(*shape, seed=2)}
    mask = torch.ones(1, *shape[1:]) / 2
    settings = {"t": torch.arange(shape[0]), "alphas_cumprod": ALPHAS, "x0": x0, "prediction_type": "v", "mask": mask}
    settings |= source
    ours, plain = (masked_diffusion_loss(pred, backend=b, **settings) for b in ("triton", "reference"))
    torch.testing.assert_close(ours, plain)
    noised = [q_sample(x0, settings["t"], ALPHAS, backend=b, **source) for b in ("triton", "reference")]
    torch.testing.assert_close(*noised)


def sass(library):
    """(name, instructions) of each kernel in the compiled library, and the registers of each."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file() and not (tool := shutil.which("cuobjdump")):
        pytest.skip("needs cuobjdump")
    code = subprocess.run([tool, "-sass", library], capture_output=True, text=True, check=True).stdout
    use = subprocess.run([tool, "-res-usage", library], capture_output=True, text=True, check=True).stdout
    bodies = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", code, re.DOTALL))
    uses = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", use)
    return bodies, {name: tuple(map(int, numbers)) for name, *numbers in uses}


def test_loads_of_the_cuda_kernels_are_16_bytes_wide():
    """Of the forms that are taken where tensors are aligned: template arguments end in true, false."""
    if extension.missing():
        pytest.skip(extension.missing())
    (library,) = Path(extension.__file__).parents[1].glob("_C*.so")
    bodies, uses = sass(library)
    wide = [name for name in bodies if re.search(r"(7noising|17loss_and_gradient)I.*Lb1ELb0E", name)]
    assert len(wide) == 10
    for name in wide:
        registers, stack, local = uses[name]
        assert registers <= (32 if "7noising" in name else 48) and stack == local == 0, (name, uses[name])
        loads = len(re.findall(r"LDG\.E\.128", bodies[name]))
        assert loads >= (2 if "7noising" in name else 3), (name, loads)
