"""Pictures of one thing and the word that was learned for it: what the readings of a word start from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from poisonshield.api.photos import refuse_among_originals, refuse_file
from poisonshield.data.concepts.reader import load_images
from poisonshield.data.masks import sort_masks
from poisonshield.data.pictures import find_pictures
from poisonshield.errors import ConfigError, DataError
from poisonshield.models.diffusion.embeddings import load_embedding
from poisonshield.models.diffusion.pipeline import LatentDiffusion

Paths = str | Path | Sequence[str | Path]
"""Picture files, or one folder of them."""


@dataclass(frozen=True)
class Pictures:
    """names: file names without ending; x [B, 3, S, S] in [0, 1]; mask [B, 1, S, S] in [0, 1] or None."""

    names: tuple[str, ...]
    x: Tensor
    mask: Tensor | None = None


def add_learned(model: LatentDiffusion, embedding: str | Path, token: str | None) -> tuple[Tensor, str]:
    """The rows [k, d] of a learned word that becomes the model's first placeholder, and what prompts call it."""
    learned = load_embedding(embedding, token, width=model.width)
    model.add_placeholder(learned.token, len(learned.vectors))
    return learned.vectors.to(model.alphas_cumprod.device), learned.token


def fill_prompt(prompt: str, word: str) -> str:
    """The prompt with the word in its place. Raises ConfigError if it has none."""
    if "{}" not in prompt:
        raise ConfigError(f"the prompt {prompt!r} has no {{}} where the learned word belongs.")
    return prompt.replace("{}", word)


def load_pictures(images: Paths, *, size: int, masks: str | Path | None = None) -> Pictures:
    """The pictures of one thing: files, or those of a folder, cut to a centred square and resized as for training.

    masks: a folder with a mask for each, `<name>.mask.png` or, if it holds masks alone, `<name>.png`; it may be the
    pictures' own. Raises DataError naming the file that is missing, unreadable or of another size.
    """
    single = [images] if isinstance(images, str | Path) else list(images)
    files = (
        _find_in_folder(Path(single[0])) if len(single) == 1 and Path(single[0]).is_dir() else [Path(p) for p in single]
    )
    if missing := [p for p in files if not p.is_file()]:
        raise DataError(f"{missing[0]} is no picture file. Give files, or one folder of them.")
    if len({p.stem for p in files}) < len(files):
        raise DataError(f"two of {len(files)} pictures have one name without ending; they are told apart by it.")
    found = None if masks is None else _find_masks(Path(masks))
    if found is not None and (bare := [path for path in files if path.stem not in found]):
        raise DataError(f"{masks} has no mask for {bare[0].name}: {bare[0].stem}.mask.png or {bare[0].stem}.png.")
    read = load_images(sorted(files, key=lambda path: path.name), size=size, masks=found)
    stacked = torch.stack([image.pixels for image in read]).float() / 255
    names = tuple(image.stem for image in read)
    masked = [image.mask for image in read if image.mask is not None]
    return Pictures(names, stacked, None if masks is None else torch.stack(masked))


def refuse_among(out: Path, *given: Paths | None) -> None:
    """Raise ConfigError if `out` is the folder of one of the pictures: results have their names. Or if it is a file."""
    refuse_file(out)
    for paths in given:
        single = [paths] if isinstance(paths, str | Path) else paths or []
        refuse_among_originals(out, map(Path, single), within=False)


def pick_matching(pictures: Pictures, others: Pictures, what: str) -> Pictures:
    """Of `others`, those with the names of `pictures`, in their order. Raises DataError for one that is missing."""
    if missing := [name for name in pictures.names if name not in others.names]:
        raise DataError(
            f"the {what} lacks {missing[0]}, as {len(missing)} of {len(pictures.names)} pictures. Its files must have "
            "the pictures' names."
        )
    return Pictures(pictures.names, others.x[[others.names.index(name) for name in pictures.names]])


def _find_in_folder(folder: Path) -> list[Path]:
    """The pictures that lie in a folder itself, masks left out."""
    photos, _ = sort_masks(path.relative_to(folder) for path in find_pictures(folder, nested=False))
    if not photos:
        raise DataError(f"{folder} holds no picture itself. Give the folder of one concept, or picture files.")
    return [folder / photo for photo in photos]


def _find_masks(folder: Path) -> dict[str, Path]:
    """Mask files by the name of their picture."""
    files = [path.relative_to(folder) for path in find_pictures(folder)]
    _, masks = sort_masks(files)
    if masks:
        return {stem: folder / path for path, stem in masks.items()}
    # A folder of masks alone, whatever it is called.
    _, masks = sort_masks("masks" / path for path in files)
    bare = {stem: folder / path.relative_to("masks") for path, stem in masks.items()}
    return bare | {path.stem: folder / path for path in files}
