"""Data sets as tar shards with a manifest, and streams over them.

Importing this loads neither webdataset nor torchvision: they are imported where an image or a tar is first touched.
"""

from pathlib import Path

from poisonshield.data.cache import DEFAULT_GIB
from poisonshield.data.manifest import FILE_NAME, Manifest, refuse_address
from poisonshield.data.remote import is_address, join_address, show_address
from poisonshield.data.resident import ResidentSource
from poisonshield.data.shards import ShardSet, Verify
from poisonshield.data.source import Source, read_batch
from poisonshield.data.stream import ShardStream, evaluate_batches
from poisonshield.errors import ConfigError
from poisonshield.registry import suggest

__all__ = [
    "Manifest",
    "ResidentSource",
    "ShardSet",
    "ShardStream",
    "Source",
    "bundled_names",
    "evaluate_batches",
    "open_dataset",
    "read_batch",
]

_BUNDLED = Path(__file__).parent / "bundled"


def bundled_names() -> list[str]:
    """Data sets that come with the package."""
    return sorted({p.parent.parent.name for p in _BUNDLED.glob(f"*/*/{FILE_NAME}")})


def open_dataset(
    name_or_path: str | Path,
    split: str = "train",
    *,
    verify: Verify = "always",
    cache: float = DEFAULT_GIB,
    bad_limit: int = 0,
) -> ShardSet:
    """A data set by bundled name, by folder or address with manifest.json, or one with SPLIT/manifest.json; verified.

    A folder wins over a bundled name only when written as a path (`./cifar10-mini`). Raises ConfigError with the
    nearest bundled name if there is no such data set, DataError if it is damaged (see ShardSet.open).
    """
    return ShardSet.open(find_folder(name_or_path, split), verify=verify, cache=cache, bad_limit=bad_limit)


def find_folder(name_or_path: str | Path, split: str = "train") -> Path | str:
    """Where `open_dataset` finds the data set: a folder, or an address. Raises ConfigError as it does."""
    if is_address(name_or_path):
        return _find_afar(str(name_or_path), split)
    refuse_address(name_or_path)
    if str(name_or_path) in bundled_names():
        folder = _BUNDLED / str(name_or_path)
    else:
        folder = Path(name_or_path)
    for candidate in (folder, folder / split):
        if (candidate / FILE_NAME).is_file():
            return candidate
    state = f"has neither {FILE_NAME} nor {split}/{FILE_NAME}" if folder.is_dir() else "is not a folder"
    raise ConfigError(
        f"{str(name_or_path)!r} is not a data set: it {state}, and is no bundled name."
        f"{suggest(str(name_or_path), bundled_names())}\n"
        f"  Bundled: {', '.join(bundled_names()) or 'none'}. From own images: poisonshield data import SRC --out DIR"
    )


def _find_afar(address: str, split: str) -> str:
    for candidate in (address, join_address(address, split)):
        if Manifest.fetch(candidate) is not None:
            return candidate
    raise ConfigError(
        f"{show_address(address)} is not a data set: it has neither {FILE_NAME} nor {split}/{FILE_NAME}.\n"
        "  Make one with poisonshield data import, and put its whole folder there."
    )
