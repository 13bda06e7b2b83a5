"""A step of textual inversion with kept latents beside latents made anew, beside diffusers' loop, and of 8 concepts.

A step is what the trainer takes: forward, backward, AdamW, on batches of the concept stream drawn before. Both sides of
a comparison must have the same gradients before anything is timed. The rendered world gives the pictures, whatever the
pipeline: a step costs the same on any. How much kept latents spare depends on the shares of VAE and U-Net: with Stable
Diffusion 1.5 at 512 pixels the VAE's encoder is 1117 of 2786 GFLOP a sample, so 1.67 times is the most there.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor

from poisonshield.api.words import preset_run
from poisonshield.batch import Batch
from poisonshield.bench.harness import Case, Provider, Row, Target, WrongResult
from poisonshield.bench.session import Session, show
from poisonshield.bench.textual_inversion import UsualLoop, check_loop
from poisonshield.bench.vespr import flops
from poisonshield.data.concepts import Concept
from poisonshield.engine.optim import build_optimizer
from poisonshield.methods.diffusion.textual_inversion import TextualInversion
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.runs.parts.words import build_concept_stream, build_inversion, select_for_training
from poisonshield.world import COLORS, SHAPES
from poisonshield.world.rendered import rendered_concepts

CACHED, ENCODED = "latents kept", "latents made anew"
ONE, MANY = "1 concept", "8 concepts"
OURS, DIFFUSERS = "ours", "diffusers' loop"
CACHE_TARGET, MANY_TARGET, LOOP_SHARE = 1.6, 3.0, 0.9
"""At least so many times faster with kept latents; at most so many times one concept's step for eight; at least that
share of what the arithmetic allows beside diffusers' loop."""

TOLERANCE = 1e-4  # of a gradient's norm: sums in another order
_BATCHES, _PICTURES, _BATCH = 8, 5, 4


@dataclass
class Learner:
    """A method, its optimiser and the batches that it goes through in turn."""

    method: TextualInversion
    optimizer: torch.optim.Optimizer
    batches: list[Batch]

    def __post_init__(self) -> None:
        self.turn = itertools.cycle(self.batches)

    def step(self) -> None:
        """One step as the trainer takes it."""
        self.optimizer.zero_grad(set_to_none=True)
        self.method(next(self.turn)).loss.backward()
        self.optimizer.step()

    def gradient(self) -> Tensor:
        """Of the first concept's vectors on the first batch; all batches pass, so that their latents are known."""
        for batch in reversed(self.batches):
            grad = torch.autograd.grad(self.method(batch).loss, self.method.vectors)[0]
        return grad[: next(iter(self.method.placeholders.values())).count]


def build_learner(
    model: LatentDiffusion,
    concepts: tuple[Concept, ...],
    *,
    batch: int,
    quick: bool,
    preset: str = "szt",
    method: Mapping[str, Any] | None = None,
) -> Learner:
    """Safe-Zone Training of these concepts, `batch` samples of each in a step, in float32 where the model is.

    preset, method: another recipe, and settings of the method beside it."""
    run = preset_run(model, batch=batch, preset=preset, method=method)
    concepts = select_for_training(run.settings.data, concepts)
    made, defenses = build_inversion(run, model, [c.name for c in concepts])
    made.to(model.alphas_cumprod.device)
    stream = iter(build_concept_stream(run, concepts, made, defenses))
    device = model.alphas_cumprod.device
    batches = [next(stream).to(device) for _ in range(2 if quick else _BATCHES)]
    return Learner(cast(TextualInversion, made.train()), build_optimizer(made, run.settings.optimizer), batches)


class Pipelines:
    """Copies of one pipeline, each with a vocabulary of its own; the large networks are there once."""

    def __init__(self, folder: str, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.first: LatentDiffusion | None = None

    def load_copy(self) -> LatentDiffusion:
        """One more copy."""
        model = LatentDiffusion.load(self.folder).to(self.device)
        if self.first is None:
            self.first = model
        model.vae, model.unet = self.first.vae, self.first.unet
        return model


def cases(pipeline: str, device: torch.device, quick: bool) -> list[Case]:
    """The three comparisons. Their checks raise WrongResult if gradients differ."""
    models = Pipelines(pipeline, device)
    first = models.load_copy()
    kinds = list(itertools.product(COLORS, SHAPES))[:8]
    size = first.unet.config.sample_size * first.factor
    eight = rendered_concepts(2 if quick else _PICTURES, seed=1, kinds=kinds, size=size)

    def learn(many: tuple[Concept, ...], batch: int, **how: Any) -> Learner:
        return build_learner(models.load_copy(), many, batch=batch, quick=quick, **how)

    kept, anew = learn(eight[:1], _BATCH), learn(eight[:1], _BATCH, method={"cache_latents": False})
    one, many = learn(eight[:1], 1), learn(eight, 1)

    def compare(name: str, batch: int, peer: str, sides: Sequence[tuple[str, Learner, Learner]]) -> Case:
        providers = [Provider(side, mine.step, check_same(mine, other)) for side, mine, other in sides]
        return Case(name, (batch, 3, size, size), 0, peer, providers)

    cache = compare(
        f"step of one concept, batch {_BATCH}", _BATCH, ENCODED, ((CACHED, kept, anew), (ENCODED, anew, kept))
    )
    if pipeline != "tiny":  # there the VAE's encoder is too small a part: 1.36 times less arithmetic is all
        cache.targets = [Target(CACHED, ENCODED, CACHE_TARGET)]
    words = compare("step, batch 1 of each concept", 1, ONE, ((ONE, one, many), (MANY, many, one)))
    words.targets = [Target(MANY, ONE, MANY_TARGET, most=True)]
    return [cache, words, beside_diffusers(models, kept, learn(eight[:1], _BATCH, preset="diffusers"))]


def beside_diffusers(models: Pipelines, ours: Learner, same: Learner) -> Case:
    """Our step beside the usual loop on the same pictures. same: a learner of the preset that takes the loop's step."""
    loop = UsualLoop(models.load_copy(), same.method, same.batches)
    shape = tuple(ours.batches[0].pixels().shape)
    providers = [
        Provider(OURS, ours.step),
        Provider(DIFFUSERS, loop.step, lambda: check_loop(loop, same.method)),
    ]
    targets = [Target(OURS, DIFFUSERS, LOOP_SHARE * spared_arithmetic(ours, loop))]
    return Case(f"step beside diffusers' loop, batch {_BATCH}", shape, 0, DIFFUSERS, providers, targets=targets)


def spared_arithmetic(ours: Learner, loop: UsualLoop) -> float:
    """How many times the arithmetic of our step the loop's has, once our latents are known."""
    ours.gradient()
    batch = loop.batches[0]
    return len(ours.batches) * flops(lambda: loop.gradient(batch, loop.draw(batch))) / flops(ours.gradient)


def check_same(mine: Learner, other: Learner) -> Callable[[], str]:
    """A check that the first concept's vectors have one gradient in both, from where they start."""

    def check() -> str:
        a, b = mine.gradient(), other.gradient()
        far = float((a - b).norm() / b.norm())
        if not far <= TOLERANCE:
            raise WrongResult(
                f"gradients differ by {far:.1g} of their norm ({TOLERANCE:g} allowed): not the same step."
            )
        return f"gradients differ by {far:.0e}"

    return check


def bench(session: Session, pipeline: str = "tiny") -> dict[str, float]:
    """Check and time, print tables and the ratios; {what: ratio}.

    Raises ConfigError for a folder that is no pipeline, WrongResult if two sides are not the same step.
    """
    work: dict[str, float] = {}
    for case in cases(pipeline, session.device, session.quick):
        runs = {p.name: p.run for p in case.providers if p.run is not None}

        def remark(row: Row, runs: Mapping[str, Callable[[], object]] = runs) -> str:
            """Counted last, when latents are known."""
            work[row.provider] = flops(runs[row.provider]) / 1e9
            return f"{work[row.provider]:.3f} GFLOP; {row.note}"

        show(case, session.time(case, remark))
    times = {r.provider: r.times[1] for r in session.rows if r.times is not None}
    compared = {"cache": (ENCODED, CACHED), "many": (MANY, ONE), "loop": (DIFFUSERS, OURS)}
    ratios = {k: times[a] / times[b] for k, (a, b) in compared.items() if a in times and b in times}
    told = {
        "cache": f"{CACHED}: {{:.2f}} times faster (wanted: at least {CACHE_TARGET:g}) with {{:.2f}} times less "
        "arithmetic",
        "many": f"{MANY}: {{:.2f}} times one's step (wanted: at most {MANY_TARGET:g}) with {{:.2f}} times its "
        "arithmetic",
        "loop": f"beside {DIFFUSERS}: {{:.2f}} times faster with {{:.2f}} times less arithmetic",
    }
    console = Console(width=160)
    for what, ratio in ratios.items():
        a, b = compared[what]
        console.print(told[what].format(ratio, work[a] / work[b]))
    return ratios
