"""The kernels of csrc/diffusion.cu, emulated, beside the reference: one JSON object for each case.

`python diffusion.py emulated.so`, by emulate.run. Samples of odd sizes, and such as are read 16 bytes at a time; all
pairs of dtypes; memory by rows, by sites, and such as must be copied or is aligned to its elements alone.
"""

import itertools
import json
import sys

import torch

from poisonshield.ops.diffusion import cuda_binding, reference

SHAPES = [(3, 4, 24, 16), (2, 3, 7, 5), (1, 1, 1, 1), (2, 5)]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
PAIRS = [(F32, F32), (F32, F16), (F32, BF16), (F16, F16), (BF16, BF16)]
ALPHAS = torch.linspace(0.999, 0.01, 50)
SEED, OFFSET, STREAM = torch.tensor(-(2**40) + 3), torch.tensor(2), torch.tensor(2**31 + 9)


def made(shape, seed, dtype=F32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unaligned(x):
    """The same numbers, contiguous, one element after an aligned place."""
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


def by_sites(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def flipped(x):
    """The same numbers with the last two dimensions the other way round in memory: neither of the two orders."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


LAYOUTS = {"rows": lambda x: x, "sites": by_sites, "unaligned": unaligned, "flipped": flipped}


def masks(shape):
    """(name, mask); some entries are 0."""
    yield "none", None
    yield "shared", made((1, 1, *shape[2:]), 5).clamp(min=0)
    yield "channels", made((1, *shape[1:]), 6).clamp(min=0)
    yield "all", made(shape, 7).clamp(min=0)


def noising(shape, source, result, layout):
    """Calls with noise that is given and that is drawn."""
    arguments = reference.NoisingArguments(
        x0=layout(made(shape, 0, source)), t=torch.arange(shape[0]) * 20, alphas_cumprod=ALPHAS,
        noise=layout(made(shape, 1, source)), seed=SEED, offset=OFFSET, stream=STREAM, return_noise=False,
        out_dtype=result,
    )  # fmt: skip
    yield "given", arguments
    yield "mixed", arguments._replace(noise=made(shape, 1, source), return_noise=True)
    yield "drawn", arguments._replace(noise=None, return_noise=True)


def losses(shape, source, result, layout):
    """Calls of every kind of target, loss and mask."""
    plain = reference.LossArguments(
        pred=layout(made(shape, 0, result)), target=None, x0=layout(made(shape, 1, source)),
        noise=layout(made(shape, 2, source)), t=torch.arange(shape[0]) * 20, alphas_cumprod=ALPHAS,
        prediction_type="epsilon", seed=SEED, offset=OFFSET, stream=STREAM, mask=None,
        weight=torch.linspace(0.5, 2, shape[0]), gamma=0.0, loss="mse", delta=0.5, normalize="per_sample",
        pred_grad=True,
    )  # fmt: skip
    kinds = {
        "target": {"target": plain.x0, "x0": None, "noise": None},
        "sample": {"prediction_type": "sample"},
        "v": {"prediction_type": "v", "loss": "huber"},
        "drawn": {"noise": None, "prediction_type": "v", "loss": "l1", "x0": plain.x0.to(result)},
    }
    for (kind, own), (mask_name, mask) in itertools.product(kinds.items(), masks(shape)):
        yield f"{kind}, mask {mask_name}", plain._replace(mask=mask, **own)
    hidden = plain._replace(mask=torch.zeros(shape), pred=plain.pred * torch.nan)
    yield "nothing but NaN under the mask", hidden
    yield "no gradient", plain._replace(pred_grad=False)


def calls():
    """(shape, dtypes, layout): all dtypes in the first layout, and all layouts of float32."""
    for shape in SHAPES:
        yield from ((shape, pair, "rows") for pair in PAIRS)
        yield from ((shape, PAIRS[0], name) for name in LAYOUTS if name != "rows" and len(shape) == 4)


def compare(function, cases):
    for shape, pair, layout in calls():
        for name, args in cases(shape, *pair, LAYOUTS[layout]):
            assert cuda_binding.refusal(function, args) is None
            ours, plain = (getattr(module, function)(args) for module in (cuda_binding, reference))
            facts = {"function": function, "shape": shape, "dtypes": [str(d)[6:] for d in pair], "layout": layout}
            pairs = list(zip(ours, plain, strict=True))
            facts["like"] = all((a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()) for a, b in pairs)
            print(json.dumps(facts | {"case": name, "apart": max(apart(a, b) for a, b in pairs)}))


def apart(ours, plain):
    """The largest difference, in units of the largest number; 0 of what has no numbers."""
    if not plain.numel():
        return 0.0
    ours, plain = ours.double(), plain.double()
    return float((ours - plain).abs().max() / plain.abs().max().clamp(min=1e-3))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.ops.load_library(sys.argv[1])
    compare("q_sample", noising)
    compare("diffusion_loss", losses)
