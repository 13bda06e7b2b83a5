"""Differentiable JPEG beside kornia's, and exact JPEG beside a real codec."""

import importlib.util
import io
from collections.abc import Callable

import torch
from torch import Tensor

from poisonshield.bench.harness import Case, Provider, Target, WrongResult
from poisonshield.ops import jpeg
from poisonshield.ops.dispatch import Room

_ROOM = Room("jpeg")

Codec = Callable[[Tensor], Tensor]
"""Pixels [B, 3, H, W] in [0, 1] -> the same through JPEG."""


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Forward, forward with backward, and exact, at quality 75."""
    shape = (2, 3, 32, 32) if quick else (256, 3, 224, 224) if device.type == "cuda" else (64, 3, 224, 224)
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.avg_pool2d(noise, 5, 1, 2).to(device)  # as smooth as photographs, roughly
    size = x.nbytes
    exact = (jpeg(x, 75, mode="exact", backend="reference") * 255).round()
    forward = Case("jpeg forward", shape, 2 * size, "kornia")
    both = Case("jpeg forward+backward", shape, 5 * size, "kornia")
    whole = Case("jpeg exact", shape, 2 * size, "reference")
    if device.type == "cuda":
        forward.targets = [Target("triton", "% copy", 50)]
        both.targets = [Target("triton", "compiled", 1.5), Target("triton", "kornia", 10)]
        whole.targets = [Target("triton", "% copy", 35)]
    else:
        forward.targets, both.targets = [Target("cpu", "kornia", 4)], [Target("cpu", "kornia", 5)]
    reference = jpeg(x, 75, backend="reference")

    def near(run: Codec) -> Callable[[], str]:
        def check() -> str:
            with torch.no_grad():
                out = run(x)
            if not torch.isclose(out, reference, atol=2e-3).float().mean() > 0.99:
                raise WrongResult("differs from the reference in more than 1 % of pixels")
            return f"{_psnr(out, exact):.1f} dB to libjpeg"

        return check

    for name in ("reference", "compiled", "cpu", "triton", "cuda"):
        missing = _ROOM.missing(name, x.device)

        def run(v: Tensor, name: str = name) -> Tensor:
            return jpeg(v, 75, backend=name)

        _add(forward, both, name, run, x, near(run), missing)

        def exactly(name: str = name) -> Tensor:
            return jpeg(x, 75, mode="exact", backend=name)

        def check(exactly: Callable[[], Tensor] = exactly, name: str = name) -> str:
            if not torch.equal((exactly() * 255).round(), exact):
                raise WrongResult(f"{name}: exact mode differs from the reference")
            return "equal"

        whole.providers.append(Provider(name, None if missing else exactly, check, missing or ""))
    _add_kornia(forward, both, x, exact)
    whole.providers.append(_pillow(x, exact))
    return [forward, both, whole]


def _add_kornia(forward: Case, both: Case, x: Tensor, exact: Tensor) -> None:
    quality = torch.tensor([75.0], device=x.device)

    def run(v: Tensor) -> Tensor:
        import kornia

        return kornia.enhance.jpeg_codec_differentiable(v, quality)

    missing = None if importlib.util.find_spec("kornia") else "kornia is not installed"
    _add(forward, both, "kornia", run, x, lambda: f"{_psnr(run(x), exact):.1f} dB to libjpeg", missing)


def _add(
    forward: Case, both: Case, name: str, run: Codec, x: Tensor, check: Callable[[], str], missing: str | None
) -> None:
    """One who encodes and decodes x, alone and with the gradient."""

    def once() -> Tensor:
        with torch.no_grad():
            return run(x)

    def twice() -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(run(leaf).sum(), leaf)[0]

    def finite() -> str:
        if not torch.isfinite(twice()).all():
            raise WrongResult(f"{name}: the gradient is not finite")
        return ""

    forward.providers.append(Provider(name, None if missing else once, check, missing or ""))
    both.providers.append(Provider(name, None if missing else twice, finite, missing or ""))


def _pillow(x: Tensor, exact: Tensor) -> Provider:
    from PIL import Image

    arrays = (x * 255 + 0.5).floor().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()

    def run() -> list:
        out = []
        for a in arrays:
            buffer = io.BytesIO()
            Image.fromarray(a).save(buffer, "JPEG", quality=75, subsampling=2)
            out.append(Image.open(buffer, formats=["JPEG"]).convert("RGB"))
        return out

    def check() -> str:
        import numpy as np

        theirs = torch.from_numpy(np.stack([np.asarray(i) for i in run()])).permute(0, 3, 1, 2)
        same = torch.equal(theirs.float(), exact.cpu())
        return "one thread, from uint8; equal" if same else "one thread, from uint8; another codec"

    return Provider("Pillow", run, check)


def _psnr(out: Tensor, truth: Tensor) -> float:
    error = ((out * 255).round().clamp(0, 255) - truth).square().mean()
    return float(10 * torch.log10(255**2 / error))
