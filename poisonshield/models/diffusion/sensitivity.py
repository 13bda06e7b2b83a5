"""Semantic sensitivity maps: which positions of a picture speak to the learned words of a prompt, timestep by timestep.

With v the learned rows, e = prediction - target at one draw of the noise, and l_p the sum of e^2 over channels at p:
  loss_grad  ||d l_p / dv||  where learning comes from
  pred_jac   ||d prediction_p / dv||_F  where the words can change the prediction; its target does not matter
  input_sal  ||d ||grad_v mean_p l_p|| / d z_p||  which inputs move the words' gradient: where a poison would act
  delta      ||prediction_p(v) - prediction_p(v_b)||  between two embeddings
  signed     d l_p / dv . u  loss that grows along u; descent goes against it: negative where learning pulls towards u
Backwards, a map takes one pass for each position; forwards, one for each direction of v. So the first two are formed
forwards: exactly from d unit vectors, or from K random ones, whose squares average to the same (relative deviation of a
square at most sqrt(2/K)). Fused attention has neither a forward rule nor a second derivative, so plain attention is set
meanwhile. Idea: Styborski et al. 2025, arXiv 2507.10578; which derivatives to show is our choice.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from poisonshield.errors import ConfigError, ShapeError
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.random import KeyedRandom, sample_ids

log = logging.getLogger(__name__)

MODES = ("loss_grad", "pred_jac", "input_sal", "delta", "signed")
Mode = Literal["loss_grad", "pred_jac", "input_sal", "delta", "signed"]
_NO_RULE = re.compile("forward AD|forward-mode|jvp|functorch|vmap|batching rule")
# Step of central differences, beside the vector's norm. Tiny network, float32: 4e-4 off; at 0.3 3e-2, at 0.001 1e-3.
_STEP = 0.03


@dataclass(frozen=True)
class Sensitivity:
    """maps [B, T, h, w] float32, for each of `timesteps`, averaged over draws of the noise; signed where the mode is.

    Positions are latent cells, or pixels where inputs="pixels". mask [B, 1, h, w] in [0, 1] at the size of the maps.
    """

    maps: Tensor
    timesteps: tuple[int, ...]
    mode: str
    mask: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """S(t) [B, T]: the sum over positions."""
        return self.maps.sum((2, 3))

    @property
    def concept_share(self) -> Tensor | None:
        """[B, T]: the mask's share of |S| beside its share of the area: 1 without preference, 1 / area where all lies
        in the mask, nan for a map that is 0 everywhere. None without a mask."""
        if self.mask is None:
            return None
        size = self.maps.abs()
        return (size * self.mask).sum((2, 3)) / size.sum((2, 3)) / self.mask.mean((2, 3))


def semantic_sensitivity(
    model: LatentDiffusion,
    x: Tensor,
    *,
    rows: Tensor,
    prompt: str,
    timesteps: Sequence[int],
    mode: Mode = "loss_grad",
    wrt: Literal["token", "context"] = "token",
    probes: int = 64,
    exact: bool = False,
    noises: int = 8,
    seed: int = 0,
    mask: Tensor | None = None,
    rows_b: Tensor | None = None,
    direction: Tensor | None = None,
    inputs: Literal["latents", "pixels"] = "latents",
    keys: Sequence[str] | None = None,
    chunk: int = 16,
    derivative: Literal["auto", "forward", "differences"] = "auto",
) -> Sensitivity:
    """The maps of x [B, 3, H, W] in [0, 1] under `prompt`, which holds a placeholder whose vectors are in rows [R, d].

    wrt: the learned rows before the text encoder (those in the prompt), or the context, its output [L, d_c]. exact: all
    unit vectors instead of `probes` random ones. rows_b [R, d]: delta's other embedding. direction: signed's u, shaped
    as rows or as the context. mask [B, 1, H, W] in [0, 1]: for concept_share. inputs: what input_sal differentiates by.
    Noise depends on (seed, key, draw) alone and probes on (seed, draw), so two pictures under one key (by default their
    place in x) differ in their pixels only. chunk: directions at once; memory grows with it. derivative: "auto" takes
    central differences, and says so, where a network has no forward rule.

    Cost: for each picture, timestep and draw about 2 passes of the U-Net a direction. Latents are the posterior's mean.
    Raises ConfigError for half-precision networks, a prompt without placeholder or what the mode lacks; ShapeError.
    """
    _check_settings(model, timesteps, mode, noises=noises, probes=probes, rows_b=rows_b, direction=direction)
    _check_shapes(model, x, mask, keys, {"rows": rows, "rows_b": rows_b})
    ids = model.tokens([prompt])
    if not bool((ids >= model.vocabulary).any()):
        known = ", ".join(model.placeholders) or "none; call add_placeholder first"
        raise ConfigError(f"the prompt {prompt!r} holds no placeholder. Known: {known}.")
    keys = [str(i) for i in range(len(x))] if keys is None else keys
    push, maps = _Push(derivative, chunk), []
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        at, read, other = _embedding(model, ids, rows, wrt, rows_b, direction)
        for key, picture in zip(keys, x.to(ids.device, model.dtype).split(1), strict=True):
            z = model.encode(picture)
            source = (picture, model.encode) if inputs == "pixels" else (z, lambda z: z)
            for t in timesteps:
                drawn = []
                for n in range(noises):
                    rng = KeyedRandom(seed, sample_ids([key]), n, "sensitivity").to(z.device)
                    error = _error_of(model, read, t, rng.normal("noise", z.numel()).view_as(z).to(z))
                    units = _directions(at, probes=probes, exact=exact, chunk=chunk, seed=seed, draw=n)
                    cell = _Cell(error, at, z, source, push, units, 1.0 if exact else 1 / probes, other)
                    drawn.append(_MAPS[mode](cell))
                maps.append(torch.stack(drawn).mean(0))
    stack = torch.stack(maps).float().unflatten(0, (len(x), len(timesteps)))  # [B, T, h, w]
    if mask is not None:
        mask = F.adaptive_avg_pool2d(mask.to(stack), stack.shape[2:])
    return Sensitivity(stack, tuple(timesteps), mode, mask)


def _embedding(
    model: LatentDiffusion, ids: Tensor, rows: Tensor, wrt: str, rows_b: Tensor | None, direction: Tensor | None
) -> tuple[Tensor, Callable[[Tensor], Tensor], Tensor | None]:
    """What is differentiated by, how it becomes the context, and the mode's other embedding or direction beside it."""
    learned = ids[ids >= model.vocabulary].unique() - model.vocabulary
    rows, rows_b, direction = (
        v if v is None else v.detach().to(ids.device, model.dtype) for v in (rows, rows_b, direction)
    )
    if wrt == "token":
        at, read, wanted = rows[learned], lambda v: model.text(ids, rows.index_copy(0, learned, v)), rows.shape
    else:
        at, read = model.text(ids, rows), lambda context: context
        wanted = at.shape[1:]
    if direction is not None:
        if direction.shape != wanted:
            raise ShapeError(f"direction has shape {tuple(direction.shape)}; with wrt={wrt!r} it is {tuple(wanted)}.")
        return at, read, (direction[learned] if wrt == "token" else direction[None])
    if rows_b is not None:
        return at, read, rows_b[learned] if wrt == "token" else model.text(ids, rows_b)
    return at, read, None


@dataclass(frozen=True)
class _Cell:
    """One picture, timestep and draw. error(v, z) [1, C, h, w]; units: chunks of directions [k, *at.shape]; weight: of
    each direction's square in the sum; source: what stands for the input, and how it becomes latents."""

    error: Callable[[Tensor, Tensor], Tensor]
    at: Tensor
    z: Tensor
    source: tuple[Tensor, Callable[[Tensor], Tensor]]
    push: "_Push"
    units: Iterator[Tensor]
    weight: float
    other: Tensor | None

    def pushed(self, directions: Tensor) -> Tensor:
        """J u [k, C, h, w] for directions u."""
        return self.push(lambda v: self.error(v, self.z), self.at, directions)[:, 0]


def _loss_grad(cell: _Cell) -> Tensor:
    e = cell.error(cell.at, cell.z)
    squares = sum((2 * (e * cell.pushed(u)).sum(1)).square().sum(0) for u in cell.units)
    return (cell.weight * squares).sqrt()


def _pred_jac(cell: _Cell) -> Tensor:
    return (cell.weight * sum(cell.pushed(u).square().sum((0, 1)) for u in cell.units)).sqrt()


def _signed(cell: _Cell) -> Tensor:
    return 2 * (cell.error(cell.at, cell.z) * cell.pushed(cell.other[None])).sum(1)[0]


def _delta(cell: _Cell) -> Tensor:
    return (cell.error(cell.at, cell.z) - cell.error(cell.other, cell.z))[0].norm(dim=0)


@torch.enable_grad()
def _input_sal(cell: _Cell) -> Tensor:
    v, source = cell.at.detach().requires_grad_(), cell.source[0].detach().requires_grad_()
    loss = cell.error(v, cell.source[1](source)).square().sum(1).mean()
    gradient = torch.autograd.grad(loss, v, create_graph=True, allow_unused=True)[0]
    if gradient is None or not gradient.requires_grad:  # the network does not look at the text
        return torch.zeros_like(source[0, 0]).detach()
    return torch.autograd.grad(gradient.norm(), source)[0][0].norm(dim=0)


_MAPS = {"loss_grad": _loss_grad, "pred_jac": _pred_jac, "input_sal": _input_sal, "delta": _delta, "signed": _signed}


class _Push:
    """`push(f, at, directions)`: the derivatives [k, ...] of f at `at` along directions [k, *at.shape]."""

    def __init__(self, derivative: str, chunk: int) -> None:
        self.derivative, self.chunk = derivative, chunk

    def __call__(self, f: Callable[[Tensor], Tensor], at: Tensor, directions: Tensor) -> Tensor:
        if self.derivative != "differences":
            try:
                return vmap(lambda u: jvp(f, (at,), (u,))[1], chunk_size=self.chunk)(directions)
            except RuntimeError as err:  # NotImplementedError is one too
                if self.derivative == "forward" or not _NO_RULE.search(str(err)):
                    raise
                reason = str(err).strip().splitlines()[0]
                log.warning("Central differences from here on, good to about 1 %%: no forward derivative (%s).", reason)
                self.derivative = "differences"
        # A vector of zeros has no scale of its own; that of one standard entry is as good as any.
        size = float(at.norm()) or at.numel() ** 0.5
        steps = [_STEP * size / max(float(u.norm()), 1e-12) for u in directions]
        return torch.stack([(f(at + h * u) - f(at - h * u)) / (2 * h) for h, u in zip(steps, directions, strict=True)])


def _directions(at: Tensor, *, probes: int, exact: bool, chunk: int, seed: int, draw: int) -> Iterator[Tensor]:
    """Chunks [k, *at.shape]: every unit vector once, or `probes` standard normal ones. Formed when asked for: a context
    has tens of thousands of unit vectors."""
    count = at.numel() if exact else probes
    for some in torch.arange(count, device=at.device).split(chunk):
        if exact:
            made = F.one_hot(some, count).to(at)
        else:
            made = KeyedRandom(seed, some, draw, "sensitivity").normal("probe", at.numel()).to(at)
        yield made.view(-1, *at.shape)


def _error_of(
    model: LatentDiffusion, read: Callable[[Tensor], Tensor], t: int, noise: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """(v, z) -> prediction - target. The noising is written out: the fused one has neither rule that is needed here."""
    steps = torch.tensor([t], device=noise.device)
    a = model.alphas_cumprod[t].to(noise.dtype)

    def error(v: Tensor, z: Tensor) -> Tensor:
        z_t = a.sqrt() * z + (1 - a).sqrt() * noise
        return model.predict(z_t, steps, read(v)) - model.target(z, steps, noise)

    return error


def _check_settings(
    model: LatentDiffusion,
    timesteps: Sequence[int],
    mode: str,
    *,
    noises: int,
    probes: int,
    rows_b: Tensor | None,
    direction: Tensor | None,
) -> None:
    if mode not in MODES:
        raise ConfigError(f"mode {mode!r} is unknown. Known: {', '.join(MODES)}.")
    if model.dtype not in (torch.float32, torch.float64):
        raise ConfigError(f"the pipeline's weights are {model.dtype}; derivatives need dtype=torch.float32 at loading.")
    if not timesteps or min(timesteps) < 0 or max(timesteps) >= model.num_timesteps:
        raise ConfigError(f"timesteps {list(timesteps)}: give some of 0 to {model.num_timesteps - 1}.")
    if noises < 1 or probes < 1:
        raise ConfigError(f"noises {noises} and probes {probes} must be at least 1.")
    for name, needed, value in (("rows_b", "delta", rows_b), ("direction", "signed", direction)):
        if mode == needed and value is None:
            raise ConfigError(f"mode {mode!r} needs {name}.")
        if mode != needed and value is not None:
            raise ConfigError(f"{name} is for mode {needed!r}, and the mode is {mode!r}. Leave it out.")


def _check_shapes(
    model: LatentDiffusion, x: Tensor, mask: Tensor | None, keys: Sequence[str] | None, rows: dict[str, Tensor | None]
) -> None:
    count = sum(p.count for p in model.placeholders.values())
    for name, value in rows.items():
        if value is not None and value.shape != (count, model.width):
            raise ShapeError(f"{name} has shape {tuple(value.shape)}; the placeholders want [{count}, {model.width}].")
    if mask is not None and mask.shape != (len(x), 1, *x.shape[2:]):
        raise ShapeError(f"mask has shape {tuple(mask.shape)}; [{len(x)}, 1, {x.shape[2]}, {x.shape[3]}] is wanted.")
    if keys is not None and len(keys) != len(x):
        raise ShapeError(f"{len(keys)} keys came for {len(x)} pictures; give one each, or None.")
