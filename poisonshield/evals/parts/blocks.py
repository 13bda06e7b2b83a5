"""`evaluate:` in a config: a block for each evaluation that the folder holds, made by scanning it."""

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, create_model

from poisonshield.config import Settings
from poisonshield.evals.base import Evaluation
from poisonshield.registry import Registry

T = TypeVar("T", bound=Settings)


def with_blocks(registry: Registry) -> Callable[[type[T]], type[T]]:
    """Adds to a class of settings, under the name of each evaluation, a block with the evaluation's own settings.

    null or false leaves an evaluation out, true or {} takes its defaults. One that is not on by itself is null.
    """

    def add(base: type[T]) -> type[T]:
        blocks: dict[str, Any] = {cls.name: _block(cls) for cls in classes(registry)}
        return create_model(base.__name__, __base__=base, __module__=base.__module__, __doc__=base.__doc__, **blocks)

    return add


def classes(registry: Registry) -> list[type[Evaluation[Any]]]:
    """Its evaluations in the order of tables: by `place`, then by name."""
    return sorted(map(registry.get, registry.names()), key=lambda cls: (cls.place, cls.name))


def switched_on(settings: Settings, registry: Registry) -> dict[str, Evaluation[Any] | None]:
    """{name: the evaluation with its settings, or None if it is left out}, in the order of tables."""
    configs = {cls: getattr(settings, cls.name) for cls in classes(registry)}
    return {cls.name: None if config is None else cls(config) for cls, config in configs.items()}


def _block(cls: type[Evaluation[Any]]) -> tuple[Any, Any]:
    """Type and default of one block, as pydantic's create_model takes them."""
    kind = Annotated[cls.Config | None, BeforeValidator(_switch)]  # type: ignore[name-defined]
    said = (cls.__doc__ or cls.name).partition("\n")[0]
    return kind, Field(cls.Config() if cls.on else None, description=f"{said} null leaves it out.")


def _switch(value: Any) -> Any:
    """true -> {}, false -> null; anything else unchanged, for pydantic to judge."""
    if isinstance(value, bool):
        return {} if value else None
    return value
