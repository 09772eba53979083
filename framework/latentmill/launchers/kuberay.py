"""KubeRay: a RayJob, which makes a Ray cluster on Kubernetes for the time of the job. Asked through kubectl."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentmill.launchers.manifest import HEAD_STORE, SHARED_MEMORY, NodeGroup, Pods, PodSize, as_yaml, rayjob
from latentmill.launchers.nodes import ANY_GPU, NO_GPU, Group
from latentmill.launchers.nodes import groups as needed
from latentmill.launchers.rayjob import SAID
from latentmill.plugin import Launcher, LaunchState, Submission, Submitted
from latentmill.text import first_line, near
from latentmill.values import in_bytes

MANIFEST, CANCELLED = "rayjob.yaml", "cancelled"
"""Names in the job's folder."""
WITHIN, LOOK_AGAIN = 60.0, 5.0
"""Seconds for kubectl to answer, and between two looks for a log that is not there yet."""
REFUSED = re.compile(
    r"\((NotFound|Invalid|Forbidden|AlreadyExists)\)|no matches for kind|unknown field|validati|decoding"
)
"""In what kubectl says: the same command would fail again."""
ON_GPUS = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
QUEUED = {
    "Initializing": "its cluster starts",
    "Retrying": "it failed, and gets a new cluster",
    "Suspending": "it is suspended",
    "Suspended": "it is suspended",
}


class KubeRay(Launcher):
    """A RayJob. Its handle is ``NAMESPACE/NAME@CONTEXT``: people change kubectl's context from day to day."""

    contract = 2

    def __init__(
        self,
        image: str,
        namespace: str | None = None,
        volumes: dict[str, str] | None = None,
        env: Sequence[str] = (),
        secrets: Sequence[str] = (),
        auth_secret: str | None = None,
        retries: int = 3,
        grace: int = 120,
        gpus: int = 1,
        cpus: int = 8,
        memory: str = "32GiB",
        object_store: float = 0.3,
        spill: str = "100GiB",
        nodes: int | None = None,
        max_nodes: int | None = None,
        groups: dict[str, dict[str, Any]] | None = None,
        head: dict[str, Any] | None = None,
        node_selector: dict[str, str] | None = None,
        tolerations: Sequence[dict[str, Any]] = (),
        service_account: str | None = None,
        pull_secrets: Sequence[str] = (),
        labels: dict[str, str] | None = None,
    ) -> None:
        """What conf/target/kuberay.yaml says. Raises ValueError for values that can't be."""
        self.namespace, self.volumes, self.labels = namespace, dict(volumes or {}), dict(labels or {})
        self.env, self.secrets, self.auth_secret, self.retries = list(env), list(secrets), auth_secret, retries
        self.each: dict[str, Any] = {
            "gpus": gpus,
            "cpus": cpus,
            "memory": memory,
            "object_store": object_store,
            "spill": spill,
            "nodes": nodes,
            "max_nodes": max_nodes,
            "node_selector": dict(node_selector or {}),
            "tolerations": list(tolerations),
        }
        self.groups, self.head = dict(groups or {}), dict(head or {"cpus": 2, "memory": "8GiB"})
        self.pods = Pods(image, self.volumes, [], service_account, list(pull_secrets), grace)
        for name, said in {**{f"groups.{name}": said for name, said in self.groups.items()}, "head": self.head}.items():
            for key in said:
                if key not in self.each:
                    raise ValueError(
                        f"target.{name}.{key} is no setting{near(key, self.each)}; there are: {', '.join(self.each)}"
                    )
        for path in self.volumes.values():
            if not path.startswith("/"):
                raise ValueError(f"target.volumes: {path!r} is no path from the root")
        for name, number, least in (("retries", retries, 0), ("grace", grace, 1)):
            if number < least:
                raise ValueError(f"target.{name}={number}: {least} or more are expected")

    # ------------------------------------------------------------------------------------------ what is sent

    def files(self, submission: Submission) -> Mapping[str, str]:
        self._check_paths(submission)
        secrets = [*self.secrets, *([_secret_of(submission.id)] if self.env else [])]
        found = needed(submission.needs, lambda group: self._node(group).shape)
        head = self._node("head", {**self.head, "gpus": 0})
        document = rayjob(
            submission,
            replace(self.pods, secrets=secrets),
            head,
            [self._group(group) for group in found],
            self.auth_secret,
            self.retries,
            self.labels,
        )
        return {MANIFEST: as_yaml(document)}

    def _check_paths(self, submission: Submission) -> None:
        if submission.without_ray:
            raise ValueError("the job says cluster=inline, and a RayJob is a cluster: leave that out")
        if "://" not in submission.output and not any(
            Path(submission.output).is_relative_to(path) for path in self.volumes.values()
        ):
            raise ValueError(
                f"output={submission.output} would be lost with its pod: give a URL, or a path on a volume, as in target.volumes.CLAIM=/shared"
            )
        named = set(re.findall(r"""oc\.env:[\s'"\\]*([A-Za-z_]\w*)""", submission.text))
        if missing := sorted(named - set(self.env)) if not self.secrets else []:
            raise ValueError(
                f"the job needs {', '.join(missing)} of its environment: target.env=[{', '.join(missing)}] sends it along, or name a Secret in target.secrets"
            )

    def _group(self, group: Group) -> NodeGroup:
        said = self._said(group.name)
        least, most = max(group.nodes, said["nodes"] or 0), said["max_nodes"]
        if most is not None and most < least:
            raise ValueError(f"target.max_nodes={most} of group {group.name}: {least} are needed at least")
        if not group.grows:  # more nodes would find no worker
            most = None
        return NodeGroup(group.name, self._node(group.name), least, most or least)

    def _said(self, group: str) -> dict[str, Any]:
        return {**self.each, **self.groups.get(group, {})}

    def _node(self, group: str, said: Mapping[str, Any] | None = None) -> PodSize:
        """What a node of the group asks for."""
        found: dict[str, Any] = self._said(group) if said is None else {**self.each, "object_store": None, **said}
        if group not in (ANY_GPU, NO_GPU, "head") and not found["node_selector"]:
            raise ValueError(
                f"which nodes have the accelerator_type {group}? Labels say so: target.groups.{group}.node_selector={{nvidia.com/gpu.product: ...}}"
            )
        gpus = 0 if group == NO_GPU else found["gpus"]
        memory = int(in_bytes(found["memory"]))
        store = HEAD_STORE if found["object_store"] is None else int(memory * found["object_store"]) >> 20 << 20
        if store + SHARED_MEMORY >= memory:
            raise ValueError(f"target: object_store={found['object_store']} leaves nothing of memory={found['memory']}")
        tolerations = [*([ON_GPUS] if gpus else []), *found["tolerations"]]
        return PodSize(
            gpus, found["cpus"], memory, store, int(in_bytes(found["spill"])), found["node_selector"], tolerations
        )

    # ---------------------------------------------------------------------------------------------- kubectl

    def submit(self, submission: Submission, folder: Path) -> str:
        values = {name: os.environ[name] for name in self.env if name in os.environ}
        if missing := [name for name in self.env if name not in values]:
            raise ValueError(f"target.env names {', '.join(missing)}, which your shell does not have")
        context = _context()
        words = [*_at(self.namespace, context), "create", "-f", str(folder / MANIFEST), "-o", "json"]
        made = json.loads(_kubectl(words))["metadata"]
        if values:
            try:
                _kubectl([*_at(made["namespace"], context), "create", "-f", "-"], _secret(submission.id, made, values))
            except (OSError, ValueError):  # nobody would remember it, and its pods would wait for ever
                _kubectl([*_at(made["namespace"], context), "delete", "rayjob", made["name"], "--wait=false"])
                raise
        return f"{made['namespace']}/{made['name']}@{context}"

    def state(self, job: Submitted) -> LaunchState:
        try:
            status = self._status(job)
        except ValueError as error:
            return LaunchState("unknown", detail=str(error))
        word, ray_job = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
        failed = int(status.get("failed", 0))
        if word == "Running":
            return LaunchState("running", detail=f"retry {failed} of {self.retries}" if failed else "")
        if word == "Complete":
            if ray_job == "SUCCEEDED":
                return LaunchState("ended", 0)
            cancelled = (job.folder / CANCELLED).exists()
            return LaunchState("ended", self._said_code(job), "cancelled" if cancelled else "stopped")
        if word in ("Failed", "ValidationFailed"):
            said = status.get("message") or status.get("reason") or word
            return LaunchState("ended", self._said_code(job), first_line(said, 200))
        if word == "Suspended" and (job.folder / CANCELLED).exists():
            return LaunchState("ended", detail="cancelled")
        return LaunchState("queued", detail=QUEUED.get(word, ""))

    def log(self, job: Submitted, follow: bool) -> Iterator[str]:
        seen: set[str] = set()
        while True:
            ended = not follow or self.state(job).word in ("ended", "unknown")
            for pod in self._pods(job, f"job-name={_name(job)}"):
                if pod not in seen:  # each cluster that is tried has one of its own
                    running = subprocess.Popen(
                        ["kubectl", *_where(job), "logs", pod, *(["--follow"] if follow else [])],
                        stdout=subprocess.PIPE,
                        stderr=subprocess.DEVNULL,
                        text=True,
                    )
                    yield from _said_by(running)
                    if running.returncode == 0:  # else its container is not there yet
                        seen.add(pod)
            if ended:
                return
            time.sleep(LOOK_AGAIN)

    def cancel(self, job: Submitted) -> None:
        status = self._status(job)
        word = status.get("jobDeploymentStatus", "")
        if word in ("Complete", "Failed", "ValidationFailed"):
            return
        if word != "Running":  # nothing of it runs yet
            _kubectl([*_where(job), "patch", "rayjob", _name(job), "--type=merge", "-p", '{"spec":{"suspend":true}}'])
        else:
            # A RayJob that is deleted or suspended takes its pods away at once; a Ray job that is stopped has its time, and is over.
            heads = self._pods(job, f"ray.io/cluster={status['rayClusterName']},ray.io/node-type=head")
            if not heads:
                raise OSError("its head is not to be seen")
            stop = ["ray", "job", "stop", "--no-wait", "--address", "http://127.0.0.1:8265", status["jobId"]]
            _kubectl([*_where(job), "exec", heads[-1], "-c", "ray-head", "--", *stop])
        (job.folder / CANCELLED).touch()

    def _status(self, job: Submitted) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(_kubectl([*_where(job), "get", "rayjob", _name(job), "-o", "json"]))
        return found.get("status") or {}

    def _pods(self, job: Submitted, selector: str) -> list[str]:
        words = [*_where(job), "get", "pods", "-l", selector, "--sort-by=.metadata.creationTimestamp", "-o", "name"]
        return [pod for pod in _kubectl(words).split() if pod]

    def _said_code(self, job: Submitted) -> int | None:
        """What the log's end says, if it is still there: KubeRay knows no exit codes."""
        try:
            pods = self._pods(job, f"job-name={_name(job)}")
            said = _kubectl([*_where(job), "logs", pods[-1], "--tail=50"]) if pods else ""
        except (OSError, ValueError):
            return None
        codes = re.findall(rf"^latentmill: {SAID} (\d+)$", said, re.MULTILINE)
        return int(codes[-1]) if codes else None


def _secret_of(name: str) -> str:
    return f"{name}-env"


def _secret(name: str, owner: Mapping[str, str], values: Mapping[str, str]) -> str:
    """The Secret that pods wait for. It belongs to the RayJob, so it goes when that goes; no file and no command line has ever had it."""
    owned = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": owner["name"], "uid": owner["uid"]}
    about = {"name": _secret_of(name), "ownerReferences": [owned]}
    return json.dumps({"apiVersion": "v1", "kind": "Secret", "metadata": about, "stringData": dict(values)})


def _context() -> str:
    try:
        return _kubectl(["config", "current-context"]).strip()
    except (OSError, ValueError):  # in a pod there is none
        return ""


def _at(namespace: str | None, context: str) -> list[str]:
    return [*(["--context", context] if context else []), *(["--namespace", namespace] if namespace else [])]


def _where(job: Submitted) -> list[str]:
    namespace, _, rest = job.handle.partition("/")
    return _at(namespace, rest.partition("@")[2])


def _name(job: Submitted) -> str:
    return job.handle.partition("/")[2].partition("@")[0]


def _kubectl(words: Sequence[str], sent: str | None = None) -> str:
    """What kubectl says. Raises ValueError for what it would refuse again, and OSError for what it might not."""
    try:
        done = subprocess.run(["kubectl", *words], input=sent, capture_output=True, text=True, timeout=WITHIN)
    except FileNotFoundError:
        raise ValueError("kubectl is not installed here: --dry-run prints what it would be given") from None
    except subprocess.TimeoutExpired:
        raise OSError(f"kubectl has had no answer for {WITHIN:g} s") from None
    if done.returncode:
        said = f"kubectl: {first_line(done.stderr) or f'exit code {done.returncode}'}"
        raise ValueError(said) if REFUSED.search(done.stderr) else OSError(said)
    return done.stdout


def _said_by(running: subprocess.Popen[str]) -> Iterator[str]:
    """What a command says, while it says it."""
    with running:
        try:
            assert running.stdout
            yield from running.stdout
            running.wait()
        finally:
            running.terminate()
