"""Settings and views that no loss has a value for: refused in words, never a NaN or a number without a meaning."""

import pytest
import torch

from poisonshield.errors import ConfigError, DataError, PoisonShieldError, ShapeError
from poisonshield.losses.barlow import barlow
from poisonshield.losses.cosine import negative_cosine
from poisonshield.losses.dino import dino, move_centre
from poisonshield.losses.dlr import dlr
from poisonshield.losses.infonce import infonce
from poisonshield.losses.mec import mec
from poisonshield.losses.vicreg import vicreg
from poisonshield.losses.zone import Zone, latent_mask, zone_loss

VIEWS = tuple(torch.randn(4, 6, generator=torch.Generator().manual_seed(i)) for i in range(2))
SCORES, Y = VIEWS[0], torch.arange(4)
CENTRE = torch.zeros(6)
PAIRED = [
    infonce,
    barlow,
    vicreg,
    mec,
    lambda views: negative_cosine(views, views),
    lambda views: dino(views, views, CENTRE),
]

# The call by its setting's value, and the values that it must refuse beside NaN and infinity.
SETTINGS = {
    "temperature": (lambda v: infonce(VIEWS, temperature=v), (0, -0.1)),
    "margin": (lambda v: infonce(VIEWS, margin=v), (-0.1,)),
    "negative_weight": (lambda v: infonce(VIEWS, negative_weight=v), (-1,)),
    "off_diagonal": (lambda v: barlow(VIEWS, off_diagonal=v), (-1,)),
    "invariance": (lambda v: vicreg(VIEWS, invariance=v), (-1,)),
    "variance": (lambda v: vicreg(VIEWS, variance=v), (-1,)),
    "covariance": (lambda v: vicreg(VIEWS, covariance=v), (-1,)),
    "distortion": (lambda v: mec(VIEWS, distortion=v), (0, -1)),
    "terms": (lambda v: mec(VIEWS, terms=v), (0, -1, 2.5)),
    "student_temperature": (lambda v: dino(VIEWS, VIEWS, CENTRE, student_temperature=v), (0, -1)),
    "teacher_temperature": (lambda v: dino(VIEWS, VIEWS, CENTRE, teacher_temperature=v), (0, -1)),
    "momentum": (lambda v: move_centre(CENTRE, VIEWS, momentum=v), (-0.1, 1.1)),
    "floor": (lambda v: Zone(floor=v), (-0.1, 1.1)),
    "dilate": (lambda v: Zone(dilate=v), (-1, 1.5)),
    "min_cells": (lambda v: Zone(min_cells=v), (0, -1)),
}
VALUES = [
    (name, value)
    for name, (_, refused) in SETTINGS.items()
    for value in (*refused, float("nan"), float("inf"), "1", None, True)
]


@pytest.mark.parametrize(("name", "value"), VALUES)
def test_senseless_settings_are_refused_by_name(name, value):
    """A: `infonce(temperature=0)` was NaN; others were NaN, or a number without a meaning."""
    with pytest.raises((ConfigError, TypeError), match=rf"{name} .*Give a"):
        SETTINGS[name][0](value)


@pytest.mark.parametrize("call", [lambda: infonce(VIEWS, same_view="both"), lambda: barlow(VIEWS, scaling="both")])
def test_unknown_choices_are_refused_with_the_known_ones(call):
    with pytest.raises(ConfigError, match="'both' is unknown. Known: "):
        call()


@pytest.mark.parametrize("loss", PAIRED)
@pytest.mark.parametrize(
    ("views", "error", "words"),
    [
        (tuple(v[:0] for v in VIEWS), ShapeError, "hold nothing to compare"),
        (tuple(v[:, :0] for v in VIEWS), ShapeError, "hold nothing to compare"),
        ((None, None), TypeError, "a view is a NoneType"),
        ((VIEWS[0].to_sparse(),) * 2, TypeError, "sparse"),
        ((VIEWS[0] + 1j,) * 2, TypeError, "complex"),
        ((VIEWS[0],), ShapeError, "at least two online views"),
        ((), ShapeError, "at least two online views"),
    ],
)
def test_views_without_a_value_are_refused(loss, views, error, words):
    with pytest.raises(error, match=words):
        loss(views)


@pytest.mark.parametrize("loss", [vicreg, lambda views: barlow(views, legacy=True)])
def test_a_deviation_of_one_sample_is_refused(loss):
    with pytest.raises(ShapeError, match="got 1 samples and compares 2 or more"):
        loss(tuple(v[:1] for v in VIEWS))


def test_a_temperature_may_be_learned():
    temperature = torch.tensor(0.2, requires_grad=True)
    loss = infonce(VIEWS, temperature=temperature)
    loss.backward()
    assert temperature.grad.isfinite() and torch.allclose(loss.detach(), infonce(VIEWS, temperature=0.2))
    with pytest.raises(ConfigError, match="temperature 0.0 is refused"):
        infonce(VIEWS, temperature=torch.tensor(0.0))


MASK = torch.ones(2, 1, 8, 8)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: dino(VIEWS, VIEWS, torch.zeros(5)), ShapeError, r"centre has shape \(5,\).*Give a centre \[6\]"),
        (lambda: dino(VIEWS, VIEWS, torch.zeros(4, 6)), ShapeError, "Give a centre"),
        (lambda: move_centre(torch.zeros(1), VIEWS), ShapeError, "Give a centre"),
        (lambda: dlr(SCORES, Y + 9), DataError, "y reaches from 9 to 12; there are scores of 6 classes"),
        (lambda: dlr(SCORES, Y - 1), DataError, "from -1 to 2"),
        (lambda: dlr(SCORES, Y.float()), ShapeError, "y is torch.float32"),
        (lambda: dlr(SCORES, Y[:2]), ShapeError, r"Give int64 \[4\]"),
        (lambda: dlr(SCORES, [0, 1, 2, 3]), ShapeError, "y is a list"),
        (lambda: dlr(SCORES, Y, target=Y[:2]), ShapeError, "target is"),
        (lambda: dlr(SCORES, Y, target=Y + 5), DataError, "target reaches"),
        (lambda: dlr([[1.0]], Y), TypeError, "scores is a list"),
        (lambda: latent_mask([1], (4, 4), Zone()), TypeError, "mask is a list"),
        (lambda: latent_mask(MASK * 255, (4, 4), Zone()), DataError, "row 0 reaches from 255 to 255.*\n.*255"),
        (lambda: latent_mask(MASK * float("nan"), (4, 4), Zone()), DataError, "reaches from nan"),
        (lambda: latent_mask(MASK - 1.5, (4, 4), Zone()), DataError, "reaches from -0.5"),
        (lambda: zone_loss(MASK, MASK, [1], Zone()), TypeError, "mask is a list"),
    ],
)
def test_labels_centres_and_masks_that_do_not_fit_are_refused(call, error, words):
    with pytest.raises(error, match=words) as told:
        call()
    assert isinstance(told.value, (PoisonShieldError, TypeError))


def test_integer_views_and_learned_settings_keep_working():
    assert infonce(tuple((10 * v).int() for v in VIEWS)).isfinite()
    assert torch.equal(infonce(list(VIEWS)), infonce(VIEWS))
