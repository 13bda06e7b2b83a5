"""FSMG, a fully trained surrogate: fine-tune on clean pictures, then raise the loss of that model.

Source: Van Le et al. 2023.

The surrogate learns `reference` pictures of the same subject where given, as the authors have it, else the pictures
themselves. Its training is the cost: 1000 steps for a set of pictures.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from pydantic import Field
from torch import Tensor

from poisonshield.errors import ConfigError
from poisonshield.poisons.diffusion.advdm import AdvDM
from poisonshield.poisons.diffusion.attack.canvas import Canvas
from poisonshield.poisons.diffusion.attack.engine import attack, groups
from poisonshield.poisons.diffusion.attack.surrogate import Surrogate, SurrogateConfig
from poisonshield.poisons.diffusion.attack.work import Work, check_images

_STATE = "\0surrogate"  # no picture's key begins so


class FSMG(AdvDM):
    """Raises the denoising loss of a surrogate that learned the pictures first.

    reference, class_images: uint8 [3, H, W] by key; the latter for prior_weight.
    """

    class Config(SurrogateConfig, AdvDM.Config):
        """As AdvDM's and the surrogate's."""

        surrogate_steps: int = Field(1000, ge=0, description="training steps on clean pictures")

    name = "fsmg"
    source = "2303.15433"
    noise_start = False
    trains_surrogate = True
    config: Config

    def __init__(
        self,
        config: Config,
        *,
        reference: Mapping[str, Tensor] | None = None,
        class_images: Mapping[str, Tensor] | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(config, **rest)
        self.reference, self.class_images = reference, class_images
        if config.prior_weight and not class_images:
            raise ConfigError(
                "prior_weight needs class_images: pictures of other subjects of the class. Give them, or 0."
            )
        if class_images and not config.prior_weight:
            raise ConfigError(
                "class_images are given and prior_weight is 0, so they would teach nothing. Set prior_weight, 1 as the "
                "authors have it, or leave them out."
            )
        for given in (reference, class_images):
            check_images(given or {}, None)
        self._trained_on: str | None = None

    @property
    def coupled(self) -> bool:
        """Without a reference set the surrogate learns all pictures together."""
        return self.reference is None

    @cached_property
    def surrogate(self) -> Surrogate:
        """The model that is attacked: the caller's own until it is trained."""
        return Surrogate(self, self.config)

    @property
    def prompt(self) -> str:
        """The surrogate's."""
        return self.config.whole_prompt

    def identity(self, images: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None) -> str:
        """As the parent's, with the reference and class pictures."""
        others = {**(self.reference or {}), **{f"class {k}": v for k, v in (self.class_images or {}).items()}}
        return super().identity(images, masks) + super().identity(others)

    def denoise(self, z_t: Tensor, t: Tensor) -> Tensor:
        """The surrogate's prediction."""
        return self.surrogate.predict(z_t, t)

    def loop(self, work: Work) -> Iterator[tuple[str, Tensor]]:
        """As the parent's, after the surrogate was trained or read back."""
        learned, masks = (self.reference, None) if self.reference else (work.images, work.masks)
        name = self.identity(learned, masks)
        if self._trained_on != name:
            self.forget()
            state = work.store.load(_STATE, name)
            if state is not None:
                self.surrogate.restore(state["weights"])
            else:
                self._learn(learned, masks)
                if work.store:
                    work.store.save(_STATE, name, {"weights": [w.cpu() for w in self.surrogate.state()]})
            self._trained_on = name
        yield from attack(self, work, also=name)
        work.store.remove(_STATE)

    def forget(self) -> None:
        """Put the caller's own model in the surrogate's place."""
        self.__dict__.pop("surrogate", None)  # where cached_property keeps it
        self._trained_on = None

    def _learn(self, images: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None) -> None:
        canvases, prior = self.canvases(images, masks), self.canvases(self.class_images or {}, None)
        steps = self.config.surrogate_steps
        self.surrogate.train(canvases, steps, first=0, phase="clean", clean=True, prior=prior)

    def canvases(
        self, images: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None, micro_batch: int = 1
    ) -> list[Canvas]:
        """The pictures in groups of one size."""
        return [Canvas(self, {k: images[k] for k in keys}, masks) for keys in groups(images, micro_batch)]
