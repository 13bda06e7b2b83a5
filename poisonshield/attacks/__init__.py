"""Attacks: one file each, found by name in `ATTACKS`. An attack sees an objective (one loss per sample), never a model.

What is no attack lies in `parts/`.
"""

from poisonshield.attacks.apgd import APGD
from poisonshield.attacks.base import Attack, Objective, Repeated, Success
from poisonshield.attacks.fgsm import FGSM
from poisonshield.attacks.parts.budgets import L1, L2, Budget, ChannelLinf, Linf, budget
from poisonshield.attacks.parts.memory import ClassMemory
from poisonshield.attacks.parts.settings import ATTACKS, AttackChoice, AttackConfig
from poisonshield.attacks.parts.stats import batch_stats, frozen_stats
from poisonshield.attacks.pgd import PGD

__all__ = [
    "APGD",
    "ATTACKS",
    "FGSM",
    "L1",
    "L2",
    "PGD",
    "Attack",
    "AttackChoice",
    "AttackConfig",
    "Budget",
    "ChannelLinf",
    "ClassMemory",
    "Linf",
    "Objective",
    "Repeated",
    "Success",
    "batch_stats",
    "budget",
    "frozen_stats",
]
