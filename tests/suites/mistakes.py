"""A mistake, as a wrong plugin; what a suite says of it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from unittest import SkipTest


@dataclass(frozen=True)
class Mistake:
    what: str
    """As the table says it."""
    suite: type
    """The suite, with the wrong plugin in it."""
    caught_by: set[str]
    """The tests that must fail, without ``test_``, and no others."""
    says: str
    """Part of what the first of them says."""
    around: Callable[[], AbstractContextManager[object]] = nullcontext

    @property
    def kind(self) -> str:
        return self.suite.kind

    def said(self) -> dict[str, str]:
        with self.around():
            return failures(self.suite)


def suite_of(base, plugin, **settings):
    """The suite of a kind, on a plugin."""
    return type(f"{getattr(plugin, '__name__', plugin)}Suite", (base,), {base.kind: plugin, **settings})


def failures(suite) -> dict[str, str]:
    """The first line of what each of a suite's tests says, of those that fail, in the order in which they stand."""
    said = {}
    names = dict.fromkeys(name for base in suite.__mro__ for name in vars(base) if name.startswith("test_"))
    for name in names:
        try:
            getattr(suite(), name)()
        except SkipTest:
            pass
        except AssertionError as error:
            said[name.removeprefix("test_")] = str(error).splitlines()[0]
        except Exception as error:
            said[name.removeprefix("test_")] = f"{type(error).__name__}: {error}".splitlines()[0]
    return said


def line(mistake: Mistake, said: dict[str, str]) -> str:
    """The mistake's line in docs/suites.md."""
    sentence = next(text for text in said.values() if mistake.says in text)
    return "| " + " | ".join(text.replace("|", "\\|") for text in (mistake.kind, mistake.what, sentence)) + " |\n"
