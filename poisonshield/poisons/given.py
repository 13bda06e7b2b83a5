"""Noise, or poisoned pictures, that somebody else made: read from a file or a folder, and matched to the data.

Arrays are the first to be taken wrongly: channels in the wrong place, levels for pixels, another order. So shape and
range are told from the numbers or stated, rows are matched by key where the file has keys, else in the data's order,
and then the order has to be proved: by labels in the file, or by poisoned pictures that lie within eps of the clean
ones. Pickles are read by torch's loader of weights alone, so that a file can run no code.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.errors import DataError
from poisonshield.poisons.learned.base import LearnedConfig, LearnedPoison
from poisonshield.poisons.learned.pictures import Pictures, collect
from poisonshield.poisons.learned.progress import Progress
from poisonshield.random import sample_ids

KEYS, LABELS = ("keys", "names"), ("labels", "targets", "y")
PICTURES = (".png", ".bmp")


class Given(LearnedPoison):
    """Adds noise that was made elsewhere, from .npy, .npz, .pt, .safetensors or a folder of PNG."""

    class Config(LearnedConfig):
        """Where it is, and how to take it."""

        path: str | None = Field(None, description="the file, or a folder of pictures called as their keys")
        holds: Literal["noise", "pictures"] = Field("noise", description="what to take it for: x' - x, or x'")
        entry: str | None = Field(None, description="which array of the file; null is the only large one")
        channels: Literal["auto", "first", "last"] = Field(
            "auto", description="[N, 3, H, W] or [N, H, W, 3]; auto tells by the 3"
        )
        unit: Literal["auto", "levels", "pixels"] = Field(
            "auto", description="levels are of 255; auto takes whole-number types for levels and others for pixels"
        )
        trust_order: bool = Field(False, description="take rows in the data's order though nothing proves it")

    name = "given"
    draws = False
    config: Config

    def fit(self, batches: Iterable[Batch]) -> None:
        """Read the file and match it. Raises DataError if there is none, or it does not fit."""
        keys: list[str] = []

        def noted(batch: Batch) -> Any:
            keys.extend(batch.keys)
            return self.checked(batch)

        pictures = collect(map(noted, batches), self.device, self.name)
        path = self._path()
        found = read_folder(path, keys) if path.is_dir() else read_file(path, self.config.entry)
        values = self._as_levels(self._lay_out(found["values"]))
        order = sample_ids(keys).argsort()  # row of the data's order for each picture, whose order is that of the ids
        self.table = self._match(values, found, keys, order, pictures)
        self.ids = pictures.ids

    def learn(self, pictures: Pictures, progress: Progress) -> None:
        """Nothing is trained."""

    def _path(self) -> Path:
        if self.config.path is None:
            raise DataError("poison given adds noise from a file: set data.poison.path to it.")
        path = Path(self.config.path)
        if not path.exists():
            raise DataError(f"poison given: there is no {path}. Set data.poison.path to the file or folder.")
        return path

    def _lay_out(self, values: Tensor) -> Tensor:
        """Channels first, [N, 3, H, W]."""
        shape, size, wish = tuple(values.shape), self.image_size, self.config.channels
        first, last = shape[1:] == (3, *size), shape[1:] == (*size, 3)
        if wish == "auto" and first and last:
            raise DataError(f"{self.config.path} is {shape}, either way round. Set data.poison.channels.")
        if last and wish != "first":
            return values.permute(0, 3, 1, 2)
        if first and wish != "last":
            return values
        raise DataError(
            f"{self.config.path} holds {shape}; the data needs [N, 3, {size[0]}, {size[1]}], or channels last."
        )

    def _as_levels(self, values: Tensor) -> Tensor:
        """In levels, float32; still pictures where the file holds pictures."""
        unit = self.config.unit
        if unit == "auto":
            unit = "pixels" if values.dtype.is_floating_point else "levels"
        values = values.float() * (255 if unit == "pixels" else 1)
        low, high = (float(v) for v in values.aminmax())
        least = 0 if self.config.holds == "pictures" else -255
        if not least <= low <= high <= 255.001:  # NaN too
            raise DataError(
                f"{self.config.path} holds {low:.4g} to {high:.4g} levels when taken for {unit}; {least} to 255 was "
                "wanted.\n  Set data.poison.unit, and holds to what it is."
            )
        return values

    def _match(
        self, values: Tensor, found: dict[str, Any], keys: list[str], order: Tensor, pictures: Pictures
    ) -> Tensor:
        """The table in the order of the pictures, proved and within eps."""
        rows = order
        if found["keys"] is not None:
            where = {key: i for i, key in enumerate(found["keys"])}
            missing = [key for key in keys if key not in where]
            if missing:
                raise DataError(
                    f"{self.config.path} has no row for {missing[0]} and {len(missing) - 1} more of {len(keys)} keys."
                )
            rows = torch.tensor([where[keys[i]] for i in order.tolist()])
        elif len(values) != len(keys):
            raise DataError(
                f"{self.config.path} has {len(values)} rows and no keys; the data has {len(keys)} pictures."
            )
        values = values[rows]
        proved = found["keys"] is not None or self.config.trust_order
        if found["labels"] is not None:
            wrong = int((found["labels"][rows] != pictures.y).sum())
            if wrong:
                raise DataError(
                    f"{self.config.path} has other labels than the data in {wrong} of {len(keys)} rows: it is of "
                    "another set or in another order.\n  Bring it into the data's order, or give it keys."
                )
            proved = True
        clean = pictures.levels.float()
        if self.config.holds == "pictures":
            values, proved = values.round() - clean, True
        if not proved:
            raise DataError(
                f"{self.config.path} has neither keys nor labels, so nothing proves that its rows are in the data's "
                "order.\n  Set data.poison.trust_order: true if you know it."
            )
        table = (clean + values).round().clamp(0, 255) - clean
        far = table.abs().flatten(1).amax(1)
        if bool((far > self.radius).any()):
            raise DataError(
                f"{self.config.path} changes {int((far > self.radius).sum())} of {len(keys)} pictures by more "
                f"than eps, up to {int(far.max())} levels; data.poison.eps allows {self.radius}.\n"
                "  Either eps is too small, or rows, unit or channels are not what they were taken for."
            )
        return table.to(torch.int16).clamp(-128, 127).to(torch.int8)


def read_folder(folder: Path, keys: list[str]) -> dict[str, Any]:
    """Pictures called as the keys, with slashes for folders: values uint8 [N, H, W, 3] in the order of the keys."""
    from PIL import Image

    lossy = [p.name for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".webp")]
    if lossy:
        raise DataError(f"{folder} holds {lossy[0]}: a lossy picture of a poison is no longer that poison. Give PNG.")
    rows = []
    for key in keys:
        file = next((f for f in (folder / f"{key}{end}" for end in PICTURES) if f.is_file()), None)
        if file is None:
            raise DataError(f"{folder} has no picture for {key}: {key}.png was looked for.")
        rows.append(torch.from_numpy(np.asarray(Image.open(file, formats=["PNG", "BMP"]).convert("RGB")).copy()))
    if len({r.shape for r in rows}) > 1:
        raise DataError(f"{folder} holds pictures of several sizes.")
    return {"values": torch.stack(rows), "keys": keys, "labels": None}


def read_file(path: Path, entry: str | None) -> dict[str, Any]:
    """values [N, ...], keys (a list of N, or None) and labels (int64 [N], or None) of a file. Raises DataError."""
    try:
        arrays = _READERS[path.suffix.lower()](path)
    except KeyError:
        raise DataError(f"{path}: {', '.join(_READERS)} and folders are read, not {path.suffix or 'this'}.") from None
    except Exception as err:  # each reader has errors of its own, and the file may hold anything
        raise DataError(f"{path} cannot be read ({type(err).__name__}: {err}).") from err
    large = [name for name, v in arrays.items() if torch.is_tensor(v) and v.dim() == 4]
    if entry is not None and entry not in large or entry is None and len(large) != 1:
        raise DataError(f"{path} holds {', '.join(large) or 'no array of four dimensions'}. Set data.poison.entry.")
    keys = next((list(map(str, arrays[k])) for k in KEYS if k in arrays), None)
    labels = next((torch.as_tensor(arrays[k]).long().flatten() for k in LABELS if k in arrays), None)
    values = arrays[entry or large[0]]
    for name, found in (("keys", keys), ("labels", labels)):
        if found is not None and len(found) != len(values):
            raise DataError(f"{path} holds {len(values)} rows and {len(found)} {name}.")
    return {"values": values, "keys": keys, "labels": labels}


def _of_numpy(array: Any) -> Any:
    return torch.from_numpy(array) if array.dtype.kind in "iufb" else array.tolist()


def _read_npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        return {name: _of_numpy(file[name]) for name in file.files}


def _read_torch(path: Path) -> dict[str, Any]:
    found = torch.load(path, map_location="cpu", weights_only=True)
    return found if isinstance(found, dict) else {"values": found}


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(path))


_READERS: dict[str, Any] = {
    ".npy": lambda path: {"values": _of_numpy(np.load(path, allow_pickle=False))},
    ".npz": _read_npz,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".safetensors": _read_safetensors,
}
