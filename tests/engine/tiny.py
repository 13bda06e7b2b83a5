"""The smallest method and stream that could still break an engine, and the pieces to run them."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poisonshield import collectives
from poisonshield.batch import Batch, StepOutput
from poisonshield.engine.optim import OptimConfig
from poisonshield.engine.processes import processes
from poisonshield.engine.runfolder import RunFolder
from poisonshield.engine.schedule import ScheduleConfig
from poisonshield.engine.settings import EngineConfig
from poisonshield.engine.trainer import Trainer
from poisonshield.method import Method, SSLMethod

IMAGES = 48


class TinyStream:
    """48 made-up images, a new order each epoch, in global batches of 8: for two ranks 4 and 4, or 5 and 3."""

    steps_per_epoch = IMAGES // 8
    stage_seconds = 0.0

    def __init__(self, bad_steps: tuple[int, ...] = (), even: bool = True) -> None:
        self.step, self.bad_steps, self.even = 0, bad_steps, even
        draw = torch.Generator().manual_seed(5)
        self.y = torch.arange(IMAGES) % 3
        self.x = (torch.rand(IMAGES, 3, 6, 6, generator=draw) + self.y.view(-1, 1, 1, 1) * 0.2).clamp(0, 1)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            epoch, part = divmod(self.step, self.steps_per_epoch)
            order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(epoch))
            rows, rank, world = order[part * 8 : part * 8 + 8], collectives.rank(), collectives.world_size()
            sizes = {1: (8,), 2: (4, 4) if self.even else (5, 3), 3: (3, 3, 2), 4: (2, 2, 2, 2)}[world]
            mine = rows[sum(sizes[:rank]) :][: sizes[rank]]
            x = self.x[mine]
            if self.step in self.bad_steps and rank == world - 1:
                x = x * float("nan")
            self.step += 1
            keys = tuple(f"image-{i}" for i in mine.tolist())
            sizes = sizes if world > 1 else None
            yield Batch(keys, x=x, views=(x,), y=self.y[mine], rank_sizes=sizes, epoch=epoch, draw=epoch)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


class Interrupted(TinyStream):
    """Calls `what` (to raise, or to send a signal) when batch `at`, counted from 0, is asked for."""

    def __init__(self, at: int, what: Callable[[], object], **settings: Any) -> None:
        super().__init__(**settings)
        self.at, self.what = at, what

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if self.step == self.at + 1:
                self.what()
            yield batch


class TinyMethod(SSLMethod):
    """Convolution, batch norm, dropout and keyed noise; a running average that only after_step moves."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head = nn.Linear(8, 3)
        self.register_buffer("average", torch.zeros(3, 8))

    def features(self, batch: Batch) -> tuple[Tensor, ...]:
        noise = batch.random(7).normal("noise", batch.x[0].numel()).view(batch.x.shape)
        return (self.encoder(batch.x + 0.1 * noise),)

    def loss(self, features: tuple[Tensor, ...], batch: Batch) -> StepOutput:
        per_sample = F.cross_entropy(self.head(features[0]), batch.y, reduction="none")
        loss = collectives.mean(per_sample, batch.rank_sizes)
        return StepOutput(loss, {"ce": loss.detach()})

    def after_step(self, progress: float) -> None:
        self.average.lerp_(self.head.weight.detach(), 0.1)


class SyncedNorm(nn.Module):
    """Batch norm over the global batch, channels last, written out; in eval mode it uses the running statistics."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.mean, self.var
        if self.training:
            flat = x.transpose(0, 1).flatten(1)
            count = torch.tensor([float(flat.shape[1])])
            total = collectives.all_reduce_sum(torch.cat([count, flat.sum(1), flat.pow(2).sum(1)]))
            mean, square = total[1:].div(total[0]).chunk(2)
            var = square - mean**2
            with torch.no_grad():
                self.mean.lerp_(mean, 0.1)
                self.var.lerp_(var, 0.1)
        scale = self.weight * (var + 1e-5).rsqrt()
        return (x - mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1)


class AttackedMethod(TinyMethod):
    """Adversarial training with a contrast between all samples; its inner loop asks for input gradients in forward.

    Gradients, not their signs, move the attack: signs amplify rounding, which is not what this is here to test.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 3), SyncedNorm(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )

    def forward(self, batch: Batch) -> StepOutput:
        self.encoder.eval()
        adv = batch.x
        for _ in range(2):
            adv = adv.detach().requires_grad_()
            inner = F.cross_entropy(self.head(self.encoder(adv)), batch.y, reduction="sum")
            adv = (adv + 0.5 * torch.autograd.grad(inner, adv)[0]).clamp(0, 1)
        self.encoder.train()
        clean, attacked = self.encoder(batch.x), self.encoder(adv.detach())
        ce = collectives.mean(F.cross_entropy(self.head(attacked), batch.y, reduction="none"), batch.rank_sizes)
        z = F.normalize(collectives.gather(torch.stack([clean, attacked], 1), batch.rank_sizes).flatten(0, 1), dim=1)
        ssl = (z @ z.T / 0.5).logsumexp(1).mean()
        return StepOutput(ce + ssl, {"ssl": ssl.detach(), "ce": ce.detach()})


def make_trainer(
    folder: Path,
    *,
    method: Method | None = None,
    stream: TinyStream | None = None,
    overwrite: bool = False,
    clip_norm: float | None = 1.0,
    optimizer: str = "sgd",
    **engine: Any,
) -> Trainer:
    """A trainer of the tiny method; `engine` are settings of EngineConfig. Call inside `processes`."""
    config = EngineConfig(**{"max_steps": 15, "log_every_steps": 1, "device": "cpu", **engine})
    optim = OptimConfig(name=optimizer, lr=0.1 if optimizer == "sgd" else 0.01, weight_decay=1e-4, clip_norm=clip_norm)
    schedule = ScheduleConfig(warmup_steps=3)
    parts = {"engine": config, "optimizer": optim, "schedule": schedule}
    record = {"seed": 1, **{name: part.model_dump() for name, part in parts.items()}}
    return Trainer(
        method or TinyMethod(), stream or TinyStream(), config, optimizer=optim, schedule=schedule,
        run_folder=RunFolder(folder, overwrite=overwrite), seed=1, fixed_record=record,
    )  # fmt: skip


def train(folder: Path, *, method_class: type[Method] = TinyMethod, **settings: Any) -> tuple[Trainer, dict[str, Any]]:
    """Run to the end in this process (or as one rank of several): the trainer, and what fit returned."""
    engine = {"max_steps": 15, "device": "cpu", **settings}
    names = EngineConfig.model_fields
    with processes(EngineConfig(**{k: v for k, v in engine.items() if k in names}), seed=1):
        trainer = make_trainer(folder, method=method_class(), **settings)
        return trainer, trainer.fit()


def by_hand(
    rates: list[float],
    *,
    method_class: type[Method] = TinyMethod,
    bad_steps: tuple[int, ...] = (),
    optimizer: str = "sgd",
    clip_norm: float = 1.0,
) -> Method:
    """The method after the same run as `train`'s, its loop written out: one step for each rate, bad ones dropped."""
    torch.manual_seed(1)
    method = method_class()
    torch.manual_seed(1)
    kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    optim = kind(method.parameters(), weight_decay=1e-4, lr=1.0, **({"momentum": 0.9} if optimizer == "sgd" else {}))
    for rate, batch in zip(rates, TinyStream(bad_steps), strict=False):
        before = weights(method)
        loss = method(batch).loss
        optim.zero_grad()
        loss.backward()
        norm = sum(p.grad.double().pow(2).sum().item() for p in method.parameters()) ** 0.5
        if not (math.isfinite(loss.item()) and math.isfinite(norm)):
            method.load_state_dict(before)
            continue
        for p in method.parameters():
            p.grad *= min(1.0, clip_norm / (norm + 1e-6))
        optim.param_groups[0]["lr"] = rate
        optim.step()
        method.after_step(1.0)
    return method


def losses(folder: Path) -> list[float]:
    """The loss of every logged step."""
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(method: nn.Module) -> dict[str, Tensor]:
    """A copy of everything a method holds."""
    return {name: value.detach().clone() for name, value in method.state_dict().items()}


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference between two states of the same names."""
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """True if both hold the same names and exactly the same numbers."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
