"""Trains a concept judge from rendered pictures in about four minutes on one thread, and says how far to trust it."""

import logging
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.models.diffusion.sampler import round_trip
from poisonshield.world.judge import ConceptJudge
from poisonshield.world.judge_changes import soften
from poisonshield.world.judge_lessons import IGNORED, KINDS, Objects, Rendered, make_lessons

log = logging.getLogger(__name__)

BATCH = 24
_WHOLE_FIRST = 0.4  # of all steps: shapes are learned several times sooner where "none" is no way out yet


def train_judge(
    render: Callable[[int], Rendered],
    *,
    model: LatentDiffusion | None = None,
    seed: int = 0,
    steps: int = 4000,
    objects: int = 3000,
    lr: float = 4e-3,
    checks: int = 512,
) -> ConceptJudge:
    """A judge of what `render(0)`, `render(1)`, ... show, all colours and shapes of which should come up often.

    model: a quarter of the lessons also go through its VAE, as generated pictures do. objects: pictures rendered to
    train on; half as many more are held back for temperature, and for the accuracies in `record`, with `checks` lessons
    of each kind. The same seed gives the same judge on the same machine; torch's global generator is not touched.
    """
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    seen = Objects.of([render(i) for i in range(objects)])
    rest = Objects.of([render(i) for i in range(objects, objects + objects // 2)])
    # The first weights are drawn from torch's global generator, which is put back afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = ConceptJudge(seen.colors, seen.shapes, size=seen.x.shape[-1]).to(memory_format=torch.channels_last)
    through = None if model is None else _pool(seen, model, generator, count=min(steps, 64) * BATCH)
    _fit(judge, seen, through, generator, steps=steps, lr=lr)
    judge.to(memory_format=torch.contiguous_format).eval()

    x, labels = make_lessons(rest, 2 * checks, generator)
    judge.calibrate(_logits(judge, soften(x, generator)), labels)
    judge.record = {
        "steps": steps,
        "seed": seed,
        "objects": objects,
        "vae": None if model is None else model.name,
        "seconds": round(time.perf_counter() - start, 1),
        "held_back": held_back(judge, rest, generator, model=model, count=checks),
    }
    log.info("judge     %d steps in %.0f s, held back %s", steps, judge.record["seconds"], judge.record["held_back"])
    return judge


def held_back(
    judge: ConceptJudge,
    objects: Objects,
    generator: torch.Generator,
    *,
    model: LatentDiffusion | None = None,
    count: int = 512,
) -> dict[str, float]:
    """Shares in [0, 1] over softened lessons about `objects`, `count` of each kind, none of which was trained on.

    whole_color, whole_shape, whole_joint: right and above 0.5; whole_vae_joint: the last after the VAE. Every other
    kind: how many pass for the object that they were made from, with a joint probability above 0.5 of its colour and
    shape.
    """
    chosen = torch.randint(len(objects.x), (count,), generator=generator)
    taken = objects.take(chosen)
    out = {}
    for name, kind in KINDS.items():
        x = soften(kind.make(taken, generator)[0], generator)
        joint = _joint(judge, x, taken.labels)
        if name == "whole":
            out["whole_color"], out["whole_shape"] = _right(judge, x, taken.labels)
            out["whole_joint"] = joint
            if model is not None:
                out["whole_vae_joint"] = _joint(judge, round_trip(model, x), taken.labels)
        else:
            out[name] = joint
    return {name: round(value, 4) for name, value in out.items()}


def _pool(objects: Objects, model: LatentDiffusion, generator: torch.Generator, *, count: int) -> tuple[Tensor, Tensor]:
    """Lessons that went through the VAE once, uint8, and their labels."""
    x, labels = make_lessons(objects, count, generator)
    return (round_trip(model, x) * 255).round().to(torch.uint8), labels


def _fit(
    judge: ConceptJudge,
    objects: Objects,
    through: tuple[Tensor, Tensor] | None,
    generator: torch.Generator,
    *,
    steps: int,
    lr: float,
) -> None:
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2)
    judge.train()
    for step in range(steps):
        only_whole = step < _WHOLE_FIRST * steps
        fresh = BATCH if through is None or only_whole else BATCH - BATCH // 4
        x, labels = make_lessons(objects, fresh, generator, kinds={"whole": KINDS["whole"]} if only_whole else KINDS)
        if through is not None and fresh < BATCH:
            rows = torch.randint(len(through[0]), (BATCH - fresh,), generator=generator)
            x, labels = torch.cat([x, through[0][rows].float() / 255]), torch.cat([labels, through[1][rows]])
        x = soften(x, generator).contiguous(memory_format=torch.channels_last)
        color, shape = judge(x)
        loss = F.cross_entropy(color, labels[:, 0], ignore_index=IGNORED)
        loss = loss + F.cross_entropy(shape, labels[:, 1], ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _logits(judge: ConceptJudge, x: Tensor) -> tuple[Tensor, Tensor]:
    parts = [judge(rows) for rows in x.split(256)]
    return torch.cat([c for c, _ in parts]), torch.cat([s for _, s in parts])


def _joint(judge: ConceptJudge, x: Tensor, labels: Tensor) -> float:
    p = [h.softmax(1).gather(1, y[:, None])[:, 0] for h, y in zip(_logits(judge, x), labels.T, strict=True)]
    return float((p[0] * p[1] > 0.5).float().mean())


def _right(judge: ConceptJudge, x: Tensor, labels: Tensor) -> list[float]:
    return [float((h.argmax(1) == y).float().mean()) for h, y in zip(_logits(judge, x), labels.T, strict=True)]
