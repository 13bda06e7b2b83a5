"""The Stream over concepts: some pictures of every concept in each step, with a prompt that names its placeholder.

The order is: pictures as they were cut and resized, then the stage (a defense's `before`, once for all pictures of a
concept), then a flip of picture and mask together. JPEG does not commute with the flip and neither does a VAE, so a
flipped picture is another picture, with a key of its own. What a concept shows depends on (seed, its name, step) alone:
it learns the same beside others, on any number of ranks and after a restart.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.data.concepts import Concept, digest8
from poisonshield.data.concepts.prompts import TEMPLATES
from poisonshield.data.stream import Stage
from poisonshield.errors import CheckpointError, ConfigError, DataError, ShapeError
from poisonshield.random import KeyedRandom, sample_ids


@dataclass(frozen=True)
class _Ready:
    """A concept's pictures after the stage: x float32 [n, 3, H, W], mask [n, 1, H, W] or None, keys of these pixels."""

    keys: tuple[str, ...]
    x: Tensor
    mask: Tensor | None
    captions: tuple[str, ...]
    t_range: tuple[int, int] | None


@dataclass(frozen=True)
class _Draw:
    """One sample of one step: which picture in which of the concept's epochs, flipped or not, under which template."""

    epoch: int
    picture: int
    flipped: bool
    template: str


class ConceptStream:
    """Batches of this rank without end: of every concept batch_size / world_size samples, one concept after the other.

    batch_size: of one concept, over all ranks. tokens: concept name -> placeholder. prompts: "templates" are the 27 of
    textual inversion, "caption" those with the picture's caption after a comma, or templates with {}. stage: gets a
    concept's pictures as one Batch (keys, x, mask, captions, y), once; with per_epoch once in each of the concept's
    epochs, Batch.epoch saying which, and with `variants` the first so many come again in turn. flip: its probability.

    Yields Batch with keys "<concept>/<stem>@<hash of the pixels>[:flip]#<slot>", slot being the number within the
    concept's global batch; x [b, 3, H, W]; mask if there are masks; y int64, the concept's place in `concepts`;
    captions, the prompts; the stage's t_range; epoch, of steps_per_epoch steps; draw, the step, so that random numbers are
    new in each.
    A concept shows each of its pictures once before any again. steps_per_epoch: until all have been shown.
    Raises ConfigError for settings that do not fit, DataError and ShapeError for what the stage gives back.
    """

    def __init__(
        self,
        concepts: Sequence[Concept],
        *,
        batch_size: int,
        seed: int,
        tokens: Mapping[str, str],
        prompts: str | Sequence[str] = "templates",
        stage: Stage | None = None,
        flip: float = 0.5,
        per_epoch: bool = False,
        variants: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.concepts, self.batch_size, self.seed, self.tokens = tuple(concepts), batch_size, seed, dict(tokens)
        self.with_captions = prompts == "caption"
        self.templates = TEMPLATES if isinstance(prompts, str) else tuple(prompts)
        self.stage, self.flip, self.per_epoch, self.variants = stage, flip, per_epoch, variants
        self.rank, self.world_size = rank, world_size
        self._check(prompts)
        self.steps_per_epoch = -(-max(len(c.images) for c in self.concepts) // batch_size)
        self.position = 0
        self._ready: dict[tuple[int, int], _Ready] = {}

    def __iter__(self) -> Iterator[Batch]:
        while True:
            parts = [self._part(number, self.position) for number in range(len(self.concepts))]
            self.position += 1
            yield _joined(parts)

    def prepare(self) -> None:
        """Runs the stage on all pictures that it will see and that come again, before training asks for them."""
        for number in range(len(self.concepts)):
            for epoch in range(self.variants or 1):
                self._prepared(number, epoch)

    def state_dict(self) -> dict[str, Any]:
        """How many batches were handed out, and of what. Plain numbers and text."""
        return {"position": self.position, "plan": self._plan()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there at the next `iter()`; ranks may differ from those that saved it.

        Raises CheckpointError naming what differs if it was made from other concepts, settings or purified pictures.
        """
        mine = self._plan()
        if differing := [k for k in mine if state["plan"].get(k) != mine[k]]:
            lines = [f"  {k}: saved {state['plan'].get(k)!r}, now {mine[k]!r}" for k in differing]
            raise CheckpointError(
                "\n".join(["the saved position belongs to other concepts or settings:", *lines])
                + "\n  Resume with the data and settings of the saved run, or start a new run folder."
            )
        self.position = state["position"]

    def _plan(self) -> dict[str, Any]:
        """Everything that a batch depends on. Of a stage its result counts, whatever it is called."""
        purified = hashlib.sha256()
        for number in range(len(self.concepts)):
            ready = self._prepared(number, 0)
            purified.update("\n".join((*ready.keys, *ready.captions, str(ready.t_range))).encode())
            purified.update(b"" if ready.mask is None else ready.mask.numpy().tobytes())
        return {
            "concepts": {c.name: c.digest for c in self.concepts},
            "order": [c.name for c in self.concepts],
            "purified": purified.hexdigest(),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "tokens": {c.name: self.tokens[c.name] for c in self.concepts},
            "prompts": [*self.templates, self.with_captions],
            "flip": self.flip,
            "per_epoch": [self.per_epoch, self.variants],
        }

    def _part(self, number: int, step: int) -> Batch:
        """This rank's samples of one concept in one step."""
        share = self.batch_size // self.world_size
        slots = range(self.rank * share, (self.rank + 1) * share)
        draws = self._draws(self.concepts[number], step)
        ready = {epoch: self._prepared(number, epoch) for epoch in sorted({draws[s].epoch for s in slots})}
        keys, x, masks, captions = [], [], [], []
        for slot in slots:
            draw, source = draws[slot], ready[draws[slot].epoch]
            mirrored = lambda image, draw=draw: image[draw.picture].flip(-1) if draw.flipped else image[draw.picture]
            keys.append(f"{source.keys[draw.picture]}{':flip' if draw.flipped else ''}#{slot}")
            x.append(mirrored(source.x))
            masks.append(None if source.mask is None else mirrored(source.mask))
            captions.append(self._prompt(number, draw, source))
        ranges = {r.t_range for r in ready.values()}
        if len(ranges) > 1:
            raise ConfigError(
                f"the defense's timesteps of {self.concepts[number].name} change with the epoch: {ranges}."
            )
        return Batch(
            keys=tuple(keys),
            x=torch.stack(x),
            mask=None if masks[0] is None else torch.stack(masks),
            y=torch.full((share,), number),
            captions=tuple(captions),
            t_range=ranges.pop(),
            epoch=step // self.steps_per_epoch,
            draw=step,
        )

    def _draws(self, concept: Concept, step: int) -> list[_Draw]:
        """What the concept shows in each slot of a step, on all ranks."""
        ids, count = sample_ids([concept.name]), len(concept.images)
        at_step = KeyedRandom(self.seed, ids, step, "concepts")
        flips = (at_step.uniform("flip", self.batch_size)[0] < self.flip).tolist()
        which = (at_step.uniform("template", self.batch_size)[0].double() * len(self.templates)).long().tolist()
        places = [divmod(step * self.batch_size + slot, count) for slot in range(self.batch_size)]
        orders = {
            epoch: KeyedRandom(self.seed, ids, epoch, "concepts")
            .uniform("order", count)[0]
            .argsort(stable=True)
            .tolist()
            for epoch in {epoch for epoch, _ in places}
        }
        return [
            _Draw(epoch, orders[epoch][place], flips[slot], self.templates[which[slot]])
            for slot, (epoch, place) in enumerate(places)
        ]

    def _prompt(self, number: int, draw: _Draw, source: _Ready) -> str:
        prompt = draw.template.replace("{}", self.tokens[self.concepts[number].name])
        return f"{prompt}, {source.captions[draw.picture]}" if self.with_captions else prompt

    def _prepared(self, number: int, epoch: int) -> _Ready:
        """The concept's pictures after the stage, made when first asked for: a stage may wait for a model."""
        epoch = 0 if not self.per_epoch or self.stage is None else epoch % self.variants if self.variants else epoch
        if (number, epoch) not in self._ready:
            if self.per_epoch and self.variants is None:  # earlier epochs do not come again
                self._ready = {k: v for k, v in self._ready.items() if k[0] != number or k[1] in (0, epoch - 1)}
            self._ready[number, epoch] = self._staged(number, epoch)
        return self._ready[number, epoch]

    @torch.no_grad()
    def _staged(self, number: int, epoch: int) -> _Ready:
        concept = self.concepts[number]
        images = concept.images
        masks = [image.mask for image in images]
        batch = Batch(
            keys=tuple(image.key for image in images),
            x=torch.stack([image.pixels for image in images]).float() / 255,
            mask=None if masks[0] is None else torch.stack(masks),
            captions=tuple(image.caption for image in images),
            y=torch.full((len(images),), number),
            epoch=epoch,
            draw=epoch,
        )
        given = batch
        if self.stage is not None:
            batch = self.stage(batch)
            _check_staged(concept.name, given, batch)
        if self.with_captions and (mute := [i.key for i, c in zip(images, batch.captions, strict=True) if not c]):
            raise DataError(
                f"{mute[0]} has no caption: its file's name holds no letter.\n"
                "  Name the file by its caption, write one into its JSON, or set prompts: templates."
            )
        x = batch.x.detach().float().cpu()
        keys = tuple(f"{concept.name}/{i.stem}@{_digest8(pixels)}" for i, pixels in zip(images, x, strict=True))
        mask = None if batch.mask is None else batch.mask.detach().float().cpu().contiguous()
        return _Ready(keys, x, mask, tuple(batch.captions), batch.t_range)

    def _check(self, prompts: str | Sequence[str]) -> None:
        names = [c.name for c in self.concepts]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"concepts {names}: one at least is wanted, and each once.")
        if not 0 <= self.rank < self.world_size or self.batch_size < 1 or self.batch_size % self.world_size:
            raise ConfigError(
                f"batch_size {self.batch_size} a concept, rank {self.rank} of {self.world_size}: the batch must be a "
                "multiple of the ranks."
            )
        if not 0 <= self.flip <= 1 or (self.variants is not None and (self.variants < 1 or not self.per_epoch)):
            raise ConfigError(
                f"flip {self.flip}, variants {self.variants}, per_epoch {self.per_epoch}: flip is a probability, and "
                "variants >= 1 count what per_epoch makes."
            )
        if missing := [n for n in names if n not in self.tokens]:
            raise ConfigError(
                f"no token is given for concept {missing[0]!r}; tokens: {', '.join(self.tokens) or 'none'}."
            )
        if isinstance(prompts, str) and prompts not in ("templates", "caption"):
            raise ConfigError(f"prompts {prompts!r}: templates, caption, or a list of texts with {{}} is wanted.")
        if not self.templates or (wrong := [t for t in self.templates if "{}" not in t]):
            shown = repr(wrong[0]) if self.templates else "the empty list"
            raise ConfigError(f"prompts: {shown} has no {{}} where the placeholder is to stand.")
        images = [image for concept in self.concepts for image in concept.images]
        if other := [i for i in images if i.pixels.shape != images[0].pixels.shape]:
            raise DataError(f"{other[0].key} has another size than {images[0].key}. Load them with one `size`.")
        if other := [i for i in images if (i.mask is None) != (images[0].mask is None)]:
            raise DataError(f"of {other[0].key} and {images[0].key} one has a mask and one has none. Load all alike.")


def _check_staged(name: str, given: Batch, batch: Batch) -> None:
    """A stage changes pixels, masks and captions of the pictures that it got, and no more."""
    n, side = len(given), tuple(given.x.shape)
    if batch.x is None or tuple(batch.x.shape) != side or batch.captions is None or len(batch.captions) != n:
        shape = None if batch.x is None else tuple(batch.x.shape)
        raise ShapeError(f"the stage gave {shape} back for the pictures {side} of {name}; the same shape is wanted.")
    if batch.mask is not None and tuple(batch.mask.shape) != (n, 1, *side[2:]):
        raise ShapeError(f"the stage gave masks {tuple(batch.mask.shape)} for {name}; {(n, 1, *side[2:])} is wanted.")
    low, high = float(batch.x.min()), float(batch.x.max())
    if not (low >= -1e-6 and high <= 1 + 1e-6):  # so written, NaN is caught
        raise DataError(f"the stage gave pixels in [{low:g}, {high:g}] for {name}; they must be in [0, 1].")


def _digest8(x: Tensor) -> str:
    """8 hex digits of float pixels [3, H, W]: those of the file's pixels if they are 8-bit levels, as JPEG leaves them."""
    levels = (x * 255).round().clamp(0, 255).to(torch.uint8)
    return digest8(levels if torch.equal(levels.float() / 255, x) else x)


def _joined(parts: Sequence[Batch]) -> Batch:
    """The concepts' samples as one batch."""
    if len({part.t_range for part in parts}) > 1:
        told = ", ".join(f"{p.keys[0].partition('/')[0]} {p.t_range}" for p in parts)
        raise ConfigError(f"the defense wants other timesteps for each concept ({told}). Train them one at a time.")
    if len({part.mask is None for part in parts}) > 1:
        bare = next(p.keys[0] for p in parts if p.mask is None)
        raise DataError(f"{bare} has no mask after the defense and other concepts have one. A batch has all or none.")
    return Batch(
        keys=tuple(key for part in parts for key in part.keys),
        x=torch.cat([part.x for part in parts]),
        mask=None if parts[0].mask is None else torch.cat([part.mask for part in parts]),
        y=torch.cat([part.y for part in parts]),
        captions=tuple(caption for part in parts for caption in part.captions),
        t_range=parts[0].t_range,
        epoch=parts[0].epoch,
        draw=parts[0].draw,
    )
