"""Attacks: one file each. An attack sees an objective (one loss per sample), never a model."""

from poisonshield.attacks.base import Attack, Objective, frozen_stats
from poisonshield.attacks.budgets import L2, Budget, Linf, budget
from poisonshield.attacks.pgd import PGD

__all__ = ["L2", "PGD", "Attack", "Budget", "Linf", "Objective", "budget", "frozen_stats"]
