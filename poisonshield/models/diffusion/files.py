"""What a diffusers folder must hold before it is read: the settings of every part, and its weights, whole.

The libraries that read it fill what is missing with random numbers or an empty vocabulary, or fail far from the file.
"""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from poisonshield.errors import ConfigError, DataError
from poisonshield.files import read_bounded
from poisonshield.models.diffusion.family import refuse_code, refuse_other_family, refuse_without_unet
from poisonshield.models.diffusion.pickles import check_pickled

log = logging.getLogger(__name__)

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


_MAX_JSON = 2**25  # bytes of a part's settings or of an index; a vocabulary has some millions
_MAX_HEADER = 2**24  # bytes of what a safetensors file says of its tensors: a U-Net needs some hundred thousand
_SINGLE_FILE = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")


def check_folder(path: Path) -> dict[str, str | None]:
    """The variant of each part's weights: "fp16" where their files are called so, None for plain names.

    Raises ConfigError for a folder that is no Stable Diffusion pipeline, naming what it is, and DataError naming a file
    that is damaged or asks for code.
    """
    _refuse_no_folder(path)
    index = _read_json(path / "model_index.json") if (path / "model_index.json").is_file() else {}
    refuse_code(path / "model_index.json", index)
    refuse_without_unet(path, index)
    settings = {}
    for part, name in _SETTINGS.items():
        if not (path / part / name).is_file():
            raise ConfigError(
                f"{path} is no Stable Diffusion folder: {part}/{name} is missing.\n"
                "  Give a folder that diffusers' save_pretrained wrote, or `tiny` for the shipped pipeline."
            )
        settings[part] = _read_json(path / part / name)
        refuse_code(path / part / name, settings[part])
        if (path / part / "adapter_config.json").exists():
            raise DataError(f"{path / part} has an adapter (adapter_config.json). Merge it into the weights first.")
    refuse_other_family(path, index, settings)
    variants: dict[str, str | None] = {}
    # The tokenizer and the scheduler have no weights.
    for part in _WEIGHTS:
        files, variants[part] = _weights(path / part)
        for file in files:
            _check_weights(file)
    for file in _vocabulary(path / "tokenizer"):
        _refuse_pointer(file)
    return variants


def _refuse_no_folder(path: Path) -> None:
    if path.is_file() and path.suffix.lower() in _SINGLE_FILE:
        raise ConfigError(
            f"{path} is a single file, and a folder is read: the file has no vocabulary and no settings. Write the "
            'folder once, with\n    python -c "from diffusers import StableDiffusionPipeline as P; '
            f"P.from_single_file('{path}').save_pretrained('{path.stem}')\""
        )
    if not path.is_dir():
        raise ConfigError(
            f"{path} is no folder. Give a Stable Diffusion folder, or `tiny` for the shipped pipeline.\n"
            "  Nothing is fetched here; `hf download NAME --local-dir FOLDER` fetches a pipeline by its name."
        )


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


def _weights(part: Path) -> tuple[list[Path], str | None]:
    """The files that hold a part's weights, and the variant in their names.

    Raises DataError if there is none, a part of many is missing, or it is not clear which variant is meant.
    """
    for name in _WEIGHTS[part.name]:
        if found := _files_of(part, name, None):
            return found, None
    variants = {name: _variants(part, name) for name in _WEIGHTS[part.name]}
    known = sorted(set().union(*variants.values()))
    if not known:
        raise DataError(f"{part / _WEIGHTS[part.name][0]} is missing: the part has settings and no weights.\n{_AGAIN}.")
    if len(known) > 1:
        raise DataError(
            f"{part} has weights in the variants {', '.join(known)} and none without: which one is meant?\n"
            "  Keep the files of one."
        )
    log.info("%s: the weights of the variant %s are read", part, known[0])
    name = next(name for name, found in variants.items() if found)
    return _files_of(part, name, known[0]), known[0]


def _files_of(part: Path, name: str, variant: str | None) -> list[Path]:
    """The files of a part's weights under this name; a large one lies in several files, and an index says which."""
    stem, _, ending = name.rpartition(".")
    whole = part / (name if variant is None else f"{stem}.{variant}.{ending}")
    index = part / (f"{name}.index.json" if variant is None else f"{name}.index.{variant}.json")
    if whole.is_file() or not index.is_file():
        return [whole] if whole.is_file() else []
    named = _read_json(index).get("weight_map")
    if not isinstance(named, dict):
        raise DataError(f"{index} has no table weight_map, which says what lies in which file.\n{_AGAIN}.")
    for shard in named.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise DataError(f"{index} names {shard!r}, and a file in its own folder is wanted.\n{_AGAIN}.")
        if not (part / shard).is_file():
            raise DataError(f"{part / shard} is missing, and {index.name} names it.\n{_AGAIN}.")
    return [part / shard for shard in sorted(set(named.values()))]


def _variants(part: Path, name: str) -> set[str]:
    """Which variants there are of these weights."""
    stem, _, ending = name.rpartition(".")
    wholes = re.compile(rf"{re.escape(stem)}\.(\w+)\.{ending}")
    indices = re.compile(rf"{re.escape(name)}\.index\.(\w+)\.json")
    matches = (pattern.fullmatch(file.name) for file in part.iterdir() for pattern in (wholes, indices))
    return {match[1] for match in matches if match}


def _vocabulary(tokenizer: Path) -> list[Path]:
    whole, parts = tokenizer / "tokenizer.json", [tokenizer / "vocab.json", tokenizer / "merges.txt"]
    found = [file for file in parts if file.is_file()]
    if len(found) < 2 and not whole.is_file():
        missing = next(file for file in parts if file not in found)
        raise DataError(f"{missing} is missing: the tokenizer would know no words.\n{_AGAIN}, or tokenizer.json.")
    return [*found, *([whole] if whole.is_file() else [])]


def _check_weights(file: Path) -> None:
    _refuse_pointer(file)
    if file.suffix != ".safetensors":
        check_pickled(file, name=str(file), size=file.stat().st_size)
        return
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
    if size > min(_MAX_HEADER, file.stat().st_size):
        raise DataError(f"{file} is damaged or not all there: its header claims {size:,} bytes.\n{_AGAIN}.")
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as err:
        raise DataError(f"{file} is damaged or not all there: {err}.\n{_AGAIN}.") from err


def _read_json(file: Path) -> dict:
    _refuse_pointer(file)
    data = read_bounded(file, max_bytes=_MAX_JSON, what="settings")
    try:
        return dict(json.loads(data))
    except (ValueError, TypeError, RecursionError) as err:
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
