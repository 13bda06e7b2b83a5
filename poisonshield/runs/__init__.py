"""Experiments: one file a kind, and what kinds share in parts/."""

from poisonshield.runs.base import Experiment, read_experiment, read_finished

__all__ = ["Experiment", "read_experiment", "read_finished"]
