"""Jobs that were submitted from this machine: what is sent, what is remembered of it, and what became of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, cast

import yaml

from latentmill import dataset, registry, storage, values
from latentmill.config import Job, load_job
from latentmill.config.target import PREFIX, load_target, settled
from latentmill.errors import JobError, LatentmillError, UnreachableError
from latentmill.fields import PICTURES
from latentmill.plugin import Launcher, LaunchState, Submission, Submitted, WorkerNeeds
from latentmill.text import is_secret, near, one_line, secrets, without_secrets

FIRST_LINE = "defaults: [job, _self_]\n"
"""What a composed config begins with, to be a job's file: all keys are in it, and take the defaults' places."""
FOLDERS = ("models", "tokenizers")
"""Settings of parts that are folders, beside those whose names end in ``path``."""
OUTPUT_ANSWERS_WITHIN = 20.0
"""Seconds that are waited for what an output says of itself."""
JOBS_AT_A_TIME = 16
"""Jobs that are asked for how they are at a time."""


@dataclass(frozen=True)
class Record:
    """A job that was submitted, as it is remembered: a JSON file below ``$XDG_STATE_HOME/latentmill/jobs``."""

    id: str
    job: str
    """Its name."""
    output: str
    target: Mapping[str, Any]
    """The launcher's name and settings; environment variables stay ``${oc.env:...}``."""
    submitted: str
    """When, in UTC: ISO 8601."""
    handle: str | None = None
    """None: submitting has not ended."""


@dataclass(frozen=True)
class Offer:
    """A job that is ready to be submitted: checked, and nothing of it has been written or sent."""

    job: Job
    target: Mapping[str, Any]
    launcher: Launcher
    submission: Submission
    files: Mapping[str, str]

    def submit(self) -> Record:
        """Write its files, and send it. Raises PluginError where it is refused: then nothing is remembered of it.

        Raises UnreachableError where the target has not answered: it may have the job all the same, so the record stays, without a handle.
        """
        sent = self.submission
        now = datetime.now(UTC).isoformat(timespec="seconds")
        record = Record(sent.id, self.job.name, sent.output, self.target, now)
        folder = _folder(sent.id)
        home().mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
        try:
            for name, text in self.files.items():
                (folder / name).write_text(text, encoding="utf-8")
            _write(record)
            with asking_target(self.launcher, self.job.config):
                handle = self.launcher.submit(sent, folder)
        except UnreachableError as error:
            raise UnreachableError(
                f"{error}; it may have been sent all the same: look there for {sent.id} before it is sent again"
            ) from error
        except Exception:  # interrupted, it may have been sent, too: the record stays, without a handle
            _record_file(sent.id).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        record = Record(**{**asdict(record), "handle": handle})
        _write(record)
        return record


def prepare(job: str, overrides: Sequence[str], to: str, grow: bool = False) -> Offer:
    """What ``latentmill submit JOB --to NAME`` would send; ``grow``: as of ``run``. Raises JobError or PluginError for what is wrong with it."""
    about_target = [word for word in overrides if word.startswith(PREFIX)]
    overrides = [word for word in overrides if not word.startswith(PREFIX)]
    target = load_target(to, about_target, job)
    launcher = _launcher(target)
    checked = load_job(job, overrides)
    written = yaml.safe_load(checked.config)
    if _leads_from_home(written["output"]):  # what was checked, whatever home is there
        checked = load_job(job, [*overrides, f"output={values.literal(checked.output)}"])
    if not (storage.in_bucket(checked.output) or os.path.isabs(checked.output)):
        if launcher.shares_files:
            checked = load_job(job, [*overrides, f"output={values.literal(os.path.abspath(checked.output))}"])
        else:
            raise JobError(
                f"output={checked.output} is relative, and --to {to} runs the job where that is another folder: write a path from "
                "the root that every node sees, as output=/shared/out/my-job, or a URL, as output=s3://bucket/my-job"
            )
    if not launcher.shares_files:
        for key, path in _from_home(written):
            raise JobError(
                f"{key}={path} leads from your home, and --to {to} runs the job where that is another folder: write a path from "
                "the root that every node sees, or a URL"
            )
        for key, path in _relative_paths(checked):
            raise JobError(
                f"{key}={path} is relative, and --to {to} runs the job where that is another folder: write a path from the root "
                "that every node sees, or a URL"
            )
    submission = Submission(
        id=_new_id(checked.name),
        name=checked.name,
        text=FIRST_LINE + checked.config,
        output=checked.output,
        folder=os.getcwd(),
        needs=tuple(_needs(checked)),
        without_ray=checked.cluster.kind == "inline",
        waits=checked.cluster.wait is not None,
        grace=checked.grace_seconds,
        grow=grow,
        folders=_folders(checked),
    )
    with asking_target(launcher, checked.config):
        files = launcher.files(submission)
        _require_files(files)
    for value, shown in secrets(str(target)).items():
        if is_secret(shown) and any(value in text for text in files.values()):
            raise JobError(
                f"--to {to}: the value of {shown} would stand in what is written; name the variable in target.env instead"
            )
    return Offer(checked, target, launcher, submission, files)


def records() -> list[Record]:
    """All jobs that were submitted from here, the oldest first."""
    found = []
    for file in home().glob("*.json"):
        with suppress(OSError, ValueError, TypeError):  # one that is no record, or of another version
            record = Record(**json.loads(file.read_text(encoding="utf-8")))
            texts = (record.id, record.job, record.output, record.submitted, record.handle or "")
            if (
                all(isinstance(text, str) for text in (*texts, dict(record.target).get("name")))
                and record.id == file.stem
            ):
                found.append(record)
    return sorted(found, key=lambda record: (record.submitted, record.id))


def find(name: str) -> Record:
    """The record of that id, or handle, or whose id alone begins so. Raises JobError."""
    there = records()
    for found in (
        [record for record in there if name in (record.id, record.handle)],
        [record for record in there if name and record.id.startswith(name)],
    ):
        if len(found) == 1:
            return found[0]
        if found:
            raise JobError(f"{name} may be {' or '.join(record.id for record in found)}: write more of it")
    raise JobError(
        f"no job {name!r} was submitted from here{near(name, [r.id for r in there])}; latentmill jobs lists them"
    )


@contextmanager
def met_again(record: Record) -> Iterator[tuple[Launcher, Submitted]]:
    """The launcher of a job that was submitted, and the job, to ask it about: what it raises is one line. Raises JobError or PluginError."""
    if record.handle is None:
        raise JobError(
            f"{record.id}: submitting it did not end; whether {record.target['name']} has it, by that name, is not known"
        )
    launcher = _launcher(record.target)
    with asking_target(launcher, str(record.target)):
        yield launcher, Submitted(record.id, record.handle, _folder(record.id))


def _require_files(files: Any) -> None:
    """Raises ValueError if a launcher's files are not texts by names, or one would lie elsewhere than in the job's folder."""
    if not isinstance(files, Mapping) or not all(isinstance(text, str) for text in files.values()):
        raise ValueError(f"files gave {files!r:.80}, and texts by the names of their files are expected")
    for name in files:
        if not isinstance(name, str) or name in ("", ".", "..") or not {"/", os.sep, "\0"}.isdisjoint(name):
            raise ValueError(f"files names {name!r:.80}: a file's name without a folder is expected")


def look(some: Sequence[Record]) -> list[dict[str, Any]]:
    """How jobs are, and how far their outputs: keys ``id``, ``job``, ``target``, ``handle``, ``submitted``, ``output``, ``state``, ``exit_code``,
    ``detail``, ``dataset`` (what ``status`` says; None: it can't be read, or is not begun, and ``unread`` says so in a few words).
    """
    with ThreadPoolExecutor(JOBS_AT_A_TIME) as pool:
        return list(pool.map(_look, some))


def _look(record: Record) -> dict[str, Any]:
    try:
        with met_again(record) as (launcher, job):
            state = launcher.state(job)
            if not isinstance(state, LaunchState):
                raise TypeError(f"state gave {state!r:.80}, and a LaunchState is expected")
    except LatentmillError as error:
        state = LaunchState("unknown", detail=str(error))
    unread, found = "", None
    try:
        found = _status(record.output)
    except Exception as error:  # a job that is old, a store that is gone: the others are told of all the same
        unread = (
            "not begun"
            if isinstance(error, LatentmillError) and state.word in ("queued", "running")
            else one_line(error)
        )
    return {
        **{key: value for key, value in asdict(record).items() if key != "target"},
        "target": record.target["name"],
        "state": state.word,
        "exit_code": state.exit_code,
        "detail": state.detail,
        "dataset": found,
        "unread": unread,
    }


def _status(output: str) -> dict[str, Any]:
    """What ``status`` says of an output. Raises what it raises, and TimeoutError where a store does not answer in time."""
    answers: SimpleQueue[dict[str, Any] | Exception] = SimpleQueue()

    def ask() -> None:
        try:
            answers.put(dataset.status(output))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()  # of no pool: nobody waits for it as the process ends
    try:
        answer = answers.get(timeout=OUTPUT_ANSWERS_WITHIN)
    except Empty:
        raise TimeoutError(f"it does not answer within {OUTPUT_ANSWERS_WITHIN:g} seconds") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


@contextmanager
def asking_target(launcher: Launcher, config: str) -> Iterator[None]:
    """What a launcher raises becomes one line, without the secrets that ``config`` names: an OSError an UnreachableError, else a PluginError."""
    try:
        with registry.asking(launcher):
            yield
    except LatentmillError as error:
        said = without_secrets(str(error), config)
        if isinstance(error.__cause__, OSError):
            raise UnreachableError(said) from None
        raise type(error)(said) from None


def home() -> Path:
    """Where what was submitted is remembered. It need not be there."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "latentmill" / "jobs"


def _folder(identity: str) -> Path:
    return home() / identity


def _record_file(identity: str) -> Path:
    return home() / f"{identity}.json"


def _write(record: Record) -> None:
    file = _record_file(record.id)
    new = file.with_suffix(".new")
    new.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
    new.replace(file)


def _launcher(target: Mapping[str, Any]) -> Launcher:
    return cast(Launcher, registry.build("launcher", settled(target)))


def _new_id(name: str) -> str:
    """The job's name as far as it can stand in a label of DNS, and six signs by which it is told from others."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:38].rstrip("-")
    label = label if label[:1].isalpha() else f"job-{label}".rstrip("-")
    return f"{label[:38].rstrip('-')}-{uuid.uuid4().hex[:8]}"


def _is_url(place: str) -> bool:
    return "://" in place


def _needs(job: Job) -> Iterator[WorkerNeeds]:
    from latentmill.workers import pools  # and with it torch

    for stages in pools.hosted(job, job.flow)[0]:
        yield pools.worker_needs(job, [job.flow[stage] for stage in stages])


def _folders(job: Job) -> dict[str, str]:
    """Folders beside the output that a job writes, by key."""
    folders = {"export.folder": (job.export or {}).get("folder"), "prompt_cache": job.prompt_cache}
    return {key: folder for key, folder in folders.items() if folder}


def _leads_from_home(text: Any) -> bool:
    return isinstance(text, str) and re.match(r"~\w*/", text) is not None


def _from_home(config: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Keys of a job's config whose values begin with ``~/``; its output is sent as it was checked, and texts of prompts are none."""
    if isinstance(config, (dict, list)):
        for name, value in config.items() if isinstance(config, dict) else enumerate(config):
            here = f"{key}.{name}".lstrip(".")
            if here != "output" and "sampling" not in here.split("."):
                yield from _from_home(value, here)
    elif _leads_from_home(config):
        yield key, config


def _relative_paths(job: Job) -> Iterator[tuple[str, str]]:
    """Keys of the job whose values are paths that lead from the folder where it runs, and are there in this one."""
    told = {part: getattr(job, part) or {} for part in ("source", "model", "vae", "denoiser", "text_encoder")}
    told |= {f"stages.{name}.{part}": own for name, of in job.stages.items() for part, own in of.own_parts.items()}
    told |= {f"stages.{name}.settings": of.settings or {} for name, of in job.stages.items()}
    pictures = {key: of for key, of in (told["source"].get("defaults") or {}).items() if key in PICTURES}
    for part, settings in {**told, "source.defaults": pictures}.items():
        for key, value in settings.items():
            of_path = key.rpartition("_")[2] == "path" or key in FOLDERS or settings is pictures
            if of_path and isinstance(value, str) and not os.path.isabs(value) and os.path.exists(value):
                yield f"{part}.{key}", value
    for key, folder in _folders(job).items():
        if not (_is_url(folder) or os.path.isabs(folder)):
            yield key, folder
