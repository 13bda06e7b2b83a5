"""The kernels of csrc/pgd.cu, emulated, beside the reference: one JSON object for each case.

`python pgd.py emulated.so`, by emulate.run. Blocks of eight warps; samples that fill no block, and that fill some.
"""

import itertools
import json
import sys

import torch

from poisonshield.ops.pgd import cuda_binding, reference

SHAPES = [(2, 3, 7, 5), (1, 1, 1, 1), (3, 3, 40, 33), (2, 5), (2, 4, 16, 32)]
MEAN, STD = torch.tensor([0.5, 0.4, 0.3, 0.6, 0.45]), torch.tensor([0.2, 0.25, 0.3, 0.5, 0.125])


def made(shape, seed, normal=False):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn if normal else torch.rand)(shape, generator=generator)


def cases(shape):
    """(name, what a record has beside the plain one)."""
    channels = shape[1]
    space = {"mean": MEAN[:channels], "std": STD[:channels]}
    mask = made(shape, 5) > 0.3
    yield "plain", {}
    yield "all", space | {"mask": mask, "bytes": True, "active": torch.arange(shape[0]) != 1}


def record(kind, shape, norm, case):
    """The arguments of a step or of a start."""
    case = dict(case)
    pixels = (made(shape, 0) * 255).to(torch.uint8)
    clean = pixels if case.pop("bytes", False) else pixels / 255
    if kind is reference.StartArguments:
        case.pop("active", None)
        ids = torch.tensor([5, 2**35 + 1, -3])[: shape[0]]
        own = {"seed": torch.tensor(-7), "offset": torch.tensor(3), "sample_ids": ids, "stream": torch.tensor(9)}
    else:
        own = {"grad": made(shape, 2, normal=True), "step_size": torch.full(shape[:1], 0.05), "active": None}
    eps = torch.full(shape[:1], 0.03 if norm == "linf" else 0.4)
    fields = {"x_adv": made(shape, 1), "clean": clean, "eps": eps, "norm": norm, "mean": None, "std": None}
    return kind(**fields | {"clip_low": 0.0, "clip_high": 1.0, "mask": None, "levels": 0} | own | case)


def beside(function, args):
    """What the kernels and the reference make of x_adv."""
    found = []
    for module in (cuda_binding, reference):
        x_adv = args.x_adv.clone()
        getattr(module, function)(args._replace(x_adv=x_adv))
        found.append(x_adv)
    return found


def compare(function, kind, norms):
    for shape, norm in itertools.product(SHAPES, norms):
        for name, case in cases(shape):
            args = record(kind, shape, norm, case)
            assert cuda_binding.refusal(function, args) is None
            ours, plain = beside(function, args)
            facts = {"function": function, "shape": shape, "norm": norm, "case": name}
            print(json.dumps(facts | {"equal": torch.equal(ours, plain), "apart": float((ours - plain).abs().max())}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.ops.load_library(sys.argv[1])
    compare("pgd_step_", reference.StepArguments, ["linf", "l2", "sign_l2"])
    compare("pgd_random_start_", reference.StartArguments, ["linf"])
