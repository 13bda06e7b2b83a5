"""Robust accuracy: the classifier under attack, on clean images, read from the class scores."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from poisonshield.attacks import Attack, AttackChoice, AttackConfig, Budget, frozen_stats
from poisonshield.batch import Batch
from poisonshield.config import Number as Fraction
from poisonshield.evals.base import Evaluation, Number, Subject
from poisonshield.evals.parts.features import pixels_and_labels
from poisonshield.method import SSLMethod

LEGACY_ATTACKED = 1_024  # VESPR's authors attack one batch of as many

Raised = Literal["ce", "logit"]


class Robust(Evaluation[Subject]):
    """Accuracy of the classifier on attacked test images."""

    name = "robust"
    place = 40
    numbers = (Number("robust_top1", "classifier under attack", "%", "higher", digits=1),)

    class Config(AttackConfig):
        """The budget, the attack, and what it is asked."""

        eps: Fraction = Field(4 / 255, ge=0, description="radius in pixel units of the norm: 4/255 for linf, not 4")
        attack: AttackChoice = Field(
            {"name": "pgd", "step_size": 1 / 255},
            validate_default=True,
            description="a name, or a block with `name:` and the attack's settings",
        )
        loss: Raised = Field(
            "ce", description="What the attack raises: cross-entropy, or the negative score of the true class."
        )
        samples: int | None = Field(None, ge=1, description="Test images, drawn with the run's seed; null for all.")

    def lacks(self, subject: Subject) -> str | None:
        """Two classes or more, and test images."""
        return subject.without_classes() or subject.without_test()

    def __call__(self, subject: Subject) -> dict[str, Any]:
        """None for a method without a classifier."""
        config = self.config
        attack, budget = config.build_attack(), config.budget()
        loss: Raised = "logit" if subject.legacy else config.loss
        batches = subject.samples.test(LEGACY_ATTACKED if subject.legacy else config.samples)
        return {"robust_top1": robust(subject.method, batches, attack, budget, loss=loss, seed=subject.seed)}


def robust(
    method: SSLMethod,
    batches: Iterable[Batch],
    attack: Attack,
    budget: Budget,
    *,
    max_samples: int | None = None,
    loss: Raised = "ce",
    seed: int,
) -> float | None:
    """Top-1 accuracy in percent after an attack on the first max_samples (None: all); None without a classifier.

    None without samples too. loss: cross-entropy, or the negative score of the true class, as VESPR's authors evaluate.
    An attack that takes `success` is told which pixels the classifier gets wrong, and so keeps them; a sample then
    counts as right if it withstands every restart. An upper bound of the true robust accuracy, as every attack's
    result is.
    """
    right = total = 0
    with frozen_stats(method):
        for batch in batches:
            if max_samples is not None and total >= max_samples:
                break
            taken = len(batch) if max_samples is None else max_samples - total
            x, y = (values[:taken] for values in pixels_and_labels(batch))
            batch = batch.replace(keys=batch.keys[: len(x)], x=x, y=y)
            with torch.no_grad():
                if method.logits(x[:1]) is None:
                    return None
            victim = _Victim(method, y, loss)
            success = victim.is_wrong if "success" in attack.options else None
            rng = batch.random(seed, x.device).within("robust")
            x_adv = attack(victim.objective, x, budget, rng, success=success)
            right += int((~victim.is_wrong(x_adv)).sum())
            total += len(y)
    return 100.0 * right / total if total else None


class _Victim:
    """The classifier and the true labels [B] of a batch, as an attack asks about them."""

    def __init__(self, method: SSLMethod, y: Tensor, loss: Raised) -> None:
        self.method, self.y, self.loss = method, y, loss

    def objective(self, x: Tensor) -> Tensor:
        """What the attack raises, [B]."""
        scores = self._scores(x).float()
        if self.loss == "ce":
            return F.cross_entropy(scores, self.y, reduction="none")
        return -scores.gather(1, self.y[:, None])[:, 0]

    @torch.no_grad()
    def is_wrong(self, x: Tensor) -> Tensor:
        """Which of x [B, 3, H, W] get another class than their own, bool [B]."""
        return self._scores(x).argmax(1) != self.y

    def _scores(self, x: Tensor) -> Tensor:
        """[B, K]; asked only of a method that has a classifier."""
        scores = self.method.logits(x)
        assert scores is not None
        return scores
