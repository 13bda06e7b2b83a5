"""The Triton kernels of a view in Triton's interpreter, against the plain reference."""

import pytest
import torch

from poisonshield.errors import BackendError
from poisonshield.ops import augment, keyed_uniform, philox_uniform
from poisonshield.ops.augment import reference
from poisonshield.ops.augment.reference import examples

pytestmark = pytest.mark.usefixtures("interpreted")
TOLERANCE = 2e-6  # float32's rounding, enlarged by three factors
ORDERS = torch.tensor([[0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 4, 1], [1, 0, 3, 2], [2, 0, 3, 4], [4, 4, 4, 4]])


def drawn(height, width, size, **changes):
    """x in levels, and parameters of six views."""
    generator = torch.Generator().manual_seed(size)

    def uniform(*shape):
        return torch.rand(6, *shape, generator=generator)

    x = (uniform(3, height, width) * 256).to(torch.uint8)
    sides = torch.tensor([height, width])
    length = (uniform(2) * sides).floor() + 1
    settings = {
        "boxes": torch.cat([(uniform(2) * (sides - length + 1)).floor(), length], 1), "size": size,
        "flip": uniform() < 0.5, "factors": torch.cat([0.6 + 0.8 * uniform(3), uniform(1) - 0.5], 1), "order": ORDERS,
        "gray": torch.arange(6) == 2, "sigma": torch.tensor([0.0, 0.3, 1, 2, 0, 1.5]),
    }  # fmt: skip
    return x, settings | changes


@pytest.mark.parametrize(
    ("height", "width", "size", "changes"),
    [
        (40, 33, 17, {}),
        (7, 5, 17, {"kernel": 9}),
        (1, 1, 1, {"kernel": 3}),
        (31, 50, 6, {"kernel": 23, "grid": (9, 12)}),
        (12, 12, 12, {"gray": None, "sigma": None}),
        (12, 12, 12, {"factors": None, "order": None, "sigma": None}),
        (12, 12, 12, {"factors": None, "order": None, "gray": None}),
        (40, 20, 12, {"factors": None, "order": None, "gray": None, "sigma": None, "flip": None}),
    ],
)
def test_views_equal_the_reference(height, width, size, changes):
    x, settings = drawn(height, width, size, **changes)
    last = (x / 255).to(memory_format=torch.channels_last)
    for pixels in (x, last) if size < 13 else (x,):
        ours, plain = (augment(pixels, **settings, backend=b) for b in ("triton", "reference"))
        assert ours.stride() == plain.stride()
        torch.testing.assert_close(ours, plain, atol=TOLERANCE, rtol=0)


def test_half_precision_is_rounded_once():
    x, settings = drawn(14, 14, 9)
    ours = augment((x / 255).bfloat16(), **settings, backend="triton")
    plain = augment((x / 255).bfloat16(), **settings, out_dtype=torch.float32, backend="reference")
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), plain, atol=2**-8 + 1e-5, rtol=0)  # the interpreter cuts, a GPU rounds


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
def test_a_box_beyond_the_image_reads_nothing_outside():
    from poisonshield.ops.augment import triton_kernels  # claimed by the interpreter, now that it is set

    x, _ = drawn(8, 8, 4)
    boxes = torch.tensor([[6, 6, 4, 4], [50, 0, 4, 4], [-2, 3, 6, 9.0]])
    args = examples()["augment"][2]._replace(x=x[:3], boxes=boxes, size=4, grid_height=4, grid_width=4)
    ours, plain = triton_kernels.augment(args), reference.augment(args)
    torch.testing.assert_close(ours, plain, atol=TOLERANCE, rtol=0, equal_nan=True)
    assert plain.isnan().any() and plain.isfinite().any()


@pytest.mark.parametrize("count", [0, 1, 35, 600])
def test_uniform_numbers_equal_philoxs_to_the_bit(count):
    ids, streams = torch.tensor([5, 2**35 + 1, -3]), torch.tensor([2**32 - 5, 7, 0])
    ours = keyed_uniform(ids, count, seed=2**64 - 7, offset=3, stream=streams, backend="triton")
    for i, stream in enumerate(streams.tolist()):
        one = philox_uniform((1, count), 2**64 - 7, 3, sample_ids=ids[i : i + 1], stream=stream)
        assert torch.equal(ours[i : i + 1], one)


def test_an_empty_batch_gives_no_view():
    assert augment(torch.zeros(0, 3, 4, 4), torch.zeros(0, 4), size=5, backend="triton").shape == (0, 3, 5, 5)


def test_float64_is_left_to_the_reference():
    x, settings = drawn(8, 8, 4)
    with pytest.raises(BackendError, match="float64 is computed by the reference alone"):
        augment((x / 255).double(), **settings, backend="triton")
