"""What diffusers, transformers and torch only log: see "What the libraries only log" in the plugin's README.

The framework puts what libraries log in a worker into the driver's log. Here is what isn't worth a line there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

UNHEARD: Mapping[str, tuple[str, ...]] = {
    "transformers.utils.import_utils": ("requires torchvision",),  # to prepare pictures for encoders, which no job does
    "diffusers.pipelines.pipeline_loading_utils": (
        "You have passed a non-standard module",
    ),  # model_index.json names it
    "diffusers.models.modeling_utils": ("should be kept in float32: []",),  # of none
    "transformers.configuration_utils": ("is deprecated!",),  # for who writes a pipeline
    "transformers.utils.generic": ("are deprecated.",),
    "torch.utils._pytree": ("is now natively supported",),
    "torchao": ("Failed to load",),  # its kernels, which are for some GPUs
    "torchao.kernel.intmm": ("Detected no triton",),
    "diffusers.quantizers.torchao.torchao_quantizer": (
        "Unable to import `torchao` Tensor objects",
    ),  # of quantised files
}
"""By logger, words of its messages."""

CUT = ("The following part of your input was truncated", "Token indices sequence length is longer than")
"""Of prompts that are too long: their rows have a warning."""


def _worth_hearing(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    return not any(words in said for words in UNHEARD[record.name])


for _name in UNHEARD:
    logging.getLogger(_name).addFilter(_worth_hearing)


def _of_no_cut(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(CUT)


@contextmanager
def quiet(pipeline: Any) -> Iterator[None]:
    """Let a pipeline and its tokenizers not log that a prompt is too long."""
    names = {type(pipeline).__module__, "transformers.tokenization_utils_base"}
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(_of_no_cut)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_of_no_cut)
