"""What JPEG refuses, and with which words."""

import pytest
import torch

from poisonshield.errors import GradientError, ShapeError
from poisonshield.ops import JPEG, jpeg, jpeg_coefficients

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
        (lambda: JPEG((90, 10)), ValueError, "low before high"),
        (lambda: JPEG(50, p=2), ValueError, "not a probability"),
        (lambda: JPEG(50)(X[0, 0]), ShapeError, "Give"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
