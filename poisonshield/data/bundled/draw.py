"""Draws cifar10-mini again: `python -m poisonshield.data.bundled.draw SRC OUT --seed 0` (SRC: CIFAR-10 as tar shards).

Takes the same number of images of each class, chosen by Philox words of (seed, key), so the draw is the same on every
machine. Image files are copied as they are. Shards are compressed: the JPEG headers of 6,000 tiny files are all alike.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import torch

from poisonshield.data.manifest import FILE_NAME, Manifest
from poisonshield.data.tars import read_tar
from poisonshield.data.writer import ShardWriter
from poisonshield.errors import DataError
from poisonshield.random import philox_words, sample_ids, stream_of

COUNTS = {"train": 5000, "test": 1000}
PROVENANCE = (
    "{count} of the {total} {split} images of CIFAR-10 (Krizhevsky 2009, Learning multiple layers of features from "
    "tiny images), {each} of each of {classes} classes, drawn with seed {seed} by poisonshield.data.bundled.draw. The "
    "files are JPEG copies, of quality about 75, of the official pixels: near them, not equal. The number in a key "
    "is the position in the source shards."
)


def draw_split(source: Path, out: Path, *, split: str, count: int, seed: int) -> Manifest:
    """Write `count` class-balanced images of one split to `out`. Raises DataError if a class has too few."""
    classes = json.loads((source / FILE_NAME).read_text())["classes"]
    paths = sorted(source.glob(f"*-{split}-*.tar*"))
    samples = [s for p in paths for s in read_tar(p, left_out=Counter())]
    keys = [f"{split}-{key}" for key, *_ in samples]
    labels = torch.tensor([int(label or b"") for *_, label in samples])
    order = philox_words(1, seed=seed, ids=sample_ids(keys), stream=stream_of("draw"))[:, 0].sort(stable=True).indices
    each = count // len(classes)
    chosen = torch.cat([order[labels[order] == c][:each] for c in range(len(classes))]).sort().values.tolist()
    if len(chosen) != each * len(classes):
        raise DataError(f"{source} has fewer than {each} {split} images in some class; draw a smaller number.")
    words = {"count": f"{len(chosen):,}", "total": f"{len(samples):,}", "split": split, "each": each, "seed": seed}
    words["classes"] = len(classes)
    with ShardWriter(
        out,
        classes=classes,
        image_size=(32, 32),
        provenance=PROVENANCE.format(**words),
        overwrite=True,
        compress=True,
    ) as writer:
        for i in chosen:
            writer.write_encoded(keys[i], samples[i][2], samples[i][1], int(labels[i]))
    return Manifest.load(out)


def main() -> None:
    """Draw both splits and print what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for split, count in COUNTS.items():
        manifest = draw_split(args.source, args.out / split, split=split, count=count, seed=args.seed)
        size = sum(s.bytes for s in manifest.shards.values())
        print(f"{args.out / split}: {manifest.samples} images, {size:,} bytes, digest {manifest.digest[:12]}")


if __name__ == "__main__":
    main()
