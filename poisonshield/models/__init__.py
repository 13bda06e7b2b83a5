"""Networks: encoders with their normalisation inside, heads, and batch norm over ranks."""
