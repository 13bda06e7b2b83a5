"""Which names a setting may have, and what stands behind each: tables made from the files that are there.

A name is a file, so a new file is in its table at once. The first line of its class's docstring says what it does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from poisonshield.attacks.parts.settings import ATTACKS
from poisonshield.defenses.diffusion.szt import MASKS
from poisonshield.engine.settings import backends
from poisonshield.errors import ConfigError
from poisonshield.evals import EVALUATIONS
from poisonshield.evals.diffusion import EVALUATIONS as WORD_EVALUATIONS
from poisonshield.registry import Registry, suggest
from poisonshield.reports.tables import markdown
from poisonshield.runs.classify import Classify
from poisonshield.runs.invert import Invert

Tell = Callable[[Any], str]
"""A class of some kind -> what it declares, as text."""


@dataclass(frozen=True)
class Kind:
    """One table. setting: where its names are written. columns: heads after the first two, and how to fill them."""

    setting: str
    registry: Registry
    columns: Mapping[str, Tell]


def _list(items: Sequence[Any]) -> str:
    return ", ".join(map(str, items)) or "-"


def _answer(value: bool) -> str:
    return "yes" if value else "no"


_POISON: dict[str, Tell] = {
    "norm": lambda poison: poison.norm or "none",
    "a pattern for each": lambda poison: poison.grain,
    "source": lambda poison: poison.source,
}
_DEFENSE: dict[str, Tell] = {"purifier": lambda defense: _answer(defense.purifier)}
_EVALUATION: dict[str, Tell] = {
    "by default": lambda evaluation: "on" if evaluation.on else "off",
    "numbers": lambda evaluation: _list([number.key for number in evaluation.numbers]),
}

KINDS: dict[str, Kind] = {
    "poisons": Kind("data.poison", Classify.poisons, _POISON),
    "diffusion-poisons": Kind("data.poison, protect --method", Invert.poisons, _POISON),
    "defenses": Kind("defenses", Classify.defenses_from[0], _DEFENSE),
    "diffusion-defenses": Kind("defenses", Invert.defenses_from[0], _DEFENSE),
    "methods": Kind(
        "method.name",
        Classify.methods,
        {
            "views": lambda method: str(method.num_views),
            "classifier": lambda method: _answer(method.has_classifier),
        },
    ),
    "diffusion-methods": Kind("method.name", Invert.methods, {}),
    "attacks": Kind(
        "attack.name, of whatever attacks",
        ATTACKS,
        {"norms": lambda attack: _list(attack.norms), "options": lambda attack: _list(attack.options)},
    ),
    "masks": Kind("mask in szt", MASKS, {"looks for a word": lambda mask: _answer(mask.needs_word)}),
    "evaluations": Kind("a block of evaluate", EVALUATIONS, _EVALUATION),
    "diffusion-evaluations": Kind("a block of evaluate", WORD_EVALUATIONS, _EVALUATION),
    "backends": Kind(
        "engine.backend",
        backends,
        {
            "runs": lambda backend: backend.summary,
            "ZeRO stages": lambda backend: _list(backend.zero_stages),
            "needs": lambda backend: _list(backend.packages),
        },
    ),
}
"""Every kind of name. diffusion-... are those of runs that learn words."""


def find_names(kind: str) -> list[dict[str, str]]:
    """A row for each name of a kind: `name`, `what it does`, and what the kind declares besides.

    Raises ConfigError for an unknown kind, or a file that does not hold one class of its name.
    """
    if kind not in KINDS:
        raise ConfigError(f"{kind!r} is no kind of name.{suggest(kind, list(KINDS))}  Known: {', '.join(KINDS)}")
    found = KINDS[kind]
    return [_describe(found.registry.get(name), name, found.columns) for name in found.registry.names()]


def draw_table(kind: str) -> str:
    """The same as a Markdown table under a line that says where the names are written. Raises as find_names does."""
    rows = find_names(kind)
    head = ["name", "what it does", *KINDS[kind].columns]
    lines = [[f"`{row['name']}`", *(row[column].replace("|", "\\|") for column in head[1:])] for row in rows]
    return f"{kind} ({KINDS[kind].setting})\n\n{markdown(head, *lines)}"


def _describe(cls: Any, name: str, columns: Mapping[str, Tell]) -> dict[str, str]:
    said = (cls.__doc__ or "").strip().partition("\n")[0]
    return {"name": name, "what it does": said, **{head: tell(cls) for head, tell in columns.items()}}
