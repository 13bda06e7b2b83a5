"""`poisonshield bench`: times of parts of the package beside other libraries."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from poisonshield.commands.base import MACHINE, Device, Model

if TYPE_CHECKING:
    from poisonshield.bench.session import Session

GROUP = MACHINE
app = typer.Typer(
    no_args_is_help=True,
    help="Time parts of the package beside other libraries, in one run, each checked before it is timed.\n\n"
    "Exit code 1: a figure is BELOW its target, or somebody could not be timed.",
)

Rounds = Annotated[int, typer.Option(min=1, help="Runs of each, interleaved.")]
Quick = Annotated[bool, typer.Option(help="As small as can be: does it work, not how fast. Nothing is judged.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch on the CPU.")]
Csv = Annotated[Path | None, typer.Option("-o", "--out", help="Also add rows to this CSV, case by case.")]
Cap = Annotated[float | None, typer.Option(min=0.1, help="Seconds that each may take in a case; all if not given.")]
AllowMissing = Annotated[bool, typer.Option("--allow-missing", help="Skipped and capped ones are no failure.")]


def _open(threads: int | None, device: str, *settings: Any) -> "Session":
    import torch

    from poisonshield.bench.session import Session
    from poisonshield.engine.processes import choose_device

    if threads:
        torch.set_num_threads(threads)
    return Session(choose_device(device), *settings)


@app.command("ops")
def ops(
    op: Annotated[list[str] | None, typer.Option(help="augment, diffusion, jpeg or pgd; all if not given.")] = None,
    out: Csv = Path("bench.csv"),
    plot: Annotated[Path | None, typer.Option(help="Also draw the medians into this PNG.")] = None,
    rounds: Rounds = 15, cap: Cap = None, quick: Quick = False, threads: Threads = None,
    device: Device = "auto", allow_missing: AllowMissing = False,
) -> None:  # fmt: skip
    """The fused ops beside kornia, torchattacks, torchvision, diffusers and torch.compile.

    e.g. poisonshield bench ops --op jpeg --cap 60 -o jpeg.csv
    """
    from poisonshield.bench import bench as run

    session = _open(threads, device, out, rounds, cap, quick, allow_missing)
    run(session, op or [], plot)
    raise typer.Exit(session.close())


@app.command("stream")
def stream(
    data: Annotated[
        Path | None, typer.Option(help="A data set of JPEG files of one size; made pictures if not given.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that read, on each side.")] = 2,
    out: Csv = None,
    rounds: Rounds = 3, cap: Cap = None, quick: Quick = False, threads: Threads = None,
    device: Device = "auto", allow_missing: AllowMissing = False,
) -> None:  # fmt: skip
    """Reading, decoding and one crop of 224 px beside webdataset with torchvision's transforms v2.

    Threads of torch: if not given, as many as there are cores that workers leave free, and at least 1.

    e.g. poisonshield bench stream --workers 2 --cap 120 -o stream.csv
    """
    from poisonshield.bench.stream import bench as run
    from poisonshield.bench.stream import free_cores

    session = _open(threads or free_cores(workers), device, out, rounds, cap, quick, allow_missing)
    run(session, workers=workers, data=data)
    raise typer.Exit(session.close())


@app.command("simclr")
def simclr(
    out: Csv = None,
    rounds: Rounds = 5, cap: Cap = None, quick: Quick = False, threads: Threads = None,
    device: Device = "auto", allow_missing: AllowMissing = False,
) -> None:  # fmt: skip
    """Steps of SimCLR at 32 px, from stored pictures to moved weights, beside lightly's usual loop.

    e.g. poisonshield bench simclr --rounds 3 -o simclr.csv
    """
    from poisonshield.bench.simclr import bench as run

    session = _open(threads, device, out, rounds, cap, quick, allow_missing)
    run(session)
    raise typer.Exit(session.close())


@app.command("vespr")
def vespr(
    out: Csv = None,
    rounds: Rounds = 15, cap: Cap = None, quick: Quick = False, threads: Threads = None,
    device: Device = "auto", allow_missing: AllowMissing = False,
    steps: Annotated[int, typer.Option(min=0, help="Steps of the attack.")] = 10,
) -> None:  # fmt: skip
    """One joint training step beside the VESPR authors' way of taking it, checked to be the same step.

    e.g. poisonshield bench vespr --device cpu --threads 2 -o vespr.csv
    """
    from poisonshield.bench.vespr import bench as run

    session = _open(threads, device, out, rounds, cap, quick, allow_missing)
    run(session, steps)
    raise typer.Exit(session.close())


@app.command("invert")
def invert(
    model: Model = "tiny",
    out: Csv = None,
    rounds: Rounds = 15, cap: Cap = None, quick: Quick = False, threads: Threads = None,
    device: Device = "auto", allow_missing: AllowMissing = False,
) -> None:  # fmt: skip
    """A step of textual inversion: latents kept or made anew, beside diffusers' loop, and eight concepts beside one.

    e.g. poisonshield bench invert --model /models/sd15 --rounds 5 -o invert.csv
    """
    from poisonshield.bench.inversion import bench as run

    session = _open(threads, device, out, rounds, cap, quick, allow_missing)
    run(session, model)
    raise typer.Exit(session.close())
