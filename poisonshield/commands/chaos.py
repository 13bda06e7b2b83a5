"""`poisonshield chaos`."""

from collections import Counter
from typing import Annotated

import typer

from poisonshield.commands.base import MACHINE, Config, Out, Overrides

GROUP = MACHINE


def chaos(
    config: Config,
    out: Out,
    overrides: Overrides = None,
    kills: Annotated[int, typer.Option(min=0, help="How often a run is killed at a random moment.")] = 10,
    fault: Annotated[list[str] | None, typer.Option(help="One fault by name; all if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Of the moments at which faults strike.")] = 0,
) -> None:
    """Disturb a small training on this machine in every way, and tell whether it ends as if nothing had happened."""
    from poisonshield.chaos import FAULTS, Unequal, run_chaos

    names = FAULTS.names() if fault is None else fault
    verdicts = {True: "as undisturbed", False: "OTHER WEIGHTS OR SAMPLES", None: "not tried"}
    seen = Counter[bool | None]()
    for entry in run_chaos(config, overrides or [], out, kills=kills, faults=names, seed=seed):
        print(f"{entry.fault:24} {verdicts[entry.equal]:16} {entry.seen}", flush=True)
        seen[entry.equal] += 1
    if seen[False]:
        raise Unequal(f"{seen[False]} disturbed runs ended with other weights or samples. Their folders are in {out}.")
    print(f"{seen[True]} disturbed runs ended as the undisturbed one did; {out / 'ledger.json'} tells what was seen.")
