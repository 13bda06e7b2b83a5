"""The key language of concept pictures: a key says which pixels a sample has, so other pixels have another key.

    hat/red 3@5f0e1c2a:flip~noise4#7
    |   |     |       |    |      |
    |   |     |       |    |      slot: the sample's number in its concept's batch; no other part of the key is about it
    |   |     |       |    background: ~noise4 is noise of draw 4, ~on~hat/red 1@77ab01cd is that picture's
    |   |     |       :flip where the picture is mirrored
    |   |     digest: hexadecimal digits, a hash of the pixels before these changes
    |   stem: the file's name without its ending
    concept

Concept, stem and digest are always there, the rest where it applies. Keys of samples in shards are plain names, such as
train/dog/3 or test-00042: they are not of this language, and of what is here only `picture_of` takes them.
"""

import re
from dataclasses import dataclass, replace

from poisonshield.errors import DataError

RESERVED = "#@:/"
"""What parts a key; no concept and no stem holds any of it."""

_KEY = re.compile(
    rf"(?P<concept>[^{RESERVED}]+)/(?P<stem>[^{RESERVED}]*)@(?P<digest>[0-9a-f]+)(?P<flip>:flip)?"
    r"(?:~noise(?P<noise>0|[1-9][0-9]*)|~on~(?P<other>[^#]+))?(?:#(?P<slot>0|[1-9][0-9]*))?"
)


@dataclass(frozen=True)
class Key:
    """One key in its parts; `str` writes it, `Key.parse` reads it, and one undoes the other.

    background: an int is noise of that draw, a Key is the picture whose background it is, None the picture's own.
    Raises DataError for parts that no key holds.
    """

    concept: str
    stem: str
    digest: str
    flipped: bool = False
    background: "int | Key | None" = None
    slot: int | None = None

    def __post_init__(self) -> None:
        names = re.fullmatch(f"[^{RESERVED}]+/[^{RESERVED}]*@[0-9a-f]+", f"{self.concept}/{self.stem}@{self.digest}")
        match self.background:
            case None:
                fits = True
            case Key():
                fits = self.background.slot is None
            case draw:
                fits = draw >= 0
        if names is None or not fits or (self.slot or 0) < 0:
            raise DataError(
                f"{self.concept!r} cannot name a concept, or {self.stem!r} a picture, or another part does not fit: "
                f"{self}.\n  Keys use # @ : and / themselves: rename the folder or the file."
            )

    @classmethod
    def parse(cls, text: str) -> "Key":
        """The parts of a key. Raises DataError for any other text."""
        found = _KEY.fullmatch(text)
        if found is None:
            raise DataError(
                f"{text!r} is no key of a concept's picture; concept/stem@hash is wanted, then maybe :flip, "
                "~noise3 or ~on~ with another key, and #slot.\n"
                "  Keys of samples in shards are plain names and say nothing of concepts."
            )
        noise, other, slot = found["noise"], found["other"], found["slot"]
        return cls(
            found["concept"],
            found["stem"],
            found["digest"],
            flipped=found["flip"] is not None,
            background=int(noise) if noise is not None else None if other is None else cls.parse(other),
            slot=None if slot is None else int(slot),
        )

    def __str__(self) -> str:
        match self.background:
            case None:
                ground = ""
            case Key():
                ground = f"~on~{self.background}"
            case draw:
                ground = f"~noise{draw}"
        slot = "" if self.slot is None else f"#{self.slot}"
        return f"{self.concept}/{self.stem}@{self.digest}{':flip' if self.flipped else ''}{ground}{slot}"

    @property
    def picture(self) -> "Key":
        """The key without its slot: what stands for the pixels, however often they are in a batch."""
        return replace(self, slot=None)


def picture_of(key: str) -> str:
    """The part of any sample's key that stands for its pixels: all before a `#`. Takes plain names too."""
    return key.partition("#")[0]


def slot_of(key: str) -> int:
    """The number behind the `#` of any sample's key. Raises DataError if it has none."""
    slot = key.rpartition("#")[2] if "#" in key else ""
    if not (slot.isascii() and slot.isdigit()):
        raise DataError(
            f"key {key!r} has no slot, a key that ends in # and a number was wanted, as a concept stream's do."
        )
    return int(slot)
