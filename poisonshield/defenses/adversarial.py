"""Adversarial training: train on PGD examples of the classifier's loss. Source: Madry et al. 2018.

Blunts poisons that fit inside its radius; costs as many more forward and input-backward passes a step as
the attack takes steps.
"""

from typing import ClassVar

import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from poisonshield.attacks import AttackConfig, Repeated, frozen_stats
from poisonshield.batch import Batch, StepOutput
from poisonshield.defenses.base import Defense, Wrapped
from poisonshield.errors import ConfigError
from poisonshield.method import SSLMethod
from poisonshield.models.batchnorm import input_gradients_only
from poisonshield.ops.precision import at_least_float32


class Adversarial(Defense):
    """Replaces every view by an adversarial one. Needs a method with a classifier."""

    name: ClassVar[str] = "adversarial"

    class Config(AttackConfig):
        """The budget and the attack, and no others."""

        @model_validator(mode="after")
        def _attack_moves(self) -> "Adversarial.Config":
            if not self.attack.cls.passes(self.attack.config):
                raise ValueError(
                    "attack takes no step, so it would train on plain views. Give attack.steps: 1 or more."
                )
            return self

    def wrap(self, method: SSLMethod) -> SSLMethod:
        """Raises ConfigError for a method without a classifier."""
        if not method.has_classifier:
            raise ConfigError(
                f"adversarial training needs a classifier to attack, and {method.name} has none. "
                "Use method.name: supervised, or the defense vespr, which adds one."
            )
        return AdversarialMethod(method, self.config, self.seed)


class AdversarialMethod(Wrapped):
    """Cross-entropy on adversarial views, batch statistics still during the attack."""

    def __init__(self, method: SSLMethod, config: Adversarial.Config, seed: int) -> None:
        super().__init__(method)
        self.attack, self.budget, self.seed = config.build_attack(), config.budget(), seed

    def forward(self, batch: Batch) -> StepOutput:
        """The inner method's loss on attacked views."""
        objective = Repeated(self._loss_of_each, (batch.labels(),), (*self.method.parameters(), *self.method.buffers()))
        views = []
        # Attacks see what an evaluation would: running statistics, which their passes leave as they are.
        with frozen_stats(self.method), input_gradients_only(self.method):
            for i, view in enumerate(batch.all_views()):
                rng = batch.random(self.seed, view.device).within(f"view{i}")
                views.append(self.attack(objective, view, self.budget, rng))
        return self.method(batch.replace(views=tuple(views)))

    def _loss_of_each(self, x: Tensor, labels: Tensor) -> Tensor:
        """What the attack ascends: the classifier's loss of each sample, [B]."""
        return F.cross_entropy(at_least_float32(self.method.scores(x)), labels, reduction="none")
