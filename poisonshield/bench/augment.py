"""Two views for self-supervised training beside torchvision's v2 transforms, which take one image at a time.

Both start from 8-bit pixels and end with float batches; ours also draws its numbers and plans crops in that time.
"""

import torch
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.bench.harness import Case, Provider, Target, WrongResult
from poisonshield.data.views import Views, ViewsConfig
from poisonshield.ops import use_backend
from poisonshield.ops.dispatch import Room

_ROOM = Room("augment")
_KERNEL = 23  # of the blur, as usual at 224 px; torchvision asks for one


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Views of 224 px from larger images, and of 32 px from small ones."""
    if quick:
        return [_case("small", 2, 20, 16, 9, device)]
    large, small = (256, 512) if device.type == "cuda" else (16, 128)
    return [_case("224 px", large, 400, 224, _KERNEL, device), _case("32 px", small, 32, 32, 3, device)]


def _case(name: str, count: int, source: int, size: int, kernel: int, device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(count, 3, 8, 8, generator=generator)
    x = torch.nn.functional.interpolate(noise, (source, source), mode="bicubic").clamp(0, 1).mul(255).to(torch.uint8)
    batch = Batch(tuple(f"{i}" for i in range(count)), x.to(device))
    views = Views(ViewsConfig(size=size, blur_kernel=kernel), default="ssl", count=2, seed=0)
    ideal = 2 * count * 3 * (source**2 + 4 * size**2)
    case = Case(f"two ssl views, {name}", tuple(x.shape), ideal, "torchvision v2", dtype="uint8")
    case.targets = [Target("triton" if device.type == "cuda" else "cpu", "torchvision v2", 1.2)]

    def made(backend: str) -> Tensor:
        with use_backend(backend):
            return torch.stack(views(batch).all_views())

    expected = made("reference")
    for backend in ("reference", "compiled", "cpu", "triton"):
        missing = _ROOM.missing(backend, device)

        def run(backend: str = backend) -> tuple[Tensor, ...]:
            with use_backend(backend):
                return views(batch).all_views()

        def check(backend: str = backend) -> str:
            worst = float((made(backend) - expected).abs().max())
            if worst > 1e-5:
                raise WrongResult(f"{backend}: the views are off by {worst}")
            return ""

        case.providers.append(Provider(backend, None if missing else run, check, missing or ""))
    case.providers.append(_torchvision(batch, size, kernel))
    return case


def _torchvision(batch: Batch, size: int, kernel: int) -> Provider:
    """The same distribution of views; each image twice."""
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, (0.2, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], 0.5),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )

    def run() -> list[Tensor]:
        return [torch.stack([transform(image) for image in batch.pixels()]) for _ in range(2)]

    return Provider("torchvision v2", run, lambda: "on 8-bit pixels, draws of its own")
