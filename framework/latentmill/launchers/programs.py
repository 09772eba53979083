"""Programs that a target is asked by, as kubectl and sky, and the environment variables that go along."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence

from latentmill.plugin import Submission


def ask(
    words: Sequence[str], within: float, sent: str | None = None, also: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What a program answers. ``also``: variables that it is given beside those of this process.

    Raises ValueError if it is not installed, and OSError if it has not ended ``within`` seconds.
    """
    around = {**os.environ, **(also or {})}
    try:
        return subprocess.run(
            words, input=sent, capture_output=True, encoding="utf-8", errors="replace", timeout=within, env=around
        )
    except FileNotFoundError:
        raise _missing(words) from None
    except subprocess.TimeoutExpired:
        raise OSError(f"{words[0]} has had no answer for {within:g} s") from None


def said_by(words: Sequence[str], stderr: int) -> Iterator[str]:
    """What a program says, line by line, while it says it; whoever reads no more ends it. Raises ValueError if it is not installed."""
    try:
        running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=stderr, encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise _missing(words) from None
    with running:
        try:
            assert running.stdout
            yield from running.stdout
        finally:
            running.terminate()


def variables(names: Sequence[str]) -> dict[str, str]:
    """Values of environment variables. Raises ValueError for those that there are none of."""
    if missing := [name for name in names if name not in os.environ]:
        raise ValueError(f"target.env names {', '.join(missing)}, which your shell does not have")
    return {name: os.environ[name] for name in names}


def check_variables(submission: Submission, names: Sequence[str], or_else: str = "") -> None:
    """See that the variables that a job looks up go along. Raises ValueError.

    One that has a default, ``${oc.env:NAME,20}``, need not, unless it is set here: the job would mean something else there.
    """
    found = re.findall(r"""(?<!\\)\$\{oc\.env:[\s'"\\]*([A-Za-z_]\w*)[\s'"\\]*([,}])""", submission.text)
    needed = {name for name, then in found if then == "}" or name in os.environ}
    if missing := ", ".join(sorted(needed - set(names))):
        raise ValueError(f"the job needs {missing} of its environment: target.env=[{missing}] sends it along{or_else}")


def _missing(words: Sequence[str]) -> ValueError:
    return ValueError(f"{words[0]} is not installed here: --dry-run prints what it would be given")
