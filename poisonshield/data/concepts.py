"""Concepts: a few pictures each of one thing, with masks of it, from folders, tars or the rendered world.

Pictures are cut and resized here, once, and each mask with the same crop. They are held in memory: a concept is five
pictures, not five million. A picture's key names its concept, its file and a hash of its pixels, so that whatever
changes the pixels changes the key.
"""

import hashlib
import io
import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from poisonshield.data import world
from poisonshield.data.decode import encode_png
from poisonshield.data.index import split_name
from poisonshield.data.masks import is_mask_folder, read_mask, refuse_empty, stem_of_mask, too_deep
from poisonshield.data.tars import tar_writer
from poisonshield.data.tree import IMAGE_ENDINGS
from poisonshield.errors import ConfigError, DataError
from poisonshield.registry import suggest

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

IN_DISTRIBUTION = ("BlackKeyboard", "CautionSign", "CokeCan", "EuroCoin", "MetalWrench")
OUT_OF_DISTRIBUTION = ("BlueElephant", "ButterflyClip", "CatPaw", "FishDoll", "MonkeySleigh")
"""NovelConcepts10 (Styborski et al. 2025): concepts that Stable Diffusion's training data shows, and that it does not."""

_GROUPS = {n.lower(): "id" for n in IN_DISTRIBUTION} | {n.lower(): "od" for n in OUT_OF_DISTRIBUTION}
_FORMS = (
    "  Wanted: a folder of pictures; a folder of such folders, one a concept; or WebDataset tars\n"
    "  (key.png, key.mask.png, key.json)."
)


@dataclass(frozen=True, eq=False)
class ConceptImage:
    """pixels uint8 [3, S, S]; mask float32 [1, S, S] in [0, 1], multiples of 1/255, or None; key
    "<concept>/<stem>@<8 hex of the pixels>"."""

    key: str
    pixels: Tensor
    mask: Tensor | None = None
    caption: str = ""

    @classmethod
    def of(
        cls, concept: str, stem: str, pixels: Tensor, mask: Tensor | None = None, caption: str = ""
    ) -> "ConceptImage":
        """The picture under the key that its pixels give it. mask: rounded to 8 bits, as files hold it."""
        stem = re.sub(r"[.#@:/]", "_", stem)  # they part keys, and names within tars
        mask = None if mask is None else (mask.float() * 255).round() / 255
        return cls(f"{concept}/{stem}@{digest8(pixels)}", pixels, mask, caption)

    @property
    def stem(self) -> str:
        """The file's name without ending."""
        return self.key.rpartition("@")[0].partition("/")[2]


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
        if re.search(r"^$|^\.|[#@:/]|^masks?$", name, re.IGNORECASE):
            raise DataError(
                f"{name!r} cannot name a concept: keys use # @ : and / themselves, and folders called mask hold masks.\n"
                "  Rename its folder."
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


def digest8(pixels: Tensor) -> str:
    """8 hex digits that tell pixels uint8 [3, H, W] apart."""
    out = hashlib.blake2b(str(tuple(pixels.shape)).encode(), digest_size=4)
    out.update(pixels.cpu().contiguous().numpy().tobytes())
    return out.hexdigest()


def load_concepts(
    root: str | Path,
    *,
    size: int,
    names: Sequence[str] | None = None,
    crop: Literal["center", "squash"] = "center",
    masks: Literal["file", "alpha"] | None = None,
    group: Literal["all", "id", "od"] = "all",
) -> tuple[Concept, ...]:
    """The concepts of a folder of pictures (one), of a folder of such folders, or of WebDataset tars; sorted by name.

    Within a concept's folder pictures may lie in any folder. size: pixels of a side; the largest centred square is cut
    out ("center") or the aspect given up ("squash"), then resized (bicubic, antialiased; masks nearest).
    names: only these, in this order. group: only these of NovelConcepts10, or of what a picture's JSON says.
    masks: "file" is `<stem>.mask.png` beside the picture or `masks/<stem>.png`; "alpha" the picture's own alpha, its
    colours kept as they are; None reads none. Captions come from `<stem>.json` or the file's name,
    "" if that has no letter.
    Raises DataError naming the file for a picture or mask that is missing, unreadable, empty or of another size.
    """
    if size < 1 or crop not in ("center", "squash") or masks not in (None, "file", "alpha"):
        raise ConfigError(
            f"size {size}, crop {crop!r}, masks {masks!r}: size >= 1, crop center or squash, masks file, alpha or null."
        )
    root = Path(root)
    if not root.exists():
        raise DataError(f"{root} does not exist.\n{_FORMS}")
    tars = (
        [root] if root.is_file() else sorted(p for p in root.iterdir() if p.name.endswith((".tar", ".tar.gz", ".tgz")))
    )
    found = _in_tars(tars) if tars else _in_folders(root)
    chosen = _chosen(root, found, names, group)
    return tuple(_concept(name, found[name], size=size, crop=crop, masks=masks) for name in chosen)


def rendered_concepts(
    count: int = 5,
    *,
    seed: int,
    kinds: Sequence[tuple[str, str]] = world.HELD_OUT,
    size: int = world.SIZE,
    masks: bool = True,
) -> tuple[Concept, ...]:
    """`count` pictures of each (colour, shape) of the rendered world, with exact masks; named e.g. "yellow_ring".

    By default the kinds that no training picture shows (group "od"). A kind's pictures do not depend on the others.
    seed: another one than the pipeline's training pictures had.
    """
    concepts = []
    for color, shape in kinds:
        name, images = f"{color}_{shape}", []
        first = 1000 * (list(world.COLORS).index(color) * len(world.SHAPES) + world.SHAPES.index(shape))
        for i in range(count):
            picture = world.render(first + i, seed=seed, only=[(color, shape)])
            pixels, mask = (picture.x * 255).round().to(torch.uint8), (picture.mask * 255).round().to(torch.uint8)
            pixels, mask = _fit(_pillow(pixels), size, "center"), _fit(_pillow(mask), size, "center", nearest=True)
            images.append(
                ConceptImage.of(name, f"{i:02d}", pixels, mask.float() / 255 if masks else None, f"a {color} {shape}")
            )
        concepts.append(Concept.of(name, images, "od" if (color, shape) in world.HELD_OUT else "id"))
    return tuple(concepts)


def write_concepts(
    concepts: Sequence[Concept], path: str | Path, *, about: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Writes PNG pictures, masks and JSON without loss, as a new folder, or as a WebDataset tar if it ends in .tar.

    load_concepts reads them back equal. about: more JSON fields by picture key, such as what poisoned it. All of it is
    written or nothing. Raises DataError if the path exists, or two pictures would have one name.
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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    try:
        (_write_tar if path.suffix == ".tar" else _write_folder)(files, temporary)
        temporary.rename(path)
    finally:
        if temporary.exists():
            temporary.unlink() if temporary.is_file() else shutil.rmtree(temporary)


# What lies where


@dataclass(frozen=True)
class _Sample:
    """One picture before it is read. name: how errors call it. about: its JSON."""

    stem: str
    name: str
    picture: Path | bytes
    mask: Path | bytes | None = None
    mask_name: str = ""
    about: dict[str, Any] = field(default_factory=dict)


def _in_folders(root: Path) -> dict[str, list[_Sample]]:
    """The pictures of each concept, in order of their paths."""
    folders = [p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    alone = [p for p in sorted(root.iterdir()) if p.is_file() and p.suffix.lower() in IMAGE_ENDINGS]
    if alone and (others := [p for p in folders if not is_mask_folder(p.name) and _in_folder(p)]):
        raise DataError(
            f"{alone[0]} lies beside {others[0]}, which holds pictures too: is this one concept or several?\n"
            "  Put the pictures of each concept into a folder of its own."
        )
    if alone or any(p.name.lower() in ("mask", "masks") for p in folders):
        folders = [root.resolve()]
    found = {folder.name: _in_folder(folder) for folder in folders}
    if not any(found.values()):
        raise DataError(f"{root} holds no picture.\n{_FORMS}")
    if empty := [name for name, samples in found.items() if not samples]:
        log.warning("%s: no picture in %s; left out.", root, ", ".join(empty))
    return {name: samples for name, samples in found.items() if samples}


def _in_folder(folder: Path) -> list[_Sample]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    pictures: dict[str, Path] = {}
    masks: dict[str, Path] = {}
    for path in (p for p in files if p.suffix.lower() in IMAGE_ENDINGS):
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
        samples.append(_Sample(stem, str(path), path, masks.get(stem), str(masks.get(stem)), about))
    return samples


def _in_tars(tars: Sequence[Path]) -> dict[str, list[_Sample]]:
    """The samples of WebDataset tars by the concept that their JSON names, else by the folder in their key."""
    found: dict[str, list[_Sample]] = {}
    for tar in tars:
        for key, fields in _read_tar(tar).items():
            images = [e for e in fields if f".{e}" in IMAGE_ENDINGS]
            if len(images) != 1:
                raise DataError(f"sample {key} in {tar} has {len(images)} pictures, one is wanted.\n{_FORMS}")
            about = _fields(fields["json"], f"{key}.json in {tar}") if "json" in fields else {}
            folder, _, stem = key.rpartition("/")
            concept = about.get("concept") or folder.rpartition("/")[2] or tar.name.partition(".")[0]
            sample = _Sample(
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
                samples[key][extension] = tar.extractfile(member).read()
            # tarfile takes a damaged header for the end and says nothing; the true end is a block of zeros
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("a damaged header, or no end mark")
    except (tarfile.TarError, OSError, EOFError, ValueError) as err:
        raise DataError(f"{path} cannot be read as a tar ({err}). Copy it again from its source.\n{_FORMS}") from err
    if not samples:
        raise DataError(f"{path} holds no sample.\n{_FORMS}")
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


def _chosen(
    root: Path, found: Mapping[str, list[_Sample]], names: Sequence[str] | None, group: Literal["all", "id", "od"]
) -> list[str]:
    """The names of the concepts to read, in order."""
    if group not in ("all", "id", "od"):
        raise ConfigError(f"group {group!r}: all, id or od is wanted.")
    if missing := [n for n in names or () if n not in found]:
        raise DataError(
            f"{root} has no concept {missing[0]!r}.{suggest(missing[0], list(found))}  It has: {', '.join(sorted(found))}."
        )
    chosen = [n for n in names or found if group in ("all", _group(n, found[n]))]
    if not chosen:
        raise DataError(f"{root} has no concept of group {group!r}. Use group: all; it has {', '.join(sorted(found))}.")
    return list(dict.fromkeys(chosen))


def _group(name: str, samples: Sequence[_Sample]) -> str | None:
    return next((s.about["group"] for s in samples if s.about.get("group")), _GROUPS.get(name.lower()))


# Reading and writing


def _concept(name: str, samples: Sequence[_Sample], *, size: int, crop: str, masks: str | None) -> Concept:
    if masks == "file" and (bare := [s.name for s in samples if s.mask is None]):
        raise DataError(
            f"{bare[0]} has no mask, as {len(bare)} of the {len(samples)} pictures of {name}.\n"
            f"  Put it beside the picture as {samples[0].stem}.mask.png or into masks/{samples[0].stem}.png, or set masks: null."
        )
    images, small = [], []
    for sample in samples:
        picture, alpha = _open(sample)
        if min(picture.size) < size:
            small.append(min(picture.size))
        mask = None
        if masks == "file":
            mask = read_mask(_bytes(sample.mask), name=sample.mask_name, size=picture.size)
        elif masks == "alpha":
            if alpha is None:
                raise DataError(f"{sample.name} has no alpha channel to take as its mask. Set masks: file or null.")
            mask = alpha
        if mask is not None:
            mask = _fit(mask, size, crop, nearest=True)
            refuse_empty(mask.numpy(), f"of {sample.name}, within the {crop} {size}x{size} crop,")
            mask = mask.float() / 255
        caption = sample.about.get("caption")
        if caption is None:
            words = sample.stem.replace("_", " ").strip()
            caption = words if any(c.isalpha() for c in words) else ""  # 00.jpg tells nothing
        images.append(ConceptImage.of(name, sample.stem, _fit(picture, size, crop), mask, caption))
    if small:
        log.warning(
            "%s: %d pictures are smaller than %d (down to %d) and are enlarged.", name, len(small), size, min(small)
        )
    return Concept.of(name, images, _group(name, samples))


def _open(sample: _Sample) -> tuple["Image.Image", "Image.Image | None"]:
    """The picture in RGB, turned as its EXIF data says, and its alpha channel if it has one."""
    from PIL import Image, ImageOps

    data = _bytes(sample.picture)
    try:
        with Image.open(io.BytesIO(data)) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as err:
        raise DataError(
            f"{sample.name} cannot be read as an image ({err}). Restore it, or take it out of the set."
        ) from err
    if too_deep(data, image):
        raise DataError(f"{sample.name} has more than 8 bits a channel. Convert it to 8 bits first.")
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB"), None
    image = image.convert("RGBA")
    return image.convert("RGB"), image.getchannel("A")  # colours stay as they are stored, under transparent pixels too


def _fit(image: "Image.Image", size: int, crop: str, *, nearest: bool = False) -> Tensor:
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


def _pillow(pixels: Tensor) -> "Image.Image":
    from PIL import Image

    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def _bytes(stored: Path | bytes) -> bytes:
    return stored.read_bytes() if isinstance(stored, Path) else stored


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
