"""From what evaluations give to rows and tables: which numbers there are, in which order, and their values."""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

from poisonshield.config import Settings
from poisonshield.evals.base import Evaluation, Number
from poisonshield.evals.parts.blocks import classes, switched_on
from poisonshield.evals.parts.features import NotFinite
from poisonshield.registry import Registry

log = logging.getLogger(__name__)

Measured = dict[str, dict[str, Any] | None]
"""{evaluation: what it gave, or None if it was left out}."""


def measure(subject: Any, settings: Settings, registry: Registry) -> Measured:
    """What the evaluations that the settings switch on give for the subject, in the order of tables.

    None for one that lacks something, which the log says; None in place of a number that is not finite.
    """
    found = switched_on(settings, registry)
    reasons = {name: None if evaluation is None else evaluation.lacks(subject) for name, evaluation in found.items()}
    for reason in dict.fromkeys(filter(None, reasons.values())):
        names = [name for name, given in reasons.items() if given == reason]
        log.warning("left out (%s): %s.", ", ".join(names), reason)
    return {
        name: None if evaluation is None or reasons[name] else _ask(evaluation, subject)
        for name, evaluation in found.items()
    }


def _ask(evaluation: Evaluation[Any], subject: Any) -> dict[str, Any] | None:
    """What the evaluation gives, with None in place of what is not finite, which the log says."""
    try:
        given = evaluation(subject)
    except NotFinite as err:
        log.warning("left out (%s): %s.", evaluation.name, err)
        return None
    for number in evaluation.numbers:
        value = given.get(number.key)
        if value is not None and not math.isfinite(value):
            log.warning("left out (%s): it came out as %s.", number.key, value)
            given[number.key] = None
    return given


def numbers_of(registry: Registry) -> tuple[Number, ...]:
    """Every number of a registry's evaluations, in the order of tables."""
    return tuple(number for cls in classes(registry) for number in cls.numbers)


def columns_of(known: Iterable[Number], rows: Iterable[Mapping[str, Any]]) -> tuple[Number, ...]:
    """Which of the numbers tables of these rows show: some always, others where any row has a value."""
    there = {key for row in rows for key, value in row.items() if value is not None}
    return tuple(n for n in known if n.column == "always" or (n.column == "known" and n.key in there))


def values_of(measured: Measured, registry: Registry) -> dict[str, float | None]:
    """{key: value} of every number, in the order of tables; None too where the evaluation was left out.

    measured may hold more than evaluations gave, as evaluation.json does.
    """
    blocks = {cls: measured.get(cls.name) or {} for cls in classes(registry)}
    return {number.key: block.get(number.key) for cls, block in blocks.items() for number in cls.numbers}


def row_of(measured: Measured, registry: Registry) -> dict[str, float | None]:
    """What a row of results.json keeps: the numbers that tables may show, rounded."""
    known = values_of(measured, registry)
    return {n.key: n.round(known[n.key]) for n in numbers_of(registry) if n.column is not None}


def details_of(measured: Measured, registry: Registry) -> dict[str, dict[str, Any]]:
    """{evaluation: what it gave beside its numbers}, for those that gave such."""
    keys = {number.key for number in numbers_of(registry)}
    blocks = {name: {k: v for k, v in (block or {}).items() if k not in keys} for name, block in measured.items()}
    return {name: block for name, block in blocks.items() if block}
