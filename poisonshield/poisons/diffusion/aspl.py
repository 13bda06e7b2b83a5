"""ASPL, alternating surrogate and perturbation learning: train on clean, attack, train on poisoned.

Source: Van Le et al. 2023.

    repeat: train a copy of the surrogate on clean pictures, attack it; train the surrogate on the poisoned ones
With inner "ti" only the vectors of one word are trained, which is what a victim of textual inversion does; with "kv"
the cross-attention's keys and values. Pictures meet in the surrogate, so unlike elsewhere each one's result depends on
the others. Defaults are those of the authors' script; clipping works here, which in their code it does not.
"""

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from poisonshield.poisons.diffusion.attack.canvas import Canvas
from poisonshield.poisons.diffusion.attack.engine import Counter, enter, record
from poisonshield.poisons.diffusion.attack.work import Work
from poisonshield.poisons.diffusion.fsmg import FSMG

_STATE = "\0alternating"


class ASPL(FSMG):
    """Rounds of inner_steps on clean (`reference`) pictures, pgd_steps on pixels, inner_steps on poisoned ones."""

    class Config(FSMG.Config):
        """steps: on pixels in all, pgd_steps of them a round. surrogate_steps: on clean pictures, before the rounds."""

        steps: int = Field(300, ge=1)
        step_levels: float = Field(0.6375, gt=0)
        pgd_steps: int = Field(6, ge=1)
        inner_steps: int = Field(3, ge=0)
        surrogate_steps: int = Field(0, ge=0)

    name: ClassVar[str] = "aspl"

    @property
    def coupled(self) -> bool:
        """Poisoned pictures train the surrogate together."""
        return True

    def loop(self, work: Work) -> Iterator[tuple[str, Tensor]]:
        """All pictures at once; the state is one file for them and the surrogate, written between rounds."""
        config, images, masks, store = self.config, work.images, work.masks, work.store
        name = self.identity(images, masks)
        self.__dict__.pop("surrogate", None)
        canvases = self.canvases(images, masks, work.micro_batch)
        clean = self.canvases(self.reference, None) if self.reference else canvases
        prior = self.canvases(self.class_images or {}, None)
        self._resume(canvases, store.load(_STATE, name))
        counter = Counter(work.progress, config.steps * len(images))
        counter.add(canvases[0].step * len(images), silent=True)
        if canvases[0].step == 0:
            self.surrogate.train(clean, config.surrogate_steps, first=0, phase="before", clean=True, prior=prior)
        while (start := canvases[0].step) < config.steps:
            first = start // config.pgd_steps * config.inner_steps
            kept = self.surrogate.state()
            self.surrogate.train(clean, config.inner_steps, first=first, phase="clean", clean=True, prior=prior)
            for canvas in canvases:
                for _ in range(min(config.pgd_steps, config.steps - start)):
                    canvas.advance(config.steps)
                    counter.add(len(canvas.keys))
            self.surrogate.restore(kept)
            self.surrogate.train(canvases, config.inner_steps, first=first, phase="poisoned", clean=False, prior=prior)
            done = canvases[0].step
            if store and (done // work.save_every > start // work.save_every or done == config.steps):
                store.save(_STATE, name, self._record(canvases))
        for canvas in canvases:
            yield from canvas.released().items()
        store.remove(_STATE)

    def _record(self, canvases: list[Canvas]) -> dict:
        pictures = {key: record(c, row) for c in canvases for row, key in enumerate(c.keys)}
        return {"pictures": pictures, "weights": [w.cpu() for w in self.surrogate.state()]}

    def _resume(self, canvases: list[Canvas], state: dict | None) -> None:
        for canvas in canvases:
            enter(canvas, [None if state is None else state["pictures"][key] for key in canvas.keys])
        if state is not None:
            self.surrogate.restore(state["weights"])
