"""Samples whose image cannot be read: the end of a run, or, up to a number of them, left out by name.

Another sample of the same part of a batch takes the place of one that is left out, with its key and label, so that all
ranks go on with batches of the sizes that they agreed on.
"""

import logging
import re

import torch
from torch import Tensor

from poisonshield.data.source import BadSample, Source
from poisonshield.errors import ConfigError, DataError

log = logging.getLogger(__name__)

Faults = dict[int, str]
"""What is wrong with a sample, by its number."""


def parse_limit(text: str) -> int:
    """How many bad samples may be left out: 0 for "stop", N for "skip:N". Raises ConfigError for all else."""
    if text == "stop":
        return 0
    if match := re.fullmatch(r"skip:([1-9][0-9]{0,8})", text):
        return int(match[1])
    raise ConfigError(f"data.bad_samples is {text!r}, 'stop' or 'skip:N' was wanted, such as skip:100.")


def read_good(source: Source, indices: Tensor, *, out: Tensor | None = None) -> tuple[Tensor, Tensor, Faults]:
    """These samples, int64 [B], with good ones in place of bad ones; their pixels uint8 [B, 3, H, W]; the faults.

    Raises BadSample if the source leaves none out, DataError if all of them are bad.
    """
    try:
        return indices, source.read(indices, out=out), {}
    except BadSample:
        if not source.bad_limit:
            raise
    faults: Faults = {}
    for i in indices.tolist():
        try:
            source.read(torch.tensor([i]))
        except BadSample as err:
            faults[i] = str(err)
    numbers, good = indices.tolist(), [i for i in indices.tolist() if i not in faults]
    if not good:
        raise DataError(
            f"all {len(numbers)} samples of a part of a batch are bad. The first: {next(iter(faults.values()))}"
        )
    taken = torch.tensor([good[row % len(good)] if i in faults else i for row, i in enumerate(numbers)])
    return taken, source.read(taken, out=out), faults


class BadCount:
    """Which samples were left out so far in this process."""

    def __init__(self, limit: int) -> None:
        self.limit, self.faults = limit, Faults()

    def note(self, faults: Faults) -> None:
        """Name the new ones. Raises DataError if there are more than the limit."""
        for number, fault in faults.items():
            if number in self.faults:
                continue
            self.faults[number] = fault
            log.warning("bad sample %d, of %d that may be left out: %s", len(self.faults), self.limit, fault)
            if len(self.faults) > self.limit:
                raise DataError(
                    f"{len(self.faults)} samples are bad, and data.bad_samples=skip:{self.limit} leaves out fewer. "
                    f"The last: {fault}\n"
                    "  Import the images again, or set data.bad_samples higher and go on with engine.resume=auto."
                )
