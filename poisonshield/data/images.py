"""One image on its way into a data set: told apart by content, checked by decoding, turned, resized if asked."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from poisonshield.data.decode import decode, encode_jpeg, encode_png
from poisonshield.data.jpeg_scan import check_scans, refuse_claim
from poisonshield.data.pictures import MAX_PIXELS, damage_error, read_head, read_picture, turn
from poisonshield.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL import Image

_STORED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png"}
"""Formats whose files are stored as they are: by content, not by name, as ImageNet holds a PNG that is called .JPEG."""


@dataclass(frozen=True)
class Encoded:
    """An image file as it will be stored, and the size of its pixels (height, width)."""

    data: bytes
    extension: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Preparation:
    """What import does to each image.

    Each is turned as its EXIF data says, once and for all: what reads a data set knows nothing of EXIF. size: shorter
    side resized to it (antialiased), then a centre square; None keeps all pixels, and the very bytes of JPEG and PNG
    files that need no turn. Whatever changes is stored as PNG, without loss. jpeg_quality: store resized images as JPEG
    of this quality instead. max_pixels: of one image, as it comes. A JPEG whose compressed data is not whole is refused
    even where a decoder would fill the rest with grey (data/jpeg_scan.py).
    """

    size: int | None = None
    jpeg_quality: int | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ConfigError(f"size is {self.size}, at least 1 pixel was wanted.")
        if self.jpeg_quality is not None and not (self.size and 1 <= self.jpeg_quality <= 100):
            raise ConfigError(f"jpeg_quality is {self.jpeg_quality}: 1 to 100 was wanted, and only together with size.")
        if not 1 <= self.max_pixels <= MAX_PIXELS:
            raise ConfigError(
                f"max_pixels is {self.max_pixels:,}: 1 to {MAX_PIXELS:,} was wanted, which is what training reads."
            )

    def __call__(self, data: bytes, *, name: str) -> Encoded:
        """The image to store. Raises DataError calling it `name` if data/pictures.py refuses it."""
        head = read_head(data, name=name, max_pixels=self.max_pixels)
        extension = _STORED.get(head.format)
        if extension is None:
            return self.pixels(read_picture(data, name=name, max_pixels=self.max_pixels).pixels, name=name)
        pixels = _decode_strictly(data, extension, head.pixels, name=name)
        if self.size is None and head.orientation == 1:
            return Encoded(data, extension, _size(pixels))
        return self.pixels(turn(pixels, head.orientation), name=name)

    def pixels(self, pixels: Tensor, *, name: str) -> Encoded:
        """The same for an image that is already decoded, uint8 [3, H, W]."""
        if self.size is not None:
            pixels = resize_and_crop(pixels, self.size)
        size = _size(pixels)
        if self.jpeg_quality is not None:
            return Encoded(encode_jpeg(pixels, quality=self.jpeg_quality, name=name), "jpg", size)
        return Encoded(encode_png(pixels, name=name), "png", size)

    def describe(self) -> str:
        """One phrase for the provenance."""
        if self.size is None:
            return "original files (other formats than JPEG and PNG, and images that EXIF turns, stored as PNG)"
        stored = "PNG" if self.jpeg_quality is None else f"JPEG of quality {self.jpeg_quality}"
        resized = f"shorter side resized to {self.size} (bilinear, antialiased)"
        return f"{resized}, centre {self.size}x{self.size}, stored as {stored}"


def _decode_strictly(data: bytes, extension: str, claimed: int, *, name: str) -> Tensor:
    if extension == "png":  # its checksums were compared
        return decode(data, extension, name=name)
    try:
        refuse_claim(data, claimed)
        check_scans(data, partial(_decode_quietly, name=name))
    except DataError:
        raise
    except ValueError as err:
        raise damage_error(data, err, name=name, kind="JPEG ") from err
    return decode(data, extension, name=name)


def _decode_quietly(data: bytes, *, name: str) -> Tensor:
    """By Pillow: torchvision's decoder writes its remarks on changed data to the terminal."""
    return read_picture(data, name=name, formats=("JPEG",), upright=False).pixels


def resize_and_crop(pixels: Tensor, size: int) -> Tensor:
    """uint8 [3, size, size] from uint8 [3, H, W]: the shorter side becomes `size`, then the centre is cut out."""
    from torchvision.transforms.v2 import functional as F

    return F.center_crop(F.resize(pixels, [size], antialias=True), [size, size])


def fit(image: "Image.Image", size: int, crop: str, *, nearest: bool = False) -> Tensor:
    """uint8 [C, size, size]: the centred square or all of the image, resized."""
    from PIL.Image import Resampling

    width, height = image.size
    side, box = min(width, height), (0, 0, width, height)
    if crop == "center":
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
    how = Resampling.NEAREST if nearest else Resampling.BICUBIC
    array = np.array(image.crop(box).resize((size, size), how))
    return torch.from_numpy(array).view(size, size, -1).permute(2, 0, 1).contiguous()


def _size(pixels: Tensor) -> tuple[int, int]:
    height, width = pixels.shape[1:]
    return height, width
