"""A file that a poison's training goes on from after a stop, to the bit."""

import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from poisonshield.files import write_whole

log = logging.getLogger(__name__)

ENDING = ".learning.safetensors"


class Progress:
    """What was reached, by place: `{"round": 3}` and tensors. Without a file nothing is kept.

    made_by: all that the result depends on; a file of something else is not gone on from.
    """

    def __init__(self, file: Path | None, made_by: dict[str, Any], *, every_seconds: float = 60.0) -> None:
        self.file, self.every_seconds, self.saved = file, every_seconds, time.monotonic()
        self.digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()

    def load(self) -> tuple[dict[str, int], dict[str, Tensor]]:
        """The place and the tensors that were saved last; nothing of both where there is no such file."""
        if self.file is None or not self.file.is_file():
            return {}, {}
        try:
            with safe_open(str(self.file), framework="pt") as file:
                said = json.loads((file.metadata() or {}).get("progress", "{}"))
                if said.get("made_by") != self.digest:
                    log.info("%s is of other settings or data, and is begun anew", self.file)
                    return {}, {}
                return said["place"], {k: file.get_tensor(k) for k in file.keys()}
        except (OSError, KeyError, ValueError, SafetensorError):
            log.warning("%s cannot be read, and is begun anew", self.file)
            return {}, {}

    def due(self) -> bool:
        """Whether the last save is so long ago that losing what came since would hurt."""
        return self.file is not None and time.monotonic() - self.saved >= self.every_seconds

    def save(self, place: dict[str, int], tensors: dict[str, Tensor]) -> None:
        """Replace the file, whole."""
        if self.file is None:
            return
        said = json.dumps({"made_by": self.digest, "place": place})
        plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        write_whole(self.file, save(plain, metadata={"progress": said}))
        self.saved = time.monotonic()

    def remove(self) -> None:
        """The file is not needed any more."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)
