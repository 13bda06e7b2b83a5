"""The Stream over concepts: some pictures of every concept in each step, with a prompt that names its placeholder.

The order is: pictures as they were cut and resized, then the stage (a defense's `before`, once for all pictures of a
concept), then a flip of picture and mask together. JPEG does not commute with the flip and neither does a VAE, so a
flipped picture is another picture, with a key of its own. What a concept shows depends on (seed, its name, step) alone:
it learns the same beside others, on any number of ranks and after a restart.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.data.concepts import Concept
from poisonshield.data.concepts.prompts import TEMPLATES
from poisonshield.data.concepts.staged import StagedConcepts
from poisonshield.data.stream import Stage
from poisonshield.errors import CheckpointError, ConfigError, DataError
from poisonshield.keys import Key
from poisonshield.random import KeyedRandom, sample_ids


@dataclass(frozen=True)
class _Draw:
    """One sample of one step: which picture in which of the concept's epochs, flipped or not, under which template."""

    epoch: int
    picture: int
    flipped: bool
    template: str


@dataclass(frozen=True)
class _Sample:
    """What a slot shows: x float32 [3, H, W], mask [1, H, W] or None, and the prompt."""

    key: Key
    x: Tensor
    mask: Tensor | None
    prompt: str
    label: int
    t_range: tuple[int, int] | None


class ConceptStream:
    """Batches of this rank without end: of every concept batch_size / world_size samples, one concept after the other.

    batch_size: of one concept, over all ranks. tokens: concept name -> placeholder. prompts: "templates" are the 27 of
    textual inversion, "caption" those with the picture's caption after a comma, or templates with {}. stage: gets a
    concept's pictures as one Batch (keys, x, mask, captions, y), once; with per_epoch once in each of the concept's
    epochs, Batch.epoch saying which, and with `variants` the first so many come again in turn. flip: its probability.

    Yields Batch with keys "<concept>/<stem>@<hash of the pixels>[:flip]#<slot>", slot being the number within the
    concept's global batch; x [b, 3, H, W]; mask if there are masks; y int64, the concept's place in `concepts`;
    captions, the prompts; the stage's t_range; epoch, of steps_per_epoch steps; draw, the step, so that random numbers
    are new in each.
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
        self.flip, self.per_epoch, self.variants = flip, per_epoch, variants
        self.rank, self.world_size = rank, world_size
        self._check(prompts)
        self.steps_per_epoch = -(-max(len(c.images) for c in self.concepts) // batch_size)
        self.position, self.stage_seconds = 0, 0.0  # what its stage makes of a picture is kept
        self._staged = StagedConcepts(
            self.concepts, stage, per_epoch=per_epoch, variants=variants, captions=self.with_captions
        )

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batch = self._batch(self.position)
            self.position += 1
            yield batch

    def prepare(self) -> None:
        """Runs the stage on all pictures that it will see and that come again, before training asks for them."""
        self._staged.prepare()

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
            made = self._staged.of(number, 0)
            purified.update("\n".join((*map(str, made.keys), *made.captions, str(made.t_range))).encode())
            purified.update(b"" if made.mask is None else made.mask.numpy().tobytes())
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

    def _batch(self, step: int) -> Batch:
        """This rank's samples of all concepts in one step."""
        shown = [self._samples(number, step) for number in range(len(self.concepts))]
        samples = [sample for part in shown for sample in part]
        _refuse_unlike(shown)
        masks = [sample.mask for sample in samples if sample.mask is not None]
        return Batch(
            keys=tuple(str(sample.key) for sample in samples),
            x=torch.stack([sample.x for sample in samples]),
            mask=torch.stack(masks) if masks else None,
            y=torch.tensor([sample.label for sample in samples]),
            captions=tuple(sample.prompt for sample in samples),
            t_range=samples[0].t_range,
            epoch=step // self.steps_per_epoch,
            draw=step,
        )

    def _samples(self, number: int, step: int) -> list[_Sample]:
        """This rank's samples of one concept in one step."""
        share = self.batch_size // self.world_size
        slots = range(self.rank * share, (self.rank + 1) * share)
        draws = self._draws(self.concepts[number], step)
        return [self._sample(number, slot, draws[slot]) for slot in slots]

    def _sample(self, number: int, slot: int, draw: _Draw) -> _Sample:
        pictures, i = self._staged.of(number, draw.epoch), draw.picture
        x, mask = pictures.x[i], None if pictures.mask is None else pictures.mask[i]
        if draw.flipped:
            x, mask = x.flip(-1), None if mask is None else mask.flip(-1)
        key = replace(pictures.keys[i], flipped=draw.flipped, slot=slot)
        prompt = draw.template.replace("{}", self.tokens[self.concepts[number].name])
        if self.with_captions:
            prompt = f"{prompt}, {pictures.captions[i]}"
        return _Sample(key, x, mask, prompt, number, pictures.t_range)

    def _draws(self, concept: Concept, step: int) -> list[_Draw]:
        """What the concept shows in each slot of a step, on all ranks."""
        at_step = KeyedRandom(self.seed, sample_ids([concept.name]), step, "concepts")
        flips = (at_step.uniform("flip", self.batch_size)[0] < self.flip).tolist()
        which = (at_step.uniform("template", self.batch_size)[0].double() * len(self.templates)).long().tolist()
        # Slots take the concept's pictures one after the other; where all were taken, its next epoch begins.
        first = step * self.batch_size
        places = [divmod(n, len(concept.images)) for n in range(first, first + self.batch_size)]
        orders = {epoch: self._order(concept, epoch) for epoch in {epoch for epoch, _ in places}}
        return [
            _Draw(epoch, orders[epoch][place], flips[slot], self.templates[which[slot]])
            for slot, (epoch, place) in enumerate(places)
        ]

    def _order(self, concept: Concept, epoch: int) -> list[int]:
        """The numbers of the concept's pictures in the order of one of its epochs."""
        chance = KeyedRandom(self.seed, sample_ids([concept.name]), epoch, "concepts")
        return chance.uniform("order", len(concept.images))[0].argsort(stable=True).tolist()

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


def _refuse_unlike(shown: Sequence[Sequence[_Sample]]) -> None:
    """Raises ConfigError or DataError if the samples of a step differ in timesteps, or in having a mask."""
    for part in shown:
        if len(ranges := {sample.t_range for sample in part}) > 1:
            name = part[0].key.concept
            raise ConfigError(f"the defense's timesteps of {name} change with the epoch: {ranges}.")
    if len({part[0].t_range for part in shown}) > 1:
        told = ", ".join(f"{part[0].key.concept} {part[0].t_range}" for part in shown)
        raise ConfigError(f"the defense wants other timesteps for each concept ({told}). Train them one at a time.")
    samples = [sample for part in shown for sample in part]
    bare = [sample.key for sample in samples if sample.mask is None]
    if bare and len(bare) < len(samples):
        raise DataError(
            f"{bare[0]} has no mask after the defense and other pictures have one. A batch has all or none."
        )
