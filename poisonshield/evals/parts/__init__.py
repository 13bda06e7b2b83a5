"""What evaluations share; the folder above holds evaluations alone, which are found by scanning it."""
