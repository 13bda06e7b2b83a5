"""torch.compile for the parts of a method that ask for it, in place: names in checkpoints stay what they are."""

import logging

from poisonshield import ops
from poisonshield.errors import BackendError, ConfigError
from poisonshield.method import Method

log = logging.getLogger(__name__)


def compile_parts(method: Method) -> None:
    """Each part compiles itself when it is first called. Raises ConfigError for a method without such parts,
    BackendError where nothing can be compiled."""
    parts = method.parts_to_compile()
    if not parts:
        raise ConfigError(f"engine.compile: {method.name} has no part that is compiled. Leave it out.")
    state = ops.info()["compiled"]
    if state != "ready":
        raise BackendError(f"engine.compile is set, and nothing can be compiled here: {state}. Leave it out.")
    for part in parts:
        part.compile(dynamic=False)  # of fixed sizes: symbolic ones compile longer and run slower
    log.info("torch.compile: %s; the first steps take longer", ", ".join(type(part).__name__ for part in parts))
