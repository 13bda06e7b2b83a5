"""Strangers' .pt and .bin files: what they hold is looked at before anything of it is made.

torch's restricted loader runs no code, but it makes what a file asks for: a tensor of stride 0 in a file of two
kilobytes has any size, and so has a compressed member. Here sizes are read first, without memory behind them.
"""

import io
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from poisonshield.errors import DataError

_PLAIN = re.compile(
    r"torch \w+Storage|torch\.storage (Typed|Untyped)Storage|collections OrderedDict|torch Size"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|torch (b?float|u?int|complex)\d+"
)
"""What tables of tensors are made of; whatever else a pickle names is refused before it is asked for."""

_MAX_PICKLE = 2**26  # bytes of what stands around the tensors' data
_MOST_PICKLES = 5  # of a file from before torch 1.6: two marks, the machine, the content, the names of its data
_ZIP = b"PK\x03\x04"


def load_pickled(data: bytes, *, name: str) -> Any:
    """The tensors and plain values of a .pt or .bin file. Raises DataError as check_pickled does."""
    check_pickled(io.BytesIO(data), name=name, size=len(data))
    with _telling(name):
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def check_pickled(file: IO[bytes] | Path, *, name: str, size: int) -> None:
    """Look at a file of `size` bytes, and read no tensor.

    Raises DataError if it is damaged, holds more than tensors and plain values, or would be larger than it is.
    """
    if isinstance(file, Path):
        with file.open("rb") as stream:
            return check_pickled(stream, name=name, size=size)
    with _telling(name):
        for pickle in _pickles(file, size):
            _refuse_calls(pickle)
        file.seek(0)
        found = list(_tensors(torch.load(file, map_location="meta", weights_only=True), set()))
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in found}
        spread = next((t for t in found if t.numel() * t.element_size() > t.untyped_storage().nbytes()), None)
        if spread is not None or sum(storages.values()) > size:
            shape = "" if spread is None else f", one of them {list(spread.shape)}"
            raise ValueError(f"its {size:,} bytes claim larger tensors than they hold{shape}")


class _telling:
    """What goes wrong inside becomes a DataError about the file."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, err: BaseException | None, trace: Any) -> None:
        # A damaged or hostile pickle may fail in any type; nothing of it has been executed.
        if isinstance(err, Exception):
            reason = (str(err).strip() or type(err).__name__).split("\n")[0]
            raise DataError(
                f"{self.name} was not read: it is damaged, or holds more than tensors and plain values, and such files "
                f"can run code when they are opened.\n  Ask for it as .safetensors. ({reason})"
            ) from err


def _pickles(file: IO[bytes], size: int) -> Iterator[bytes]:
    """The pickles of a file: one in a zip, several one after the other in files of before torch 1.6."""
    if file.read(4) != _ZIP:
        file.seek(0)
        yield file.read(_MAX_PICKLE)
        return
    with zipfile.ZipFile(file) as members:
        infos = members.infolist()
        if len({info.filename for info in infos}) < len(infos):
            raise ValueError("a member is in it twice")
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos) or sum(i.file_size for i in infos) > size:
            raise ValueError("its members are compressed or overlap, so that they may unpack to any size")
        for info in infos:
            if info.filename.endswith(".pkl"):
                if info.file_size > _MAX_PICKLE:
                    raise ValueError(f"{info.filename} has {info.file_size:,} bytes")
                yield members.read(info)


def _refuse_calls(data: bytes) -> None:
    """Raise ValueError if the pickles at the start of these bytes name anything but parts of tensors."""
    stream = io.BytesIO(data)
    for _ in range(_MOST_PICKLES):
        if data[stream.tell() : stream.tell() + 1] != b"\x80":
            return
        for code, argument, _ in pickletools.genops(stream):
            if code.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
                raise ValueError(f"it names something in a way that torch does not write ({code.name})")
            if code.name == "GLOBAL" and not _PLAIN.fullmatch(str(argument)):
                raise ValueError(f"it names {str(argument).replace(' ', '.')!r}")


def _tensors(content: Any, seen: set[int]) -> Iterator[Tensor]:
    """seen: tables and lists that were looked into, by id: one may lie in another many times, and in itself."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict | list | tuple) and id(content) not in seen:
        seen.add(id(content))
        for value in content.values() if isinstance(content, dict) else content:
            yield from _tensors(value, seen)
