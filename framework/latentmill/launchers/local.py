"""A process of its own on this machine. It goes on when the terminal is closed; its log is a file."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from latentmill.plugin import Launcher, LaunchState, Submission, Submitted

LOG, EXIT_CODE, LOCK = "log", "exit_code", "lock"
"""Names in the job's folder. Whoever runs the job holds the lock, so that it is known for as long as it runs, and no longer."""
PYTHON = (sys.executable, "-P", "-m")
"""This one, without what lies in the folder where it is started."""
LOOK_AGAIN = 0.5
"""Seconds between two looks at a log that is followed."""


class Local(Launcher):
    """Starts the job on this machine, apart from this process. Its handle is ``HOST:PID``."""

    contract = 2
    shares_files = True

    def files(self, submission: Submission) -> Mapping[str, str]:
        return {submission.file: submission.text}

    def submit(self, submission: Submission, folder: Path) -> str:
        command = [*PYTHON, "latentmill.cli", *submission.command(str(folder / submission.file))[1:]]
        with (folder / LOCK).open("w") as lock, (folder / LOG).open("wb") as log:
            fcntl.flock(lock, fcntl.LOCK_EX)
            watcher = subprocess.Popen(
                [*PYTHON, "latentmill.launchers.local", str(folder / EXIT_CODE), *command],
                stdin=lock,  # inherited, and with it the lock
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=submission.folder,
                start_new_session=True,
            )
        return f"{socket.gethostname()}:{watcher.pid}"

    def state(self, job: Submitted) -> LaunchState:
        host = job.handle.rpartition(":")[0]
        if host != socket.gethostname():
            return LaunchState("unknown", detail=f"it was started on {host}: ask there")
        try:
            with (job.folder / LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return LaunchState("running")
        except FileNotFoundError:
            return LaunchState("unknown")
        try:
            return LaunchState("ended", int((job.folder / EXIT_CODE).read_text()))
        except (OSError, ValueError):
            return LaunchState("ended", detail="it was killed, or the machine was")

    def log(self, job: Submitted, follow: bool) -> Iterator[str]:
        with (job.folder / LOG).open(encoding="utf-8", errors="replace") as log:
            while True:
                ended = not follow or self.state(job).word != "running"  # before it is read to its end
                while piece := log.read(65536):
                    yield piece
                if ended:
                    return
                time.sleep(LOOK_AGAIN)

    def cancel(self, job: Submitted) -> None:
        state = self.state(job)
        if state.word == "unknown":
            raise ValueError(state.detail or "there is no trace of it")
        if state.word == "running":
            os.kill(int(job.handle.rpartition(":")[2]), signal.SIGTERM)


def watch(exit_code: Path, command: Sequence[str]) -> None:
    """Run the command, hand SIGTERM on to it, and leave its exit code in a file, as a shell has it."""
    started: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def hand_on(number: int, _: object) -> None:
        asked.append(number)
        for process in started:
            process.send_signal(number)

    signal.signal(signal.SIGTERM, hand_on)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    started.append(process)
    if asked:  # before there was anything to hand it on to
        process.send_signal(asked[0])
    code = process.wait()
    new = exit_code.with_suffix(".new")
    new.write_text(str(code if code >= 0 else 128 - code))
    new.replace(exit_code)


if __name__ == "__main__":
    watch(Path(sys.argv[1]), sys.argv[2:])
