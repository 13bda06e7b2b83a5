"""`poisonshield profile`."""

from typing import Annotated

import typer

from poisonshield.commands.base import WORDS, Device, Embedding, Images, Masks, Model, Out, Prompt, Seed, Size

GROUP = WORDS


def profile(
    images: Images,
    embedding: Embedding,
    out: Out,
    model: Model = "tiny",
    reference: Annotated[
        str | None, typer.Option(help="Folder of the same pictures clean, or a purifier such as jpeg:25.")
    ] = None,
    masks: Masks = None,
    prompt: Prompt = "a photo of a {}",
    bins: Annotated[int, typer.Option(min=1, help="Parts of the timesteps.")] = 20,
    noises: Annotated[int, typer.Option(min=2, help="Draws of timestep and noise per picture and bin.")] = 16,
    size: Size = None,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """At which timesteps a word is learned and a poison bends its gradient, and the first timestep to train from."""
    from poisonshield.api.profile import profile as run

    record = run(model, images, embedding, out, reference=reference, masks=masks, prompt=prompt, bins=bins,
                 noises=noises, size=size, device=device, seed=seed)  # fmt: skip
    print(out if record["t_min"] is None else f"{out}  t_min {record['t_min']}")
