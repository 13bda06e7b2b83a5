"""What JPEG refuses, and with which words."""

import pytest
import torch

from poisonshield.errors import GradientError, ShapeError
from poisonshield.ops import JPEG, jpeg, jpeg_coefficients, jpeg_tables

X = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: jpeg([1], 50), TypeError, "x is a list"),
        (lambda: jpeg(X.to(torch.complex64), 50), TypeError, "complex64"),
        (lambda: jpeg(X.bool(), 50), TypeError, "torch.bool"),
        (lambda: jpeg(X.to(torch.uint8), 50), TypeError, "uint8 is for mode='exact'"),
        (lambda: jpeg(X.long(), 50, mode="exact"), TypeError, "torch.int64"),
        (lambda: jpeg(X[0], 50), ShapeError, r"\(3, 8, 8\)"),
        (lambda: jpeg(X[:, :1], 50), ShapeError, r"\(2, 1, 8, 8\)"),
        (lambda: jpeg(X[..., :0], 50), ShapeError, "at least 1"),
        (lambda: jpeg(X, [50]), TypeError, "quality is a list"),
        (lambda: jpeg(X, True), TypeError, "quality is a bool"),
        (lambda: jpeg(X, torch.tensor([50, 50, 50])), ShapeError, "for 2 images"),
        (lambda: jpeg(X, torch.tensor([50.0], device="meta")), ValueError, "quality is on meta and x on cpu"),
        (lambda: jpeg(X, 50, qtables=torch.ones(2, 8, 8, device="meta")), ValueError, "qtables are on meta"),
        (lambda: jpeg(X, float("nan")), ValueError, "nan is outside"),
        (lambda: jpeg(X, torch.tensor([50, 101])), ValueError, "101 is outside"),
        (lambda: jpeg(X, -1), ValueError, "-1 is outside"),
        (lambda: jpeg(X, 50.5, mode="exact"), ValueError, "not whole"),
        (lambda: jpeg(X, 50, subsampling="422"), ValueError, "Known: 420, 444"),
        (lambda: jpeg(X, 50, rounding="soft"), ValueError, "Known: poly, ste"),
        (lambda: jpeg(X, 50, mode="fast"), ValueError, "Known: smooth, exact"),
        (lambda: jpeg(X, 50, upsample="cubic"), ValueError, "Known: fancy, box"),
        (lambda: jpeg(X, 50, mode="exact", upsample="box"), ValueError, "needs mode='smooth'"),
        (lambda: jpeg(X, 50, mode="exact", integer_planes=True), ValueError, "integers already"),
        (lambda: jpeg(X, 50, clamp_grad=2), ValueError, "clamp_grad 2"),
        (lambda: jpeg(X, 50, fourier_terms=0), ValueError, "fourier_terms 0"),
        (lambda: jpeg(X, 50, qtables=torch.ones(8, 8)), ShapeError, r"Give \(2, 8, 8\)"),
        (lambda: jpeg(X, 50, qtables=torch.ones(3, 2, 8, 8)), ShapeError, "for 3 images"),
        (lambda: jpeg(X, 50, qtables=torch.zeros(2, 8, 8)), ValueError, "1..65535"),
        (lambda: jpeg(X, 50, mean=torch.zeros(3)), ValueError, "go together"),
        (lambda: jpeg(X, 50, mean=torch.zeros(3), std=torch.zeros(3)), ValueError, "must be positive"),
        (lambda: jpeg(X, 50, mean=torch.zeros(1), std=torch.ones(3)), ShapeError, "3 numbers"),
        (lambda: jpeg(X, 50, value_range=(1, 0)), ValueError, "is empty"),
        (lambda: jpeg(X.to(torch.uint8), 50, mode="exact", value_range=(-1, 1)), ValueError, "0..255 already"),
        (lambda: jpeg(X.clone().requires_grad_(), 50, rounding="hard"), GradientError, "has no gradient"),
        (
            lambda: jpeg(X, 50, mean=torch.zeros(3, requires_grad=True), std=torch.ones(3)),
            GradientError,
            "mean requires gradients",
        ),
        (lambda: jpeg_coefficients(X, 50, subsampling="411"), ValueError, "Known: 420"),
        (lambda: jpeg(X.to(torch.float8_e4m3fn), 50), TypeError, "float8"),
        (lambda: jpeg(X.to_sparse(), 50), TypeError, "sparse"),
        (lambda: jpeg(X, "50"), TypeError, "quality is a str"),
        (lambda: jpeg(X, None), TypeError, "quality is a NoneType"),
        (lambda: jpeg(X, float("inf")), ValueError, "inf is outside"),
        (lambda: jpeg(X, torch.tensor([50.0, float("nan")])), ValueError, "nan is outside"),
        (lambda: jpeg(X, torch.tensor([])), ShapeError, "for 2 images"),
        (lambda: jpeg(X, torch.full((2, 1), 50)), ShapeError, "for 2 images"),
        (lambda: jpeg(X, torch.tensor(50 + 1j)), TypeError, "complex"),
        (lambda: jpeg(X, 50, clamp_grad=float("nan")), ValueError, "clamp_grad nan"),
        (lambda: jpeg(X, 50, fourier_terms=2.5), TypeError, "fourier_terms is a float. Give a whole number"),
        (lambda: jpeg(X, 50, out_dtype=torch.int64), TypeError, "out_dtype torch.int64"),
        (lambda: jpeg(X, 50, out_dtype="float32"), TypeError, "out_dtype 'float32'"),
        (lambda: jpeg(X, 50, value_range=(0, float("inf"))), ValueError, "endless"),
        (lambda: jpeg(X, 50, value_range=(0, float("nan"))), ValueError, "is empty"),
        (lambda: jpeg(X, 50, value_range=(0, 1, 2)), TypeError, "Give two numbers"),
        (lambda: jpeg(X, 50, value_range=1.0), TypeError, "Give two numbers"),
        (lambda: jpeg(X, 50, mean=[0.5] * 3, std=[0.5] * 3), ShapeError, "mean is a list"),
        (lambda: jpeg(X, 50, mean=torch.full((3,), float("nan")), std=torch.ones(3)), ValueError, "not finite"),
        (lambda: jpeg(X, 50, mean=torch.zeros(3), std=torch.full((3,), float("inf"))), ValueError, "not finite"),
        (lambda: jpeg(X, 50, mean=torch.zeros(3, device="meta"), std=torch.ones(3)), ValueError, "mean is on meta"),
        (lambda: jpeg(X, 50, qtables=[[1]]), TypeError, "qtables is a list"),
        (lambda: jpeg(X, 50, qtables=torch.ones(2, 8, 8) + 1j), TypeError, "complex"),
        (lambda: jpeg(X, 50, qtables=torch.ones(2, 8, 8).bool()), ValueError, "1..65535"),
        (lambda: jpeg(X, 50, qtables=torch.full((2, 8, 8), float("nan"))), ValueError, "1..65535"),
        (lambda: jpeg(X, 50, subsampling=["420"]), ValueError, "Known: 420, 444"),
        (lambda: jpeg_tables("75"), TypeError, "quality is a str"),
        (lambda: jpeg_tables(float("nan")), ValueError, "NaN"),
        (lambda: jpeg_tables(torch.full((2, 2), 50)), ShapeError, "one each"),
        (lambda: jpeg_tables(50, torch.full((2, 8, 8), float("nan"))), ValueError, "1..65535"),
        (lambda: jpeg_coefficients(X.int(), 50), TypeError, "int32"),
        (lambda: JPEG((90, 10)), ValueError, "low before high"),
        (lambda: JPEG(50, p=2), ValueError, "not a probability"),
        (lambda: JPEG(50)(X[0, 0]), ShapeError, "Give"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
