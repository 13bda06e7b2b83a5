"""Learned words as files that other tools read: diffusers' and kohya's safetensors, and the web UI's .pt.

Only tensors and plain values are ever read. A .pt is a pickle, which can run code when it is opened, so it goes through
torch's restricted loader and anything beyond tensors is refused. What a file is, is seen from its content.
"""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from poisonshield.errors import ConfigError, DataError, ShapeError

Form = Literal["diffusers", "a1111", "kohya"]

_ENDINGS = {"diffusers": ".safetensors", "a1111": ".pt", "kohya": ".safetensors"}


@dataclass(frozen=True, eq=False)
class Learned:
    """A word and its vectors, float32 [k, d] on the CPU; k text tokens wide. Raises ShapeError for other tensors."""

    token: str
    vectors: Tensor

    def __post_init__(self) -> None:
        v = self.vectors
        if v.dim() != 2 or v.shape[0] < 1 or v.shape[1] < 1 or not v.is_floating_point():
            raise ShapeError(f"the vectors of {self.token!r} are {v.dtype} {tuple(v.shape)}; floats [k, d] are wanted.")
        # The record is frozen; its own constructor is the one place that may still set a field.
        object.__setattr__(self, "vectors", v.detach().to("cpu", torch.float32).contiguous())


def save_embedding(learned: Learned, path: str | Path, form: Form = "diffusers") -> None:
    """Writes the word whole or not at all, over a file of that name.

    diffusers: .safetensors {token: [d], or [k, d] for k > 1}, for `load_textual_inversion`. a1111: .pt with
    string_to_param. kohya: .safetensors {"emb_params": [k, d]}; readers take the word from the file's name, ours from
    its metadata. Raises ConfigError for another form or ending.
    """
    path = Path(path)
    if form not in _ENDINGS:
        raise ConfigError(f"{form!r} is no form of embedding; write {', '.join(_ENDINGS)}.")
    if path.suffix != _ENDINGS[form]:
        raise ConfigError(f"{path}: the {form} form is written to a file that ends in {_ENDINGS[form]}.")
    vectors = learned.vectors.clone()
    if form == "a1111":
        file = io.BytesIO()
        # 265 is "*" in CLIP's vocabulary, the word that its own training scripts put there
        content = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": learned.token, "step": 0}
        torch.save(content, file)
        data = file.getvalue()
    elif form == "kohya":
        data = safetensors_bytes({"emb_params": vectors}, metadata={"token": learned.token})
    else:
        # As diffusers writes it: a word of one vector has no first dimension.
        data = safetensors_bytes({learned.token: vectors[0] if len(vectors) == 1 else vectors})
    _write(path, data)


def load_embedding(path: str | Path, token: str | None = None, *, width: int | None = None) -> Learned:
    """The word of a file in any of the three forms, or of a .bin as older diffusers wrote it.

    token: what to call it, by default what the file says, else its name; of several words in a file, the one to take.
    width: the d that is wanted. Raises DataError naming the file if it is not whole, holds more than tensors and plain
    values, is no embedding, or has other shapes.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist. Give the file of a learned embedding (.safetensors, .pt or .bin).")
    content, named = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}; an embedding file holds a table of tensors.")
    vectors: Any
    word: Any
    if "string_to_param" in content:
        form, vectors, word = "a1111", _a1111(path, content["string_to_param"]), content.get("name")
    elif "emb_params" in content:
        form, vectors, word = "kohya", content["emb_params"], named
    else:
        form, (word, vectors) = "diffusers", _only_word(path, content, token)
    _check_vectors(f"{path} ({form} form)", vectors)
    if width is not None and vectors.shape[-1] != width:
        raise DataError(
            f"{path}: its vectors are {vectors.shape[-1]} wide and {width} is wanted. "
            "It was learned for another text encoder."
        )
    found = word if isinstance(word, str) and word else path.stem
    return Learned(token or found, vectors.reshape(-1, vectors.shape[-1]))


def _check_vectors(where: str, vectors: Any) -> None:
    """Raises DataError unless these are finite floats [d] or [k, d]."""
    if not isinstance(vectors, Tensor) or vectors.layout != torch.strided or not vectors.is_floating_point():
        given = f"{vectors.dtype} {vectors.layout}" if isinstance(vectors, Tensor) else type(vectors).__name__
        raise DataError(f"{where}: the vectors are {given}; a dense tensor of floats is wanted.")
    if vectors.dim() not in (1, 2) or 0 in vectors.shape:
        raise DataError(f"{where}: the vectors have shape {list(vectors.shape)}; [d] or [k, d] is wanted.")
    if not bool(torch.isfinite(vectors).all()):
        raise DataError(f"{where}: the vectors are not finite. Train the word again.")


def _a1111(path: Path, params: Any) -> Any:
    if not isinstance(params, dict) or len(params) != 1:
        raise DataError(f'{path}: string_to_param must be a table of one tensor, under "*".')
    return next(iter(params.values()))


def _only_word(path: Path, content: dict[str, Any], token: str | None) -> tuple[str, Any]:
    """The entry of a {token: vectors} table that was asked for."""
    words = [k for k in content if isinstance(k, str)]
    if len(content) == 1 and words:
        return words[0], content[words[0]]
    if token in words:
        return token, content[token]
    names = ", ".join(repr(w) for w in words[:6]) or "none"
    raise DataError(
        f"{path} has {len(content)} entries ({names}); the file of one learned word is wanted.\n"
        "  If it holds several words, say which by `token`; files for two text encoders are not read."
    )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors, and the word that the metadata names, if any."""
    try:
        with safe_open(path, framework="pt") as stored:
            return {k: stored.get_tensor(k) for k in stored.keys()}, (stored.metadata() or {}).get("token")
    except (SafetensorError, OSError) as err:
        raise DataError(f"{path} cannot be read as safetensors: {err}. Copy it again from its source.") from err


def _read_pickled(path: Path) -> tuple[Any, None]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True), None
    except Exception as err:  # a damaged or hostile pickle may fail in any type; nothing of it has been executed
        reason = str(err).strip().split("\n")[0]
        raise DataError(
            f"{path} was not read: it is damaged, or holds more than tensors and plain values, and such files can run "
            f"code when they are opened.\n  Ask for it as .safetensors. (torch says: {reason})"
        ) from err


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own, since two runs may write the same word at once.
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            # On the disk before the rename is, or a crash could leave an empty file of the right name.
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
