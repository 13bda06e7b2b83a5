"""Which samples a readout or probe sees: the whole set in its order, or a draw that depends on the run's seed alone."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from poisonshield.batch import Batch
from poisonshield.build import OpenData, Run, TrainingSet, build_defenses
from poisonshield.data import Source, evaluate_batches, read_batch
from poisonshield.data.views import Views
from poisonshield.method import Method

# VESPR's authors evaluate on 20 and 5 batches of 512, and attack one of 1,024.
LEGACY_BANK, LEGACY_QUERIES, LEGACY_ATTACKED = 10_240, 2_560, 1_024


@dataclass(frozen=True)
class Samples:
    """The data of a finished run and its method, on one device. count: None, or more than there are, takes all."""

    run: Run
    data: OpenData
    training: TrainingSet
    method: Method
    device: torch.device

    def test(self, count: int | None = None) -> Iterator[Batch]:
        """Clean test images."""
        return self._batches(self.data.test, count)

    def train(self, count: int | None = None) -> Iterator[Batch]:
        """Training images as they were trained on: poisoned and purified, without augmentation."""
        return self._batches(self.training.source, count, self.training.stages)

    def clean(self, count: int | None = None) -> Iterator[Batch]:
        """The samples of `train` in the same batches, without the poison and purified alike."""
        defenses = build_defenses(self.run, self.data.num_classes)
        return self._batches(self.data.train, count, tuple(d.before for d in defenses))

    def augmented(self, count: int | None = None, *, name: str = "auto", view: int = 0) -> Iterator[Batch]:
        """The samples of `train` with x a view: the run's own kind (auto), or another by name."""
        config = self.run.settings.views
        config = config if name == "auto" else config.model_copy(update={"name": name})
        views = Views(config, default=self.method.default_views, count=view + 1, seed=self.run.seed)
        for batch in self.train(count):
            yield batch.replace(x=views(batch).views[view])

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
