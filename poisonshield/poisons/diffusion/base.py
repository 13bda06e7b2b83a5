"""A poison for diffusion models: an Objective says where pixels should go, and the engine in attack/ does the rest.

The result is uint8, of the source's size, and x' = clip(round(x + clip(delta, -eps, eps)), 0, 255) with delta float32
in 8-bit levels, so the radius holds on the file that is written. Neither order nor number of pictures, nor stopping and
going on, changes a result.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.errors import DataError
from poisonshield.poisons.base import Poison, Radius, checked_pixels
from poisonshield.poisons.diffusion.attack.crn import mean_objective
from poisonshield.poisons.diffusion.attack.engine import attack
from poisonshield.poisons.diffusion.attack.objective import Objective
from poisonshield.poisons.diffusion.attack.settings import AttackConfig
from poisonshield.poisons.diffusion.attack.state import Store
from poisonshield.poisons.diffusion.attack.view import View
from poisonshield.poisons.diffusion.attack.work import Progress, Work

__all__ = ["AttackConfig", "DiffusionPoison", "View"]  # what a new poison imports


class DiffusionPoison(Objective, Poison):
    """Built as `SomePoison(config, model=model, seed=seed)`. A subclass sets `name` and `Config`, and writes `gradient`
    and `objective`; both see a View. target: uint8 [3, h, w], for poisons that take one.
    """

    Config: ClassVar[type[AttackConfig]]
    norm = "linf"
    config: AttackConfig
    trains_surrogate: ClassVar[bool] = False
    """Whether a model learns the pictures first, so that `reference` and `class_images` may be given."""

    def apply(self, batch: Batch) -> Batch:
        """The batch as it is released. batch.mask [B, 1, H, W], if any, does what config.mask says.

        Pictures are attacked one by one, so that neither order nor size of the batch matters; those of a `coupled`
        poison meet in its surrogate, so their batch is the whole set. For work of hours take `run`, which can go on
        where it was stopped. Raises ShapeError for other pixels, DataError for keys that are not distinct.
        """
        x = checked_pixels(batch, owner=self.name)
        if len(set(batch.keys)) < len(batch):
            raise DataError(f"poison {self.name} got a batch with one key twice. Give every picture a key of its own.")
        if not len(batch):
            return batch
        images = dict(zip(batch.keys, (x * 255).round().to(torch.uint8), strict=True))
        masks = None if batch.mask is None else dict(zip(batch.keys, batch.mask, strict=True))
        released = torch.stack([*self.perturb(images, masks=masks).values()])
        return batch.replace(x=released.to(x.device).float() / 255)

    def budget(self) -> Radius:
        """eps_levels in pixel units; config.norm "l2" bounds the root mean square."""
        return Radius.of_levels("linf" if self.config.norm == "linf" else "rms", self.config.eps_levels)

    def describe(self) -> dict[str, Any]:
        """As every poison's, with prompt, steps and the model that is attacked."""
        model = {
            "name": self.model.name,
            "sha256": self.digest,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }
        return {**super().describe(), "prompt": self.prompt, "steps": self.config.steps, "model": model}

    def perturb(self, images: Mapping[str, Tensor], **settings: Any) -> dict[str, Tensor]:
        """The poisoned pictures, uint8 [3, H, W] by key, in the order given. Settings and errors are those of `run`."""
        done = dict(self.run(images, keep=True, **settings))
        return {key: done[key] for key in images}

    def run(
        self,
        images: Mapping[str, Tensor],
        *,
        masks: Mapping[str, Tensor] | None = None,
        micro_batch: int = 1,
        state_folder: Path | None = None,
        save_every: int = 25,
        progress: Progress | None = None,
        keep: bool = False,
    ) -> Iterator[tuple[str, Tensor]]:
        """(key, poisoned picture uint8 [3, H, W]), each as soon as it is there.

        images: uint8 [3, H, W] by key, of any sizes. masks: [1, H, W] in [0, 1] by key, for all pictures or none; their
        use is config.mask. micro_batch: pictures of one size that are computed together; results are the same to the
        bit for equal micro_batch, else up to last bits of gradients. state_folder: where unfinished pictures are kept
        every `save_every` steps; called again after a stop, it goes on from there to the same result. A picture's state
        is removed when the next is asked for, or with `keep`, for callers that write nothing in between, when all have
        been given. progress: called with (steps done, steps in all).

        Raises ShapeError and DataError for other pictures or masks, CheckpointError for another run's state.
        """
        if not images:
            return iter(())
        return self.loop(Work(images, masks, micro_batch, Store(state_folder), save_every, progress, keep))

    def loop(self, work: Work) -> Iterator[tuple[str, Tensor]]:
        """What `run` gives: each picture by itself. Poisons whose pictures meet in a surrogate write another."""
        return attack(self, work)

    def measure(
        self,
        images: Mapping[str, Tensor],
        *,
        clean: Mapping[str, Tensor] | None = None,
        masks: Mapping[str, Tensor] | None = None,
        draws: int = 32,
        micro_batch: int = 8,
    ) -> dict[str, float]:
        """The objective's mean over `draws` fixed draws, by key: common random numbers, so that two calls compare.

        The loss varies more with the timestep than with a perturbation; the same (t, noise, posterior noise) for both
        pictures takes that out. clean: the sources, where the objective knows them; `images` themselves by default.
        """
        return mean_objective(self, images, clean or images, masks, draws=draws, micro_batch=micro_batch)
