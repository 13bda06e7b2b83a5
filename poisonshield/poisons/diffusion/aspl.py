"""ASPL, alternating surrogate and perturbation learning: train on clean, attack, train on poisoned.

Source: Van Le et al. 2023.

    round            0              1
    surrogate steps  0 1 2          3 4 5          on clean pictures, then put back; the attack is on what they gave
    pixel steps      0 1 2 3 4 5    6 7 8 9 10 11  pgd_steps a round, until there are `steps` in all
    surrogate steps  0 1 2          3 4 5          on the poisoned pictures, and kept

With inner "ti" only the vectors of one word are trained, which is what a victim of textual inversion does; with "kv"
the cross-attention's keys and values. Pictures meet in the surrogate, so unlike elsewhere each one's result depends on
the others. Defaults are those of the authors' script; clipping works here, which in their code it does not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import Field
from torch import Tensor

from poisonshield.poisons.diffusion.attack.canvas import Canvas
from poisonshield.poisons.diffusion.attack.engine import Counter, enter, record
from poisonshield.poisons.diffusion.attack.work import Work
from poisonshield.poisons.diffusion.fsmg import FSMG

_STATE = "\0alternating"  # no picture's key begins so


@dataclass(frozen=True)
class Round:
    """One turn of surrogate and pixels."""

    pixel_steps: range
    """The steps on pixels that it makes."""
    surrogate_step: int
    """The number of its first training step, which names the random numbers."""

    def passes(self, every: int) -> bool:
        """Whether a multiple of `every` pixel steps lies in it."""
        return self.pixel_steps.stop // every > self.pixel_steps.start // every


class ASPL(FSMG):
    """Raises the denoising loss of a surrogate that learns the pictures, clean and poisoned, in turn."""

    class Config(FSMG.Config):
        """As FSMG's, with the lengths of a round."""

        steps: int = Field(300, ge=1, description="steps on pixels in all rounds")
        step_levels: float = Field(0.6375, gt=0, description="size of a step in 8-bit levels")
        pgd_steps: int = Field(6, ge=1, description="steps on pixels in a round")
        inner_steps: int = Field(
            3, ge=0, description="training steps of a round, on clean and again on poisoned pictures"
        )
        surrogate_steps: int = Field(0, ge=0, description="training steps on clean pictures before the rounds")

    name = "aspl"
    source = "2303.15433"
    config: Config

    @property
    def coupled(self) -> bool:
        """Poisoned pictures train the surrogate together."""
        return True

    def loop(self, work: Work) -> Iterator[tuple[str, Tensor]]:
        """All pictures at once; the state is one file for them and the surrogate, written between rounds."""
        steps, name = self.config.steps, self.identity(work.images, work.masks)
        self.forget()
        canvases = self.canvases(work.images, work.masks, work.micro_batch)
        clean = self.canvases(self.reference, None) if self.reference else canvases
        prior = self.canvases(self.class_images or {}, None)
        self._resume(canvases, work.store.load(_STATE, name))
        counter = Counter(work.progress, steps * len(work.images))
        counter.add(canvases[0].step * len(work.images), silent=True)
        if canvases[0].step == 0:
            self.surrogate.train(clean, self.config.surrogate_steps, first=0, phase="before", clean=True, prior=prior)
        for turn in self.rounds(canvases[0].step):
            self._play(turn, canvases, clean, prior, counter)
            if work.store and (turn.passes(work.save_every) or turn.pixel_steps.stop == steps):
                work.store.save(_STATE, name, self._record(canvases))
        for canvas in canvases:
            yield from canvas.released().items()
        work.store.remove(_STATE)

    def rounds(self, done: int) -> Iterator[Round]:
        """The rounds that are left after `done` steps on pixels."""
        steps, length = self.config.steps, self.config.pgd_steps
        for start in range(done, steps, length):
            yield Round(range(start, min(start + length, steps)), start // length * self.config.inner_steps)

    def _play(
        self, turn: Round, canvases: list[Canvas], clean: list[Canvas], prior: list[Canvas], counter: Counter
    ) -> None:
        """One round: learn clean pictures, attack what was learned, put it back, learn the poisoned ones."""
        count, first = self.config.inner_steps, turn.surrogate_step
        # What is learned from clean pictures tells the attack where a victim will be; the surrogate itself goes on with
        # poisoned ones alone, as the victim does.
        kept = self.surrogate.state()
        self.surrogate.train(clean, count, first=first, phase="clean", clean=True, prior=prior)
        for canvas in canvases:
            for _ in turn.pixel_steps:
                canvas.advance(self.config.steps)
                counter.add(len(canvas.keys))
        self.surrogate.restore(kept)
        self.surrogate.train(canvases, count, first=first, phase="poisoned", clean=False, prior=prior)

    def _record(self, canvases: list[Canvas]) -> dict[str, Any]:
        pictures = {key: record(c, row) for c in canvases for row, key in enumerate(c.keys)}
        return {"pictures": pictures, "weights": [w.cpu() for w in self.surrogate.state()]}

    def _resume(self, canvases: list[Canvas], state: dict[str, Any] | None) -> None:
        for canvas in canvases:
            enter(canvas, [None if state is None else state["pictures"][key] for key in canvas.keys])
        if state is not None:
            self.surrogate.restore(state["weights"])
