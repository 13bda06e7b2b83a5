"""`poisonshield protect`."""

from pathlib import Path
from typing import Annotated

import typer

from poisonshield.commands.base import PHOTOS, Device, Dtype, Model, Out, Overwrite, Seed

GROUP = PHOTOS


def protect(
    images: Annotated[list[Path], typer.Argument(help="JPEG, PNG or WebP files, or folders of them.")],
    out: Out,
    method: Annotated[
        str | None, typer.Option(help="e.g. advdm, advdm-, sds-, mist-joint, pid, aspl, adaptive-szt; advdm if none.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Settings of published code, e.g. mist or anti-dreambooth.")
    ] = None,
    eps_levels: Annotated[float | None, typer.Option(help="Radius in 8-bit levels; 8, or the preset's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps on pixels; the method's own if none.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What a victim would write.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, e.g. t_range=[500,1000].")
    ] = None,
    model: Model = "tiny",
    dtype: Dtype = "fp32",
    device: Device = "auto",
    seed: Seed = 0,
    mask: Annotated[Path | None, typer.Option(help="A mask file, or a folder with one of each stem.")] = None,
    target: Annotated[Path | None, typer.Option(help="A picture to pull towards; a pattern if none.")] = None,
    reference: Annotated[
        list[Path] | None, typer.Option(help="Pictures that fsmg or aspl learn the subject from.")
    ] = None,
    class_images: Annotated[
        list[Path] | None, typer.Option(help="Other pictures of the class, for prior_weight.")
    ] = None,
    tile: Annotated[int, typer.Option(help="Larger sides are attacked in tiles of this side; 0 for never.")] = 512,
    micro_batch: Annotated[int, typer.Option(help="Pictures of one size that are computed together.")] = 1,
    measure: Annotated[bool, typer.Option("--measure", help="Also measure the objective before and after.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Poison photographs against a diffusion model: PNG of the same size, budget checked on the file, a manifest."""
    from poisonshield.api.protect import TINY_NOTE
    from poisonshield.api.protect import protect as run

    if model == "tiny":
        print(TINY_NOTE)
    run(
        images, out, method=method, preset=preset, eps_levels=eps_levels, steps=steps, prompt=prompt,
        settings=setting or [], model=model, dtype=dtype, device=device, seed=seed, mask=mask, target=target,
        reference=reference or [], class_images=class_images or [], tile=tile, micro_batch=micro_batch,
        measure=measure, overwrite=overwrite, say=print,
    )  # fmt: skip
