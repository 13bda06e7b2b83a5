"""`poisonshield names`."""

from typing import Annotated

import typer

from poisonshield.commands.base import MACHINE

GROUP = MACHINE


def names(
    kind: Annotated[
        str | None, typer.Argument(help="Such as poisons, diffusion-poisons, defenses, methods; all if not given.")
    ] = None,
) -> None:
    """What may be named in a config or an option: Markdown tables of poisons, defenses, methods and the rest."""
    from poisonshield.api.names import KINDS, draw_table

    print("\n\n".join(draw_table(k) for k in (KINDS if kind is None else [kind])))
