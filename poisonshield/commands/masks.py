"""`poisonshield masks`."""

from pathlib import Path
from typing import Annotated

import typer

from poisonshield.commands.base import PHOTOS, OptionalModel, Out, Overwrite, Seed

GROUP = PHOTOS


def masks(
    photos: Annotated[Path, typer.Argument(help="A folder of photos, or a folder with one of each concept.")],
    out: Out,
    mask: Annotated[
        str, typer.Option(help="grabcut, box, attention, ssm or your own; with settings as in box:side=0.5.")
    ] = "grabcut",
    side: Annotated[
        float | None, typer.Option(help="Side of the centred rectangle of box and grabcut, a share of the photo's.")
    ] = None,
    model: OptionalModel = None,
    word: Annotated[
        list[str] | None, typer.Option(help="What attention and ssm look for, or CONCEPT=WORD; repeatable.")
    ] = None,
    purifier: Annotated[
        str, typer.Option(help="Masks are found on pixels purified by it; none for as they are.")
    ] = "jpeg:25",
    size: Annotated[int, typer.Option(min=8, help="Pixels of the longer side on which masks are found.")] = 512,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Masks of photos as files, to look at and correct before training; status 1 if one came out empty."""
    from poisonshield.api.masks import describe
    from poisonshield.api.masks import masks as run

    found = run(photos, out, mask=mask, side=side, model=model, words=word or [], size=size, seed=seed,
                overwrite=overwrite, purifier=None if purifier == "none" else purifier)  # fmt: skip
    print("\n".join(describe(found)))
    if found.empty:
        raise typer.Exit(1)
