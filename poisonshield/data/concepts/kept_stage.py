"""What a stage made of pictures, on disk, so that every rank and every restart trains on the same pixels and masks.

Networks differ in last bits from device to device; one level of one pixel would then be another picture.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from poisonshield.batch import Batch
from poisonshield.data.stream import Stage
from poisonshield.errors import CheckpointError
from poisonshield.files import tell_of_disk, write_whole


@dataclass(frozen=True)
class KeptStage:
    """`stage`, whose results are read from `folder` once they are there. Wants batches with keys, x and draw.

    folder: another one for whatever else the result depends on than keys and draw. x, mask and t_range are kept; a
    stage that changes more of a batch does not fit. seen: told of what was given and of what was read in the stage's
    place. Raises CheckpointError for a file that is damaged.
    """

    stage: Stage
    folder: Path
    seen: Callable[[Batch, Batch], None]

    def __call__(self, batch: Batch) -> Batch:
        told = "\n".join((str(batch.draw), *batch.keys))
        path = self.folder / f"{hashlib.sha256(told.encode()).hexdigest()[:24]}.safetensors"
        if not path.is_file():
            made = self.stage(batch)
            self._write(path, made)
            return made
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
                t_range = file.metadata()["t_range"]
        except (OSError, SafetensorError) as err:
            raise CheckpointError(f"{path} is damaged ({err}). Remove it; it is then made anew.") from err
        first, _, end = t_range.partition(" ")
        made = batch.replace(
            x=tensors["x"], mask=tensors.get("mask"), t_range=(int(first), int(end)) if t_range else None
        )
        self.seen(batch, made)
        return made

    def _write(self, path: Path, made: Batch) -> None:
        tensors = {name: t for name, t in (("x", made.x), ("mask", made.mask)) if t is not None}
        with tell_of_disk(path):
            self.folder.mkdir(parents=True, exist_ok=True)
        t_range = "" if made.t_range is None else f"{made.t_range[0]} {made.t_range[1]}"
        kept = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        write_whole(path, save(kept, metadata={"t_range": t_range}))
