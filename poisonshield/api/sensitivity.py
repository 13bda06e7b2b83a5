"""`poisonshield sensitivity`: where learned words look in pictures, clean and poisoned side by side on one scale."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poisonshield.data.concepts.reader import load_images
from poisonshield.data.masks import stem_of_mask
from poisonshield.data.pictures import find_pictures
from poisonshield.engine.checkpoint import write_whole
from poisonshield.engine.processes import choose_device
from poisonshield.errors import ConfigError, DataError
from poisonshield.models.diffusion.embeddings import load_embedding
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.models.diffusion.sensitivity import Mode, Sensitivity, semantic_sensitivity
from poisonshield.reports.maps import NORMS, Norm, draw_maps, draw_totals

log = logging.getLogger(__name__)

TIMESTEPS = (50, 200, 400, 600, 800)


@dataclass(frozen=True)
class Pictures:
    """names: file names without ending; x [B, 3, S, S] in [0, 1]; mask [B, 1, S, S] in [0, 1] or None."""

    names: tuple[str, ...]
    x: Tensor
    mask: Tensor | None = None


def sensitivity(
    pipeline: str | Path,
    images: str | Path | Sequence[str | Path],
    embedding: str | Path,
    out: str | Path,
    *,
    reference: str | Path | Sequence[str | Path] | None = None,
    masks: str | Path | None = None,
    against: str | None = None,
    mode: Mode = "loss_grad",
    wrt: str = "token",
    timesteps: Sequence[int] = TIMESTEPS,
    prompt: str = "a photo of a {}",
    token: str | None = None,
    probes: int = 64,
    exact: bool = False,
    noises: int = 8,
    seed: int = 0,
    size: int | None = None,
    norm: Norm = "joint",
    device: str = "auto",
) -> dict[str, Any]:
    """The record of sensitivity.json: totals, and concept shares where there are masks, of each picture and timestep.

    pipeline: a diffusers folder, or tiny. images: picture files or a folder of them; reference: the same ones clean, by
    file name, under the same noise. masks: a folder of masks by file name. embedding: the learned word's file. against,
    for the modes delta and signed: another embedding's file, or a word. prompt: {} stands for the learned word.
    size: pixels a side of the centred square, by default the pipeline's own. norm: see maps.scaled.
    Also writes <picture>.png for each picture, and totals.png. Raises ConfigError, DataError, ShapeError.
    """
    if norm not in NORMS:
        raise ConfigError(f"norm {norm!r} is unknown. Known: {', '.join(NORMS)}.")
    out, where = Path(out), choose_device(device)
    model = LatentDiffusion.load(pipeline).to(where)
    rows, word = add_learned(model, embedding, token)
    size = size or model.unet.config.sample_size * model.factor
    shown = {"images": load_pictures(images, size=size, masks=masks)}
    if reference is not None:
        shown = {"reference": matching(shown["images"], load_pictures(reference, size=size), "reference"), **shown}
    settings = {"mode": mode, "wrt": wrt, "timesteps": list(timesteps), "probes": probes, "exact": exact}
    settings |= {"noises": noises, "seed": seed}
    other = _other(model, mode, against, rows)
    found: dict[str, Sensitivity] = {}
    for name, pictures in shown.items():
        log.info("%s: %d pictures of %d pixels at timesteps %s", name, len(pictures.x), size, list(timesteps))
        found[name] = semantic_sensitivity(
            model,
            pictures.x.to(where),
            rows=rows,
            prompt=fill_prompt(prompt, word),
            mask=shown["images"].mask,
            keys=pictures.names,
            **settings,
            **other,
        )
    record = {"pipeline": str(pipeline), "embedding": str(embedding), "against": against, "prompt": prompt}
    record |= {"size": size, "norm": norm, **settings, "pictures": _numbers(shown["images"].names, found)}
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "sensitivity.json", json.dumps(record, indent=1, allow_nan=False))
    for i, name in enumerate(shown["images"].names):
        sets = {k: (shown[k].x[i], found[k].maps[i].cpu()) for k in found}
        draw_maps(out / f"{name}.png", sets, timesteps=timesteps, mode=mode, norm=norm)
    draw_totals(out / "totals.png", found)
    return record


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


def load_pictures(images: str | Path | Sequence[str | Path], *, size: int, masks: str | Path | None = None) -> Pictures:
    """The pictures of one thing: files, or those of a folder, cut to a centred square and resized as for training.

    masks: a folder with a mask for each, `<name>.mask.png` or, if it holds masks alone, `<name>.png`; it may be the
    pictures' own. Raises DataError naming the file that is missing, unreadable or of another size.
    """
    single = [images] if isinstance(images, str | Path) else list(images)
    files = _in_folder(Path(single[0])) if len(single) == 1 and Path(single[0]).is_dir() else [Path(p) for p in single]
    if missing := [p for p in files if not p.is_file()]:
        raise DataError(f"{missing[0]} is no picture file. Give files, or one folder of them.")
    if len({p.stem for p in files}) < len(files):
        raise DataError(f"two of {len(files)} pictures have one name without ending; they are told apart by it.")
    found = None if masks is None else _masks(Path(masks))
    if found is not None and (bare := [path for path in files if path.stem not in found]):
        raise DataError(f"{masks} has no mask for {bare[0].name}: {bare[0].stem}.mask.png or {bare[0].stem}.png.")
    read = load_images(sorted(files, key=lambda path: path.name), size=size, masks=found)
    stacked = torch.stack([image.pixels for image in read]).float() / 255
    names = tuple(image.stem for image in read)
    return Pictures(names, stacked, None if masks is None else torch.stack([image.mask for image in read]))


def matching(pictures: Pictures, others: Pictures, what: str) -> Pictures:
    """Of `others`, those with the names of `pictures`, in their order. Raises DataError for one that is missing."""
    if missing := [name for name in pictures.names if name not in others.names]:
        raise DataError(
            f"the {what} lacks {missing[0]}, as {len(missing)} of {len(pictures.names)} pictures. Its files must have "
            "the pictures' names."
        )
    return Pictures(pictures.names, others.x[[others.names.index(name) for name in pictures.names]])


def _in_folder(folder: Path) -> list[Path]:
    found = [p for p in find_pictures(folder, nested=False) if stem_of_mask(p.relative_to(folder)) is None]
    if not found:
        raise DataError(f"{folder} holds no picture itself. Give the folder of one concept, or picture files.")
    return found


def _masks(folder: Path) -> dict[str, Path]:
    """Mask files by the name of their picture."""
    files = find_pictures(folder)
    named = {stem: p for p in files if (stem := stem_of_mask(p.relative_to(folder))) is not None}
    return named or {p.stem: p for p in files}


def _other(model: LatentDiffusion, mode: str, against: str | None, rows: Tensor) -> dict[str, Tensor]:
    """The second embedding as the mode wants it: itself, or the direction towards it."""
    if mode not in ("delta", "signed"):
        if against is not None:
            raise ConfigError(f"`against` is for the modes delta and signed, and the mode is {mode}. Leave it out.")
        return {}
    if against is None:
        raise ConfigError(f"mode {mode} needs `against`: another embedding's file, or a word to compare with.")
    if Path(against).is_file():
        vectors = load_embedding(against, width=model.width).vectors.to(rows)
        if vectors.shape != rows.shape:
            raise ConfigError(
                f"{against} has {len(vectors)} vectors and the learned word {len(rows)}; equal is wanted."
            )
    else:
        vectors = model.word_vector(against).to(rows).expand_as(rows)
    return {"rows_b": vectors} if mode == "delta" else {"direction": vectors - rows}


def _numbers(names: Sequence[str], found: dict[str, Sensitivity]) -> list[dict[str, Any]]:
    rows = []
    for i, name in enumerate(names):
        row: dict[str, Any] = {"name": name}
        for which, result in found.items():
            share = result.concept_share
            row[which] = {"total": result.total[i].tolist()}
            if share is not None:  # none of a map that is 0 everywhere
                row[which]["concept_share"] = [None if s != s else s for s in share[i].tolist()]
        rows.append(row)
    return rows
