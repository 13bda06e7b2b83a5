"""Networks that turn pictures, and some of them texts, into features: CLIP, DINO and their kind, from a folder on disk.

Each is fed by its own preprocessing (size, mean, standard deviation), read from the same folder. Nothing is fetched and
no code or pickle of the folder is run.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poisonshield.errors import ConfigError, ShapeError

_ALWAYS = ("config.json", "preprocessor_config.json", "model.safetensors")


def lacking(folder: str | Path) -> str | None:
    """The path of the first file that a feature network needs and `folder` lacks, or None if all are there."""
    folder = Path(folder)
    for name in _ALWAYS:
        # Large networks are stored in several files, and an index names them.
        if not (folder / name).is_file() and not (folder / f"{name}.index.json").is_file():
            return str(folder / name)
    return None


class FeatureNetwork:
    """`images(x)` and, if `reads_text`, `texts(prompts)`: features in one space, [N, D] float32 on its device."""

    def __init__(self, model: Any, preprocessor: Any, tokenizer: Any | None) -> None:
        """The parts are transformers': a network, its image processor, and its tokenizer if it reads text."""
        self.model, self.preprocessor, self.tokenizer = model.requires_grad_(False).eval(), preprocessor, tokenizer

    @classmethod
    def load(cls, folder: str | Path) -> "FeatureNetwork":
        """The network of a folder that transformers' save_pretrained wrote. Raises ConfigError naming what it lacks."""
        missing = lacking(folder)
        if missing:
            raise ConfigError(
                f"{missing} is missing. Give a folder with the config, preprocessing and safetensors weights of a CLIP "
                "or DINO network, such as a copy of openai/clip-vit-base-patch16."
            )
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        # A folder may hold code of its own; none of it is run.
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        model = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, **local)
        tokenizer = None
        if hasattr(model, "get_text_features"):
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        return cls(model, AutoImageProcessor.from_pretrained(folder, **local), tokenizer)

    @property
    def reads_text(self) -> bool:
        """Whether texts have features too, as with CLIP."""
        return self.tokenizer is not None

    @property
    def scale(self) -> float:
        """What cosines of pictures and texts are multiplied by before a softmax."""
        return float(self.model.logit_scale.exp())

    @torch.no_grad()
    def images(self, x: Tensor, *, micro_batch: int = 32) -> Tensor:
        """Features of pictures [N, 3, H, W] in [0, 1]: CLIP's projection, else the class token.

        Pictures are rounded to 8 bits first, as files are. Raises ShapeError for other shapes.
        """
        if x.dim() != 4 or x.shape[1] != 3 or not len(x):
            raise ShapeError(f"pictures have shape {tuple(x.shape)}; [N, 3, H, W] with at least one is wanted.")
        levels = (x.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        out = []
        for part in levels.split(micro_batch):
            pixels = self.preprocessor(images=list(part), return_tensors="pt").pixel_values.to(self.model.device)
            if self.reads_text:
                out.append(_unwrap(self.model.get_image_features(pixel_values=pixels)))
            else:
                out.append(self.model(pixel_values=pixels).last_hidden_state[:, 0])
        return torch.cat(out).float()

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Features of texts; longer ones than the network reads are cut. Raises ConfigError if it reads none."""
        if self.tokenizer is None:
            raise ConfigError(
                "this network reads pictures alone. Give the folder of one that reads texts, as CLIP does."
            )
        made = self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
        made = {k: v.to(self.model.device) for k, v in made.items() if k in ("input_ids", "attention_mask")}
        return _unwrap(self.model.get_text_features(**made)).float()


def _unwrap(made: Any) -> Tensor:
    """The features themselves: transformers 5 wraps what 4 gave plainly."""
    return getattr(made, "pooler_output", made)
