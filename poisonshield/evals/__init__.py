"""Evaluations: one file each, on features or class scores of clean test images."""
