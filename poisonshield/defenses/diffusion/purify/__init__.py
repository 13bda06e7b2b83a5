"""What purifiers and backgrounds for diffusion models share."""
