"""Generated pictures beside real ones of the concept: cosines, and distances of whole sets with their ceiling.

A set's distance has no meaning by itself: real pictures that went through the pipeline's VAE are the best it can draw, so
their distance is given as `ceiling` beside it. Feature networks come from folders; where one is missing the number is
"unavailable" and says what it needs. Nothing is fetched, and nothing missing is a silent 0.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from poisonshield.errors import ShapeError
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.models.diffusion.sampler import round_trip
from poisonshield.models.feature_networks import FeatureNetwork, lacking

QUALITY_PROMPTS = ("Good photo.", "Bad photo.")
"""What CLIP-IQA sets against each other. Source: Wang et al. 2023."""


class Features(Protocol):
    """Something that has features [N, D] of pictures [N, 3, H, W], such as the judge of the rendered world."""

    def features(self, x: Tensor) -> Tensor: ...


def cosine(h: Tensor, g: Tensor) -> float:
    """Mean cosine in [-1, 1] over all pairs of rows of h [N, D] and g [M, D]."""
    if h.dim() != 2 or g.dim() != 2 or h.shape[1] != g.shape[1] or not len(h) or not len(g):
        raise ShapeError(
            f"features {tuple(h.shape)} and {tuple(g.shape)}: [N, D] and [M, D] without empty sets are wanted."
        )
    return float((F.normalize(h.double(), dim=1).mean(0) * F.normalize(g.double(), dim=1).mean(0)).sum())


def pixel_cosine(x: Tensor, references: Tensor) -> float:
    """Mean cosine over pairs of pictures [N, 3, H, W] and [M, 3, H, W] as points about mid-grey."""
    return cosine((x - 0.5).flatten(1), (references - 0.5).flatten(1))


@torch.no_grad()
def latent_cosine(model: LatentDiffusion, x: Tensor, references: Tensor, *, micro_batch: int = 16) -> float:
    """Mean cosine over pairs of pictures in the pipeline's own latents (posterior means)."""
    device = model.alphas_cumprod.device
    h, g = (
        torch.cat([model.encode(part.to(device)).flatten(1) for part in v.split(micro_batch)]) for v in (x, references)
    )
    return cosine(h, g)


def color_distance(x: Tensor, references: Tensor, *, bins: int = 4) -> float:
    """Total variation in [0, 1] between the joint RGB histograms of two sets of pictures, `bins` a channel.

    Sizes may differ. 0: the same share of every colour; 1: no colour in common.
    """
    return float((_histogram(x, bins) - _histogram(references, bins)).abs().sum() / 2)


def energy_coefficient(h: Tensor, g: Tensor) -> float:
    """How far two samples h [N, D], g [M, D] are from one distribution: about 0 if they share it, 1 if far apart.

    (2 E|h-g| - E|h-h'| - E|g-g'|) / 2 E|h-g| with unbiased means, so it may fall a little below 0, and sets of different
    sizes compare. Needs two rows each. Source: Szekely and Rizzo 2013.
    """
    if min(len(h), len(g)) < 2 or h.shape[1:] != g.shape[1:]:
        raise ShapeError(f"features {tuple(h.shape)} and {tuple(g.shape)}: two rows at least of one width are wanted.")
    h, g = h.double(), g.double()
    between = torch.cdist(h, g).mean()
    within = sum(torch.cdist(v, v).sum() / (len(v) * (len(v) - 1)) for v in (h, g))
    return float((2 * between - within) / (2 * between).clamp(min=1e-12))


@torch.no_grad()
def set_distances(
    x: Tensor, references: Tensor, *, judge: Features | None = None, model: LatentDiffusion | None = None
) -> dict[str, float | None]:
    """Distances of generated pictures x [N, 3, H, W] from real ones [M, 3, H, W] in [0, 1]; lower is nearer.

    color_distance, and feature_distance by energy_coefficient of the judge's features (None without a judge); and each
    again as *_ceiling for the second half of the references through the model's VAE (None without a model). All are
    taken against the first half of the references. Raises ShapeError for fewer than 4 references or 2 pictures.
    """
    if len(references) < 4 or len(x) < 2:
        raise ShapeError(f"{len(x)} pictures and {len(references)} references; at least 2 and 4 are wanted.")
    real, rest = references[: len(references) // 2], references[len(references) // 2 :]
    best = None if model is None else round_trip(model, rest)
    out: dict[str, float | None] = {"color_distance": color_distance(x, real), "feature_distance": None}
    out |= {"color_ceiling": None if best is None else color_distance(best, real), "feature_ceiling": None}
    if judge is not None:
        h = judge.features(real)
        out["feature_distance"] = energy_coefficient(judge.features(x), h)
        out["feature_ceiling"] = None if best is None else energy_coefficient(judge.features(best), h)
    return out


def round_trip_error(model: LatentDiffusion, x: Tensor) -> Tensor:
    """Mean square change [N] of pictures through the VAE and back. Larger for poisoned pictures than for clean ones."""
    return (round_trip(model, x) - x).square().flatten(1).mean(1)


@torch.no_grad()
def network_scores(
    folders: Mapping[str, str | Path | None],
    x: Tensor,
    references: Tensor,
    prompts: Sequence[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores of pictures x [N, 3, H, W] by feature networks: {"dino_i": {"status": "ok", "value": ..., "network": ...}}.

    folders: name -> folder of a transformers model; "clip" and "dino" are always reported. <name>_i: mean cosine over
    pairs with the references. Of networks that read text also <name>_t: mean cosine of picture i and prompts[i], which
    should hold the class word and not a placeholder; <name>_iqa: mean probability of "Good photo." Otherwise
    {"status": "unavailable", "needs": the file or text that is missing}.
    """
    out: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys((*folders, "clip", "dino")):
        folder = folders.get(name)
        text_too = name == "clip"
        missing = f"a folder for {name!r} with config.json and model.safetensors" if folder is None else lacking(folder)
        if missing:
            scores = (f"{name}_i", *((f"{name}_t", f"{name}_iqa") if text_too else ()))
            out |= {score: {"status": "unavailable", "needs": missing} for score in scores}
            continue
        network = FeatureNetwork.load(folder)
        h = network.images(x)
        values: dict[str, float | str] = {f"{name}_i": cosine(h, network.images(references))}
        if network.reads_text:
            values |= _text_scores(name, network, h, prompts)
        out |= {score: _told(value, str(folder)) for score, value in values.items()}
    return out


def _text_scores(
    name: str, network: FeatureNetwork, h: Tensor, prompts: Sequence[str] | None
) -> dict[str, float | str]:
    """Values, or what is missing for one."""
    good_bad = F.normalize(network.texts(QUALITY_PROMPTS), dim=1)
    quality = (network.scale * F.normalize(h, dim=1) @ good_bad.T).softmax(1)[:, 0]
    values: dict[str, float | str] = {f"{name}_iqa": float(quality.mean()), f"{name}_t": "a prompt for each picture"}
    if prompts is not None:
        if len(prompts) != len(h):
            raise ShapeError(f"{len(prompts)} prompts for {len(h)} pictures; one each is wanted.")
        values[f"{name}_t"] = float(F.cosine_similarity(h, network.texts(prompts), dim=1).mean())
    return values


def _told(value: float | str, network: str) -> dict[str, Any]:
    if isinstance(value, str):
        return {"status": "unavailable", "needs": value}
    return {"status": "ok", "value": value, "network": network}


def _histogram(x: Tensor, bins: int) -> Tensor:
    """Shares [bins^3] of the pixels of a whole set, float64."""
    cells = (x.clamp(0, 1) * bins).long().clamp(max=bins - 1)  # [N, 3, H, W]
    index = (cells[:, 0] * bins + cells[:, 1]) * bins + cells[:, 2]
    return torch.bincount(index.flatten(), minlength=bins**3).double() / index.numel()
