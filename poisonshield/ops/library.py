"""Registers ops with torch.library as `torch.ops.poisonshield.<name>`: schema, implementation, fake and autograd.

The schema follows from the record that the op takes (record.py), and ends in `str backend`. The implementation
dispatches when it runs, not when it is traced, so torch.compile sees one opaque op whatever the backend. Registered
with `Library.impl`, which costs the host a third of what `custom_op` does on a small tensor.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from poisonshield.errors import GradientError
from poisonshield.ops.dispatch import Room
from poisonshield.ops.record import flat_fields, flatten, rebuild

_LIBRARY = torch.library.Library("poisonshield", "DEF")  # noqa: TOR901 - one library, for the life of the process


class Op:
    """One operator, called with its record and a backend: `op(arguments, backend)`.

    name: of the operator and of the room's function; a last "_" says that it changes its first tensor in place.
    arguments: the class of the record. returns: the schema's right side, such as "(Tensor, Tensor)".
    fake(arguments): outputs of the right shape, dtype and strides, not computed.
    save(ctx, arguments, output): keeps in ctx what the gradient needs; ctx.backend is set already.
    gradients(ctx, wanted, *grads): {field: gradient}; wanted is the record with a bool for each field.
    Without the last two the op is a gradient itself, and differentiating through it raises GradientError; one that
    changes its input has none at all, and its public function refuses gradients.
    """

    def __init__(
        self,
        name: str,
        room: Room,
        arguments: type[Any],
        *,
        returns: str,
        fake: Callable[..., Any],
        save: Callable[..., None] | None = None,
        gradients: Callable[..., dict[str, Any]] | None = None,
    ) -> None:
        self.name, self.room, self.arguments = name, room, arguments
        self.in_place = name.endswith("_")
        self._fake, self._save, self._gradients = fake, save, gradients
        self._fields = [field for field, _ in flat_fields(arguments)]
        self.operator = self._register(returns)

    def __call__(self, arguments: Any, backend: str) -> Any:
        """Runs the op. arguments: its record; backend: as `dispatch.requested` gives it."""
        if self.in_place or torch.compiler.is_compiling():
            return self.operator(*flatten(arguments), backend)
        return _Eager.apply(self, *flatten(arguments), backend)

    def _register(self, returns: str) -> Any:
        inputs = [f"{kind} {name}" for name, kind in flat_fields(self.arguments)]
        if self.in_place:
            inputs[0] = inputs[0].replace("Tensor", "Tensor(a!)")
        schema = f"{self.name}({', '.join(inputs)}, str backend) -> {returns}"
        full_name = f"poisonshield::{self.name}"
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(full_name, self._run_fake, lib=_LIBRARY)
        if not self.in_place:  # torch takes no formula for an op that changes an input
            torch.library.register_autograd(full_name, self.backward, setup_context=self.setup_context, lib=_LIBRARY)
        return getattr(torch.ops.poisonshield, self.name).default

    def _run(self, *flat: Any) -> Any:
        *values, backend = flat
        device = values[0].device.type
        arguments = rebuild(self.arguments, values)
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):  # an op fixes its own precision
                result = self.room.run(self.name, backend, arguments)
        else:
            result = self.room.run(self.name, backend, arguments)
        if self.in_place:  # kernels write through pointers, which autograd does not see
            torch.autograd.graph.increment_version(values[0])
        return result

    def _run_fake(self, *flat: Any) -> Any:
        return self._fake(rebuild(self.arguments, flat[:-1]))

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """torch's half of autograd that runs after the forward. inputs: flat, the backend last."""
        if self._save is not None:
            ctx.backend = inputs[-1]
            self._save(ctx, rebuild(self.arguments, inputs[:-1]), output)

    def backward(self, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """torch's other half: a gradient or None for each flat input."""
        if self._gradients is None:
            raise GradientError(
                f"poisonshield::{self.name} is a gradient itself; second derivatives are not supported."
            )
        needed = ctx.needs_input_grad[-len(self._fields) - 1 : -1]  # the backend, last, is no field
        found = self._gradients(ctx, rebuild(self.arguments, needed), *grads)
        return *(found.get(field) for field in self._fields), None


def first_derivative(name: str, gradient: Tensor) -> Tensor:
    """The gradient that the forward of `name` left; differentiating it raises GradientError."""
    return _FirstDerivative.apply(name, gradient)


class _FirstDerivative(torch.autograd.Function):
    """A view of a tensor whose derivative is an error."""

    @staticmethod
    def forward(name: str, gradient: Tensor) -> Tensor:
        """The same numbers."""
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[str, Tensor], output: Tensor) -> None:
        """Keeps the name for the message."""
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Always raises."""
        raise GradientError(
            f"{ctx.name} has no second derivatives: its forward computes the gradient. "
            "Write it with torch operations where they are needed."
        )


class _Eager(torch.autograd.Function):
    """An op outside of torch.compile: torch.func.grad cannot pass a formula registered with an op (torch 2.14)."""

    @staticmethod
    def forward(op: Op, *flat: Any) -> Any:
        """The op's outputs."""
        return op.operator(*flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """As the op's own; the op comes first."""
        ctx.op = inputs[0]
        ctx.op.setup_context(ctx, inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """As the op's own; the op has no gradient."""
        return None, *ctx.op.backward(ctx, *grads)
