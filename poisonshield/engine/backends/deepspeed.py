"""DeepSpeed, ZeRO 0 to 3; the only door to it. Its JSON is derived from ours and nothing of it is compiled.

What ours differs in, and why: bf16 is autocast (DeepSpeed's `torch_autocast`), not bf16 weights, because the latter
also turn buffers into bf16: batch statistics that stop moving and pixels normalized with eight bits. The learning rate
is set by the trainer. A method's whole step is one call of the engine; its inner loops run through submodules, since a
second call of the engine per backward fails at stages 0 to 2 and is silently wrong at stage 3.
"""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from poisonshield import collectives
from poisonshield.batch import Batch, StepOutput
from poisonshield.engine.backends.base import Backend
from poisonshield.engine.optim import OptimConfig, build_optimizer, set_lr
from poisonshield.engine.settings import EngineConfig
from poisonshield.engine.whole import (
    Saved,
    State,
    Whole,
    copy_of,
    is_piece,
    join_ranges,
    join_slices,
    join_states,
    keys_of,
    name_states,
    names_in_order,
    put_states,
    put_weights,
    slice_of,
)
from poisonshield.errors import BackendError, CheckpointError
from poisonshield.method import Method

_FOLDER, _TAG = "deepspeed", "state"
_BUCKET = 50_000_000  # elements sent at once; the default of 500 million is a buffer of 2 GB


def deepspeed_config(config: EngineConfig, optimizer: OptimConfig) -> dict[str, Any]:
    """The JSON that DeepSpeed gets. The micro batch size serves its own timers only: the stream decides batches."""
    optimizer.check_sharding(config.zero_stage)
    zero = {"stage": config.zero_stage, "reduce_bucket_size": _BUCKET}
    if config.zero_stage < 3:
        zero["allgather_bucket_size"] = _BUCKET
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.accumulate,
        "gradient_clipping": optimizer.clip_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 2**31,
    }


class DeepSpeed(Backend):
    """Shards optimiser (1), gradients (2) and weights (3). A sharded checkpoint is read as it is by as many ranks as
    wrote it, and whole by any others."""

    name: ClassVar[str] = "deepspeed"
    summary: ClassVar[str] = "ZeRO 0 to 3, on one process or on those that a launcher starts"
    packages: ClassVar[tuple[str, ...]] = ("deepspeed",)
    zero_stages: ClassVar[tuple[int, ...]] = (0, 1, 2, 3)
    drops_steps: ClassVar[bool] = False
    needs_group: ClassVar[bool] = True  # DeepSpeed keeps hold of the first group it sees; a second run needs that one

    def __init__(self, config: EngineConfig, optimizer: OptimConfig, device: torch.device) -> None:
        self.config, self.optim_config, self.device = config, optimizer, device
        self.json = deepspeed_config(config, optimizer)

    @classmethod
    def check(cls, engine: EngineConfig) -> None:
        """Raises ValueError for bf16 at stage 0."""
        if engine.fused_optimizer:
            raise ValueError("fused_optimizer is for backend: plain; deepspeed moves flat pieces. Leave it out.")
        if engine.precision == "bf16" and engine.zero_stage == 0:
            raise ValueError(
                "precision bf16 with deepspeed needs zero_stage 1, 2 or 3: stage 0 has no sharded float32 copy of the "
                "weights and drifts. Without sharding, backend: plain does the same work."
            )

    @classmethod
    def derived(cls, engine: EngineConfig, optimizer: OptimConfig) -> str | None:
        """The JSON that DeepSpeed gets."""
        return f"# DeepSpeed gets:\n{json.dumps(deepspeed_config(engine, optimizer), indent=2)}"

    @classmethod
    def prepare_process(cls, device: torch.device) -> None:
        """Tell DeepSpeed to use the CPU where we do; it reads this when it is first imported."""
        if device.type != "cuda":
            os.environ["DS_ACCELERATOR"] = "cpu"

    def describe(self) -> str:
        """Name and ZeRO stage."""
        return f"{self.name}, ZeRO {self.config.zero_stage}"

    def prepare(self, method: Method) -> None:
        """Hand method and optimiser to DeepSpeed."""
        scalars = [name for name, p in method.named_parameters() if p.dim() == 0]
        if scalars:  # deepspeed fails on them with a message about views
            raise BackendError(
                f"deepspeed takes no parameters without dimensions: {', '.join(scalars)} of {type(method).__name__}.\n"
                "  Give them the shape [1], or set engine.backend: plain."
            )
        deepspeed = _import_deepspeed()
        deepspeed.init_distributed(dist_backend="nccl" if self.device.type == "cuda" else "gloo", verbose=False)
        # Stages flatten weights anyway, and the first broadcast fails on channels-last ones.
        self.method = method.to(memory_format=torch.contiguous_format)
        trainable = [p for p in method.parameters() if p.requires_grad]
        optimizer = build_optimizer(method, self.optim_config)
        self.order = names_in_order(method, optimizer)  # before DeepSpeed makes it one of flat pieces
        # ZeRO 3 finds tensors in tuples and dicts only, and without them never gathers a method's own parameters again
        # for the backward. Its hooks run between these two.
        inner = [m for m in method.modules() if isinstance(m, Method)]
        for module in inner:
            module.register_forward_hook(_unpack_output)
        self.engine, *_ = deepspeed.initialize(
            model=method, model_parameters=trainable, optimizer=optimizer, config=self.json
        )
        for module in inner:
            module.register_forward_hook(_pack_output)
        self.engine.checkpoint_engine.load = _load_weights_only

    def forward_backward(self, batch: Batch, *, part: int = 0) -> StepOutput:
        """One call of the engine, one backward; DeepSpeed counts the parts of a step itself and divides by them."""
        output = self.engine(batch)
        self.engine.backward(output.loss)
        if part < self.config.accumulate - 1:
            self.engine.step()
        return StepOutput(output.loss.detach(), {k: v.detach() for k, v in output.metrics.items()})

    def clip(self) -> Tensor:
        """The norm of the gradients that lie on this rank; DeepSpeed clips by the global one inside its step."""
        if self.config.zero_stage == 0:
            gradients = [p.grad for p in self.method.parameters() if p.grad is not None]
        else:
            parts = self.engine.optimizer.averaged_gradients.values()
            gradients = [g for part in parts if part is not None for g in part if g is not None and g.numel()]
        return torch.nn.utils.get_total_norm(gradients).to(self.device)

    def step(
        self, lr: float, progress: float, *, constant_lr: float | None = None, unless: Tensor | None = None
    ) -> None:
        """One step of DeepSpeed's at this rate, then `after_step` with whole weights."""
        set_lr(self.engine.optimizer, lr, constant_lr)
        self.engine.step()
        if self.config.zero_stage < 3:
            self.method.after_step(progress)
            return
        # Weights are in pieces: averages and queues need them whole. Costs one all-gather of the method a step.
        import deepspeed

        inner = [m for m in self.method.modules() if isinstance(m, Method)]
        if any(type(m).after_step is not Method.after_step for m in inner):
            with deepspeed.zero.GatheredParameters(list(self.method.parameters()), modifier_rank=0):
                self.method.after_step(progress)

    def discard(self) -> None:
        """Raises BackendError: not possible here."""
        raise BackendError("deepspeed cannot drop a step whole: set engine.nonfinite: stop.")

    def save(self, folder: Path) -> None:
        """DeepSpeed's own checkpoint, each rank its part."""
        self.engine.save_checkpoint(str(folder / _FOLDER), tag=_TAG)

    def fits(self, saved: Saved) -> bool:
        """The same stage, and where it shards, the same number of ranks."""
        same_pieces = self.config.zero_stage == 0 or saved.world_size == collectives.world_size()
        return saved.backend == self.name and saved.zero_stage == self.config.zero_stage and same_pieces

    def load(self, folder: Path) -> None:
        """The same, each rank its part."""
        files = folder / _FOLDER
        path, _ = self.engine.load_checkpoint(str(files), tag=_TAG)
        if path is None:
            raise CheckpointError(f"DeepSpeed found nothing to load in {files}.")

    @classmethod
    def read_whole(cls, folder: Path, saved: Saved, order: Sequence[str]) -> Whole:
        """The pieces of all ranks put together."""
        cls.prepare_process(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        _import_deepspeed()
        files, stage, ranks = folder / _FOLDER / _TAG, saved.zero_stage, range(saved.world_size)
        names = [f"zero_pp_rank_{r}_mp_rank_00_" if stage == 3 else "mp_rank_00_" for r in ranks]
        models = [_load_weights_only(str(files / f"{name}model_states.pt")) for name in dict.fromkeys(names)]
        if stage == 0:
            return Whole(models[0]["module"], name_states(models[0]["optimizer"], order))
        pieces = [_load_weights_only(str(f))["optimizer_state_dict"] for f in _optimizer_files(files, ranks)]
        groups = models[0]["param_shapes"]
        if stage < 3:
            states = [rank["base_optimizer_state"]["state"] for rank in pieces]
            return Whole(models[0]["module"], join_states(groups, states, join_ranges))
        states = [rank["optimizer_state_dict"]["state"] for rank in pieces]
        return Whole(_join_weights(models, pieces), join_states(groups, states, join_slices))

    def load_whole(self, whole: Whole) -> None:
        """Weights into the method, and the flat tensors of this rank anew from them and from the states."""
        if self.config.zero_stage == 0:
            put_weights(self.method, whole.weights)
            put_states(self.engine.optimizer, whole.states, self.order)
            return
        import deepspeed

        cut = self.config.zero_stage == 3
        with deepspeed.zero.GatheredParameters(list(self.method.parameters()), modifier_rank=0, enabled=cut):
            put_weights(self.method, whole.weights)
        self.engine.optimizer.refresh_fp32_params()
        self._cut_states(whole.states)

    def _cut_states(self, states: dict[str, State]) -> None:
        """This rank's piece of every state, zero where a parameter has none."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        sharded = self.engine.optimizer
        if self.config.zero_stage < 3:
            members, flats = sharded.bit16_groups, sharded.single_partition_of_fp32_groups
        else:
            members, flats = sharded.fp16_groups, sharded.fp32_partitioned_groups_flat
        names = {parameter: name for name, parameter in self.method.named_parameters()}
        for parameters, flat in zip(members, flats, strict=True):
            shared = keys_of(states.get(names[p], {}) for p in parameters)
            sharded.optimizer.state[flat] = {
                key: torch.zeros_like(flat) if is_piece(value) else copy_of(value) for key, value in shared.items()
            }
        if self.config.zero_stage < 3:  # its parameters learn where their states lie
            sharded._hp_optimizer_states_linked = False
            sharded._lazy_init_hp_params_optimizer_state()
        rank = collectives.rank()
        for parameter in (p for parameters in members for p in parameters):
            for key, value in states.get(names[parameter], {}).items():
                if is_piece(value) and self.config.zero_stage < 3:
                    safe_set_full_optimizer_state(parameter, value, key)
                elif is_piece(value):  # its setter of whole tensors fails where they do not divide by the ranks
                    safe_set_local_optimizer_state(parameter, slice_of(value, parameter.ds_tensor.numel(), rank), key)

    def state_dict(self) -> dict[str, Tensor]:
        """Pieces gathered one tensor at a time."""
        import deepspeed

        whole = {}
        for name, value in self.method.state_dict(keep_vars=True).items():
            with deepspeed.zero.GatheredParameters([value], enabled=hasattr(value, "ds_id")):
                if collectives.rank() == 0:
                    whole[name] = value.detach().cpu().clone()
        return whole


def _unpack_output(_module: Method, _inputs: Any, output: StepOutput) -> tuple[Tensor, dict[str, Tensor]]:
    """A forward hook: the output as a tuple and a dict, in which ZeRO 3 finds tensors."""
    return output.loss, output.metrics


def _pack_output(_module: Method, _inputs: Any, output: tuple[Tensor, dict[str, Tensor]]) -> StepOutput:
    """A forward hook: the output as a method gives it, after ZeRO 3 has seen it."""
    return StepOutput(*output)


def _import_deepspeed() -> Any:
    """deepspeed, quiet, and without the shared-memory op that it would otherwise compile on the CPU."""
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as err:
        raise BackendError(
            "engine.backend is deepspeed but deepspeed is not installed.\n"
            "  pip install '.[deepspeed]', or set engine.backend: plain."
        ) from err
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("DeepSpeed").addFilter(_is_worth_saying)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _is_worth_saying(record: logging.LogRecord) -> bool:
    """False for "ZeRO with an untested optimizer": SGD and AdamW are tested with every stage here."""
    return "untested optimizer" not in record.getMessage()


def _optimizer_files(files: Path, ranks: Sequence[int]) -> list[Path]:
    """What each rank wrote of its optimiser, in the order of ranks."""
    return [files / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in ranks]


def _join_weights(models: list[dict[str, Any]], pieces: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The method's state at stage 3: buffers are whole, and trained and frozen parameters in slices."""
    first = models[0]
    weights = {name: first["module"][name] for name in first["buffer_names"]}
    for i, shapes in enumerate(first["param_shapes"]):
        weights |= join_slices(shapes, [rank["fp32_flat_groups"][i] for rank in pieces])
    for name, shape in (first["frozen_param_shapes"] or {}).items():
        weights |= join_slices({name: shape}, [model["frozen_param_fragments"][name].flatten() for model in models])
    return weights | {copy: weights[name] for copy, name in first["shared_params"].items()}


def _load_weights_only(path: str, map_location: Any = None) -> Any:
    """A checkpoint file of DeepSpeed's, refused if it holds more than tensors, plain values and DeepSpeed's records."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    records = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    with torch.serialization.safe_globals(records):
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except Exception as err:  # torch raises many kinds; none of them names the file
            raise CheckpointError(f"{path} cannot be read as tensors and plain values: {err}") from err
