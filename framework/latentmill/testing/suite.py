"""What every plugin must hold, of whatever kind."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar
from unittest import SkipTest

import torch

from latentmill import plugin as contract
from latentmill import registry
from latentmill.declarations import wrong_in_class, wrong_in_object
from latentmill.errors import PluginError
from latentmill.plugin import CONTRACT, Plugin
from latentmill.testing import behaviour, other_process
from latentmill.testing.behaviour import MethodCall, alike
from latentmill.testing.other_process import Answer


class PluginSuite:
    """What every plugin must hold. Runs on the CPU.

    The plugin is built in this process and in another one, under another PYTHONHASHSEED: its class gets there by its module
    and name, so it stands at the top of a module, or in a class there; ``functools.partial`` of it must be such that it can be pickled.
    """

    kind: ClassVar[str]
    """The attribute in which the class is named, and the plugin's kind."""
    name: ClassVar[str] = ""
    """The name in the entry points, as jobs write it: with it, the suite checks that jobs get the class that it tries."""

    def changed(self) -> Plugin | None:
        """The plugin with other weights, or files: its fingerprint must be another. Without it this isn't checked."""
        return None

    def test_it_is_a_plugin_of_this_contract(self) -> None:
        """A class of its kind, complete, written for this contract, and found by its name."""
        found = self._class()
        base = registry.KINDS[self.kind]
        assert isinstance(found, type) and issubclass(found, base), (
            f"`{self.kind}` is no plugin class: it must be a subclass of latentmill.plugin.{base.__name__}\n{found!r}"
        )
        missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        assert not missing, f"{found.__name__} is not complete: it lacks {missing}"
        written = [c for c in found.__mro__ if "contract" in vars(c) and c.__module__ != contract.__name__]
        assert written, (
            f"{found.__name__} does not say for which contract it was written: write `contract = {CONTRACT}` in the class"
        )
        assert found.contract == CONTRACT, (
            f"{found.__name__} was written for contract {found.contract}, and this latentmill has {CONTRACT}"
        )
        wrong = wrong_in_class(found) or wrong_in_object(self._make()())
        assert not wrong, f"{found.__name__}: {wrong}"
        if self.name:
            try:
                named = registry.load(self.kind, self.name)
            except PluginError as error:
                raise AssertionError(f"the entry point {self.name!r} names no plugin: {error}") from error
            assert named is found, (
                f"the entry point {self.name!r} names the class {named.__name__}, and the suite tries {found.__name__}"
            )

    def test_building_and_asking_touch_no_gpu(self) -> None:
        """The driver imports and builds plugins, and asks them what they are, on a machine that may have no GPU."""
        touched = self._there().touched
        assert not touched, (
            f"{touched} before load(device): the driver builds plugins and asks them where there may be no GPU; "
            "leave devices to load"
        )

    def test_another_process_finds_the_same(self) -> None:
        """The driver and each worker build the plugin anew, and must mean the same by it."""
        there = self._there()
        if there.touched:
            raise SkipTest("it touches a GPU before load(device)")
        assert not there.error, f"in another process it raises {there.error}"
        for name, value in self._asked(self._make()()).items():
            if not alike(value, there.asked[name]):
                what = "the fingerprint" if "fingerprint" in name else name
                raise AssertionError(
                    f"{what} differs between processes: build it from contents, not from hash(), the order of a set, an address, "
                    f"the clock or a random number\n{value!r} here, {there.asked[name]!r} there"
                )
        for name, value in self._computed().items():
            if not (alike(value, there.computed[name]) or self._explained()):
                raise AssertionError(
                    f"{name.split('.')[0]} gives other results in another process: results must follow from weights, settings and "
                    "arguments alone, not from hash(), the order of a set, or an address"
                )

    def test_the_fingerprint_follows_the_weights(self) -> None:
        """With other weights it is another; needs ``changed()``."""
        before = self._make()().fingerprint()
        other = self.changed()
        if other is None:
            raise SkipTest("not checked: write changed(), which builds the plugin with other weights")
        assert other.fingerprint() != before, (
            "the fingerprint stays when the weights change: hash the file whole, with latentmill.weights.digest(path); else a "
            "dataset is continued with another model"
        )

    def _class(self) -> Any:
        found = self._make()
        while isinstance(found, partial):
            found = found.func
        return found

    def _make(self) -> Callable[[], Any]:
        make: Callable[[], Any] = getattr(self, self.kind)
        return make

    def _there(self) -> Answer:
        return other_process.ask(self._make(), self._question(), self._work())

    def _asked(self, plugin: Any) -> Mapping[str, Any]:
        return self._question()(plugin)

    def _computed(self) -> Mapping[str, Any]:
        return self._work()(self._make()())

    def _question(self) -> Callable[[Any], Mapping[str, Any]]:
        """What the driver asks a plugin, by name; a function that another process can be given."""
        return identity

    def _work(self) -> Callable[[Any], Mapping[str, Any]]:
        """What a worker does with it; a function that another process can be given."""
        return partial(behaviour.compute, calls=self._calls())

    def _calls(self) -> Sequence[MethodCall]:
        """The calls that a worker makes."""
        return ()

    def _explained(self) -> bool:
        """Whether other checks say why results differ."""
        make = self._make()
        return any(behaviour.remembers(make, call) or behaviour.draws(make, call) for call in self._calls())


class RowsSuite(PluginSuite):
    """What every plugin must hold that computes something for each row of a batch."""

    def test_arguments_are_left_as_they_were(self) -> None:
        """They may lie in memory that other processes read."""
        self._all(behaviour.writes)

    def test_nothing_is_remembered_between_calls(self) -> None:
        """A row's result is the same whatever was computed before."""
        self._all(behaviour.remembers)

    def test_no_global_random_generator_is_used(self) -> None:
        """Of torch, numpy and random, seeded two ways."""
        self._all(behaviour.draws)

    def test_rows_do_not_touch_each_other(self) -> None:
        """Each row in a batch against the row alone."""
        self._all(behaviour.mixes)

    def _all(self, check: Callable[[Callable[[], Any], MethodCall], str]) -> None:
        for call in self._calls():
            sentence = check(self._make(), call)
            assert not sentence, sentence


def identity(plugin: Plugin) -> dict[str, Any]:
    """What the driver asks every plugin."""
    return {
        "fingerprint": plugin.fingerprint(),
        "libraries": list(plugin.libraries),
        "fingerprinted": list(plugin.fingerprinted),
        "the list of settings": list(inspect.signature(type(plugin)).parameters),
    }


def without_weights(plugin: Plugin, method: str, *arguments: Any) -> Any:
    """What a method gives that needs no weights, of a plugin that was never loaded; a ValueError, RowError above all, as itself."""
    try:
        with torch.no_grad():
            return getattr(plugin, method)(*arguments)
    except ValueError as error:
        return error
    except Exception as error:
        raise AssertionError(
            f"{method} needs weights: the driver and other workers call it on a plugin that was never loaded; "
            f"build what it needs in __init__\n{type(error).__name__}: {error}"
        ) from error
