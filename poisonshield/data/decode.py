"""Samples of shards: encoded bytes to pixels and back. Picture files of people are read by data/pictures.py.

JPEG, and writing, by torchvision; it and Pillow are imported on first use. PNG is read by Pillow, which costs twice the
time of torchvision for a 32x32 image (0.2 ms) and as much for a large one: torchvision's decode_png (0.29) ends the
process with a segmentation fault where a PNG is damaged behind its header. Its encoders do the same for sides that the
format does not have, so those are refused first.
"""

import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from poisonshield.data.pictures import PNG_SIGNATURE, damage_error, depth_error, read_picture, refuse_large
from poisonshield.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")
MAX_SIDE = 65_500  # JPEG's limit; PNG's is a million

_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # JPEG markers before which height and width stand


def load_codecs() -> None:
    """Import what images are decoded, resized and encoded with, before threads do it.

    Two threads that import parts of torchvision at the same time find one of them half imported.
    """
    import torchvision.io
    import torchvision.transforms.v2.functional  # noqa: F401


def decode(data: bytes, extension: str, *, name: str) -> Tensor:
    """The image as uint8 [3, H, W], RGB; grey is repeated, alpha dropped, and pixels stay as they are stored.

    EXIF's turn is not for here: `data import` has made it, and shards of before keep the pixels that they always had.
    name: how the sample is called in an error, e.g. "sample cat-1 in shard-00000.tar".
    Raises DataError if the bytes are not a whole image of this kind, hold more than 8 bits a channel, or claim more
    pixels than data/pictures.py takes.
    """
    return _decode_png(data, name) if extension == "png" else _decode_jpeg(data, extension, name)


def _decode_jpeg(data: bytes, extension: str, name: str) -> Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        if not data:
            raise RuntimeError("it is empty")
        for height, width in _jpeg_sizes(data):
            refuse_large(width, height, name=name)
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError as err:
        raise damage_error(data, err, name=name, kind=f"{extension.upper()} ") from err


def _jpeg_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """(height, width) of each frame header before the pixels: the decoder takes memory for what it says."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in _FRAMES:
            yield int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
        bare = marker == 0xFF or 0xD0 <= marker <= 0xD8 or marker == 0x01  # no length follows
        at += (1 if marker == 0xFF else 2) if bare else 2 + length


def _decode_png(data: bytes, name: str) -> Tensor:
    try:
        _check_png(data)
    except ValueError as err:
        raise damage_error(data, err, name=name, kind="PNG ") from err
    if data[24] == 16:
        raise depth_error(name, "16 bits")
    return read_picture(data, name=name, formats=("PNG",), upright=False).pixels


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
