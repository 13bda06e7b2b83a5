"""Where the U-Net looks for the concept's word: the mean of its cross-attention to that word, cut in two by Otsu.

At medium noise the attention follows objects; layers at a half and a quarter of the latents' side are used where there
are any, as finer ones are noisy and coarser ones blurred. Source of the idea: Hertz et al. 2022 (prompt-to-prompt).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poisonshield.batch import Batch
from poisonshield.defenses.diffusion.masks.base import WordMask
from poisonshield.defenses.diffusion.masks.parts.otsu import cut
from poisonshield.defenses.diffusion.purify.regeneration import pad_to_multiple
from poisonshield.errors import ConfigError
from poisonshield.keys import picture_of
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.random import KeyedRandom, sample_ids

PREFIX = "a photo of a"
AttentionLayer = Any
"""An nn.Module of diffusers: `heads`, `to_q`, `to_k` and the rest are declared by the running network alone."""

TIMES = (0.3, 0.4, 0.5, 0.6, 0.7)
"""Timesteps, as shares of all."""


class Attention(WordMask):
    """Binary masks from a forward pass of the U-Net at each of TIMES."""

    name: ClassVar[str] = "attention"

    @torch.no_grad()
    def find(self, batch: Batch, model: LatentDiffusion, words: Sequence[str]) -> Tensor:
        """Masks [B, 1, H, W]. Raises ConfigError for a U-Net without cross-attention, or one it was not written for."""
        given = batch.pixels()
        height, width = given.shape[2:]
        x = pad_to_multiple(given, model.factor).to(model.alphas_cumprod.device)
        z = model.encode(x)
        context, marked = embed_prompts(model, words)
        rng = KeyedRandom(self.seed, sample_ids([picture_of(k) for k in batch.keys]), scope="attention").to(z.device)
        total = torch.zeros_like(z[:, :1])
        for share in TIMES:
            t = torch.full((len(z),), int(share * model.num_timesteps), device=z.device)
            noise = rng.normal(f"noise{share}", z[0].numel()).view_as(z).to(z)
            for layer in word_attention(model, model.noised(z, t, noise), t, context, marked):
                total += F.interpolate(layer, z.shape[2:], mode="bilinear", align_corners=False)
        return cut(total, x.shape[2:])[..., :height, :width].to(given)


def embed_prompts(model: LatentDiffusion, words: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The contexts [B, L, d] of "a photo of a WORD", and which of their tokens are the word's, bool [B, L]."""
    prefix = len(model.tokenizer(PREFIX, add_special_tokens=False).input_ids)
    contexts, marks = {}, {}
    for word in dict.fromkeys(words):
        ids = model.tokens([f"{PREFIX} {word}"])
        length = len(model.tokenizer(word, add_special_tokens=False).input_ids)
        contexts[word], marks[word] = model.text(ids)[0], torch.zeros_like(ids[0], dtype=torch.bool)
        marks[word][1 + prefix : 1 + prefix + length] = True  # after the start token and the prefix
    return torch.stack([contexts[w] for w in words]), torch.stack([marks[w] for w in words])


def word_attention(model: LatentDiffusion, z_t: Tensor, t: Tensor, context: Tensor, marked: Tensor) -> list[Tensor]:
    """How much each position attends to the marked tokens: [B, 1, h', w'] of each layer, mean over heads.

    z_t [B, C, h, w], t [B], context [B, L, d], marked bool [B, L].
    """
    found: list[tuple[int, Tensor]] = []
    weight = marked.float() / marked.sum(1, keepdim=True)

    def look(layer: AttentionLayer, hidden: Tensor, text: Tensor) -> None:
        heads = layer.heads
        query, key = (layer.head_to_batch_dim(v) for v in (layer.to_q(hidden), layer.to_k(text)))
        probabilities = layer.get_attention_scores(query, key).float()  # [B * heads, positions, L]
        mean = probabilities.unflatten(0, (-1, heads)).mean(1)  # [B, positions, L]
        level, side = _level((z_t.shape[2], z_t.shape[3]), mean.shape[1])
        found.append((level, (mean @ weight[:, :, None]).transpose(1, 2).unflatten(2, side)))

    with _watch(model.unet, look):
        model.predict(z_t, t, context)
    if not found:
        raise ConfigError(f"the U-Net of {model.name} has no cross-attention, so no word has a place in the picture.")
    # In a small U-Net such layers may be missing; then all of them are better than none.
    return [m for level, m in found if level in (1, 2)] or [m for _, m in found]


@contextmanager
def _watch(unet: nn.Module, look: Callable[[AttentionLayer, Tensor, Tensor], None]) -> Iterator[None]:
    """Calls look(layer, hidden [B, positions, c], text [B, L, d]) before each cross-attention layer runs."""

    def hook(layer: AttentionLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
        look(layer, args[0] if args else kwargs["hidden_states"], text)

    layers = [m for m in unet.modules() if getattr(m, "is_cross_attention", False)]
    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _level(latents: tuple[int, int], positions: int) -> tuple[int, tuple[int, int]]:
    """(k, (h', w')): a layer of so many positions works on latents that were halved k times, rounding up."""
    height, width = latents
    level = 0
    while height * width > positions and (height, width) != (1, 1):
        height, width, level = -(-height // 2), -(-width // 2), level + 1
    if height * width != positions:
        raise ConfigError(f"a cross-attention layer has {positions} positions, which no halving of {latents} gives.")
    return level, (height, width)
