"""At which timesteps a word is learned and a poison bends its gradient, and from which one to train."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poisonshield.api.photos import write_drawn
from poisonshield.api.pictures import (
    Paths,
    Pictures,
    add_learned,
    fill_prompt,
    load_pictures,
    pick_matching,
    refuse_among,
)
from poisonshield.batch import Batch
from poisonshield.defenses.purify.named import build_purifier, purifier_block
from poisonshield.engine.processes import choose_device
from poisonshield.files import MadeList, write_whole, writing
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.models.diffusion.timesteps import Profile, choose_t_min, timestep_profile

_FILES = ("profile.png", "profile.json")


def profile(
    pipeline: str | Path,
    images: Paths,
    embedding: str | Path,
    out: str | Path,
    *,
    reference: Paths | None = None,
    masks: str | Path | None = None,
    prompt: str = "a photo of a {}",
    token: str | None = None,
    bins: int = 20,
    noises: int = 16,
    seed: int = 0,
    size: int | None = None,
    tau: float = 0.25,
    min_pressure: float = 0.02,
    device: str = "auto",
) -> dict[str, Any]:
    """The record of profile.json: measures of models/diffusion/timesteps.py by bin; with a reference the chosen t_min.

    pipeline: a diffusers folder, or tiny. images: picture files or a folder of them. reference: the same ones clean, by
    file name; or jpeg:QUALITY, for who has no clean ones: the pictures compressed. masks: a folder of masks by file
    name; the loss counts there only. embedding: the word's file, where training stands; the gradient of a word that has
    learned these pictures vanishes, so one near its start tells more. tau, min_pressure: see choose_t_min.
    Also writes profile.png. Raises ConfigError, DataError, ShapeError.
    """
    out, where = Path(out), choose_device(device)
    refuse_among(out, images, None if _is_purifier(reference) else reference, masks)
    MadeList(out).refuse_others(_FILES)
    model = LatentDiffusion.load(pipeline).to(where)
    rows, word = add_learned(model, embedding, token)
    size = size or model.unet.config.sample_size * model.factor
    pictures = load_pictures(images, size=size, masks=masks)
    ref = None if reference is None else _load_reference(reference, pictures, size=size, seed=seed)
    settings = {"bins": bins, "noises": noises, "seed": seed}
    found = timestep_profile(
        model,
        pictures.x.to(where),
        rows=rows,
        prompts=fill_prompt(prompt, word),
        ref=None if ref is None else ref.to(where),
        mask=pictures.mask,
        keys=pictures.names,
        **settings,
    )
    t_min = None if ref is None else choose_t_min(found, tau=tau, min_pressure=min_pressure)
    files: dict[str, Any] = {"pipeline": str(pipeline), "embedding": str(embedding), "reference": _name(reference)}
    limits = {"size": size, **settings, "tau": tau, "min_pressure": min_pressure, "pictures": pictures.names}
    record = _make_plain(files | {"prompt": prompt} | limits | {"t_min": t_min} | list_measures(found))
    with writing(out, what="profile", names=_FILES):
        write_drawn(out / "profile.png", lambda at: draw_profile(at, found, tau=tau, t_min=t_min))
        write_whole(out / "profile.json", json.dumps(record, indent=1, allow_nan=False))
    return record


def _load_reference(reference: Paths, pictures: Pictures, *, size: int, seed: int) -> Tensor:
    """The same pictures clean, x [B, 3, S, S] in [0, 1]; or, for a text such as jpeg:25, purified."""
    if not _is_purifier(reference):
        return pick_matching(pictures, load_pictures(reference, size=size), "reference").x
    purifier = build_purifier(purifier_block(str(reference)), seed=seed)
    purified = None if purifier is None else purifier.before(Batch(pictures.names, pictures.x)).x
    assert purified is not None  # a text names a purifier, which gives pixels for pixels
    return purified


def _is_purifier(reference: Paths | None) -> bool:
    """Whether it is a text such as jpeg:25."""
    return isinstance(reference, str) and ":" in reference and not Path(reference).exists()


def list_measures(found: Profile) -> dict[str, Any]:
    """Lists by bin, under the names of Profile and Moments."""
    values: dict[str, Any] = {"edges": list(found.edges), "pressure": found.pressure}
    for name in ("x", "ref", "difference"):
        moments = getattr(found, name)
        if moments is not None:
            values[name] = {**asdict(moments), "coherence": moments.coherence, "steady": moments.steady}
    if found.ref is not None:
        values |= {"distance": found.distance, "corrected": found.corrected}
        values |= {name: getattr(found, name) for name in ("cosine", "energy", "bands")}
    return values


def draw_profile(path: Path, found: Profile, *, tau: float, t_min: int | None) -> Path:
    """One PNG: gradients by timestep; with a reference also how far apart they are, and the poison's energy by band."""
    from matplotlib.figure import Figure

    count = 1 if found.ref is None else 3
    figure = Figure(figsize=(4.8 * count, 3.6), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for name, moments in (("pictures", found.x), ("reference", found.ref)):
        if moments is not None:
            line = axes[0].plot(found.centers, moments.length, "--", label=f"{name}: one draw")[0]
            agreed = _leave_out_unplottable(moments.steady)
            axes[0].plot(found.centers, agreed, color=line.get_color(), label=f"{name}: what draws agree on")
    axes[0].set(yscale="log", title="norm of the gradient")
    if found.cosine is not None and found.bands is not None:
        _draw_distance(axes[1], found, found.cosine, tau=tau, t_min=t_min)
        _draw_energy(axes[2], found, found.bands)
    for axis in axes:
        axis.set(xlabel="timestep")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    return path


def _draw_distance(axis: Any, found: Profile, cosine: Tensor, *, tau: float, t_min: int | None) -> None:
    """How far the pictures' gradient is from the reference's, and from where on that is little."""
    axis.plot(found.centers, found.distance, "--", label="measured")
    axis.plot(found.centers, _leave_out_unplottable(found.corrected), label="without noise")
    axis.plot(found.centers, cosine.clamp(min=1e-3), ":", label="cosine")
    axis.axhline(tau, color="grey", linewidth=0.8)
    axis.axvline(t_min, color="grey", linewidth=0.8)
    axis.set(yscale="log", title=f"distance to the reference's; t_min = {t_min}")


def _draw_energy(axis: Any, found: Profile, bands: Tensor) -> None:
    """The poison's energy that the network sees, bands [bins, K]."""
    for k, band in enumerate(bands.T):
        label = f"{k}/{bands.shape[1]} of Nyquist and up"
        axis.plot(found.centers, _leave_out_unplottable(band), label=label)
    axis.set(yscale="log", title="energy of the difference, SNR x mean square")


def _leave_out_unplottable(values: Tensor) -> Tensor:
    """For a logarithmic axis: what is not positive or not finite is left out."""
    return torch.where((values > 0) & values.isfinite(), values, torch.full_like(values, math.nan))


def _name(reference: Paths | None) -> Any:
    """The reference as the record names it."""
    return [str(p) for p in reference] if isinstance(reference, list | tuple) else reference and str(reference)


def _make_plain(value: Any) -> Any:
    """Tensors as lists, and null for what JSON has no number for."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {k: _make_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_make_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
