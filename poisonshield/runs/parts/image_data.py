"""The data of a classifier's run: opened, verified, poisoned and purified as the run says."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from poisonshield.batch import Batch
from poisonshield.config import Settings
from poisonshield.data import ResidentSource, ShardSet, Source, evaluate_batches, find_folder, open_dataset
from poisonshield.data.bad import parse_limit
from poisonshield.data.cache import DEFAULT_GIB
from poisonshield.data.shards import Verify
from poisonshield.data.stream import Stage
from poisonshield.defenses.base import Context, Defense
from poisonshield.engine.processes import choose_device
from poisonshield.errors import ConfigError, DataError
from poisonshield.poisons.base import KeyedPoison
from poisonshield.poisons.release.recipe import load_recipe
from poisonshield.runs.parts.training import Training

log = logging.getLogger(__name__)


class DataConfig(Settings):
    """What to train and test on."""

    train: str | None = Field(
        "cifar10-mini",
        description="A bundled name, or a folder with a manifest (or with train/ and test/ in it), or the address of "
        "one: https://, s3://, gs://, hf:// and the like; null is none yet.",
    )
    test: str | None = Field(
        None, description="The same for the clean test images; null takes the test split of train, if it has one."
    )
    poison: Any = Field(
        None,
        description="null, a poison's name, a block with `name:`, or the path of a recipe: applied while loading.",
    )
    poison_ratio: float = Field(1.0, ge=0, le=1, description="The share of samples that data.poison takes.")
    batch_size: int = Field(128, ge=1, description="Of all ranks together.")
    source: Literal["auto", "resident", "tar"] = Field(
        "auto", description="resident holds decoded pixels in memory; auto does so up to resident_mib."
    )
    resident_mib: int = Field(4096, ge=0, description="Memory for decoded pixels, in MiB.")
    workers: int = Field(0, ge=0, description="Processes that decode.")
    window: int = Field(16, ge=1, description="Batches that are read together, for fewer seeks.")
    lanes: int | None = Field(
        None,
        ge=1,
        description="null: an order over all shards. A number, 64 say: shards are dealt to so many lanes that "
        "processes share, so that each reads its own shards only.",
    )
    verify: Verify = Field(
        "always",
        description="once trusts a verified index until files change; lazy checks each shard as it is first read.",
    )
    bad_samples: str = Field(
        "stop",
        pattern=r"^(stop|skip:[1-9][0-9]{0,8})$",
        description="What an unreadable training image does: stop, or skip:N, which names and leaves out up to N.",
    )
    cache: float = Field(
        DEFAULT_GIB,
        gt=0,
        description="GiB that shards from afar may take on a node, in XDG_CACHE_HOME or ~/.cache.",
    )


def build_defenses(run: Training, num_classes: int) -> list[Defense]:
    """The defenses in the order of the config."""
    return [d.cls(d.config, Context(run.seed, num_classes)) for d in run.defenses]


@dataclass(frozen=True)
class OpenData:
    """The opened and verified data sets of a run; the test images, if there are any, are decoded where they fit."""

    train: ShardSet
    test: Source | None

    @property
    def num_classes(self) -> int:
        """How many classes both sets have."""
        return len(self.train.classes)


def open_data(run: Training) -> OpenData:
    """Both sets, opened and verified. Raises DataError if they do not fit each other, or the test set is not clean."""
    train = open_train(run)
    test = _open_test(run, train)
    if test is None:
        return OpenData(train, None)
    _refuse_unfit_test(run, train, test)
    return OpenData(train, ResidentSource(test) if _is_held(run, test) else test)


def _open_test(run: Training, train: ShardSet) -> ShardSet | None:
    """The test images; None, and said so, if data.test names none and data.train has no test split, or if the training
    images are unlabelled, so that no number on test images has a meaning."""
    data = run.settings.data
    try:
        place = find_folder(data.test or str(data.train), "test")
    except ConfigError:
        if data.test is not None:
            raise
        place = train.origin
    if data.test is None and place == train.origin:
        log.warning("%s has no test split, so there are no numbers on test images. data.test names some.", data.train)
        return None
    test = ShardSet.open(place, verify=data.verify, cache=data.cache)
    if len(train.classes) == 1 and test.classes != train.classes:
        log.warning("%s has no labels to learn test images' classes from: %s is not used.", data.train, test.place)
        return None
    return test


def _refuse_unfit_test(run: Training, train: ShardSet, test: ShardSet) -> None:
    """Raise DataError unless the test set is another one, clean, and of the same classes and size."""
    data = run.settings.data
    if train.classes != test.classes:
        raise DataError(
            f"{data.train} has {len(train.classes)} classes, {data.test or data.train} has {len(test.classes)}, or "
            "their names or order differ. Import both with the same class list."
        )
    if train.digest == test.digest:
        raise DataError(
            f"data.train and data.test are the same set ({data.train}); accuracy on it would mean nothing.\n"
            "  Set data.test to the clean test images."
        )
    if test.manifest.poison is not None:
        raise DataError(
            f"{test.place} is poisoned, and accuracy is measured on clean images only.\n"
            "  Set data.test to the clean test images."
        )
    if train.image_size != test.image_size:
        raise DataError(
            f"images of {train.place} are {_word_size(train)}, those of {test.place} are {_word_size(test)}.\n"
            "  Import both with one --size."
        )


def _word_size(source: ShardSet) -> str:
    return "of several sizes" if source.image_size is None else "{} x {} (height x width)".format(*source.image_size)


def open_train(run: Training) -> ShardSet:
    """The training set, opened and verified.

    Raises ConfigError if the run names none, DataError if it is poisoned and the run would poison it again.
    """
    data = run.settings.data
    if data.train is None:
        raise ConfigError(
            f"{run.origin} says no data.train: it takes images of your own.\n"
            "  Make a data set of them, poisonshield data import PHOTOS --size 96 --out DATA, and say data.train=DATA."
        )
    limit = parse_limit(data.bad_samples)
    train = open_dataset(data.train, "train", verify=data.verify, cache=data.cache, bad_limit=limit)
    if train.manifest.poison is not None and run.poison is not None:
        raise DataError(
            f"{train.place} is poisoned already ({train.manifest.poison.get('name', 'by an unnamed poison')}), and "
            "data.poison would poison it again.\n  Set data.poison=null, or data.train to the clean images."
        )
    return train


def _is_held(run: Training, source: ShardSet) -> bool:
    """Whether the decoded pixels of a set are to be held in memory."""
    settings, size = run.settings.data, source.image_size
    fits = size is not None and len(source) * 3 * size[0] * size[1] <= settings.resident_mib * 2**20
    return settings.source == "resident" or (settings.source == "auto" and fits)


def build_poison(
    run: Training,
    source: ShardSet,
    *,
    watch: Callable[[Iterable[Batch]], Iterable[Batch]] = iter,
    folder: Path | None = None,
) -> KeyedPoison:
    """The poison of a run that has one, ready to apply to the training set; fitted to it where it has to see the data.

    watch: wraps the batches that it is fitted to, to time or to count them. folder: where one that is trained keeps
    what it takes to go on after a stop.
    """
    if isinstance(run.poison, Path):
        return load_recipe(run.poison, classes=source.classes, image_size=source.image_size, data=source.digest)
    cls = run.poison.cls
    if source.image_size is None:
        raise DataError(
            f"poison {cls.name} needs images of one size, and {source.place} holds several. Import it with --size."
        )
    poison = cls(run.poison.config, num_classes=len(source.classes), image_size=source.image_size, seed=run.seed)
    poison.work_in(folder, choose_device(run.settings.engine.device))
    if cls.needs_data:
        poison.fit(watch(evaluate_batches(source, batch_size=1000)))
    else:
        poison.fit(())
    if run.settings.data.poison_ratio < 1:
        poison.choose(source.ids, run.settings.data.poison_ratio)
    return poison


@dataclass(frozen=True)
class TrainingSet:
    """What is trained on: a source, and the stages that its batches still need (poison, then purification)."""

    source: Source
    stages: tuple[Stage, ...]

    def batches(self, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """Every sample once, in index order and without augmentation, as probes want it."""
        return evaluate_batches(self.source, batch_size=batch_size, device=device, stages=self.stages)


def build_training_set(run: Training, data: OpenData) -> TrainingSet:
    """The training set poisoned and purified as the run says; held in memory, poisoned once, where it fits."""
    train = data.train
    poison = None if run.poison is None else build_poison(run, train).apply
    held = _is_held(run, train)
    source = ResidentSource(train, poison) if held else train
    stages: tuple[Stage, ...] = () if held or poison is None else (poison,)
    for defense in build_defenses(run, data.num_classes):
        if defense.looks_first:
            defense.look(evaluate_batches(source, batch_size=1000, stages=stages))
        stages = (*stages, defense.before)
    return TrainingSet(source, stages)
