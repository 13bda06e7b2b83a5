"""`poisonshield survival`."""

from pathlib import Path
from typing import Annotated

import typer

from poisonshield.commands.base import PHOTOS, OptionalModel, Seed

GROUP = PHOTOS


def survival(
    clean: Annotated[Path, typer.Argument(help="Folder of the pictures as they were.")],
    poisoned: Annotated[list[Path], typer.Argument(help="Folders of the same pictures poisoned, by stem.")],
    purifier: Annotated[
        list[str] | None,
        typer.Option(help="e.g. jpeg:75, gaussian:2, sdedit:0.3,steps=50; repeatable; a standard list if none."),
    ] = None,
    model: OptionalModel = None,
    bands: Annotated[int, typer.Option(min=1, help="Parts of the frequencies up to half a cycle a pixel.")] = 4,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Also write every picture's numbers to this JSON file.")
    ] = None,
) -> None:
    """What purifiers leave of poisons, in all and by frequency, and what they cost clean pictures."""
    from poisonshield.api.survival import describe
    from poisonshield.api.survival import survival as run

    print(describe(run(clean, poisoned, purifiers=purifier or [], model=model, bands=bands, seed=seed, out=out)))
