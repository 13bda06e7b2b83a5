"""What commands share: the options that many of them have, under one name and with one meaning."""

from pathlib import Path
from typing import Annotated

import typer

TRAINING, DATA, PHOTOS, WORDS, MACHINE = (
    "Train and measure",
    "Data and poisons",
    "Photos",
    "Learned words",
    "This machine",
)
"""The groups of `poisonshield --help`."""


def complete_config(beginning: str) -> list[str]:
    """Names of shipped configs that begin so, for the shell."""
    from poisonshield.config.shipped import shipped_configs

    return [name for name in shipped_configs() if name.startswith(beginning)]


Config = Annotated[
    str,
    typer.Argument(
        help="A YAML file, or the name of a shipped one, such as defend/vespr_cifar10_mini.",
        autocompletion=complete_config,
    ),
]
GridConfig = Annotated[
    str,
    typer.Argument(
        help="A YAML file with `blocks:`, or the name of a shipped one, such as grid/vespr_cifar10_mini.",
        autocompletion=complete_config,
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. seed=1 defenses.0.eps=8/255")
]
GridOverrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. seeds=[0,1] dir=runs/mine")
]
FinishedOverrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. evaluate.robust=null engine.device=cpu")
]
Out = Annotated[Path, typer.Option("-o", "--out", help="Where the results go.")]
Model = Annotated[str, typer.Option(help="A Stable Diffusion folder, or tiny for the shipped pipeline.")]
OptionalModel = Annotated[
    str | None, typer.Option("--model", help="A Stable Diffusion folder, or tiny, where one is needed.")
]
Device = Annotated[str, typer.Option(help="auto takes a GPU where there is one; cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="Of the networks: fp32, bf16 or fp16.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of all draws.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what was made before.")]
Embedding = Annotated[Path, typer.Option(help="The learned word's file.")]
Masks = Annotated[Path | None, typer.Option(help="Folder of masks by file name.")]
Prompt = Annotated[str, typer.Option(help="{} stands for the learned word.")]
Size = Annotated[int | None, typer.Option(help="Pixels a side; the pipeline's own if not given.")]
Images = Annotated[list[Path], typer.Argument(help="Picture files, or one folder of them.")]
