"""From samples to shards: images prepared in threads, broken ones named, all splits written or none."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from poisonshield.data.decode import load_codecs
from poisonshield.data.images import Encoded, Preparation
from poisonshield.data.summary import Summary
from poisonshield.data.writer import ShardWriter
from poisonshield.errors import DataError
from poisonshield.plain import plain

MAX_MEMBER_MIB = 256
"""Of one file of a tar, or one image file, before it is read."""

CHUNK_SAMPLES, CHUNK_BYTES = 64, 2**28
"""How much is read ahead of the threads, whichever is reached first."""

Item = tuple[str, bytes | Tensor, int]
"""Key, image as a file's bytes or as uint8 [3, H, W], label."""


@dataclass(frozen=True)
class Settings:
    """How images are stored. skip_broken: leave out what cannot be decoded and list it in the provenance, instead of
    refusing the import. max_member: bytes of one file of a tar."""

    preparation: Preparation = field(default_factory=Preparation)
    skip_broken: bool = False
    overwrite: bool = False
    samples_per_shard: int = 5000
    max_member: int = MAX_MEMBER_MIB * 2**20


def write_split(
    samples: Iterable[Item],
    out: Path,
    settings: Settings,
    writers: ExitStack,
    *,
    classes: Iterable[str],
    note: str,
    summary: Summary,
    poison: dict[str, Any] | None = None,
    left_out: Counter[str] | None = None,
) -> None:
    """Prepare all samples, in threads and in order, and write them. They appear when `writers` closes without error.

    note, left_out: for the provenance; left_out may grow while samples are drawn. Raises DataError naming the broken
    images, up to 20, if they are not to be skipped, or if no image came at all.
    """
    prepare, broken, sizes = settings.preparation, [], set()
    names = tuple(classes)
    counts = Counter(dict.fromkeys(range(len(names)), 0))

    def ready(sample: Item) -> Encoded | DataError:
        key, image, _ = sample
        name = f"sample {plain(key)}"
        try:
            return prepare(image, name=name) if isinstance(image, bytes) else prepare.pixels(image, name=name)
        except DataError as err:
            return err

    writer = writers.enter_context(
        ShardWriter(
            out,
            classes=names,
            image_size=None,
            samples_per_shard=settings.samples_per_shard,
            poison=poison,
            overwrite=settings.overwrite,
        )
    )
    load_codecs()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for chunk in _chunks(samples):
            for (key, _, label), image in zip(chunk, pool.map(ready, chunk), strict=True):
                if isinstance(image, DataError):
                    broken.append((key, str(image).splitlines()[0]))
                else:
                    sizes.add(image.size)
                    counts[label] += 1
                    writer.write_encoded(key, image.data, image.extension, label)
    if broken and not settings.skip_broken:
        raise _broken(broken)
    for key, _ in broken:
        summary.leave_out("broken images", key)
    if not sizes:
        what = "; ".join([f"no image came {note}", *_omissions(broken, left_out)])
        raise DataError(f"{plain(what)}.\n  Nothing was imported. Look at what the source holds.")
    writer.image_size = next(iter(sizes)) if len(sizes) == 1 else None
    writer.provenance = "; ".join([note, prepare.describe(), *_omissions(broken, left_out)])
    summary.take("images", counts.total())
    split = out.name if out.name in ("train", "test") else ""
    summary.classes[split] = {name: counts[number] for number, name in enumerate(names)}


def _omissions(broken: list[tuple[str, str]], left_out: Counter[str] | None) -> Iterator[str]:
    if left_out:
        yield "left out: " + ", ".join(f"{n} {what}" for what, n in sorted(left_out.items()))
    if broken:
        yield f"{len(broken)} broken images left out: " + ", ".join(key for key, _ in broken)


def _broken(broken: list[tuple[str, str]]) -> DataError:
    lines = [f"  {line}" for _, line in broken[:20]]
    if len(broken) > 20:
        lines.append(f"  ... and {len(broken) - 20} more")
    return DataError(
        "\n".join([f"{len(broken)} images cannot be decoded, so nothing was imported:", *lines])
        + "\n  Restore them, or import with --skip-broken to go on without them."
    )


def _chunks(samples: Iterable[Item]) -> Iterator[list[Item]]:
    chunk: list[Item] = []
    held = 0
    for sample in samples:
        chunk.append(sample)
        held += len(sample[1]) if isinstance(sample[1], bytes) else sample[1].numel()
        if len(chunk) == CHUNK_SAMPLES or held >= CHUNK_BYTES:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk
