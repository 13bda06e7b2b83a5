"""poisonshield: train safely on data that may be poisoned, and poison such data to test that you do."""

__version__ = "0.1.0"
