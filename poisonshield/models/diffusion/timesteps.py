"""When learning happens: the gradient that each range of timesteps gives to the learned words, and what a poison adds.

Noise-prediction loss at uniform timesteps favours low noise. Where a concept's latents are N(mu, s^2) and the words
move mu, an error in mu has a gradient of size w = SNR / (1 + s^2 SNR)^2, largest at SNR = 1 / s^2. So has a constant
shift of the latents, and the finer the detail (small s), the more low timesteps rule. A profile measures this on a real
network; `choose_t_min` reads from it from where on a poison no longer outweighs the concept.
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
    """Of the gradients in each bin, float64 [bins]. length: mean norm of one draw. mean: norm of the mean over draws
    and pictures, the step that training takes on average. error: that mean's standard error, as a vector's norm."""

    length: Tensor
    mean: Tensor
    error: Tensor

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
        self._wants_reference()
        return self.difference.mean / self.ref.mean

    @property
    def corrected(self) -> Tensor:
        """D without the errors of both means; inf where g(ref) is all error and the difference is not."""
        self._wants_reference()
        top, bottom = self.difference.steady, self.ref.steady
        return torch.where(top == 0, torch.zeros_like(top), top / bottom)

    @property
    def pressure(self) -> Tensor:
        """[bins]: the share of the pull (norms, not squares, which low timesteps rule) that remains from a bin on."""
        pull = (self.x if self.ref is None else self.ref).steady * torch.tensor(self.edges).diff()
        return pull.flip(0).cumsum(0).flip(0) / pull.sum()

    def _wants_reference(self) -> None:
        if self.difference is None:
            raise ConfigError("this profile has no reference to compare with. Give `ref`: clean or purified pictures.")


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
    [0, 1]: weighs the loss over positions, each picture's normalised. noises: draws of timestep and noise per picture
    and bin, the same for x and ref. end: the first timestep that is left out, None for all. bands: radial frequency bands of the latents' difference, see band_power. Noise
    depends on (seed, key, bin, draw); keys are the pictures' places by default. batch_size: draws in one backward pass.

    Cost: bins * noises * B forward and backward passes of the U-Net, twice with ref. Raises ShapeError, ConfigError.
    """
    keys = [str(i) for i in range(len(x))] if keys is None else list(keys)
    for name, value, wanted in (("ref", ref, x.shape), ("mask", mask, (len(x), 1, *x.shape[2:]))):
        if value is not None and value.shape != wanted:
            raise ShapeError(f"{name} has shape {tuple(value.shape)}; {tuple(wanted)} is wanted, to go with x.")
    if len(keys) != len(x):
        raise ShapeError(f"{len(keys)} keys came for {len(x)} pictures; give one each, or None.")
    prompts = [prompts] * len(x) if isinstance(prompts, str) else list(prompts)
    if len(prompts) != len(x):
        raise ShapeError(f"{len(prompts)} prompts came for {len(x)} pictures; give one for all, or one each.")
    ids = model.tokens(prompts)
    if not bool((ids >= model.vocabulary).any(1).all()):
        raise ConfigError("a prompt holds no placeholder, so nothing is learned from it. Write one into each.")
    weight = None
    if mask is not None:
        weight = F.avg_pool2d(mask.to(ids.device).float(), model.factor)
        weight = weight / weight.mean((1, 2, 3), keepdim=True).clamp(min=1e-8)
    with torch.no_grad():
        z, z_ref = (None if v is None else model.encode(v.to(ids.device)) for v in (x, ref))
    x_source = _LossGradients(model, z, ids, rows, weight, keys, seed, batch_size)
    ref_source = None if z_ref is None else replace(x_source, z=z_ref)
    end = model.num_timesteps if end is None else end
    if not 1 <= end <= model.num_timesteps:
        raise ConfigError(f"end {end}: 1 to the pipeline's {model.num_timesteps} timesteps can be looked at.")
    settings = {"num_timesteps": end, "bins": bins, "noises": noises, "seed": seed, "keys": keys}
    profile = profile_gradients(x_source, ref_source, **settings)
    if z_ref is None:
        return profile
    snr = torch.stack(
        [part.mean() for part in model.snr()[:end].cpu().split(torch.tensor(profile.edges).diff().tolist())]
    )
    parts = snr[:, None] * band_power(z - z_ref, bands).mean(0).cpu()  # [bins, bands]
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
    """[N, R, d]: for each of N samples by itself, the gradient of its mean squared error for rows [R, d].

    z, noise [N, C, h, w], t [N], ids [N, L]; weight broadcastable to z. One backward pass: every sample has own rows.
    """
    count = len(z)
    own = rows.detach().to(z).repeat(count, 1).requires_grad_()  # [N R, d]
    ids = torch.where(ids >= model.vocabulary, ids + len(rows) * torch.arange(count, device=ids.device)[:, None], ids)
    with torch.enable_grad():
        pred = model.predict(model.noised(z, t, noise), t, model.text(ids, own))
        error = (pred - model.target(z, t, noise)).square()
        loss = (error if weight is None else error * weight).mean((1, 2, 3)).sum()
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
    x, other, difference, cosine = [], [], [], []
    for number, (first, end) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        u = KeyedRandom(seed, sample_ids(keys), number, "profile").uniform("t", noises).double().T  # [n, B]
        place = (torch.arange(noises)[:, None] + u) / noises
        t = (first + (place * (end - first)).long()).clamp(max=end - 1)
        g = source(t, number).double().cpu()
        x.append(_moments(g))
        if ref is not None:
            g_ref = ref(t, number).double().cpu()
            other.append(_moments(g_ref))
            difference.append(_moments(g - g_ref))
            cosine.append(torch.cosine_similarity(g.mean((0, 1)), g_ref.mean((0, 1)), dim=0))
    joined = lambda many: Moments(*torch.tensor(many, dtype=torch.float64).T)
    if ref is None:
        return Profile(edges, joined(x))
    return Profile(edges, joined(x), joined(other), joined(difference), torch.stack(cosine))


def _moments(g: Tensor) -> tuple[float, float, float]:
    """length, mean and error of gradients [n, B, D]. Pictures are what they are: only draws of one of them vary."""
    n, count = g.shape[:2]
    spread = g.var(0).sum(1)  # [B], squared lengths
    return float(g.norm(dim=2).mean()), float(g.mean((0, 1)).norm()), float(spread.sum() / n) ** 0.5 / count


def band_power(delta: Tensor, bands: int) -> Tensor:
    """[B, bands] float64: the mean square of delta [B, C, h, w], split by radial frequency; the parts sum to the whole.

    Band k holds frequencies from k to k + 1 parts of Nyquist; the corners beyond it belong to the last.
    """
    h, w = delta.shape[-2:]
    radius = (torch.fft.fftfreq(h)[:, None] ** 2 + torch.fft.fftfreq(w)[None, :] ** 2).sqrt() / 0.5
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
    reached = below.flip(0).int().cumprod(0).flip(0).bool()  # from here to the end
    first = int(reached.int().argmax())
    if not bool(reached.any()) and float(profile.ref.steady[-1]) == 0:
        reason = "in the last bin the reference's gradient is all noise; give more draws (noises)"
    elif not bool(reached.any()):
        reason = (
            f"the two gradients differ by {float(profile.corrected[-1]):.2g} in the last bin, where {tau:g} is wanted"
        )
    elif float(profile.pressure[first]) < min_pressure:
        reason = (
            f"from t = {profile.edges[first]} on {float(profile.pressure[first]):.2%} of the concept's pull would "
            f"remain, where {min_pressure:.0%} is wanted"
        )
    else:
        return min(max(profile.edges[first], lowest), highest)
    log.warning(
        "No timestep to start from: %s. Taking %d. More draws (noises) give a steadier profile.", reason, instead
    )
    return instead
