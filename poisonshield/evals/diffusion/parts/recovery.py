"""What a defense brings back and what it costs, over concepts, with intervals.

    recovery    = mean(defended - poisoned) / mean(clean - poisoned)     1: as if there had been no poison; 0: nothing
    clean_cost  = mean(clean - defended on clean pictures)               0: the defense is free

"clean" is plain training on clean pictures. Both sign conventions of a metric give the same recovery. Intervals are
percentiles of a paired bootstrap: a redrawn concept brings all its numbers along. Source: Efron 1979.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from poisonshield.errors import DataError

Values = Mapping[str, float]
"""Concept -> value, e.g. the mean over seeds. Where several seeds should count apart, the key is concept and seed."""


def mean_with_interval(values: Values, *, level: float = 0.95, draws: int = 4000, seed: int = 0) -> dict[str, Any]:
    """{"value": mean, "low", "high": bootstrap interval over concepts, None for a single one, "concepts": how many}."""
    names, (v,) = _pair(values)
    interval = _interval(lambda rows: v[rows].mean(1), len(names), level=level, draws=draws, seed=seed)
    return {"value": float(v.mean()), "low": interval[0], "high": interval[1], "concepts": len(names)}


def recovery(
    clean: Values, poisoned: Values, defended: Values, *, level: float = 0.95, draws: int = 4000, seed: int = 0
) -> dict[str, Any]:
    """{"status": "ok", "value", "low", "high", "damage": mean_with_interval of clean - poisoned}, over common concepts.

    Only where the poison did something, i.e. the interval of the damage leaves out 0; otherwise {"status": "undefined",
    "why", "damage"}. A single concept has no interval and is undefined too. Raises DataError if concepts differ.
    """
    names, (c, p, d) = _pair(clean, poisoned, defended)
    damage = mean_with_interval(dict(zip(names, (c - p).tolist(), strict=True)), level=level, draws=draws, seed=seed)
    if damage["low"] is None:
        return {"status": "undefined", "why": "one concept has no interval; at least 2 are needed", "damage": damage}
    if damage["low"] <= 0 <= damage["high"]:
        return {"status": "undefined", "why": "the poison's damage is within its own interval of 0", "damage": damage}
    low, high = _interval(
        lambda rows: (d - p)[rows].mean(1) / (c - p)[rows].mean(1), len(names), level=level, draws=draws, seed=seed
    )
    return {
        "status": "ok",
        "value": float((d - p).mean() / (c - p).mean()),
        "low": low,
        "high": high,
        "damage": damage,
        "concepts": len(names),
    }


def clean_cost(
    clean: Values,
    defended_clean: Values,
    *,
    higher_is_better: bool = True,
    level: float = 0.95,
    draws: int = 4000,
    seed: int = 0,
) -> dict[str, Any]:
    """mean_with_interval of what the defense takes away where there is no poison; positive is a loss."""
    names, (c, d) = _pair(clean, defended_clean)
    lost = (c - d) if higher_is_better else (d - c)
    return mean_with_interval(dict(zip(names, lost.tolist(), strict=True)), level=level, draws=draws, seed=seed)


def by_group(values: Values, groups: Mapping[str, str | None]) -> dict[str, Values]:
    """The values of "all" concepts and of each named group, such as "id" and "od"; no group without values."""
    out: dict[str, Values] = {"all": values}
    for group in sorted({g for name, g in groups.items() if g is not None and name in values}):
        out[group] = {name: v for name, v in values.items() if groups.get(name) == group}
    return out


def _pair(*tables: Values) -> tuple[list[str], tuple[Tensor, ...]]:
    """The concepts, and each table's values float64 in their order."""
    names = sorted(tables[0])
    if not names or any(sorted(t) != names for t in tables):
        told = "; ".join(", ".join(sorted(t)) or "none" for t in tables)
        raise DataError(f"every condition needs a value for each concept, and at least one; they have: {told}.")
    return names, tuple(torch.tensor([t[name] for name in names], dtype=torch.double) for t in tables)


def _interval(
    statistic: Callable[[Tensor], Tensor], count: int, *, level: float, draws: int, seed: int
) -> tuple[float | None, float | None]:
    """Percentiles of the statistic of redrawn rows int64 [draws, count]; None for a single row."""
    if count < 2:
        return None, None
    rows = torch.randint(count, (draws, count), generator=torch.Generator().manual_seed(seed))
    values = statistic(rows)
    values = values[values.isfinite()]
    tail = (1 - level) / 2
    return float(values.quantile(tail)), float(values.quantile(1 - tail))
