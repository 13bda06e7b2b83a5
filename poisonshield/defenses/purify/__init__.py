"""What purifiers share: levels of 8 bits, and purifiers by name."""
