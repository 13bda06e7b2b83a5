"""A finished run's encoder into another run's, strictly: every tensor has its place or an error says which has none.

Methods and defenses nest, so names are read from the right: `encoder.` alone or inside any number of `method.` is what
was trained, `target.parts.0.` the slow copy that followed it.
"""

import json
import re
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from poisonshield.errors import CheckpointError, ConfigError

Branch = Literal["online", "target"]

_BRANCHES = {
    "online": re.compile(r"(?:method\.)*encoder\.(.+)"),
    "target": re.compile(r"(?:method\.)*target\.parts\.0\.(.+)"),
}
_NO_MATTER = {"batch_norm", "views_together", "freeze_patch", "position"}  # how it was trained, not what it computes


@torch.no_grad()
def load_encoder(encoder: nn.Module, path: str | Path, *, branch: Branch = "online") -> None:
    """Fills `encoder` from a run folder, its export/method.safetensors (joint ones too) or its backbone.safetensors.

    Raises ConfigError if there is no such file or it holds another network, CheckpointError if it cannot be read.
    Does nothing to an encoder without tensors, around which settings are checked before any file is there.
    """
    wanted = encoder.state_dict()
    if not wanted:
        return
    path = Path(path)
    file = path / "export" / "method.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            f"init_from: {file} does not exist. Train that run to its end, or give the path of a run folder or of its "
            "export/method.safetensors or export/backbone.safetensors."
        )
    made, whole, state = _read(file, branch)
    if not whole:
        # A file of a backbone alone lacks the mean and deviation, which no training changes.
        own = {name: value for name, value in wanted.items() if not name.startswith("backbone.")}
        state = own | {f"backbone.{name}": value for name, value in state.items()}
    _refuse_other_model(file, made, getattr(encoder, "config", None))
    _refuse_other_tensors(file, wanted, state)
    encoder.load_state_dict(state, strict=True)


def _read(file: Path, branch: Branch) -> tuple[dict[str, Any], bool, dict[str, Tensor]]:
    """The `model` settings that a file was made with ({} if not said), whether it holds a method, and the encoder.

    A file of a backbone alone has timm's names, and comes back as it is.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            made = json.loads((stored.metadata() or {}).get("model", "{}"))
            if not isinstance(made, dict):
                raise TypeError(f"its `model` is a {type(made).__name__}, not a table of settings")
            matches = {key: _BRANCHES[branch].fullmatch(key) for key in stored.keys()}
            chosen = {match[1]: key for key, match in matches.items() if match}
            if not chosen and branch == "target":
                raise ConfigError(
                    f"init_from: {file} has no target branch: methods with a momentum target write one, and only to "
                    "method.safetensors. Use branch: online."
                )
            names = chosen or {key: key for key in matches}
            return made, bool(chosen), {name: stored.get_tensor(key) for name, key in names.items()}
    except (SafetensorError, OSError, json.JSONDecodeError, RecursionError, TypeError) as err:
        raise CheckpointError(f"init_from: {file} cannot be read as safetensors: {err}") from err


def _refuse_other_model(file: Path, made: dict[str, Any], config: Any) -> None:
    """Settings such as the stem's padding change what is computed and no tensor's shape."""
    ours = {} if config is None else config.model_dump(mode="json")
    other = {k for k in made.keys() & ours.keys() - _NO_MATTER if made[k] != ours[k]}
    if other:
        told = ", ".join(f"model.{k} {made[k]!r} (here {ours[k]!r})" for k in sorted(other))
        raise ConfigError(f"init_from: {file} was trained with {told}. Give this run the same model section.")


def _refuse_other_tensors(file: Path, wanted: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    problems = {
        "lacks": sorted(wanted.keys() - state.keys()),
        "also holds": sorted(state.keys() - wanted.keys()),
        "has other shapes of": [k for k in wanted if k in state and state[k].shape != wanted[k].shape],
    }
    told = [f"{what} {_some(names)}" for what, names in problems.items() if names]
    if told:
        raise ConfigError(
            f"init_from: {file} does not fit this encoder: it {'; it '.join(told)}.\n"
            "  Give this run the model section of that one, or name another file."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
