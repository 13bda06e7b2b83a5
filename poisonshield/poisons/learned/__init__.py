"""What poisons share that are trained: the pictures, the surrogate, levels by sample or class, and going on."""
