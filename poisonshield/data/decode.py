"""Encoded bytes to pixels and back, by torchvision's codecs. torchvision is imported on first use only."""

import torch
from torch import Tensor

from poisonshield.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")


def decode(data: bytes, extension: str, *, name: str) -> Tensor:
    """The image as uint8 [3, H, W], RGB; grey is repeated, alpha dropped, EXIF rotation ignored (as torchvision does).

    name: how the sample is called in an error, e.g. "sample cat-1 in shard-00000.tar".
    Raises DataError if the bytes are not a whole image of this kind, or hold more than 8 bits a channel.
    """
    from torchvision.io import ImageReadMode, decode_jpeg, decode_png

    try:
        if not data:
            raise RuntimeError("it is empty")
        codec = decode_png if extension == "png" else decode_jpeg
        image = codec(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError as err:
        reason = str(err).strip().splitlines()[0]
        raise DataError(
            f"{name}: {len(data)} bytes are not a whole {extension.upper()} image ({reason}).\n"
            "  Restore the file from its source, or import it again with --skip-broken to go on without it."
        ) from err
    if image.dtype != torch.uint8:
        raise DataError(
            f"{name} has more than 8 bits a channel ({image.dtype}), 8 were wanted.\n"
            "  Convert it first: budgets are stated for 256 levels."
        )
    return image


def encode_png(image: Tensor) -> bytes:
    """PNG bytes of uint8 [3, H, W], lossless. Level 1: noise-like pixels gain nothing from a higher one."""
    from torchvision.io import encode_png as codec

    return codec(image.contiguous(), compression_level=1).numpy().tobytes()


def encode_jpeg(image: Tensor, *, quality: int) -> bytes:
    """JPEG bytes of uint8 [3, H, W]; lossy, so never for poisoned pixels."""
    from torchvision.io import encode_jpeg as codec

    return codec(image.contiguous(), quality=quality).numpy().tobytes()
