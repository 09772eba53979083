"""SkyPilot: a managed job, on machines of a cloud for as long as it runs. Asked through its command, ``sky``."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentmill.launchers.manifest import as_yaml
from latentmill.launchers.nodes import ANY_GPU, NO_GPU, Shape, groups
from latentmill.plugin import Launcher, LaunchState, StateWord, Submission, Submitted
from latentmill.text import first_line
from latentmill.values import in_bytes

TASK = "task.yaml"
WITHIN, LAUNCH_WITHIN = 120.0, 1800.0
"""Seconds for sky to answer, and to take a job: for the first one it starts a machine that watches over all."""
PORTS = {"port": 6379, "dashboard-port": 8265, "dashboard-agent-listen-port": 52366}
"""Of the job's Ray. SkyPilot's own runs beside it, on 6380, 8266 and 52365."""
TOKEN = "RAY_AUTH_TOKEN"
INTERRUPTED = 130
"""The exit code."""
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
        ray start --address="$head:{port}" {options} && exit 0    # it stays when this ends
        sleep 5
    done
    exit 4
fi
ray start --head --port={port} --dashboard-port={dashboard} {options} || exit 1
python - "$head:{port}" "$SKYPILOT_NUM_NODES" <<'WAIT' || exit 4
import sys, time, ray
ray.init(sys.argv[1], log_to_driver=False)
for attempt in range(120):
    if sum(node["Alive"] for node in ray.nodes()) >= int(sys.argv[2]):
        sys.exit()
    time.sleep(5)
sys.exit("not all machines have come within 10 minutes")
WAIT
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
        env: Sequence[str] = (),
        mounts: dict[str, str] | None = None,
    ) -> None:
        """What conf/target/skypilot.yaml says. Raises ValueError for values that can't be."""
        if not image and not setup:
            raise ValueError(
                "target.image or target.setup must be given: machines have no latentmill, and one of the two brings it"
            )
        self.image, self.setup, self.infra, self.accelerators = image, setup, infra, accelerators
        self.shape = Shape(gpus, cpus, int(in_bytes(memory)))
        self.disk, self.nodes, self.spot, self.retries = int(in_bytes(disk)), nodes, spot, retries
        self.env, self.mounts = list(env), dict(mounts or {})

    def files(self, submission: Submission) -> Mapping[str, str]:
        if submission.without_ray:
            raise ValueError("the job says cluster=inline, and this starts a cluster: leave that out")
        if "://" not in submission.output:
            raise ValueError(
                f"output={submission.output} would be lost with its machine: give a URL, as output=s3://bucket/my-job"
            )
        named = set(re.findall(r"""oc\.env:[\s'"\\]*([A-Za-z_]\w*)""", submission.text))
        if missing := sorted(named - set(self.env)):
            raise ValueError(
                f"the job needs {', '.join(missing)} of its environment: target.env=[{', '.join(missing)}] sends it along"
            )
        accelerators, number = self._machines(submission)
        task = {
            "name": submission.id,
            "num_nodes": number,
            "resources": {
                **({"infra": self.infra} if self.infra else {}),
                **({"accelerators": accelerators} if accelerators else {}),
                "cpus": f"{self.shape.cpus}+",
                "memory": f"{-(-self.shape.memory // 2**30)}+",
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
        return (self.accelerators or f"{types[0]}:{self.shape.gpus}") if gpus else "", number

    def _shape(self, group: str) -> Shape:
        if group == NO_GPU:
            return Shape(0, self.shape.cpus, self.shape.memory)
        said = (self.accelerators or "").rpartition(":")[2]
        return Shape(int(said) if said.isdigit() else self.shape.gpus, self.shape.cpus, self.shape.memory)

    def _run(self, submission: Submission, gpus: bool) -> str:
        options = f"--dashboard-agent-listen-port={PORTS['dashboard-agent-listen-port']} --disable-usage-stats"
        return SCRIPT.format(
            port=PORTS["port"],
            dashboard=PORTS["dashboard-port"],
            options=options + ' --num-gpus="$SKYPILOT_NUM_GPUS_PER_NODE"' * gpus,
            file=shlex.quote(submission.file),
            text=submission.text.rstrip("\n"),
            retries=self.retries,
            command=f'{shlex.join(submission.command())} cluster.kind=ray cluster.address="$head:{PORTS["port"]}"',
        )

    # -------------------------------------------------------------------------------------------------- sky

    def submit(self, submission: Submission, folder: Path) -> str:
        if missing := [name for name in self.env if name not in os.environ]:
            raise ValueError(f"target.env names {', '.join(missing)}, which your shell does not have")
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
        with subprocess.Popen(["sky", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
            try:
                assert running.stdout
                yield from running.stdout
            finally:
                running.terminate()

    def cancel(self, job: Submitted) -> None:
        if self.state(job).word in ("queued", "running"):
            _sky(["jobs", "cancel", "--yes", "--name", job.handle])

    def _record(self, job: Submitted) -> dict[str, Any] | None:
        said = _sky(["jobs", "queue", "--all", "--output", "json"])
        table = re.search(r"^\[.*\]$", said, re.MULTILINE | re.DOTALL)  # other words may stand before it
        if not table:
            raise OSError("sky: it gives no list of jobs")
        found = [record for record in json.loads(table[0]) if record.get("job_name") == job.handle]
        return found[0] if found else None


def _sky(words: Sequence[str], within: float = WITHIN, also: Mapping[str, str] | None = None) -> str:
    """What sky says. ``also``: variables that it is given beside those of this process. Raises ValueError, or OSError if it may answer later."""
    try:
        done = subprocess.run(
            ["sky", *words], capture_output=True, text=True, timeout=within, env={**os.environ, **(also or {})}
        )
    except FileNotFoundError:
        raise ValueError("sky is not installed here: --dry-run prints the task that it would be given") from None
    except subprocess.TimeoutExpired:
        raise OSError(f"sky has had no answer for {within:g} s") from None
    if done.returncode:
        raise OSError(
            f"sky: {first_line(done.stderr.strip() or done.stdout.strip() or f'exit code {done.returncode}')}"
        )
    return done.stdout
