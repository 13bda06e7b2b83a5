"""A poison of images, released: written as lossless shards, as a recipe, or as both.

Images pass in chunks, read - perturb - write, so memory does not grow with the data. Then the shards are opened again,
hashes and all, and the budget is measured on the pixels that lie there; the manifest gets what was measured.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from poisonshield import __version__
from poisonshield.batch import Batch
from poisonshield.data import ShardSet, read_batch
from poisonshield.data.manifest import FILE_NAME
from poisonshield.data.writer import ShardWriter, remove_dataset
from poisonshield.errors import BudgetError, ConfigError
from poisonshield.files import tell_of_disk
from poisonshield.poisons.base import KeyedPoison
from poisonshield.poisons.release.measured import MeasuredBudget
from poisonshield.poisons.release.recipe import ENDING, read_recipe, save_recipe
from poisonshield.runs.parts.image_data import build_poison, open_train
from poisonshield.runs.parts.training import Training

log = logging.getLogger(__name__)

CHUNK_PIXELS = 2**22  # pixels in memory at once: 4,096 images of 32 px, 83 of 224 px


class Clock:
    """Seconds by kind of work; work inside other work counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inside = [0.0]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self._inside.append(0.0)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[name] += elapsed - self._inside.pop()
            self._inside[-1] += elapsed

    def reading(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, the time to get each counted as "read"."""
        batches = iter(batches)
        while True:
            with self("read"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


def release(run: Training) -> Path:
    """Write `train/` (shards and manifest) and `<name>.poison.safetensors`, as `release.format` asks; the run folder.

    Raises ConfigError if the config names no poison, BudgetError if what was written breaks the poison's own budget;
    then the shards stay, for inspection, but without a manifest they are no data set.
    """
    if run.poison is None:
        raise ConfigError(f"{run.origin} names no poison to write. Set data.poison, for example data.poison.name=lsp.")
    folder, clock, format = run.folder, Clock(), run.settings.release.format
    out = folder.path / "train"
    if format != "recipe":
        _refuse_what_is_there(out, overwrite=folder.overwrite)
    with clock("open"):
        source = open_train(run)
    with clock("fit"):
        poison = build_poison(run, source, watch=clock.reading, folder=folder.path)
    recipe = folder.path / f"{poison.name}{ENDING}"
    if format != "shards":
        _refuse_another_recipe(recipe, overwrite=folder.overwrite)
    with tell_of_disk(folder.path):
        folder.path.mkdir(parents=True, exist_ok=True)
        measured = None if format == "recipe" else write_shards(run, source, poison, out, clock)
        if format != "shards":
            save_recipe(poison, recipe, classes=source.classes, data=source.digest)
            log.info("recipe    %s (%.1f KB); use it with data.poison=%s", recipe, recipe.stat().st_size / 1e3, recipe)
    poison.finish()
    if measured is not None:
        log.info("shards    %s; use them with data.train=%s data.test=%s data.poison=null", out, out,
                 run.settings.data.test or run.settings.data.train)  # fmt: skip
        log.info("measured  %s", "  ".join(f"{k} {v}" for k, v in measured.items()))
    log.info("seconds   %s", "  ".join(f"{name} {s:.1f}" for name, s in clock.seconds.items()))
    return folder.path


def _refuse_what_is_there(out: Path, *, overwrite: bool) -> None:
    """Raise ConfigError for a data set, unless it is to give way, and for anything else in any case."""
    if (out / FILE_NAME).exists():
        if not overwrite:
            raise ConfigError(f"{out} holds a data set already. Choose another run.dir, or set run.overwrite=true.")
        return
    names = sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) if out.is_dir() else []
    if any(not name.startswith("shard-") for name in names) or (out.exists() and not out.is_dir()):
        raise ConfigError(
            f"{out} is there and holds no data set of ours, so it is not replaced. Choose another run.dir, or move it "
            "away."
        )


def _refuse_another_recipe(recipe: Path, *, overwrite: bool) -> None:
    """Raise ConfigError for a recipe, unless it is to give way, and for a file that is none in any case."""
    if not recipe.exists():
        return
    if not overwrite:
        raise ConfigError(f"{recipe} is there already. Choose another run.dir, or set run.overwrite=true.")
    read_recipe(recipe)


def write_shards(run: Training, source: ShardSet, poison: KeyedPoison, out: Path, clock: Clock) -> dict[str, Any]:
    """Write the poisoned set to `out` and measure it there: what was measured, which its manifest has too."""
    statement = describe(run, source, poison)
    writer = ShardWriter(
        out,
        classes=source.classes,
        image_size=source.image_size,
        samples_per_shard=run.settings.release.samples_per_shard,
        provenance=f"{source.manifest.provenance} Pixels changed by poison {poison.name}.".strip(),
        poison=statement,
        overwrite=run.settings.run.overwrite,
    )
    with writer:
        for indices in _chunks(source):
            with clock("read"):
                batch = read_batch(source, indices)
            with clock("perturb"):
                x = poison.apply(batch).x
                assert x is not None  # a poison gives pixels for pixels
                pixels = (x * 255).round().to(torch.uint8)
            with clock("write"):
                for key, image, label in zip(batch.keys, pixels, source.labels[indices].tolist(), strict=True):
                    writer.write(key, image, label)
    with clock("measure"):
        return measure_shards(source, poison, out)


def measure_shards(source: ShardSet, poison: KeyedPoison, out: Path) -> dict[str, Any]:
    """Open the written set, compare every sample with its clean one by key, and complete the manifest.

    Raises BudgetError naming the first sample that is not what the poison gives; `out` is then no data set any more.
    """
    written = ShardSet.open(out)
    where = {key: i for i, key in enumerate(written.keys)}
    budget = MeasuredBudget(poison)
    try:
        for indices in _chunks(source):
            clean = read_batch(source, indices)
            found = torch.tensor([where[key] for key in clean.keys])
            budget.add(clean, written.read(found).float() / 255)
    except BudgetError:
        remove_dataset(out)
        raise
    measured = budget.record()
    manifest = written.manifest
    manifest.model_copy(update={"poison": {**(manifest.poison or {}), "measured": measured}}).save(out)
    return measured


def describe(run: Training, source: ShardSet, poison: KeyedPoison) -> dict[str, Any]:
    """What the manifest says about the poison before anything is measured."""
    poisoned = poison.chosen(source.ids)
    counts = torch.bincount(source.labels[poisoned], minlength=len(source.classes))
    return {
        **poison.describe(),
        "clean_data": source.digest,
        "poisoned": int(poisoned.sum()),
        "poisoned_per_class": dict(zip(source.classes, counts.tolist(), strict=True)),
        "poisonshield": __version__,
        "torch": torch.__version__,
    }


def _chunks(source: ShardSet) -> tuple[torch.Tensor, ...]:
    """Indices of as many images as are in memory at once."""
    assert source.image_size is not None  # poisons refuse images of several sizes
    height, width = source.image_size
    return torch.arange(len(source)).split(max(1, CHUNK_PIXELS // (height * width)))
