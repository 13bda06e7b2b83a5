"""What experiments are put together from."""
