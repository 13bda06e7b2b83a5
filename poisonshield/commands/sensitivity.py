"""`poisonshield sensitivity`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from poisonshield.commands.base import WORDS, Device, Embedding, Images, Masks, Model, Out, Prompt, Seed, Size

GROUP = WORDS


def sensitivity(
    images: Images,
    embedding: Embedding,
    out: Out,
    model: Model = "tiny",
    reference: Annotated[Path | None, typer.Option(help="Folder of the same pictures clean, by file name.")] = None,
    masks: Masks = None,
    against: Annotated[str | None, typer.Option(help="Embedding file or word, for delta and signed.")] = None,
    mode: Annotated[str, typer.Option(help="loss_grad, pred_jac, input_sal, delta or signed.")] = "loss_grad",
    timestep: Annotated[list[int] | None, typer.Option(help="May be given several times.")] = None,
    prompt: Prompt = "a photo of a {}",
    probes: Annotated[int, typer.Option(min=1, help="Random directions of the word's vectors.")] = 64,
    exact: Annotated[bool, typer.Option("--exact", help="All directions instead of random ones.")] = False,
    noises: Annotated[int, typer.Option(min=1, help="Draws of the noise.")] = 8,
    norm: Annotated[str, typer.Option(help="Scale of the drawing: joint, self or sum1.")] = "joint",
    size: Size = None,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Where a learned word looks in pictures, by timestep: maps, totals and the concept's share."""
    from poisonshield.api.sensitivity import TIMESTEPS
    from poisonshield.api.sensitivity import sensitivity as run

    words: dict[str, Any] = {"mode": mode, "norm": norm}  # which ones there are is checked there
    run(model, images, embedding, out, reference=reference, masks=masks, against=against, **words,
        timesteps=timestep or TIMESTEPS, prompt=prompt, probes=probes, exact=exact, noises=noises, size=size,
        device=device, seed=seed)  # fmt: skip
    print(out)
