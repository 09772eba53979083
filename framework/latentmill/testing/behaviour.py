"""How a plugin that computes rows behaves: it writes into no argument, remembers nothing, draws nothing, and keeps rows apart.

Each mistake is told apart from the others: a check that finds a difference asks first whether a simpler mistake explains it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Arguments: TypeAlias = Mapping[str, Any]
"""Arguments by name: each a tensor ``[B, ...]`` or a list of B."""
Make: TypeAlias = Callable[[], Any]
"""What builds the plugin."""

GENERATORS = ("torch", "numpy", "random")


@dataclass(frozen=True)
class MethodCall:
    """A method, and the rows with which it is called."""

    method: str
    run: Callable[[Any, Arguments], Mapping[str, Tensor]]
    """Calls it on a plugin; a function at the top of a module, so that another process can, too."""
    rows: Arguments

    def of(self, plugin: Any, seeds: Sequence[int] = (0, 0, 0)) -> dict[str, Tensor]:
        """Its results, of copies of the rows, with the global generators at ``seeds``."""
        seed_all(seeds)
        with torch.no_grad():
            return {name: value.clone() for name, value in self.run(plugin, copied(self.rows)).items()}

    def at(self, order: Sequence[int]) -> MethodCall:
        """The call with these of its rows, in this order."""
        picked = {n: v[list(order)] if isinstance(v, Tensor) else [v[i] for i in order] for n, v in self.rows.items()}
        return replace(self, rows=picked)

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))


def seed_all(seeds: Sequence[int]) -> None:
    """Seed the global generators of torch, on the CPU, numpy and random."""
    torch.default_generator.manual_seed(
        seeds[0]
    )  # torch.manual_seed notes for CUDA, too, who called: a hundred times the work
    np.random.seed(seeds[1])
    random.seed(seeds[2])


def loaded(make: Make) -> Any:
    """The plugin, built and loaded on the CPU."""
    plugin = make()
    plugin.load(torch.device("cpu"))
    return plugin


def compute(plugin: Any, calls: Sequence[MethodCall]) -> dict[str, Tensor]:
    """The results of all calls by ``method.name``, of a plugin that isn't loaded yet."""
    plugin.load(torch.device("cpu"))
    return {f"{call.method}.{name}": value for call in calls for name, value in call.of(plugin).items()}


def close(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether results are the same, but for what another order of summation gives."""
    return a.keys() == b.keys() and all(
        a[name].shape == b[name].shape
        and torch.allclose(a[name].double(), b[name].double(), rtol=1e-3, atol=1e-4, equal_nan=True)
        for name in a
    )


def writes(make: Make, call: MethodCall) -> str:
    """The sentence if an argument is written into, else ""."""
    plugin, given = loaded(make), copied(call.rows)
    seed_all((0, 0, 0))
    with torch.no_grad():
        call.run(plugin, given)
    for name, value in call.rows.items():
        if not (_same_bits(value, given[name]) if isinstance(value, Tensor) else value == given[name]):
            return (
                f"{call.method} writes into its argument {name!r}: other rows and processes read the same memory; "
                "change a copy"
            )
    return ""


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold the same, NaN included: a solver may say so that it has no history yet."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def remembers(make: Make, call: MethodCall) -> str:
    """The sentence if results depend on earlier calls, else ""."""
    other = call.at([*range(1, len(call)), 0])
    first, second = loaded(make), loaded(make)
    one = call.of(first), other.of(first), call.of(first)
    two = other.of(second), call.of(second)
    if close(one[0], two[1]) and close(one[1], two[0]) and close(one[0], one[2]):
        return ""
    return (
        f"{call.method} gives other results after an earlier call: it remembers what it was given, or has a generator of its "
        "own; results must follow from the arguments alone"
    )


def draws(make: Make, call: MethodCall) -> str:
    """The sentence if results depend on a global random generator, or if one is seeded, else ""."""
    first = loaded(make)
    wanted = call.of(first)
    before = call.of(loaded(make), (1, 2, 3)), _states()
    if not close(wanted, before[0]):
        which = [
            n
            for n, s in zip(GENERATORS, ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
            if not close(wanted, call.of(loaded(make), s))
        ]
        return (
            f"{call.method} draws from the global random generator of {' and '.join(which)}: results must follow from the "
            "arguments alone; a plugin draws no noise but what it is given"
        )
    call.of(first)
    for name, one, two in zip(GENERATORS, before[1], _states()):
        if one == two:
            return (
                f"{call.method} seeds the global random generator of {name}, from which others draw: "
                "take a torch.Generator of its own"
            )
    return ""


def mixes(make: Make, call: MethodCall) -> str:
    """The sentence if a row depends on the rows beside it, else ""."""
    plugin = loaded(make)
    together = call.of(plugin)
    for row in range(len(call)):
        alone = call.at([row]).of(plugin)
        if not close(
            {name: value[:1] for name, value in alone.items()}, {n: v[row : row + 1] for n, v in together.items()}
        ):
            if remembers(make, call) or draws(make, call):
                return ""
            return (
                f"{call.method} gives row {row} otherwise in a batch than alone: rows of a batch must not touch each other; "
                "take no mean, maximum or length over the batch axis"
            )
    return ""


def _states() -> list[Any]:
    return [
        torch.get_rng_state().numpy().tobytes(),
        repr(np.random.get_state(legacy=False)),
        random.getstate(),
    ]


def copied(value: Any) -> Any:
    """A copy that shares no memory; whatever can be walked through becomes a list."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, Mapping):
        return {name: copied(inner) for name, inner in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        return [copied(inner) for inner in value]
    return value


def alike(a: Any, b: Any) -> bool:
    """Whether two values are the same, whatever they hold; tensors but for what another order of summation gives."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return close({"": a}, {"": b})
    if isinstance(a, (np.ndarray, Tensor)) or isinstance(b, (np.ndarray, Tensor)):
        return a is not None and b is not None and np.array_equal(np.asarray(a), np.asarray(b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(alike(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b))
    if isinstance(a, Exception) and isinstance(b, Exception):
        return type(a) is type(b) and str(a) == str(b)
    return bool(a == b) or (a != a and b != b)
