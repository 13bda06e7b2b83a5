"""Which samples a readout or probe sees: the whole set in its order, or a draw that depends on the run's seed alone."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from poisonshield.batch import Batch
from poisonshield.build import OpenData, Run, TrainingSet, build_defenses
from poisonshield.data import Source, evaluate_batches, read_batch
from poisonshield.data.views import Views, ViewsConfig
from poisonshield.method import Method

# VESPR's authors evaluate on 20 and 5 batches of 512, and attack one of 1,024.
LEGACY_BANK, LEGACY_QUERIES, LEGACY_ATTACKED = 10_240, 2_560, 1_024


@dataclass(frozen=True)
class Samples:
    """The data of a finished run and its method, on one device. count: None, or more than there are, takes all.

    Where the run trained on another size than the images have (views.size), images are read off as the authors do: shorter
    side to 256/224 of it, then the middle.
    """

    run: Run
    data: OpenData
    training: TrainingSet
    method: Method
    device: torch.device

    def test(self, count: int | None = None) -> Iterator[Batch]:
        """Clean test images."""
        return self._batches(self.data.test, count, (self._middle,))

    def train(self, count: int | None = None) -> Iterator[Batch]:
        """Training images as they were trained on: poisoned and purified, without augmentation."""
        return self._batches(self.training.source, count, (*self.training.stages, self._middle))

    def clean(self, count: int | None = None) -> Iterator[Batch]:
        """The samples of `train` in the same batches, without the poison and purified alike."""
        defenses = build_defenses(self.run, self.data.num_classes)
        return self._batches(self.data.train, count, (*(d.before for d in defenses), self._middle))

    def augmented(self, count: int | None = None, *, view: int = 0, legacy_bank: bool = False) -> Iterator[Batch]:
        """The samples of `train` with x a view of the run's own kind, or the resized crops that legacy k-NN compares with."""
        config = self.run.settings.views
        if legacy_bank:
            config = config.model_copy(update={"name": "crop_flip", "random_resized_crop": True, "min_area": None})
        config = config.model_copy(update={"count": view + 1, "local": 0})
        views = Views(config, default=self.method.default_views, count=view + 1, seed=self.run.seed)
        for batch in self._batches(self.training.source, count, self.training.stages):
            yield batch.replace(x=views(batch).views[view])

    def _middle(self, batch: Batch) -> Batch:
        size = self.run.settings.views.size
        if size is None or batch.x.shape[2:] == (size, size):
            return batch
        views = Views(ViewsConfig(name="test", size=size), default="test", count=1, seed=self.run.seed)
        return batch.replace(x=views(batch).views[0])

    def _batches(self, source: Source, count: int | None, stages: tuple = ()) -> Iterator[Batch]:
        size = self.run.settings.evaluate.batch_size
        if count is None or count >= len(source):
            yield from evaluate_batches(source, batch_size=size, device=self.device, stages=stages)
            return
        generator = torch.Generator().manual_seed(self.run.seed)
        chosen = torch.randperm(len(source), generator=generator)[:count].sort().values
        for indices in chosen.split(size):
            batch = read_batch(source, indices, device=self.device)
            for stage in stages:
                batch = stage(batch)
            yield batch
