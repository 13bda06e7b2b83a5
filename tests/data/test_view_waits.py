"""Views on a GPU that is only pretended: nothing waits for numbers, nothing is sent there, and kernels are few."""

from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from poisonshield.data.views import ViewsConfig, center_crop, crop_flip, ssl
from poisonshield.ops import augment
from poisonshield.ops.augment import reference
from poisonshield.ops.augment.reference import examples
from poisonshield.random import KeyedRandom

FREE = {"view", "expand", "slice", "select", "unsqueeze", "detach", "alias", "t", "transpose", "permute", "as_strided"}
FREE |= {"empty", "empty_like", "new_empty", "_unsafe_view", "unbind", "split", "squeeze", "empty_strided", "device"}


class Recorder(TorchDispatchMode):
    """Counts operations that would be kernels, and refuses tensors that come from the host."""

    def __init__(self):
        super().__init__()
        self.kernels = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        if name not in FREE:
            self.kernels[name] += 1
        sent = name in ("_to_copy", "copy_") and any(
            isinstance(a, torch.Tensor) and a.device.type == "cpu" and a.dim() for a in args
        )
        assert not sent, "a tensor of the host is sent to the device"
        assert name not in ("nonzero", "_local_scalar_dense", "masked_select"), f"{name} waits for the device"
        return out


@pytest.fixture
def pretended():
    """Tensors on "cuda" of which nothing but shape and dtype is known: reading a number of them raises."""
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        yield mode


def drawn(size=(4, 3, 40, 40), dtype=torch.uint8):
    x = torch.empty(size, dtype=dtype, device="cuda")
    return x, KeyedRandom(2**40 + 3, torch.empty(size[0], dtype=torch.int64, device="cuda"), 5)


@pytest.mark.parametrize(
    ("pipeline", "settings", "most"),
    [
        (ssl, {}, 75),
        (ssl, {"size": 24, "blur_kernel": 9}, 75),
        (crop_flip, {"random_resized_crop": True}, 60),
        (crop_flip, {"random_resized_crop": False}, 40),
        (center_crop, {"size": 28}, 10),
    ],
)
def test_two_views_wait_for_nothing(pretended, pipeline, settings, most):
    for dtype in (torch.uint8, torch.float32):
        x, rng = drawn(dtype=dtype)
        with Recorder() as seen:
            views = pipeline(x, [rng.within("view0"), rng.within("view1")], ViewsConfig(**settings))
        assert len(views) == 2
        for view in views:
            assert view.device.type == "cuda" and view.dtype == torch.float32 and view.shape[0] == 4
            assert view.is_contiguous(memory_format=torch.channels_last)
        assert seen.kernels.total() <= most, seen.kernels


@pytest.mark.parametrize("row", range(len(examples()["augment"])))
def test_the_reference_waits_for_nothing(row):
    args = examples()["augment"][row]
    with FakeTensorMode(), Recorder():
        tensors = [None if v is None else torch.empty(v.shape, dtype=v.dtype, device="cuda") for v in args[:7]]
        assert reference.augment(args._replace(**dict(zip(args._fields, tensors, strict=False)))).device.type == "cuda"


def test_the_gradient_waits_for_nothing(pretended):
    x = torch.empty(2, 3, 9, 9, requires_grad=True)  # autograd asks a GPU for its streams, so this is on the host
    flags, floats = torch.empty(2, dtype=torch.bool), torch.empty(2, 4)
    order = torch.empty(2, 4, dtype=torch.int64)
    with Recorder():
        view = augment(
            x, floats, size=5, flip=flags, factors=floats, order=order, gray=flags, sigma=floats[:, 0], kernel=3
        )
        view.sum().backward()
    assert x.grad.shape == x.shape


def test_the_check_can_fail(pretended):
    x, _ = drawn()
    for wait in (lambda: x.nonzero(), lambda: x.sum().item(), lambda: x[x > 3]):
        with pytest.raises((AssertionError, DataDependentOutputException, DynamicOutputShapeException)), Recorder():
            wait()
    with pytest.raises(AssertionError, match="sent"), Recorder():
        torch.empty(3).to("cuda")
