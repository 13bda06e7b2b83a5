"""What a finished run's features look like beyond accuracy: rank, alignment, local Lipschitz constant, poison pairs."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from poisonshield.attacks import frozen_stats
from poisonshield.commands.samples import Samples
from poisonshield.evals.alignment import alignment
from poisonshield.evals.linear import linear_sweep
from poisonshield.evals.lipschitz import local_lipschitz
from poisonshield.evals.pairs import pairs
from poisonshield.evals.parts.features import Features, extract
from poisonshield.evals.spectrum import effective_rank, log_of, rank_of, spectrum

log = logging.getLogger(__name__)


def probes(samples: Samples, train: Features, test: Features, bank: Features) -> dict[str, Any]:
    """Each probe's values under its name; None for one that the settings leave out.

    spectrum: of the k-NN bank. projection_rank: effective rank of what the projector makes of it. linear_sweep: {learning rate: top-1}. alignment: of two views of training samples, as
    the method augments them. lipschitz: of clean test images. pairs: of training samples, clean and poisoned.
    """
    s, method, run = samples.run.settings.evaluate, samples.method, samples.run
    eigenvalues = spectrum(bank.h)
    projector = getattr(method, "projector", None)
    values: dict[str, Any] = {
        "spectrum": {"effective_rank": rank_of(eigenvalues), "log10_shares": log_of(eigenvalues).tolist()},
        "projection_rank": None if projector is None else effective_rank(_projected(projector, bank.h)),
        "linear_sweep": None,
        "alignment": None,
        "lipschitz": None,
        "pairs": _pairs(samples) if s.pair_samples != 0 else None,
    }
    if s.linear_rates:
        values["linear_sweep"] = linear_sweep(
            train,
            test,
            num_classes=samples.data.num_classes,
            learning_rates=s.linear_rates,
            epochs=s.linear_epochs,
            seed=run.seed,
        )
    if s.alignment_samples != 0:
        a, b = (extract(method.encoder, samples.augmented(s.alignment_samples, view=v)).h for v in (0, 1))
        values["alignment"] = alignment(a, b) | {"samples": len(a)}
    if s.lipschitz_samples != 0:
        raw, unit = (
            local_lipschitz(
                method.encoder,
                samples.test(s.lipschitz_samples),
                eps=s.lipschitz_eps,
                steps=s.lipschitz_steps,
                step_size=s.lipschitz_step_size,
                restarts=s.lipschitz_restarts,
                normalize=normalize,
                seed=run.seed,
            )
            for normalize in (False, True)
        )
        values["lipschitz"] = {"raw": raw, "unit": unit}
    return values


@torch.no_grad()
def _projected(projector: nn.Module, h: torch.Tensor) -> torch.Tensor:
    """z of features [N, D], evaluation mode, some at a time."""
    with frozen_stats(projector):
        return torch.cat([projector(part) for part in h.split(1000)])


def watch_pairs(samples: Samples) -> Callable[[], dict[str, float | None]] | None:
    """What the trainer logs of `evaluate.watch_pairs` fixed training samples, clean and poisoned: how alike the encoder
    finds them, and how much more the clean one costs the classifier. None where nothing is to be watched."""
    count = samples.run.settings.evaluate.watch_pairs
    if count == 0:
        return None
    if samples.run.poison is None:
        log.warning(
            "Nothing to watch: this run poisons nothing itself. Set data.poison, on clean data, for watch_pairs."
        )
        return None
    clean, poisoned = list(samples.clean(count)), list(samples.train(count))

    def watch() -> dict[str, float | None]:
        values = pairs(samples.method, clean, poisoned)
        return {name: values[name] for name in ("psn_cln_sim", "ce_gap")}

    return watch


def _pairs(samples: Samples) -> dict[str, Any] | None:
    if samples.run.poison is None:
        log.warning("No clean-poison pairs: this run poisons nothing itself. Set data.poison, on clean data, for them.")
        return None
    count = samples.run.settings.evaluate.pair_samples
    return pairs(samples.method, samples.clean(count), samples.train(count))


def scalars(values: dict[str, Any], prefix: str = "") -> dict[str, float | None]:
    """{"probes.alignment.variance": 0.01, ...}: the single numbers in nested values; None stays only at the top."""
    found: dict[str, float | None] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= scalars(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) or (value is None and not prefix):
            found[f"{prefix}{key}"] = value
    return found
