"""Hydra config that comes with the plugin: `model=diffusers` reads model/diffusers.yaml."""
