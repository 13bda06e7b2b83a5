"""Poisons for photographs that a latent diffusion model would learn from: one file each, one engine for all.

`Registry("poisonshield.poisons.diffusion", kind="diffusion poison")` finds them by file name.
Radii are in 8-bit levels.
"""
