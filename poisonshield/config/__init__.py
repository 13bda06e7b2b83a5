"""YAML -> checked settings. Every `Config` of the project derives from `Settings`; budgets are typed `Pixels`, so that
`8/255` is accepted and `8` is refused with a hint.
"""

from poisonshield.config.check import Checker, Choice, From, dump, pick
from poisonshield.config.tree import Tree, load_tree
from poisonshield.config.types import Number, Pixels, Settings

__all__ = ["Checker", "Choice", "From", "Number", "Pixels", "Settings", "Tree", "dump", "load_tree", "pick"]
