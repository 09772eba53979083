"""What diffusers and transformers are asked for, and what is checked of the weights that they load."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from latentmill.text import one_line
from latentmill_diffusers import messages as messages  # its filters, wherever the libraries are used

MODEL_DTYPES = ("float32", "float16", "bfloat16")
CAPTION_CLEANERS = ("beautifulsoup4", "ftfy")
"""What diffusers cleans captions with, where a pipeline's ``clean_caption`` asks for it; without one of them it doesn't, and says nothing."""


def dtype_of(name: str) -> torch.dtype:
    """The dtype of that name. Raises ValueError."""
    if name not in MODEL_DTYPES:
        raise ValueError(f"dtype must be {', '.join(MODEL_DTYPES)}, not {name!r}")
    found: torch.dtype = getattr(torch, name)
    return found


def part_class(library: str, name: str) -> Any:
    """A part's class, as ``model_index.json`` names it. Raises ValueError if it isn't diffusers' or transformers'."""
    import diffusers
    import transformers

    home = {"diffusers": diffusers, "transformers": transformers}.get(library)
    found = getattr(home or getattr(diffusers.pipelines, library, None), name, None)
    if found is None:
        raise ValueError(f"model_index.json names {library}.{name}, which is neither in diffusers nor in transformers")
    if type(found).__name__ == "DummyObject":  # stands there for a class that would need another package
        raise ValueError(f"{name} needs {' and '.join(found._backends)}: pip install {' '.join(found._backends)}")
    return found


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Whatever goes wrong with weights, as a ValueError of one line that says where."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except KeyError as error:  # of a converter of names
        raise ValueError(f"{path} can't be loaded: it has no {error.args[0]}") from error
    except Exception as error:  # what diffusers, transformers, accelerate and safetensors raise is of all kinds
        raise ValueError(f"{path} can't be loaded: {one_line(error)}") from error


def require_finite(model: torch.nn.Module) -> None:
    """Raise ValueError, naming it, for a weight that is not finite."""
    for name, parameter in model.named_parameters():
        tensor: torch.Tensor = parameter
        if type(parameter).dequantize is not torch.Tensor.dequantize:  # torchao's
            tensor = parameter.dequantize()
        elif type(parameter) is not torch.nn.Parameter:  # of another quantiser, packed
            continue
        if tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel():
            low, high = tensor.detach().aminmax()
            if not (math.isfinite(low) and math.isfinite(high)):  # torch's own is four operations
                raise ValueError(f"{name} is not finite: the file is damaged, or its training failed")


def require_words(tokenizer: Any, path: Path) -> None:
    """Raise ValueError for a tokenizer that knows no words: transformers makes one where files are missing, and says nothing."""
    if {*tokenizer.get_vocab()} <= {*tokenizer.all_special_tokens, "▁"}:
        raise ValueError(f"{path} holds no words, only how a tokenizer is set up: the download is not complete")
