"""Hydra config groups of the framework; installed as ``latentmill.conf``."""
