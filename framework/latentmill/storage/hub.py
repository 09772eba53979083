"""Questions to the Hugging Face Hub, asked again while it fails."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from latentmill.errors import StorageError
from latentmill.text import one_line

HubAnswer = TypeVar("HubAnswer")
COMMIT_HASH = re.compile(r"[0-9a-f]{40}")
AGAIN = (408, 429, 500, 502, 503, 504)
"""Answers after which a request is made once more."""
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
"""Errors that are this machine's, and will be the same at the next try."""
PAUSES = (0.2, 1.0, 3.0, 10.0, 30.0, 60.0)
"""Seconds between one try and the next, while the Hub fails."""
LONGEST_WAIT = 330.0
"""Seconds that the Hub is waited for at a time, where it says when it will answer again: it counts requests in five minutes."""


def hub_endpoint() -> str | None:
    """Where the Hub is, if not at its own address; its client looked when it was imported."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def ask_hub(at: str, revision: str, key: str, ask: Callable[[], HubAnswer]) -> HubAnswer:
    """What the Hub answers, asked again while it fails. ``at``: ``hf://OWNER/NAME``. Raises FileNotFoundError, and StorageError, one line."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    for pause in (*PAUSES, None):
        try:
            return ask()
        except RevisionNotFoundError as error:
            raise StorageError(f"{at} has no revision {revision}") from error
        except RepositoryNotFoundError as error:
            raise StorageError(
                f"{at} is not there, or not for everybody: HF_TOKEN or `hf auth login` says who asks"
            ) from error
        except Exception as error:  # of the network's libraries, which are the client's own affair
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                raise FileNotFoundError(f"{at}@{revision}/{key} is not there") from error
            told = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
            answer = getattr(told, "response", None)
            status = getattr(answer, "status_code", None)
            for_good = status not in AGAIN if status else isinstance(told, (OfflineModeIsEnabled, HFValidationError))
            if pause is None or for_good or (isinstance(error, OSError) and error.errno in DISK):
                raise StorageError(f"{at}@{revision}/{key}: {one_line(told, 300)}") from error
            pause = min(max(pause, _said_wait(answer)), LONGEST_WAIT)
        time.sleep(pause)
    raise AssertionError


def _said_wait(answer: Any) -> float:
    """Seconds until the Hub will answer again, where its answer says that."""
    headers = getattr(answer, "headers", {})
    found = re.fullmatch(r"\d+", headers.get("Retry-After", "")) or re.search(
        r"(?<=;t=)\d+", headers.get("RateLimit", "")
    )
    return float(found[0]) if found else 0.0
