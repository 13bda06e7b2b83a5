"""Pictures for benchmarks: as smooth and as grainy as photographs, roughly, and as large as JPEG files of them."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from poisonshield.data.decode import encode_jpeg
from poisonshield.data.writer import ShardWriter

_DISTINCT = 32


def make_picture(seed: int, side: int) -> Tensor:
    """uint8 [3, side, side]: noise of many scales, the finer the fainter."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(1, 3, side, side)
    scale = 2
    while scale < 2 * side:
        grain = torch.randn(1, 3, scale, scale, generator=generator)
        x += F.interpolate(grain, (side, side), mode="bicubic", align_corners=False) / scale**0.75
        scale *= 2
    x = (x - x.mean()) / x.std()
    return (x[0] * 0.22 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)


def write_pictures(folder: Path, *, count: int, side: int, quality: int = 90) -> None:
    """A data set of `count` JPEG files in four shards; every 32 of them repeat, under other keys."""
    files = [encode_jpeg(make_picture(i, side), quality=quality) for i in range(min(count, _DISTINCT))]
    with ShardWriter(
        folder, classes=["even", "odd"], image_size=(side, side), samples_per_shard=-(-count // 4)
    ) as writer:
        for i in range(count):
            writer.write_encoded(f"p{i:05d}", files[i % _DISTINCT], "jpg", i % 2)
