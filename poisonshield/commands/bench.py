"""`poisonshield bench`: times of parts of the package beside other libraries."""

from pathlib import Path
from typing import Annotated

import typer

from poisonshield.commands.base import MACHINE, Model

GROUP = MACHINE
app = typer.Typer(no_args_is_help=True, help="Time parts of the package beside other libraries.")

Rounds = Annotated[int, typer.Option(min=1, help="Runs of each, interleaved.")]
Quick = Annotated[bool, typer.Option(help="As small as can be: does it work, not how fast.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch on the CPU.")]
Csv = Annotated[Path | None, typer.Option("-o", "--out", help="Also add rows to this CSV.")]


@app.command("ops")
def ops(
    op: Annotated[list[str] | None, typer.Option(help="jpeg, pgd or diffusion; all if not given.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="CSV that rows are added to.")] = Path("bench.csv"),
    plot: Annotated[Path | None, typer.Option(help="Also draw the medians into this PNG.")] = None,
    rounds: Rounds = 15,
    quick: Quick = False,
    threads: Threads = None,
) -> None:
    """Differentiable JPEG, PGD step and diffusion loss beside kornia, torchattacks, diffusers and torch.compile."""
    from poisonshield.bench import bench as run

    run(op or [], out, plot, rounds, quick, threads)


@app.command("vespr")
def vespr(
    out: Csv = None,
    rounds: Rounds = 15,
    steps: Annotated[int, typer.Option(min=0, help="Steps of the attack.")] = 10,
    quick: Quick = False,
    threads: Threads = None,
) -> None:
    """One joint training step on the CPU beside the VESPR authors' way of taking it, checked to be the same step."""
    from poisonshield.bench.vespr import bench as run

    run(out, rounds, quick, steps, threads)


@app.command("invert")
def invert(
    model: Model = "tiny", out: Csv = None, rounds: Rounds = 15, quick: Quick = False, threads: Threads = None
) -> None:
    """A step of textual inversion with kept latents beside latents made anew, and of eight concepts beside one."""
    from poisonshield.bench.inversion import bench as run

    run(out, rounds, quick, threads, model)
