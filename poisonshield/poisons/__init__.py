"""Poisons: one file each; the file's name is the poison's name."""
