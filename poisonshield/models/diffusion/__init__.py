"""The frozen pipeline of latent diffusion, and what is read off it."""
