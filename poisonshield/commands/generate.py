"""`poisonshield generate`."""

from typing import Annotated

import typer

from poisonshield.commands.base import WORDS, Device, Dtype, Model, Out, Overwrite, Seed, Size

GROUP = WORDS


def generate(
    out: Out,
    model: Model = "tiny",
    embedding: Annotated[
        list[str] | None, typer.Option(help="FILE of a learned word, or WORD=FILE to call it otherwise; repeatable.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="{} stands for each word in turn; repeatable.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="DDIM steps.")] = 50,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 7.5,
    seed: Seed = 42,
    switch: Annotated[
        int | None, typer.Option(help="Below this timestep, --switch-word speaks in place of learned words.")
    ] = None,
    switch_word: Annotated[str | None, typer.Option(help="E.g. the word that learning started from.")] = None,
    size: Size = None,
    dtype: Dtype = "fp32",
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Draw pictures of learned words, or of any prompt, with noise that all words share."""
    from poisonshield.api.generate import generate as run

    run(model, out, embeddings=embedding or [], prompts=prompt or ["a photo of a {}"], count=count, steps=steps,
        guidance=guidance, seed=seed, switch=switch, switch_word=switch_word, size=size, dtype=dtype, device=device,
        overwrite=overwrite)  # fmt: skip
    print(out / "sheet.png")
