"""Where learned words look in pictures, clean and poisoned side by side on one scale."""

import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from poisonshield.api.photos import write_drawn
from poisonshield.api.pictures import Paths, add_learned, fill_prompt, load_pictures, pick_matching, refuse_among
from poisonshield.engine.processes import choose_device
from poisonshield.errors import ConfigError
from poisonshield.files import MadeList, write_whole, writing
from poisonshield.models.diffusion.embeddings import load_embedding
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.models.diffusion.sensitivity import Mode, Sensitivity, semantic_sensitivity
from poisonshield.reports.maps import NORMS, Norm, draw_maps, draw_totals

log = logging.getLogger(__name__)

TIMESTEPS = (50, 200, 400, 600, 800)


def sensitivity(
    pipeline: str | Path,
    images: Paths,
    embedding: str | Path,
    out: str | Path,
    *,
    reference: Paths | None = None,
    masks: str | Path | None = None,
    against: str | None = None,
    mode: Mode = "loss_grad",
    wrt: Literal["token", "context"] = "token",
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
    size: pixels a side of the centred square, by default the pipeline's own. norm: see reports.maps.scale_maps.
    Also writes <picture>.png for each picture, and totals.png. Raises ConfigError, DataError, ShapeError.
    """
    if norm not in NORMS:
        raise ConfigError(f"norm {norm!r} is unknown. Known: {', '.join(NORMS)}.")
    out, where = Path(out), choose_device(device)
    refuse_among(out, images, reference, masks)
    model = LatentDiffusion.load(pipeline).to(where)
    rows, word = add_learned(model, embedding, token)
    size = size or model.unet.config.sample_size * model.factor
    shown = {"images": load_pictures(images, size=size, masks=masks)}
    if reference is not None:
        shown = {"reference": pick_matching(shown["images"], load_pictures(reference, size=size), "reference"), **shown}
    files = [*(f"{name}.png" for name in shown["images"].names), "totals.png", "sensitivity.json"]
    MadeList(out).refuse_others(files)
    settings: dict[str, Any] = {
        "mode": mode,
        "wrt": wrt,
        "timesteps": list(timesteps),
        "probes": probes,
        "exact": exact,
    }
    settings |= {"noises": noises, "seed": seed}
    other = _compare_with(model, mode, against, rows)
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
    record: dict[str, Any] = {
        "pipeline": str(pipeline),
        "embedding": str(embedding),
        "against": against,
        "prompt": prompt,
    }
    record |= {"size": size, "norm": norm, **settings, "pictures": _list_numbers(shown["images"].names, found)}
    with writing(out, what="set of maps", names=files):
        for i, name in enumerate(shown["images"].names):
            sets = {k: (shown[k].x[i], found[k].maps[i].cpu()) for k in found}
            draw = partial(draw_maps, sets=sets, timesteps=timesteps, mode=mode, norm=norm)
            write_drawn(out / f"{name}.png", draw)
        write_drawn(out / "totals.png", partial(draw_totals, found=found))
        write_whole(out / "sensitivity.json", json.dumps(record, indent=1, allow_nan=False))
    return record


def _compare_with(model: LatentDiffusion, mode: str, against: str | None, rows: Tensor) -> dict[str, Any]:
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


def _list_numbers(names: Sequence[str], found: dict[str, Sensitivity]) -> list[dict[str, Any]]:
    """What the record says of each picture and its reference: totals, and concept shares where there are masks."""
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
