"""Safe-Zone Training: purified pixels, high timesteps, and a loss on the concept alone. Source: Styborski et al. 2025.

A poison's signal lies at high spatial frequencies, acts at low timesteps, and draws learning away from the concept.
JPEG takes the first, the other two are left out of training. Generation is not touched, and what is learned is an
ordinary embedding. The paper's abstract names these three parts; quality 25, t from 500 and the loss's form are choices
of ours.
The price: at high timesteps a concept's fine details teach little, so learning is slower and coarser.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.config import Choice, From, Settings
from poisonshield.defenses.base import Context, Defense
from poisonshield.defenses.diffusion.masks.base import MaskProvider, looks_wrong
from poisonshield.defenses.diffusion.purify.background import with_background
from poisonshield.defenses.purify.named import build_purifier, purifier_block
from poisonshield.errors import ConfigError, DataError
from poisonshield.keys import picture_of
from poisonshield.losses.zone import Zone
from poisonshield.method import DiffusionMethod
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.registry import Registry

log = logging.getLogger(__name__)

MASKS = Registry("poisonshield.defenses.diffusion.masks", kind="mask")
GIVEN: tuple[Literal["file", "alpha"], ...] = ("file", "alpha")
"""Masks that come with the batch."""


class SZT(Defense):
    """`before` purifies x, settles the mask and sets t_range; `wrap` tells the method where its loss counts.

    Masks that need the pipeline, and timesteps counted from its end, take it from the context. Random backgrounds
    apart, a picture's result depends on its pixels and key alone, so that it may be kept.
    areas, ious: of each picture seen, the mask's share of it, and its overlap with the given mask if there is one.
    """

    name: ClassVar[str] = "szt"

    once: ClassVar[bool] = True  # a method has one zone and one sampler

    class Config(Settings):
        """Three parts: purified pixels (purifier), high timesteps (t_*), and the concept alone (mask*, loss_norm)."""

        renamed: ClassVar[dict[str, str]] = {"mask_box": "mask.side", "mask_word": "mask.word"}

        purifier: Any = Field(
            {"name": "jpeg", "quality": 25, "subsampling": "420"},
            validate_default=True,
            description="null, a purifier's name or text such as jpeg:25, or a block with `name:`.",
        )
        t_min: int | float | Literal["auto"] = Field(
            500,
            description="First timestep: a number, a fraction of all, or auto, which asks the pictures (see survey).",
        )
        t_max: int | None = Field(None, ge=1, description="The first timestep beyond; null for all.")
        t_sampler: Literal["uniform", "stratified", "soft"] = Field(
            "uniform", description="How timesteps are drawn; soft is a floor without an edge."
        )
        mask: Annotated[Choice | str | None, From(MASKS, also=(None, *GIVEN))] = Field(
            "file",
            description="Where the concept is: file and alpha come with the data; a mask's name or block makes one.",
        )
        mask_resize: Literal["area", "nearest", "max"] = Field(
            "area", description="How masks become as small as latents, see losses.zone.Zone."
        )
        mask_floor: float = Field(0.0, ge=0, le=1, description="Weight of what lies outside the mask.")
        mask_dilate: int = Field(1, ge=0, description="Latent cells by which masks grow.")
        loss_norm: Literal["per_image", "batch", "plain"] = Field(
            "per_image", description="What the masked loss is divided by, see losses.zone.Zone."
        )
        background: Literal["keep", "mean", "noise", "swap"] = Field(
            "keep", description="What surrounds the concept, see with_background."
        )
        t_reference: Any = Field(
            {"name": "jpeg", "quality": 10, "subsampling": "420"},
            validate_default=True,
            description="The second purifier, which t_min: auto compares with the first.",
        )

        @field_validator("purifier", "t_reference", mode="before")
        @classmethod
        def _purifier(cls, value: Any) -> dict[str, Any] | None:
            return purifier_block(value)

        @field_validator("t_min", mode="before")
        @classmethod
        def _timestep(cls, value: Any) -> int | float | str:
            if isinstance(value, str) and "/" in value:
                top, _, bottom = value.partition("/")
                value = (
                    int(top) / int(bottom)
                    if top.strip().isdigit() and bottom.strip().isdigit() and int(bottom)
                    else value
                )
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            if whole or (isinstance(value, float) and 0 < value < 1) or value == "auto":
                return value
            raise ValueError(
                f"{value!r}: a whole number of timesteps, a fraction between 0 and 1 of all, or auto is wanted"
            )

        @model_validator(mode="after")
        def _together(self) -> "SZT.Config":
            if isinstance(self.t_min, int) and self.t_max is not None and self.t_min >= self.t_max:
                raise ValueError(f"t_min {self.t_min} leaves no timestep below t_max {self.t_max}")
            if self.background != "keep" and self.mask is None:
                raise ValueError(f"background {self.background} needs a mask, to know what it surrounds")
            if self.t_min == "auto" and self.t_reference in (None, self.purifier):
                raise ValueError("t_min auto compares two purifiers: give t_reference another one than purifier")
            return self

    def __init__(self, config: Config, context: Context | None = None) -> None:
        super().__init__(config, context)
        self._purifier = build_purifier(config.purifier, seed=self.seed)
        mask = config.mask
        self._masks: MaskProvider | None = mask.cls(mask.config, seed=self.seed) if isinstance(mask, Choice) else None
        self.resolved: int | None = None
        self.areas: dict[str, float] = {}
        self.ious: dict[str, float] = {}

    @property
    def model(self) -> LatentDiffusion:
        """The run's pipeline. Raises ConfigError where the context has none."""
        if self.context.model is None:
            raise ConfigError("szt does not know the pipeline: build it with Context(model=model, words=...).")
        return self.context.model

    @property
    def label(self) -> str:
        """'szt' with the usual settings; else its parts and what else is not usual, so that what differs is called
        differently, as in 'szt(jpeg50, t500, mask, mask_dilate 2)'."""
        c, usual = self.config, type(self.config)()
        parts = [] if c.purifier is None else [_name_purifier(c.purifier)]
        if c.t_min != 0 or c.t_max is not None:
            parts.append(f"t{c.t_min}" + ("" if c.t_max is None else f"-{c.t_max}"))
        if c.mask is not None:
            parts.append(_name_mask(c.mask))
        if c.background != "keep":
            parts.append(f"on {c.background}")
        idle = {"purifier", "t_min", "t_max", "mask", "background"}  # told already, or without effect
        idle |= {"mask_resize", "mask_floor", "mask_dilate"} if c.mask is None else set()
        idle |= set() if c.t_min == "auto" else {"t_reference"}
        for name in type(c).model_fields:
            if name not in idle and (value := getattr(c, name)) != getattr(usual, name):
                parts.append(f"{name} {_name_purifier(value) if isinstance(value, dict) else value}")
        return self.name if parts == ["jpeg25", "t500", "mask"] else f"{self.name}({', '.join(parts) or 'off'})"

    @property
    def exact(self) -> bool:
        """Unless a network purifies the pictures or makes the masks."""
        return (self._purifier is None or self._purifier.exact) and not self._asks_for_words()

    @property
    def redraws(self) -> bool:
        """Where backgrounds are drawn."""
        return self.config.background in ("noise", "swap")

    @property
    def wants_masks(self) -> Literal["file", "alpha"] | None:
        """Masks that come with the data, if it takes such."""
        return self.config.mask if self.config.mask in GIVEN else None

    @property
    def makes_masks(self) -> bool:
        """Where a mask provider is set."""
        return self._masks is not None

    @property
    def surveys(self) -> bool:
        """For t_min: auto."""
        return self.config.t_min == "auto"

    @property
    def t_range(self) -> tuple[int, int]:
        """[first, end) of the timesteps trained on. Raises ConfigError unless it is known and fits the pipeline."""
        c, total = self.config, self.model.num_timesteps
        first = c.t_min
        if first == "auto":
            if self.resolved is None:
                raise ConfigError("szt.t_min is auto and not resolved. Call survey(batch, rows, prompts) first.")
            first = self.resolved
        elif isinstance(first, float):
            first = round(first * total)
        end = total if c.t_max is None else c.t_max
        if end > total or first >= end:
            raise ConfigError(
                f"szt trains on timesteps {first} to {end - 1}, and {self.model.name} has 0 to {total - 1}. "
                "Lower t_min or t_max; fractions of t_min count from the pipeline's own number."
            )
        return first, end

    def wrap(self, method: DiffusionMethod) -> DiffusionMethod:
        """The method itself, with zone and t_sampler set. Raises ConfigError for one that learns no words."""
        if not method.trains_words:
            raise ConfigError(
                f"szt guards the training of words of a diffusion model, and {method.name} is none. "
                "Use method.name: textual_inversion."
            )
        c = self.config
        if self._asks_for_words() and c.mask.config.word is None and None in (self.context.words or (None,)):
            raise ConfigError(
                f"szt.mask {c.mask.name} looks for a word. Set szt.mask.word, or let method.init be a word."
            )
        if c.t_min != "auto" or self.resolved is not None:
            _ = self.t_range  # an error about it should come before training, not in its first step
        method.zone = Zone(norm=c.loss_norm, resize=c.mask_resize, floor=c.mask_floor, dilate=c.mask_dilate)
        method.t_sampler = c.t_sampler
        return method

    def before(self, batch: Batch) -> Batch:
        """x purified and composited, mask [B, 1, H, W] or None, t_range. Raises ConfigError and DataError."""
        t_range = self.t_range
        if self._purifier is not None:
            batch = self._purifier.before(batch)
        # Masks are made from purified pictures, so that a poison has less of a say in where learning looks.
        batch = batch.replace(mask=self._find_mask(batch), t_range=t_range)
        return with_background(batch, self.config.background, seed=self.seed)

    def survey(self, batch: Batch, rows: Tensor, prompts: Sequence[str]) -> int:
        """The first timestep, read off the gradients on these pictures where t_min is auto, and kept.

        A poison does not survive two purifiers alike, so from where on their gradients agree, it no longer matters.
        A hint at most: on `tiny`, five pictures under AdvDM (16 levels) gave 700, 700 and 800 from three starts of the
        words (48 draws; with 16: 700 to 800, or the fallback), clean ones 750 and 700 from the first two (16 draws),
        and after 50 steps of training all gave the fallback. It tells of purifiers and start more than of the poison.
        batch: pictures as they come, before `before`. rows [R, d]: where training starts; prompts: one per picture.
        """
        if not self.surveys:
            return self.t_range[0]
        from poisonshield.models.diffusion.timesteps import choose_t_min, timestep_profile

        device = self.model.alphas_cumprod.device
        reference = build_purifier(self.config.t_reference, seed=self.seed)
        assert reference is not None  # the Config refuses auto without it
        purified = batch if self._purifier is None else self._purifier.before(batch)
        mask = self._find_mask(purified)
        profile = timestep_profile(
            self.model,
            purified.pixels().to(device),
            rows=rows,
            prompts=list(prompts),
            ref=reference.before(batch).pixels().to(device),
            mask=None if mask is None else mask.to(device),
            end=self.config.t_max,
            seed=self.seed,
            keys=[picture_of(key) for key in batch.keys],
        )
        self.resolved = choose_t_min(profile)
        log.info("szt trains from timestep %d on, where the gradients of two purifiers agree.", self.resolved)
        return self.t_range[0]

    def settle(self, found: int) -> None:
        """Train from this timestep on."""
        self.resolved = found

    def _asks_for_words(self) -> bool:
        return self._masks is not None and self._masks.needs_word

    def _find_mask(self, batch: Batch) -> Tensor | None:
        """The mask of purified pictures, checked."""
        kind, given = self.config.mask, batch.mask
        if given is not None:
            _check_given(batch)
        if kind is None:
            if given is not None:
                raise ConfigError(
                    f"{batch.keys[0]} comes with a mask, and szt.mask is null: masks given but unused.\n"
                    "  Set szt.mask: file, or leave the masks out of the data."
                )
            return None
        if kind in GIVEN:
            if given is None:
                raise DataError(
                    f"{batch.keys[0]} comes without a mask, and szt.mask is {kind}.\n"
                    "  Give the data masks, or choose one that is made: grabcut, attention, ssm or box; null for none."
                )
            mask = given
        else:
            assert self._masks is not None  # what does not come with the data is made
            mask = self._masks(batch, self.model, self._words_of(batch))
        self._note(batch, mask, None if kind in GIVEN else given)
        return mask

    def _words_of(self, batch: Batch) -> list[str] | None:
        """What each picture's concept is called, where the mask asks."""
        if not self._asks_for_words():
            return None
        concepts = [0] * len(batch) if batch.y is None else batch.y.tolist()
        words = [self.config.mask.config.word or self.context.words[concept] for concept in concepts]
        return cast(list[str], words)  # `wrap` has refused a concept without a word

    def note(self, given: Batch, made: Batch) -> None:
        """Areas and overlaps of masks that were kept."""
        if made.mask is not None:
            self._note(made, made.mask, given.mask)

    def picture_numbers(self) -> Mapping[str, Mapping[str, float]]:
        """mask_area, the mask's share of each picture, and mask_iou, its overlap with a given one, if there is one."""
        return {"mask_area": self.areas, "mask_iou": self.ious}

    def _note(self, batch: Batch, mask: Tensor, given: Tensor | None) -> None:
        """Keeps areas and ious of these pictures; refuses empty masks and warns, once for each, of tiny and huge ones.

        mask, given [B, 1, H, W]: the one that counts, and one to compare it with.
        """
        for i, key in enumerate(batch.keys):
            picture, area = picture_of(key), float(mask[i].mean())
            if area == 0:
                raise DataError(
                    f"the mask of {key} is empty, so nothing of it would be trained on.\n"
                    "  Correct it, leave the picture out, or choose another szt.mask."
                )
            if picture not in self.areas and looks_wrong(area):
                log.warning("The mask of %s covers %.1f %% of the picture. Is it the concept's?", picture, 100 * area)
            self.areas[picture] = area
            if given is not None:
                # Least and greatest value stand for "and" and "or", since masks may be soft.
                both, either = torch.minimum(mask[i], given[i]).sum(), torch.maximum(mask[i], given[i]).sum()
                self.ious[picture] = float(both / either)


def _check_given(batch: Batch) -> None:
    """Raises DataError for a mask of another size than its picture's, or outside [0, 1]."""
    mask = batch.masks()
    wanted = (len(batch), 1, *batch.pixels().shape[2:])
    if tuple(mask.shape) != wanted:
        raise DataError(
            f"the mask of {batch.keys[0]} has shape {tuple(mask.shape)}, and its picture asks for {wanted}.\n"
            "  Mask and picture must be of one size, and be cut and resized together."
        )
    inside = ((mask >= 0) & (mask <= 1)).flatten(1).all(1)
    if not bool(inside.all()):
        raise DataError(f"the mask of {batch.keys[int(inside.int().argmin())]} has values outside [0, 1].")


def _name_purifier(purifier: dict[str, Any]) -> str:
    """A purifier in a word: its name and quality, and settings that are not its usual ones."""
    usual = purifier_block(purifier["name"]) or {}
    others = (f"{k} {v}" for k, v in purifier.items() if k not in ("name", "quality") and v != usual[k])
    return " ".join((f"{purifier['name']}{purifier.get('quality', '')}", *others))


def _name_mask(mask: Choice | str) -> str:
    """A mask in a word: its name, and settings that are not its usual ones."""
    if isinstance(mask, str):
        return "mask"
    usual = mask.cls.Config()
    others = (
        f"{name} {v}" for name in type(usual).model_fields if (v := getattr(mask.config, name)) != getattr(usual, name)
    )
    return " ".join((mask.name, *others))
