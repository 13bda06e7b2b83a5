"""`poisonshield train`; launch/train.py is the same for launchers."""

from typing import Annotated

import typer

from poisonshield.commands.base import TRAINING, Config, Overrides

GROUP = TRAINING


def train(
    config: Config,
    overrides: Overrides = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved settings, and the backend's, then stop.")
    ] = False,
) -> None:
    """Train one experiment: a classifier, words, a small pipeline, or a grid of experiments."""
    from poisonshield import api

    if print_config:
        print(api.resolve_config(config, overrides or []))
    else:
        api.train(config, overrides or [])
