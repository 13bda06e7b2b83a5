"""`poisonshield grid`."""

from typing import Annotated

import typer

from poisonshield.commands.base import TRAINING, GridConfig, GridOverrides

GROUP = TRAINING


def grid(
    config: GridConfig,
    overrides: GridOverrides = None,
    part: Annotated[str, typer.Option(help="Which part of how many, e.g. 2/4: several jobs share a grid.")] = "1/1",
    only_list: Annotated[
        bool, typer.Option("--list", help="Print the table of what is done, and train nothing.")
    ] = False,
) -> None:
    """Many runs from one file: train what is not done yet, and end in one table with seeds and spread."""
    from poisonshield import api

    if not only_list:
        api.train(config, overrides or [], part=part)
    print(api.grid_table(config, overrides or []))
