"""The one loop: pictures in groups of one size, a group's steps, and its state on disk between them."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from poisonshield.poisons.diffusion.attack.canvas import Canvas
from poisonshield.poisons.diffusion.attack.objective import Objective
from poisonshield.poisons.diffusion.attack.work import Progress, Work


def attack(poison: Objective, work: Work, *, also: str = "") -> Iterator[tuple[str, Tensor]]:
    """(key, uint8 [3, H, W]) as pictures are finished.

    also: what else than poison, picture and mask a state belongs to.
    """
    images, store, steps = work.images, work.store, poison.config.steps
    # One name for each picture, so that more or fewer of them in a later call find their states.
    names = {k: poison.identity({k: image}, work.masks) + also for k, image in images.items()} if store else {}
    found = {key: store.load(key, name) for key, name in names.items()}
    counter = Counter(work.progress, steps * len(images))
    for keys in groups(images, work.micro_batch, found):
        canvas = Canvas(poison, {k: images[k] for k in keys}, work.masks)
        enter(canvas, [found.get(k) for k in keys])
        counter.add(canvas.step * len(keys), silent=True)
        while canvas.step < steps:
            canvas.advance(steps)
            if store and (canvas.step % work.save_every == 0 or canvas.step == steps):
                for row, key in enumerate(keys):
                    store.save(key, names[key], record(canvas, row))
            counter.add(len(keys))
        for key, pixels in canvas.released().items():
            yield key, pixels
            if not work.keep:
                store.remove(key)  # not before the caller has come back for more, with the picture safely written
    for key in images if work.keep else ():
        store.remove(key)


class Counter:
    """Tells `progress` how far it is."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def add(self, count: int, *, silent: bool = False) -> None:
        """`count` more steps of pictures; silent: they were made earlier."""
        self.done += count
        if self.progress is not None and not silent:
            self.progress(self.done, self.total)


def groups(
    images: Mapping[str, Tensor], micro_batch: int, found: Mapping[str, Any] | None = None
) -> Iterator[list[str]]:
    """Keys, at most `micro_batch` at a time, of one size and at one step."""
    alike: dict[tuple, list[str]] = {}
    for key, image in images.items():
        state = (found or {}).get(key)
        alike.setdefault((tuple(image.shape), state["step"] if state else 0), []).append(key)
    for keys in alike.values():
        for start in range(0, len(keys), micro_batch):
            yield keys[start : start + micro_batch]


def record(canvas: Canvas, row: int) -> dict[str, Any]:
    """What a picture needs to go on."""
    momentum = None if canvas.momentum is None else canvas.momentum[row].cpu()
    return {"step": canvas.step, "delta": canvas.delta[row].cpu(), "momentum": momentum}


def enter(canvas: Canvas, states: list[Any]) -> None:
    """Put a canvas where its pictures' states are, all at one step; None for a picture that was not begun."""
    if states[0] is None:
        canvas.start()
        return
    canvas.step = states[0]["step"]
    for row, state in enumerate(states):
        canvas.delta[row] = state["delta"].to(canvas.device)
        if canvas.momentum is not None:
            canvas.momentum[row] = state["momentum"].to(canvas.device)
