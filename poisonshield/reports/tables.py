"""Numbers as text: one run's list, and lines of Markdown tables. Names, units and digits are those of the Numbers."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

from poisonshield.evals.base import Number
from poisonshield.evals.parts.numbers import Measured, details_of, numbers_of
from poisonshield.registry import Registry


def list_numbers(measured: Measured, registry: Registry) -> str:
    """All that was measured of one run: a number a line, with its key, value, unit and label; lists are left out."""
    block_of = {key: block for block in measured.values() if block is not None for key in block}
    lines = [
        (n.key, n.write(block_of[n.key][n.key], more=1 if n.digits else 0), n.unit, _label(n))
        for n in numbers_of(registry)
        if n.key in block_of
    ]
    for name, block in details_of(measured, registry).items():
        lines += [(key, f"{value:.4g}", "", "") for key, value in _leaves(block, name)]
    width = max((len(key) for key, *_ in lines), default=0)
    return "\n".join(f"{key:{width}} {value:>9} {unit:1} {label}".rstrip() for key, value, unit, label in lines)


def spread(values: Sequence[float | None], number: Number) -> str:
    """ "mean (lowest to highest)" of what is known of one number in several rows; "-" where nothing is."""
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    middle = number.write(mean(known))
    return middle if len(known) == 1 else f"{middle} ({number.write(min(known))} to {number.write(max(known))})"


def spreads(rows: Sequence[Mapping[str, Any]], numbers: Sequence[Number]) -> list[str]:
    """A cell for each number, its spread over the rows."""
    return [spread([row.get(number.key) for row in rows], number) for number in numbers]


def markdown(head: Sequence[str], *lines: Sequence[str]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def over_poisons(places: Sequence[tuple[Mapping[str, str], list[dict[str, Any]]]]) -> str:
    """Lowest and mean accuracy over the poisons of an axis `poison` (Psn Min, Psn Avg), where it has two or more."""
    groups: dict[str, dict[str, list[float]]] = {}
    for labels, rows in places:
        poisoned = [r for r in rows if r["poison"] != "none"]
        if "poison" in labels and poisoned:
            others = ", ".join(v for k, v in labels.items() if k != "poison")
            best = [r["test_top1"] if r["test_top1"] is not None else r["linear_top1"] for r in poisoned]
            groups.setdefault(others, {})[labels["poison"]] = best
    groups = {k: v for k, v in groups.items() if len(v) > 1}
    if not groups:
        return ""
    lines = []
    for others, per_poison in groups.items():
        means = [mean(v) for v in per_poison.values()]
        lines.append([others, f"{min(means):.1f}", f"{mean(means):.1f}"])
    table = markdown(["over poisons", "lowest", "mean"], *lines)
    return f"{table}\n\nAccuracy of the classifier, or of the linear probe where there is none; means over seeds."


def _label(number: Number) -> str:
    """The label, after the title of its bars where it has such."""
    return number.label if number.panel is None else f"{number.panel}: {number.label}"


def _leaves(value: Mapping[Any, Any], name: str) -> Iterator[tuple[str, float]]:
    """("linear.sweep.0.1", 80.0) for each number in nested dicts."""
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _leaves(inner, f"{name}.{key}")
        elif isinstance(inner, (int, float)):
            yield f"{name}.{key}", inner
