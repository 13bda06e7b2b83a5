"""Textual inversion: new words for a frozen pipeline, learned from a few pictures each. Source: Gal et al. 2022.

The learned vectors are a parameter of their own, so no other row of the vocabulary can move, by weight decay or
otherwise. Many words train in one batch: a sample sees its own word only and losses are summed over words, so under
Adam each word goes the way that it would go alone.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from poisonshield import collectives
from poisonshield.batch import Batch, StepOutput
from poisonshield.config import Settings
from poisonshield.errors import ConfigError, DataError
from poisonshield.keys import slot_of
from poisonshield.losses.zone import Zone, latent_mask, zone_loss
from poisonshield.method import DiffusionMethod
from poisonshield.models.diffusion.draws import draw_together
from poisonshield.models.diffusion.embeddings import load_embedding
from poisonshield.models.diffusion.latents import LatentCache
from poisonshield.models.diffusion.pipeline import LatentDiffusion, Placeholder
from poisonshield.models.diffusion.timestep_sampler import draw_timesteps
from poisonshield.random import KeyedRandom, sample_ids

log = logging.getLogger(__name__)


class TextualInversion(DiffusionMethod):
    """Learns `vectors` [N * k, d]: k rows for each of N placeholders, in the order of `tokens`.

    zone, t_sampler: where the loss counts and how timesteps are drawn; a defense sets them. Without a zone a batch with
    masks is refused, as nothing would use them.
    """

    name = "textual_inversion"

    class Config(Settings):
        """How many vectors a word has, where they start, and how their loss is weighed."""

        vectors: int = Field(1, ge=1, description="Vectors of one word, each as wide as a token's.")
        init: str | dict[str, str] = Field(
            "normal:0.02",
            description="Where vectors start: a word, the file of a learned word (.safetensors, .pt, .bin), normal:STD "
            "or zeros; or a mapping from each concept to one of these. Of a word of several tokens each vector starts "
            "from one, in their order and over again where there are more vectors.",
        )
        vae: Literal["mean", "sample"] = Field(
            "mean", description="Which latents a picture has: the posterior's mean, or a sample drawn at every step."
        )
        cache_latents: bool = Field(True, description="Encode each picture once, and keep its latents in memory.")
        min_snr: float | None = Field(
            None,
            gt=0,
            description="Gamma of Hang et al.'s min-SNR weights (2023), 5 as a rule; null weighs all timesteps alike.",
        )
        keep_norm: bool = Field(
            False, description="After each step, scale the vectors to the median norm of the vocabulary."
        )

    def __init__(
        self, config: Config, *, model: LatentDiffusion, tokens: Mapping[str, str], seed: int, samples: int = 1
    ) -> None:
        """A method that learns a word for each concept of `tokens`, concept -> placeholder, added to the model here.

        samples: of a concept in one step, on all ranks together. Raises ConfigError for words that the model knows.
        """
        super().__init__()
        self.config, self.seed, self.samples = config, seed, samples
        self._frozen = (model, LatentCache(model, enabled=config.cache_latents))  # not a module of ours: see _apply
        self.placeholders = {name: model.add_placeholder(token, config.vectors) for name, token in tokens.items()}
        self.vectors = nn.Parameter(torch.cat([self._start(name) for name in tokens]))
        self._ids: dict[str, Tensor] = {}
        self._warned = False

    @property
    def model(self) -> LatentDiffusion:
        """The frozen pipeline."""
        return self._frozen[0]

    @classmethod
    def check(cls, config: Config, *, zero_stage: int) -> None:
        """keep_norm moves the vectors themselves, and sharded optimisers move copies that it never sees."""
        if config.keep_norm and zero_stage > 0:
            raise ConfigError(
                f"method.keep_norm moves the vectors after each step, and engine.zero_stage {zero_stage} would put "
                "them back. Set zero_stage: 0, or backend: plain; vectors are too few to be worth sharding."
            )

    @classmethod
    def start_word(cls, config: Config, concept: str | None = None) -> str | None:
        """`init`, where that is a word; of all concepts the first that is none decides."""
        if isinstance(config.init, str):
            return _word(config.init)
        if concept is not None:
            return _word(config.init[concept])
        words = [_word(init) for init in config.init.values()]
        return None if None in words or not words else words[0]

    def rows(self, name: str) -> Tensor:
        """The vectors [k, d] of a concept."""
        place: Placeholder = self.placeholders[name]
        first = place.first - self.model.vocabulary
        return self.vectors[first : first + place.count]

    def forward(self, batch: Batch) -> StepOutput:
        """The sum over concepts of the mean loss of each one's samples."""
        model, cache = self._frozen
        y = batch.labels()
        drawn = self._draw(batch)
        z = cache(batch, noise=drawn.get("posterior"))
        t, noise = self._timesteps(batch, drawn["t"]), drawn["noise"].to(z.dtype)
        context = model.text(self._tokens(batch.all_captions()), self.vectors)
        pred = model.predict(model.noised(z, t, noise), t, context)
        losses = self._losses(pred, model.target(z, t, noise), t, batch, y)  # [B]
        # Each concept has weight 1, so that its step does not depend on how many samples it has in the batch.
        counts = torch.bincount(y, minlength=len(self.placeholders)).to(losses.dtype)
        return StepOutput((losses / counts[y]).sum(), {"per_concept": losses.detach().mean()})

    def timesteps(self, batch: Batch) -> Tensor:
        """int64 [B], from batch.t_range or all of them."""
        device = None if batch.x is None else batch.x.device
        return self._timesteps(batch, batch.random(self.seed, device).uniform("t", 1))

    def _draw(self, batch: Batch) -> dict[str, Tensor]:
        """The random numbers of a step: t [B, 1] in [0, 1); noise, and posterior if asked for, normal [B, C, h, w]."""
        x, model = batch.pixels(), self.model
        shape = (model.latent_channels, *(s // model.factor for s in x.shape[2:]))
        normal = ("noise", "posterior") if self.config.vae == "sample" else ("noise",)
        drawn = draw_together(batch.random(self.seed, x.device), ("t",), normal, math.prod(shape))
        return drawn | {purpose: drawn[purpose].view(-1, *shape) for purpose in normal}

    def _timesteps(self, batch: Batch, u: Tensor) -> Tensor:
        """int64 [B] of u [B, 1]."""
        u = u[:, 0]
        t_range = batch.t_range or (0, self.model.num_timesteps)
        stratum = None
        if self.t_sampler == "stratified":
            stratum = torch.tensor([slot_of(key) for key in batch.keys], device=u.device)
        return draw_timesteps(u, t_range=t_range, sampler=self.t_sampler, stratum=stratum, strata=self.samples)

    def _losses(self, pred: Tensor, target: Tensor, t: Tensor, batch: Batch, y: Tensor) -> Tensor:
        """[B]; those of one concept have its loss as their mean."""
        zone = self.zone or Zone()
        mask = self._latent_mask(batch, pred, zone)
        if zone.norm == "batch":
            losses = self._losses_by_concept(pred, target, mask, y, zone)
        else:
            losses = zone_loss(pred, target, mask, zone)
        gamma = self.config.min_snr
        return losses if gamma is None else losses * self._snr_weight(gamma, t, batch)

    def _latent_mask(self, batch: Batch, pred: Tensor, zone: Zone) -> Tensor | None:
        """The batch's mask [B, 1, h, w] at the size of pred [B, C, h, w]. Raises DataError if nothing uses masks."""
        if batch.mask is None:
            return None
        if self.zone is None:
            raise DataError(
                f"{batch.keys[0]} comes with a mask, and nothing in this run uses masks.\n"
                "  Add the defense szt with a mask, or set data.masks: null."
            )
        return latent_mask(batch.mask, (pred.shape[-2], pred.shape[-1]), zone)

    def _losses_by_concept(self, pred: Tensor, target: Tensor, mask: Tensor | None, y: Tensor, zone: Zone) -> Tensor:
        """[B], each concept by itself: the terms of norm "batch" share one denominator, which must be its own."""
        losses = pred.new_zeros(len(pred))
        for concept in y.unique():
            own = y == concept
            terms = zone_loss(pred[own], target[own], None if mask is None else mask[own], zone)
            losses = losses.index_put((own.nonzero()[:, 0],), terms)
        return losses if mask is None else losses * self._share(mask, y)

    def _share(self, mask: Tensor, y: Tensor) -> Tensor:
        """[B]: this rank's part of each concept's mask in the global batch, times the ranks; 1 for one rank."""
        area = mask.new_zeros(len(self.placeholders)).index_add(0, y, mask.flatten(1).sum(1))
        total = collectives.all_reduce_sum(area)
        return (collectives.world_size() * area / total.clamp(min=torch.finfo(area.dtype).tiny))[y]

    def _snr_weight(self, gamma: float, t: Tensor, batch: Batch) -> Tensor:
        """min(SNR, gamma) / SNR, for v-prediction / (SNR + 1)."""
        snr = self.model.snr().to(t.device)
        first = (batch.t_range or (0, 0))[0] if self.t_sampler != "soft" else 0
        if not self._warned and self.model.prediction_type == "epsilon" and bool((snr[first:] <= gamma).all()):
            self._warned = True
            log.warning("min_snr %g changes nothing: from t = %d on the ratio is below it everywhere.", gamma, first)
        over = snr[t] + (1 if self.model.prediction_type == "v" else 0)
        return (snr[t].clamp(max=gamma) / over).float()

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """With keep_norm, the vectors go back to the vocabulary's median norm."""
        if self.config.keep_norm:
            norm = self.model.text_encoder.get_input_embeddings().weight.float().norm(dim=1).median()
            self.vectors.mul_(norm / self.vectors.norm(dim=1, keepdim=True))

    def _tokens(self, captions: Sequence[str]) -> Tensor:
        # The prompts come again and again, and reading them is slow beside a small step.
        new = [c for c in dict.fromkeys(captions) if c not in self._ids]
        if new:
            self._ids.update(zip(new, self.model.tokens(new), strict=True))
        return torch.stack([self._ids[c] for c in captions])

    def _start(self, name: str) -> Tensor:
        """The vectors [k, d] that a concept starts from."""
        init = self.config.init
        if isinstance(init, dict):
            if name not in init:
                raise ConfigError(
                    f"method.init has no entry for concept {name!r}. It has: {', '.join(init) or 'none'}."
                )
            init = init[name]
        k, width = self.config.vectors, self.model.width
        if init == "zeros":
            return torch.zeros(k, width)
        kind, colon, std = init.partition(":")
        if kind == "normal" and colon:
            try:
                scale = float(std)
            except ValueError:
                scale = math.nan
            # nan too: it is not larger than 0.
            if not scale > 0:
                raise ConfigError(
                    f"method.init {init!r}: write normal:STD with a positive number, such as normal:0.02."
                )
            # By the name, so that a concept starts alike alone and among others.
            return KeyedRandom(self.seed, sample_ids([name])).normal("init", k * width).view(k, width) * scale
        if _is_file(init):
            return self._start_from_file(init)
        tokens = self.model.word_vectors(init).cpu()
        if len(tokens) > k:
            raise ConfigError(
                f"method.init {init!r} is {len(tokens)} tokens, and a word has {k} vectors, each of which starts from "
                f"one token.\n  Set method.vectors={len(tokens)} or more, or start from a word of fewer tokens."
            )
        if len(tokens) > 1:
            log.info("start     the %d vectors of %s from the %d tokens of %r, in turn", k, name, len(tokens), init)
        return tokens[[i % len(tokens) for i in range(k)]].clone()

    def _start_from_file(self, file: str) -> Tensor:
        """The vectors [k, d] of a word that was learned before."""
        learned = load_embedding(file, width=self.model.width)
        if len(learned.vectors) != self.config.vectors:
            raise ConfigError(
                f"method.init {file} holds {len(learned.vectors)} vectors, and method.vectors is "
                f"{self.config.vectors}. Set method.vectors={len(learned.vectors)}."
            )
        return learned.vectors.clone()

    def _apply(self, fn: Any, recurse: bool = True) -> "TextualInversion":
        """The frozen pipeline moves along, though it is no part of the state."""
        super()._apply(fn, recurse)
        self.model._apply(fn, recurse)
        self._ids = {}  # they may lie on another device now
        return self


def _word(init: str) -> str | None:
    """The word that an entry of `init` names; None for zeros, normal:STD and files."""
    return None if init == "zeros" or init.startswith("normal:") or _is_file(init) else init


def _is_file(init: str) -> bool:
    return init.lower().endswith((".safetensors", ".pt", ".bin"))
