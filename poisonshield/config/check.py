"""Parts of a tree against Settings classes: pydantic's complaints become one worded ConfigError that lists them all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, ErrorDetails, InitErrorDetails, PydanticCustomError, core_schema

from poisonshield.config.reading import shorten
from poisonshield.config.tree import Tree
from poisonshield.config.types import FRACTION
from poisonshield.errors import ConfigError, RenamedSettings
from poisonshield.registry import Registry, suggest, with_article

MOST_TOLD = 100
"""Problems that one error lists."""


@dataclass(frozen=True)
class Choice:
    """A block with a `name:`: the class that the name picks, and its checked Config."""

    name: str
    cls: Any
    config: Any

    @property
    def block(self) -> dict[str, Any]:
        """The block with every setting, as plain data."""
        return {"name": self.name, **self.config.model_dump(mode="json")}


class From:
    """The type of a setting that picks one of a registry.

    `attack: Annotated[Choice, From(ATTACKS)] = Field("pgd", ...)` takes a name, or a block with `name:` and settings of
    the class that it picks; gives a Choice. In records it is the block with every setting. also: values that are taken
    as they are, such as None or words that pick no class.
    """

    def __init__(self, *registries: Registry, also: tuple[str | None, ...] = ()) -> None:
        self.registries, self.also = registries, also

    def __call__(self, value: Any) -> Choice | str | None:
        """The Choice, or one of the values that are taken as they are. Raises as `choose` does."""
        if isinstance(value, Choice) or (isinstance(value, str | None) and value in self.also):
            return value
        return self.choose(value)

    def choose(self, value: Any) -> Choice:
        """The Choice of a name or block.

        Raises ConfigError for a name, pydantic's ValidationError with every problem of its settings.
        """
        block = {"name": value} if isinstance(value, str) else value
        if not isinstance(block, dict) or not isinstance(block.get("name"), str):
            known = ", ".join(
                [*filter(None, self.also), *(n for registry in self.registries for n in registry.names())]
            )
            raise ConfigError(f"a name, or a block with `name:`, is wanted; names are {known}")
        cls, checker = pick(self.registries, block["name"], also=tuple(filter(None, self.also))), Checker(Tree())
        rest = {key: setting for key, setting in block.items() if key != "name"}
        config = checker.settings(cls.Config, (), rest, owner=block["name"])
        if config is None:
            raise ValidationError.from_exception_data(block["name"], [_inside(*problem) for problem in checker.found])
        return Choice(block["name"], cls, config)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """How pydantic checks such a setting and writes it down."""
        return core_schema.no_info_plain_validator_function(
            self, serialization=core_schema.plain_serializer_function_ser_schema(_plain)
        )


def _plain(value: Choice | str | None) -> dict[str, Any] | str | None:
    return value.block if isinstance(value, Choice) else value


_INSIDE = "inside_choice"  # the type of a complaint that is worded already; its place is within the block


def _inside(path: tuple, text: str) -> InitErrorDetails:
    """A worded problem at a path within a block, for pydantic to carry to the outer Checker with its place."""
    return {
        "type": PydanticCustomError(_INSIDE, "{text}", {"text": text, "inner": len(path)}),
        "loc": path,
        "input": {},
    }


def pick(registries: Sequence[Registry], name: str, *, also: Sequence[str] = ()) -> Any:
    """The class of this name from the first registry that has it. Raises ConfigError with the nearest of all names.

    also: other words that would have been right in its place.
    """
    for registry in registries:
        if name in registry.names():
            return registry.get(name)
    known = [*also, *sorted(known for registry in registries for known in registry.names())]
    raise ConfigError(
        f"{name!r} is not {with_article(registries[0].kind)}.{suggest(name, known)}  Known: {', '.join(known)}"
    )


class Checker:
    """Checks parts of a tree against Settings classes and collects every problem before raising once."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.found: list[tuple[tuple, str]] = []
        """Path and text of each problem."""
        self.moves: list[tuple[tuple, str]] = []
        """Paths of settings that are called otherwise now, and their new names."""

    @property
    def problems(self) -> list[str]:
        """Each with file and line."""
        return [f"{self.tree.where(path)}: {text}" for path, text in self.found]

    def settings(self, schema: type[BaseModel], path: tuple, values: Any, *, owner: str) -> Any:
        """The schema filled with values, or None with the problems noted. owner is the name used in messages."""
        try:
            return schema.model_validate(values if values is not None else {})
        except ValidationError as err:
            for item in err.errors()[: 2 * MOST_TOLD]:
                self._note(schema, path, item, owner)
            return None

    def choice(self, registries: Sequence[Registry], path: tuple, values: Any) -> Choice | None:
        """The class and Config of a block with `name:`, or None with the problems noted."""
        label = _dotted(path)
        if isinstance(values, str):
            values = {"name": values}
        if not isinstance(values, dict) or "name" not in values:
            known = ", ".join(name for registry in registries for name in registry.names())
            self.problem(path, f"{label} needs `name:`, one of {known}.")
            return None
        try:
            cls = pick(registries, str(values["name"]))
        except ConfigError as err:
            self.problem((*path, "name"), f"{label}.name: {err}")
            return None
        rest = {k: v for k, v in values.items() if k != "name"}
        config = self.settings(cls.Config, path, rest, owner=values["name"])
        return None if config is None else Choice(values["name"], cls, config)

    def problem(self, path: tuple, text: str) -> None:
        """Note a problem at a path."""
        self.found.append((path, text))

    def finish(self) -> None:
        """Raise ConfigError with all problems, if any."""
        if not self.found:
            return
        problems = list(dict.fromkeys(self.problems))
        more = [f"... and {len(problems) - MOST_TOLD} more."] if len(problems) > MOST_TOLD else []
        text = "\n".join([*problems[:MOST_TOLD], *more])
        raise RenamedSettings(text, self.moves) if len(self.moves) == len(self.found) else ConfigError(text)

    def _note(self, schema: type[BaseModel], base: tuple, item: ErrorDetails, owner: str) -> None:
        """Note one of pydantic's complaints in our words. base: the path of what was checked."""
        path = (*base, *item["loc"])
        if item["type"] == _INSIDE:
            text = f"{_dotted(path[: len(path) - item['ctx']['inner']])}: {item['msg']}"
        elif item["type"] == "extra_forbidden":
            renamed = _renamed_at(schema, item["loc"][:-1]).get(str(item["loc"][-1]))
            if renamed is not None:
                self._note_renamed(path, renamed)
                return
            text = _word_unknown(schema, base, item["loc"], owner)
        elif item["type"] == "missing":
            text = f"{_dotted(path)} is missing; {owner} needs it."
        else:
            text = _word_wrong(_dotted(path), item, _words_at(schema, item["loc"]))
        self.problem(path, text)

    def _note_renamed(self, path: tuple, renamed: str) -> None:
        """A setting of an earlier version. renamed: its name now, within its block, or from the top after a slash."""
        block = () if renamed.startswith("/") else path[:-1]
        new = (*block, *renamed.removeprefix("/").split("."))
        self.moves.append((path, ".".join(str(part) for part in new)))
        self.problem(path, f"{_dotted(path)} is called {_dotted(new)} now. Write that instead.")


def _word_unknown(schema: type[BaseModel], base: tuple, loc: tuple, owner: str) -> str:
    """What is said of a key that no setting has."""
    label, block, key = _dotted((*base, *loc)), _dotted((*base, *loc[:-1])), str(loc[-1])
    fields = _fields_at(schema, loc[:-1])
    place = block if len(loc) > 1 else owner
    return f"{label} is not a setting of {place}.{suggest(key, fields)}  Settings: {', '.join(sorted(fields))}"


def _word_wrong(label: str, item: ErrorDetails, words: str | None) -> str:
    """What is said of a value that does not fit: the value, unless the message has it, and the field's own words."""
    message, value = item["msg"].removeprefix("Value error, "), item["input"]
    told = isinstance(value, (dict, list)) or str(value) in message
    given = "" if told else f" (given: {shorten(repr(value))})"
    return f"{label}: {message}{given}{f'.  It is: {words}' if words else ''}" if label else message


def _schema_at(schema: Any, loc: tuple) -> Any:
    for part in loc:
        schema = schema.model_fields[part].annotation if part in getattr(schema, "model_fields", {}) else schema
        # Of a block that may be null, the block.
        schema = next((kind for kind in get_args(schema) if hasattr(kind, "model_fields")), schema)
    return schema


def _fields_at(schema: Any, loc: tuple) -> list[str]:
    return list(getattr(_schema_at(schema, loc), "model_fields", {}))


def _words_at(schema: Any, loc: tuple) -> str | None:
    """What the field at a place says of itself."""
    field = getattr(_schema_at(schema, loc[:-1]), "model_fields", {}).get(loc[-1]) if loc else None
    return None if field is None else field.description


def _renamed_at(schema: Any, loc: tuple) -> dict[str, str]:
    return getattr(_schema_at(schema, loc), "renamed", {})


def _dotted(path: tuple) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{part}"
    return text


def dump(resolved: Any, written: Any) -> Any:
    """Checked values with defaults, as plain data; fractions stay as they were written."""
    if isinstance(resolved, BaseModel):
        resolved = resolved.model_dump(mode="json")
    if isinstance(written, str) and FRACTION.fullmatch(written):
        return written
    if isinstance(resolved, dict):
        values = written if isinstance(written, dict) else {}
        return {k: dump(v, values.get(k)) for k, v in resolved.items()}
    if isinstance(resolved, (list, tuple)):
        items = written if isinstance(written, list) and len(written) == len(resolved) else [None] * len(resolved)
        return [dump(v, w) for v, w in zip(resolved, items, strict=True)]
    return resolved
