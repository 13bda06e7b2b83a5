"""Evaluations of classifiers and encoders: one file each, found by scanning. Those of words are in `diffusion`."""

from poisonshield.registry import Registry

EVALUATIONS = Registry("poisonshield.evals", kind="evaluation")
