"""What a data set folder says about itself: `manifest.json` beside plain tar shards.

The manifest is written last and read first, so a folder without one is unfinished by definition. It carries the class
names, how many samples and which bytes each shard has, and where the images come from.
"""

import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from poisonshield.data.remote import join_address, read_small, show_address
from poisonshield.errors import DataError
from poisonshield.files import read_bounded, write_whole
from poisonshield.plain import is_plain, plain, plain_values

FILE_NAME = "manifest.json"
SHARD_ENDINGS = (".tar", ".tar.gz")
MAX_BYTES = 2**26
"""Of a manifest.json: a shard takes some 130, a class name its length."""


def refuse_address(place: str | Path, *, role: str = "data set") -> None:
    """Raise DataError for `pipe:` commands and URLs: a place that is local runs no program and reaches no network."""
    if match := re.match(r"\s*([a-zA-Z][a-zA-Z0-9+.-]+):", str(place)):
        kind = "is a command to run" if match[1].lower() == "pipe" else "is an address"
        raise DataError(
            f"{role} {str(place)!r} {kind}, a local path was wanted.\n"
            "  Copy it to a local or mounted folder and give its path. Training alone reads from afar, a data set by\n"
            "  the address of its folder: data.train=https://HOST/SET, or s3://, gs://, hf:// and the like."
        )


class ShardInfo(BaseModel):
    """One shard: its sample count, its size and the sha256 of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int = Field(ge=1, description="How many it holds.")
    bytes: int = Field(ge=1, description="The file's size.")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Of the whole file.")


class Manifest(BaseModel):
    """The contents of `manifest.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["poisonshield/1"] = Field("poisonshield/1", description="Of the folder, with its version.")
    classes: tuple[str, ...] = Field(min_length=1, description="Names, label 0 first.")
    image_size: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = Field(
        description="[H, W], or null where sizes differ; then images can be read one by one only."
    )
    samples: int = Field(ge=1, description="How many all shards hold together.")
    shards: dict[str, ShardInfo] = Field(min_length=1, description="What each has, by file name.")
    provenance: str = Field("", description="Where the images come from, for people.")
    poison: dict[str, Any] | None = Field(
        None, description="null for clean data; else how the pixels were changed, written by whoever changed them."
    )

    @field_validator("classes")
    @classmethod
    def _classes_are_distinct(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted(c for c, count in Counter(classes).items() if count > 1):
            raise ValueError(f"class names appear twice: {', '.join(twice[:5])}")
        if odd := next((c for c in classes if not is_plain(c)), None):
            raise ValueError(f"class name {plain(odd)!r} has control characters")
        return classes

    @field_validator("provenance", "poison")
    @classmethod
    def _texts_are_plain(cls, value: Any) -> Any:
        return plain_values(value)

    @field_validator("shards")
    @classmethod
    def _shards_are_plain_names(cls, shards: dict[str, ShardInfo]) -> dict[str, ShardInfo]:
        for name in shards:
            refuse_address(name, role="shard")
            if not is_plain(name):
                raise ValueError(f"shard {name!r} has control characters in its name")
            if not name.endswith(SHARD_ENDINGS) or "/" in name or "\\" in name:
                raise ValueError(f"shard {name!r} must be a file name in this folder that ends in .tar or .tar.gz")
            if len(name) > 200:
                raise ValueError(f"shard {name[:40]}... has {len(name)} letters in its name, 200 are the most")
        return shards

    @property
    def digest(self) -> str:
        """sha256 over the shard hashes in order: one name for exactly these bytes."""
        return hashlib.sha256("\n".join(s.sha256 for s in self.shards.values()).encode()).hexdigest()

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest":
        """The manifest of a data set folder. Raises DataError if it is missing, is no JSON, or a field is wrong."""
        refuse_address(folder)
        path = Path(folder) / FILE_NAME
        if not os.path.lexists(path):
            raise DataError(
                f"{folder} has no {FILE_NAME}, so it is not a data set, or writing it was interrupted.\n"
                f"  Write it again, or make one from images or tars: poisonshield data import SRC --out {folder}"
            )
        return cls._parse(read_bounded(path, max_bytes=MAX_BYTES, what="manifest"), str(path), str(folder))

    @classmethod
    def fetch(cls, address: str) -> "Manifest | None":
        """The manifest of a data set behind an address, None if there is none. Raises DataError as `load` does."""
        content = read_small(join_address(address, FILE_NAME), max_bytes=MAX_BYTES)
        return None if content is None else cls._parse(content, f"{FILE_NAME} of {show_address(address)}", "DIR")

    @classmethod
    def _parse(cls, content: bytes, path: str, folder: str) -> "Manifest":
        found = _parse_json(content, path)
        if isinstance(found, dict) and "format" not in found:
            raise DataError(
                f"{path} has no 'format' field, 'poisonshield/1' was wanted: it describes other shards.\n"
                f"  Bring them in with: poisonshield data import {folder} --out DIR"
            )
        try:
            manifest = cls.model_validate(found)
        except ValidationError as err:
            lines = [plain(f"  {'.'.join(map(str, e['loc'])) or 'manifest'}: {e['msg']}") for e in err.errors()[:10]]
            raise DataError("\n".join([f"{path} does not describe a data set:", *lines])) from err
        if (total := sum(s.samples for s in manifest.shards.values())) != manifest.samples:
            raise DataError(f"{path} says {manifest.samples} samples, its shards add up to {total}. Copy it again.")
        return manifest

    def save(self, folder: str | Path) -> None:
        """Write `manifest.json` whole or not at all."""
        write_whole(Path(folder) / FILE_NAME, self.text)

    @property
    def text(self) -> str:
        """What the file holds."""
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    """What a manifest.json holds. Raises DataError for what is no plain file, too long, or no JSON."""
    return _parse_json(read_bounded(path, max_bytes=MAX_BYTES, what="manifest"), str(path))


def _parse_json(content: bytes, path: str) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as err:
        raise DataError(f"{path} is not readable JSON ({err}).\n  Copy the data set again.") from err
