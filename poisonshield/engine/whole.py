"""A run's weights and optimiser states as whole tensors by name: what any backend, stage and number of ranks can load.

It is made when it is wanted, from the files that a backend wrote, so saving costs nothing more and checkpoints of
earlier versions can be read too. Each rank reads everything, once, into memory of the CPU: weights and states together
are three times the weights for AdamW, and two times for SGD with momentum.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from poisonshield.errors import CheckpointError

State = dict[str, Any]
"""What the optimiser keeps of one parameter: `momentum_buffer`, `exp_avg` and the like, and numbers such as `step`."""


@dataclass(frozen=True)
class Saved:
    """Who wrote a checkpoint."""

    backend: str
    zero_stage: int
    world_size: int

    def __str__(self) -> str:
        stage = f", ZeRO {self.zero_stage}" if self.zero_stage else ""
        return f"{self.backend}{stage}, {self.world_size} rank{'s' if self.world_size > 1 else ''}"


@dataclass(frozen=True)
class Whole:
    """weights: the method's state_dict. states: by parameter; one that never had a gradient may be left out."""

    weights: dict[str, Tensor]
    states: dict[str, State]


def names_in_order(method: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Names of the trained parameters as the optimiser's state_dict numbers them."""
    names = {parameter: name for name, parameter in method.named_parameters()}
    return tuple(names[p] for group in optimizer.param_groups for p in group["params"])


def name_states(state: Mapping[str, Any], order: Sequence[str]) -> dict[str, State]:
    """The states of an optimiser's state_dict by parameter. Raises CheckpointError if it has other parameters."""
    count = sum(len(group["params"]) for group in state["param_groups"])
    if count != len(order):
        raise CheckpointError(f"the saved optimiser has {count} parameters, this run's {len(order)}.")
    return {order[i]: dict(of) for i, of in state["state"].items()}


def put_weights(method: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy into the method. Raises CheckpointError naming what is not its own."""
    own = method.state_dict()
    wrong = [name for name in {**own, **weights} if _shape_of(own, name) != _shape_of(weights, name)]
    if wrong:
        some = ", ".join(f"{n} {_shape_of(weights, n)}, wanted {_shape_of(own, n)}" for n in wrong[:3])
        raise CheckpointError(
            f"the saved weights are not those of this {type(method).__name__}: {some}{', ...' if wrong[3:] else ''}.\n"
            "  Resume with the model and method of the run that saved them."
        )
    method.load_state_dict(dict(weights))


def _shape_of(state: Mapping[str, Tensor], name: str) -> str:
    return str(list(state[name].shape)) if name in state else "none"


def put_states(optimizer: torch.optim.Optimizer, states: Mapping[str, State], order: Sequence[str]) -> None:
    """Give an optimiser of whole tensors its states, in the memory format of its parameters; settings stay its own."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    made = optimizer.state_dict()
    made["state"] = {
        i: {key: _shape_like(p, value) for key, value in states[name].items()}
        for i, (name, p) in enumerate(zip(order, parameters, strict=True))
        if name in states
    }
    optimizer.load_state_dict(made)


def _shape_like(parameter: Tensor, value: Any) -> Any:
    """A copy. Fused kernels walk memory, so a state must lie there as its parameter does."""
    if torch.is_tensor(value) and value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return copy_of(value)


def copy_of(value: Any) -> Any:
    """Of a number: optimisers count up in place, so no two parameters may share one."""
    return value.clone() if torch.is_tensor(value) else value


# DeepSpeed's files of one state: "param_shapes" lists groups, each {name: shape} in the order in which they lie in the
# group's flat tensor.

Shapes = Mapping[str, Sequence[int]]


def join_ranges(shapes: Shapes, pieces: Sequence[Tensor]) -> dict[str, Tensor]:
    """Stages 1 and 2: rank after rank holds the next piece of one long tensor, the last one with padding."""
    flat, start, whole = torch.cat(list(pieces)), 0, {}
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        whole[name] = flat[start : start + count].view(torch.Size(shape))
        start += count
    return whole


def join_slices(shapes: Shapes, pieces: Sequence[Tensor]) -> dict[str, Tensor]:
    """Stage 3: each rank holds an equal slice of each tensor, the last ones with padding."""
    start, whole = 0, {}
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        width = -(-count // len(pieces))
        slices = [piece[start : start + width] for piece in pieces]
        whole[name] = torch.cat(slices)[:count].view(torch.Size(shape))
        start += width
    return whole


def slice_of(value: Tensor, width: int, rank: int) -> Tensor:
    """The slice of a whole tensor that a rank holds at stage 3, padded with zeros to `width`."""
    flat = value.flatten()[rank * width : (rank + 1) * width]
    return nn.functional.pad(flat, (0, width - flat.numel()))


def join_states(
    groups: Sequence[Shapes], ranks: Sequence[Mapping[int, State]], join: Callable[[Shapes, Sequence[Tensor]], Any]
) -> dict[str, State]:
    """By parameter, what the ranks' optimisers keep of the flat tensor of each group. Numbers are all parameters'."""
    states: dict[str, State] = {name: {} for shapes in groups for name in shapes}
    for i, shapes in enumerate(groups):
        for key, first in ranks[0].get(i, {}).items():
            if is_piece(first):
                whole = join(shapes, [rank[i][key] for rank in ranks])
            else:
                whole = dict.fromkeys(shapes, first)
            for name, value in whole.items():
                states[name][key] = value
    return states


def is_piece(value: Any) -> bool:
    """Whether it is a state of every element, and no number such as `step`."""
    return torch.is_tensor(value) and value.dim() > 0


def keys_of(states: Iterable[State]) -> dict[str, Any]:
    """One value for each key that any of them has."""
    return {key: value for state in states for key, value in state.items()}
