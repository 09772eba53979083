"""A process of its own in which suites import, build and run a plugin again: under another PYTHONHASHSEED, with torch.cuda poisoned.

There is one for a whole run of the tests: it starts when it is first asked, and imports torch once. A plugin class gets
there by its module and its name, ``functools.partial`` of one pickled; so the class stands at the top of a module, or in a class
there. A module that isn't found by its name, as a file of tests may be, is read from its file.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import importlib.util
import io
import os
import pickle
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any

import torch

from latentmill.plugin import Plugin

TOUCHING = """
    _lazy_init init is_available device_count current_device set_device get_device_name get_device_properties
    get_device_capability mem_get_info is_bf16_supported current_stream default_stream synchronize
""".split()
"""Functions of torch.cuda that touch a device, or ask for one; ``tensor.cuda()`` comes to the first."""


@dataclass
class Answer:
    """What the other process found."""

    asked: dict[str, Any] = field(default_factory=dict)
    """What the driver asks a plugin, by name."""
    computed: dict[str, Any] = field(default_factory=dict)
    """What a worker computes with it, by name."""
    touched: str = ""
    """Who called what of torch.cuda before ``load``."""
    error: str = ""
    """What was raised, with where."""


def ask(
    make: Callable[[], Any], question: Callable[[Any], Mapping[str, Any]], work: Callable[[Any], Mapping[str, Any]]
) -> Answer:
    """Import and build the plugin there, ask it ``question(plugin)``, poisoned, and do ``work(plugin)``, which loads it; once for all who ask alike.

    Fails if ``make`` can't be sent.
    """
    request = _packed(make, (question, work))
    if request not in _answers:
        _answers[request] = _there.answer(request)
    return _answers[request]


def _packed(make: Callable[[], Any], rest: Any) -> bytes:
    """Both are pickled apart: there the plugin's module is to be imported, poisoned, before what the suite's own test file needs."""
    files: dict[str, str] = {}
    pickled = []
    try:
        for each in (make, rest):
            file = io.BytesIO()
            pickler = _Pickler(file)
            pickler.dump(each)
            files |= pickler.files
            pickled.append(file.getvalue())
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise AssertionError(
            f"{make!r} can't be sent to another process: name a class that stands at the top of a module, "
            f"or functools.partial of one\n{error}"
        ) from error
    return pickle.dumps((files, sys.path, _packages(make), *pickled))


def _packages(make: Any) -> set[str]:
    """Where a plugin's class and its parents are from that are plugins, too: whose imports it answers for."""
    while isinstance(make, partial):
        make = make.func
    classes = [cls for cls in make.__mro__ if issubclass(cls, Plugin)] if isinstance(make, type) else [make]
    return {str(each.__module__).partition(".")[0] for each in classes}


class _Pickler(pickle.Pickler):
    """Notes the file of each module whose classes and functions are named."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.files: dict[str, str] = {}

    def reducer_override(self, value: Any) -> Any:
        module = sys.modules.get(getattr(value, "__module__", None) or "")
        if module is not None and getattr(module, "__file__", None):
            self.files[module.__name__] = str(module.__file__)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, files: Mapping[str, str]) -> None:
        super().__init__(io.BytesIO(data))
        self.files = files

    def find_class(self, module: str, name: str) -> Any:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            if module not in self.files:
                raise
            spec = importlib.util.spec_from_file_location(module, self.files[module])
            assert spec is not None and spec.loader is not None
            sys.modules[module] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(sys.modules[module])
            except BaseException:
                del sys.modules[module]
                raise
        return super().find_class(module, name)


class _OtherProcess:
    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def answer(self, request: bytes) -> Answer:
        if self.process is None:
            seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
            code = f"import sys; sys.path[:] = {sys.path!r}; from latentmill.testing import other_process; other_process.serve()"
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONHASHSEED": seed},
            )
            atexit.register(self.end)
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            _send(self.process.stdin, request)
            found: Answer = pickle.loads(_receive(self.process.stdout))
        except (EOFError, BrokenPipeError):
            self.end()
            return Answer(error="the process ended: the plugin, or a library that it uses, ends its process")
        return found

    def end(self) -> None:
        if self.process is not None:
            self.process.communicate()
            self.process = None


_there = _OtherProcess()
_answers: dict[bytes, Answer] = {}


def _send(file: IO[bytes], message: bytes) -> None:
    file.write(struct.pack("<Q", len(message)) + message)
    file.flush()


def _receive(file: IO[bytes]) -> bytes:
    head = file.read(8)
    if len(head) < 8:
        raise EOFError
    return file.read(struct.unpack("<Q", head)[0])


# --------------------------------------------------------------------------------------------- in the other process


def serve() -> None:
    """Answer until there are no more questions. What plugins print goes to stderr."""
    gc.set_threshold(20_000, 20, 10)  # plugins import whole libraries, in which there is no garbage
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            request = _receive(sys.stdin.buffer)
        except EOFError:
            return
        _send(answers, pickle.dumps(_answer(request)))


def _answer(request: bytes) -> Answer:
    answer = Answer()
    try:
        files, path, packages, *pickled = pickle.loads(request)
        sys.path[:] = path
        with poisoned(packages) as touched:
            try:
                make = _Unpickler(pickled[0], files).load()
            finally:
                answer.touched = next(iter(touched), "")
        question, work = _Unpickler(pickled[1], files).load()
        with poisoned(packages, touched):
            try:
                plugin = make()
                answer.asked = dict(question(plugin))
            finally:
                answer.touched = next(iter(touched), "")
        answer.computed = dict(work(plugin))
        pickle.dumps(answer)
    except Exception as error:
        return Answer(touched=answer.touched, error=f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    return answer


@contextmanager
def poisoned(packages: Collection[str], touched: list[str] | None = None) -> Iterator[list[str]]:
    """While this lasts, calls that touch a GPU raise, and are noted: who called what.

    Not those of a module that is being imported, unless it is of one of ``packages``.
    """
    touched = [] if touched is None else touched
    lasts = True
    there = {name: getattr(torch.cuda, name) for name in TOUCHING}

    def poison(name: str) -> Callable[..., Any]:
        def touch(*args: Any, **kwargs: Any) -> Any:
            caller = _caller(packages) if lasts else None  # a module may have taken the function for its own
            if caller is None:
                return there[name](*args, **kwargs)
            touched.append(f"{caller} calls torch.cuda.{name.replace('_lazy_init', 'init')}")
            raise RuntimeError(f"{touched[-1]} before load(device)")

        return touch

    for name in TOUCHING:
        setattr(torch.cuda, name, poison(name))
    try:
        yield touched
    finally:
        lasts = False
        for name in TOUCHING:
            setattr(torch.cuda, name, there[name])


def _caller(packages: Collection[str]) -> str | None:
    """Who outside torch called. None while a library's module is being imported, which is nobody's choice, or a file of tests."""
    found, imported = "", ""
    walked: Any = sys._getframe(2)
    while walked is not None:
        module, code = str(walked.f_globals.get("__name__", "")), walked.f_code
        if code.co_filename.startswith("<frozen importlib"):
            own = imported.partition(".")[0] in packages and not imported.rpartition(".")[2].startswith("test_")
            return f"the import of {imported}" if own else None
        if module.partition(".")[0] != "torch":
            found = found or code.co_qualname
            if code.co_name == "<module>":
                imported = module
        walked = walked.f_back
    return found
