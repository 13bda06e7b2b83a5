"""Scores of generated pictures by feature networks, which come from folders.

Where a network is missing its score is "unavailable" and says what it needs. Nothing is fetched, and nothing missing is
a silent 0.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from poisonshield.config import Settings
from poisonshield.errors import ShapeError
from poisonshield.evals.base import Number
from poisonshield.evals.diffusion.base import LearnedWord, WordEvaluation
from poisonshield.evals.diffusion.parts.similarity import cosine
from poisonshield.models.feature_networks import FeatureNetwork, lacking

QUALITY_PROMPTS = ("Good photo.", "Bad photo.")
"""What CLIP-IQA sets against each other. Source: Wang et al. 2023."""


class Networks(WordEvaluation):
    """How feature networks score the pictures beside real ones and beside texts."""

    name = "networks"
    on = False
    place = 60
    numbers = (
        Number("dino_i", "dino i", better="higher", column="known", effect=2),
        Number("clip_i", "clip i", better="higher", column="known", effect=3),
        Number("clip_t", "clip t", better="higher", column="known"),
        Number("clip_iqa", "clip iqa", better="higher", column="known"),
    )

    class Config(Settings):
        """Which networks."""

        folders: dict[str, str] = Field({}, description="Folder of a transformers model by name, such as clip or dino.")

    def __call__(self, subject: LearnedWord) -> dict[str, Any]:
        """And under "networks" every score with its status, also of networks by other names: see network_scores."""
        scores = network_scores(self.config.folders, subject.x, subject.references, subject.prompts)
        return {number.key: scores.get(number.key, {}).get("value") for number in self.numbers} | {"networks": scores}


@torch.no_grad()
def network_scores(
    folders: Mapping[str, str | Path | None],
    x: Tensor,
    references: Tensor,
    prompts: Sequence[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores of pictures x [N, 3, H, W]: {"dino_i": {"status": "ok", "value": ..., "network": ...}}.

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
        if folder is None or missing:
            scores = (f"{name}_i", *((f"{name}_t", f"{name}_iqa") if text_too else ()))
            out |= {score: {"status": "unavailable", "needs": missing} for score in scores}
            continue
        network = FeatureNetwork.load(folder)
        h = network.images(x)
        values: dict[str, float | str] = {f"{name}_i": cosine(h, network.images(references))}
        if network.reads_text:
            values |= _text_scores(name, network, h, prompts)
        out |= {score: _state(value, str(folder)) for score, value in values.items()}
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


def _state(value: float | str, network: str) -> dict[str, Any]:
    if isinstance(value, str):
        return {"status": "unavailable", "needs": value}
    return {"status": "ok", "value": value, "network": network}
