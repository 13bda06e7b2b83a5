"""A frozen latent diffusion model, read from a diffusers Stable Diffusion folder: the one door to diffusers.

Pixels are [0, 1] here as everywhere; the VAE's own [-1, 1] stays inside. Learned token vectors are never written into
the text encoder: they are given to `text`, and a hook lays them over the embedding's output, so gradients reach them
alone. Nothing is fetched: a folder that lacks a part is refused by name. `tiny` is the pipeline that is shipped.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from poisonshield.errors import ConfigError, ShapeError
from poisonshield.models.diffusion.files import check_folder, reading, refuse_missing
from poisonshield.ops.diffusion import q_sample

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What settings and options call the types of a pipeline's networks."""

TINY = Path(str(resources.files("poisonshield.models.diffusion"))) / "tiny"
"""The shipped pipeline: a rendered world of shapes and colours at 64 pixels."""


Part = Any
"""A part of diffusers or transformers, whose settings (`config`) and inner parts only the running object declares."""


@dataclass(frozen=True)
class Placeholder:
    """A word of `count` learned vectors. In prompts it is written `token`; the tokenizer sees token, token_1, ..."""

    token: str
    first: int
    count: int

    @property
    def words(self) -> tuple[str, ...]:
        """What the tokenizer knows, one word per vector; the names that diffusers gives them too."""
        return (self.token, *(f"{self.token}_{i}" for i in range(1, self.count)))


@dataclass
class _TextCall:
    """What the running call of `text` is about: the learned rows [R, d] if there are any, and its ids [B, L]."""

    rows: Tensor | None = None
    ids: Tensor | None = None


class LatentDiffusion(nn.Module):
    """VAE, U-Net, text encoder, tokenizer and noise schedule of one folder; no weight of it requires gradients.

    prediction_type: "epsilon" or "v". alphas_cumprod [T] float32. factor: pixels per latent cell. vocabulary: how many
    words the text encoder has rows for; learned ones have the ids from there on.
    """

    vae: Part
    unet: Part
    text_encoder: Part
    alphas_cumprod: Tensor

    def __init__(
        self, vae: Part, unet: Part, text_encoder: Part, tokenizer: Part, scheduler: Part, *, name: str = "given"
    ) -> None:
        super().__init__()
        self.vae, self.unet, self.text_encoder = vae, unet, text_encoder
        self.tokenizer, self.scheduler, self.name = tokenizer, scheduler, name
        prediction = scheduler.config.get("prediction_type", "epsilon")
        if prediction not in ("epsilon", "v_prediction"):
            raise ConfigError(f"pipeline {name} predicts {prediction!r}; epsilon and v_prediction are supported.")
        self.prediction_type = "v" if prediction == "v_prediction" else "epsilon"
        # Not saved with the weights: the scheduler's settings give it again.
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod.float().clone(), persistent=False)
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.placeholders: dict[str, Placeholder] = {}
        self.vocabulary: int = text_encoder.get_input_embeddings().num_embeddings
        # In a record of its own, since rows may be a parameter, and one set as an attribute would be registered.
        self._call = _TextCall()
        embedding = text_encoder.get_input_embeddings()
        # Ids of learned words lie beyond the embedding's table: one hook hides them from it, one fills their rows in.
        embedding.register_forward_pre_hook(self._hide_learned)
        embedding.register_forward_hook(self._show_learned)
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> "LatentDiffusion":
        """The pipeline of a diffusers folder, or of "tiny", the one that ships with the package. Weights in `dtype`.

        Raises ConfigError naming the part that the folder lacks, or the family that it is of; DataError naming a file
        that is missing, damaged, a pointer of Git LFS, or asks for code. Never touches the network.
        """
        path = TINY if str(folder) == "tiny" else Path(folder)
        variants = check_folder(path)
        # A missing file would be asked for over the network otherwise.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()

        def read(kind: Any, part: str, **how: Any) -> Any:
            if variants.get(part):
                how["variant"] = variants[part]
            with reading(path / part):
                made = kind.from_pretrained(path / part, local_files_only=True, **how)
                if "output_loading_info" not in how:
                    return made
                refuse_missing(path / part, made[1]["missing_keys"])
                return made[0]

        # The loading info names weights that the file lacks; they would be random numbers.
        network = {"torch_dtype": dtype, "low_cpu_mem_usage": False, "output_loading_info": True}
        return cls(
            read(AutoencoderKL, "vae", **network),
            read(UNet2DConditionModel, "unet", **network),
            read(CLIPTextModel, "text_encoder", dtype=dtype, output_loading_info=True),
            read(CLIPTokenizer, "tokenizer"),
            read(DDPMScheduler, "scheduler"),
            name=str(folder),
        )

    @property
    def num_timesteps(self) -> int:
        """How many timesteps the noise schedule has, T."""
        return len(self.alphas_cumprod)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights. Latents, noise and losses are float32 (float64 where the networks are)."""
        return next(self.unet.parameters()).dtype  # diffusers' own answer goes through all of them in every step

    @property
    def latent_channels(self) -> int:
        """C of latents [B, C, h, w]."""
        return int(self.vae.config.latent_channels)

    @property
    def width(self) -> int:
        """The size of one token vector."""
        return int(self.text_encoder.config.hidden_size)

    def digest(self) -> str:
        """A hash of what decides the results: weights, settings of the networks and the schedule, and the vocabulary.

        Neither learned words nor the place that the pipeline was read from count.
        """
        out = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            # As bytes, because numpy knows no bfloat16.
            out.update(name.encode() + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        # Keys that begin with _ tell how a file was written and read; one is a list in the order of a set.
        settings = [
            {name: value for name, value in part.config.items() if not name.startswith("_")}
            for part in (self.scheduler, self.vae, self.unet)
        ]
        text = self.text_encoder.config
        words = sorted((i, word) for word, i in self.tokenizer.get_vocab().items() if i < self.vocabulary)
        rest = [self.prediction_type, text.num_attention_heads, text.hidden_act, self.tokenizer.model_max_length, words]
        out.update(json.dumps([settings, rest], sort_keys=True, default=str).encode())
        return out.hexdigest()

    # Pixels and latents

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, std) of the VAE's posterior of x [B, 3, H, W] in [0, 1], each [B, C, h, w], unscaled. Differentiable.

        Raises ShapeError unless H and W are multiples of `factor`.
        """
        if x.dim() != 4 or x.shape[1] != 3 or any(s % self.factor for s in x.shape[2:]):
            raise ShapeError(
                f"pixels have shape {tuple(x.shape)}; [B, 3, H, W] with H and W multiples of {self.factor} are wanted."
            )
        posterior = self.vae.encode(x.to(self.dtype) * 2 - 1).latent_dist
        return self._full(posterior.mean), self._full(posterior.std)

    def encode(self, x: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """Scaled latents z [B, C, h, w] of x [B, 3, H, W] in [0, 1]: the posterior's mean, with `noise` its sample."""
        mean, std = self.posterior(x)
        return self.scale(mean if noise is None else mean + std * noise)

    def scale(self, z: Tensor) -> Tensor:
        """The VAE's latents as the U-Net wants them."""
        return (z - self._shift) * self.vae.config.scaling_factor

    def decode(self, z: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] of scaled latents, not clipped. Differentiable."""
        z = z / self.vae.config.scaling_factor + self._shift
        return self._full(self.vae.decode(z.to(self.dtype)).sample) / 2 + 0.5

    # Text

    def add_placeholder(self, token: str, count: int = 1) -> Placeholder:
        """Makes `token` a word of `count` vectors, given to `text` as rows. The first one's rows come first, and so on.

        Raises ConfigError if the vocabulary knows the word, or the tokenizer would take it apart.
        """
        known = self.tokenizer.get_vocab()
        if token != token.lower() or token.split() != [token]:
            raise ConfigError(f"placeholder {token!r} must be lower case and without spaces, such as <sks>.")
        first = self.vocabulary + sum(p.count for p in self.placeholders.values())
        placeholder = Placeholder(token, first, count)
        for word in placeholder.words:
            if word in known or f"{word}</w>" in known:
                raise ConfigError(
                    f"placeholder {word!r} is a word of the vocabulary already. Choose another, such as <sks>."
                )
        self.tokenizer.add_tokens(list(placeholder.words))
        ids = [self.tokenizer.convert_tokens_to_ids(w) for w in placeholder.words]
        if ids != list(range(first, first + count)):
            raise ConfigError(
                f"the tokenizer of {self.name} gives {token!r} the ids {ids}, and its text encoder has "
                f"{self.vocabulary} rows, so {first} was wanted. The two do not belong together."
            )
        self.placeholders[token] = placeholder
        return placeholder

    def word_vectors(self, word: str) -> Tensor:
        """The rows [n, d] of a word's n tokens, float32. Raises ConfigError for a learned word, and for none."""
        ids = self.tokenizer(word, add_special_tokens=False).input_ids
        if not ids or max(ids) >= self.vocabulary:
            raise ConfigError(f"{word!r} is no word of the vocabulary of {self.name}, to start from its vector.")
        return self.text_encoder.get_input_embeddings().weight[ids].detach().float().clone()

    def word_vector(self, word: str) -> Tensor:
        """The row [d] of a word, float32. Raises ConfigError if the tokenizer takes it apart."""
        rows = self.word_vectors(word)
        if len(rows) != 1:
            raise ConfigError(
                f"{word!r} is {len(rows)} tokens; a word of one token is wanted, to start from its vector."
            )
        return rows[0]

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids int64 [B, L], padded. Raises ConfigError for a prompt that is longer: its end would not count."""
        texts = list(prompts)
        if self.placeholders:
            longest_first = sorted(self.placeholders, key=len, reverse=True)  # <cats> before <cat, if both are words
            pattern = re.compile("|".join(map(re.escape, longest_first)))
            texts = [pattern.sub(lambda m: " ".join(self.placeholders[m[0]].words), prompt) for prompt in prompts]
        length = self.tokenizer.model_max_length
        made = self.tokenizer(texts, padding="max_length", max_length=length, verbose=False).input_ids
        for prompt, ids in zip(prompts, made, strict=True):
            if len(ids) > length:
                raise ConfigError(
                    f"the prompt {prompt!r} is {len(ids) - length} tokens too many: it has {len(ids)} with the marks "
                    f"at its ends, and {self.name} reads {length}. Shorten it; what falls off its end would not count."
                )
        return torch.tensor(made).to(self.alphas_cumprod.device)

    def text(self, ids: Tensor, rows: Tensor | None = None) -> Tensor:
        """The context [B, L, d_c] of ids [B, L]. rows [R, d]: the vectors of all placeholders; gradients reach them."""
        if rows is None and bool((ids >= self.vocabulary).any()):
            raise ConfigError("a prompt holds a placeholder, and no vectors were given for it.")
        with self._lend(rows):
            return self.text_encoder(ids).last_hidden_state

    def prompts(self, prompts: Sequence[str], rows: Tensor | None = None) -> Tensor:
        """The context [B, L, d_c] of texts."""
        return self.text(self.tokens(prompts), rows)

    # Noise and prediction

    def noised(self, z: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """z_t [B, C, h, w] of latents z, timesteps t int64 [B] and noise. Differentiable in z."""
        return q_sample(z, t, self.alphas_cumprod.to(z.dtype), noise=noise, return_noise=False)[0]

    def predict(self, z_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """The U-Net's prediction [B, C, h, w] for z_t: the noise, or the velocity where prediction_type is "v"."""
        return self._full(self.unet(z_t.to(self.dtype), t, encoder_hidden_states=context.to(self.dtype)).sample)

    def target(self, z: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What `predict` should give, [B, C, h, w]."""
        if self.prediction_type == "epsilon":
            return noise
        a = self.alphas_cumprod.to(z.dtype)[t].view(-1, 1, 1, 1)
        return a.sqrt() * noise - (1 - a).sqrt() * z

    def epsilon(self, pred: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """The noise [B, C, h, w] that follows from a prediction."""
        if self.prediction_type == "epsilon":
            return pred
        a = self.alphas_cumprod.to(pred.dtype)[t].view(-1, 1, 1, 1)
        return a.sqrt() * pred + (1 - a).sqrt() * z_t

    def snr(self) -> Tensor:
        """The signal-to-noise ratio of every timestep, float64 [T]."""
        a = self.alphas_cumprod.double()
        return a / (1 - a)

    @property
    def _shift(self) -> float:
        return self.vae.config.get("shift_factor") or 0.0  # older VAEs have none, and some files say null

    def _full(self, x: Tensor) -> Tensor:
        """x in float32 at least, whatever the networks' precision."""
        return x if x.dtype == torch.float64 else x.float()

    @contextmanager
    def _lend(self, rows: Tensor | None) -> Iterator[None]:
        """Inside, the text encoder's embedding has these rows too."""
        self._call.rows = rows
        try:
            yield
        finally:
            self._call = _TextCall()

    def _hide_learned(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Gives the embedding some known word in the place of every learned one."""
        self._call.ids = args[0]
        return (args[0].clamp(max=self.vocabulary - 1), *args[1:])

    def _show_learned(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """Lays the learned rows over the embedding's output where their words stand."""
        rows, ids = self._call.rows, self._call.ids
        if rows is None or ids is None:
            return out
        learned = ids >= self.vocabulary
        rows = rows[(ids - self.vocabulary).clamp(min=0)].to(out.dtype)
        return torch.where(learned[..., None], rows, out)
