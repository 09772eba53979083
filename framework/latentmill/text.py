"""How a thing is said to people: in one line, counted, with the nearest right name, without secrets."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from latentmill.errors import LatentmillError


def escaped(text: str) -> str:
    r"""``text`` with line breaks, control characters and bytes that are no text as escapes: a name, whatever is in it.

    >>> print(escaped("a\nfolder/b.txt"))
    a\nfolder/b.txt
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def unescaped(text: str) -> str:
    r"""What ``escaped`` made ``text`` of, but for bytes that are no text, and ``\n``, ``\r`` and ``\t``, as which paths of Windows look.

    >>> unescaped("a\\u202fb\\x41") == "a\u202fb\\x41"  # nobody escapes an A
    True
    """

    def known(found: re.Match[str]) -> str:
        letter = found[0].encode().decode("unicode_escape")
        return letter if escaped(letter) == found[0] and not "\ud800" <= letter <= "\udfff" else found[0]

    return re.sub(r"\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})", known, text)


def one_line(said: object, most: int = 1000) -> str:
    r"""What a stranger says, as one line of at most ``most`` characters: a line break is a blank, the rest as ``escaped``.

    >>> one_line("can't be read:\n    no such file\n")
    "can't be read: no such file"
    """
    line = escaped(re.sub(r"\s+", lambda gap: gap[0] if not gap[0].strip(" ") else " ", str(said).strip()))
    return line if len(line) <= most else f"{line[: most - 10]} [cut off]"


def first_line(said: object, most: int = 1000) -> str:
    """The first line of what a stranger says, as ``one_line``: what a library says at length begins with the cause."""
    return one_line(str(said).strip().partition("\n")[0], most)


def plural(number: int, what: str) -> str:
    """``1 row``, ``1,000 rows``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def in_units(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def near(name: str, names: Iterable[str]) -> str:
    """`` (did you mean ...?)``, if one of the names is like ``name``; else nothing."""
    found = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def without_secrets(text: str, config: str) -> str:
    """``text`` with the values of environment variables that ``config`` names taken out: others may read an error."""
    return hidden(text, secrets(config))


def secrets(config: str, keys: bool = False) -> dict[str, str]:
    """What others must not read: the values of environment variables that ``config`` names and, with ``keys``, of those whose names
    say that it is a key, each with what is to stand for it; of one of several lines each line. The longest first: one may hold another.

    Those of at least 8 characters, lest a number or a word be taken for a secret.
    """
    named = {name: f"${{oc.env:{name}}}" for name in re.findall(r"""oc\.env:[\s'"\\]*([A-Za-z_]\w*)""", config)}
    for name in os.environ if keys else ():
        if is_secret(name):
            named.setdefault(name, f"${name}")
    found: dict[str, str] = {}
    for name, shown in named.items():
        value = os.environ.get(name, "")
        found |= {part: shown for part in (value, *map(str.strip, value.splitlines())) if len(part) >= 8}
    return dict(sorted(found.items(), key=lambda each: -len(each[0])))


def is_secret(name: str) -> bool:
    """Whether an environment variable's name says that it is a key or the like."""
    return re.search("KEY|SECRET|TOKEN|PASSW|CONNECTION_STRING", name) is not None


def hidden(text: str, secret: Mapping[str, str]) -> str:
    """``text`` without these ``secrets``."""
    for value, shown in secret.items():
        text = text.replace(value, shown)
    return text


@contextmanager
def redacted(config: str) -> Iterator[None]:
    """Errors of ours leave without the secrets that ``config`` takes from the environment: they may quote a plugin."""
    try:
        yield
    except LatentmillError as error:
        said = without_secrets(str(error), config)
        if said == str(error):
            raise
        raise type(error)(said) from None
