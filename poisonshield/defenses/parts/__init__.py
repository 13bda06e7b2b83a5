"""What defenses share that change a classifier's training step."""
