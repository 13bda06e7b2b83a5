"""Poisons that are trained: `LearnedPoison`, a table of levels by sample or by class, and how it comes to be.

A subclass writes `learn(pictures)`: it trains whatever it needs and fills `self.table`. Levels are whole, in
[-eps, eps], and of pictures as they are written: a picture plus its levels lies in [0, 255]. So shards, recipes and
pictures poisoned while loading agree to the bit.
"""

import hashlib
import logging
import math
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.config import Pixels, Settings
from poisonshield.errors import DataError, PoisonShieldError
from poisonshield.poisons.base import KeyedPoison, Labelled, Radius
from poisonshield.poisons.learned.pictures import LARGE, Pictures, collect, make_table
from poisonshield.poisons.learned.progress import ENDING, Progress
from poisonshield.random import sample_ids

log = logging.getLogger(__name__)


class LearnedConfig(Settings):
    """What every trained poison has."""

    eps: Pixels = Field(
        8 / 255,
        ge=1 / 255,
        le=127 / 255,
        description="largest change of a value, in pixel units: 8/255, not 8; at most 127 levels",
    )


class LearnedPoison(KeyedPoison):
    """delta is a table's row: of the sample's key, or of its class where `grain` is class."""

    norm = "linf"
    grain: ClassVar[Literal["sample", "class"]] = "sample"
    needs_data = True
    config: Any
    table: Tensor
    ids: Tensor

    def __init__(self, config: Any, *, num_classes: int, image_size: tuple[int, int], seed: int) -> None:
        super().__init__(config, num_classes=num_classes, image_size=image_size, seed=seed)
        self.folder: Path | None = None
        self.device = torch.device("cpu")
        self.register_buffer("table", torch.zeros((0, 3, *self.image_size), dtype=torch.int8))  # [N or K, 3, H, W]
        self.register_buffer("ids", torch.zeros(0, dtype=torch.int64))  # [N] rising; of samples alone

    @abstractmethod
    def learn(self, pictures: Pictures, progress: Progress) -> None:
        """Fill `table`, by sample in the order of `pictures` or by class; go on where `progress` says."""

    # What a run gives it

    def work_in(self, folder: Path | None, device: torch.device) -> None:
        """Train on this device, and keep in the folder what it takes to go on after a stop."""
        self.folder, self.device = folder, device

    def finish(self) -> None:
        """Remove what was kept for going on."""
        self._progress(None).remove()
        for file in (self._file("pictures"), self._file("levels")):
            if file is not None:
                file.unlink(missing_ok=True)

    def fit(self, batches: Iterable[Batch]) -> None:
        """Train on all pictures; the same for the same set, in any order and in batches of any size."""
        pictures = collect(map(self.checked, batches), self.device, self.name, self._file("pictures"))
        by_class = self.grain == "class"
        count = self.num_classes if by_class else len(pictures)
        self.table = make_table((count, 3, *self.image_size), torch.int8, self._file("levels"))
        self.ids = torch.zeros(0, dtype=torch.int64) if by_class else pictures.ids
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        else:
            log.info("%s is trained now, for this run alone; `poisonshield poison` writes it once for all", self.name)
        with torch.enable_grad():
            self.learn(pictures, self._progress(pictures))

    def _file(self, what: str) -> Path | None:
        return None if self.folder is None else self.folder / f".{self.name}.{what}.bin"

    def _progress(self, pictures: Pictures | None) -> Progress:
        file = None if self.folder is None else self.folder / f"{self.name}{ENDING}"
        made_by: dict[str, Any] = {"config": self.config.model_dump(mode="json"), "seed": self.seed}
        if pictures is not None:
            data = hashlib.sha256(pictures.ids.numpy().tobytes())
            data.update(pictures.y.numpy().tobytes())
            for rows in pictures.in_turn(1000):
                data.update(pictures.levels[rows].numpy().tobytes())
            made_by |= {"data": data.hexdigest(), "classes": self.num_classes}
        return Progress(file, made_by)

    # What a subclass works with

    @property
    def radius(self) -> int:
        """eps in whole levels, rounded down."""
        return math.floor(self.config.eps * 255 + 1e-6)

    def levels(self, delta: Tensor) -> Tensor:
        """delta in pixel units as whole levels of the table, int8 on the table's device."""
        return (delta * 255).round().clamp(-self.radius, self.radius).to("cpu", torch.int8)

    def of_rows(self, rows: Tensor, y: Tensor) -> Tensor:
        """The table's delta of these rows of the pictures, with labels y, float32 in pixel units, on the device."""
        chosen = self.table[y.to(self.table.device)] if self.grain == "class" else self.table[rows]
        return chosen.to(y.device).float().div_(255)

    # What a poison is

    def budget(self) -> Radius:
        """eps, in l-infinity."""
        return Radius("linf", self.config.eps)

    def draw(self, batch: Labelled) -> Tensor:
        """The rows of the samples, or of the classes; zero for samples that it was not trained on."""
        device = batch.x.device
        self.table, self.ids = (t if t.numel() >= LARGE else t.to(device) for t in (self.table, self.ids))
        if self.grain == "class":
            rows, known = batch.y, torch.ones_like(batch.y, dtype=torch.bool)
        else:
            rows, known = self._find(batch)
        found = self.table[rows.to(self.table.device)].to(device).float()
        limit = self.config.eps * 255  # holds for the table of a recipe from a stranger too
        return torch.where(known[:, None, None, None], found.clamp(-limit, limit) / 255, 0.0)

    def delta(self, batch: Batch) -> Tensor:
        """As every poison's. Raises DataError for a sample that it was not trained on, where each has its own."""
        if not len(self.table):
            raise PoisonShieldError(f"{self.name} is trained on the pictures: call fit(batches) before apply.")
        if self.grain == "sample" and len(batch):
            known = self._find(self.checked(batch))[1]
            if not bool(known.all()):
                key = batch.keys[int((~known).to(torch.uint8).argmax())]
                raise DataError(
                    f"poison {self.name} has a change for each picture that it was trained on, and {key} is "
                    "none of them.\n  Train it on this data with `poisonshield poison`, or take a poison by class."
                )
        return super().delta(batch)

    def _find(self, batch: Labelled) -> tuple[Tensor, Tensor]:
        """Rows of the samples, int64 [B], and whether they are known, bool [B]."""
        wanted = sample_ids(batch.keys)
        ids = self.ids.cpu()
        rows = torch.searchsorted(ids, wanted).clamp_max(max(len(ids) - 1, 0))
        return rows.to(batch.x.device), (ids[rows] == wanted).to(batch.x.device)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *more: Any) -> None:
        """A recipe says how many rows there are."""
        for name in ("table", "ids"):
            found = state_dict.get(prefix + name)
            if found is not None and found.shape[1:] == getattr(self, name).shape[1:]:
                setattr(self, name, torch.zeros_like(found))
        super()._load_from_state_dict(state_dict, prefix, *more)
