"""What diffusers and transformers only log, where we say it ourselves: see "What the libraries only log" in the README."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CUT = ("The following part of your input was truncated", "Token indices sequence length is longer than")
"""Of prompts that are too long: their rows have a warning."""


def _of_cuts(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(CUT)


@contextmanager
def quiet(pipeline: Any) -> Iterator[None]:
    """Let a pipeline and its tokenizers not log that a prompt is too long."""
    names = {type(pipeline).__module__, "transformers.tokenization_utils_base"}
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(_of_cuts)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_of_cuts)
