"""How a run stands: a view of it, the rates that follow from views, and the live table or lines that a person sees."""

from __future__ import annotations

import io
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TextIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live as RichLive
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from latentmill.usage import GroupUsage


@dataclass(frozen=True)
class StageView:
    """A stage as it stands."""

    name: str
    done: int
    """Rows that have left it in this run, the rejected included."""
    queued: int
    """Rows that wait for it."""
    workers: int
    """Workers that have started."""
    busy: int
    """Workers that have something to do."""
    ended_before: int = 0
    """Rows that failed or were filtered before they came to it, less those that left it and have begun again since."""
    failed: int = 0
    """Rows that failed in it."""
    queued_bytes: int = 0
    """The bytes of those that wait for it, by what rows had lately."""

    @property
    def passed(self) -> int:
        """Rows of which it has nothing more to do."""
        return self.done + self.ended_before


@dataclass(frozen=True)
class View:
    """A run as it stands."""

    stages: Sequence[StageView]
    planned: int
    finished: int
    """Rows in committed shards, those of earlier runs included."""
    failed: int
    """Rows among them that this run could not make."""
    seconds: float
    """Since the run began."""
    shards_done: int
    shards: int
    leased_by_others: int = 0
    """Shards that other drivers work on."""
    filtered: int = 0
    """Rows among the finished that this run made and that were not wanted."""
    others: int = 0
    """Rows among the finished that this run has not made: those of earlier runs and of other drivers."""
    accepted: int = 0
    """Rows among the finished that are in the dataset; counted where ``wanted`` is given alone."""
    wanted: int | None = None
    """With how many of these the dataset ends, in a job that says so."""


class Pace:
    """Rates out of the views that follow one another; it has no clock but theirs."""

    def __init__(self) -> None:
        self.views: deque[View] = deque()
        self._busy: defaultdict[str, float] = defaultdict(float)
        self._there: defaultdict[str, float] = defaultdict(float)

    @property
    def last(self) -> View:
        """The newest view."""
        return self.views[-1]

    def add(self, view: View) -> None:
        """Take in the next view. Those that no rate needs any more are forgotten."""
        if self.views:
            passed = view.seconds - self.last.seconds
            for stage in self.last.stages:
                self._busy[stage.name] += passed * stage.busy
                self._there[stage.name] += passed * stage.workers
        if len(self.views) > 1 and view.seconds - self.views[-2].seconds < max(0.1, view.seconds / 500):
            self.views.pop()  # a fast loop shows thousands of views a second; the window below holds 150 at most
        self.views.append(view)
        # Rates are those of the last fifth of the run, and of 15 s at least: batches may take minutes.
        while len(self.views) > 1 and self.views[1].seconds <= view.seconds - max(15.0, view.seconds / 5):
            self.views.popleft()

    def rate(self, stage: int) -> float:
        """Rows a second that leave a stage. The wait for its first row is left out: workers start then."""
        return self._a_second(stage, lambda seen: seen.done)

    def _a_second(self, stage: int, rows: Callable[[StageView], int]) -> float:
        last = self.last
        first = next((v for v in reversed(tuple(self.views)) if not rows(v.stages[stage])), self.views[0])
        passed = last.seconds - first.seconds
        return (rows(last.stages[stage]) - rows(first.stages[stage])) / passed if passed > 0 else 0.0

    def busy(self, name: str) -> float:
        """The share of its workers' time, since they started, in which a stage had something to do."""
        return self._busy[name] / self._there[name] if self._there[name] else 0.0

    def progress(self) -> int:
        """Rows that are through, those included that wait for the rest of their shard."""
        return min(self.last.planned, max(self.last.finished, self.last.others + self.last.stages[-1].passed))

    def needed(self) -> float:
        """Of how many planned rows something must be made: if the dataset ends before, as far as the finished ones tell."""
        if self.last.wanted is None or not self.last.accepted:
            return self.last.planned
        return min(self.last.planned, self.last.finished * self.last.wanted / self.last.accepted)

    def left(self) -> float | None:
        """Seconds to go, by the stage that will be the last to finish; None as long as nobody can tell."""
        longest = 0.0
        for at, stage in enumerate(self.last.stages):
            rows = self.needed() - self.last.others - stage.passed
            if rows > 0 and self.last.finished < self.last.planned:
                rate = self._a_second(at, lambda seen: seen.passed)
                if not rate:
                    return None
                longest = max(longest, rows / rate)
        return longest


@dataclass(frozen=True)
class Shown:
    """What a person is shown of a run, whoever runs it and wherever it is shown."""

    job: str
    view: View
    rows: int
    """That are through."""
    left: float | None
    """Seconds to go; None if nobody can tell."""
    rates: Sequence[float]
    """Rows a second that leave each stage."""
    busy: Sequence[float]
    """The share of their time in which each stage's workers had something to do."""
    usage: Sequence[GroupUsage] = ()
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """For each stage what it counted: evaluations of the network, halvings for want of memory, deaths of workers."""
    lately: Sequence[str] = ()
    """What was said last of workers and by them."""

    def line(self) -> str:
        """It in a line."""
        view = self.view
        parts = [f"{self.job}: {self.rows:,} of {view.planned:,} rows"]
        parts += [f"{view.failed:,} failed"] * bool(view.failed)
        parts += [f"{view.filtered:,} filtered"] * bool(view.filtered)
        parts.append(" ".join(f"{stage.name} {stage.done:,}" for stage in view.stages))
        parts.append(f"{rate_text(self.rates[-1])} rows/s")
        parts.append("starting" if self.left is None else f"{duration_text(round(self.left))} left")
        parts += [f"{counted(view.leased_by_others, 'shard')} with other drivers"] * bool(view.leased_by_others)
        return " | ".join(parts)

    def table(self) -> RenderableType:
        """It as a table with a bar of the whole."""
        view = self.view
        head = Table.grid(padding=(0, 2))
        head.add_row(
            f"[bold]{escape(self.job)}[/]",
            ProgressBar(total=view.planned, completed=self.rows, width=32),
            f"{self.rows:,} of {view.planned:,} rows",
            f"{duration_text(view.seconds)} so far"
            + ("" if self.left is None else f", about {duration_text(round(self.left))} left"),
        )
        stages = _table("stage", "done", "queued", "rows/s", "workers busy")
        for stage, rate in zip(view.stages, self.rates):
            workers = f"{stage.busy} of {stage.workers}" if stage.workers else "starting"
            stages.add_row(stage.name, f"{stage.done:,}", f"{stage.queued:,}", rate_text(rate), workers)
        parts: list[RenderableType] = [head, stages]
        if self.usage:
            parts.append(self._usage())
        if view.leased_by_others:
            parts.append(f"{counted(view.leased_by_others, 'shard')} with other drivers")
        if view.filtered:
            parts.append(f"{counted(view.filtered, 'row')} filtered; the reasons are in filtered/")
        if view.failed:
            parts.append(f"[yellow]{counted(view.failed, 'row')} failed; the reasons are in errors/[/]")
        return Group(*parts)

    def _usage(self) -> Table:
        has_gpus = any(group.gpu_memory is not None for group in self.usage)
        used = _table("workers", "cores busy", "memory", *(["GPUs busy", "GPU memory"] if has_gpus else []))
        for group in self.usage:
            cells = [f"{group.workers} {group.stages}", f"{group.cpu:.1f}", bytes_text(group.memory)]
            if has_gpus:
                cells.append("" if group.gpu is None else f"{group.gpu:.0%}")
                cells.append("" if group.gpu_memory is None else bytes_text(group.gpu_memory))
            used.add_row(*cells)
        return used


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


class Live:
    """Shows a run on a terminal as one table that changes, elsewhere as a line every few seconds."""

    every = 5.0
    """Seconds between two lines."""

    def __init__(self, job_name: str, stream: TextIO) -> None:
        self.job_name, self.stream = job_name, stream
        self.pace = Pace()
        self.add: Callable[[Shown], Shown] = lambda shown: shown
        """Adds what workers say of themselves."""
        self._next_line = 0.0

    def show(self, view: View) -> None:
        """Take in how the run stands. Cheap: the loop calls it at every turn. Raises nothing: telling is not the work."""
        with suppress(Exception):
            self.pace.add(view)
            if not self.stream.isatty() and view.seconds >= self._next_line:
                self._next_line = view.seconds + self.every
                print(self.line(), file=self.stream, flush=True)

    def shown(self) -> Shown:
        """How the run stands. There must have been a view."""
        pace, view = self.pace, self.pace.last
        return self.add(
            Shown(
                self.job_name,
                view,
                pace.progress(),
                pace.left(),
                [pace.rate(at) for at in range(len(view.stages))],
                [pace.busy(stage.name) for stage in view.stages],
            )
        )

    def line(self) -> str:
        """The newest view in a line."""
        return self.shown().line()

    def table(self) -> RenderableType:
        """The newest view as a table with a bar of the whole."""
        return self.shown().table() if self.pace.views else f"{self.job_name}: starting"


@contextmanager
def live(job_name: str) -> Iterator[Live]:
    """A live view on stderr for the time of a run, as far as it can be shown."""
    shown = Live(job_name, sys.stderr or io.StringIO())
    with ExitStack() as on_screen:
        with suppress(Exception):
            if shown.stream.isatty():
                console = Console(file=shown.stream)
                table = RichLive(get_renderable=shown.table, console=console, refresh_per_second=4)
                on_screen.callback(_stop, table)
                table.start(refresh=True)
        yield shown


def _stop(table: RichLive) -> None:
    with suppress(Exception):
        table.stop()


def counted(number: int, what: str) -> str:
    """``3 rows``, ``1 row``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def rate_text(rate: float) -> str:
    """A rate with as many digits as say something."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 1 or rate == 0 else f"{rate:.2g}"


def bytes_text(number: float) -> str:
    """``1.5 GiB``, ``300 MiB``."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def duration_text(seconds: float) -> str:
    """``2 h 05 min``, ``3 min 20 s``, ``12 s``, ``1.3 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    if minutes:
        return f"{minutes} min {rest:02d} s"
    return f"{rest} s" if rest >= 10 else f"{seconds:.2g} s"
