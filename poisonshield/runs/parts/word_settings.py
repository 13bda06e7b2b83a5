"""What the settings of a textual inversion are: pipeline, pictures, and what is drawn with the words in the end."""

import re
from hashlib import sha256
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from poisonshield.config import Settings

RENDERED = "rendered"
"""What data.train says for pictures of the rendered world."""


class ModelConfig(Settings):
    """The frozen pipeline."""

    pipeline: str = Field("tiny", description="A diffusers Stable Diffusion folder, or tiny for the shipped one.")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="Of its networks.")


class ConceptData(Settings):
    """What is learned from."""

    train: str = Field(
        RENDERED,
        description="A folder of pictures (one concept), of such folders, in NC10's form or of WebDataset tars; or "
        "rendered.",
    )
    concepts: tuple[str, ...] | None = Field(None, description="Which ones, such as [yellow ring]; null for all.")
    group: Literal["all", "id", "od"] = Field("all", description="NC10's split.")
    count: int = Field(5, ge=1, description="Pictures of each rendered concept.")
    rendered_seed: int = Field(
        1, ge=1, description="What rendered pictures are drawn from; 0 is what pipelines train on."
    )
    size: int | None = Field(None, ge=8, description="Pixels a side; null for the pipeline's own.")
    crop: Literal["center", "squash"] = Field(
        "center", description="The centred square, or all with its aspect given up."
    )
    masks: Literal["file", "alpha"] | None = Field(
        None, description="Where masks come from; read only if a defense uses them."
    )
    mask_reference: Literal["file", "alpha"] | None = Field(
        None, description="Masks to compare those with that a defense makes itself; nothing learns from them."
    )
    left_out: int | None = Field(
        None,
        ge=0,
        description="Number, by file name, of the picture that is not learned from, and alone compared with.",
    )
    tokens: dict[str, str] = Field({}, description="Concept -> placeholder; by default <name>.")
    prompts: Literal["templates", "caption"] | tuple[str, ...] = Field(
        "templates", description="templates, caption, or a list of texts with {}."
    )
    flip: float = Field(0.5, ge=0, le=1, description="Share of samples that are mirrored.")
    batch_size: int = Field(4, ge=1, description="Of each concept, on all ranks together.")
    poison: Any = Field(None, description="null, a diffusion poison's name, or a block with `name:`.")
    poison_seed: int | None = Field(None, ge=0, description="Of the poison; null for the run's.")
    poison_cache: str | None = Field(None, description="Folder of poisoned pictures; null for one in the run folder.")
    poison_masks: Literal["file", "alpha"] | None = Field(
        None, description="Masks for the attacker; what the poison does with them is its setting `mask`."
    )


class GenerateConfig(Settings):
    """Pictures made from what was learned. All runs of one seed share their noise."""

    renamed: ClassVar[dict[str, str]] = {"features": "/evaluate.networks.folders"}

    recon: tuple[str, ...] = Field(("a photo of a {}",), min_length=1, description="Prompts with {} for the concept.")
    compose: tuple[str, ...] = Field((), description="Further prompts, such as a {} on the beach.")
    count: int = Field(50, ge=1, description="Pictures of a prompt group and concept.")
    steps: int = Field(50, ge=1, description="DDIM steps.")
    guidance: float = Field(7.5, ge=0, description="Classifier-free guidance.")
    seed: int = Field(42, ge=0, description="Of the noise.")
    every_steps: int | None = Field(
        None, ge=1, description="Pictures while training, at the next logged step; null for none."
    )
    switch: bool = Field(False, description="Below t_min, generate with the word that learning started from.")
    references: int = Field(64, ge=1, description="Unseen pictures of a rendered concept to compare with.")
    clean: str | None = Field(
        None, description="Folder of the pictures before they were poisoned, where the run did not poison them itself."
    )

    @field_validator("recon", "compose")
    @classmethod
    def _prompts_hold_the_word(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        for prompt in prompts:
            if prompt.replace("{}", "", 1).count("{") or "{}" not in prompt:
                raise ValueError(f"{prompt!r} must have one {{}} where the learned word belongs, and no other braces")
        return prompts


def choose_token(data: ConceptData, name: str) -> str:
    """The placeholder of a concept: the config's, or its name in angle brackets."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return data.tokens.get(name) or f"<{plain or sha256(name.encode()).hexdigest()[:8]}>"
