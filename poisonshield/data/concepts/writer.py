"""Concepts to folders and WebDataset tars, without loss: load_concepts reads them back equal."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from poisonshield.data.concepts import Concept
from poisonshield.data.decode import encode_png
from poisonshield.data.index import split_name
from poisonshield.data.tars import tar_writer
from poisonshield.errors import DataError
from poisonshield.files import draft_of, tell_of_disk


def write_concepts(
    concepts: Sequence[Concept], path: str | Path, *, about: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Writes PNG pictures, masks and JSON without loss, as a new folder, or as a WebDataset tar if it ends in .tar.

    load_concepts reads them back equal. about: more JSON fields by picture key, such as what poisoned it. All of it is
    written or nothing. Raises DataError if the path exists, or two pictures would have one name; StorageError.
    """
    path = Path(path)
    if path.exists():
        raise DataError(f"{path} exists already and is not overwritten. Remove it, or choose another path.")
    if unknown := (about or {}).keys() - {image.key for concept in concepts for image in concept.images}:
        raise DataError(f"`about` tells of {sorted(unknown)[0]}, which is no key of these pictures.")
    files: dict[str, bytes] = {}
    for concept in concepts:
        for image in concept.images:
            key = f"{concept.name}/{image.stem}"
            if f"{key}.png" in files:
                raise DataError(f"two pictures would be written as {key}.png. Rename one of them.")
            files[f"{key}.png"] = encode_png(image.pixels, name=key)
            if image.mask is not None:
                files[f"{key}.mask.png"] = encode_png((image.mask * 255).round().to(torch.uint8), name=key)
            fields = {"concept": concept.name, "group": concept.group, "caption": image.caption}
            fields |= (about or {}).get(image.key, {})
            files[f"{key}.json"] = json.dumps(fields, sort_keys=True, ensure_ascii=False).encode()
    temporary = draft_of(path)
    with tell_of_disk(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            (_write_tar if path.suffix == ".tar" else _write_folder)(files, temporary)
            temporary.rename(path)
        finally:
            if temporary.exists():
                temporary.unlink() if temporary.is_file() else shutil.rmtree(temporary)


def _write_folder(files: Mapping[str, bytes], folder: Path) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def _write_tar(files: Mapping[str, bytes], path: Path) -> None:
    samples: dict[str, dict[str, Any]] = {}
    for name, data in files.items():
        key, extension = split_name(name)
        samples.setdefault(key, {"__key__": key})[extension] = data
    with open(path, "wb") as file, tar_writer(file) as writer:
        for sample in samples.values():
            writer.write(sample)
