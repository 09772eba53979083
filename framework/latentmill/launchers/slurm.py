"""Slurm: a batch script is written and submitted; each of its drivers starts Ray on its own nodes, and goes on after preemption or a time limit."""

from __future__ import annotations

import math
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from latentmill.launchers import programs
from latentmill.plugin import RETRY_CODES, Launcher, LaunchState, StateWord, Submission, Submitted

JOB_SCRIPT = "job.sh"
ANSWERS_WITHIN = 30
"""Seconds that a command of Slurm's may take."""
EARLY = 60
"""Seconds that Slurm may give its notice before it is asked to."""
ASK_EVERY = 2.0
"""Seconds between two looks at a log that is followed."""
ALWAYS_SENT = ("PATH", "HOME", "USER", "LANG")
"""Variables that go along whatever ``target.env`` names."""
SLURM_QUEUED = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
SLURM_ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
    "REVOKED",
}
"""Slurm's words for a job's state; in any other it has nodes."""


class Slurm(Launcher):
    """Submits the job by ``sbatch``. Its handle is Slurm's number.

    Where this is run, ``sbatch``, ``scontrol`` and ``scancel`` are on the path, and this machine's files are those of the nodes.
    """

    contract = 2
    shares_files = True

    def __init__(
        self,
        nodes: int = 1,
        drivers: int = 1,
        gpus_per_node: int | None = None,
        cpus_per_node: int | None = None,
        memory: str | None = None,
        time: str | None = None,
        partition: str | None = None,
        account: str | None = None,
        qos: str | None = None,
        exclusive: bool = False,
        requeue: bool = True,
        retries: int = 3,
        grace: int = 120,
        setup: str | None = None,
        env: list[str] | None = None,
        options: list[str] | None = None,
    ) -> None:
        self.nodes, self.drivers, self.grace, self.retries = nodes, drivers, grace, retries
        self.gpus_per_node, self.cpus_per_node, self.memory = gpus_per_node, cpus_per_node, memory
        self.time, self.partition, self.account, self.qos = time, partition, account, qos
        self.exclusive, self.requeue, self.setup = exclusive, requeue, setup
        self.env, self.options = env, options or []

    def files(self, submission: Submission) -> Mapping[str, str]:
        for name, least in (("nodes", 1), ("drivers", 1), ("grace", 1), ("retries", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"target.{name} must be {least} or more, not {getattr(self, name)}")
        submission.check_grace(self.grace)
        limit = _seconds(self.time or "")
        # It would be told to end as it begins, and begin again for ever. 0 is no limit.
        if limit and limit < self.grace + EARLY:
            raise ValueError(
                f"target.time={self.time} must be target.grace, {self.grace} seconds, and {EARLY} more at least"
            )
        if submission.without_ray and self.nodes > 1:
            raise ValueError(f"cluster=inline is one process: target.nodes must be 1, not {self.nodes}")
        if wrong := [name for name in self.env or [] if not re.fullmatch(r"[A-Za-z_]\w*", name)]:
            raise ValueError(f"target.env holds names of environment variables, and {wrong[0]!r} is none")
        if self.env is not None:  # else all go along
            set_there = re.findall(r"\w+", self.setup or "")
            programs.check_variables(submission, [*ALWAYS_SENT, *self.env, *set_there])
        lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in self._options(submission)), ""]
        setup = self.setup or f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"'
        address = None if submission.without_ray else "$address"
        command = " ".join(_quoted(word) for word in submission.command(f"$job/{submission.file}", address))
        output = submission.output if "://" not in submission.output else ""
        end = _end_mark(submission.text)
        text = files("latentmill.launchers").joinpath("slurm.sh").read_text(encoding="utf-8")
        ray = files("latentmill.launchers").joinpath("slurm_ray.sh").read_text(encoding="utf-8")
        marks = {
            "SETUP": setup,
            "OUTPUT": f"output={shlex.quote(output)}",
            "POLICY": f"requeue={'yes' if self.requeue else ''} retries={self.retries} again_after='{' '.join(map(str, sorted(RETRY_CODES)))}'",
            "JOB": f"cat >\"$job/\"{shlex.quote(submission.file)} <<'{end}'\n{submission.text.rstrip()}\n{end}",
            "RAY": "" if submission.without_ray else ray,
            "COMMAND": f"run {command}",
        }
        # All at once: what is filled in may hold a line that looks like a mark.
        text = re.sub(r"#@([A-Z]+)\n", lambda mark: f"{marks[mark[1]].rstrip()}\n".lstrip("\n"), text)
        return {JOB_SCRIPT: "\n".join(lines) + text}

    def submit(self, submission: Submission, folder: Path) -> str:
        programs.variables(self.env or [])
        log = str(folder / "log-%a" if self.drivers > 1 else folder / "log-0")
        said = _run(["sbatch", "--parsable", f"--output={log}", str(folder / JOB_SCRIPT)])
        return said.strip().partition(";")[0]

    def state(self, job: Submitted) -> LaunchState:
        tasks = _tasks(job)
        if not tasks:  # Slurm forgets a job minutes after its end
            return self._left_behind(job)
        words: list[StateWord] = [_word(task["JobState"]) for task in tasks]
        codes = [_exit_code(task) for task in tasks]
        word: StateWord = "running" if "running" in words else "queued" if "queued" in words else "ended"
        details = [f"{count} {what}" for what, count in Counter(words).items()] if len(words) > 1 else []
        details += sorted(
            {
                f"waits: {task['Reason']}"
                for task in tasks
                if _word(task["JobState"]) == "queued" and task.get("Reason", "None") != "None"
            }
            | {task["JobState"].lower() for task in tasks if task["JobState"] in SLURM_ENDED - {"COMPLETED", "FAILED"}}
        )
        if restarts := sum(int(task.get("Restarts", 0)) for task in tasks):
            details.append(f"started again {restarts} times")
        exit_code = _first_bad(codes) if word == "ended" else None
        return LaunchState(word, exit_code, ", ".join(details))

    def _left_behind(self, job: Submitted) -> LaunchState:
        """What the scripts have left beside their logs."""
        codes = [int(file.read_text() or 1) for file in sorted(job.folder.glob("exit_code-*"))]
        if len(codes) < self.drivers:
            return LaunchState("unknown", detail="Slurm knows it no more, and it did not come to its end")
        return LaunchState("ended", _first_bad(codes))

    def log(self, job: Submitted, follow: bool) -> Iterator[str]:
        read: dict[Path, int] = {}
        while True:
            ended = not follow or self.state(job).word in ("ended", "unknown")  # before they are read to their ends
            for path in sorted(job.folder.glob("log-*")):
                with path.open("rb") as log:
                    log.seek(read.get(path, 0))
                    while piece := log.read(65536):
                        yield piece.decode(errors="replace")
                    read[path] = log.tell()
            if ended:
                return
            time.sleep(ASK_EVERY)

    def cancel(self, job: Submitted) -> None:
        if {_word(task["JobState"]) for task in _tasks(job)} <= {"ended"}:
            return
        _run(["scancel", "--quiet", "--state=PENDING", job.handle])
        if any(_word(task["JobState"]) == "running" for task in _tasks(job)):
            _run(["scancel", "--quiet", "--batch", "--signal=INT", job.handle])

    def _options(self, submission: Submission) -> Iterator[str]:
        """Those of sbatch. What a value means there is for Slurm to say: it is one word, whatever is in it."""
        cpus = math.ceil(sum(need.num_cpus * (need.replicas or 1) for need in submission.needs) / self.nodes)
        gpus = math.ceil(round(sum(need.num_gpus * (need.replicas or 1) for need in submission.needs), 6) / self.nodes)
        gpus = gpus if self.gpus_per_node is None else self.gpus_per_node
        given = {
            "job-name": submission.id,
            "chdir": submission.folder,
            "export": "ALL" if self.env is None else ",".join([*ALWAYS_SENT, *self.env]),
            "nodes": self.nodes,
            "ntasks-per-node": 1,
            "cpus-per-task": self.cpus_per_node or (None if self.exclusive else max(1, cpus)),
            "gpus-per-node": gpus or None,
            "mem": self.memory,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "signal": f"B:TERM@{self.grace}",
            "open-mode": "append",
            "array": f"0-{self.drivers - 1}" if self.drivers > 1 else None,
        }
        for name, value in given.items():
            if value is not None:
                yield f"--{name}={_sbatch_word(str(value))}"
        yield "--requeue" if self.requeue else "--no-requeue"
        yield from ["--exclusive"] * self.exclusive
        yield from ["--no-kill"] * (self.nodes > 1)  # Ray, and the driver, live on without a node
        for option in self.options:
            if not re.fullmatch(r"-[^\n]+", option):
                raise ValueError(
                    f"target.options holds options of sbatch, as --constraint=a100, and {option!r} is none"
                )
            yield option


def _run(words: Sequence[str]) -> str:
    """What a command of Slurm's says. Raises ValueError where it refuses or isn't there, OSError where it doesn't answer."""
    done = programs.ask(words, ANSWERS_WITHIN)
    if done.returncode:
        said = done.stderr.strip() or f"{words[0]} ended with {done.returncode}"
        if re.search(r"Unable to contact|Connection (refused|timed out)|Socket timed out|unavailable", said):
            raise OSError(said)
        raise ValueError(said)
    return done.stdout


def _seconds(limit: str) -> int | None:
    """A time limit in Slurm's words; None if it is none that is known here."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if not found:
        return None
    days, *parts = found.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is None and len(numbers) < 3:  # minutes come first
        numbers.insert(0, 0)
    hours, minutes, seconds = [*numbers, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _tasks(job: Submitted) -> list[dict[str, str]]:
    """What Slurm knows of a job, or of each task of an array: its own names and values; none, if it knows it no more.

    It gives a number anew, some day: a job of another name is another one.
    """
    try:
        said = _run(["scontrol", "--oneliner", "show", "job", job.handle])
    except ValueError as error:
        if "Invalid job id" in str(error):
            return []
        raise
    found = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in said.splitlines()]
    return [task for task in found if "JobState" in task and task.get("JobName") == job.id]


def _word(state: str) -> StateWord:
    return "queued" if state in SLURM_QUEUED else "ended" if state in SLURM_ENDED else "running"


def _exit_code(task: Mapping[str, str]) -> int | None:
    """As a shell has it; None of one that was never run, or was ended."""
    if task["JobState"] not in ("COMPLETED", "FAILED"):
        return None
    code, _, number = task.get("ExitCode", "0:0").partition(":")
    return 128 + int(number) if int(number or 0) else int(code)


def _first_bad(codes: Sequence[int | None]) -> int | None:
    return next((code for code in codes if code != 0), 0)


def _quoted(word: str) -> str:
    """A word for the shell, in which ``$job`` and ``$address`` are the script's."""
    begin = re.match(r"\$job/|cluster\.address=\$address", word)
    if not begin:
        return shlex.quote(word)
    rest = word[begin.end() :]
    return f'"{begin[0]}"' + (shlex.quote(rest) if rest else "")


def _sbatch_word(value: str) -> str:
    if '"' in value or "\n" in value:
        raise ValueError(f"{value!r} can't stand in a script for sbatch: it has a quote or a line break in it")
    value = value.replace("\\", r"\\")  # sbatch takes one away, within quotes, too
    return f'"{value}"' if re.search(r"[\s#'\\]", value) else value


def _end_mark(text: str) -> str:
    """A line that is not in ``text``."""
    mark = "END_OF_JOB"
    while mark in text.splitlines():
        mark += "_"
    return mark
