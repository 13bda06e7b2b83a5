"""The compiled view of the CPU against the reference, which test_augment_view.py holds to torchvision."""

import itertools

import pytest
import torch

from poisonshield.errors import BackendError
from poisonshield.ops import augment, keyed_uniform, native
from poisonshield.ops.augment import cpu_kernels, reference
from poisonshield.ops.augment.reference import examples

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

ORDERS = torch.tensor(list(itertools.permutations(range(4))))
TOLERANCE = 2e-6  # float32's rounding, enlarged by three factors


def drawn(height, width, size, *, seed=0, kernel=None, grid=None):
    """x in levels, and parameters of 24 views with every order of changes."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(24, *shape, generator=generator)

    x = (uniform(3, height, width) * 256).to(torch.uint8)
    sides = torch.tensor([height, width])
    length = (uniform(2) * sides).floor() + 1
    begin = (uniform(2) * (sides - length + 1)).floor()
    order = torch.where(uniform(1) < 0.8, ORDERS, 4)
    return x, {
        "boxes": torch.cat([begin, length], 1), "size": size, "grid": grid, "flip": uniform() < 0.5,
        "factors": torch.cat([0.6 + 0.8 * uniform(3), uniform(1) - 0.5], 1), "order": order, "gray": uniform() < 0.3,
        "sigma": torch.where(uniform() < 0.6, 3 * uniform(), 0.0), "kernel": kernel,
    }  # fmt: skip


@pytest.mark.parametrize("kernel", [None, 1, 9, 151])
@pytest.mark.parametrize(
    ("height", "width", "size"), [(40, 33, 17), (1, 1, 1), (3, 90, 8), (7, 5, 33), (64, 64, 64), (150, 90, 9)]
)
def test_views_equal_the_reference(height, width, size, kernel):
    x, settings = drawn(height, width, size, seed=size, kernel=kernel)
    for pixels in (x, x / 255):
        ours, plain = (augment(pixels, **settings, backend=b) for b in ("cpu", "reference"))
        torch.testing.assert_close(ours, plain, atol=TOLERANCE, rtol=0)


def test_the_middle_of_a_grid_equals_the_reference():
    x, settings = drawn(50, 41, 10, grid=(13, 18))
    ours, plain = (augment(x, **settings, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(ours, plain, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("bytes_", [False, True], ids=["floats", "levels"])
def test_bits_depend_neither_on_memory_order_nor_on_the_batch(bytes_):
    x, settings = drawn(40, 33, 17)
    x = x if bytes_ else x / 255
    plain = augment(x, **settings, backend="cpu")
    sliced = torch.zeros(48, 4, 80, 66, dtype=x.dtype)[::2, :3, ::2, ::2].copy_(x)
    rows = torch.zeros(24, 3, 40, 50, dtype=x.dtype)[..., 5:38].copy_(x)
    for same in (x.to(memory_format=torch.channels_last), sliced, rows):
        assert torch.equal(augment(same, **settings, backend="cpu"), plain)
    some = {k: v[[7, 3]] if isinstance(v, torch.Tensor) else v for k, v in settings.items()}
    assert torch.equal(augment(x[[7, 3]], **some, backend="cpu"), plain[[7, 3]])
    twice = augment(x[:1].expand(24, -1, -1, -1), **settings, backend="cpu")
    assert torch.equal(twice[0], plain[0]) and not torch.equal(twice[1], plain[1])


def test_bits_do_not_depend_on_threads():
    x, settings = drawn(60, 60, 50)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(augment(x, **settings, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_box_unseen_by_the_checks_reads_nothing_outside():
    """Calls on a GPU and traced ones are not looked at: what lies outside is left out, NaN where nothing is left."""
    x, _ = drawn(8, 8, 4)
    bad, wide = [2, 2, torch.nan, 3], [-3, -1e9, 20, 3e9]
    boxes = torch.tensor([[6, 6, 4, 4], [50, 0, 4, 4], [-2, 3, 6, 9], bad, wide, [0, 0, torch.inf, 3]])
    args = examples()["augment"][2]._replace(x=x[:6], boxes=boxes, size=4, grid_height=4, grid_width=4)
    view = cpu_kernels.augment(args)
    plain = reference.augment(args._replace(x=x[:3], boxes=boxes[:3]))
    torch.testing.assert_close(view[:3], plain, atol=TOLERANCE, rtol=0, equal_nan=True)
    assert plain[0, :, :2, :2].isfinite().all() and plain.isnan().any() and view[3].isnan().all()


def test_float64_is_left_to_the_reference():
    x, settings = drawn(8, 8, 4)
    with pytest.raises(BackendError, match="float64 is computed by the reference alone"):
        augment((x / 255).double(), **settings, backend="cpu")
    assert keyed_uniform(torch.arange(3), 5, seed=1, backend="cpu").shape == (3, 5)


def test_a_library_of_another_version_is_refused(monkeypatch):
    class Longer(cpu_kernels._Call):
        _fields_ = [("more", cpu_kernels.ctypes.c_int64)]

    monkeypatch.setattr(cpu_kernels, "_Call", Longer)
    with pytest.raises(BackendError, match="the CPU library is of another version of poisonshield"):
        cpu_kernels.augment(examples()["augment"][0])
