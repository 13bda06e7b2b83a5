"""Unfinished work on disk: one small file a picture, replaced in one move, read back only by the run that wrote it."""

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poisonshield.errors import CheckpointError

ENDING = ".poison-state"


def identity(
    recipe: str, target: Tensor | None, images: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None
) -> str:
    """A hash of all that decides a result. recipe: method, settings, seed and model in words."""
    out = hashlib.sha256(recipe.encode())
    out.update(f"target {'none' if target is None else _hash(target)}\n".encode())
    for key, image in sorted(images.items()):
        mask = "none" if masks is None else _hash(masks[key].float())
        out.update(f"{key} {_hash(image)} {mask}\n".encode())
    return out.hexdigest()


def _hash(value: Tensor) -> str:
    data = value.detach().cpu().contiguous()
    return hashlib.sha256(f"{list(data.shape)} {data.dtype} ".encode() + data.numpy().tobytes()).hexdigest()


class Store:
    """States by key in `folder`; with None nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def __bool__(self) -> bool:
        """Whether anything is kept."""
        return self.folder is not None

    def path(self, key: str) -> Path:
        """Where the state of `key` lies; keys may hold any character."""
        assert self.folder is not None, "nothing is kept"
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}{ENDING}"

    def load(self, key: str, name: str) -> dict[str, Any] | None:
        """The state of `key`, None if there is none. Raises CheckpointError if another run (identity) wrote it."""
        if self.folder is None or not self.path(key).is_file():
            return None
        try:
            state = torch.load(self.path(key), map_location="cpu", weights_only=True)
        except Exception as err:  # torch raises many kinds; none of them names the file
            raise CheckpointError(f"{self.path(key)} cannot be read: {err}. Remove it to start {key} over.") from err
        if state["identity"] != name:
            raise CheckpointError(
                f"{self.path(key)} holds {key} half done with other settings, pixels or model.\n"
                "  Repeat the earlier command to finish it, or remove the file to start over."
            )
        return state["value"]

    def save(self, key: str, name: str, value: dict[str, Any]) -> None:
        """Replace the state of `key` in one move."""
        draft = self.path(key).with_suffix(".tmp")
        draft.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            torch.save({"identity": name, "value": value}, file)
            file.flush()
            os.fsync(file.fileno())  # else a machine that stops may keep the new name with half of the bytes
        os.replace(draft, self.path(key))

    def remove(self, key: str) -> None:
        """Forget `key`; the folder goes with the last one."""
        if self.folder is None:
            return
        self.path(key).unlink(missing_ok=True)
        with suppress(OSError):  # not empty, or not there
            self.folder.rmdir()
