"""Methods on latent diffusion models: their training, and textual inversion."""
