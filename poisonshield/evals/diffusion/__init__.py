"""Evaluations of learned words: one file each, found by scanning."""

from poisonshield.registry import Registry

EVALUATIONS = Registry("poisonshield.evals.diffusion", kind="evaluation of a word")
