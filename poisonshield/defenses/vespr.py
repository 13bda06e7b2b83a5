"""VESPR: train self-supervision and a classifier together on views attacked against the classifier. arXiv 2409.08509.

    L = ssl_weight L_SSL(views) + ce_weight mean_v CE(head(encoder(view_v)), y),   views in attack_views replaced by
    x + argmax_{|d| <= eps} CE(head(encoder(x + d)), y)

Supervised training finds a planted shortcut first, so its loss is the best detector of it; ascending that loss erases
the shortcut, and positive pairs can then agree on real content only. With `attack_views: []` this is joint
self-supervised and supervised training without any attack (the ablation "SSL+CE").

Differs from the authors' code: budgets are in true pixel units, attacked pixels stay in [0, 1], and the attack runs
encoder and classifier alone, on the attacked views alone, without parameter gradients. With the classifier's loss as
the only objective, this takes the same sign steps as attacking the joint loss at 0 * L_SSL + 1 * L_CE, at a third of
the cost.
"""

from typing import ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from poisonshield import collectives
from poisonshield.attacks import PGD, Linf, frozen_stats
from poisonshield.batch import Batch, StepOutput
from poisonshield.config import Pixels, Settings
from poisonshield.defenses.base import Defense, Wrapped
from poisonshield.errors import ConfigError
from poisonshield.method import Method
from poisonshield.ops.precision import at_least_float32


class VESPR(Defense):
    """Adds a classifier and adversarial views around any self-supervised method."""

    name: ClassVar[str] = "vespr"

    class Config(Settings):
        """eps, step_size: linf, pixel units. attack_views: which views are attacked, counted from 0."""

        eps: Pixels = 4 / 255
        step_size: Pixels = 0.6 / 255
        steps: int = Field(10, ge=0)
        random_start: bool = True
        attack_views: tuple[int, ...] = (0,)
        ssl_weight: float = Field(1.0, ge=0)
        ce_weight: float = Field(1.0, ge=0)

    @property
    def label(self) -> str:
        """'vespr', or 'ssl+ce' when no view is attacked."""
        return self.name if self.config.attack_views else "ssl+ce"

    def wrap(self, method: Method) -> Method:
        """Raises ConfigError for a view that the method does not have, or a method that is already supervised."""
        if type(method).logits is not Method.logits:
            raise ConfigError(
                f"vespr adds a classifier to a self-supervised method, and {method.name} has one. "
                "Use method.name: simclr, or the defense adversarial."
            )
        beyond = [v for v in self.config.attack_views if not 0 <= v < method.num_views]
        if beyond:
            raise ConfigError(
                f"vespr.attack_views {beyond}: {method.name} has {method.num_views} views, counted from 0."
            )
        return VESPRMethod(method, self.config, self.num_classes, self.seed)


class VESPRMethod(Wrapped):
    """One joint step; the inner method keeps its own loss and state."""

    def __init__(self, method: Method, config: VESPR.Config, num_classes: int, seed: int) -> None:
        super().__init__(method)
        self.config, self.seed = config, seed
        self.head = nn.Linear(method.encoder.feature_dim, num_classes)
        self.attack = PGD(config.steps, config.step_size, config.random_start)
        self.budget = Linf(config.eps)

    def forward(self, batch: Batch) -> StepOutput:
        """ssl_weight * L_SSL + ce_weight * L_CE on the attacked batch."""
        batch = batch.replace(views=tuple(self.attacked(v, i, batch) for i, v in enumerate(batch.views)))
        features = self.method.features(batch)
        out = self.method.loss(features, batch)
        scores = (at_least_float32(self.head(h)) for h in features)
        ce = sum(F.cross_entropy(s, batch.y, reduction="none") for s in scores) / len(features)
        ce = collectives.mean(ce, batch.rank_sizes)
        loss = self.config.ssl_weight * out.loss + self.config.ce_weight * ce
        return StepOutput(loss, {**out.metrics, "ce": ce.detach()})

    def attacked(self, view: Tensor, index: int, batch: Batch) -> Tensor:
        """The view as the losses see it: attacked if `index` is flagged, else unchanged. [B, 3, H, W] in [0, 1]."""
        if index not in self.config.attack_views:
            return view

        def objective(v: Tensor) -> Tensor:
            return F.cross_entropy(at_least_float32(self.logits(v)), batch.y, reduction="none")

        with frozen_stats(self.method.encoder, self.head):
            return self.attack(
                objective, view, self.budget, batch.random(self.seed, view.device).within(f"view{index}")
            )

    def logits(self, x: Tensor) -> Tensor:
        """[B, K]."""
        return self.head(self.encoder(x))
