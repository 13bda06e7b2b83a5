"""What cutmix and mixup share: who is mixed with whom, how much, and cross-entropy with the labels of both."""

from abc import abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from poisonshield import collectives
from poisonshield.batch import Batch, StepOutput
from poisonshield.config import Settings
from poisonshield.defenses.base import Defense, Wrapped
from poisonshield.defenses.parts.classifier import plain_classifier
from poisonshield.method import SSLMethod
from poisonshield.ops.precision import at_least_float32
from poisonshield.random import KeyedRandom


class MixingConfig(Settings):
    """Which samples are mixed."""

    p: float = Field(1.0, ge=0, le=1, description="chance that a sample is mixed; ISS takes 0.5")


class Mixing(Defense):
    """A defense that mixes each view with that of another sample, and their labels alike. A subclass sets `method`."""

    method: ClassVar[type["MixingMethod"]]

    def wrap(self, method: SSLMethod) -> SSLMethod:
        """Raises ConfigError for a method that is no plain classifier."""
        return self.method(plain_classifier(method, self.name), self.config, self.seed)


class MixingMethod(Wrapped):
    """Cross-entropy of the inner classifier on mixed views: share * CE(y) + (1 - share) * CE(y of the partner).

    Partners follow from the lots of all samples of the step, over all ranks: whoever drew the next larger lot, and the
    smallest after the largest. So neither order nor ranks change who meets whom, and nobody meets itself.
    """

    def __init__(self, method: SSLMethod, config: MixingConfig, seed: int) -> None:
        super().__init__(method)
        self.config, self.seed = config, seed

    @abstractmethod
    def mix(self, view: Tensor, other: Tensor, share: Tensor, rng: KeyedRandom) -> tuple[Tensor, Tensor]:
        """The mixed view [B, 3, H, W] and the share of it that is the sample's own, [B]. share: drawn from U(0, 1)."""

    def forward(self, batch: Batch) -> StepOutput:
        """The mean over views and samples. The method's own loss, such as its label smoothing, is not used."""
        y, losses = batch.labels(), []
        for i, view in enumerate(batch.all_views()):
            rng = batch.random(self.seed, view.device).within(f"mixing/view{i}")
            with torch.no_grad():
                other, other_y = self._partners(view, y, rng, batch.rank_sizes)
                drawn = rng.uniform("share and whether", 2)  # Beta(1, 1) is uniform
                share = torch.where(drawn[:, 1] < self.config.p, drawn[:, 0], 1.0)
                mixed, own = self.mix(view, other, share, rng)
            scores = at_least_float32(self.method.scores(mixed))
            per_sample = [F.cross_entropy(scores, labels, reduction="none") for labels in (y, other_y)]
            losses.append(own * per_sample[0] + (1 - own) * per_sample[1])
        loss = collectives.mean(torch.stack(losses).mean(0), batch.rank_sizes)
        return StepOutput(loss, {"ce": loss.detach()})

    def _partners(
        self, view: Tensor, y: Tensor, rng: KeyedRandom, sizes: tuple[int, ...] | None
    ) -> tuple[Tensor, Tensor]:
        """The partners' views [B, 3, H, W] and labels [B]."""
        lots = collectives.gather(rng.uniform("lot", 1), sizes)[:, 0]
        views, labels = collectives.gather(view.contiguous(), sizes), collectives.gather(y, sizes)
        order = lots.argsort()
        partner = torch.empty_like(order)
        partner[order] = order.roll(-1)
        before = 0 if sizes is None else sum(sizes[: collectives.rank()])
        if sizes is None:
            before = collectives.rank() * len(view)
        mine = partner[before : before + len(view)]
        return views[mine], labels[mine]
