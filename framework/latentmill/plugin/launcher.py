"""Launcher: where a job is started that shall not run in this process, and what becomes of it there."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias

from latentmill.plugin.contract import Plugin

RETRY_CODES = frozenset({1, 4, 130})
"""Exit codes of ``latentmill run`` after which the same command may go on, at once or later; after any other it would fail again."""


@dataclass(frozen=True)
class WorkerNeeds:
    """What each worker of a kind asks for."""

    stages: tuple[str, ...]
    """The stages that it hosts."""
    replicas: int | None
    """Workers; None (``auto``): as many as are of use and there is room for, one at least."""
    num_cpus: float
    num_gpus: float
    """A share of one, or whole ones."""
    memory: int | None
    """Bytes of main memory; None: nothing is said."""
    accelerator_type: str | None
    resources: Mapping[str, float]
    """Ray's own, by name."""


@dataclass(frozen=True)
class Submission:
    """A job as a launcher is given it: checked, and composed to one file that needs no other."""

    id: str
    """A name for it there that nobody has: lower-case letters, digits and hyphens, from a letter on, 47 at most (a label of DNS)."""
    name: str
    """The job's name, as people and the plan call it: any text that a file's name may be."""
    text: str
    """The job's file: YAML with all overrides in it, of which the output is one. Environment variables stand in it as
    ``${oc.env:NAME}``, so their values are not there; where the job runs they must be set."""
    output: str
    """A URL, or a path from the root."""
    folder: str
    """Where it was submitted from: relative paths in the job lead from there. Of use where this machine's paths are seen."""
    needs: tuple[WorkerNeeds, ...]
    """Its workers, kind by kind, in the order of the flow."""
    without_ray: bool
    """The job says ``cluster=inline``: one process does it all."""
    waits: bool
    """The job says itself how long it waits for nodes: ``cluster.wait``."""
    grace: float
    """Seconds that its driver takes to end, once it is told to."""
    grow: bool = False
    """``--grow``: rows that have come to the source since are taken in."""
    folders: Mapping[str, str] = field(default_factory=dict)
    """Folders beside ``output`` that it writes, by the keys that name them: ``export.folder``, ``prompt_cache``."""

    @property
    def file(self) -> str:
        """What the file must be called where it runs, since a job's name is its file's: ``NAME.yaml``. It may have blanks in it."""
        return f"{self.name}.yaml"

    def command(self, file: str | None = None, address: str | None = None, wait: str | None = None) -> list[str]:
        """The words that run it, or go on with it: to be quoted for a shell, one by one.

        ``file``: the path of the job's file there; None: ``NAME.yaml`` in the folder where the command runs. ``address`` of the Ray cluster
        that its workers shall run on: ``auto`` is the one that the machine is a node of; None leaves what the job says. ``wait``: for how long it waits for nodes there,
        as ``10m``, where the job does not say so.
        """
        joined = [] if address is None else ["cluster.kind=ray", f"cluster.address={address}"]
        waiting = [] if wait is None or self.waits else [f"cluster.wait={wait}"]
        here = f"./{self.file}" if self.file.startswith("-") else self.file  # else it would be an option
        return ["latentmill", "run", *["--grow"] * self.grow, file or here, *joined, *waiting]

    def check_grace(self, grace: int) -> None:
        """Raises ValueError if a target that gives a driver so many seconds would kill it before it has ended."""
        if grace < self.grace:
            raise ValueError(f"target.grace={grace} is less than the job's own grace of {self.grace:g} s")


@dataclass(frozen=True)
class Submitted:
    """A job that was submitted, as a launcher meets it again, in another process and days later."""

    id: str
    """The Submission's."""
    handle: str
    """What ``submit`` returned."""
    folder: Path
    """A folder of its own on this machine, with what ``files`` gave. What the launcher wants to remember may lie there, too."""


StateWord: TypeAlias = Literal["queued", "running", "ended", "unknown"]


@dataclass(frozen=True)
class LaunchState:
    """What a submitted job does now."""

    word: StateWord
    """``queued``: nothing of it runs yet, or it waits to be started again. ``ended``: it won't run again by itself. ``unknown``: there is
    no trace of it where it was submitted to."""
    exit_code: int | None = None
    """Of the command, once it has ended and that is known. Of several drivers: the first that is not 0, else 0."""
    detail: str = ""
    """In a few words, for people: why it waits, that it was cancelled, how many of its drivers run."""


class Launcher(Plugin):
    """Starts jobs somewhere else, and says what became of them: ``latentmill submit JOB --to NAME``.

    Built from ``conf/target/NAME.yaml`` and ``target.key=value``: one keyword argument a setting, typed. A launcher brings its config, if it has more
    to say than its constructor's defaults, as ``target/NAME.yaml`` in its package of ``latentmill.conf``. It is built again for each command, by the
    settings that were submitted with, and keeps nothing in itself: what a later command must know is in the handle, or in the folder.

    A ValueError is a sentence for people: what is asked can't be done so, do not retry. An OSError: the target does not answer, or refuses now.
    Anything asked of a target has a time limit of its own, of some seconds.

    Secrets: no value of an environment variable is in what ``files`` gives, in a handle, or in a setting; people name the variables that shall
    go along, in a setting ``env`` (a list of names), and their values are read in ``submit`` and go by the target's own way.
    """

    shares_files: ClassVar[bool] = False
    """Whether paths of this machine mean the same where jobs run. If not, a job with a relative path is refused."""

    @abstractmethod
    def files(self, submission: Submission) -> Mapping[str, str]:
        """What would be written or sent, by file name: scripts, manifests, a task. ``--dry-run`` prints it, and nothing else is done.

        The same for the same: no clock, no random number, no question to the target. The job's own file is ``submission.text``: name it here
        where it travels as a file. Raises ValueError for settings, or needs, that don't fit.
        """

    @abstractmethod
    def submit(self, submission: Submission, folder: Path) -> str:
        """Start it, and return the handle by which the target knows it: one line. It must not wait until it runs.

        ``folder`` is the job's own, empty but for what ``files`` gave, which the framework has written there.
        """

    @abstractmethod
    def state(self, job: Submitted) -> LaunchState:
        """What it does now."""

    @abstractmethod
    def log(self, job: Submitted, follow: bool) -> Iterator[str]:
        """What its driver has said, stdout and stderr together, in pieces of any length; of several drivers, one after another.

        ``follow``: go on until it has ended, from the time on at which it begins to run. Nothing, if there is nothing yet.
        """

    @abstractmethod
    def cancel(self, job: Submitted) -> None:
        """Ask it to end, or not to begin; it is sent SIGTERM, so that its driver may finish what is nearly done. One that has ended is left alone."""
