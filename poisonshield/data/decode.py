"""Encoded bytes to pixels and back. JPEG, and writing, by torchvision; both libraries are imported on first use.

PNG is read by Pillow, which costs twice the time of torchvision for a 32x32 image (0.2 ms) and as much for a large one:
torchvision's decode_png (0.29) ends the process with a segmentation fault where a PNG is damaged behind its header.
Its encoders do the same for sides that the format does not have, so those are refused first.
"""

import io
import zlib

import torch
from torch import Tensor

from poisonshield.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")
MAX_SIDE = 65_500  # JPEG's limit; PNG's is a million
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def decode(data: bytes, extension: str, *, name: str) -> Tensor:
    """The image as uint8 [3, H, W], RGB; grey is repeated, alpha dropped, EXIF rotation ignored (as torchvision does).

    name: how the sample is called in an error, e.g. "sample cat-1 in shard-00000.tar".
    Raises DataError if the bytes are not a whole image of this kind, or hold more than 8 bits a channel.
    """
    return _decode_png(data, name) if extension == "png" else _decode_jpeg(data, extension, name)


def decode_by_pillow(data: bytes, *, name: str, formats: tuple[str, ...] | None = None) -> Tensor:
    """The same for any format that Pillow reads; of an animation the first frame. formats: only these."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            mode = image.mode
            image.info.pop("transparency", None)  # dropped, as alpha is
            array = np.array(image if mode == "RGB" else image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as err:
        raise _not_whole(data, "PNG " if formats == ("PNG",) else "", name, err) from err
    if mode[:1] in "IF":  # 16 or 32 bits, which Pillow cuts off at 255
        raise _too_deep(name, f"mode {mode}")
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def _decode_jpeg(data: bytes, extension: str, name: str) -> Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        if not data:
            raise RuntimeError("it is empty")
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError as err:
        raise _not_whole(data, f"{extension.upper()} ", name, err) from err


def _decode_png(data: bytes, name: str) -> Tensor:
    try:
        _check_png(data)
    except ValueError as err:
        raise _not_whole(data, "PNG ", name, err) from err
    if data[24] == 16:
        raise _too_deep(name, "16 bits")
    return decode_by_pillow(data, name=name, formats=("PNG",))


def _check_png(data: bytes) -> None:
    """Raise ValueError unless all chunks of a PNG are there with their checksums. Pillow does not compare them all."""
    if not data.startswith(PNG_SIGNATURE + b"\0\0\0\rIHDR"):
        raise ValueError("it does not begin as one" if data else "it is empty")
    start, kind = len(PNG_SIGNATURE), b""
    while kind != b"IEND":
        length = int.from_bytes(data[start : start + 4], "big")
        kind, end = data[start + 4 : start + 8], start + 8 + length
        if end + 4 > len(data):
            raise ValueError("it ends early")
        if zlib.crc32(data[start + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise ValueError(f"its chunk {kind.decode(errors='replace')} is damaged")
        start = end + 4


def _not_whole(data: bytes, kind: str, name: str, err: Exception) -> DataError:
    reason = (str(err).strip() or type(err).__name__).splitlines()[0]
    return DataError(
        f"{name}: {len(data)} bytes are not a whole {kind}image ({reason}).\n"
        "  Restore the file from its source, or import it again with --skip-broken to go on without it."
    )


def _too_deep(name: str, what: str) -> DataError:
    return DataError(
        f"{name} has more than 8 bits a channel ({what}), 8 were wanted.\n"
        "  Convert it first: budgets are stated for 256 levels."
    )


def encode_png(image: Tensor, *, name: str = "the image") -> bytes:
    """PNG bytes of uint8 [3, H, W], lossless. Level 1: noise-like pixels gain nothing from a higher one.

    Raises DataError calling it `name` if a side is 0 or beyond MAX_SIDE.
    """
    from torchvision.io import encode_png as codec

    _check_sides(image, name)
    return codec(image.contiguous(), compression_level=1).numpy().tobytes()


def encode_jpeg(image: Tensor, *, quality: int, name: str = "the image") -> bytes:
    """JPEG bytes of uint8 [3, H, W]; lossy, so never for poisoned pixels. Raises as encode_png does."""
    from torchvision.io import encode_jpeg as codec

    _check_sides(image, name)
    return codec(image.contiguous(), quality=quality).numpy().tobytes()


def _check_sides(image: Tensor, name: str) -> None:
    height, width = image.shape[1:]
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise DataError(f"{name} is {height}x{width} pixels, sides of 1 to {MAX_SIDE:,} were wanted. Crop it first.")
