"""The attack that every diffusion poison shares: pictures, tiles, draws, steps and states."""
