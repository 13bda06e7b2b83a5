"""Views by the op, on each backend that runs here, against torchvision's functions; their gradients and refusals."""

import itertools

import pytest
import torch
import torchvision.transforms.v2.functional as tv

from poisonshield.errors import ConfigError, GradientError, ShapeError
from poisonshield.ops import augment, keyed_uniform, native, philox_uniform

COMPILED = pytest.param("cpu", marks=pytest.mark.skipif(native.missing() is not None, reason=str(native.missing())))
BACKENDS = pytest.mark.parametrize("backend", ["reference", COMPILED])
BOXES = torch.tensor(
    [[0, 0, 40, 30], [3, 4, 10, 10], [5, 1, 30, 20], [0, 0, 16, 16], [10, 10, 8, 20], [2, 2, 33, 28.0]]
)
WHOLE = torch.tensor([0, 0, 40, 30.0]).expand(6, 4)
ORDERS = torch.tensor(list(itertools.permutations(range(4))))


def images(count=6, height=40, width=30):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


@BACKENDS
@pytest.mark.parametrize("size", [1, 7, 16, 48])
@pytest.mark.parametrize("bytes_", [False, True], ids=["floats", "levels"])
def test_crops_equal_torchvisions_resized_crop(backend, size, bytes_):
    x = (images() * 255).to(torch.uint8)
    flip = torch.tensor([True, False] * 3)
    ours = augment(x if bytes_ else x / 255, BOXES, size=size, flip=flip, backend=backend)
    for i, (top, left, height, width) in enumerate(BOXES.int().tolist()):
        theirs = tv.resized_crop(x[i] / 255, top, left, height, width, [size, size], antialias=True)
        torch.testing.assert_close(ours[i], theirs.flip(2) if flip[i] else theirs, atol=2e-6, rtol=0)


@BACKENDS
def test_the_middle_of_a_grid_equals_resize_and_centre_crop(backend):
    x = images()
    for grid, size in (((21, 16), 13), ((53, 40), 40), ((40, 30), 29)):
        ours = augment(x, WHOLE, size=size, grid=grid, backend=backend)
        theirs = tv.center_crop(tv.resize(x, list(grid), antialias=True), [size])
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


def adjusted(x, change, factor):
    """torchvision's function for one of the four changes of the colours."""
    functions = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    return x if change == 4 else functions[change](x, factor)


@BACKENDS
@pytest.mark.parametrize("change", range(4))
def test_one_change_of_the_colours_equals_torchvisions(backend, change):
    x = images(1)[:, :, :30]
    for factor in (0.5, 0.0, -0.3) if change == 3 else (0.6, 0.0, 1.0, 1.7):
        factors, order = torch.ones(1, 4), torch.full((1, 4), 4)
        factors[0, change], order[0, 2] = factor, change
        ours = augment(x, WHOLE[:1].clamp(max=30), size=30, factors=factors, order=order, backend=backend)
        # torchvision's luma weights have four digits, and sum to 0.9999.
        torch.testing.assert_close(ours, adjusted(x, change, factor), atol=1e-5 if change in (0, 3) else 2e-4, rtol=0)


@BACKENDS
def test_every_order_of_changes_is_kept(backend):
    x, boxes = images(24, 12, 12), torch.tensor([0, 0, 12, 12.0]).expand(24, 4)
    factors = torch.tensor([[0.7, 1.4, 0.6, 0.1]]).expand(24, 4)
    ours = augment(x, boxes, size=12, factors=factors, order=ORDERS, backend=backend)
    for view, y, order in zip(ours, x, ORDERS.tolist(), strict=True):
        for change in order:
            y = adjusted(y, change, factors[0, change].item())
        torch.testing.assert_close(view, y, atol=2e-3, rtol=0)
    assert len({v.sum().item() for v in ours}) == 24


@BACKENDS
def test_gray_and_blur_equal_torchvisions(backend):
    x = images(2, 30, 30)
    boxes, gray = torch.tensor([0, 0, 30, 30.0]).expand(2, 4), torch.tensor([True, False])
    for kernel, sigma in ((3, 0.4), (9, 1.1), (23, 2.0), (23, 0.0)):
        sigmas = torch.tensor([sigma, sigma])
        ours = augment(x, boxes, size=30, gray=gray, sigma=sigmas, kernel=kernel, backend=backend)
        y = torch.stack([tv.rgb_to_grayscale(x[0], 3), x[1]])
        theirs = tv.gaussian_blur(y, [kernel, kernel], [sigma, sigma]) if sigma else y
        torch.testing.assert_close(ours[0], theirs[0], atol=2e-4, rtol=0)
        torch.testing.assert_close(ours[1], theirs[1], atol=2e-6, rtol=0)


@BACKENDS
def test_the_whole_gaussian_is_renormalized_at_the_border(backend):
    x = images(2, 12, 12)
    ours = augment(x, torch.tensor([[0, 0, 12, 12.0]] * 2), size=12, sigma=torch.tensor([1.0, 30.0]), backend=backend)
    at = torch.arange(12.0, dtype=torch.float64)
    for view, y, sigma in zip(ours, x.double(), (1.0, 30.0), strict=True):
        w = torch.exp(-((at[:, None] - at) ** 2) / (2 * sigma**2))
        w = w / w.sum(1, keepdim=True)
        torch.testing.assert_close(view.double(), w @ y @ w.T, atol=2e-6, rtol=0)


def parameters(**changes):
    """Of two small views with everything in them, away from the clamps."""
    found = {
        "boxes": torch.tensor([[0, 1, 5, 4], [2, 0, 3, 6.0]]), "size": 4, "flip": torch.tensor([True, False]),
        "factors": torch.tensor([[0.9, 1.1, 0.8, 0.05], [1.1, 0.9, 1.1, -0.1]]),
        "order": torch.tensor([[0, 1, 2, 3], [3, 1, 4, 0]]), "gray": torch.tensor([False, True]),
        "sigma": torch.tensor([0.6, 0.0]), "kernel": 5,
    }  # fmt: skip
    return found | changes


def gentle():
    """float64 pixels away from clamps, with no two channels equal."""
    x = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return (0.3 + 0.1 * x + 0.1 * torch.arange(3, dtype=torch.float64).view(1, 3, 1, 1)).requires_grad_()


def test_gradients_are_those_of_the_view_once_and_twice():
    assert torch.autograd.gradcheck(lambda v: augment(v, **parameters()), gentle())
    assert torch.autograd.gradgradcheck(lambda v: augment(v, **parameters()), gentle(), fast_mode=True)


@BACKENDS
def test_a_forward_of_any_backend_has_the_references_gradient(backend):
    found = []
    for name in ("reference", backend):
        x = gentle().detach().float().requires_grad_()
        (augment(x, backend=name, **parameters()) * torch.arange(16.0).view(4, 4)).sum().backward()
        found.append(x.grad)
    assert torch.equal(*found) and found[0].any()


def test_traced_views_and_their_gradients_are_the_same():
    """fullgraph compilation of both passes, and torch.func."""
    settings = parameters()
    boxes = settings.pop("boxes")

    def view(x, boxes):
        return augment(x, boxes, **settings)

    found = []
    for function in (view, torch.compile(view, fullgraph=True, backend="aot_eager")):
        x = gentle().detach().float().requires_grad_()
        (function(x, boxes) * torch.arange(16.0).view(4, 4)).sum().backward()
        found.append(x.grad)
    x = x.detach()
    found.append(torch.func.grad(lambda v: (view(v, boxes) * torch.arange(16.0).view(4, 4)).sum())(x))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]) and found[0].any()


def test_rounding_beyond_white_stops_no_gradient():
    x = torch.ones(1, 3, 9, 9, requires_grad=True)
    augment(x, torch.tensor([[1, 2, 7, 5.0]]), size=4).sum().backward()
    assert x.grad.sum().item() == pytest.approx(48, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_views_have_the_dtype_that_is_asked_for(dtype):
    x, asked = images(2, 6, 6), parameters()
    view = augment(x, **asked, out_dtype=dtype)
    assert view.dtype == dtype and view.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(view.float(), augment(x, **asked), atol=4e-3, rtol=0)
    assert augment(x.to(dtype), **asked).dtype == dtype


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"boxes": torch.tensor([[0, 0, 7, 2.0]] * 2)}, ConfigError, "images have 6 x 6 pixels"),
        ({"boxes": torch.tensor([[0, 0, 0, 2.0]] * 2)}, ConfigError, "the smallest side is 0"),
        ({"boxes": torch.full((2, 4), torch.nan)}, ConfigError, "within them"),
        ({"boxes": torch.zeros(2, 3)}, ShapeError, r"Give floats \[2, 4\]"),
        ({"boxes": torch.ones(2, 4, requires_grad=True)}, GradientError, "boxes requires gradients"),
        ({"order": torch.full((2, 4), 5)}, ConfigError, "order reaches from 5 to 5"),
        ({"order": None}, ConfigError, "factors and order go together"),
        ({"flip": torch.zeros(2)}, ShapeError, "Give bools"),
        ({"sigma": torch.tensor([1.0, -1])}, ConfigError, "negative or NaN"),
        ({"kernel": 4}, ConfigError, "no middle pixel"),
        ({"grid": (3, 9)}, ConfigError, r"grid\[0\] 3 is refused"),
        ({"size": 0}, ConfigError, "size 0 is refused"),
    ],
)
def test_what_makes_no_view_is_refused_in_words(changes, error, words):
    with pytest.raises(error, match=words):
        augment(images(2, 6, 6), **parameters(**changes))


def test_pixels_must_be_colours():
    with pytest.raises(ShapeError, match="x has shape"):
        augment(images(2, 6, 6)[:, :1], **parameters())
    with pytest.raises(TypeError, match="uint8 levels"):
        augment(images(2, 6, 6).int(), **parameters())


@BACKENDS
def test_an_empty_batch_gives_no_view(backend):
    assert augment(images(0), torch.zeros(0, 4), size=5, backend=backend).shape == (0, 3, 5, 5)


@BACKENDS
@pytest.mark.parametrize("count", [0, 1, 35])
def test_uniform_numbers_equal_philoxs_to_the_bit(backend, count):
    ids, streams = torch.tensor([5, 2**35 + 1, -3]), torch.tensor([2**32 - 5, 7, 0])
    ours = keyed_uniform(ids, count, seed=2**64 - 7, offset=3, stream=2**32 - 5, backend=backend)
    assert torch.equal(ours, philox_uniform((3, count), 2**64 - 7, 3, sample_ids=ids, stream=2**32 - 5))
    ours = keyed_uniform(ids, count, seed=2**64 - 7, offset=3, stream=streams, backend=backend)
    for i, stream in enumerate(streams.tolist()):
        one = philox_uniform((1, count), 2**64 - 7, 3, sample_ids=ids[i : i + 1], stream=stream)
        assert torch.equal(ours[i : i + 1], one)


def test_streams_must_be_one_or_one_each():
    with pytest.raises(ShapeError, match="stream is torch.int64"):
        keyed_uniform(torch.arange(3), 4, seed=0, stream=torch.arange(2))
    with pytest.raises(ShapeError, match="Give int64"):
        keyed_uniform(torch.rand(3), 4, seed=0)
