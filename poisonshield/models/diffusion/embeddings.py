"""Learned words as files that other tools read: diffusers' and kohya's safetensors, and the web UI's .pt.

Only tensors and plain values are ever read. A .pt is a pickle, which can run code when it is opened, so it goes through
torch's restricted loader and anything beyond tensors is refused (see pickles.py). What a file is, is seen from its
content.
"""

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from poisonshield.errors import ConfigError, DataError, ShapeError
from poisonshield.files import read_bounded, tell_of_disk, write_whole
from poisonshield.models.diffusion.pickles import load_pickled

Form = Literal["diffusers", "a1111", "kohya"]

MAX_BYTES = 2**26
"""Of an embedding's file: 64 MiB, some thousand times as much as a word has."""

_MAX_HEADER = 2**20  # bytes of what a safetensors file says of its tensors

FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "Stable Diffusion XL's second text encoder"}
"""Whose words are so wide."""

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
        # 265 is "*" in CLIP's vocabulary, the word that its own training scripts put there
        content = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": learned.token, "step": 0}
        data = _web_ui_bytes(content)
    elif form == "kohya":
        data = safetensors_bytes({"emb_params": vectors}, metadata={"token": learned.token})
    else:
        # As diffusers writes it: a word of one vector has no first dimension.
        data = safetensors_bytes({learned.token: vectors[0] if len(vectors) == 1 else vectors})
    with tell_of_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data)


def load_embedding(path: str | Path, token: str | None = None, *, width: int | None = None) -> Learned:
    """The word of a file in any of the three forms, or of a .bin as older diffusers wrote it.

    token: what to call it, by default what the file says, else its name; of several words in a file, the one to take.
    width: the d that is wanted. Raises DataError naming the file if it is not whole, holds more than tensors and plain
    values, is no embedding, or has other shapes.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist. Give the file of a learned embedding (.safetensors, .pt or .bin).")
    data = read_bounded(path, max_bytes=MAX_BYTES, what="embedding")
    content: Any
    named: str | None = None
    if path.suffix == ".safetensors":
        content, named = _read_safetensors(path, data)
    else:
        content = load_pickled(data, name=str(path))
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
            f"{path}: its vectors are {vectors.shape[-1]} wide{_of_family(vectors.shape[-1])} and {width}"
            f"{_of_family(width)} is wanted. It was learned for another text encoder."
        )
    found = word if isinstance(word, str) and word else path.stem
    if not found.isprintable():
        raise DataError(f"{path} calls its word {found!r}, which is no text to print. Give it another name by `token`.")
    return Learned(token or found, vectors.reshape(-1, vectors.shape[-1]))


def _of_family(width: int) -> str:
    return f" ({FAMILIES[width]})" if width in FAMILIES else ""


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
        "  If it holds several words, say which by `token`; files for two text encoders (Stable Diffusion XL) are not "
        "read."
    )


def _read_safetensors(path: Path, data: bytes) -> tuple[dict[str, Tensor], str | None]:
    """The tensors, and the word that the metadata names, if any."""
    size = int.from_bytes(data[:8], "little")
    if size > min(_MAX_HEADER, len(data)):
        raise DataError(
            f"{path} cannot be read as safetensors: its header claims {size:,} bytes, of a file of {len(data):,}.\n"
            "  Copy it again from its source."
        )
    try:
        header = json.loads(data[8 : 8 + size])
        return dict(sorted(tensors_of(data).items())), (header.get("__metadata__") or {}).get("token")
    except (SafetensorError, ValueError, KeyError, AttributeError, RecursionError) as err:
        raise DataError(f"{path} cannot be read as safetensors: {err}. Copy it again from its source.") from err


def _web_ui_bytes(content: dict[str, Any]) -> bytes:
    """What torch.save writes, with those members alone that every version of the web UI's check lets pass.

    It names data.pkl, data/<number> and version; torch adds others from 2.1 on, and the older check refuses the file.
    """
    saved, out = io.BytesIO(), io.BytesIO()
    torch.save(content, saved)
    with zipfile.ZipFile(saved) as given, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as kept:
        for name in given.namelist():
            inside = name.partition("/")[2]
            if inside in ("data.pkl", "version") or inside.startswith("data/"):
                kept.writestr(zipfile.ZipInfo(f"archive/{inside}"), given.read(name))
    return out.getvalue()
