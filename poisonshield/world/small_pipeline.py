"""A Stable Diffusion pipeline of any size, built from nothing and written as a diffusers folder.

For pipelines that are trained here, and for tests that need a pipeline's plumbing. No file is fetched: the tokenizer's
vocabulary is the bytes and the words that it is given.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

from pydantic import Field

from poisonshield.config import Settings
from poisonshield.models.diffusion.pipeline import Part

_START, _END = "<|startoftext|>", "<|endoftext|>"


class VAEConfig(Settings):
    """The size of the VAE."""

    channels: tuple[int, ...] = Field(
        (24, 48, 48), description="Channels of each level; every level after the first halves the picture."
    )
    layers: int = Field(1, ge=1, description="Residual blocks on each level.")
    latent_channels: int = Field(4, ge=1, description="Channels of the latents.")
    groups: int = Field(8, ge=1, description="Groups of each group norm; they divide every level's channels.")


class UNetConfig(Settings):
    """The size of the U-Net."""

    channels: tuple[int, ...] = Field(
        (48, 96), description="Channels of each level; every level after the first halves the latents."
    )
    attention: tuple[bool, ...] = Field((False, True), description="Which of the levels see the text.")
    layers: int = Field(1, ge=1, description="Residual blocks on each level.")
    head: int = Field(8, ge=1, description="What diffusers calls the size of an attention head.")
    groups: int = Field(8, ge=1, description="Groups of each group norm; they divide every level's channels.")


class TextConfig(Settings):
    """The size of the CLIP text model."""

    width: int = Field(64, ge=8, description="Width of a token's vector, and of the context that the U-Net sees.")
    layers: int = Field(2, ge=1, description="Transformer blocks.")
    heads: int = Field(4, ge=1, description="Attention heads of each block; they divide the width.")
    length: int = Field(24, ge=8, description="Tokens of a prompt, start and end included.")


def build_vae(config: VAEConfig, *, sample_size: int) -> Part:
    """diffusers' AutoencoderKL with random weights and scaling_factor 1."""
    from diffusers import AutoencoderKL

    levels = len(config.channels)
    return AutoencoderKL(
        block_out_channels=config.channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=config.layers,
        latent_channels=config.latent_channels,
        norm_num_groups=config.groups,
        sample_size=sample_size,
        # Measured after training, see Autoencoder.measure_scale.
        scaling_factor=1.0,
    )


def build_unet(config: UNetConfig, *, sample_size: int, latent_channels: int, context: int) -> Part:
    """diffusers' UNet2DConditionModel with random weights. context: width of the text encoder."""
    from diffusers import UNet2DConditionModel

    attention = config.attention
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        layers_per_block=config.layers,
        block_out_channels=config.channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        cross_attention_dim=context,
        attention_head_dim=config.head,
        norm_num_groups=config.groups,
    )


def build_text_encoder(config: TextConfig, tokenizer: Part) -> Part:
    """transformers' CLIPTextModel with random weights for this tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=2 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler(prediction: Literal["epsilon", "v_prediction"] = "epsilon") -> Part:
    """The noise schedule of Stable Diffusion: 1000 steps, scaled linear from 0.00085 to 0.012."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        prediction_type=prediction,
    )


def build_tokenizer(words: Sequence[str], folder: Path, *, length: int) -> Part:
    """A CLIP tokenizer to which each of `words` is one token and any other text is bytes; its files go to `folder`."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    merges = _merges(words)
    symbols = [chr(c) for c in _byte_symbols()]
    vocabulary = [*symbols, *(f"{s}</w>" for s in symbols), *("".join(m) for m in merges), _START, _END]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(dict.fromkeys(vocabulary))}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(m) for m in merges)]) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=length, local_files_only=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_pipeline(
    folder: Path, *, vae: Part, unet: Part, text_encoder: Part, tokenizer: Part, scheduler: Part
) -> None:
    """Writes the parts as a folder that diffusers' StableDiffusionPipeline and LatentDiffusion read."""
    import diffusers

    for name, part in {"vae": vae, "unet": unet, "text_encoder": text_encoder, "scheduler": scheduler}.items():
        part.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", type(text_encoder).__name__],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))


def _byte_symbols() -> list[int]:
    """The 256 printable code points that stand for bytes in CLIP's vocabulary, in its order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return plain + [256 + i for i in range(256 - len(plain))]


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Merges that turn each word into one token; later ones never reach into an earlier word."""
    merges: list[tuple[str, str]] = []
    for word in sorted(set(words), key=lambda w: (-len(w), w)):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while True:
            pairs = [pair for pair in pairwise(pieces) if pair in merges]
            if not pairs:
                break
            pieces = _merge(pieces, min(pairs, key=merges.index))
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _merge(pieces, merges[-1])
    return merges


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """The pieces with every such pair of neighbours made one."""
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out
