"""What lies where in folders and tars of concepts: which file is a picture, which its mask, and what its JSON says.

No picture is decoded here. Where names leave open what belongs together, that is an error.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from poisonshield.data.index import split_name
from poisonshield.data.masks import is_mask_folder, stem_of_mask
from poisonshield.data.pictures import ENDINGS, find_pictures
from poisonshield.data.tars import file_in
from poisonshield.errors import DataError

log = logging.getLogger(__name__)

FORMS = (
    "  Wanted: a folder of pictures; a folder of such folders, one a concept; or WebDataset tars\n"
    "  (key.png, key.mask.png, key.json)."
)


@dataclass(frozen=True)
class Sample:
    """One picture before it is read. name, mask_name: how errors call it and its mask. about: its JSON."""

    stem: str
    name: str
    picture: Path | bytes
    mask: Path | bytes | None = None
    mask_name: str = ""
    about: dict[str, Any] = field(default_factory=dict)


def in_folders(root: Path) -> dict[str, list[Sample]]:
    """The pictures of each concept, in order of their paths."""
    folders = [p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    alone = find_pictures(root, nested=False)
    if alone and (others := [p for p in folders if not is_mask_folder(p.name) and _in_folder(p)]):
        raise DataError(
            f"{alone[0]} lies beside {others[0]}, which holds pictures too: is this one concept or several?\n"
            "  Put the pictures of each concept into a folder of its own."
        )
    if alone or any(p.name.lower() in ("mask", "masks") for p in folders):
        folders = [root.resolve()]
    found = {folder.name: _in_folder(folder) for folder in folders}
    if not any(found.values()):
        raise DataError(f"{root} holds no picture.\n{FORMS}")
    if empty := [name for name, samples in found.items() if not samples]:
        log.warning("%s: no picture in %s; left out.", root, ", ".join(empty))
    return {name: samples for name, samples in found.items() if samples}


def _in_folder(folder: Path) -> list[Sample]:
    pictures: dict[str, Path] = {}
    masks: dict[str, Path] = {}
    for path in find_pictures(folder):
        stem = stem_of_mask(path.relative_to(folder))
        table, stem = (pictures, path.stem) if stem is None else (masks, stem)
        if stem in table:
            raise DataError(
                f"{table[stem]} and {path} have one name, and a concept's pictures are told apart by it.\n"
                "  Rename one, or move the folder of other versions of the same pictures elsewhere."
            )
        table[stem] = path
    samples = []
    for stem, path in pictures.items():
        beside = path.with_name(f"{stem}.json")
        about = _fields(beside.read_bytes(), str(beside)) if beside.is_file() else {}
        samples.append(Sample(stem, str(path), path, masks.get(stem), str(masks.get(stem)), about))
    return samples


def in_tars(tars: Sequence[Path]) -> dict[str, list[Sample]]:
    """The samples of WebDataset tars by the concept that their JSON names, else by the folder in their key."""
    found: dict[str, list[Sample]] = {}
    for tar in tars:
        for key, fields in _read_tar(tar).items():
            images = [e for e in fields if f".{e}" in ENDINGS]
            if len(images) != 1:
                raise DataError(f"sample {key} in {tar} has {len(images)} pictures, one is wanted.\n{FORMS}")
            about = _fields(fields["json"], f"{key}.json in {tar}") if "json" in fields else {}
            folder, _, stem = key.rpartition("/")
            concept = about.get("concept") or folder.rpartition("/")[2] or tar.name.partition(".")[0]
            sample = Sample(
                stem,
                f"{key}.{images[0]} in {tar}",
                fields[images[0]],
                fields.get("mask.png"),
                f"{key}.mask.png in {tar}",
                about,
            )
            if any(stem == other.stem for other in found.setdefault(concept, [])):
                raise DataError(f"{sample.name}: concept {concept} has a picture {stem} already. Rename one of them.")
            found[concept].append(sample)
    return dict(sorted(found.items()))


def _read_tar(path: Path) -> dict[str, dict[str, bytes]]:
    """{sample key: {field: bytes}} of plain files. A tar that is cut or damaged is an error, in headers too."""
    import tarfile

    samples: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                if not member.isfile() or member.name.rpartition("/")[2].startswith("."):
                    continue
                key, extension = split_name(member.name)
                if extension in samples.setdefault(key, {}):
                    raise tarfile.ReadError(f"{member.name} is in it twice")
                samples[key][extension] = file_in(tar, member)
            # tarfile takes a damaged header for the end and says nothing; the true end is a block of zeros
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("a damaged header, or no end mark")
    except (tarfile.TarError, OSError, EOFError, ValueError) as err:
        raise DataError(f"{path} cannot be read as a tar ({err}). Copy it again from its source.\n{FORMS}") from err
    if not samples:
        raise DataError(f"{path} holds no sample.\n{FORMS}")
    return samples


def _fields(data: bytes, name: str) -> dict[str, Any]:
    """A picture's JSON: concept, group and caption are texts or null; the rest is not looked at."""
    try:
        about = json.loads(data)
    except ValueError as err:
        raise DataError(f"{name} is not JSON: {err}.") from err
    wrong = not isinstance(about, dict) or any(
        not isinstance(about.get(k), str | None) for k in ("concept", "group", "caption")
    )
    if wrong:
        raise DataError(f"{name}: a table with the texts concept, group and caption is wanted.")
    return about
