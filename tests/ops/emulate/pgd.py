"""The kernels of csrc/pgd.cu, emulated, beside the reference: one JSON object for each case.

`python pgd.py emulated.so [brief]`, by emulate.run. Blocks of eight warps; samples that fill no block, and some.
"""

import itertools
import json
import sys

import torch

from poisonshield.ops.pgd import cuda_binding, reference

SHAPES = [(1, 1, 1, 1), (3, 3, 23, 17), (2, 5), (2, 4, 16, 32)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = [
    ("plain", "rows"),
    ("plain", "last"),
    ("plain", "unaligned"),
    ("all", "rows"),
    ("all", "last"),
    ("all", "swapped"),
]
MEAN, STD = torch.tensor([0.5, 0.4, 0.3, 0.6, 0.45]), torch.tensor([0.2, 0.25, 0.3, 0.5, 0.125])


def made(shape, seed, normal=False):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn if normal else torch.rand)(shape, generator=generator)


def record(kind, shape, norm, case, dtype):
    """The arguments of a step or of a start, plain ones or all that there are."""
    everything, number = case == "all", 0.03 if norm == "linf" else 0.4
    pixels = (made(shape, 0) * 255).to(torch.uint8)
    clean = pixels if everything else (pixels / 255).to(dtype)
    each = torch.linspace(0.01, 0.06, shape[0]) if everything else None
    if kind is reference.StartArguments:
        ids = torch.tensor([5, 2**35 + 1, -3])[: shape[0]]
        own = {"seed": torch.tensor(-7), "offset": torch.tensor(3), "stream": torch.tensor(9)} if everything else {}
        own = {"seed": None, "offset": None, "stream": None, "sample_ids": ids} | own
        own |= {"seed_number": 2**62 + 5, "offset_number": -3, "stream_number": 2**32 - 1}
    else:
        grad = made(shape, 2, normal=True).to(dtype)
        grad.view(-1)[0] = torch.nan if norm != "l2" else 0.0
        own = {"grad": grad, "step_size": each, "step_number": 0.05}
        own["active"] = torch.arange(shape[0]) != 1 if everything else None
    fields = {"x_adv": made(shape, 1).to(dtype), "clean": clean, "eps": each, "eps_number": number, "norm": norm}
    fields |= {"mean": None, "std": None, "clip_low": 0.0, "clip_high": 1.0, "mask": None, "levels": 0}
    if everything:
        fields |= {"mean": MEAN[: shape[1]], "std": STD[: shape[1]], "mask": made(shape, 5) > 0.3}
    return kind(**fields | own)


def laid(x, layout):
    """x in another order of dimensions, or away from a multiple of 16 bytes."""
    if layout == "unaligned":
        return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    order = list(range(x.dim()))
    if layout == "last":
        order = [0, *order[2:], 1]
    elif layout == "swapped":
        order = [0, 1, *order[:1:-1]]
    back = sorted(range(x.dim()), key=order.__getitem__)
    return x.permute(order).contiguous().permute(back)


def beside(function, args, layout):
    """What the kernels and the reference make of x_adv."""
    found = []
    for module, x_adv in ((cuda_binding, laid(args.x_adv, layout)), (reference, args.x_adv.clone())):
        address = x_adv.data_ptr()
        getattr(module, function)(args._replace(x_adv=x_adv))
        assert x_adv.data_ptr() == address
        found.append(x_adv.float())
    return found


def compare(function, kind, norms, shapes, dtypes):
    for shape, norm, dtype, (case, layout) in itertools.product(shapes, norms, dtypes, FORMS):
        if dtype == torch.float16 and shape[0] != 3:
            continue  # compiled from the same lines as bfloat16
        args = record(kind, shape, norm, case, dtype)
        assert cuda_binding.refusal(function, args) is None
        ours, plain = beside(function, args, layout)
        facts = {"function": function, "shape": shape, "norm": norm, "case": case, "layout": layout}
        facts |= {"dtype": str(dtype), "unit": torch.finfo(dtype).eps, "apart": float((ours - plain).abs().max())}
        print(json.dumps(facts | {"equal": torch.equal(ours, plain)}))


def refuse_other_devices():
    """A tensor that lies elsewhere is told of by the source itself."""
    x, elsewhere = torch.zeros(1, 3, 4, 4), torch.zeros(1, dtype=torch.int64, device="meta")
    place = (None, 1, None, 1, None, 1)
    try:
        torch.ops.poisonshield_cuda.linf_start_(
            x, x.clone(), None, 0.1, *place, elsewhere, None, None, None, 0.0, 1.0, 16, 1
        )
    except RuntimeError as err:
        print(json.dumps({"function": "refusal", "told": str(err).splitlines()[0]}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.ops.load_library(sys.argv[1])
    brief = sys.argv[2:] == ["brief"]  # what threads do together
    norms, shapes, dtypes = (["l2"], SHAPES[1:2], DTYPES[:1]) if brief else (["linf", "l2", "sign_l2"], SHAPES, DTYPES)
    compare("pgd_step_", reference.StepArguments, norms, shapes, dtypes)
    compare("pgd_random_start_", reference.StartArguments, norms[:2], shapes, dtypes)
    refuse_other_devices()
