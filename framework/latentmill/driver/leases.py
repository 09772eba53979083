"""Who works on which shard, where several drivers work on one dataset: to save work, and for nothing else.

A lease is a file, ``leases/00007``, with the name of the driver that created it. A driver says that it is alive by a
file of its own that it changes every few seconds; one whose file stays the same for a minute, by the clock of whoever
looks, has lost its leases. No two clocks are compared. A driver that was stopped for an hour and goes on may work on what
another has taken over by then: both commit, and the commit decides.

On Ctrl-C, on SIGTERM and on an error a driver leaves ``with Leases(...)`` and gives all its leases back there. One that is
killed gives nothing back: others on its machine see that its process is gone, those on other machines wait for a minute.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Set
from contextlib import suppress
from pathlib import Path

from latentmill.driver.messages import Claimed, LeasesSeen
from latentmill.storage import Storage

BEAT_EVERY = 10.0
"""Seconds between two signs of life, and between two looks at the others'."""
MAX_SILENCE = 60.0
"""Seconds without a sign of life after which a driver counts as gone."""
MAX_FAILED_CLAIMS = 2
"""Claims in a row that the store may fail before it is taken for broken."""


class Leases:
    """This driver's leases, and what it knows of the others'. Its heart beats from ``with`` to the end."""

    def __init__(
        self,
        store: Storage,
        data: Callable[[int], str],
        me: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        half_done: Callable[[int], str] = lambda shard: "",
    ) -> None:
        """``data`` names a shard's file, ``half_done`` that of rows of it that were left half done."""
        self.half_done = half_done
        self.store, self.data, self.clock = store, data, clock
        self.me = me or f"{_here()}/{os.getpid()}/{uuid.uuid4().hex}"
        """Machine, process and a name that nobody else has."""
        self.held: set[int] = set()
        self.lives: dict[str, tuple[bytes, float]] = {}
        """Of each other driver its last sign of life, and when that was new to us."""
        self._looked = clock()
        self._beats = 0
        self.failures = 0
        """Claims that the store failed, one after another."""
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="leases", daemon=True)

    def __enter__(self) -> Leases:
        self.beat()
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._heart.join()
        with suppress(OSError):  # else they are gone in a minute
            self.give_back_all()
            self.store.delete(_life(self.me))

    def claim(self, shard: int) -> Claimed:
        """Try to get a shard; it may turn out to be done.

        Where the store fails once, the shard counts as taken, and is looked at again. Raises OSError if it goes on failing.
        """
        try:
            ours = self._take(f"leases/{shard:05d}")
            done = self.store.exists(self.data(shard))
        except OSError:
            self.failures += 1
            if self.failures > MAX_FAILED_CLAIMS:
                raise
            return Claimed(shard, "taken")
        self.failures = 0
        if ours:
            self.held.add(shard)
        if done:
            self.keep(self.held - {shard})
            return Claimed(shard, "done")
        return Claimed(shard, "ours", self.half_done(shard)) if ours else Claimed(shard, "taken")

    def _take(self, name: str) -> bool:
        for _ in range(2):
            if self.store.create(name, self.me.encode()):
                return True
            with suppress(FileNotFoundError):  # given back just now
                owner = _named(self.store.read(name))
                if owner == self.me:  # we have it, and never heard that we got it
                    return True
                if self._is_gone(owner):
                    self.store.put(name, self.me.encode())
                    return True
                return False
        return False

    def keep(self, shards: Set[int]) -> None:
        """Give back all leases but these. One that another has taken over is not ours to give back."""
        if given := self.held - shards:
            self.held -= {shard for shard, is_back in zip(given, self.store.each(self._give_back, given)) if is_back}

    def _give_back(self, shard: int) -> bool:
        try:
            if self._owner(shard) == self.me:
                self.store.delete(f"leases/{shard:05d}")
        except OSError:  # the next time
            return False
        return True

    def _owner(self, shard: int) -> str:
        """Who holds a shard; "" if nobody does."""
        try:
            return _named(self.store.read(f"leases/{shard:05d}"))
        except FileNotFoundError:
            return ""

    def give_back_all(self) -> None:
        """This driver ends: whoever wants its shards may have them now."""
        self.keep(set())

    def look(self, leased_by_others: Set[int]) -> LeasesSeen | None:
        """Every few seconds, what has become of the shards that others hold; None if it isn't time to look, or nobody answers."""
        now = self.clock()
        if not leased_by_others or now < self._looked + BEAT_EVERY:
            return None
        try:
            there = {f"data/{name}" for name in self.store.names("data")}
            done = {shard for shard in leased_by_others if self.data(shard) in there}
            names = {int(name) for name in self.store.names("leases") if name.isdecimal()}
            owners = dict.fromkeys(leased_by_others - done, "")
            held = [*owners.keys() & names]
            owners |= zip(held, self.store.each(self._owner, held))
            drivers = [*{*owners.values()}]
            gone = {owner for owner, is_gone in zip(drivers, self.store.each(self._is_gone, drivers)) if is_gone}
        except OSError:
            self._looked = now
            return None
        self._looked = self.clock() + 20 * (self.clock() - now)  # a store that is slow is asked less often
        return LeasesSeen(frozenset(done), frozenset(shard for shard, owner in owners.items() if owner in gone))

    def _is_gone(self, owner: str) -> bool:
        if owner in ("", self.me) or _was_killed_here(owner):
            return True
        try:
            sign = self.store.read(_life(owner))
        except FileNotFoundError:
            sign = b""
        now = self.clock()
        if self.lives.get(owner, (None,))[0] != sign:
            self.lives[owner] = sign, now
        return now - self.lives[owner][1] >= MAX_SILENCE

    def beat(self) -> None:
        """Show that this driver lives."""
        self.store.put(_life(self.me), f"{self.me} {self._beats}".encode())
        self._beats += 1

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_EVERY):
            with suppress(OSError):  # a store that fails for a while costs the leases, at worst
                self.beat()


def sweep(store: Storage, done: Set[int]) -> None:
    """Remove what drivers that were killed left: leases of shards that are done, and signs of life of this machine's drivers.

    The signs of life of other machines go with ``Storage.sweep``, a day later.
    """
    for name in store.names("leases"):
        with suppress(FileNotFoundError):  # its driver ends, or another sweeps, too
            if name.endswith(".alive"):
                over = _was_killed_here(_named(store.read(f"leases/{name}")).partition(" ")[0])
            else:
                over = name.isdecimal() and int(name) in done
            if over:
                store.delete(f"leases/{name}")


def _was_killed_here(driver: str) -> bool:
    where, _, process = driver.rpartition("/")[0].rpartition("/")
    return where == _here() and process.isdecimal() and not _runs(int(process))


def _named(content: bytes) -> str:
    """The driver that a file names. One that was lost with a machine's power may hold zeros or anything: that is nobody, or one never heard of."""
    return content.decode(errors="replace").replace("\0", "")


def _life(driver: str) -> str:
    return f"leases/{driver.rpartition('/')[2]}.alive"


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def _here() -> str:
    """Names the set of processes that this one can see: the machine's, or the container's; "" where there is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}-{boot}-{os.readlink('/proc/self/ns/pid')}".replace("/", "-")
    except OSError:
        return f"{socket.gethostname()}-{uuid.uuid4().hex}"
