"""One joint training step of ours beside the same step as the VESPR authors' code takes it.

Theirs is re-enacted here from its description, in plain PyTorch: the attack forwards every view through encoder,
projector and classifier, ascends 0 * L_SSL + 1 * mean CE, and back-propagates it into all parameters at each step, only
to zero those gradients afterwards. Not re-enacted: their normalized pixel space, their loader over tensors inside the
attack, half precision and communication, so that what is left is the arithmetic that can be avoided. Both share the
network, the loss code, the batch and the clamp to [0, 1]; before any timing both must reach the same pixels.
On a GPU sums come in another order from run to run, so there a few pixels may differ. The network is ResNet-18 there.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.utils.flop_counter import FlopCounterMode

from poisonshield.batch import Batch
from poisonshield.bench.harness import CPU, Case, Provider, Row, Target, WrongResult
from poisonshield.bench.session import Session
from poisonshield.defenses.base import Context
from poisonshield.defenses.vespr import VESPR, VESPRMethod
from poisonshield.methods.simclr import SimCLR
from poisonshield.models.backbones import BackboneConfig, build_encoder

OURS, CHANNELS_LAST, THEIRS = "ours", "ours, channels-last", "reference's step"
HEADS = ((2048, 2048), (256, 128))  # the authors' projector, and that of the configs for cifar10-mini
TARGET = 3.0
"""Times faster than the reference's step with the authors' projector; a smaller one leaves less to spare."""
SEED, CLASSES = 5, 10
GRADIENT_TOLERANCE = {"cpu": 1e-5, "cuda": 1e-2}
PIXEL_TOLERANCE = {"cpu": 0.0, "cuda": 1e-3}
"""The share of attacked pixels that may differ. Sums in another order may flip the sign of a gradient that is nearly
zero."""


class ViewBatch(Batch):
    """A Batch that has views and labels: a name for readers and type checkers alone."""

    views: tuple[Tensor, ...]
    y: Tensor


def build_example(
    quick: bool, steps: int, heads: tuple[int, int] = HEADS[0], device: torch.device = CPU
) -> tuple[VESPRMethod, ViewBatch]:
    """VESPR around SimCLR on resnet_mini, and random pixels: 64 of 32x32, or 6 of 16x16 on a thinner network; on a GPU
    ResNet-18 and 512 pixels of 32x32.

    heads: the projector's hidden and output widths; 32 and 16 where it is to be quick.
    """
    torch.manual_seed(0)
    widths, size, side = ((8, 8, 16, 16), 6, 16) if quick else ((16, 32, 64, 128), 64, 32)
    network = BackboneConfig(name="resnet_mini", widths=widths)
    if device.type == "cuda" and not quick:
        network, size = BackboneConfig(name="resnet18", stem="cifar"), 512
    encoder = build_encoder(network)
    hidden, width = (32, 16) if quick else heads
    defense = VESPR(VESPR.Config(attack={"steps": steps}), Context(SEED, CLASSES))
    ssl = SimCLR(SimCLR.Config(hidden=hidden, out=width), encoder=encoder, num_classes=CLASSES)
    model = cast(VESPRMethod, defense.wrap(ssl)).to(device).train()
    views = tuple(torch.rand(size, 3, side, side).to(device) for _ in range(2))
    y = torch.arange(size, device=device) % CLASSES
    return model, ViewBatch(tuple(f"k{i}" for i in range(size)), views=views, y=y)


def our_step(model: VESPRMethod, optimizer: Optimizer, batch: ViewBatch) -> None:
    """One step as the trainer takes it."""
    loss = model(batch).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def reference_loss(model: VESPRMethod, views: list[Tensor], batch: ViewBatch, *, ssl: float, ce: float) -> Tensor:
    """Views one by one through encoder, classifier and projector; ssl * L_SSL + ce * mean CE."""
    features = tuple(model.encoder(v) for v in views)
    scores = [model.head(h) for h in features]
    agreement = model.method.loss(features, batch.replace(views=tuple(views))).loss
    return ssl * agreement + ce * torch.stack([F.cross_entropy(s, batch.y) for s in scores]).mean()


def reference_attack(model: VESPRMethod, batch: ViewBatch, noise: dict[int, Tensor] | None = None) -> list[Tensor]:
    """The views after PGD on the flagged ones, at the full cost. noise: each flagged view's start, else drawn here."""
    eps, flagged, pgd = model.config.eps, model.config.attack_views, model.config.attack.config
    if noise is None:
        noise = {i: (2 * torch.rand_like(batch.views[i]) - 1) * eps for i in flagged}
    views = list(batch.views)
    for i in flagged:
        views[i] = (batch.views[i] + noise[i].clamp(-eps, eps)).clamp(0, 1)
    model.eval()
    for _ in range(pgd.steps):
        leaves = [v.detach().clone().requires_grad_(i in flagged) for i, v in enumerate(views)]
        model.zero_grad()
        reference_loss(model, leaves, batch, ssl=0.0, ce=1.0).backward()
        for i in flagged:
            gradient = leaves[i].grad
            assert gradient is not None  # backward has just filled it
            moved = views[i] + pgd.step_size * gradient.sign()
            views[i] = moved.clamp(batch.views[i] - eps, batch.views[i] + eps).clamp(0, 1)
    model.zero_grad()
    model.train()
    return views


def reference_step(
    model: VESPRMethod, optimizer: Optimizer, batch: ViewBatch, noise: dict[int, Tensor] | None = None
) -> None:
    """Attack, then one step of SGD on both losses."""
    views = reference_attack(model, batch, noise)
    loss = reference_loss(model, views, batch, ssl=model.config.ssl_weight, ce=model.config.ce_weight)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@dataclass(frozen=True)
class Agreement:
    """How far the two steps are apart, given the same noise."""

    differing: int
    """Adversarial pixels that are not the same in both."""
    gradient: float
    """The largest difference of two elements of the gradients."""
    moved: float
    """Mean distance of our attacked pixels from the clean ones."""


def compare(model: VESPRMethod, batch: ViewBatch) -> Agreement:
    """Both steps on copies of the model."""
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    noise = {i: our_noise(model, batch, i) for i in model.config.attack_views}
    mine = [ours.attacked(v, i, batch) for i, v in enumerate(batch.views)]
    other = reference_attack(theirs, batch, noise)
    differing = sum(int((a != b).sum()) for a, b in zip(mine, other, strict=True))
    moved = max(float((a - b).abs().mean()) for a, b in zip(mine, batch.views, strict=True))
    our_step(ours, sgd(ours), batch)
    reference_step(theirs, sgd(theirs), batch, noise)
    pairs = zip(gradients(ours), gradients(theirs), strict=True)
    return Agreement(differing, max(float((a - b).abs().max()) for a, b in pairs), moved)


def gradients(model: VESPRMethod) -> list[Tensor]:
    """The gradient of each parameter that has one."""
    return [p.grad for p in model.parameters() if p.grad is not None]


def our_noise(model: VESPRMethod, batch: ViewBatch, view: int) -> Tensor:
    """The random start that our attack draws for a view."""
    x = batch.views[view]
    u = batch.random(model.seed, x.device).within(f"view{view}").uniform("pgd/start/0", x[0].numel())
    return (2 * u.view(x.shape) - 1) * model.config.eps


def sgd(model: torch.nn.Module) -> SGD:
    """The optimiser of both."""
    return SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def flops(run: Callable[[], object]) -> int:
    """Floating-point operations of convolutions and matrix products, forward and backward, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def count_cost(model: VESPRMethod, batch: ViewBatch) -> dict[str, tuple[int, int]]:
    """FLOPs of (attack, whole step) for each of the two."""
    other = copy.deepcopy(model)
    optimizer = sgd(other)
    # The counter's module hooks refuse a leaf under torch.autograd.grad, so the encoder is given a view of it.
    vars(other)["logits"] = lambda x: other.head(other.encoder(x.view_as(x)))

    def attack() -> list[Tensor]:
        return [other.attacked(v, i, batch) for i, v in enumerate(batch.views)]

    mine = (flops(attack), flops(lambda: our_step(other, optimizer, batch)))
    return {
        OURS: mine,
        CHANNELS_LAST: mine,
        THEIRS: (
            flops(lambda: reference_attack(other, batch)),
            flops(lambda: reference_step(other, optimizer, batch)),
        ),
    }


def build_case(model: VESPRMethod, batch: ViewBatch) -> Case:
    """Both steps, each on a model of its own. Raises WrongResult from the check if they do not agree."""

    def check() -> str:
        found = compare(model, batch)
        pixels, kind = batch.views[0].numel(), batch.views[0].device.type
        if found.differing > PIXEL_TOLERANCE[kind] * pixels or found.gradient > GRADIENT_TOLERANCE[kind]:
            raise WrongResult(
                f"{found.differing} attacked pixels differ, and gradients by up to {found.gradient:.2g} "
                f"(at most {GRADIENT_TOLERANCE[kind]:g} allowed): the two steps are not the same."
            )
        return f"{found.differing} pixels differ, gradients by {found.gradient:.1g}"

    def check_layout() -> str:
        """Sums in another order may flip the sign of a gradient that is nearly zero."""
        other, same = in_channels_last(model, batch)
        theirs, ours = (m.attacked(b.views[0], 0, b) for m, b in ((other, same), (model, batch)))
        flipped = float((theirs != ours).float().mean())
        if flipped > 1e-3:
            raise WrongResult(f"{flipped:.1%} of the attacked pixels differ in channels-last memory; 0.1 % may.")
        return f"{flipped:.1%} of the pixels differ"

    def provider(name: str, step: Callable[..., None], found: Callable[[], str]) -> Provider:
        mine, given = in_channels_last(model, batch) if name == CHANNELS_LAST else (copy.deepcopy(model), batch)
        optimizer = sgd(mine)
        return Provider(name, lambda: step(mine, optimizer, given), found)

    kinds = ((OURS, our_step, check), (CHANNELS_LAST, our_step, check_layout), (THEIRS, reference_step, check))
    steps = model.config.attack.config.steps
    heads: Any = model.method.config
    name = f"vespr joint step, {steps} attack steps, projector {heads.hidden}-{heads.out}"
    shape = tuple(batch.views[0].shape)
    judged = (heads.hidden, heads.out) == HEADS[0]
    targets = [Target(mine, THEIRS, TARGET) for mine in (OURS, CHANNELS_LAST) if judged]
    return Case(name, shape, 0, THEIRS, [provider(*kind) for kind in kinds], targets=targets, items=shape[0])


def in_channels_last(model: VESPRMethod, batch: ViewBatch) -> tuple[VESPRMethod, ViewBatch]:
    """Copies as the trainer makes them with engine.channels_last, which the shipped configs set."""
    views = tuple(v.contiguous(memory_format=torch.channels_last) for v in batch.views)
    same = cast(ViewBatch, batch.replace(views=views))
    return copy.deepcopy(model).to(memory_format=torch.channels_last), same


def bench(session: Session, steps: int = 10) -> None:
    """Check, time and count both steps, print a table. Raises WrongResult if the two are not the same step."""
    for heads in HEADS[:1] if session.quick else HEADS:
        model, batch = build_example(session.quick, steps, heads, session.device)
        counted = count_cost(model, batch)
        case = build_case(model, batch)
        gflop = {name: step / 1e9 for name, (_, step) in counted.items()}
        show(case, session.time(case, partial(_remark, gflop)), counted)


def _remark(gflop: dict[str, float], row: Row) -> str:
    return f"{gflop[row.provider]:.3f} GFLOP; {row.note}"


def show(case: Case, rows: list[Row], counted: dict[str, tuple[int, int]]) -> None:
    """Times with their spread, and FLOPs, each with the ratios of theirs to ours."""
    ours, last, theirs = (next(r for r in rows if r.provider == name) for name in (OURS, CHANNELS_LAST, THEIRS))
    where = f"{ours.device}, {ours.threads} threads, torch {ours.torch}"
    table = Table(title=f"{case.name}, {ours.shape}, {case.dtype}, {where}", title_justify="left")
    for column in ("", "p20 ms", "p50 ms", "p80 ms", "attack GFLOP", "step GFLOP", "extra MiB", "ops", "note"):
        table.add_column(column, justify="left" if column in ("", "note") else "right")
    for r in rows:
        attack, step = (f"{n / 1e9:.3f}" for n in counted[r.provider])
        times = [f"{v:.1f}" for v in r.times or ()] or [""] * 3
        extra, note = "" if r.extra_mib is None else f"{r.extra_mib:.0f}", r.note.partition("; ")[2] or r.note
        table.add_row(r.provider, *times, attack, step, extra, str(r.launches or ""), note)
    attack, step = (f"{b / a:.2f}" for a, b in zip(counted[OURS], counted[THEIRS], strict=True))
    for name, mine in ((OURS, ours), (CHANNELS_LAST, last)):
        if theirs.times is None or mine.times is None:
            continue
        ratios = (f"{a / b:.2f}" for a, b in zip(theirs.times, mine.times, strict=True))
        table.add_row("ratio", *ratios, attack, step, "", "", f"theirs / {name}")
    Console(width=160).print(table)
