"""SimCLR at 32 px beside lightly's usual loop: from stored pictures to moved weights, a run of steps each.

Ours is what `poisonshield train` does: pixels held as bytes, views made for whole batches where the network is. Theirs
is the example of lightly's documentation: a data set of Pillow images, SimCLRTransform in two worker processes, its
NT-Xent loss. Network, projector, optimiser, batch and the strengths of the augmentation are the same; the losses must
agree on the same projections before anything is timed.
"""

import copy
import importlib.util
import itertools
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from poisonshield.bench.harness import Case, Provider, Target, WrongResult
from poisonshield.bench.session import Session, show
from poisonshield.bench.vespr import sgd
from poisonshield.data import ResidentSource, ShardStream, Source, open_dataset
from poisonshield.data.views import Views, ViewsConfig
from poisonshield.losses.infonce import infonce
from poisonshield.methods.simclr import SimCLR
from poisonshield.models.backbones import BackboneConfig, build_encoder

OURS, LIGHTLY = "ours", "lightly"
TARGET = 2.5
"""At least so many times as fast as lightly's loop."""

_WORKERS, _CLASSES = 2, 10


class Loop:
    """A model, its optimiser, and so many steps of a batch."""

    def __init__(self, source: Source, model: SimCLR, *, batch: int, steps: int, device: torch.device) -> None:
        self.source, self.batch, self.steps, self.device = source, batch, steps, device
        self.model = copy.deepcopy(model).to(device).to(memory_format=torch.channels_last).train()
        self.optimizer = sgd(self.model)
        views = Views(ViewsConfig(), default="ssl", count=2, seed=0)
        self.stream = ShardStream(
            source, batch_size=batch, seed=0, stages=(views,), keep_bytes=True, device=device
        )  # fmt: skip

    def run_ours(self) -> None:
        """The stream's batches through the method."""
        for batch in itertools.islice(iter(self.stream), self.steps):
            self._move(self.model(batch).loss)

    def run_lightly(self) -> None:
        """The loop of lightly's example."""
        criterion = lightly_loss(self.model.config.temperature)
        for views in itertools.islice(self._load(), self.steps):
            z = [self._project(v.to(self.device, memory_format=torch.channels_last)) for v in views]
            self._move(criterion(*z))

    def _project(self, x: Tensor) -> Tensor:
        projected: Tensor = self.model.projector(self.model.encoder(x))
        return projected

    def _load(self) -> Iterator[list[Tensor]]:
        loader = torch.utils.data.DataLoader(
            Pictures(self.source), batch_size=self.batch, shuffle=True, drop_last=True, num_workers=_WORKERS
        )
        while True:
            yield from loader

    def _move(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class Pictures(torch.utils.data.Dataset):
    """Two views of a picture by lightly's transform, with the strengths of ours."""

    def __init__(self, source: Source) -> None:
        from lightly.transforms import SimCLRTransform

        pixels = source.read(torch.arange(len(source))).permute(0, 2, 3, 1)
        self.arrays: np.ndarray = np.ascontiguousarray(pixels.numpy())
        side = self.arrays.shape[1]
        # Its strengths are 0.8, 0.8, 0.8 and 0.2 times cj_strength.
        self.transform = SimCLRTransform(input_size=side, cj_strength=0.5, min_scale=0.2, normalize=None)

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, i: int) -> list[Tensor]:
        from PIL import Image

        return cast(list[Tensor], self.transform(Image.fromarray(self.arrays[i])))


def lightly_loss(temperature: float) -> nn.Module:
    """NT-Xent as lightly has it."""
    from lightly.loss import NTXentLoss

    criterion: nn.Module = NTXentLoss(temperature=temperature)
    return criterion


def cases(device: torch.device, quick: bool) -> list[Case]:
    """One: both loops."""
    torch.manual_seed(0)
    network: dict[str, Any] = {"name": "resnet_mini", "widths": (8, 8, 16, 16) if quick else (16, 32, 64, 128)}
    if device.type == "cuda" and not quick:
        network = {"name": "resnet18", "stem": "cifar"}
    batch, steps = (8, 2) if quick else (512, 8) if device.type == "cuda" else (64, 16)
    encoder = build_encoder(BackboneConfig(**network))
    model = SimCLR(SimCLR.Config(hidden=256, out=128), encoder=encoder, num_classes=_CLASSES)
    source = ResidentSource(open_dataset("cifar10-mini"))
    missing = "" if importlib.util.find_spec("lightly") else "lightly is not installed (pip install lightly)"
    ours, theirs = (Loop(source, model, batch=batch, steps=steps, device=device) for _ in range(2))
    case = Case(
        f"simclr at 32 px, {steps} steps of {batch}", (batch, 3, 32, 32), 0, LIGHTLY, items=steps * batch,
        targets=[Target(OURS, LIGHTLY, TARGET)], counted=False,
    )  # fmt: skip
    check = (lambda: "") if missing else (lambda: check_losses(model.config.temperature))
    case.providers = [
        Provider(OURS, ours.run_ours, check),
        Provider(LIGHTLY, None if missing else theirs.run_lightly, check, missing),
    ]
    return [case]


def check_losses(temperature: float) -> str:
    """Raises WrongResult unless both losses agree, with their gradients, on random projections."""
    leaf = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ours = infonce((leaf[0], leaf[1]), temperature=temperature, same_view="others")
    theirs = lightly_loss(temperature)(leaf[0], leaf[1])
    pairs = [(ours.detach(), theirs.detach()), tuple(torch.autograd.grad(loss, leaf)[0] for loss in (ours, theirs))]
    far = max(float((a - b).abs().max()) for a, b in pairs)
    if far > 1e-5:
        raise WrongResult(f"the losses or their gradients differ by {far:.2g}: not the same step.")
    return f"losses and gradients differ by {far:.0e}"


def bench(session: Session) -> None:
    """Check, time and print the table."""
    for case in cases(session.device, session.quick):
        show(case, session.time(case))
