"""Defenses for diffusion models: one file each; the file's name is the defense's name."""
