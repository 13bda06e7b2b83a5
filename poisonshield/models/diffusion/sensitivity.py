"""Maps of semantic sensitivity: which positions of a picture speak to a prompt's learned words, timestep by timestep.

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

Mode = Literal["loss_grad", "pred_jac", "input_sal", "delta", "signed"]
# How torch and its parts name a missing forward rule: they raise no error of their own kind for it.
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
    jacobian = _Jacobian(derivative, probes=None if exact else probes, chunk=chunk, seed=seed)
    maps = []
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        words = _Words.of(model, ids, rows, wrt, rows_b=rows_b, direction=direction)
        for key, picture in zip(keys, x.to(ids.device, model.dtype).split(1), strict=True):
            z = model.encode(picture)
            for t in timesteps:
                drawn = []
                for n in range(noises):
                    rng = KeyedRandom(seed, sample_ids([key]), n, "sensitivity").to(z.device)
                    noise = rng.normal("noise", z.numel()).view_as(z).to(z)
                    draw = _Draw(words, z, t, noise, number=n, pixels=picture if inputs == "pixels" else None)
                    drawn.append(_MAPS[mode](draw, jacobian))
                maps.append(torch.stack(drawn).mean(0))
    stack = torch.stack(maps).float().unflatten(0, (len(x), len(timesteps)))  # [B, T, h, w]
    if mask is not None:
        mask = F.adaptive_avg_pool2d(mask.to(stack), stack.shape[2:])
    return Sensitivity(stack, tuple(timesteps), mode, mask)


@dataclass(frozen=True)
class _Words:
    """The vectors that a map differentiates by, and the way from them to the network's context.

    at: the prompt's learned rows [R', d], or its context [1, L, d_c]. other: delta's second embedding or signed's
    direction, shaped as `at`; None in other modes. learned: which of `rows` [R, d] the prompt holds, and `at` is; None
    where `at` is the context.
    """

    model: LatentDiffusion
    ids: Tensor
    rows: Tensor
    learned: Tensor | None
    at: Tensor
    other: Tensor | None

    @classmethod
    def of(
        cls,
        model: LatentDiffusion,
        ids: Tensor,
        rows: Tensor,
        wrt: str,
        *,
        rows_b: Tensor | None,
        direction: Tensor | None,
    ) -> "_Words":
        """The words of a prompt's ids [1, L], before the text encoder (wrt "token") or after it ("context")."""

        def cast(v: Tensor) -> Tensor:
            return v.detach().to(ids.device, model.dtype)

        def choose(rows: Tensor) -> Tensor:
            """What stands for all rows [R, d]: those in the prompt, or its context."""
            return model.text(ids, rows) if learned is None else rows[learned]

        rows = cast(rows)
        learned = ids[ids >= model.vocabulary].unique() - model.vocabulary if wrt == "token" else None
        at, other = choose(rows), None
        if direction is not None:
            wanted = rows.shape if wrt == "token" else at.shape[1:]
            if direction.shape != wanted:
                raise ShapeError(
                    f"direction has shape {tuple(direction.shape)}; with wrt={wrt!r} it is {tuple(wanted)}."
                )
            other = cast(direction)[None] if learned is None else cast(direction)[learned]
        elif rows_b is not None:
            other = choose(cast(rows_b))
        return cls(model, ids, rows, learned, at, other)

    def context(self, v: Tensor) -> Tensor:
        """The context [1, L, d_c] that vectors shaped as `at` become."""
        if self.learned is None:
            return v
        return self.model.text(self.ids, self.rows.index_copy(0, self.learned, v))

    @property
    def beside(self) -> Tensor:
        """`other`, in the modes that have one."""
        assert self.other is not None  # _check_settings demands it of whoever asks for such a mode
        return self.other


@dataclass(frozen=True)
class _Draw:
    """One picture at timestep t under draw `number` of the noise: latents z and noise, both [1, C, h, w].

    pixels [1, 3, H, W]: what z was encoded from, where the map is over pixels; None where it is over latent cells.
    """

    words: _Words
    z: Tensor
    t: int
    noise: Tensor
    number: int
    pixels: Tensor | None

    def error(self, v: Tensor, z: Tensor) -> Tensor:
        """prediction - target [1, C, h, w] for words v, shaped as words.at, and latents z."""
        model, t = self.words.model, torch.tensor([self.t], device=z.device)
        # Written out, since the fused noising has neither a forward rule nor a second derivative.
        a = model.alphas_cumprod[self.t].to(self.noise.dtype)
        z_t = a.sqrt() * z + (1 - a).sqrt() * self.noise
        return model.predict(z_t, t, self.words.context(v)) - model.target(z, t, self.noise)

    @property
    def source(self) -> Tensor:
        """The input that the map is over: the pixels or the latents."""
        return self.z if self.pixels is None else self.pixels

    def latents(self, source: Tensor) -> Tensor:
        """The latents [1, C, h, w] of a source."""
        return source if self.pixels is None else self.words.model.encode(source)


class _Jacobian:
    """The derivative J of a draw's error for its words, formed forwards: J u for one direction u after the other.

    derivative: "forward" is exact, "differences" is not, "auto" goes from the first to the second where it must, and
    stays there. probes: how many random directions stand for all; None takes every unit vector. chunk: of directions.
    """

    def __init__(self, derivative: str, *, probes: int | None, chunk: int, seed: int) -> None:
        self.derivative, self.probes, self.chunk, self.seed = derivative, probes, chunk, seed

    def along(self, draw: _Draw, directions: Tensor) -> Tensor:
        """J u [k, C, h, w] for directions u [k, *words.at.shape]."""

        def error(v: Tensor) -> Tensor:
            return draw.error(v, draw.z)

        if self.derivative != "differences":
            try:
                return vmap(lambda u: jvp(error, (draw.words.at,), (u,))[1], chunk_size=self.chunk)(directions)[:, 0]
            except RuntimeError as err:  # NotImplementedError is one too
                if self.derivative == "forward" or not _NO_RULE.search(str(err)):
                    raise
                reason = str(err).strip().splitlines()[0]
                log.warning("Central differences from here on, good to about 1 %%: no forward derivative (%s).", reason)
                self.derivative = "differences"
        return _central_differences(error, draw.words.at, directions)[:, 0]

    def sweep(self, draw: _Draw) -> Iterator[Tensor]:
        """J u in chunks [k, C, h, w], for as many directions as stand for all of them."""
        for directions in self._directions(draw.words.at, draw.number):
            yield self.along(draw, directions)

    @property
    def weight(self) -> float:
        """Of each direction's square in the sum that stands for the squared norm of J."""
        return 1.0 if self.probes is None else 1 / self.probes

    def _directions(self, at: Tensor, number: int) -> Iterator[Tensor]:
        """Chunks [k, *at.shape]: every unit vector once, or the standard normal ones of draw `number`."""
        count = at.numel() if self.probes is None else self.probes
        # Formed one chunk at a time: a context has tens of thousands of unit vectors.
        for some in torch.arange(count, device=at.device).split(self.chunk):
            if self.probes is None:
                made = F.one_hot(some, count).to(at)
            else:
                made = KeyedRandom(self.seed, some, number, "sensitivity").normal("probe", at.numel()).to(at)
            yield made.view(-1, *at.shape)


def _central_differences(f: Callable[[Tensor], Tensor], at: Tensor, directions: Tensor) -> Tensor:
    """(f(at + h u) - f(at - h u)) / (2 h) for each of k directions u, [k, ...]; h goes with the norms of at and u."""
    # A vector of zeros has no scale of its own; that of one standard entry is as good as any.
    size = float(at.norm()) or at.numel() ** 0.5
    steps = [_STEP * size / max(float(u.norm()), 1e-12) for u in directions]
    return torch.stack([(f(at + h * u) - f(at - h * u)) / (2 * h) for h, u in zip(steps, directions, strict=True)])


def _map_loss_grad(draw: _Draw, jacobian: _Jacobian) -> Tensor:
    e, squares = draw.error(draw.words.at, draw.z), draw.z.new_zeros(())
    for slopes in jacobian.sweep(draw):
        squares = squares + (2 * (e * slopes).sum(1)).square().sum(0)
    return (jacobian.weight * squares).sqrt()


def _map_pred_jac(draw: _Draw, jacobian: _Jacobian) -> Tensor:
    squares = draw.z.new_zeros(())
    for slopes in jacobian.sweep(draw):
        squares = squares + slopes.square().sum((0, 1))
    return (jacobian.weight * squares).sqrt()


def _map_signed(draw: _Draw, jacobian: _Jacobian) -> Tensor:
    slope = jacobian.along(draw, draw.words.beside[None])
    return 2 * (draw.error(draw.words.at, draw.z) * slope).sum(1)[0]


def _map_delta(draw: _Draw, jacobian: _Jacobian) -> Tensor:
    return (draw.error(draw.words.at, draw.z) - draw.error(draw.words.beside, draw.z))[0].norm(dim=0)


@torch.enable_grad()
def _map_input_sal(draw: _Draw, jacobian: _Jacobian) -> Tensor:
    v, source = draw.words.at.detach().requires_grad_(), draw.source.detach().requires_grad_()
    loss = draw.error(v, draw.latents(source)).square().sum(1).mean()
    gradient = torch.autograd.grad(loss, v, create_graph=True, allow_unused=True)[0]
    if gradient is None or not gradient.requires_grad:  # the network does not look at the text
        return torch.zeros_like(source[0, 0]).detach()
    return torch.autograd.grad(gradient.norm(), source)[0][0].norm(dim=0)


_MAPS: dict[str, Callable[[_Draw, _Jacobian], Tensor]] = {
    "loss_grad": _map_loss_grad,
    "pred_jac": _map_pred_jac,
    "input_sal": _map_input_sal,
    "delta": _map_delta,
    "signed": _map_signed,
}
"""[h, w] of one draw, by mode: the formulas at the top."""


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
    if mode not in _MAPS:
        raise ConfigError(f"mode {mode!r} is unknown. Known: {', '.join(_MAPS)}.")
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
