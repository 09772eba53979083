"""Whether a job's workers could work on every node, before anything is started: what each would be checked for, and what they stand on."""

from __future__ import annotations

import json
import logging
import math
import platform
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, TypeVar

from latentmill import generations, parts, storage
from latentmill import plan as planning
from latentmill.config import Job
from latentmill.dataset import Dataset
from latentmill.driver.replicas import Room
from latentmill.errors import PlacementError
from latentmill.exports import of_job
from latentmill.plan import Plan
from latentmill.storage import Storage
from latentmill.text import plural
from latentmill.workers import examination, pools
from latentmill.workers.context import store_environment
from latentmill.workers.everywhere import Everyone, Hello, NoAnswer, nodes
from latentmill.workers.examination import Claims, Remark, said, size
from latentmill.workers.worker import WorkerSetup

logger = logging.getLogger("latentmill")

ANSWER = 60.0
"""Seconds in which a node must answer, where nothing takes long."""
HASH = 600.0
"""Seconds in which it must have hashed its weights, where nobody remembers what they were."""
CLOCKS = 60.0
"""Seconds that a clock may be off. A store that speaks S3 refuses requests of one that is 15 minutes off."""
NAMED = 3
"""Nodes that are named where all are alike."""

T = TypeVar("T")


@dataclass
class Check:
    """What was looked at on all nodes: a line of the table."""

    what: str
    fine: str = ""
    """What there is to say where nothing is wrong."""
    remarks: list[tuple[str, Remark]] = field(default_factory=list)
    """What is to be said of nodes, each with the node's name; "" is for all."""

    @property
    def ok(self) -> bool:
        return not any(remark.wrong for _, remark in self.remarks)


@dataclass
class Examination:
    """What was found."""

    job: str
    nodes: Sequence[str]
    checks: Sequence[Check]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return all(check.ok for check in self.checks)

    def lines(self) -> Iterator[str]:
        """The table: a line of what is fine, one for each thing that is wrong."""
        for check in self.checks:
            by_remark: dict[Remark, list[str]] = defaultdict(list)
            for node, remark in check.remarks:
                by_remark[remark].append(node)
            if check.ok:
                yield f"  ok   {check.what:<14} {check.fine}".rstrip()
            for remark, who in by_remark.items():
                yield f" {'WRONG' if remark.wrong else ' note'}  {check.what:<14} {_who(who)}{remark.said}"
        wrong = sum(len({remark for _, remark in check.remarks if remark.wrong}) for check in self.checks)
        yield f"{plural(wrong, 'thing')} to mend" if wrong else "nothing stands in the way"

    def to_json(self) -> str:
        """The same for programs."""
        checks = [
            {
                "what": check.what,
                "ok": check.ok,
                "fine": check.fine,
                "remarks": [
                    {"node": node, "said": remark.said, "wrong": remark.wrong} for node, remark in check.remarks
                ],
            }
            for check in self.checks
        ]
        return json.dumps({"job": self.job, "ok": self.ok, "nodes": list(self.nodes), "checks": checks}, indent=1)


def examine(job: Job) -> Examination:
    """Ask every node of the job's cluster. Nothing is started, and nothing stays that was not there.

    Raises what a run would raise before it starts anything: JobError, PluginError, PlanError, ExportError, ClusterError.
    """
    built = parts.parts(job)
    store = storage.at(job.output, job.single_writer)
    plan = generations.settle(planning.plan(job, built), store, built.source, False)
    of_job.require(job, built, plan, logger.warning)
    with suppress(OSError):  # of the output, which nodes are asked for
        Dataset(store, plan, built.sink).adopt()
    setups = [pools.worker_setup(job, plan, stages) for stages in pools.hosted(job, job.flow)[0]]
    with nodes(job, max(math.ceil(setup.num_gpus) for setup in setups)) as asked:
        return _Doctor(job, plan, setups, store, asked).examine()


class _Doctor:
    """Asks one question after another, and writes down the answers."""

    def __init__(self, job: Job, plan: Plan, setups: Sequence[WorkerSetup], store: Storage, asked: Everyone) -> None:
        self.job, self.plan, self.setups, self.store, self.asked = job, plan, setups, store, asked
        self.names = {node.id: node.name for node in asked.nodes}
        self.checks: dict[str, Check] = {}
        self.answering = set(self.names)
        """Nodes that have answered so far."""
        on_cluster = job.cluster.kind == "ray"
        self.hosts = {
            node.id: [setup for setup in setups if not on_cluster or Room([node.resources]).take(setup.asks)]
            for node in asked.nodes
        }
        """The workers that a node has room for."""

    def examine(self) -> Examination:
        self.greet()
        self.look_at_places()
        self.look_at_packages()
        self.look_at_machines()
        self.look_at_source()
        self.look_at_output()
        return Examination(self.job.name, list(self.names.values()), list(self.checks.values()))

    def check(self, what: str, fine: str = "") -> Check:
        check = self.checks.setdefault(what, Check(what))
        check.fine = fine or check.fine
        return check

    def remark(self, node: str, remark: Remark) -> None:
        self.check(remark.what).remarks.append((self.names.get(node, ""), remark))

    def ask(
        self, what: str, question: Callable[..., T], arguments: Mapping[str, Sequence[Any]], within: float
    ) -> dict[str, T]:
        """What those say that answer; of others that they don't."""
        wanted = {node: given for node, given in arguments.items() if node in self.answering}
        return self._answers(what, self.asked.ask(question, wanted, within))

    def _answers(self, what: str, answers: Mapping[str, T | NoAnswer]) -> dict[str, T]:
        found = {}
        for node, answer in answers.items():
            if not isinstance(answer, NoAnswer):
                found[node] = answer
                continue
            self.remark(node, Remark("nodes" if answer.silent else what, answer.why))
            if answer.silent:
                self.answering.discard(node)
        return found

    def greet(self) -> None:
        """Who is there, and with which Python."""
        for what in ("nodes", "versions"):
            self.check(what)
        before = time.time()
        hello: dict[str, Hello] = self._answers("nodes", self.asked.hello(ANSWER))
        after = time.time()
        ours = {"Python": platform.python_version(), "latentmill": metadata.version("latentmill")}
        ours |= {"Ray": metadata.version("ray")} if self.job.cluster.kind != "inline" else {}
        off = {node: max(before - has["time"], has["time"] - after, 0.0) for node, has in hello.items()}
        for node, has in hello.items():
            for name, version in ours.items():
                there = has[name.lower()]
                if there != version:
                    other = f"{name} {there}" if there else f"no {name}"
                    self.remark(
                        node,
                        Remark("versions", f"has {other}, and the driver {version}. Install the same on every node"),
                    )
            if not has["latentmill"]:
                self.answering.discard(node)
            if off[node] > CLOCKS:
                why = f"has a clock that is {off[node]:.0f} s off the driver's. Have it set by NTP"
                self.remark(node, Remark("clocks", why))
        self.check("nodes", f"{len(hello)} answered: {_some(self.names[node] for node in hello)}")
        self.check("versions", ", ".join(f"{name} {version}" for name, version in ours.items()))
        if len(self.names) > 1:
            self.check("clocks", f"no more than {max(off.values(), default=0.0):.0f} s off the driver's")

    def look_at_places(self) -> None:
        """Whether the workers fit on the nodes, and which nodes have none."""
        if self.job.cluster.kind != "ray":
            return
        from latentmill.workers.nodes import check_placement

        asks = [f"{setup.fewest if setup.replicas else 'some'} x {setup.name}" for setup in self.setups]
        self.check("places", f"there is room for {', '.join(asks)}")
        try:
            check_placement(self.setups, [node.resources for node in self.asked.nodes])
        except PlacementError as error:
            self.remark("", Remark("places", said(error)))
        for node, setups in self.hosts.items():
            if not setups:
                self.remark(
                    node, Remark("places", "has no room for any worker of this job: no more was looked at there", False)
                )
                self.answering.discard(node)

    def look_at_packages(self) -> None:
        wanted = {
            node: [
                *dict.fromkeys(
                    kind
                    for setup in setups
                    for stage in setup.stages
                    for kind in (
                        f"stage {stage.name}",
                        *(
                            self.job.place(kind, stage.name)
                            for kind in self.plan.stages[self.job.flow.index(stage.name)].needs
                        ),
                    )
                )
            ]
            for node, setups in self.hosts.items()
        }
        self.check("libraries", ", ".join(f"{name} {version}" for name, version in self.plan.libraries.items()))
        about = [f"{kind} {it['name']}" for kind, it in self.plan.plugins.items() if kind.partition(" ")[0] != "stage"]
        self.check("plugins", f"as the driver's, and so are their weights: {', '.join(about)}")
        if self.plan.models:
            self.check("models", "each node has them, or has room for them")
        arguments = {node: (self.job, self.plan, kinds) for node, kinds in wanted.items()}
        for node, remarks in self.ask("plugins", examination.packages, arguments, HASH).items():
            for remark in remarks:
                self.remark(node, remark)

    def look_at_machines(self) -> None:
        given = store_environment()
        arguments = {
            node.id: (
                given,
                self.job.output,
                Claims(node.resources.get("GPU", 0.0), _object_store(self.job, node.resources)),
            )
            for node in self.asked.nodes
        }
        found = self.ask("machine", examination.machine, arguments, ANSWER)
        amounts = [amounts for amounts, _ in found.values()]
        if given:
            self.check("credentials", f"every worker is given the driver's {', '.join(sorted(given))}")
        if any(amount.gpus is not None for amount in amounts):
            self.check("GPUs", f"{sum(amount.gpus or 0 for amount in amounts)} are seen")
        least: dict[str, int] = {}
        for place, free in (each for amount in amounts for each in amount.disks.items()):
            least[place] = min(free, least.get(place, free))
        self.check("disks", ", ".join(f"{size(free)} free for {place}" for place, free in least.items()))
        if shared := [amount.shared_memory for amount in amounts if amount.shared_memory is not None]:
            self.check("shared memory", f"{size(min(shared))}{' or more' * (len(shared) > 1)}")
        for node, (_, remarks) in found.items():
            for remark in remarks:
                self.remark(node, remark)

    def look_at_source(self) -> None:
        first = self.setups[0]
        arguments = {node: (self.job, self.plan) for node, setups in self.hosts.items() if first in setups}
        files, rows = len(self.plan.fragments), self.plan.rows // self.plan.samples_per_row
        self.check("source", f"{plural(rows, 'row')} in {plural(files, 'file')}, as planned; the first can be read")
        for node, remarks in self.ask("source", examination.source, arguments, ANSWER).items():
            for remark in remarks:
                self.remark(node, remark)

    def look_at_output(self) -> None:
        """All nodes see what the driver writes, and of all that create one name exactly one does."""
        url, last = self.job.output, self.setups[-1]
        writers = [node for node, setups in self.hosts.items() if last in setups and node in self.answering]
        seen, contested = (f".tmp/{uuid.uuid4().hex}-doctor" for _ in range(2))
        self.check(
            "output",
            f"{url} can be written, {'and is one place for all' if len(writers) > 1 else 'and keeps its names'}",
        )
        with self.store.visit():
            try:
                self.store.check()
                self.store.create(seen, b"driver")
                arguments = {node: (self.job, seen, contested, node.encode()) for node in writers}
                found = self.ask("output", examination.output, arguments, ANSWER)
                there = self.store.read(contested) if self.store.exists(contested) else b""
            except OSError as error:
                self.remark("", Remark("output", f"the driver can't write to {url}: {said(error)}"))
                return
            finally:
                for name in (seen, contested):
                    with suppress(OSError):
                        self.store.delete(name)
        one = "the output must be one folder or store for all nodes, by its whole path"
        for node, created in found.items():
            if not created.sees:
                self.remark(node, Remark("output", f"doesn't see what the driver writes to {url}: {one}"))
            elif not self.job.single_writer and created.there != there:
                self.remark(node, Remark("output", f"writes what the driver doesn't see to {url}: {one}"))
        winners = [node for node, created in found.items() if created.won]
        if not self.job.single_writer and len(winners) > 1:
            several = f"all created one name in {url}, which one alone may: exactly-once rests on it. Set single_writer=true, or write elsewhere"
            for node in winners:
                self.remark(node, Remark("output", several))


def _object_store(job: Job, resources: Mapping[str, float]) -> float | None:
    """Bytes that a node's object store may have; None if Ray isn't started yet."""
    return {"inline": 0.0, "local": None}.get(job.cluster.kind, resources.get("object_store_memory", 0.0))


def _some(names: Iterator[str]) -> str:
    found = list(names)
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return f"{', '.join(found[:NAMED])}{more}"


def _who(names: Sequence[str]) -> str:
    return f"{_some(iter(names))} " if any(names) else ""
