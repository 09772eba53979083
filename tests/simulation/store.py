"""Files in memory, of a store that fails at times."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from tests.simulation.settings import NAMES, Wrong, value

from latentmill.storage.store import Found, Item, Storage

if TYPE_CHECKING:
    from tests.simulation.world import World


class Store(Storage):
    """Files in memory, of a store that may fail, tear what is written aside, or do what a dead process had asked for."""

    def __init__(self, world: World) -> None:
        super().__init__("memory")
        self.world = world
        self.files: dict[str, bytes] = {}
        self.temporary: dict[str, bytes] = {}
        self.uses = 0

    def each(self, ask: Callable[[Item], Found], items: Iterable[Item], in_flight: int = 0) -> Iterator[Found]:
        """In one thread: what fails is of the seed."""
        return map(ask, items)

    def _used(self) -> None:
        self.uses += 1
        if self.world.trouble("store"):
            raise OSError("the store does not answer")

    @contextmanager
    def aside(self, name: str) -> Iterator[str]:
        self.world.order += 1
        temporary = f"{self.world.order}-{name}"
        try:
            yield temporary
        finally:
            self.temporary.pop(temporary, None)

    def create(self, name: str, content: str | bytes) -> bool:
        self._used()
        if name in self.files:
            return False
        self.publish(name, content if isinstance(content, bytes) else self.temporary[content])
        return not self.world.trouble(
            "misheard"
        )  # the answer was lost, the request made again, and the name taken: by us

    def publish(self, name: str, content: bytes) -> None:
        """Let a file appear, under the eyes of the world."""
        if name.startswith("data/"):
            if name in self.files:
                raise Wrong(f"{name} was there, and is another now")
            shard = int(name.removeprefix("data/"))
            settings = self.world.settings
            numbers = range(shard * settings.rows_per_shard, (shard + 1) * settings.rows_per_shard)
            try:
                found = json.loads(content)
            except ValueError:
                raise Wrong(f"{name} is not whole") from None
            planned = sorted({*numbers} & {*settings.numbers})
            planned = planned[: len(planned) - found["not needed"]]
            if (
                sorted([*(row for row, _ in found["rows"]), *found["errors"], *(row for row, *_ in found["filtered"])])
                != planned
            ):
                raise Wrong(f"{name} has not the rows that were planned: {found}")
            if wrong := [(row, drawn) for row, drawn, _ in found["filtered"] if settings.filtered.get(row) != drawn]:
                raise Wrong(f"{name} says that rows {wrong} are filtered, after so many samples, and they are not")
            if wrong := [
                row for row, made in found["rows"] if made != value(row, len(NAMES) - 1, settings.passes_at[row])
            ]:
                raise Wrong(f"{name} has other rows' values at {wrong}")
        self.files[name] = content

    def put(self, name: str, content: bytes) -> None:
        self._used()
        self.files[name] = content

    def read(self, name: str) -> bytes:
        self._used()
        if name not in self.files:
            raise FileNotFoundError(name)
        return self.files[name]

    def open(self, name: str) -> BinaryIO:
        raise NotImplementedError

    def half_done(self, shard: int) -> str:
        """The newest file of a shard's half-done rows."""
        names = [name for name in self.names("half_done") if name.startswith(f"{shard:05d}-")]
        return max(names, default="", key=lambda name: int(name.split("-")[1]))

    def names(self, folder: str) -> list[str]:
        return [name.removeprefix(f"{folder}/") for name in self.files if name.startswith(f"{folder}/")]

    def delete(self, name: str) -> None:
        self._used()
        self.files.pop(name, None)

    def move(self, name: str, to: str) -> None:
        self.files[to] = self.files.pop(name)

    def sweep(self, before: float | None = None) -> None:
        pass

    def size(self, name: str) -> int | None:
        self._used()
        return len(self.files[name]) if name in self.files else None
