"""`poisonshield data import`, `data verify` and `data audit-epoch`."""

from pathlib import Path
from typing import Annotated

import typer

from poisonshield.commands.base import DATA, FinishedOverrides, Out, Overwrite

GROUP = DATA
app = typer.Typer(no_args_is_help=True, help="Import and check data sets (tar shards with a manifest).")


@app.command("import")
def import_data(
    src: Annotated[Path, typer.Argument(help="Class folders, one folder of images, tar shards, or CIFAR.")],
    out: Out,
    size: Annotated[
        int | None, typer.Option(help="Resize the shorter side and centre-crop to this many pixels.")
    ] = None,
    class_list: Annotated[
        Path | None, typer.Option(help="File with one class folder a line, then its name: order and subset.")
    ] = None,
    pattern: Annotated[str, typer.Option(help="Which tars, as a file name pattern.")] = "*",
    image: Annotated[str | None, typer.Option(help="Which field of tars is the image, e.g. input.jpg.")] = None,
    label: Annotated[
        str | None, typer.Option(help="Which is the label, e.g. cls, txt, json.label; folder; none for no labels.")
    ] = None,
    jpeg_quality: Annotated[int | None, typer.Option(help="Write resized images as JPEG instead of PNG.")] = None,
    samples_per_shard: Annotated[int, typer.Option(help="Images in one tar.")] = 5000,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Drop images that do not decode, and list them in the manifest.")
    ] = False,
    max_member_mib: Annotated[int, typer.Option(help="The largest image file that is read.")] = 256,
    max_megapixels: Annotated[
        float | None, typer.Option(help="The largest image that is decoded; 134 if not given, and no more than that.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn images into a data set of tar shards. Says what was read, left out and decided."""
    from rich.markup import escape
    from rich.table import Table

    from poisonshield.data import importer
    from poisonshield.data.pictures import MAX_PIXELS
    from poisonshield.data.summary import Summary
    from poisonshield.terminal import Console

    summary = Summary(str(src))
    manifests = importer.import_data(
        src,
        out,
        size=size,
        jpeg_quality=jpeg_quality,
        class_list=class_list,
        pattern=pattern,
        image=image,
        label=label,
        skip_broken=skip_broken,
        overwrite=overwrite,
        samples_per_shard=samples_per_shard,
        max_member_mib=max_member_mib,
        max_pixels=MAX_PIXELS if max_megapixels is None else round(max_megapixels * 1e6),
        summary=summary,
    )
    for line in summary.lines():
        Console().print(line, markup=False, highlight=False, soft_wrap=True)
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


@app.command("verify")
def verify(folder: Annotated[Path, typer.Argument(help="A data set, or a folder with train/ and test/.")]) -> None:
    """Check hashes and decode every sample; lists every problem, and ends with status 1 if there is one."""
    from poisonshield.data.check import problems
    from poisonshield.data.manifest import FILE_NAME, Manifest
    from poisonshield.errors import DataError
    from poisonshield.terminal import Console

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
        raise typer.Exit(1)


@app.command("audit-epoch")
def audit_epoch(
    run_folder: Annotated[Path, typer.Argument(help="The run.dir of a run on images, finished or not.")],
    overrides: FinishedOverrides = None,
) -> None:
    """Prove from a run's folder that each epoch trained on every sample once; ends with status 1 if one did not."""
    from poisonshield.runs import read_finished
    from poisonshield.terminal import Console

    findings = read_finished(run_folder, overrides or []).audit()
    for finding in findings:
        style = None if finding.sound else "red"
        Console().print(finding.text, style=style, markup=False, highlight=False, soft_wrap=True)
    if wrong := sum(not finding.sound for finding in findings):
        Console().print(f"{wrong} of {len(findings)} epochs did not train on each sample once", style="bold red")
        raise typer.Exit(1)
