"""Concepts: a few pictures each of one thing, with masks of it.

They are held in memory: a concept is five pictures, not five million. A picture's key names its concept, its file and a
hash of its pixels, so that whatever changes the pixels changes the key.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from poisonshield.errors import DataError
from poisonshield.keys import RESERVED, Key


@dataclass(frozen=True, eq=False)
class ConceptImage:
    """pixels uint8 [3, S, S]; mask float32 [1, S, S] in [0, 1], multiples of 1/255, or None; key
    "<concept>/<stem>@<8 hex of the pixels>", see keys.py."""

    key: str
    pixels: Tensor
    mask: Tensor | None = None
    caption: str = ""

    @classmethod
    def of(
        cls, concept: str, stem: str, pixels: Tensor, mask: Tensor | None = None, caption: str = ""
    ) -> "ConceptImage":
        """The picture under the key that its pixels give it. mask: rounded to 8 bits, as files hold it."""
        stem = re.sub(f"[.{RESERVED}]", "_", stem)  # a dot parts names within tars
        mask = None if mask is None else (mask.float() * 255).round() / 255
        return cls(str(Key(concept, stem, digest8(pixels))), pixels, mask, caption)

    @property
    def stem(self) -> str:
        """The file's name without ending."""
        return Key.parse(self.key).stem


@dataclass(frozen=True, eq=False)
class Concept:
    """Pictures of one thing. group: "id", "od" or None. digest: a hash of all of it."""

    name: str
    images: tuple[ConceptImage, ...]
    group: str | None = None
    digest: str = ""

    @classmethod
    def of(cls, name: str, images: Sequence[ConceptImage], group: str | None = None) -> "Concept":
        """The concept with its digest. Raises DataError for a name that keys cannot hold, and for no or equal keys."""
        if re.search(rf"^$|^\.|[{RESERVED}]|^masks?$", name, re.IGNORECASE):
            raise DataError(
                f"{name!r} cannot name a concept: keys use # @ : and / themselves, and folders called mask hold "
                "masks.\n  Rename its folder."
            )
        keys = [image.key for image in images]
        if len(set(keys)) < len(keys) or not keys:
            twice = next((k for k in keys if keys.count(k) > 1), None)
            raise DataError(f"concept {name} has {'no picture' if twice is None else f'picture {twice} twice'}.")
        out = hashlib.sha256(f"{name}\n{group}".encode())
        for image in images:
            out.update(f"\n{image.key}\n{image.caption}\n{tuple(image.pixels.shape)}\n".encode())
            out.update(image.pixels.contiguous().numpy().tobytes())
            out.update(b"" if image.mask is None else (image.mask * 255).round().to(torch.uint8).numpy().tobytes())
        return cls(name, tuple(images), group, out.hexdigest())

    def leave_out(self, number: int) -> tuple["Concept", ConceptImage]:
        """The concept without the picture of this number, counted from 0 by stem, and that picture.

        What was learned from the others is scored on it: on pictures it was learned from, a word scores too high.
        Raises DataError if it has no such picture, or no other.
        """
        left = sorted(self.images, key=lambda image: image.stem)[number : number + 1]
        rest = [image for image in self.images if image not in left]
        if not left or not rest:
            raise DataError(
                f"picture {number} of {self.name} cannot be left out: it has {len(self.images)}, counted from 0, and "
                "one at least must stay."
            )
        return Concept.of(self.name, rest, self.group), left[0]


def digest8(pixels: Tensor) -> str:
    """8 hex digits that tell pixels uint8 [3, H, W] apart."""
    out = hashlib.blake2b(str(tuple(pixels.shape)).encode(), digest_size=4)
    out.update(pixels.cpu().contiguous().numpy().tobytes())
    return out.hexdigest()
