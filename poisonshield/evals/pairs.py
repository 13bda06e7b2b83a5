"""Clean and poisoned versions of the same training samples, side by side: does the encoder react to the poison?

The VESPR paper reports "Psn Local Lip" and "Psn-Cln Sim"; we have not seen its formulas, so THESE ARE OUR DEFINITIONS,
and their values do not belong beside the paper's:

    psn_local_lip  mean of |f(x) - f(x_p)|_1 / |x - x_p|_inf, pixel units     low: small reaction to the poison
    psn_cln_sim    mean of cos(f(x), f(x_p))                                  high: the same
    ce_gap         mean of CE(x, y) - CE(x_p, y), where there are class scores  high: the poison tells the label
"""

import logging
from collections.abc import Callable, Iterable
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field

from poisonshield.attacks import frozen_stats
from poisonshield.batch import Batch
from poisonshield.config import Settings
from poisonshield.errors import DataError
from poisonshield.evals.base import Evaluation, Number, Subject
from poisonshield.evals.lipschitz import ratio
from poisonshield.evals.parts.features import pixels_and_labels
from poisonshield.method import SSLMethod

log = logging.getLogger(__name__)

WATCHED = ("psn_cln_sim", "ce_gap")
"""What is logged during training."""


class Pairs(Evaluation[Subject]):
    """Clean and poisoned versions of the same training samples."""

    name = "pairs"
    on = False
    numbers = (
        Number("psn_local_lip", "clean to poisoned, by their distance"),
        Number("psn_local_lip_unit", "clean to poisoned", panel="local Lipschitz, unit features"),
        Number("psn_cln_sim", "clean, poisoned", panel="cosine"),
        Number("ce_clean", "clean", panel="cross-entropy"),
        Number("ce_poisoned", "poisoned", panel="cross-entropy"),
        Number("ce_gap", "cross-entropy, clean less poisoned"),
        Number("pairs", "samples that the poison changed", digits=0),
    )

    class Config(Settings):
        """Which samples."""

        samples: int | None = Field(
            1000, ge=1, description="Training samples, drawn with the run's seed; null for all."
        )

    def __call__(self, subject: Subject) -> dict[str, Any]:
        """None for a run that poisons nothing itself, which the log says."""
        if not subject.poisoned:
            _say_unpoisoned("No clean-poison pairs", "them")
            return {number.key: None for number in self.numbers}
        count = self.config.samples
        return dict(pairs(subject.method, subject.samples.clean(count), subject.samples.train(count)))


def watch_pairs(subject: Subject, count: int) -> Callable[[], dict[str, float | None]] | None:
    """What a trainer logs of `count` fixed training samples, clean and poisoned: how alike the encoder finds them, and
    how much more the clean one costs the classifier. None where nothing is to be watched."""
    if count == 0:
        return None
    if not subject.poisoned:
        _say_unpoisoned("Nothing to watch", "watch_pairs")
        return None
    clean, poisoned = list(subject.samples.clean(count)), list(subject.samples.train(count))

    def watch() -> dict[str, float | None]:
        values = pairs(subject.method, clean, poisoned)
        return {name: values[name] for name in WATCHED}

    return watch


def _say_unpoisoned(what: str, wanted: str) -> None:
    log.warning("%s: this run poisons nothing itself. Set data.poison, on clean data, for %s.", what, wanted)


@torch.no_grad()
def pairs(method: SSLMethod, clean: Iterable[Batch], poisoned: Iterable[Batch]) -> dict[str, float | int | None]:
    """Means over the samples that the poison changed, and `pairs`, how many those are; None where there is nothing.

    psn_local_lip_unit is the first on l2-normalized features, whose scale cannot play a part. The two streams give the
    same samples in the same batches; raises DataError if not. Evaluation mode; the method is not changed.
    """
    sums: dict[str, torch.Tensor | float] = {}
    count = 0
    with frozen_stats(method):
        for a, b in zip_longest(clean, poisoned):
            (x, y), x_p = _same_samples(a, b)
            changed = (x != x_p).flatten(1).any(1)
            if not changed.any():
                continue
            count += int(changed.sum())
            for name, values in _of(method, x[changed], x_p[changed], y[changed]).items():
                sums[name] = sums.get(name, 0) + values.double().sum()
    names = ("psn_local_lip", "psn_local_lip_unit", "psn_cln_sim", "ce_clean", "ce_poisoned", "ce_gap")
    return {name: float(sums[name]) / count if name in sums else None for name in names} | {"pairs": count}


def _same_samples(
    clean: Batch | None, poisoned: Batch | None
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """((x, y) of the clean batch, x of the poisoned one). Raises DataError unless they hold the same samples."""
    if clean is not None and poisoned is not None and clean.keys == poisoned.keys:
        (x, y), (x_p, _) = pixels_and_labels(clean), pixels_and_labels(poisoned)
        if x.shape == x_p.shape:
            return (x, y), x_p
    raise DataError("clean and poisoned batches hold different samples. Read both in the same order and size.")


def _of(method: SSLMethod, x: torch.Tensor, x_p: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
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
    if scores is not None and scores_p is not None:
        ce = F.cross_entropy(scores.float(), y, reduction="none")
        ce_p = F.cross_entropy(scores_p.float(), y, reduction="none")
        values |= {"ce_clean": ce, "ce_poisoned": ce_p, "ce_gap": ce - ce_p}
    return values
