"""`poisonshield evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from poisonshield.commands.base import TRAINING, FinishedOverrides

GROUP = TRAINING


def evaluate(
    run_folder: Annotated[Path, typer.Argument(help="The run.dir of a finished run.")],
    overrides: FinishedOverrides = None,
    legacy: Annotated[
        bool, typer.Option("--legacy", help="Sample as VESPR's authors do; the same as evaluate.legacy=true.")
    ] = False,
) -> None:
    """A finished run's numbers: accuracy and probes on clean test images, or each learned word's pictures."""
    from poisonshield.runs import read_finished

    run = read_finished(run_folder, [*(overrides or []), *(["evaluate.legacy=true"] if legacy else [])])
    print(run.describe(run.evaluate()))
