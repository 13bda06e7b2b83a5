"""Where a learned word lies: beside the word that clean training gave, and among the vocabulary."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from poisonshield.errors import ShapeError
from poisonshield.models.diffusion.pipeline import LatentDiffusion


def word_report(vectors: Tensor, model: LatentDiffusion, *, nearest: int = 5) -> dict[str, Any]:
    """What is known of a learned word's vectors [k, d], as plain data.

    norm: of each vector; norm_percentile: the percentage of the vocabulary's rows that are shorter; nearest: for each
    vector, the vocabulary's words with the largest cosines, [word, cosine] each. Raises ShapeError for other shapes.
    """
    if vectors.dim() != 2 or vectors.shape[1] != model.width:
        raise ShapeError(f"vectors have shape {tuple(vectors.shape)}; [k, {model.width}] is wanted by {model.name}.")
    v = vectors.detach().double().cpu()
    words, table = vocabulary(model)
    norms = table.norm(dim=1)
    return {
        "norm": v.norm(dim=1).tolist(),
        "norm_percentile": [100 * float((norms < n).double().mean()) for n in v.norm(dim=1)],
        "nearest": [_nearest(row, words, table, count=nearest) for row in v],
    }


def word_distance(vectors: Tensor, clean: Tensor) -> dict[str, float]:
    """cosine and l2 of a word's vectors [k, d] and those that clean training with the same seed gave, all k d numbers
    taken as one vector. Raises ShapeError if shapes differ."""
    if clean.shape != vectors.shape:
        raise ShapeError(f"clean vectors {tuple(clean.shape)} beside {tuple(vectors.shape)}: equal shapes are wanted.")
    v, other = vectors.detach().double().cpu(), clean.detach().double().cpu()
    return {
        "cosine": float(F.cosine_similarity(v.flatten(), other.flatten(), dim=0)),
        "l2": float((v - other).norm()),
    }


def vocabulary(model: LatentDiffusion) -> tuple[list[str], Tensor]:
    """The text encoder's words without start, end and placeholders, and their rows float64 [V, d] on the CPU.

    What is only the beginning of words, to this tokenizer, ends in "-".
    """
    table = model.text_encoder.get_input_embeddings().weight[: model.vocabulary].detach().double().cpu()
    names = {i: word for word, i in model.tokenizer.get_vocab().items() if i < model.vocabulary}
    special = set(model.tokenizer.all_special_ids)
    kept = [i for i in sorted(names) if i not in special]
    return [n.removesuffix("</w>") if n.endswith("</w>") else f"{n}-" for n in map(names.get, kept)], table[kept]


def _nearest(vector: Tensor, words: Sequence[str], table: Tensor, *, count: int) -> list[list[str | float]]:
    cosines = F.cosine_similarity(table, vector[None], dim=1)
    best = cosines.topk(min(count, len(words)))
    return [[words[i], float(c)] for c, i in zip(best.values, best.indices.tolist())]
