"""Hugging Face diffusers' models as latentmill plugins: VAEs, denoisers, text encoders and the scheduler that a model names."""
