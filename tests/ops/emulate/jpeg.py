"""The kernels of csrc/jpeg.cu and jpeg_backward.cu, emulated, beside the reference and Pillow: one JSON object a case.

`python jpeg.py emulated.so HxW ...`, by emulate.run. Blocks of four warps.
"""

import io
import itertools
import json
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from poisonshield.ops.jpeg import cuda_binding, inputs, reference
from poisonshield.ops.jpeg.reference import JpegArguments, JpegGradientArguments, JpegSettings, Pipeline

FORMS = [("420", "fancy"), ("420", "box"), ("444", "fancy")]
QUALITIES = [torch.tensor(q) for q in ([1, 30, 77, 100], [2, 5, 10, 25], [49, 50, 51, 75], [90, 95, 99, 0])]
ROUNDINGS = ["none", "poly", "ste", "poly_ste", "fourier", "hard"]
SPACE = {"mean": torch.tensor([0.45, 0.5, 0.4]), "std": torch.tensor([0.2, 0.25, 0.3])}


def made(shape, seed, low=0.1, high=0.9):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * (high - low) + low).float()


def tell(what, size, case, **facts):
    print(json.dumps({"what": what.__name__, "size": size, "case": case} | facts))


def arguments(x, quality, settings, mode="smooth", out_dtype=None, space=None):
    tables = inputs.tables_of(x, quality, None, whole=mode == "exact")
    space = space or {"mean": None, "std": None}
    affine = inputs.affine_of(x, (0.0, 1.0), **space)
    args = JpegArguments(x, tables, affine, mode, settings, out_dtype or x.dtype)
    assert cuda_binding.refusal("jpeg", args) is None
    return args


def pictures(size, seed):
    """uint8 [4, H, W, 3]: noise, noise of 0 and 255, a gradient, white."""
    rng, (h, w) = np.random.default_rng(seed), size
    noise = rng.integers(0, 256, (h, w, 3))
    binary = rng.integers(0, 2, (h, w, 3)) * 255
    slope = (np.arange(h)[:, None, None] * 5 + np.arange(w)[None, :, None] * 3 + np.arange(3) * 40) % 256
    return np.stack([noise, binary, slope, np.full((h, w, 3), 255)]).astype(np.uint8)


def by_pillow(pictures, qualities, subsampling):
    """uint8 [B, 3, H, W] of [B, H, W, 3]: each compressed by libjpeg-turbo at its quality, and read again."""
    results = [pillow_once(p, int(q), subsampling) for p, q in zip(pictures, qualities, strict=True)]
    return torch.from_numpy(np.stack(results)).permute(0, 3, 1, 2)


def pillow_once(pixels, quality, subsampling):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling={"444": 0, "420": 2}[subsampling])
    return np.asarray(Image.open(buffer).convert("RGB"))


def exact(size):
    """Differing numbers to Pillow, of 8-bit pixels, and to the reference, of floats and of halves, in two layouts."""
    pixels = pictures(size, sum(size))
    last = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # channels last
    for subsampling in ("420", "444"):
        settings = JpegSettings(subsampling)
        for qualities in QUALITIES[1:]:
            found = cuda_binding.jpeg(arguments(last.contiguous(), qualities, settings, "exact"))
            apart = int((found != by_pillow(pixels, qualities, subsampling)).sum())
            tell(exact, size, f"{subsampling} {qualities.tolist()}", apart=apart)
        qualities = QUALITIES[0]
        expected = by_pillow(pixels, qualities, subsampling)
        for layout, x in (("last", last), ("planar", last.contiguous())):
            found = cuda_binding.jpeg(arguments(x, qualities, settings, "exact"))
            tell(exact, size, f"{subsampling} {layout} bytes", apart=int((found != expected).sum()))
            assert found.stride() == torch.empty_like(x).stride()
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                floats = (x / 255).to(dtype)
                floats[0, 0, 0, 0], floats[1, 1, -1, -1] = torch.nan, torch.inf
                args = arguments(floats, qualities, settings, "exact", space=SPACE)
                apart = int((cuda_binding.jpeg(args) != reference.jpeg(args)).sum())
                tell(exact, size, f"{subsampling} {layout} {dtype}", apart=apart)


def away_from_ties(args):
    """[B, 1, H, W] bool: pixels that no coefficient next to a tie reaches; float32 may round those either way."""
    if args.settings.rounding in ("none", "fourier"):
        return torch.ones_like(args.x[:, :1], dtype=torch.bool)
    pipeline = Pipeline(args.x.double(), args.tables.double(), args.affine.double(), args.settings)
    h, w = args.x.shape[-2:]
    size = (-(-h // 16), -(-w // 16))
    near = torch.zeros(len(args.x), 1, *size)
    for u in pipeline.u:
        tie = ((u.abs() % 1 - 0.5).abs() < 2e-4).any(1, keepdim=True).float()
        cells = F.pad(tie, (0, -tie.shape[-1] % 8, 0, -tie.shape[-2] % 8))
        side = 8 if pipeline.half_chroma and u is pipeline.u[1] else 16
        cells = F.pad(cells, (0, size[1] * side - cells.shape[-1], 0, size[0] * side - cells.shape[-2]))
        near += F.max_pool2d(cells, side)
    near = F.max_pool2d(F.pad(near, (1, 1, 1, 1)), 3, 1)  # the triangle filter reaches into the next unit
    return near.repeat_interleave(16, 2).repeat_interleave(16, 3)[..., :h, :w] == 0


def layouts(x):
    """Names and tensors equal to x that lie in different ways."""
    wide = torch.zeros(*x.shape[:3], 2 * x.shape[3] + 1, dtype=x.dtype)
    wide[..., 1::2] = x
    return [("planar", x), ("last", x.contiguous(memory_format=torch.channels_last)), ("strided", wide[..., 1::2])]


def double(args):
    """The arguments in float64, for the reference."""
    return args._replace(**{n: v.double() for n, v in args._asdict().items() if isinstance(v, torch.Tensor)})


def smooth(size):
    """The largest distance to the reference in float64, away from ties, and how many pixels that leaves out."""
    x, quality = made((2, 3, *size), sum(size)), torch.tensor([20.0, 85.0])
    for (subsampling, upsample), rounding in itertools.product(FORMS, ROUNDINGS):
        settings = JpegSettings(subsampling, rounding, 3, upsample)
        args = arguments(x, quality, settings)
        expected, sure = reference.jpeg(double(args)._replace(out_dtype=torch.float64)), away_from_ties(args)
        for layout, same in layouts(x):
            found = cuda_binding.jpeg(args._replace(x=same))
            apart = float(((found - expected).abs() * sure).max())
            tell(
                smooth, size, f"{subsampling} {upsample} {rounding} {layout}", apart=apart, left_out=int((~sure).sum())
            )
    for (subsampling, upsample), dtype in itertools.product(FORMS, (torch.float16, torch.bfloat16)):
        args = arguments(x.to(dtype), 60, JpegSettings(subsampling, "none", upsample=upsample))
        single = args._replace(x=args.x.float(), out_dtype=torch.float32)
        for layout, same in layouts(args.x):
            apart = int((cuda_binding.jpeg(args._replace(x=same)) != cuda_binding.jpeg(single).to(dtype)).sum())
            tell(smooth, size, f"{subsampling} {upsample} {dtype} {layout}, rounded once", apart=apart)
        args = arguments(x * 4 - 2, 60, args.settings._replace(integer_planes=True), space=SPACE)
        away = (cuda_binding.jpeg(args) - reference.jpeg(args)).abs()
        share = float((away > 1e-5).float().mean())  # of numbers next to a tie of some plane
        tell(smooth, size, f"{subsampling} {upsample} integer planes", share=share, apart=float(away.max()))


def lost(size):
    """How many numbers differ between the kernels and the reference in whether a NaN has reached them."""
    x = made((1, 3, *size), 0)
    x[0, 1, size[0] // 2, size[1] // 2] = torch.nan
    for (subsampling, upsample), rounding in itertools.product(FORMS, ("poly", "ste")):
        args = arguments(x, 50, JpegSettings(subsampling, rounding, upsample=upsample))
        apart = int((cuda_binding.jpeg(args).isnan() != reference.jpeg(args).isnan()).sum())
        tell(lost, size, f"{subsampling} {upsample} {rounding}", apart=apart)


def backward(size):
    """The largest distance to the reference's gradients in float64, as a share of the largest gradient."""
    x, quality, w = (
        made((2, 3, *size), sum(size), -0.05, 1.05),
        torch.tensor([20.0, 85.0]),
        made((2, 3, *size), 9, -1, 1),
    )
    for (subsampling, upsample), rounding in itertools.product(FORMS, ROUNDINGS):
        settings = JpegSettings(subsampling, rounding, 3, upsample, clamp_grad=0.25)
        args = arguments(x, quality, settings, space=SPACE if rounding == "poly" else None)
        args = JpegGradientArguments(w, args.x, args.tables, args.affine, settings, table_grad=True)
        expected, expected_tables = reference.jpeg_backward(double(args))
        sure = away_from_ties(args)
        for layout, (same, grad) in ((n, (a, b)) for (n, a), (_, b) in zip(layouts(x), layouts(w), strict=True)):
            dx, dtables = cuda_binding.jpeg_backward(args._replace(x=same, grad=grad))
            assert dx.stride() == torch.empty_like(same).stride()
            facts = {"apart": float(((dx - expected).abs() * sure).max() / (expected.abs().max() + 1e-9))}
            if sure.all():
                facts["tables"] = float((dtables - expected_tables).abs().max() / (expected_tables.abs().max() + 1e-6))
            tell(backward, size, f"{subsampling} {upsample} {rounding} {layout}", **facts)
        none = cuda_binding.jpeg_backward(args._replace(table_grad=False))
        assert torch.equal(none[0], cuda_binding.jpeg_backward(args)[0]) and not none[1].numel()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.ops.load_library(sys.argv[1])
    for name in sys.argv[2:]:
        for what in (exact, smooth, lost, backward):
            what(tuple(map(int, name.split("x"))))
