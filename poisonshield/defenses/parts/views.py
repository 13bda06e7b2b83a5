"""A method that sees other views than the stream made: the views of a step are changed, and then it steps as ever."""

from abc import abstractmethod

import torch
from torch import Tensor

from poisonshield.batch import Batch, StepOutput
from poisonshield.defenses.base import Wrapped
from poisonshield.method import SSLMethod
from poisonshield.random import KeyedRandom


class ChangedViews(Wrapped):
    """A subclass writes `change`; every view of every step goes through it, with numbers by key of its own."""

    def __init__(self, method: SSLMethod, seed: int) -> None:
        super().__init__(method)
        self.seed = seed

    @abstractmethod
    def change(self, view: Tensor, rng: KeyedRandom) -> Tensor:
        """The view [B, 3, H, W] in [0, 1] as training sees it. rng: the samples' numbers of this view and this draw."""

    def forward(self, batch: Batch) -> StepOutput:
        """The inner method's loss on the changed views."""
        views = []
        with torch.no_grad():
            for i, view in enumerate(batch.all_views()):
                rng = batch.random(self.seed, view.device).within(f"{type(self).__name__}/view{i}")
                views.append(self.change(view, rng))
        return self.method(batch.replace(views=tuple(views)))
