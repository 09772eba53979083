"""What workers use of processors, memory and GPUs: as they say it, added up, and over a whole run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Usage(NamedTuple):
    """Of one worker, since it last said so."""

    cpu: float
    """Cores that it kept busy."""
    memory: int
    """Bytes that are its own."""
    gpu: float | None = None
    """The share of the time in which its GPU computed; None if it has none, or nobody can say."""
    gpu_memory: int | None = None
    """Bytes that it holds on its GPU."""


@dataclass(frozen=True)
class GroupUsage:
    """Of all workers that host the same stages."""

    stages: str
    """Their names: ``encode+denoise``."""
    workers: int
    """Those that have said something."""
    cpu: float
    """Cores that they keep busy together."""
    memory: int
    """Bytes, together."""
    gpu: float | None = None
    """The share of the time in which their GPUs compute, of all of them."""
    gpu_memory: int | None = None
    """Bytes on GPUs, together."""


def together(stages: str, found: Sequence[Usage]) -> GroupUsage:
    """What workers of the same stages use, one or more."""
    gpus = [each.gpu for each in found if each.gpu is not None]
    held = [each.gpu_memory for each in found if each.gpu_memory is not None]
    return GroupUsage(
        stages,
        len(found),
        sum(each.cpu for each in found),
        sum(each.memory for each in found),
        sum(gpus) / len(gpus) if gpus else None,
        sum(held) if held else None,
    )


def added_up(groups: Iterable[GroupUsage]) -> list[GroupUsage]:
    """What groups of several drivers use, those of the same stages together."""
    found: dict[str, GroupUsage] = {}
    for group in groups:
        found[group.stages] = _sum(found[group.stages], group) if group.stages in found else group
    return list(found.values())


def _sum(a: GroupUsage, b: GroupUsage) -> GroupUsage:
    gpus = [each for each in (a, b) if each.gpu is not None]
    of = sum(each.workers for each in gpus)
    held = [each.gpu_memory for each in (a, b) if each.gpu_memory is not None]
    return GroupUsage(
        a.stages,
        a.workers + b.workers,
        a.cpu + b.cpu,
        a.memory + b.memory,
        sum(each.workers * (each.gpu or 0.0) for each in gpus) / of if of else None,
        sum(held) if held else None,
    )


MOMENTS = 480
"""Moments that are kept of a run, however long it is."""


class History:
    """What was used over a run. Of a long run each moment that is kept stands for several, with their mean."""

    def __init__(self, most: int = MOMENTS) -> None:
        """``most``: an even number."""
        self.most, self.each = most, 1
        """``each``: how many moments one that is kept stands for."""
        self.kept: dict[str, list[tuple[float, GroupUsage]]] = {}
        """For each group the seconds since the run began, and what it used."""
        self._begun: dict[str, list[tuple[float, GroupUsage]]] = {}

    def add(self, seconds: float, groups: Iterable[GroupUsage]) -> None:
        """Take in another moment."""
        for group in groups:
            begun = self._begun.setdefault(group.stages, [])
            begun.append((seconds, group))
            if len(begun) >= self.each:
                self.kept.setdefault(group.stages, []).append(_mean(begun))
                begun.clear()
        if any(len(kept) >= self.most for kept in self.kept.values()):
            self.each *= 2
            for stages, kept in self.kept.items():
                self.kept[stages] = [_mean(kept[at : at + 2]) for at in range(0, len(kept), 2)]


def _mean(moments: Sequence[tuple[float, GroupUsage]]) -> tuple[float, GroupUsage]:
    count, groups = len(moments), [group for _, group in moments]
    gpus = [group.gpu for group in groups if group.gpu is not None]
    held = [group.gpu_memory for group in groups if group.gpu_memory is not None]
    return sum(seconds for seconds, _ in moments) / count, GroupUsage(
        groups[0].stages,
        max(group.workers for group in groups),
        sum(group.cpu for group in groups) / count,
        sum(group.memory for group in groups) // count,
        sum(gpus) / len(gpus) if gpus else None,
        sum(held) // len(held) if held else None,
    )
