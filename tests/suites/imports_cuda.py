"""A plugin's module that asks for a GPU while it is imported, through a function of its own."""

import torch
from tests.suites import wrong_vaes


def best_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


DEVICE = best_device()


class AtImport(wrong_vaes.Right):
    pass
