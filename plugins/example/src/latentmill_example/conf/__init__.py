"""Hydra config that comes with the plugin: `vae=patches` reads vae/patches.yaml."""
