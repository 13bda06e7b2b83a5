"""Every registered op: opcheck, fullgraph compilation, torch.func, determinism, its backends against its reference.

Ops are found by scanning: the calls that are made are those of `examples()` in a room's reference.py.
"""

import importlib
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from poisonshield.errors import BackendError
from poisonshield.ops import dispatch, info, jpeg, masked_diffusion_loss, q_sample, stats, use_backend
from poisonshield.ops.record import flatten

OPS = torch.ops.poisonshield
ALPHAS = torch.linspace(0.99, 0.1, 20)
TS = torch.tensor([3, 11])


def made(*shape, seed=0, grad=False):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.8 + 0.1
    return x.requires_grad_(grad)


def examples():
    """{op: [its record, ...]} of all rooms."""
    found = {}
    for room in dispatch.rooms():
        found |= importlib.import_module(f"poisonshield.ops.{room}.reference").examples()
    return found


CASES = {name: [flatten(record) for record in records] for name, records in examples().items()}
ROWS = [(name, i) for name, rows in CASES.items() for i in range(len(rows))]


def fresh(args):
    """Copies of the tensors, since some ops write to them."""
    return tuple(
        a.detach().clone(memory_format=torch.preserve_format).requires_grad_(a.requires_grad)
        if isinstance(a, torch.Tensor)
        else a
        for a in args
    )


def results(out, args):
    """The outputs, or the first input of an op that writes to it."""
    return [args[0]] if out is None else list(out) if isinstance(out, tuple) else [out]


def test_every_op_has_an_example():
    registered = {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("poisonshield::")}
    assert registered == set(CASES)


@pytest.mark.parametrize("name, row", ROWS)
def test_opcheck(name, row):
    torch.library.opcheck(getattr(OPS, name).default, (*fresh(CASES[name][row]), "auto"))


@pytest.mark.parametrize("name, row", ROWS)
def test_two_runs_are_equal_to_the_bit(name, row):
    op = getattr(OPS, name)
    first, second = fresh(CASES[name][row]), fresh(CASES[name][row])
    with torch.no_grad():
        a, b = op(*first, "auto"), op(*second, "auto")
    assert all(torch.equal(p, q) for p, q in zip(results(a, first), results(b, second), strict=True))


def rounds(name, row):
    """Whether a call rounds coefficients, some of which lie so near to a tie that float32 may round them either way."""
    return name.startswith("jpeg") and "none" not in CASES[name][row]


def agree(name, row, backend, **tolerance):
    outs = []
    with torch.no_grad():
        for b in ("reference", backend):
            args = fresh(CASES[name][row])
            outs.append(results(getattr(OPS, name)(*args, b), args))
    for p, q in zip(*outs, strict=True):
        torch.testing.assert_close(p, q, **tolerance)


# Compilation takes seconds a row. The slow ones are those whose like is compiled in ops/test_jpeg.py, both ways.
SLOW = {("jpeg", 1)}
COMPILED = [pytest.param(*row, marks=pytest.mark.slow) if row in SLOW else row for row in ROWS]


@pytest.mark.parametrize("name, row", COMPILED)
def test_compiled_agrees_with_the_reference(name, row):
    if rounds(name, row):
        pytest.skip("see test_jpeg.py for coefficients next to a tie")
    agree(name, row, "compiled", rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name, row", ROWS)
def test_triton_agrees_with_the_reference(name, row, interpreted):
    if rounds(name, row):
        pytest.skip("see test_jpeg_triton.py for coefficients next to a tie")
    try:
        agree(name, row, "triton", rtol=1e-4, atol=1e-5)
    except BackendError as err:
        pytest.skip(str(err))


@pytest.mark.parametrize("name, row", ROWS)
def test_cpu_agrees_with_the_reference(name, row):
    if rounds(name, row):
        pytest.skip("see test_jpeg_cpu.py for coefficients next to a tie")
    try:
        agree(name, row, "cpu", rtol=1e-4, atol=1e-5)
        torch.library.opcheck(getattr(OPS, name).default, (*fresh(CASES[name][row]), "cpu"))
    except BackendError as err:
        pytest.skip(str(err))


PUBLIC = {
    "jpeg": lambda x, q: jpeg(x, q),
    "jpeg exact": lambda x, q: jpeg(x, q.round(), mode="exact"),
    "q_sample": lambda x, q: q_sample(x, TS, ALPHAS * q[0] / 100, seed=3)[0],
    "masked_diffusion_loss": lambda x, q: masked_diffusion_loss(x, target=x.detach() * 0.5, weight=q, reduction="none"),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_fullgraph_compilation_once_for_all_values(name):
    f, count = PUBLIC[name], CompileCounter()
    compiled = torch.compile(f, fullgraph=True, backend=count)
    for quality in (30.0, 60.0, 90.0):
        q = torch.tensor([quality, quality + 5])
        grads = []
        for function in (f, compiled):
            x = made(2, 3, 16, 24, grad=True)
            function(x, q).square().sum().backward()
            grads.append(x.grad)
        assert torch.equal(*grads) and grads[0].any()
    assert count.frame_count == 1


@pytest.mark.parametrize("name", PUBLIC)
def test_dynamic_shapes(name):
    compiled, count = torch.compile(PUBLIC[name], fullgraph=True, dynamic=True, backend="aot_eager"), 0
    for size in ((16, 24), (33, 40), (48, 56)):
        x, q = made(2, 3, *size), torch.tensor([50.0, 60.0])
        assert torch.equal(compiled(x, q), PUBLIC[name](x, q))
        count += 1
    assert count == 3


@pytest.mark.parametrize("name", PUBLIC)
def test_functional_gradient_and_export(name):
    f, q = PUBLIC[name], torch.tensor([50.0, 60.0])
    x = made(2, 3, 16, 24, grad=True)
    f(x, q).square().sum().backward()
    assert torch.equal(torch.func.grad(lambda x: f(x, q).square().sum())(x.detach()), x.grad)

    class Module(torch.nn.Module):
        def forward(self, x):
            return f(x, q)

    program = torch.export.export(Module(), (x.detach(),))
    assert any("poisonshield" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(x.detach()), f(x.detach(), q))


def test_numbers_given_as_floats_recompile_at_most_once():
    count = CompileCounter()
    compiled = torch.compile(lambda x, q: jpeg(x, q), fullgraph=True, backend=count)
    x = made(1, 3, 16, 16)
    for quality in (30.0, 60.0, 75.0, 90.0):
        assert torch.equal(compiled(x, quality), jpeg(x, quality))
    assert count.frame_count <= 2


def test_backends_are_chosen_by_argument_then_context_then_environment(monkeypatch):
    def ran(backend="auto"):
        stats(reset=True)
        q_sample(made(2, 3, 4), TS, ALPHAS, noise=made(2, 3, 4), backend=backend)
        return set(stats()["runs"])

    assert ran() == {"q_sample on reference"}
    monkeypatch.setenv("POISONSHIELD_BACKEND", "compiled")
    assert ran() == {"q_sample on compiled"}
    with use_backend("reference"):
        assert ran() == {"q_sample on reference"}
        assert ran("compiled") == {"q_sample on compiled"}
    monkeypatch.setenv("POISONSHIELD_BACKEND", "fast")
    with pytest.raises(BackendError, match="'fast' is not an op backend. Known: auto, cuda"):
        ran()


def test_a_backend_asked_for_by_name_runs_or_says_why():
    x = made(1, 3, 8, 8)
    with pytest.raises(BackendError, match="the triton backend cannot run this call: the tensor is on cpu"):
        jpeg(x, 50, backend="triton")
    with pytest.raises(BackendError, match="the cuda backend cannot run this call"):
        jpeg(x, 50, backend="cuda")
    with pytest.raises(BackendError, match="not an op backend"):
        jpeg(x, 50, backend="gpu")


def test_triton_runs_on_the_device_of_its_tensors(monkeypatch):
    """Without this a call for cuda:1 would launch on cuda:0, with pointers of cuda:1."""
    entered, ran = [], []

    @contextmanager
    def device(which):
        entered.append(which)
        yield
        entered.append("left")

    kernels = SimpleNamespace(refusal=lambda function, args: None, pgd_step_=lambda args: ran.append(list(entered)))
    room = dispatch.Room("pgd")
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(room, "_module", lambda backend: kernels)
    room.run("pgd_step_", "triton", (SimpleNamespace(is_cuda=True, device=torch.device("cuda:1")),))
    assert ran == [[torch.device("cuda:1")]] and entered[-1] == "left"


def test_without_a_compiler_the_reference_runs_with_one_notice(monkeypatch):
    monkeypatch.setattr(dispatch, "_compiler", lambda: None)
    monkeypatch.setattr(dispatch, "_fallen", set())
    x = made(1, 3, 8, 8)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler") as notices:
        first = jpeg(x, 50, backend="compiled")
        second = jpeg(x, 50, backend="compiled")
    assert len(notices) == 1
    assert torch.equal(first, jpeg(x, 50, backend="reference")) and torch.equal(first, second)
    assert "C++ compiler" in info()["compiled"]


def test_info_names_every_backend():
    assert list(info()) == ["cuda", "triton", "cpu", "compiled", "reference", "in use"]
    assert info()["reference"] == "ready"
    with use_backend("reference"):
        assert info()["in use"] == "reference (forced)"


def test_import_is_quick_and_light():
    code = (
        "import sys, time, torch; start = time.perf_counter(); import poisonshield.ops; "
        "print(time.perf_counter() - start, *sorted({m.split('.')[0] for m in sys.modules}))"
    )
    seconds, *modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "torch" in modules
    assert not set(modules) & {"triton", "diffusers", "torchvision", "pydantic", "yaml", "timm"}
    print(f"import poisonshield.ops: {float(seconds):.3f} s beyond torch")
    assert float(seconds) < 5  # measured near 0.02; the bound only tells a hang or a heavy import
