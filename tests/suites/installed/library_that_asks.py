"""A library that asks for a GPU while it is imported."""

import torch
from torch.cuda import is_available

THERE = is_available() and torch.cuda.device_count() > 0


def device():
    return "cuda" if is_available() else "cpu"
