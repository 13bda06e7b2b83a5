"""Attacks: one file each. An attack sees an objective (one loss per sample), never a model."""

from poisonshield.attacks.base import Attack, Objective
from poisonshield.attacks.parts.budgets import L1, L2, Budget, ChannelLinf, Linf, budget
from poisonshield.attacks.parts.memory import ClassMemory
from poisonshield.attacks.parts.settings import AttackConfig
from poisonshield.attacks.parts.stats import batch_stats, frozen_stats
from poisonshield.attacks.pgd import PGD

__all__ = [
    "L1",
    "L2",
    "PGD",
    "Attack",
    "AttackConfig",
    "Budget",
    "ChannelLinf",
    "ClassMemory",
    "Linf",
    "Objective",
    "batch_stats",
    "budget",
    "frozen_stats",
]
