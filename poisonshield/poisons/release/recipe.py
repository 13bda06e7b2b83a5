"""A poison as a file of some kilobytes: name, settings and seed as text, what it learned as tensors.

`lsp.poison.safetensors` gives the same pixels as the shards it was written beside, applied while loading. safetensors
holds numbers and text only, so a recipe from a stranger can run no code.
"""

import json
import logging
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from poisonshield.errors import BudgetError, ConfigError, DataError
from poisonshield.files import write_whole
from poisonshield.poisons.base import KeyedPoison
from poisonshield.poisons.release.measured import refuse_broken
from poisonshield.registry import Registry

log = logging.getLogger(__name__)

ENDING = ".poison.safetensors"
FORMAT = "poisonshield-recipe/1"


class Header(BaseModel):
    """The text of a recipe."""

    model_config = ConfigDict(extra="forbid")

    format: str = Field(description="Of the file, with its version.")
    name: str = Field(description="The poison's.")
    config: dict = Field(description="Its settings.")
    seed: int = Field(ge=0, lt=2**64, description="Of everything that it draws.")
    classes: list[str] = Field(description="Names, label 0 first.")
    image_size: tuple[int, int] = Field(description="(H, W) of the pictures that it fits.")
    data: str = Field(description="Digest of the set that it was made for.")


def save_recipe(poison: KeyedPoison, path: str | Path, *, classes: tuple[str, ...], data: str) -> Path:
    """Write the poison to `path`. classes: names, label 0 first; data: digest of the set it was made for."""
    header = Header(
        format=FORMAT,
        name=poison.name,
        config=poison.config.model_dump(mode="json"),
        seed=poison.seed,
        classes=list(classes),
        image_size=poison.image_size,
        data=data,
    )
    state = {k: v.detach().cpu().contiguous() for k, v in poison.state_dict().items()}
    path = Path(path)
    write_whole(path, save(state, metadata={"poison": header.model_dump_json()}))
    return path


def read_recipe(path: str | Path) -> tuple[Header, dict[str, Tensor]]:
    """What a recipe file says, and its tensors. Raises DataError if it is none, or not finite."""
    if not Path(path).is_file():
        raise DataError(f"{path} is no plain file, so it is no poison recipe. Write one with `poisonshield poison`.")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = Header.model_validate(json.loads((file.metadata() or {})["poison"]))
            state = {k: file.get_tensor(k) for k in file.keys()}
    except (OSError, KeyError, ValueError, ValidationError, SafetensorError, RecursionError) as err:
        raise DataError(f"{path} is not a poison recipe ({err}). Write one with `poisonshield poison`.") from err
    if header.format != FORMAT:
        raise DataError(f"{path} is a recipe of format {header.format}, {FORMAT} was wanted. Write it again.")
    for name, value in state.items():
        if not value.isfinite().all():
            raise DataError(
                f"{path} is damaged or made to harm: its {name} holds numbers that are not finite.\n"
                "  Training on it would see black pictures. Get the file again, or write it with `poisonshield poison`."
            )
    return header, state


def load_recipe(
    path: str | Path, *, classes: tuple[str, ...], image_size: tuple[int, int] | None, data: str | None = None
) -> KeyedPoison:
    """The poison of a recipe, ready to apply to a set of these classes and image size.

    data: digest of that set; another one than the recipe's is warned of. Raises DataError if the file is no recipe, or
    was made for other classes (names or order) or another image size, BudgetError if its tensors change a picture by
    more than its settings say.
    """
    header, state = read_recipe(path)
    if data is not None and data != header.data:
        log.warning("%s was made for another data set; what it chose by looking at pixels may not fit this one.", path)
    if tuple(header.classes) != tuple(classes):
        raise DataError(
            f"{path} was made for {len(header.classes)} classes ({', '.join(header.classes[:3])}, ...), the data has "
            f"{len(classes)} ({', '.join(classes[:3])}, ...), or in another order.\n"
            "  Its patterns belong to labels: import the data with the same class list, or write the recipe again."
        )
    if image_size is None or tuple(header.image_size) != tuple(image_size):
        got = "several sizes" if image_size is None else f"{image_size[0]}x{image_size[1]}"
        h, w = header.image_size
        raise DataError(f"{path} was made for images of {h}x{w}, the data has {got}. Import the data with --size.")
    try:
        cls: Any = Registry("poisonshield.poisons", kind="poison").get(header.name)
        config = cls.Config.model_validate(header.config)
        poison = cls(config, num_classes=len(classes), image_size=image_size, seed=header.seed)
        poison.load_state_dict(state)
    except (ConfigError, ValidationError, RuntimeError) as err:
        raise DataError(f"{path} does not fit this version of poisonshield: {err}") from err
    try:
        refuse_broken(poison)
    except BudgetError as err:
        raise BudgetError(f"{path}: {err}") from err
    return poison
