"""The configs that ship with the package, known by name: `defend/vespr_in100`.

setup.py copies them into an installed package, as poisonshield/configs; a checkout has them beside the package.
"""

import difflib
from pathlib import Path

from poisonshield.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]


def configs_folder() -> Path:
    """The folder of the shipped configs. Raises ConfigError for an installation that lost it."""
    places = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
    for place in places:
        if (place / "defend").is_dir():
            return place
    raise ConfigError(f"the shipped configs are neither in {places[0]} nor in {places[1]}. Install the package again.")


def shipped_configs() -> list[str]:
    """The names of all shipped configs, sorted: paths below their folder without `.yaml`."""
    folder = configs_folder()
    return sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml"))


def find_config(name_or_path: str | Path) -> Path:
    """The file that this path leads to, else the shipped config of this name.

    `defend/vespr_in100`, `defend/vespr_in100.yaml` and `configs/defend/vespr_in100.yaml` name the same file in
    every working folder. Raises ConfigError with the nearest shipped names.
    """
    path = Path(name_or_path)
    if is_there(path):
        return path
    name = path.as_posix().removeprefix("configs/").removesuffix(".yaml")
    known = shipped_configs()
    if name in known:
        return configs_folder() / f"{name}.yaml"
    if path.is_dir():
        raise ConfigError(
            f"{name_or_path} is a folder; a config is wanted, which says what is done with it.\n"
            f"  Images to train a classifier on: poisonshield data import {name_or_path} --out DATA, then\n"
            "  poisonshield train defend/vespr_own data.train=DATA.\n"
            f"  Photos to learn a word from: poisonshield train invert/szt data.train={name_or_path}."
        )
    near = _nearest(name, known)
    hint = f" Did you mean {' or '.join(near)}?" if near else f"  Shipped: {', '.join(known)}"
    raise ConfigError(
        f"{name_or_path} does not exist, and no shipped config has that name.{hint}\n"
        "  Give the path of a YAML file or the name of a shipped config, for example defend/vespr_cifar10_mini."
    )


def is_there(path: Path) -> bool:
    """Whether something other than a folder has this path; a pipe or a device is refused where it is read."""
    try:
        return path.exists() and not path.is_dir()
    except (OSError, ValueError):  # a name that no disk takes
        return False


def _nearest(name: str, known: list[str]) -> list[str]:
    """Up to three names that are near; where none is, those whose last part is."""
    near = difflib.get_close_matches(name, known, n=3)
    if near:
        return near
    last_parts = {k.rpartition("/")[2] for k in known}
    close = difflib.get_close_matches(name.rpartition("/")[2], last_parts, n=3)
    return [k for c in close for k in known if k.rpartition("/")[2] == c]
