"""A small latent diffusion model of coloured shapes: latentmill's embedded default."""
