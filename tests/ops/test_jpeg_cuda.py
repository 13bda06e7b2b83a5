"""What the CUDA binding of JPEG decides before a kernel runs: which calls it takes, and the memory that it asks for."""

import itertools

import pytest
import torch

from poisonshield.ops.jpeg import cuda_binding
from poisonshield.ops.jpeg.reference import JpegSettings, examples

CALLS = examples()


def test_the_examples_are_taken():
    for function, calls in CALLS.items():
        assert [cuda_binding.refusal(function, args) for args in calls] == [None] * len(calls)


def test_float64_is_refused():
    args = CALLS["jpeg"][0]
    assert cuda_binding.refusal("jpeg", args._replace(x=args.x.double())) == "float64 is for the reference"


def test_what_exceeds_a_launch_is_refused():
    args = CALLS["jpeg"][0]
    wide = torch.empty(1, 3, 2**15, 2**15, device="meta")
    assert "2^31 numbers" in cuda_binding.refusal("jpeg", args._replace(x=wide))
    many = torch.empty(2**31, 3, 8, 8, device="meta")
    assert "thread blocks" in cuda_binding.refusal("jpeg", args._replace(x=many))


def test_no_pictures_run_no_kernel():
    args = CALLS["jpeg"][0]
    none = args._replace(x=args.x[:0], tables=args.tables[:0])
    assert cuda_binding.refusal("jpeg", none) is None
    assert cuda_binding.jpeg(none).shape == none.x.shape
    gradient = CALLS["jpeg_backward"][0]
    none = gradient._replace(grad=gradient.grad[:0], x=gradient.x[:0], tables=gradient.tables[:0])
    dx, dtables = cuda_binding.jpeg_backward(none)
    assert dx.shape == none.x.shape and dtables.shape == none.tables.shape


@pytest.mark.parametrize("subsampling", ["420", "444"])
def test_thread_blocks_cover_every_pixel(subsampling):
    settings, side, each = JpegSettings(subsampling), *((16, 4) if subsampling == "420" else (8, 16))
    for h, w in itertools.product((1, 7, 8, 16, 17, 65), repeat=2):
        cells = len({(y // side, x // side) for y in range(h) for x in range(w)})
        x = torch.empty(2, 3, h, w)
        assert (cuda_binding._chunks(x, settings) - 1) * each < cells <= cuda_binding._chunks(x, settings) * each


def test_tables_that_all_share_are_not_copied():
    shared = torch.rand(1, 2, 8, 8).expand(5, 2, 8, 8)
    tables, affine = cuda_binding._small(shared, torch.ones(2, 3))
    assert tables.stride() == (0, 64, 8, 1) and affine.is_contiguous()
    assert cuda_binding._small(torch.rand(5, 2, 8, 8).mT, affine)[0].is_contiguous()
