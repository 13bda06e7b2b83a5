"""Networks: encoders with their normalization inside, heads, and batch norm over ranks."""
