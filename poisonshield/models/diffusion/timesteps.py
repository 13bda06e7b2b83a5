"""A profile over timesteps: the gradient that each range of them gives to the learned words, and what a poison adds.

It tells from which timestep on training should learn. With a uniform draw of timesteps, noise-prediction loss learns
most at low noise, and that is where a poison acts most. Why: say a concept's latents are N(mu, s^2) and the words move
mu. An error in mu has a gradient of size w = SNR / (1 + s^2 SNR)^2, largest at SNR = 1 / s^2; a constant shift of the
latents has the same. So the finer the detail (small s), the lower the timesteps that rule it:

    timestep   0          200        400        600        800
    poison     ########   #####      ##         #                   pull of its fine pattern
    concept    ###        #####      ######     ####       #        pull of its shape and colours
                                     ^ t_min (choose_t_min): from here on the poison pulls little beside the concept

A mean over few draws of the noise has an error of its own. It is estimated from the spread over draws of one picture
and subtracted from squared lengths; the squared half distance of the means of two disjoint halves of the draws has the
same expectation and is less steady. Idea: Styborski et al. 2025, arXiv 2507.10578; the protocol is ours.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from poisonshield.errors import ConfigError, ShapeError
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.random import KeyedRandom, sample_ids

log = logging.getLogger(__name__)

Source = Callable[[Tensor, int], Tensor]
"""(t int64 [n, B], number of the bin) -> gradients [n, B, D]: draw n of picture b. A draw is known by the bin and n."""


@dataclass(frozen=True)
class Moments:
    """Sizes of the gradients in each bin, float64 [bins].

    length: mean norm of one draw. mean: norm of the mean over draws and pictures, the step that training takes on
    average. error: that mean's standard error, as a vector's norm.
    """

    length: Tensor
    mean: Tensor
    error: Tensor

    @classmethod
    def of(cls, g: Tensor) -> "Moments":
        """The moments, scalars, of one bin's gradients [n, B, D].

        The pictures are what they are: only draws of one picture vary, and so only their spread makes the error.
        """
        n, count = g.shape[:2]
        spread = g.var(0).sum(1)  # [B], squared lengths
        return cls(g.norm(dim=2).mean(), g.mean((0, 1)).norm(), (spread.sum() / n).sqrt() / count)

    @classmethod
    def stack(cls, bins: Sequence["Moments"]) -> "Moments":
        """The moments [bins] of those of single bins."""
        lengths, means, errors = zip(*((m.length, m.mean, m.error) for m in bins), strict=True)
        return cls(torch.stack(lengths), torch.stack(means), torch.stack(errors))

    @property
    def coherence(self) -> Tensor:
        """mean / length, 1 where every draw pulls the same way."""
        return self.mean / self.length

    @property
    def steady(self) -> Tensor:
        """The mean's norm without what its error adds; 0 where nothing but error is left."""
        return (self.mean**2 - self.error**2).clamp(min=0).sqrt()


@dataclass(frozen=True)
class Profile:
    """Bin i covers timesteps edges[i] to edges[i + 1] - 1. x: moments of the pictures' gradients; G(t) is x.length.

    With a reference also its moments, those of g(x) - g(ref) draw by draw, and the cosine [bins] of the two means; from
    `timestep_profile` also energy [bins], the poison's energy that the network sees, and bands [bins, K] of it.
    """

    edges: tuple[int, ...]
    x: Moments
    ref: Moments | None = None
    difference: Moments | None = None
    cosine: Tensor | None = None
    energy: Tensor | None = None
    bands: Tensor | None = None

    @property
    def centers(self) -> Tensor:
        """The middle of each bin, float64."""
        edges = torch.tensor(self.edges, dtype=torch.float64)
        return (edges[:-1] + edges[1:] - 1) / 2

    @property
    def distance(self) -> Tensor:
        """D = |g(x) - g(ref)| / |g(ref)| as measured. Raises ConfigError without a reference."""
        ref, difference = self.require_reference()
        return difference.mean / ref.mean

    @property
    def corrected(self) -> Tensor:
        """D without the errors of both means; inf where g(ref) is all error and the difference is not."""
        ref, difference = self.require_reference()
        top, bottom = difference.steady, ref.steady
        return torch.where(top == 0, torch.zeros_like(top), top / bottom)

    @property
    def pressure(self) -> Tensor:
        """[bins]: the share of the pull (norms, not squares, which low timesteps rule) that remains from a bin on."""
        pull = (self.x if self.ref is None else self.ref).steady * torch.tensor(self.edges).diff()
        return pull.flip(0).cumsum(0).flip(0) / pull.sum()

    def require_reference(self) -> tuple[Moments, Moments]:
        """(ref, difference). Raises ConfigError for a profile without a reference."""
        if self.ref is None or self.difference is None:
            raise ConfigError("this profile has no reference to compare with. Give `ref`: clean or purified pictures.")
        return self.ref, self.difference


def timestep_profile(
    model: LatentDiffusion,
    x: Tensor,
    *,
    rows: Tensor,
    prompts: str | Sequence[str],
    ref: Tensor | None = None,
    mask: Tensor | None = None,
    bins: int = 20,
    noises: int = 16,
    bands: int = 4,
    end: int | None = None,
    seed: int = 0,
    keys: Sequence[str] | None = None,
    batch_size: int = 16,
) -> Profile:
    """The profile of pictures x [B, 3, H, W] in [0, 1]: gradients of the noise-prediction loss for rows [R, d].

    rows: of all placeholders, where training stands, such as at its start. prompts: one for all, or one per picture.
    ref: the same pictures clean, or purified in another way than x (a defender's stand-in). mask [B, 1, H, W] in
    [0, 1]: weighs the loss over positions, normalized in each picture. noises: draws of timestep and noise per picture
    and bin, the same for x and ref. end: the first timestep that is left out, None for all. bands: radial frequency
    bands of the latents' difference, see band_power. Noise depends on (seed, key, bin, draw); keys are the pictures'
    places by default. batch_size: draws in one backward pass.

    Cost: bins * noises * B forward and backward passes of the U-Net, twice with ref. Raises ShapeError, ConfigError.
    """
    keys = [str(i) for i in range(len(x))] if keys is None else list(keys)
    prompts = [prompts] * len(x) if isinstance(prompts, str) else list(prompts)
    end = model.num_timesteps if end is None else end
    _check_pictures(x, ref, mask, keys, prompts)
    if not 1 <= end <= model.num_timesteps:
        raise ConfigError(f"end {end}: 1 to the pipeline's {model.num_timesteps} timesteps can be looked at.")
    ids = model.tokens(prompts)
    if not bool((ids >= model.vocabulary).any(1).all()):
        raise ConfigError("a prompt holds no placeholder, so nothing is learned from it. Write one into each.")
    weight = None if mask is None else _latent_weight(mask.to(ids.device), model.factor)
    with torch.no_grad():
        z, z_ref = model.encode(x.to(ids.device)), None if ref is None else model.encode(ref.to(ids.device))
    source = _LossGradients(model, z, ids, rows, weight, keys, seed, batch_size)
    ref_source = None if z_ref is None else replace(source, z=z_ref)
    profile = profile_gradients(source, ref_source, num_timesteps=end, bins=bins, noises=noises, seed=seed, keys=keys)
    return profile if z_ref is None else _add_energy(profile, model, z - z_ref, bands)


def _check_pictures(
    x: Tensor, ref: Tensor | None, mask: Tensor | None, keys: Sequence[str], prompts: Sequence[str]
) -> None:
    for name, value, wanted in (("ref", ref, x.shape), ("mask", mask, (len(x), 1, *x.shape[2:]))):
        if value is not None and value.shape != wanted:
            raise ShapeError(f"{name} has shape {tuple(value.shape)}; {tuple(wanted)} is wanted, to go with x.")
    if len(keys) != len(x):
        raise ShapeError(f"{len(keys)} keys came for {len(x)} pictures; give one each, or None.")
    if len(prompts) != len(x):
        raise ShapeError(f"{len(prompts)} prompts came for {len(x)} pictures; give one for all, or one each.")


def _latent_weight(mask: Tensor, factor: int) -> Tensor:
    """The mask [B, 1, H, W] over latent cells of `factor` pixels, [B, 1, h, w], with mean 1 in each picture."""
    weight = F.avg_pool2d(mask.float(), factor)
    return weight / weight.mean((1, 2, 3), keepdim=True).clamp(min=1e-8)


def _add_energy(profile: Profile, model: LatentDiffusion, delta: Tensor, bands: int) -> Profile:
    """The profile with the energy of a latents' difference [B, C, h, w] that the network sees in each bin.

    The network sees a difference beside the noise: its power times the signal-to-noise ratio, here the bin's mean.
    """
    sizes = torch.tensor(profile.edges).diff().tolist()
    snr = torch.stack([part.mean() for part in model.snr()[: profile.edges[-1]].cpu().split(sizes)])
    parts = snr[:, None] * band_power(delta, bands).mean(0).cpu()  # [bins, bands]
    return replace(profile, energy=parts.sum(1), bands=parts)


@dataclass(frozen=True)
class _LossGradients:
    """A Source: the gradients of a pipeline's own loss. z [B, C, h, w], ids [B, L], weight [B, 1, h, w] or None."""

    model: LatentDiffusion
    z: Tensor
    ids: Tensor
    rows: Tensor
    weight: Tensor | None
    keys: Sequence[str]
    seed: int
    batch_size: int

    def __call__(self, t: Tensor, number: int) -> Tensor:
        """Gradients [n, B, D] at timesteps t [n, B] of bin `number`; row n B + b is draw n of picture b throughout."""
        n, count = t.shape
        rng = KeyedRandom(self.seed, sample_ids(self.keys), number, "profile").to(self.z.device)
        noise = rng.normal("noise", n * self.z[0].numel()).view(count, n, *self.z.shape[1:]).to(self.z)
        noise, t, made = noise.transpose(0, 1).flatten(0, 1), t.flatten().to(self.z.device), []
        for part in torch.arange(n * count, device=self.z.device).split(self.batch_size):
            b = part % count
            own = None if self.weight is None else self.weight[b]
            made.append(row_gradients(self.model, self.z[b], t[part], noise[part], self.ids[b], self.rows, weight=own))
        return torch.cat(made).flatten(1).unflatten(0, (n, count))


def row_gradients(
    model: LatentDiffusion,
    z: Tensor,
    t: Tensor,
    noise: Tensor,
    ids: Tensor,
    rows: Tensor,
    *,
    weight: Tensor | None = None,
) -> Tensor:
    """Gradients [N, R, d], each of one sample by itself: of its mean squared error, for rows [R, d].

    z, noise [N, C, h, w], t [N], ids [N, L]; weight broadcastable to z.
    """
    count = len(z)
    # One backward pass for all: every sample is given rows of its own, and ids that point to them.
    own = rows.detach().to(z).repeat(count, 1).requires_grad_()  # [N R, d]
    ids = torch.where(ids >= model.vocabulary, ids + len(rows) * torch.arange(count, device=ids.device)[:, None], ids)
    with torch.enable_grad():
        pred = model.predict(model.noised(z, t, noise), t, model.text(ids, own))
        error = (pred - model.target(z, t, noise)).square()
        loss = (error if weight is None else error * weight).mean((1, 2, 3)).sum()
        # The sum over samples: each has rows of its own, so no gradient mixes with another's.
        return torch.autograd.grad(loss, own)[0].view(count, *rows.shape)


def profile_gradients(
    source: Source,
    ref: Source | None = None,
    *,
    num_timesteps: int,
    bins: int = 20,
    noises: int = 16,
    seed: int = 0,
    keys: Sequence[str],
) -> Profile:
    """A profile of any source of gradients for the pictures `keys`; both sources are asked for the same draws.

    Within a bin the draws of a picture lie in equal parts of it. Raises ConfigError for impossible counts.
    """
    if not 1 <= bins <= num_timesteps or noises < 2:
        raise ConfigError(f"{bins} bins of {noises} draws: 1 to {num_timesteps} bins and at least 2 draws are wanted.")
    edges = tuple(round(i * num_timesteps / bins) for i in range(bins + 1))
    x: list[Moments] = []
    other: list[Moments] = []
    difference: list[Moments] = []
    cosine: list[Tensor] = []
    for number in range(bins):
        t = _draw_timesteps(edges[number], edges[number + 1], noises, number=number, seed=seed, keys=keys)
        g = source(t, number).double().cpu()
        x.append(Moments.of(g))
        if ref is not None:
            g_ref = ref(t, number).double().cpu()
            other.append(Moments.of(g_ref))
            difference.append(Moments.of(g - g_ref))
            cosine.append(torch.cosine_similarity(g.mean((0, 1)), g_ref.mean((0, 1)), dim=0))
    if ref is None:
        return Profile(edges, Moments.stack(x))
    return Profile(edges, Moments.stack(x), Moments.stack(other), Moments.stack(difference), torch.stack(cosine))


def _draw_timesteps(first: int, end: int, noises: int, *, number: int, seed: int, keys: Sequence[str]) -> Tensor:
    """int64 [noises, B] in [first, end), bin `number`: each picture's draws lie one in each of `noises` equal parts."""
    u = KeyedRandom(seed, sample_ids(keys), number, "profile").uniform("t", noises).double().T  # [n, B]
    place = (torch.arange(noises)[:, None] + u) / noises
    return (first + (place * (end - first)).long()).clamp(max=end - 1)


def band_power(delta: Tensor, bands: int) -> Tensor:
    """[B, bands] float64: the mean square of delta [B, C, h, w], split by radial frequency; the parts sum to the whole.

    Band k holds frequencies from k to k + 1 parts of Nyquist; the corners beyond it belong to the last.
    """
    h, w = delta.shape[-2:]
    radius = (torch.fft.fftfreq(h)[:, None] ** 2 + torch.fft.fftfreq(w)[None, :] ** 2).sqrt() / 0.5
    # The corners lie beyond Nyquist along an axis.
    band = (radius * bands).long().clamp(max=bands - 1).to(delta.device)
    power = torch.fft.fft2(delta.double(), norm="ortho").abs().square().mean(1) / (h * w)  # [B, h, w]
    return torch.zeros(len(delta), bands, dtype=torch.float64, device=delta.device).index_add_(
        1, band.flatten(), power.flatten(1)
    )


def choose_t_min(
    profile: Profile,
    *,
    tau: float = 0.25,
    min_pressure: float = 0.02,
    clamp: tuple[float, float] = (0.2, 0.8),
    fallback: float = 0.5,
) -> int:
    """The lowest bin edge from which on the corrected D stays below tau, within `clamp`.

    Where there is none, or less than min_pressure of the concept's pull would remain from there, `fallback` with a
    warning. Both are shares of the timesteps that the profile covers. Raises ConfigError for one without reference.
    """
    lowest, highest, instead = (round(share * profile.edges[-1]) for share in (*clamp, fallback))
    below = profile.corrected < tau
    reached = below.flip(0).int().cumprod(0).flip(0).bool()  # whether D stays below from this bin to the end
    first = int(reached.int().argmax()) if bool(reached.any()) else None
    if first is not None and float(profile.pressure[first]) >= min_pressure:
        return min(max(profile.edges[first], lowest), highest)
    reason = _explain_no_start(profile, first, tau=tau, min_pressure=min_pressure)
    log.warning(
        "No timestep to start from: %s. Taking %d. More draws (noises) give a steadier profile.", reason, instead
    )
    return instead


def _explain_no_start(profile: Profile, first: int | None, *, tau: float, min_pressure: float) -> str:
    """Why no bin is fit to start from; first: the one from which on D stays below tau, if there is one."""
    if first is not None:
        return (
            f"from t = {profile.edges[first]} on {float(profile.pressure[first]):.2%} of the concept's pull would "
            f"remain, where {min_pressure:.0%} is wanted"
        )
    if float(profile.require_reference()[0].steady[-1]) == 0:
        return "in the last bin the reference's gradient is all noise; give more draws (noises)"
    return f"the two gradients differ by {float(profile.corrected[-1]):.2g} in the last bin, where {tau:g} is wanted"
