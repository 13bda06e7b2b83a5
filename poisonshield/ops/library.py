"""Registers ops with torch.library as `torch.ops.poisonshield.<name>`: schema, implementation, fake and autograd.

Every schema ends in `str backend`, has no defaults, and names a function of its room. The implementation dispatches
when it runs, not when it is traced, so torch.compile sees one opaque op whatever the backend. Registered with
`Library.impl`, which costs the host a third of what `custom_op` does on a small tensor.
"""

from collections.abc import Callable
from typing import Any

import torch

from poisonshield.errors import GradientError
from poisonshield.ops.dispatch import Room

_LIBRARY = torch.library.Library("poisonshield", "DEF")  # noqa: TOR901 - one library, for the life of the process


def register(
    schema: str,
    room: Room,
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define one op and return the function that public code calls, with the schema's arguments in order.

    fake gives outputs of the right shape, dtype and strides without computing them. setup_context and backward are as
    in torch.library.register_autograd; without them the op is a gradient itself, or changes its input, and
    differentiating through it raises GradientError.
    """
    name = schema.split("(")[0]

    def run(*args: Any) -> Any:
        *rest, backend = args
        device = rest[0].device.type
        if not torch.is_autocast_enabled(device):
            return room.run(name, backend, *rest)
        with torch.autocast(device, enabled=False):  # an op fixes its own precision
            return room.run(name, backend, *rest)

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"poisonshield::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.poisonshield, name).default
    if "!" in schema:
        return op  # torch takes no formula for an op that changes an input; its public function refuses gradients
    if backward is None or setup_context is None:
        setup_context, backward = _keep_nothing, _second_derivative(name)
    torch.library.register_autograd(f"poisonshield::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    function = _function(name, op, setup_context, backward)

    def call(*args: Any) -> Any:
        return op(*args) if torch.compiler.is_compiling() else function.apply(*args)

    return call


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    return None


def _second_derivative(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise GradientError(f"poisonshield::{name} is a gradient itself; second derivatives are not supported.")

    return backward


def _function(name: str, op: Any, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Any:
    """The op as an autograd.Function: torch.func.grad cannot pass a formula registered with an op (torch 2.14)."""
    body = {
        "forward": staticmethod(lambda *args: op(*args)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
    }
    return type(name, (torch.autograd.Function,), body)
