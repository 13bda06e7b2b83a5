"""Where a learned word lies: beside the word that clean training gave, and among the vocabulary."""

from collections.abc import Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

from poisonshield.errors import ShapeError
from poisonshield.evals.diffusion.base import LearnedWord, WordEvaluation
from poisonshield.models.diffusion.pipeline import LatentDiffusion


class Word(WordEvaluation):
    """Where the word's vectors lie among the vocabulary."""

    name = "word"

    def __call__(self, subject: LearnedWord) -> dict[str, Any]:
        """No numbers, but lists under "word" with an entry for each vector: see word_report."""
        return {"word": word_report(subject.rows, subject.model)}


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
    encoder, tokenizer = cast(Any, model.text_encoder), cast(Any, model.tokenizer)
    table = encoder.get_input_embeddings().weight[: model.vocabulary].detach().double().cpu()
    names: dict[int, str] = {i: word for word, i in tokenizer.get_vocab().items() if i < model.vocabulary}
    kept = sorted(names.keys() - set(tokenizer.all_special_ids))
    words = (names[i] for i in kept)
    return [w.removesuffix("</w>") if w.endswith("</w>") else f"{w}-" for w in words], table[kept]


def _nearest(vector: Tensor, words: Sequence[str], table: Tensor, *, count: int) -> list[list[str | float]]:
    cosines = F.cosine_similarity(table, vector[None], dim=1)
    best = cosines.topk(min(count, len(words)))
    return [[words[i], float(c)] for c, i in zip(best.values, best.indices.tolist(), strict=True)]
