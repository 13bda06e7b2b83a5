"""Defenses: one file each; the file's name is the defense's name."""
