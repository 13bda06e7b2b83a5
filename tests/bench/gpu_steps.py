"""The steps of gpu.py that are no command of the package: `python tests/bench/gpu_steps.py ops`.

Each writes facts, a line of JSON each, to the file that FACTS names, with the hardware and the versions. With TOY set
they are small and run on the CPU. Exit code 1 if something is not as it should be.
"""

import importlib
import io
import itertools
import json
import os
import sys
import time

import numpy as np
import torch

from poisonshield import ops
from poisonshield.batch import Batch
from poisonshield.bench.machine import describe
from poisonshield.errors import BackendError
from poisonshield.ops import dispatch
from poisonshield.ops.record import flatten

TOY = bool(os.environ.get("TOY"))
DEVICE = torch.device("cpu" if TOY else "cuda")
BACKENDS = ("cpu",) if TOY else ("triton", "cuda")
FAULTS = []


def fact(name, *, ok=True, **values):
    """Write one down; one that is not ok fails the step."""
    line = {"fact": name, "ok": bool(ok), **values, **describe(DEVICE)}
    print(line, flush=True)
    if os.environ.get("FACTS"):
        with open(os.environ["FACTS"], "a") as file:
            file.write(json.dumps(line, default=str) + "\n")
    if not ok:
        FAULTS.append(name)


def settle():
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(function, runs):
    """Of one run, on average, after two."""
    runs = 1 if TOY else runs
    for _ in range(1 if TOY else 2):
        function()
    settle()
    start = time.perf_counter()
    for _ in range(runs):
        function()
    settle()
    return (time.perf_counter() - start) / runs


def made(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def environment():
    """Which backends are ready; the rest is in every fact."""
    fact("environment", **ops.info(), cores=os.cpu_count())


def compare(name, call, tolerance):
    """A call with each backend beside the reference."""
    wanted = call("reference")
    for backend in BACKENDS:
        try:
            out = call(backend)
        except BackendError as err:
            fact("op", case=name, backend=backend, note=str(err)[:200])
            continue
        except Exception as err:  # the others are still to be seen
            fact("op", ok=False, case=name, backend=backend, note=f"{type(err).__name__}: {str(err)[-200:]}")
            continue
        pairs = [(p.double(), q.double()) for p, q in zip(out, wanted, strict=True) if p.numel()]
        far = max((float((p - q).abs().max()) for p, q in pairs), default=0.0)
        fact("op", ok=far <= tolerance, case=name, backend=backend, difference=far)


def copied(record):
    """The fields of an op's record, tensors on the device."""
    return [
        v.detach().clone(memory_format=torch.preserve_format).to(DEVICE) if isinstance(v, torch.Tensor) else v
        for v in flatten(record)
    ]


def call_example(name, record, backend):
    """What an op gives for an example, or what it wrote into."""
    given = copied(record)
    with torch.no_grad():
        out = getattr(torch.ops.poisonshield, name)(*given, backend)
    return [given[0]] if out is None else list(out) if isinstance(out, tuple) else [out]


def ops_on_odd_sizes():
    """Every op's examples and odd sizes on each backend, and each example in a CUDA graph."""
    for room in dispatch.rooms():
        found = importlib.import_module(f"poisonshield.ops.{room}.reference").examples()
        for name, records in found.items():
            for number, record in enumerate(records):
                rounds = name.startswith("jpeg") and "none" not in flatten(record)
                compare(f"{name} {number}", lambda b, n=name, r=record: call_example(n, r, b), 1 if rounds else 1e-3)
                if DEVICE.type == "cuda":
                    capture(f"{name} {number}", lambda n=name, r=record: call_example(n, r, "auto"))
    odd_pgd()
    odd_jpeg()


def capture(name, call):
    """Whether a call can be captured, after it has run once."""
    try:
        call()
        settle()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            call()
        fact("graph", case=name)
    except Exception as err:
        fact("graph", ok=False, case=name, note=f"{type(err).__name__}: {str(err)[-200:]}")


def odd_pgd():
    for shape, shift in (((3, 3, 37, 53), 0), ((2, 3, 1, 1025), 0), ((4, 3, 5, 7), 1)):
        x0 = made(shape[0] + shift, *shape[1:])[shift:]  # shifted: not at the start of its memory
        grad = made(*shape, seed=1) - 0.5
        for norm, last in itertools.product(("linf", "l2"), (False, True)):
            form = torch.channels_last if last else torch.contiguous_format
            a, g = (v.contiguous(memory_format=form) if last else v for v in (x0, grad))

            def step(backend, a=a, g=g, norm=norm):
                return [ops.pgd_step_(a.clone(), g, a, step_size=0.02, eps=0.05, norm=norm, backend=backend)]

            compare(f"pgd {norm} {shape} shift {shift} channels-last {last}", step, 0 if norm == "linf" else 5e-6)


def odd_jpeg():
    sizes = ((1, 40), (40, 1), (33, 17)) if TOY else ((16, 16), (1, 40), (40, 1), (2, 2), (33, 17), (97, 130))
    for (height, width), sampling in itertools.product(sizes, ("420", "444")):
        x = made(3, 3, height, width)
        how = {"subsampling": sampling}
        case = f"{sampling} {height}x{width}"
        compare(f"jpeg exact {case}", lambda b, x=x, how=how: [ops.jpeg(x, 60, mode="exact", backend=b, **how)], 1e-6)

        def gradient(backend, x=x, how=how):
            leaf = x.clone().requires_grad_()
            out = ops.jpeg(leaf, 60, rounding="none", backend=backend, **how)
            return [out.detach(), torch.autograd.grad(out.square().sum(), leaf)[0]]

        compare(f"jpeg gradient {case}", gradient, 5e-3)


def pillow():
    """Exact JPEG beside Pillow's codec, to the bit."""
    from PIL import Image

    sizes = ((16, 16), (33, 17)) if TOY else ((16, 16), (33, 17), (97, 83), (224, 224))
    qualities = (1, 50, 95) if TOY else (1, 10, 50, 75, 95, 100)
    for size, sampling, quality in itertools.product(sizes, ("420", "444"), qualities):
        pixels = np.random.default_rng(quality).integers(0, 256, (*size, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=2 if sampling == "420" else 0)
        wanted = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1).float() / 255
        given = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(DEVICE).float() / 255
        found = ops.jpeg(given, quality, mode="exact", subsampling=sampling)[0].cpu()
        differing = int(((wanted - found).abs() > 1e-3).sum())
        fact("pillow", ok=differing == 0, size=f"{size[0]}x{size[1]}", sampling=sampling, quality=quality,
             differing=differing)  # fmt: skip


def whole_steps():
    """VESPR's step with its views: seconds, kernels and memory, for whole batches and for one GPU's share of eight."""
    from poisonshield.data.views import Views, ViewsConfig

    shapes = [("cifar", 32, 512), ("imagenet", 224, 128), ("imagenet", 224, 16)]
    for stem, side, size in [("cifar", 16, 4)] if TOY else shapes:
        model, optimizer = build_vespr(stem)
        views = Views(ViewsConfig(), default="ssl", count=2, seed=0)
        x = (made(size, 3, side, side) * 255).to(torch.uint8)
        keys = tuple(f"k{i}" for i in range(size))
        batch = Batch(keys, x=x, y=torch.arange(size, device=DEVICE) % 10)
        seen = views(batch).replace(x=None)

        def step(batch=seen, model=model, optimizer=optimizer):
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss = model(batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        taken = {
            "views_ms": 1e3 * seconds(lambda v=views, b=batch: v(b), 8),
            "step_ms": 1e3 * seconds(step, 8),
            "whole_ms": 1e3 * seconds(lambda v=views, b=batch, s=step: s(v(b).replace(x=None)), 8),
        }
        fact("whole step", case=f"vespr {stem} {side} px", batch=size, img_per_s=size / taken["whole_ms"] * 1e3,
             **taken, **kernels(step))  # fmt: skip


def build_vespr(stem):
    """VESPR around SimCLR, ten attack steps, and its optimiser."""
    from poisonshield.defenses.base import Context
    from poisonshield.defenses.vespr import VESPR
    from poisonshield.methods.simclr import SimCLR
    from poisonshield.models.backbones import BackboneConfig, build_encoder

    network = {"name": "resnet_mini", "widths": (8, 8, 16, 16)} if TOY else {"name": "resnet18", "stem": stem}
    defense = VESPR(VESPR.Config(attack={"steps": 2 if TOY else 10}), Context(1, 10))
    method = SimCLR(SimCLR.Config(), encoder=build_encoder(BackboneConfig(**network)), num_classes=10)
    model = defense.wrap(method).to(DEVICE).to(memory_format=torch.channels_last).train()
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def kernels(step):
    """How many a step launches, their milliseconds and the peak of memory; nothing on a CPU."""
    if DEVICE.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.reset_peak_memory_stats()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
        settle()
    on_device = [e for e in seen.events() if e.device_type.name == "CUDA"]
    return {
        "launches": len(on_device),
        "gpu_ms": sum(e.device_time for e in on_device) / 1e3,
        "mem_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def collectives():
    """One process's group: does NCCL start, and how long does it take?"""
    import torch.distributed as dist

    start = time.perf_counter()
    dist.init_process_group("gloo" if TOY else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    x = torch.ones(1 << 20, device=DEVICE)
    dist.all_reduce(x)
    settle()
    fact("collectives", ok=float(x.sum()) == x.numel(), backend=dist.get_backend(), s=time.perf_counter() - start)
    dist.destroy_process_group()


def inversion():
    """A step of textual inversion on networks of Stable Diffusion 1.5's shape, with random weights."""
    from poisonshield.methods.diffusion.textual_inversion import TextualInversion

    model = build_pipeline()
    method = TextualInversion(TextualInversion.Config(), model=model, tokens={"toy": "<toy>"}, seed=0)
    method.to(DEVICE).train()
    optimizer = torch.optim.AdamW([method.vectors], lr=1e-3)
    side = 64 if TOY else 512
    for size in (1,) if TOY else (1, 4, 10):
        x, y = made(size, 3, side, side), torch.zeros(size, dtype=torch.int64, device=DEVICE)
        keys = tuple(f"toy/{i}#0" for i in range(size))
        batch = Batch(keys, x=x, y=y, captions=("a photo of <toy>",) * size, t_range=(500, 1000))

        def step(batch=batch):
            method(batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        fact("inversion step", batch=size, side=side, ms=1e3 * seconds(step, 8), **kernels(step))


def build_pipeline():
    from poisonshield.models.diffusion.pipeline import LatentDiffusion

    tiny = LatentDiffusion.load("tiny")
    if TOY:
        return tiny
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    words = tiny.tokenizer
    text = CLIPTextConfig(
        vocab_size=tiny.vocabulary, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, max_position_embeddings=max(77, words.model_max_length),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    networks = (network.bfloat16() for network in (vae, unet, CLIPTextModel(text)))
    return LatentDiffusion(*networks, words, DDPMScheduler()).to(DEVICE)


STEPS = {
    "environment": environment,
    "ops": ops_on_odd_sizes,
    "pillow": pillow,
    "whole_steps": whole_steps,
    "collectives": collectives,
    "inversion": inversion,
}

if __name__ == "__main__":
    if not TOY and not torch.cuda.is_available():
        sys.exit("needs a CUDA device, and torch sees none. TOY=1 runs a small form on the CPU.")
    STEPS[sys.argv[1]]()
    sys.exit(f"not as it should be: {', '.join(sorted(set(FAULTS)))}" if FAULTS else 0)
