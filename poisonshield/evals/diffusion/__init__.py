"""What is measured of learned words and of poisoned pictures."""
