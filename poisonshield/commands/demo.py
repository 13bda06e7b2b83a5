"""`poisonshield demo`."""

from pathlib import Path
from typing import Annotated

import typer

from poisonshield.commands.base import TRAINING, Seed

GROUP = TRAINING


def demo(
    which: Annotated[str, typer.Argument(help="vespr, szt, or both.")] = "both",
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for runs, pictures and reports.")] = Path(
        "poisonshield-demo"
    ),
    seed: Seed = 0,
) -> None:
    """What poisons do and what training brings back: classifiers and VESPR (vespr), learned words and SZT (szt).

    Runs on bundled images and the shipped pipeline, in minutes on a CPU.
    """
    from rich.table import Table

    from poisonshield.api import demo as vespr
    from poisonshield.api import demo_szt as szt
    from poisonshield.terminal import Console

    demos = {"vespr": vespr.demo, "szt": szt.demo}
    if which not in (*demos, "both"):
        raise typer.BadParameter(f"{which!r} is none of vespr, szt, both.")
    for name, run in demos.items():
        if which in (name, "both"):
            shown = run(out / name, seed)
            table = Table(title=shown.title)
            for i, column in enumerate(shown.head):
                table.add_column(column, justify="right" if i else "left")
            for title, cells in zip(shown.titles, shown.cells, strict=True):
                table.add_row(title, *cells)
            console = Console()
            console.print(table)
            console.print(shown.summary)
            console.print(f"{shown.minutes:.1f} minutes. Report: {shown.report}   Figure: {shown.figure}")
