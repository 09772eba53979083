"""A device that is not there: what is computed on it the CPU computes, and what a GPU would make the host wait for is counted.

    with pretended() as counted:
        x = torch.zeros(3).to(DEVICE, non_blocking=True)
        bool((x > 0).any())
    assert counted.copies == [12] and counted.waits == ["_local_scalar_dense"]

As on any other device its tensors don't mix with the CPU's, but for those of no axis.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("lazy", 0)
"""Of a type that this PyTorch has a name for, and nothing else."""
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "unique_consecutive", "_unique2"}
"""Operations whose result the host has to see before it goes on."""


@dataclass
class Counted:
    """What was done on the pretended device, and what for it."""

    operations: Counter[str] = field(default_factory=Counter)
    """By name. Without views, which start nothing on a GPU."""
    copies: list[int] = field(default_factory=list)
    """Bytes of each copy to the device."""
    waits: list[str] = field(default_factory=list)
    """What the host waited for: copies back, copies there that are not ``non_blocking``, values that it looked at."""

    def clear(self) -> None:
        """Count from here on."""
        for each in (self.operations, self.copies, self.waits):
            each.clear()


@contextmanager
def pretended() -> Iterator[Counted]:
    """While it lasts there is a ``DEVICE``."""
    counting = _Counting()
    with _Made(), counting:
        yield counting.counted


class _Remote(Tensor):
    """A tensor on the device; ``near`` is what it holds, on the CPU."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> _Remote:
        offset = near.storage_offset()
        made: _Remote = Tensor._make_wrapper_subclass(
            cls, near.size(), near.stride(), offset, dtype=near.dtype, device=DEVICE
        )
        made.near = near
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"on {DEVICE}: {self.near!r}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func}: of a tensor on {DEVICE}, outside of pretended()")


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counted = Counted()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = [value for value in _flat((*args, *kwargs.values())) if isinstance(value, Tensor)]
        target = next((value for value in args if isinstance(value, torch.device)), kwargs.get("device"))
        here = any(isinstance(value, _Remote) for value in given)
        there = here if target is None else torch.device(target).type == DEVICE.type
        if not here and not there:
            return func(*args, **kwargs)
        if _is_composite(func):
            with self:  # where there are no gradients such operations come here whole
                return func.decompose(*args, **kwargs)
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            self._copy(name, args, kwargs, there)
        elif mixed := [list(value.shape) for value in given if not isinstance(value, _Remote) and value.ndim]:
            raise RuntimeError(f"{func}: expected all tensors on {DEVICE}, and there is one {mixed[0]} on the CPU")
        elif name in WAITS or (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])):
            self.counted.waits.append(name)
        elif not _is_view(func):
            self.counted.operations[name] += 1
        found = func(*_each(_near, args), **{key: _each(_near, value) for key, value in kwargs.items()})
        if name == "_local_scalar_dense" or not there:
            return found
        if given and found is _near(given[0]):  # it was changed in place
            return given[0]
        return _each(_far, found)

    def _copy(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], there: bool) -> None:
        """To a new tensor, or into the first of two."""
        source = args[0] if name == "_to_copy" else args[1]
        there = there if name == "_to_copy" else isinstance(args[0], _Remote)
        if isinstance(source, _Remote) and there:
            self.counted.operations[name] += 1
            return
        if there:
            self.counted.copies.append(source.numel() * source.element_size())
        if not there or not (kwargs.get("non_blocking") or (name == "copy_" and any(args[2:]))):
            self.counted.waits.append(f"{name} {'there' if there else 'back'}")


class _Made(TorchFunctionMode):
    """What is made of Python's numbers on a device is made on the CPU and copied, and the host waits for that."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.new_tensor:
            kwargs = {"dtype": args[0].dtype, "device": args[0].device, **kwargs}
            func, args = torch.tensor, args[1:]
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == DEVICE.type:
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if func is Tensor.tolist:
            return args[0].cpu().tolist()
        return func(*args, **kwargs)


@cache
def _is_composite(func: Any) -> bool:
    return bool(func._can_decompose() and func.has_kernel_for_dispatch_key(COMPOSITE))


@cache
def _is_view(func: Any) -> bool:
    return any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)


def _near(value: Any) -> Any:
    return value.near if isinstance(value, _Remote) else value


def _far(value: Any) -> Any:
    return _Remote(value) if isinstance(value, Tensor) and not isinstance(value, _Remote) else value


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    """The arguments of an operation: values, and lists of them."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    """``value``, or what is in its lists, changed. torch's trees do the same in seven times as long."""
    if isinstance(value, list | tuple):
        return type(value)([_each(change, one) for one in value])
    return change(value)
