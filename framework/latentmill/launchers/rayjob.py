"""What a RayJob of KubeRay runs: ``python -m latentmill.launchers.rayjob latentmill run JOB ...``.

KubeRay makes a new cluster (``backoffLimit``) after whatever failed: it has no rule for exit codes, and of a Ray job it knows FAILED,
SUCCEEDED and STOPPED alone. A job that is wrong would start cluster after cluster in vain. But one that is STOPPED is over: so
where no retry helps, the job stops itself, and does not say that it has succeeded.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from latentmill.plugin import RETRY_CODES

STOPPED_WITHIN = 60.0
"""Seconds for Ray to end this process, once it has been asked."""
SAID = "ended with exit code"
"""What the last line of the log says before the code, for whoever looks for it there."""


def main(command: Sequence[str]) -> int:
    """Run the command, and return its exit code, unless Ray has stopped this job before.

    Who stops the job sends SIGTERM to the command, too: this process waits for it.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    code = subprocess.run(command).returncode
    code = code if code >= 0 else 128 - code
    print(f"latentmill: {SAID} {code}", file=sys.stderr, flush=True)
    if code and code < 128 and code not in RETRY_CODES:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _stop()
    return code


def _stop() -> None:
    from ray.job_submission import JobSubmissionClient

    try:
        job = json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"]
        JobSubmissionClient().stop_job(job)  # of the cluster that RAY_ADDRESS says, which Ray sets for its jobs
    except Exception as error:  # then KubeRay tries in vain, as it would have anyway
        print(f"latentmill: the Ray job can't be stopped, so it may be tried again: {error}", file=sys.stderr)
        return
    time.sleep(STOPPED_WITHIN)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
