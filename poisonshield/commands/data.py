"""`poisonshield data import` and `poisonshield data verify`."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from poisonshield.data.manifest import FILE_NAME, Manifest
from poisonshield.errors import DataError


def import_data(
    src: str | Path,
    out: str | Path,
    *,
    size: int | None = None,
    jpeg_quality: int | None = None,
    class_list: str | Path | None = None,
    pattern: str = "*",
    skip_broken: bool = False,
    overwrite: bool = False,
    samples_per_shard: int = 5000,
) -> dict[str, Manifest]:
    """Bring images into `out` and print what was written. See data.importer.import_data for the arguments."""
    from poisonshield.data import importer

    manifests = importer.import_data(
        src,
        out,
        size=size,
        jpeg_quality=jpeg_quality,
        class_list=class_list,
        pattern=pattern,
        skip_broken=skip_broken,
        overwrite=overwrite,
        samples_per_shard=samples_per_shard,
    )
    table = Table("data set", "samples", "classes", "pixels", "shards", "MB", "digest")
    for split, m in manifests.items():
        pixels = f"{m.image_size[0]}x{m.image_size[1]}" if m.image_size else "differ"
        megabytes = sum(s.bytes for s in m.shards.values()) / 1e6
        table.add_row(
            escape(str(Path(out) / split)),
            f"{m.samples:,}",
            str(len(m.classes)),
            pixels,
            str(len(m.shards)),
            f"{megabytes:.1f}",
            m.digest[:12],
        )
    Console().print(table)
    if any(m.image_size is None for m in manifests.values()):
        Console().print("Image sizes differ. Training needs one size: import again with --size, e.g. --size 224.")
    return manifests


def verify(folder: str | Path) -> int:
    """Check every byte and every image of a data set, or of the data sets in its subfolders; print all problems.

    Returns how many there are. Raises DataError if the folder holds no data set.
    """
    from poisonshield.data.check import problems

    root = Path(folder)
    folders = [root] if (root / FILE_NAME).exists() else sorted(p.parent for p in root.glob(f"*/{FILE_NAME}"))
    if not folders:
        raise DataError(
            f"{folder} has no {FILE_NAME}, nor has a folder in it, so there is no data set to verify.\n"
            f"  Make one: poisonshield data import SRC --out {folder}"
        )
    count = 0
    for place in folders:
        found = problems(place)
        count += len(found)
        for problem in found:
            Console().print(problem, style="red", markup=False, highlight=False, soft_wrap=True)
        if not found:
            m = Manifest.load(place)
            marked = f", poisoned by {m.poison.get('name', 'an unnamed poison')}" if m.poison else ""
            sound = f"{place}: {m.samples:,} samples in {len(m.shards)} shards are sound{marked}."
            Console().print(sound, markup=False, soft_wrap=True)
    if count:
        Console().print(f"{count} problems", style="bold red")
    return count
