"""What stands before the first kernel of `jpeg`: few small ones, and none for which the host waits.

The meta device stands for a GPU: numbers on it cannot be looked at either. Each call of an operator is counted.
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from poisonshield.ops.jpeg import inputs, reference
from poisonshield.ops.jpeg.reference import JpegArguments, JpegSettings

WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero"}
VIEWS = {"view", "_unsafe_view", "expand", "detach", "select", "slice", "unsqueeze", "t", "transpose", "alias"}
FROM_PYTHON = (torch.tensor, torch.as_tensor, torch.Tensor.tolist, torch.Tensor.item)


class Calls(TorchDispatchMode):
    """The names of operators that are called inside on a meta tensor, and of what waits for the device."""

    def __init__(self):
        super().__init__()
        self.kernels, self.waits = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        devices = {t.device.type for t in (*args, *tree_leaves(out)) if isinstance(t, torch.Tensor) and t.dim()}
        if "meta" in devices and (name in WAITS or (name in ("_to_copy", "copy_") and len(devices) > 1)):
            self.waits.append(name)
        elif "meta" in devices and name not in VIEWS:
            self.kernels.append(name)
        return out


class Lists(TorchFunctionMode):
    """Adds to `waits` what is made on the meta device from numbers of Python, which no dispatch shows."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = tree_leaves((args, out))
        if func in FROM_PYTHON and any(isinstance(t, torch.Tensor) and t.is_meta for t in made):
            self.waits.append(func.__name__)
        return out


def counted(function):
    function()  # constants are made once for a device
    with Calls() as calls, Lists(calls.waits):
        function()
    return calls


def prepare(x, quality, mode):
    """What `jpeg` makes of a quality and of a range of values."""
    return lambda: (
        inputs.tables_of(x, quality, None, whole=mode == "exact"),
        inputs.affine_of(x, (0.0, 1.0), None, None),
    )


@pytest.mark.parametrize("mode", ["smooth", "exact"])
@pytest.mark.parametrize("quality", [75, torch.tensor([50.0, 60.0], device="meta")], ids=["number", "tensor"])
def test_tables_are_few_kernels_and_wait_for_nothing(quality, mode):
    calls = counted(prepare(torch.empty(2, 3, 16, 16, device="meta"), quality, mode))
    assert not calls.waits
    assert len(calls.kernels) <= (16 if isinstance(quality, torch.Tensor) else 7), calls.kernels


@pytest.mark.parametrize("mode", ["smooth", "exact"])
@pytest.mark.parametrize("subsampling", ["420", "444"])
def test_the_reference_waits_for_nothing(mode, subsampling):
    x = torch.empty(2, 3, 18, 16, device="meta")
    tables, affine = prepare(x, 75, mode)()
    arguments = JpegArguments(x, tables, affine, mode, JpegSettings(subsampling), torch.float32)
    assert not counted(lambda: reference.jpeg(arguments)).waits


def test_the_count_can_fail():
    calls = counted(lambda: torch.tensor([1.0, 2.0], device="meta").to("meta"))
    assert calls.waits == ["tensor"]


def test_a_number_gives_the_tables_of_a_tensor():
    x = torch.empty(3, 3, 8, 8)
    for quality in (1, 7, 49, 50, 51, 75, 99, 100, 33.3, 0):
        tables = inputs.tables_of(x, quality, None, whole=False)
        assert tables.shape == (3, 2, 8, 8)
        assert torch.equal(tables, inputs.tables_of(x, torch.full((3,), float(quality)), None, whole=False))


def test_constants_made_under_inference_mode_serve_autograd():
    from poisonshield.ops.jpeg.tables import annex_k, scaled_tables

    with torch.inference_mode():
        scaled_tables(torch.tensor([50.0]))
    quality = torch.tensor([60.0], requires_grad=True)
    scaled_tables(quality).sum().backward()
    assert quality.grad is not None and annex_k(torch.float32, quality.device).dtype == torch.float32


def test_constants_made_under_a_fake_mode_do_not_stay():
    from torch._subclasses.fake_tensor import FakeTensorMode

    from poisonshield.ops.jpeg.tables import scaled_tables

    with FakeTensorMode():
        scaled_tables(torch.full((1,), 50.0, dtype=torch.float64))
    assert type(scaled_tables(torch.tensor([50.0], dtype=torch.float64))) is torch.Tensor
