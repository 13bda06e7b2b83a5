"""The stream beside webdataset and torchvision: shards of JPEG files read, decoded, and cut to one random crop each.

All go through the same tars with equally many workers, three times in a run, which begins when workers start. Theirs is
the usual way of that field: webdataset's shuffle and batches in torch's loader, whose workers stay from epoch to epoch,
torchvision's decoder (or Pillow's, as most have it) and transforms v2 on bytes, then floats. The first case hands out
bytes, and there pixels must be equal; in the second crops are random, so that keys, shapes and the mean of the pixels
are compared.
"""

import importlib.util
import io
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.bench.harness import Case, Provider, Target, WrongResult
from poisonshield.bench.pictures import write_pictures
from poisonshield.bench.session import Session, show
from poisonshield.data import ShardSet, ShardStream
from poisonshield.data.views import Views, ViewsConfig
from poisonshield.errors import DataError

OURS, TORCHVISION, PILLOW = "ours", "webdataset, torchvision v2", "webdataset, Pillow, torchvision v2"
TARGET = 1.2
"""One crop: at least so many times as fast as webdataset with torchvision."""

Reading = Iterator[tuple[tuple[str, ...], Tensor]]
"""Keys and pixels of batches."""

_SIZE, _BATCH, _EPOCHS, _MEAN = 224, 64, 3, 0.05


@dataclass(frozen=True)
class Setting:
    """What is read, and how."""

    source: ShardSet
    workers: int
    batch: int
    size: int
    device: torch.device
    epochs: int = 1

    @property
    def tars(self) -> list[str]:
        """The shards' paths."""
        return sorted(str(p) for p in self.source.folder.glob("*.tar"))


def read_ours(setting: Setting) -> Reading:
    """(keys, bytes [b, 3, H, W]) of all epochs."""
    for batch in _batches(setting, lambda b: b.replace(views=(b.pixels(),))):
        yield batch.keys, batch.all_views()[0]


def crop_ours(setting: Setting) -> Reading:
    """(keys, one view [b, 3, size, size] in [0, 1]) of all epochs."""
    views = Views(ViewsConfig(name="crop_flip", size=setting.size), default="crop_flip", count=1, seed=0)
    for batch in _batches(setting, views):
        yield batch.keys, batch.all_views()[0]


def _batches(setting: Setting, stage: Callable[[Batch], Batch]) -> Iterator[Batch]:
    stream = ShardStream(
        setting.source, batch_size=setting.batch, seed=0, workers=setting.workers, stages=(stage,), keep_bytes=True,
        device=setting.device,
    )  # fmt: skip
    return itertools.islice(iter(stream), setting.epochs * stream.steps_per_epoch)


def read_theirs(
    setting: Setting, decode: Callable[[bytes], Tensor], crop: Callable[[Tensor], Tensor] | None = None
) -> Reading:
    """The same by webdataset: bytes without a crop, pixels in [0, 1] with one."""
    import webdataset as wds
    from torchvision.transforms.v2 import functional as F

    def prepare(sample: dict[str, Any]) -> tuple[str, Tensor, int]:
        x = decode(sample["jpg"])
        return sample["__key__"], x if crop is None else crop(x), int(sample["cls"])

    samples = wds.WebDataset(setting.tars, shardshuffle=len(setting.tars), empty_check=False)
    batches = samples.shuffle(500).map(prepare).batched(setting.batch)
    loader = wds.WebLoader(batches, batch_size=None, num_workers=setting.workers, persistent_workers=True)
    for _ in range(setting.epochs):
        for keys, x, _ in loader:
            x = x.to(setting.device)
            yield tuple(keys), x if crop is None else F.to_dtype(x, torch.float32, scale=True)


def decode_torchvision(data: bytes) -> Tensor:
    """uint8 [3, H, W]."""
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


def decode_pillow(data: bytes) -> Tensor:
    """uint8 [3, H, W]."""
    from PIL import Image
    from torchvision.transforms.v2 import functional as F

    return F.to_image(Image.open(io.BytesIO(data), formats=["JPEG"]).convert("RGB"))


def cases(setting: Setting) -> list[Case]:
    """Reading and decoding; the same with one random crop."""
    height, width = setting.source.read(torch.arange(1)).shape[2:]
    missing = "" if importlib.util.find_spec("webdataset") else "webdataset is not installed"
    shape, items = (len(setting.source), 3, height, width), setting.epochs * len(setting.source)
    workers = f"batch {setting.batch}, {setting.workers} workers"

    def make(name: str) -> Case:
        return Case(f"{name}, {workers}", shape, 0, TORCHVISION, dtype="uint8", items=items, counted=False)

    read, crop = make("read and decode JPEG"), make(f"one crop of {setting.size} px")
    crop.targets = [Target(OURS, TORCHVISION, TARGET)]

    once = replace(setting, epochs=1)

    def add(case: Case, name: str, read_all: Callable[[Setting], Reading]) -> None:
        check = partial(check_bytes if case is read else check_crops, once, partial(read_all, once))
        run = None if missing and name != OURS else partial(_go, partial(read_all, setting))
        case.providers.append(Provider(name, run, check, missing))

    add(read, OURS, read_ours)
    add(crop, OURS, crop_ours)
    for name, decode in ((TORCHVISION, decode_torchvision), (PILLOW, decode_pillow)):
        add(read, name, partial(read_theirs, decode=decode))
        add(crop, name, partial(read_theirs, decode=decode, crop=_crop(setting.size)))
    return [read, crop]


def _crop(size: int) -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import v2

    return v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])


def _go(run: Callable[[], Iterator[Any]]) -> None:
    for _ in run():
        pass


def check_bytes(setting: Setting, run: Callable[[], Reading]) -> str:
    """Each sample once, with the pixels that the source has."""
    number = {key: i for i, key in enumerate(setting.source.keys)}
    seen: list[str] = []
    far = 0
    for keys, x in run():
        wanted = setting.source.read(torch.tensor([number[k] for k in keys]))
        far = max(far, int((x.cpu().int() - wanted.int()).abs().max()))
        seen += keys
    _check_keys(setting, seen)
    if far > 2:  # two builds of libjpeg may round apart
        raise WrongResult(f"decoded pixels differ by {far} of 255.")
    return f"pixels differ by {far} of 255 at most"


def check_crops(setting: Setting, run: Callable[[], Reading]) -> str:
    """Each sample once, crops of the size in [0, 1], as bright as the pictures on average."""
    seen: list[str] = []
    means = []
    for keys, x in run():
        if x.shape[1:] != (3, setting.size, setting.size) or x.dtype != torch.float32 or x.min() < 0 or x.max() > 1:
            raise WrongResult(f"crops are {x.dtype} {tuple(x.shape)} from {float(x.min()):g} to {float(x.max()):g}.")
        means.append(float(x.mean()))
        seen += keys
    _check_keys(setting, seen)
    some = setting.source.read(torch.arange(min(64, len(setting.source)))).float().mean() / 255
    found = sum(means) / len(means)
    if abs(found - float(some)) > _MEAN:
        raise WrongResult(f"crops have a mean of {found:.3f}, the pictures {float(some):.3f}.")
    return f"mean {found:.3f}"


def _check_keys(setting: Setting, seen: list[str]) -> None:
    if sorted(seen) != sorted(setting.source.keys):
        raise WrongResult(f"{len(set(seen))} samples of {len(setting.source)} came, {len(seen)} in all.")


def free_cores(workers: int) -> int:
    """How many threads torch may take beside workers that decode without a pause, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) - workers) if hasattr(os, "sched_getaffinity") else 1


def bench(session: Session, *, workers: int = 2, data: Path | None = None, side: int = 400, count: int = 768) -> None:
    """Time the stream. data: a folder of plain shards of JPEG files of one size; else `count` pictures are made.

    Raises DataError for a folder with other files, WrongResult if somebody reads something else.
    """
    folder = Path(tempfile.mkdtemp(prefix="bench-stream-"))
    try:
        if data is None:
            count, side = (24, 48) if session.quick else (count, side)
            write_pictures(folder / "set", count=count, side=side)
        source = ShardSet.open(data or folder / "set")
        if any(source.extension(i) == "png" for i in range(len(source))) or source.image_size is None:
            raise DataError(f"{source.folder} holds other files than JPEG of one size. Import it with --jpeg-quality.")
        batch, size, epochs = (8, 32, 1) if session.quick else (_BATCH, _SIZE, _EPOCHS)
        for case in cases(Setting(source, workers, batch, size, session.device, epochs)):
            show(case, session.time(case))
    finally:
        shutil.rmtree(folder)
