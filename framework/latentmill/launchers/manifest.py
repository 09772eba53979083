"""A RayJob's manifest (``ray.io/v1``, KubeRay 1.6 and later), as data: ``rayjob``. Every pod has the same image, volumes and secrets."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import yaml

from latentmill.launchers.nodes import ANY_GPU, NO_GPU, Shape
from latentmill.plugin import Submission

JOB_KEY = "latentmill/job"
"""The annotation of the head's pod that the job's file stands in; it is seen as a file, so that no other object has to come and go with it."""
JOB_FOLDER, SPILL_FOLDER = "/etc/latentmill", "/spill"
ANNOTATIONS = 200 * 2**10
"""Bytes that a job's file may have there; all annotations of an object together may have 256 KiB."""
HEAD_STORE = 2**30
"""Bytes of the head's object store: the driver holds references alone."""
SHARED_MEMORY = 2**28
"""Bytes of /dev/shm beside those of the object store: torch's own. Ray takes a disk, or refuses, if it has less than the store asks for."""
NODES_WITHIN = "30m"
"""For how long a job waits for nodes, at the start and for those that are lost; then a new cluster is of more use."""
USER = 1000
"""Of the image, and of Ray's own."""
RIGHTS = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONTAINER_RIGHTS = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
"""What Kubernetes' "restricted" standard asks for."""
TO_THE_DRIVER = (
    "pkill -USR1 -f 'bin/[l]atentmill run'; while pgrep -f 'bin/[l]atentmill run' > /dev/null; do sleep 1; done"
)
"""What the head does before it goes: its first process is Ray, which would end all others at once."""
AS_LONG_AS_ACTORS = (
    "while pgrep -af '^ray::' | grep -qvE ' ray::(IDLE|DashboardAgent|RuntimeEnvAgent)'; do sleep 1; done"
)
"""What a node does before it goes: it stays while a worker is there, for as long as it may. Ray calls a process without work ray::IDLE, and has
two agents on each node, which end with it."""
AFTER_GRACE = 30
"""Seconds for a pod to end beside those that a driver has."""


@dataclass(frozen=True)
class PodSize:
    """What a pod that is a node of Ray asks for."""

    gpus: int
    cpus: int
    memory: int
    """Bytes: the limit of the pod, of which /dev/shm is a part."""
    object_store: int
    spill: int
    """Bytes of the node's disk for what the object store has no room for."""
    node_selector: Mapping[str, str]
    tolerations: Sequence[Mapping[str, Any]]

    @property
    def shape(self) -> Shape:
        """What it has for workers."""
        return Shape(self.gpus, self.cpus, self.memory - self.object_store - SHARED_MEMORY)


@dataclass(frozen=True)
class NodeGroup:
    """Pods that are alike; where ``least`` is below ``most``, Ray's autoscaler says how many."""

    name: str
    """As ``nodes.Group`` has it."""
    node: PodSize
    least: int
    most: int


@dataclass(frozen=True)
class Pods:
    """What all pods have."""

    image: str
    volumes: Mapping[str, str]
    """Claims, and the paths that they are seen at."""
    secrets: Sequence[str]
    """Names of Secrets whose keys are environment variables."""
    service_account: str | None
    pull_secrets: Sequence[str]
    grace: int
    """Seconds for a driver to end, once it is asked; Ray's own are three."""


def rayjob(
    submission: Submission,
    pods: Pods,
    head: PodSize,
    groups: Sequence[NodeGroup],
    auth_secret: str | None,
    retries: int,
    labels: Mapping[str, str],
) -> dict[str, Any]:
    """The RayJob of a submission. Raises ValueError if its file is too large to travel in it."""
    if len(submission.text.encode()) > ANNOTATIONS:
        raise ValueError(f"the job's file has more than {ANNOTATIONS >> 10} KiB: Kubernetes takes no more")
    autoscaling = any(group.least < group.most for group in groups)
    file = f"{JOB_FOLDER}/{submission.file}"
    command = ["python", "-m", "latentmill.launchers.rayjob", *submission.command(file, "auto", NODES_WITHIN)]
    cluster = {
        "rayVersion": metadata.version("ray"),
        "authOptions": {"mode": "token", **({"secretName": auth_secret} if auth_secret else {})},
        **(
            {"enableInTreeAutoscaling": True, "autoscalerOptions": {"securityContext": CONTAINER_RIGHTS}}
            if autoscaling
            else {}
        ),
        "headGroupSpec": {
            "rayStartParams": {**_start(head), "num-cpus": "0"},  # no worker takes the driver's memory
            "template": _head_pod(submission, pods, head),
        },
        "workerGroupSpecs": [
            {
                "groupName": label(group.name),
                "replicas": group.least,
                "minReplicas": group.least,
                "maxReplicas": group.most,
                "rayStartParams": {**_start(group.node), **_accelerator(group)},
                "template": {"spec": _pod("ray-worker", pods, group.node)},
            }
            for group in groups
        ],
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": submission.id, **({"labels": dict(labels)} if labels else {})},
        "spec": {
            # KubeRay hands it to a shell, in a line of its own commands.
            "entrypoint": shlex.join(command),
            # A new cluster whenever this one, or the job on it, has failed. What a new one would not mend ends itself: launchers/rayjob.py.
            "backoffLimit": retries,
            "shutdownAfterJobFinishes": True,
            "submitterPodTemplate": {"spec": _submitter(pods)},
            "rayClusterSpec": cluster,
        },
    }


def label(name: str, most: int = 40) -> str:
    """``name`` as a label of DNS: lower-case letters, digits and hyphens, from a letter on.

    >>> label("NVIDIA_A100 (80G)")
    'nvidia-a100-80g'
    """
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return (plain if plain[:1].isalpha() else f"x-{plain}")[:most].strip("-")


def quantity(size: int) -> str:
    """Bytes as Kubernetes writes them.

    >>> quantity(8 * 2**30), quantity(3 * 2**28), quantity(1000)
    ('8Gi', '768Mi', '1000')
    """
    for unit, power in (("Gi", 30), ("Mi", 20)):
        if size and size % 2**power == 0:
            return f"{size >> power}{unit}"
    return str(size)


def as_yaml(document: Mapping[str, Any]) -> str:
    """The document as YAML that people read: keys in their order, text of many lines in a block, short parts in a line."""
    return str(
        yaml.dump(document, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=140)
    )


LIKE_A_NUMBER = re.compile(r"([-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|0o[0-7]+|[yYnN])\Z")
"""Text that other readers of YAML than this one take for a number, or for yes and no."""


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # whose types are not told
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def text(self, text: str) -> yaml.Node:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _Dumper.text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:other", LIKE_A_NUMBER, None)  # so text like it is put in quotes


def _start(node: PodSize) -> dict[str, str]:
    """Ray's options. The object store lies in the pod's memory: workers are not promised it, too, as KubeRay would do.

    CPUs have no limit, where not every KubeRay looks at what is requested: Ray would count the machine's.
    """
    return {
        "num-cpus": str(node.cpus),
        "object-store-memory": str(node.object_store),
        "memory": str(node.shape.memory),
        "object-spilling-directory": SPILL_FOLDER,
    }


def _accelerator(group: NodeGroup) -> dict[str, str]:
    """Ray finds a GPU's type where there is one; the autoscaler must know it of nodes that are not there yet."""
    if group.name in (ANY_GPU, NO_GPU):
        return {}
    return {"resources": f'"{{\\"accelerator_type:{group.name}\\": 1}}"'}  # as KubeRay's samples have it: twice quoted


def _head_pod(submission: Submission, pods: Pods, head: PodSize) -> dict[str, Any]:
    spec = _pod("ray-head", pods, head)
    container = spec["containers"][0]
    container["env"] = [{"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": str(pods.grace)}]
    container["lifecycle"] = _before_it_goes(TO_THE_DRIVER)
    container["volumeMounts"].append({"name": "job", "mountPath": JOB_FOLDER, "readOnly": True})
    field = {"fieldPath": f"metadata.annotations['{JOB_KEY}']"}
    spec["volumes"].append({"name": "job", "downwardAPI": {"items": [{"path": submission.file, "fieldRef": field}]}})
    return {"metadata": {"annotations": {JOB_KEY: submission.text}}, "spec": spec}


def _submitter(pods: Pods) -> dict[str, Any]:
    """The pod that submits and follows the log: as KubeRay would make it, but for who may pull the image, and who runs in it."""
    container = {
        "name": "ray-job-submitter",
        "image": pods.image,
        "resources": {"requests": {"cpu": "500m", "memory": "200Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
        "securityContext": CONTAINER_RIGHTS,
    }
    return {**_everywhere(pods), "restartPolicy": "Never", "containers": [container]}


def _everywhere(pods: Pods) -> dict[str, Any]:
    return {
        "securityContext": RIGHTS,
        **({"serviceAccountName": pods.service_account} if pods.service_account else {}),
        **({"imagePullSecrets": [{"name": secret} for secret in pods.pull_secrets]} if pods.pull_secrets else {}),
    }


def _before_it_goes(command: str) -> dict[str, Any]:
    return {"preStop": {"exec": {"command": ["bash", "-c", command]}}}


def _pod(name: str, pods: Pods, node: PodSize) -> dict[str, Any]:
    claims = {f"volume-{at}": (claim, path) for at, (claim, path) in enumerate(pods.volumes.items())}
    memory = quantity(node.memory)
    container = {
        "name": name,
        "image": pods.image,
        "resources": {
            "requests": {"cpu": str(node.cpus), "memory": memory},  # no limit of CPUs: what is idle may be used
            "limits": {"memory": memory, **({"nvidia.com/gpu": str(node.gpus)} if node.gpus else {})},
        },
        "securityContext": CONTAINER_RIGHTS,
        "lifecycle": _before_it_goes(AS_LONG_AS_ACTORS),
        **({"envFrom": [{"secretRef": {"name": secret}} for secret in pods.secrets]} if pods.secrets else {}),
        "volumeMounts": [
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            {"name": "spill", "mountPath": SPILL_FOLDER},
            *({"name": volume, "mountPath": path} for volume, (_, path) in claims.items()),
        ],
    }
    shared = {"medium": "Memory", "sizeLimit": quantity(node.object_store + SHARED_MEMORY)}
    return {
        **_everywhere(pods),
        **({"nodeSelector": dict(node.node_selector)} if node.node_selector else {}),
        **({"tolerations": [dict(toleration) for toleration in node.tolerations]} if node.tolerations else {}),
        "terminationGracePeriodSeconds": pods.grace + AFTER_GRACE,
        "containers": [container],
        "volumes": [
            {"name": "shared-memory", "emptyDir": shared},
            {"name": "spill", "emptyDir": {"sizeLimit": quantity(node.spill)}},
            *({"name": volume, "persistentVolumeClaim": {"claimName": claim}} for volume, (claim, _) in claims.items()),
        ],
    }
