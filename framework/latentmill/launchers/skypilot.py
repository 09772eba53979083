"""SkyPilot: a managed job, on machines of a cloud for as long as it runs. Asked through its command, ``sky``."""

from __future__ import annotations

import json
import re
import secrets
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from os.path import normpath
from pathlib import Path
from typing import Any

from latentmill.launchers.manifest import as_yaml
from latentmill.launchers.nodes import ANY_GPU, NO_GPU, Shape, at_least, groups, size
from latentmill.launchers.programs import ask, check_variables, said_by, variables
from latentmill.plugin import Launcher, LaunchState, StateWord, Submission, Submitted
from latentmill.text import first_line

TASK = "task.yaml"
WITHIN, LAUNCH_WITHIN = 120.0, 1800.0
"""Seconds for sky to answer, and to take a job: for the first one it starts a machine that watches over all."""
PORTS = {"port": 6379, "dashboard-port": 8265, "dashboard-agent-listen-port": 52366}
"""Of the job's Ray. SkyPilot's own runs beside it, on 6380, 8266 and 52365."""
TOKEN = "RAY_AUTH_TOKEN"
INTERRUPTED = 130
"""The exit code."""
FOR_WORKERS = 0.65
"""The share of a machine's memory that Ray has for workers: it keeps 0.3 of what is free when it starts for its object store."""
RUNNING_STATES: dict[str, StateWord] = {
    "PENDING": "queued",
    "SUBMITTED": "queued",
    "STARTING": "queued",
    "RECOVERING": "queued",
    "RUNNING": "running",
    "WINDING_DOWN": "running",
    "CANCELLING": "running",
}
"""Its states; all others are ends."""

SCRIPT = """\
# Every machine runs this; the first of them is Ray's head, and runs the job.
head=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)
if [ "$SKYPILOT_NODE_RANK" != 0 ]; then
    for attempt in $(seq 60); do
        ray start --address="$head:{port}" {options} && sleep 5 && exit 0    # it stays when this ends, once it is apart
        sleep 5
    done
    exit 4
fi
ray start --head --port={port} --dashboard-port={dashboard} {options} || exit 1
mkdir -p ~/latentmill && cd ~/latentmill || exit 1
cat > {file} <<'LATENTMILL_JOB'
{text}
LATENTMILL_JOB
# What it did is kept, so it goes on. No "ray stop" here: it would stop SkyPilot's own Ray, too.
for attempt in $(seq 0 {retries}); do
    {command}
    code=$?
    case "$code" in 1 | 4) sleep 30 ;; *) break ;; esac
done
exit "$code"
"""


class SkyPilot(Launcher):
    """A managed job. Its handle is the name that it has there."""

    contract = 2

    def __init__(
        self,
        image: str | None = None,
        setup: str | None = None,
        infra: str | None = None,
        accelerators: str | None = None,
        gpus: int = 1,
        cpus: int = 8,
        memory: str = "32GiB",
        disk: str = "256GiB",
        nodes: int | None = None,
        spot: bool = False,
        retries: int = 3,
        env: list[str] | None = None,
        mounts: dict[str, str] | None = None,
    ) -> None:
        """What conf/target/skypilot.yaml says. Raises ValueError for values that can't be."""
        if not image and not setup:
            raise ValueError(
                "target.image or target.setup must be given: machines have no latentmill, and one of the two brings it"
            )
        at_least(0, retries=retries, gpus=gpus)
        at_least(1, cpus=cpus, nodes=nodes)
        if accelerators and ":" not in accelerators:
            accelerators = f"{accelerators}:{gpus}"
        elif accelerators:
            try:
                gpus = int(accelerators.rpartition(":")[2])
            except ValueError:
                raise ValueError(f"target.accelerators={accelerators}: TYPE:NUMBER is expected, as H100:8") from None
        self.image, self.setup, self.infra, self.accelerators = image, setup, infra, accelerators
        self.gpus, self.cpus, self.memory = gpus, cpus, size("memory", memory)
        self.disk, self.nodes, self.spot, self.retries = size("disk", disk), nodes, spot, retries
        self.env, self.mounts = env or [], mounts or {}

    def files(self, submission: Submission) -> Mapping[str, str]:
        if submission.without_ray:
            raise ValueError("the job says cluster=inline, and this starts a cluster: leave that out")
        for key, folder in {"output": submission.output, **submission.folders}.items():
            on_mount = key != "output" and any(Path(normpath(folder)).is_relative_to(path) for path in self.mounts)
            if "://" not in folder and not on_mount:
                raise ValueError(
                    f"{key}={folder} would be lost with its machine: give a URL, as {key}=s3://bucket/my-job"
                )
        check_variables(submission, self.env)
        accelerators, number = self._machines(submission)
        task = {
            "name": submission.id,
            "num_nodes": number,
            "resources": {
                **({"infra": self.infra} if self.infra else {}),
                **({"accelerators": accelerators} if accelerators else {}),
                "cpus": f"{self.cpus}+",
                "memory": f"{-(-self.memory // 2**30)}+",
                "disk_size": -(-self.disk // 2**30),
                **({"use_spot": True} if self.spot else {}),
                **({"image_id": f"docker:{self.image}"} if self.image else {}),
                # Machines that are lost are recovered without end, and so is what is in that list: an interruption. What may fail for good (1, 4) is
                # tried so often, and no more, by the commands below; 2 and 3 end the job.
                "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": [INTERRUPTED]},
            },
            "envs": {"RAY_AUTH_MODE": "token"},
            # Their values are given to `sky jobs launch`, and stand in no file.
            "secrets": {name: None for name in (*self.env, TOKEN)},
            **(
                {"file_mounts": {at: {"source": of, "mode": "MOUNT"} for at, of in self.mounts.items()}}
                if self.mounts
                else {}
            ),
            **({"setup": self.setup} if self.setup else {}),
            "run": self._run(submission, bool(accelerators)),
        }
        return {TASK: as_yaml(task)}

    def _machines(self, submission: Submission) -> tuple[str, int]:
        """The accelerators of a machine, in SkyPilot's words, and how many machines there are."""
        found = groups(submission.needs, lambda group: self._shape(group))
        types = [group.name for group in found if group.name not in (ANY_GPU, NO_GPU)]
        if len(types) > 1:
            raise ValueError(
                f"the job asks for {' and '.join(types)}, and SkyPilot's machines of a job are alike: one accelerator_type"
            )
        gpus = any(group.name != NO_GPU for group in found)
        if gpus and not types and not self.accelerators:
            raise ValueError(
                "the job asks for GPUs, and not of what type: target.accelerators=H100:8, or accelerator_type in its stages"
            )
        number = max(sum(group.nodes for group in found), self.nodes or 1)
        return (self.accelerators or f"{types[0]}:{self.gpus}") if gpus else "", number

    def _shape(self, group: str) -> Shape:
        return Shape(0 if group == NO_GPU else self.gpus, self.cpus, int(FOR_WORKERS * self.memory))

    def _run(self, submission: Submission, gpus: bool) -> str:
        options = f"--dashboard-agent-listen-port={PORTS['dashboard-agent-listen-port']} --disable-usage-stats"
        return SCRIPT.format(
            port=PORTS["port"],
            dashboard=PORTS["dashboard-port"],
            options=options + ' --num-gpus="$SKYPILOT_NUM_GPUS_PER_NODE"' * gpus,
            file=shlex.quote(submission.file),
            text=submission.text.rstrip("\n"),
            retries=self.retries,
            command=f'{shlex.join(submission.command(wait="10m"))} cluster.kind=ray cluster.address="$head:{PORTS["port"]}"',
        )

    # -------------------------------------------------------------------------------------------------- sky

    def submit(self, submission: Submission, folder: Path) -> str:
        variables(self.env)
        words = [word for name in (*self.env, TOKEN) for word in ("--secret", name)]
        token = {TOKEN: secrets.token_hex(32)}
        _sky(["jobs", "launch", "--yes", "--detach-run", *words, str(folder / TASK)], LAUNCH_WITHIN, token)
        return submission.id

    def state(self, job: Submitted) -> LaunchState:
        found = self._record(job)
        if found is None:
            return LaunchState("unknown", detail="sky knows no job of that name")
        status, reason = str(found.get("status") or "PENDING"), first_line(found.get("failure_reason") or "", 200)
        if status in RUNNING_STATES:
            times = found.get("recovery_count") or 0
            return LaunchState(RUNNING_STATES[status], detail=f"recovered {times} times" if times else status.lower())
        codes = re.findall(r"exit codes? \[?(\d+)", reason)
        code = 0 if status == "SUCCEEDED" else int(codes[0]) if codes else None
        return LaunchState("ended", code, "" if status == "SUCCEEDED" else reason or status.lower())

    def log(self, job: Submitted, follow: bool) -> Iterator[str]:
        words = ["jobs", "logs", "--name", job.handle, "--follow" if follow else "--no-follow"]
        yield from said_by(["sky", *words], subprocess.STDOUT)

    def cancel(self, job: Submitted) -> None:
        if self.state(job).word in ("queued", "running"):
            _sky(["jobs", "cancel", "--yes", "--name", job.handle])

    def _record(self, job: Submitted) -> dict[str, Any] | None:
        said = _sky(["jobs", "queue", "--all", "--output", "json"])
        for begin in re.finditer(r"^\[", said, re.MULTILINE):  # other words may stand before it, and after
            with suppress(ValueError):
                table, _ = json.JSONDecoder().raw_decode(said, begin.start())
                if all(isinstance(record, dict) for record in table):
                    return next((record for record in table if record.get("job_name") == job.handle), None)
        raise OSError("sky: it gives no list of jobs")


def _sky(words: Sequence[str], within: float = WITHIN, also: Mapping[str, str] | None = None) -> str:
    """What sky says. ``also``: variables that it is given beside those of this process. Raises ValueError, or OSError if it may answer later."""
    done = ask(["sky", *words], within, also=also)
    if done.returncode:
        raise OSError(
            f"sky: {first_line(done.stderr.strip() or done.stdout.strip() or f'exit code {done.returncode}')}"
        )
    return done.stdout
