"""Models: which VAE, denoiser and text encoder go together."""
