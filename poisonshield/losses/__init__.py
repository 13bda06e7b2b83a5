"""Losses: one file each, plain functions of embeddings."""
