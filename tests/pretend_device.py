"""A CUDA device that is none: tensors that say `cuda:0`, hold CPU data, and count what a GPU would have been asked.

    with pretend_device() as seen:
        ...                       # torch.device("cuda", 0) is a place that tensors can be moved to
    seen.count("launch"), seen.count("wait"), seen.table()

Counted for each line of the package: launches (kernels that the host starts), copies between host and device, and
waits (the host stands still until the device has caught up: a number that is read, `nonzero`, a boolean index, a copy
from memory that is not pinned). An op of this package counts as what its Triton launcher starts, which runs with
kernels that do nothing; where Triton refuses the call, as what its reference does. What it computes comes from the CPU.
Not seen: kernels inside library calls (a convolution counts once), and what C++ makes on the host by itself.
"""

import importlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from poisonshield.attacks.parts import graphs
from poisonshield.ops import dispatch
from poisonshield.ops.library import Op
from poisonshield.ops.record import rebuild

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
PACKAGE = Path(dispatch.__file__).parents[1]
aten = torch.ops.aten


@dataclass
class Seen:
    """What the device was asked, by kind ("launch", "copy", "wait") and (lines, operator), innermost line first."""

    by_line: dict[str, Counter[tuple[tuple[str, ...], str]]] = field(
        default_factory=lambda: {kind: Counter() for kind in ("launch", "copy", "wait")}
    )
    ops: Counter[str] = field(default_factory=Counter)
    """Calls of our own operators, as "augment on triton": by Triton, or the reference where Triton refuses."""
    in_graph: bool = False
    """Inside a recorded graph: its kernels are not launched one by one."""

    def add(self, kind: str, what: str, count: int = 1) -> None:
        """Count something at the line of the package that asked for it."""
        if count and self.in_graph and kind != "launch":
            raise RuntimeError(f"a recorded graph cannot hold a {kind}: {what} ({_lines()[0]}).")
        if count and not self.in_graph:
            self.by_line[kind][_lines(), what] += count

    def count(self, kind: str, *, without: tuple[str, ...] = ()) -> int:
        """How often, but for what was asked from a file whose path starts with one of `without`."""
        asked = self.by_line[kind].items()
        return sum(n for (lines, _), n in asked if not any(line.startswith(without) for line in lines if without))

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """As attacks.parts.graphs.record: `work` runs when it is replayed, and counts as one launch then."""

        def replay() -> None:
            self.in_graph = True
            try:
                work()
            finally:
                self.in_graph = False
            self.add("launch", "graph")

        return replay

    def clear(self) -> None:
        """Count from nothing again."""
        for counts in (*self.by_line.values(), self.ops):
            counts.clear()

    def copy(self) -> "Seen":
        """What has been seen up to now."""
        return Seen({kind: Counter(counts) for kind, counts in self.by_line.items()}, Counter(self.ops))

    def table(self, most: int = 25) -> str:
        """Waits, copies, and the lines with most launches, one a row."""
        rows = [", ".join(f"{kind} {self.count(kind)}" for kind in self.by_line)]
        for kind in ("wait", "copy", "launch"):
            lines: dict[str, Counter[str]] = {}
            for ((line, *_), what), n in self.by_line[kind].items():
                lines.setdefault(line, Counter())[what] += n
            ordered = sorted(lines.items(), key=lambda item: -item[1].total())[:most]
            for line, parts in ordered:
                names = ", ".join(f"{what} {n}" for what, n in parts.most_common(4))
                rows.append(f"{parts.total():6d} {kind:7s}{line}  {names}")
        return "\n".join(rows)


def _lines() -> tuple[str, ...]:
    """The lines of the package on the stack, as engine/trainer.py:91, the innermost first."""
    frame, found = sys._getframe(2), []
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(str(PACKAGE)):
            found.append(f"{Path(path).relative_to(PACKAGE)}:{frame.f_lineno}")
        frame = frame.f_back
    return tuple(found) or ("elsewhere",)


_current: list[Seen] = []


class PretendTensor(torch.Tensor):
    """CPU data that says it is on the GPU."""

    data_on_cpu: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: Tensor) -> "PretendTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls, data.shape, strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype, device=CPU
        )
        made.data_on_cpu = data.detach()
        return made

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_cpu(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"PretendTensor({self.data_on_cpu})"

    def data_ptr(self) -> int:
        return self.data_on_cpu.data_ptr()

    def untyped_storage(self) -> Any:
        return self.data_on_cpu.untyped_storage()

    def __deepcopy__(self, memo: Any) -> "PretendTensor":
        copied = PretendTensor(self.data_on_cpu.clone())
        return torch.nn.Parameter(copied, self.requires_grad) if self._is_parameter else copied

    @property
    def _is_parameter(self) -> bool:
        return getattr(self, "_is_param", False)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "poisonshield":
            return _run_op(func, args)
        if _current:
            _count(_current[-1], func, args, kwargs)
        out = _compute(func, tree_map(_unwrap, args), tree_map(_unwrap, kwargs))
        changed = _changed(func, args, kwargs)
        if changed is not None:
            return changed
        return tree_map(_wrap, out)


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    """On the CPU; convolutions in float32, as oneDNN's in bfloat16 are slow, and leave parts of a gradient unwritten
    where the kernel is larger than the picture."""
    if func.overloadpacket not in (aten.convolution, aten.convolution_backward) or args[0].dtype != torch.bfloat16:
        return func(*args, **kwargs)
    wide = tree_map(lambda v: v.float() if isinstance(v, Tensor) else v, args)
    return tree_map(lambda v: v.bfloat16() if isinstance(v, Tensor) else v, func(*wide, **kwargs))


def _unwrap(value: Any) -> Any:
    return value.data_on_cpu if isinstance(value, PretendTensor) else value


def _wrap(value: Any) -> Any:
    return PretendTensor(value) if isinstance(value, Tensor) and not isinstance(value, PretendTensor) else value


def _changed(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator that writes into its arguments returns: those arguments; None for one that makes new tensors."""
    returns = func._schema.returns
    if not returns or not all(r.alias_info is not None and r.alias_info.is_write for r in returns):
        return None
    written = [
        kwargs.get(a.name, args[i] if i < len(args) else None)
        for i, a in enumerate(func._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]
    for tensor in tree_leaves(written):
        if isinstance(tensor, PretendTensor) and tensor.shape != tensor.data_on_cpu.shape:
            raise NotImplementedError(f"{func} changes a shape")
    return written[0] if len(returns) == 1 else tuple(written)


# What an operator costs


def _count(seen: Seen, func: Any, args: Any, kwargs: Any) -> None:
    name = func._schema.name.removeprefix("aten::")
    for what in _waits(func, args):
        seen.add("wait", what)
    hosts = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and not isinstance(t, PretendTensor)]
    if func is aten.copy_.default and hosts:
        _count_copy(seen, hosts[0], pinned_and_late=kwargs.get("non_blocking", len(args) > 2 and args[2]))
        return
    if any(t.dim() for t in hosts):
        raise RuntimeError(f"{name} got tensors of the host and of the device ({_lines()[0]}).")
    seen.add("launch", name, _launches(func, name, args))


def _waits(func: Any, args: Any) -> list[str]:
    packet = func.overloadpacket
    if packet in (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount, aten._unique2):
        return [packet.__name__]
    indices = args[1] if packet in (aten.index, aten.index_put, aten.index_put_) else ()
    return ["boolean index" for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8)]


def _count_copy(seen: Seen, host: Tensor, *, pinned_and_late: bool) -> None:
    seen.add("copy", "host and device")
    if not (pinned_and_late and id(host) in _pinned):
        seen.add("wait", "copy that is not pinned, or not non_blocking")


_FREE = ("empty", "new_empty", "empty_like", "_unsafe_view", "lift_fresh", "empty_strided", "_local_scalar_dense",
         "new_empty_strided", "_reshape_alias", "_version", "set_")  # fmt: skip
_MORE = {"nonzero": 3, "sort": 3, "topk": 2, "cumsum": 2, "index_put_": 3, "embedding_dense_backward": 4}
_TENSORS_OF_A_LAUNCH, _CHUNKS_OF_A_LAUNCH, _CHUNK = (110, 64, 48, 36, 30), 320, 65536  # multi_tensor_apply's


def _launches(func: Any, name: str, args: Any) -> int:
    """Kernels of one operator of torch; views and empty tensors have none."""
    returns = func._schema.returns
    is_view = returns and returns[0].alias_info is not None and not returns[0].alias_info.is_write
    if is_view or name in _FREE:
        return 0
    if name.startswith(("_foreach_", "_fused_")):
        lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
        depth = min(len(lists), len(_TENSORS_OF_A_LAUNCH))
        chunks = sum(math.ceil(t.numel() / _CHUNK) for t in lists[0])
        return max(math.ceil(len(lists[0]) / _TENSORS_OF_A_LAUNCH[depth - 1]), math.ceil(chunks / _CHUNKS_OF_A_LAUNCH))
    if name == "convolution_backward":
        return sum(args[-1])
    return _MORE.get(name, 1)


# The package's own operators


def _all_ops() -> dict[str, Op]:
    modules = [importlib.import_module(f"poisonshield.ops.{room}") for room in dispatch.rooms()]
    return {op.name: op for module in modules for op in vars(module).values() if isinstance(op, Op)}


class _Silent:
    """A Triton kernel that is launched and does nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: _current[-1].add("launch", self.name)


@contextmanager
def _silenced(module: Any) -> Iterator[None]:
    from triton.runtime.jit import KernelInterface

    kernels = [name for name, value in vars(module).items() if isinstance(value, KernelInterface)]
    with ExitStack() as stack:
        for name in kernels:
            stack.enter_context(mock.patch.object(module, name, _Silent(name)))
        yield


def _run_op(func: Any, args: Any) -> Any:
    """What the CPU computes, and what a GPU would have been asked for it."""
    name = func._schema.name.split("::")[1]
    op = _all_ops()[name]
    if _current:
        record = rebuild(op.arguments, args[:-1])
        triton = op.room._module("triton") if op.room.missing("triton", CUDA) is None else None
        fused = triton is not None and triton.refusal(name, record) is None
        _current[-1].ops[f"{name} on {'triton' if fused else 'reference'}"] += 1
        with _Host():  # which torch leaves while it hands a call over
            if fused:
                with _silenced(triton):
                    getattr(triton, name)(record)
            else:
                getattr(op.room._module("reference"), name)(tree_map(_copied, record))
    out = func(*tree_map(_unwrap, args[:-1]), "auto")
    return _changed(func, args, {}) or tree_map(_wrap, out)


def _copied(value: Any) -> Any:
    return PretendTensor(value.data_on_cpu.clone()) if isinstance(value, PretendTensor) else value


# What the host says of devices


_pinned: set[int] = set()
_kept: list[Tensor] = []  # so that no number of a pinned tensor is given away again


class _Host(TorchFunctionMode):
    """Calls that name a device: made on the CPU, and wrapped where they name the GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.pin_memory:
            _pinned.add(id(args[0]))
            _kept.append(args[0])
            return args[0]
        if func in (Tensor.tolist, Tensor.numpy) and isinstance(args[0], PretendTensor):
            _current[-1].add("wait", func.__name__)
            return func(args[0].data_on_cpu)
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._move(func, args, kwargs)
        if kwargs.get("device") is None or torch.device(kwargs["device"]).type != "cuda":
            return func(*args, **kwargs)
        kwargs["device"] = CPU
        made = func(*args, **kwargs)
        if isinstance(made, PretendTensor):
            return made
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            _count_copy(_current[-1], made, pinned_and_late=False)
        elif not func.__name__.startswith("empty"):
            _current[-1].add("launch", func.__name__)
        return PretendTensor(made)

    def _move(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Tensor.to and its kind: the device taken out, the rest done, the copy counted."""
        x, copy = args[0], kwargs.pop("copy", False)
        if func is Tensor.cpu:
            where, dtype, late, layout = CPU, None, False, None
        else:
            where, dtype, late, layout = torch._C._nn._parse_to(*args[1:], **kwargs)
        ours = isinstance(x, PretendTensor)
        if where is not None and ours != (where.type == "cuda"):
            _count_copy(_current[-1], x, pinned_and_late=late)
            x = x.data_on_cpu.clone() if ours else PretendTensor(x.detach().clone())
            copy = False
        if dtype is not None and dtype != x.dtype:
            x, copy = Tensor.to(x, dtype), False
        if layout not in (None, torch.preserve_format) and not x.is_contiguous(memory_format=layout):
            return x.clone(memory_format=layout)
        return x.clone() if copy else x


class PretendEvent:
    """A mark in the device's queue. To wait for it counts, although the device may have more to do behind it."""

    def record(self) -> None:
        """The mark is set."""

    def synchronize(self) -> None:
        """Wait until the device has come to the mark."""
        _current[-1].add("wait", "event")


def _on_gpu(group: Callable[..., Any]) -> Callable[..., Any]:
    """torch's grouping of tensors by device and dtype, which reads the device where it cannot be pretended."""
    return lambda *args, **kwargs: {(CUDA, dtype): rest for (_, dtype), rest in group(*args, **kwargs).items()}


@contextmanager
def pretend_device() -> Iterator[Seen]:
    """Inside, `cuda:0` is a place; gives what is seen there."""
    from torch.utils import _foreach_utils

    seen, autocast = Seen(), torch.autocast
    on_cpu = lambda kind, *args, **kwargs: autocast("cpu", *args, **kwargs)
    known = [*_foreach_utils._foreach_supported_types, PretendTensor]
    asked = torch.is_autocast_enabled
    clip = importlib.import_module("torch.nn.utils.clip_grad")
    by_device = _on_gpu(torch.optim.Optimizer._group_tensors_by_device_and_dtype)
    swaps = [
        mock.patch.object(torch.optim.Optimizer, "_group_tensors_by_device_and_dtype", staticmethod(by_device)),
        mock.patch.object(clip, "_group_tensors_by_device_and_dtype", _on_gpu(clip._group_tensors_by_device_and_dtype)),
        mock.patch.object(torch, "autocast", on_cpu),
        mock.patch.object(torch, "is_autocast_enabled", lambda kind="cpu": asked("cpu")),
        mock.patch.object(_foreach_utils, "_foreach_supported_types", known),
        mock.patch.object(torch.__future__, "get_swap_module_params_on_conversion", lambda: True),
        mock.patch.object(torch.cuda, "Event", PretendEvent),
        mock.patch.object(graphs, "record", seen.record),
        mock.patch.object(torch.cuda, "get_device_name", lambda device=None: "a pretend device"),
        mock.patch.object(torch.cuda, "max_memory_allocated", lambda device=None: 0),
    ]
    _current.append(seen)
    with ExitStack() as stack:
        for swap in swaps:
            stack.enter_context(swap)
        stack.enter_context(_Host())
        try:
            yield seen
        finally:
            _current.pop()
