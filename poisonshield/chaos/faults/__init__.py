"""What may happen to a run: one file each, found by scanning."""
