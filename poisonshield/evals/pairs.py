"""Clean and poisoned versions of the same training samples, side by side: does the encoder react to the poison?

The VESPR paper reports "Psn Local Lip" and "Psn-Cln Sim"; we have not seen its formulas, so THESE ARE OUR DEFINITIONS,
and their values do not belong beside the paper's:

    psn_local_lip  mean of |f(x) - f(x_p)|_1 / |x - x_p|_inf, pixel units     low: small reaction to the poison
    psn_cln_sim    mean of cos(f(x), f(x_p))                                  high: the same
    ce_gap         mean of CE(x, y) - CE(x_p, y), where there are class scores  high: the poison tells the label
"""

from collections.abc import Iterable
from itertools import zip_longest

import torch
import torch.nn.functional as F

from poisonshield.attacks import frozen_stats
from poisonshield.batch import Batch
from poisonshield.errors import DataError
from poisonshield.evals.lipschitz import ratio
from poisonshield.method import Method


@torch.no_grad()
def pairs(method: Method, clean: Iterable[Batch], poisoned: Iterable[Batch]) -> dict[str, float | int | None]:
    """Means over the samples that the poison changed, and `pairs`, how many those are; None where there is nothing.

    psn_local_lip_unit is the first on l2-normalised features, whose scale cannot play a part. The two streams give the
    same samples in the same batches; raises DataError if not. Evaluation mode; the method is not changed.
    """
    sums: dict[str, torch.Tensor] = {}
    count = 0
    with frozen_stats(method):
        for a, b in zip_longest(clean, poisoned):
            if a is None or b is None or a.keys != b.keys or a.x.shape != b.x.shape:
                raise DataError(
                    "clean and poisoned batches hold different samples. Read both in the same order and size."
                )
            changed = (a.x != b.x).flatten(1).any(1)
            if not changed.any():
                continue
            count += int(changed.sum())
            for name, values in _of(method, a.x[changed], b.x[changed], a.y[changed]).items():
                sums[name] = sums.get(name, 0) + values.double().sum()
    names = ("psn_local_lip", "psn_local_lip_unit", "psn_cln_sim", "ce_clean", "ce_poisoned", "ce_gap")
    return {name: float(sums[name]) / count if name in sums else None for name in names} | {"pairs": count}


def _of(method: Method, x: torch.Tensor, x_p: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each measure for each sample, [B]."""
    x, x_p = (v.contiguous(memory_format=torch.channels_last) for v in (x, x_p))
    h, h_p = method.encoder(x).float(), method.encoder(x_p).float()
    unit, unit_p = F.normalize(h, dim=1), F.normalize(h_p, dim=1)
    values = {
        "psn_local_lip": ratio(h, h_p, x, x_p),
        "psn_local_lip_unit": ratio(unit, unit_p, x, x_p),
        "psn_cln_sim": (unit * unit_p).sum(1),
    }
    scores, scores_p = method.logits(x), method.logits(x_p)
    if scores is not None:
        ce = F.cross_entropy(scores.float(), y, reduction="none")
        ce_p = F.cross_entropy(scores_p.float(), y, reduction="none")
        values |= {"ce_clean": ce, "ce_poisoned": ce_p, "ce_gap": ce - ce_p}
    return values
