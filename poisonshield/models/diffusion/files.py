"""What a diffusers folder must hold before it is read: the settings of every part, and its weights, whole.

The libraries that read it fill what is missing with random numbers or an empty vocabulary, or fail far from the file.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from poisonshield.errors import ConfigError, DataError

_SETTINGS = {
    "vae": "config.json",
    "unet": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
_NETWORK = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_WEIGHTS = {"vae": _NETWORK, "unet": _NETWORK, "text_encoder": ("model.safetensors", "pytorch_model.bin")}
_POINTER = b"version https://git-lfs"
_AGAIN = "  Copy or download it again"


def check_folder(path: Path) -> None:
    """Raises ConfigError for a folder that is no Stable Diffusion pipeline, DataError naming a file that is damaged."""
    for part, name in _SETTINGS.items():
        if not (path / part / name).is_file():
            raise ConfigError(
                f"{path} is no Stable Diffusion folder: {part}/{name} is missing.\n"
                "  Give a folder that diffusers' save_pretrained wrote, or `tiny` for the shipped pipeline."
            )
        _read_json(path / part / name)
    # The tokenizer and the scheduler have no weights.
    for part in _WEIGHTS:
        for file in _weights(path / part):
            _check_weights(file)
    for file in _vocabulary(path / "tokenizer"):
        _refuse_pointer(file)


@contextmanager
def reading(part: Path) -> Iterator[None]:
    """What goes wrong while a part is read becomes a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except Exception as err:  # the libraries raise many kinds; few of them name the file
        raise DataError(
            f"{part} cannot be read: {err}\n{_AGAIN}, all of its files from one and the same source."
        ) from err


def refuse_missing(part: Path, missing: list[str]) -> None:
    """Raise DataError if weights that the network has are not in its file: they would be random numbers."""
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(
            f"{part}: the weights lack {', '.join(sorted(missing)[:3])}{more}, which its config.json asks for.\n"
            f"{_AGAIN}, both from one and the same source."
        )


def _weights(part: Path) -> list[Path]:
    """The files that hold a part's weights. Raises DataError if there is none, or a part of many is missing."""
    # A large part lies in several files, and an index says which.
    names = [f"{name}{index}" for name in _WEIGHTS[part.name] for index in ("", ".index.json")]
    found = next((part / name for name in names if (part / name).is_file()), None)
    if found is None:
        raise DataError(
            f"{part / names[0]} is missing: the part has settings and no weights.\n"
            f"{_AGAIN}; files with a variant in their name, such as fp16, are not looked for: rename them."
        )
    if found.suffix != ".json":
        return [found]
    shards = sorted({part / name for name in _read_json(found).get("weight_map", {}).values()})
    for shard in shards:
        if not shard.is_file():
            raise DataError(f"{shard} is missing, and {found.name} names it.\n{_AGAIN}.")
    return shards


def _vocabulary(tokenizer: Path) -> list[Path]:
    whole, parts = tokenizer / "tokenizer.json", [tokenizer / "vocab.json", tokenizer / "merges.txt"]
    found = [file for file in parts if file.is_file()]
    if len(found) < 2 and not whole.is_file():
        missing = next(file for file in parts if file not in found)
        raise DataError(f"{missing} is missing: the tokenizer would know no words.\n{_AGAIN}, or tokenizer.json.")
    return [*found, *([whole] if whole.is_file() else [])]


def _check_weights(file: Path) -> None:
    _refuse_pointer(file)
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as err:
            raise DataError(f"{file} is damaged or not all there: {err}.\n{_AGAIN}.") from err


def _read_json(file: Path) -> dict:
    _refuse_pointer(file)
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as err:
        raise DataError(f"{file} is not valid JSON: {err}.\n{_AGAIN}.") from err


def _refuse_pointer(file: Path) -> None:
    with file.open("rb") as stream:
        start = stream.read(len(_POINTER))
    if start == _POINTER:
        raise DataError(
            f"{file} is a pointer of Git LFS in the place of the file itself.\n  Run `git lfs pull` in its repository."
        )
    if not start:
        raise DataError(f"{file} is empty.\n{_AGAIN}.")
