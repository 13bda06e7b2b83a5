"""Whether a diffusers folder is a plain Stable Diffusion pipeline, told from its settings before a library reads them.

Two questions. Do the settings ask for code: a class, a kernel or weights that would be fetched or imported? Those are
refused. And which family is it: one with another U-Net or more text encoders fails far from here, or draws nonsense.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from poisonshield.errors import ConfigError, DataError

PIPELINES = frozenset(
    {
        "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionPipelineSafe",
        "StableDiffusionControlNetPipeline", "StableDiffusionAttendAndExcitePipeline", "StableDiffusionSAGPipeline",
        "StableDiffusionKDiffusionPipeline", "StableDiffusionPanoramaPipeline", "StableDiffusionLDM3DPipeline",
    }
)  # fmt: skip
"""What model_index.json may call a pipeline of these parts."""

SCHEDULERS = frozenset(
    f"{name}Scheduler"
    for name in (
        "DDPM", "DDIM", "DDIMInverse", "DDIMParallel", "DDPMParallel", "PNDM", "LMSDiscrete", "EulerDiscrete",
        "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverMultistep",
        "DPMSolverMultistepInverse", "DPMSolverSinglestep", "DPMSolverSDE", "DEISMultistep", "UniPCMultistep", "LCM",
        "TCD", "SASolver", "IPNDM",
    )
)  # fmt: skip

_CLASSES = {"vae": {"AutoencoderKL"}, "unet": {"UNet2DConditionModel"}, "scheduler": SCHEDULERS}
_TOKENIZERS = {"CLIPTokenizer", "CLIPTokenizerFast", "TokenizersBackend"}
_TEXT_MODELS = {"clip_text_model", "clip"}

_CODE = {
    "auto_map", "trust_remote_code", "custom_pipeline", "custom_pipelines", "_custom_pipeline", "custom_code",
    "configuration_files", "fast_tokenizer_files", "transformers_weights", "kernel_config", "use_kernels",
    "quantization_config",
}  # fmt: skip
"""Settings by which libraries import, fetch or read something else than the files that were looked at."""
_ATTENTION = {"_attn_implementation", "attn_implementation", "_attn_implementation_internal"}
_PLAIN_ATTENTION = (None, "eager", "sdpa", "")

_INPUTS = {
    9: "an inpainting model", 8: "InstructPix2Pix", 7: "an upscaler", 5: "a depth model", 12: "an inpainting model",
}  # fmt: skip
"""What a U-Net is by its number of input channels, where they are not those of the latents."""


def refuse_code(file: Path, settings: Any) -> None:
    """Raise DataError if the settings of a part ask a library to import or fetch something. Nothing has read them."""
    for name, value in _entries(settings):
        code = name in _CODE and value not in (None, False, [], {})
        kernels = value.values() if isinstance(value, dict) else (value,)
        if code or (name in _ATTENTION and any(kernel not in _PLAIN_ATTENTION for kernel in kernels)):
            raise DataError(
                f"{file}: {name} is {value!r}, by which a library would fetch code or other weights and use them.\n"
                "  Take the entry out if you trust the rest, or get the pipeline from another source."
            )


def _entries(settings: Any) -> Iterator[tuple[str, Any]]:
    """All (name, value) pairs at every depth."""
    inside = [settings]
    while inside:
        value = inside.pop()
        if isinstance(value, dict):
            yield from value.items()
        if isinstance(value, dict | list):
            inside += value.values() if isinstance(value, dict) else value


def refuse_other_family(folder: Path, index: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ConfigError that names what a folder is, if it is no Stable Diffusion 1 or 2 pipeline for text.

    index: its model_index.json, {} without one. parts: settings by part.
    """
    unet, text, vae = parts["unet"], parts["text_encoder"], parts["vae"]
    for part, classes in _CLASSES.items():
        if (found := parts[part].get("_class_name")) not in (None, *classes):
            raise _other(folder, f"its {part} is a {found}")
    if (folder / "text_encoder_2").exists() or unet.get("addition_embed_type"):
        raise _other(folder, "Stable Diffusion XL, with a second text encoder")
    if text.get("model_type") not in (None, *_TEXT_MODELS):
        raise _other(folder, f"its text encoder is a {text['model_type']}")
    if (found := parts["tokenizer"].get("tokenizer_class")) not in (None, *_TOKENIZERS):
        raise _other(folder, f"its tokenizer is a {found}")
    latents, inputs = vae.get("latent_channels", 4), unet.get("in_channels", 4)
    if inputs != latents:
        known = _INPUTS.get(inputs) if isinstance(inputs, int) else None
        raise _other(folder, f"{known or 'an unknown one'}, whose U-Net takes {inputs} channels")
    for name in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim"):
        if unet.get(name):
            raise _other(folder, f"one whose U-Net wants more than a text and a timestep ({name})")
    if (found := index.get("_class_name")) not in (None, *PIPELINES):
        raise _other(folder, str(found))
    _refuse_mismatch(folder, parts)


def refuse_without_unet(folder: Path, index: Mapping[str, Any]) -> None:
    """Raise ConfigError for a folder that has a transformer in the U-Net's place."""
    if (folder / "transformer").is_dir() and not (folder / "unet").exists():
        raise _other(folder, f"{index.get('_class_name', 'one with a diffusion transformer')}")


def _refuse_mismatch(folder: Path, parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ConfigError for parts of two models."""
    taken, given = parts["unet"].get("cross_attention_dim", 1280), parts["text_encoder"].get("hidden_size", 512)
    if any(width != given for width in (taken if isinstance(taken, list) else [taken])):
        raise ConfigError(
            f"{folder} is made of parts of two models: its U-Net takes text vectors {taken} wide, and its text encoder "
            f"gives {given}.\n  Copy all parts from one and the same source."
        )
    length, most = parts["tokenizer"].get("model_max_length"), parts["text_encoder"].get("max_position_embeddings", 77)
    if not isinstance(length, int) or not isinstance(most, int) or not 2 < length <= most:
        raise ConfigError(
            f"{folder}: tokenizer/tokenizer_config.json says model_max_length {length}, and the text encoder reads 3 "
            f"to {most} tokens.\n  Copy both parts from one and the same source."
        )


def _other(folder: Path, family: str) -> ConfigError:
    return ConfigError(
        f"{folder} is of another family: {family}.\n  Stable Diffusion 1 and 2 for text are supported: one text "
        "encoder (CLIP), one U-Net that takes the latents alone. Give such a folder, or `tiny`."
    )
