"""Which samples an evaluation sees: the whole set in its order, or a draw that depends on the run's seed alone."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from poisonshield.batch import Batch
from poisonshield.data import Source, evaluate_batches, read_batch
from poisonshield.data.stream import Stage
from poisonshield.data.views import Views, ViewsConfig
from poisonshield.evals.base import Subject
from poisonshield.method import SSLMethod
from poisonshield.runs.parts.image_data import OpenData, TrainingSet, build_defenses
from poisonshield.runs.parts.training import Training


@dataclass(frozen=True)
class Samples:
    """The samples of a run on one device, in the forms that evaluations ask for (poisonshield.evals.base.Samples).

    default_views: the augmentation that the run's method asks for. Where the run trained on another size than the
    images have (views.size), images are seen as VESPR's authors do: shorter side to 256/224 of it, then the middle.
    """

    run: Training
    data: OpenData
    training: TrainingSet
    default_views: str
    device: torch.device

    def test(self, count: int | None = None) -> Iterator[Batch]:
        """Clean test images."""
        if self.data.test is None:
            return iter(())
        return self._batches(self.data.test, count, (self._middle,))

    def train(self, count: int | None = None) -> Iterator[Batch]:
        """Training images as they were trained on: poisoned and purified, without augmentation."""
        return self._batches(self.training.source, count, (*self.training.stages, self._middle))

    def clean(self, count: int | None = None) -> Iterator[Batch]:
        """The samples of `train` in the same batches, without the poison and purified alike."""
        defenses = build_defenses(self.run, self.data.num_classes)
        return self._batches(self.data.train, count, (*(d.before for d in defenses), self._middle))

    def augmented(self, count: int | None = None, *, view: int = 0) -> Iterator[Batch]:
        """The samples of `train`; x is that view of the run's own augmentation."""
        return self._augment(self.run.settings.views, count, view)

    def crops(self, count: int | None = None) -> Iterator[Batch]:
        """The samples of `train`; x is a flipped, resized crop, whatever the run's own augmentation is."""
        changes = {"name": "crop_flip", "random_resized_crop": True, "min_area": None}
        return self._augment(self.run.settings.views.model_copy(update=changes), count, 0)

    def _augment(self, config: ViewsConfig, count: int | None, view: int) -> Iterator[Batch]:
        config = config.model_copy(update={"count": view + 1, "local": 0})
        views = Views(config, default=self.default_views, count=view + 1, seed=self.run.seed)
        for batch in self._batches(self.training.source, count, self.training.stages):
            yield batch.replace(x=_make_view(views, batch, view))

    def _middle(self, batch: Batch) -> Batch:
        size = self.run.settings.views.size
        if size is None or batch.x is None or batch.x.shape[2:] == (size, size):
            return batch
        config = ViewsConfig.model_validate({"name": "test", "size": size})
        views = Views(config, default="test", count=1, seed=self.run.seed)
        return batch.replace(x=_make_view(views, batch, 0))

    def _batches(self, source: Source, count: int | None, stages: tuple[Stage, ...] = ()) -> Iterator[Batch]:
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


def _make_view(views: Views, batch: Batch, which: int) -> torch.Tensor:
    made = views(batch).views
    assert made is not None  # Views always makes them
    return made[which]


def build_subject(
    run: Training, data: OpenData, training: TrainingSet, method: SSLMethod, device: torch.device
) -> Subject:
    """What evaluations of this run look at."""
    return Subject(
        method,
        Samples(run, data, training, method.default_views, device),
        num_classes=data.num_classes,
        seed=run.seed,
        poisoned=run.poison is not None,
        legacy=run.settings.evaluate.legacy,
        tested=data.test is not None,
    )
