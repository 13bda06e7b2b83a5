"""`poisonshield convert`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from poisonshield.commands.base import WORDS, Out

GROUP = WORDS


def convert(
    embedding: Annotated[Path, typer.Argument(help="The file of a learned word: .safetensors, .pt or .bin.")],
    out: Out,
    form: Annotated[str, typer.Option(help="diffusers or kohya (.safetensors), or a1111 (.pt).")] = "diffusers",
    token: Annotated[
        str | None, typer.Option(help="What to call the word, or which one of several; the file's own if none.")
    ] = None,
) -> None:
    """Write a learned word in the form that another tool reads; a file that exists is kept."""
    from poisonshield.api.convert import convert as run

    words: dict[str, Any] = {"form": form}  # which ones there are is checked there
    learned = run(embedding, out, token=token, **words)
    print(f"{out}  {learned.token}, {len(learned.vectors)} vectors of {learned.vectors.shape[1]}")
