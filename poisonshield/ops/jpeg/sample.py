"""Images within a sample, found as torchvision's v2 transforms find them: in tuples, lists and dictionaries.

Where a sample has pictures of Pillow, `tv_tensors.Image` or `tv_tensors.Video`, these are its images; else its first
tensor is. Labels, masks, boxes and whatever else there is stay as they are. Neither library is imported: a sample that
holds something of theirs has imported it.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]
"""A tensor [..., 3, H, W] to one of the same shape."""


def change_images(sample: Any, change: Change) -> Any:
    """The sample, of the same structure, with `change` applied to its images. Raises TypeError where there is none."""
    leaves = list(_leaves(sample))
    images: list[Any] = [v for v in leaves if isinstance(v, (*_pillow(), *_tv_tensors("Image", "Video")))]
    if not images:
        images = [v for v in leaves if isinstance(v, Tensor) and not isinstance(v, _tv_tensors("TVTensor"))][:1]
    if not images:
        kinds = ", ".join(dict.fromkeys(type(v).__name__ for v in leaves)) or "nothing"
        raise TypeError(f"there is no image in what was given ({kinds}). Give a tensor [..., 3, H, W] or a picture.")
    chosen = {id(v) for v in images}
    return _rebuild(sample, lambda v: _change(v, change) if id(v) in chosen else v)


def _leaves(sample: Any) -> Iterator[Any]:
    if isinstance(sample, dict):
        sample = sample.values()
    elif not isinstance(sample, (tuple, list)):
        yield sample
        return
    for value in sample:
        yield from _leaves(value)


def _rebuild(sample: Any, replace: Callable[[Any], Any]) -> Any:
    """The sample with another value at each leaf: tuples stay tuples, named ones too, mappings keep order and kind."""
    if isinstance(sample, dict):
        changed = {key: _rebuild(value, replace) for key, value in sample.items()}
        return changed if type(sample) is dict else _copy_with(sample, changed)
    if isinstance(sample, (tuple, list)):
        values = [_rebuild(value, replace) for value in sample]
        return type(sample)(*values) if hasattr(sample, "_fields") else type(sample)(values)
    return replace(sample)


def _copy_with(sample: Any, values: dict[Any, Any]) -> Any:
    """A dictionary of the same kind, a defaultdict with its factory, and other values."""
    copied = sample.copy()
    copied.update(values)
    return copied


def _change(value: Any, change: Change) -> Any:
    if isinstance(value, Tensor):
        if not isinstance(value, _tv_tensors("TVTensor")):
            return change(value)
        return change(value.as_subclass(Tensor)).as_subclass(type(value))
    if value.mode not in ("RGB", "L"):
        raise TypeError(
            f"a picture has the mode {value.mode}, and JPEG as it is here knows RGB and L. Give picture.convert('RGB')."
        )
    # A gray picture has no colour, and stays without: its chrominance is 0, which rounds to 0.
    data = bytearray(value.convert("RGB").tobytes())
    levels = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    changed = change(levels.view(value.height, value.width, 3).permute(2, 0, 1))
    rgb = sys.modules["PIL.Image"].frombytes("RGB", value.size, changed.permute(1, 2, 0).contiguous().numpy().tobytes())
    return rgb if value.mode == "RGB" else rgb.convert(value.mode)


def _pillow() -> tuple[type[Any], ...]:
    """Pillow's class of pictures; none where Pillow was not imported."""
    module = sys.modules.get("PIL.Image")
    return () if module is None else (module.Image,)


def _tv_tensors(*names: str) -> tuple[type[Any], ...]:
    """Classes of torchvision.tv_tensors; none where it was not imported."""
    module = sys.modules.get("torchvision.tv_tensors")
    return () if module is None else tuple(getattr(module, name) for name in names)
