"""A step of textual inversion with latents that are kept beside latents made anew, and of eight concepts beside one.

A step is what the trainer takes: forward, backward, AdamW, on batches of the concept stream drawn before. Both sides of
a comparison must have the same gradients before anything is timed. The rendered world gives the pictures, whatever the
pipeline: a step costs the same on any. How much kept latents spare depends on the shares of VAE and U-Net: with Stable
Diffusion 1.5 at 512 pixels the VAE's encoder is 1117 of 2786 GFLOP a sample, so 1.67 times is the most there.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from poisonshield.api.words import preset_run
from poisonshield.batch import Batch
from poisonshield.bench.harness import Case, Provider, Row, WrongResult, measure
from poisonshield.bench.record import append
from poisonshield.bench.vespr import flops
from poisonshield.data.concepts import Concept
from poisonshield.engine.optim import build_optimizer
from poisonshield.method import DiffusionMethod
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.runs.parts.words import build_concept_stream, build_inversion, select_for_training
from poisonshield.world import COLORS, SHAPES
from poisonshield.world.rendered import rendered_concepts

CACHED, ENCODED = "latents kept", "latents made anew"
ONE, MANY = "1 concept", "8 concepts"
CACHE_TARGET, MANY_TARGET = 1.6, 3.0
"""At least so many times faster with kept latents; at most so many times one concept's step for eight."""

TOLERANCE = 1e-4  # of a gradient's norm: sums in another order
_BATCHES, _PICTURES, _BATCH = 8, 5, 4


@dataclass
class Learner:
    """A method, its optimiser and the batches that it goes through in turn."""

    method: DiffusionMethod
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
    model: LatentDiffusion, concepts: tuple[Concept, ...], *, batch: int, cached: bool, quick: bool
) -> Learner:
    """Safe-Zone Training of these concepts, `batch` samples of each in a step, in float32 where the model is."""
    run = preset_run(model, batch=batch, method={"cache_latents": cached})
    concepts = select_for_training(run.settings.data, concepts)
    method, defenses = build_inversion(run, model, [c.name for c in concepts])
    method.to(model.alphas_cumprod.device)
    stream = iter(build_concept_stream(run, concepts, method, defenses))
    device = model.alphas_cumprod.device
    batches = [next(stream).to(device) for _ in range(2 if quick else _BATCHES)]
    return Learner(method.train(), build_optimizer(method, run.settings.optimizer), batches)


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
    """The two comparisons. Their checks raise WrongResult if gradients differ."""
    models = Pipelines(pipeline, device)
    first = models.load_copy()
    kinds = list(itertools.product(COLORS, SHAPES))[:8]
    size = first.unet.config.sample_size * first.factor
    eight = rendered_concepts(2 if quick else _PICTURES, seed=1, kinds=kinds, size=size)

    def learn(many: tuple[Concept, ...], batch: int, cached: bool = True) -> Learner:
        return build_learner(models.load_copy(), many, batch=batch, cached=cached, quick=quick)

    kept, anew = learn(eight[:1], _BATCH), learn(eight[:1], _BATCH, cached=False)
    one, many = learn(eight[:1], 1), learn(eight, 1)

    def compare(name: str, batch: int, peer: str, sides: Sequence[tuple[str, Learner, Learner]]) -> Case:
        providers = [Provider(side, mine.step, check_same(mine, other)) for side, mine, other in sides]
        return Case(name, (batch, 3, size, size), 0, peer, providers)

    return [
        compare(f"step of one concept, batch {_BATCH}", _BATCH, ENCODED, ((CACHED, kept, anew), (ENCODED, anew, kept))),
        compare("step, batch 1 of each concept", 1, ONE, ((ONE, one, many), (MANY, many, one))),
    ]


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


def bench(
    out: Path | None, rounds: int, quick: bool, threads: int | None, pipeline: str = "tiny"
) -> tuple[list[Row], dict[str, float]]:
    """Check and time, print tables and the two ratios, append rows to a CSV; the rows, and {what: ratio}.

    Raises ConfigError for a folder that is no pipeline, WrongResult if two sides are not the same step.
    """
    if threads:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    every: list[Row] = []
    work: dict[str, float] = {}
    console = Console(width=160)
    for case in cases(pipeline, device, quick):
        timed = measure(case, rounds=rounds, copy=1.0)
        # Last, when latents are known.
        work |= {p.name: flops(p.run) / 1e9 for p in case.providers if p.run is not None}
        # No traffic is claimed, so no bandwidth of a copy is measured.
        rows = [replace(r, gb_per_s=None, copy_pct=None, note=f"{work[r.provider]:.3f} GFLOP; {r.note}") for r in timed]
        console.print(table(case, rows, pipeline))
        every += rows
    times = {r.provider: r.times[1] for r in every if r.times is not None}
    over = lambda values, a, b: values[a] / values[b]
    ratios = {"cache": over(times, ENCODED, CACHED), "many": over(times, MANY, ONE)}
    console.print(
        f"{CACHED}: {ratios['cache']:.2f} times faster (wanted: at least {CACHE_TARGET:g}) with "
        f"{over(work, ENCODED, CACHED):.2f} times less arithmetic\n"
        f"{MANY}: {ratios['many']:.2f} times one's step (wanted: at most {MANY_TARGET:g}) with "
        f"{over(work, MANY, ONE):.2f} times its arithmetic"
    )
    if out is not None:
        append(out, every)
    return every, ratios


def table(case: Case, rows: list[Row], pipeline: str) -> Table:
    """Times with their spread, and the peak of memory beyond what weights take."""
    first = rows[0]
    where = f"{pipeline}, {first.device}, {first.threads} threads, torch {first.torch}"
    made = Table(title=f"{case.name}, {first.shape}, {case.dtype}, {where}", title_justify="left")
    for column in ("", "p20 ms", "p50 ms", "p80 ms", "extra MiB", "ops", "note"):
        made.add_column(column, justify="left" if column in ("", "note") else "right")
    for r in rows:
        times = (f"{v:.1f}" for v in r.times or ())
        made.add_row(r.provider, *times, f"{r.extra_mib:.1f}", str(r.launches), r.note)
    return made
