"""The token that a Ray cluster may ask for: of this user, and sent to no cluster that asks for none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def token() -> str | None:
    """The token that Ray would send: of the environment, or of ~/.ray/auth_token."""
    if found := os.environ.get("RAY_AUTH_TOKEN"):
        return found
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def use_token(wanted: bool) -> None:
    """Have Ray send the token, or not: it goes by whether this user has one at all, and not by whether the cluster wants it."""
    import ray

    ray_core: Any = (
        ray._raylet
    )  # whose types are not told, and which has no public way to be told of the environment again
    os.environ["RAY_AUTH_MODE"] = "token" if wanted else "disabled"
    ray_core.Config.initialize("")
