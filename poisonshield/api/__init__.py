"""What Python users call: every command's work as a function, and words learned without a config file."""

from poisonshield.api.experiments import evaluate, grid_table, poison, resolve_config, train
from poisonshield.api.words import train_many, train_textual_inversion, words

__all__ = [
    "evaluate",
    "grid_table",
    "poison",
    "resolve_config",
    "train",
    "train_many",
    "train_textual_inversion",
    "words",
]
