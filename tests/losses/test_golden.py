"""The table of golden values, float64 to 1e-6: symmetrised and not, corrected defaults aside, legacy forms included."""

import pytest
import torch
from losses.golden import golden

from poisonshield.batch import Batch
from poisonshield.defenses.base import Context
from poisonshield.defenses.vespr import VESPR
from poisonshield.losses.barlow import barlow
from poisonshield.losses.cosine import negative_cosine
from poisonshield.losses.dino import dino, move_centre
from poisonshield.losses.infonce import infonce
from poisonshield.losses.mec import mec
from poisonshield.losses.vicreg import vicreg
from poisonshield.methods.simclr import SimCLR

TABLE = [  # loss, settings, views, symmetrised, not symmetrised
    (infonce, {"same_view": "none"}, 2, 1.170675308, 1.327687888),
    (infonce, {"same_view": "others"}, 2, 1.582173540, 1.867188656),
    (infonce, {"same_view": "all"}, 2, 0.377595522, 0.734223392),
    (negative_cosine, {}, 2, -0.311279785, None),
    (infonce, {"same_view": "others"}, 3, 1.608507361, None),
    (infonce, {"same_view": "none", "margin": 0.1}, 2, 1.442629060, None),
    (infonce, {"same_view": "others", "margin": 0.1}, 2, 1.909790614, None),
    (infonce, {"same_view": "all", "margin": 0.1}, 2, 0.653178499, None),
    (infonce, {"same_view": "others", "negative_weight": 0.5}, 2, 0.012887308, None),
    (barlow, {"legacy": True}, 2, 5.728049205, 5.776173563),
    (barlow, {"legacy": True, "scaling": "rows"}, 2, 5.442952118, 5.503594783),
    (barlow, {"legacy": True, "hsic": True}, 2, 6.135512080, 6.206254375),
    (barlow, {"legacy": True, "hsic": True, "scaling": "rows"}, 2, 5.810332466, 5.875175265),
    (vicreg, {"legacy": True}, 2, 31.636181887, 32.536695295),
    (vicreg, {"legacy": True}, 3, 29.014406090, 30.099387272),
    (mec, {"terms": 2, "coding_length": True}, 2, 51.539256759, 51.913503952),
]


@pytest.mark.parametrize(("loss", "settings", "views", "both", "one"), TABLE)
def test_golden_values(loss, settings, views, both, one):
    p, m = golden(views)
    assert loss(p, m, **settings).item() == pytest.approx(both, abs=1e-6)
    if one is not None:
        assert loss(p, m, symmetrized=False, **settings).item() == pytest.approx(one, abs=1e-6)


@pytest.mark.parametrize(
    ("symmetrized", "values"), [(True, (9.774145845, 9.898890114)), (False, (9.329802251, 9.498676248))]
)
def test_golden_dino_and_its_centre(symmetrized, values):
    (p, m), centre = golden(2), torch.zeros(6, dtype=torch.float64)
    for value in values:
        assert dino(p, m, centre, symmetrized=symmetrized).item() == pytest.approx(value, abs=1e-6)
        centre = move_centre(centre, m)
    assert centre[0].item() == pytest.approx(0.007438295, abs=1e-6)


def test_golden_cross_entropy():
    """VESPR's own, through a classifier that copies its features."""
    p, _ = golden(2)
    method = SimCLR(SimCLR.Config(hidden=6, out=6), encoder=Copying(p), num_classes=6)
    model = VESPR(VESPR.Config(attack_views="none"), Context(0, 6)).wrap(method).double()
    with torch.no_grad():
        model.head.weight.copy_(torch.eye(6))
        model.head.bias.zero_()
    batch = Batch(tuple("abcd"), views=(torch.zeros(4, 3, 1, 1),) * 2, y=torch.arange(4))
    assert model(batch).metrics["ce"].item() == pytest.approx(1.821997366, abs=1e-6)


class Copying(torch.nn.Module):
    """Gives the next of some prepared features, whatever it sees."""

    feature_dim = 6

    def __init__(self, features):
        super().__init__()
        self.features = list(features)

    def forward(self, x):
        return self.features.pop(0)
