"""YAML -> checked settings. Every `Config` of the project derives from `Settings`; budgets are typed `Pixels`, so that
`8/255` is accepted and `8` is refused with a hint.
"""

from poisonshield.config.check import Checker, Choice, From, dump, pick
from poisonshield.config.shipped import configs_folder, find_config, shipped_configs
from poisonshield.config.tree import Tree, load_tree
from poisonshield.config.types import Number, Pixels, Settings

__all__ = [
    "Checker", "Choice", "From", "Number", "Pixels", "Settings", "Tree", "configs_folder", "dump", "find_config",
    "load_tree", "pick", "shipped_configs",
]  # fmt: skip
