"""``run JOB -m key=a,b,c``: a job for each choice of values, with an output of its own, and one contact sheet of all."""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, QuotedString, Transformer
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import InputStream, OverrideLexer  # type: ignore[attr-defined]  # as Hydra's own parser does

from latentmill import storage, values
from latentmill.config import Job, load_job
from latentmill.dataset import load
from latentmill.errors import NO_ROW, JobError, LatentmillError, StorageError
from latentmill.notices import as_ctrl_c
from latentmill.plan_files import FIRST_PLAN
from latentmill.report.side_by_side import make_side_by_side
from latentmill.runner import Result, run
from latentmill.text import one_line
from latentmill.workers.left import shared_workers

logger = logging.getLogger("latentmill")

SEVERAL = re.compile(r",|^(choice|range|glob|shuffle|sort|interval)\(")
"""What a value with several values in it has, in Hydra's grammar."""
OPENING_TOKENS, CLOSING_TOKENS = {"POPEN", "BRACKET_OPEN", "BRACE_OPEN"}, {"PCLOSE", "BRACKET_CLOSE", "BRACE_CLOSE"}
SIGN_TOKENS = {*OPENING_TOKENS, *CLOSING_TOKENS, "COMMA", "COLON"}
"""Names of Hydra's tokens. Spaces beside a sign are part of it, and mean nothing."""
LONGEST_FOLDER, MOST_BYTES = 120, 240
"""Characters of a folder's name, and its bytes in UTF-8, of which a file system takes 255."""
PROMPT_CACHE = "prompt_cache"
"""The folder in which prompts of all jobs of a sweep are kept, if the job names none."""


@dataclass(frozen=True)
class Sweep:
    """Jobs that differ in the values of a few keys, each of them checked."""

    name: str
    output: str
    """The folder of their contact sheet."""
    jobs: Mapping[str, Job]
    """By what is their own: ``guidance_scale=2,scheduler=euler``."""


def load_sweep(job: str, overrides: Sequence[str]) -> Sweep:
    """The jobs that ``overrides`` ask for: each choice of one value of every key, those of the last key changing first.

    ``key=a,b`` and ``key=choice(a,b)`` are two values, ``key=range(1,4)`` is three, as in Hydra. A job's output is a folder in the
    ``output`` that is given, called by the job's values; or the output itself, if it refers to the keys (``output='out/${scheduler.name}'``).
    Raises JobError or PluginError.
    """
    words = [override.partition("=") for override in overrides]
    choices = [_values(override) for override in overrides]
    swept = [at for at, texts in enumerate(choices) if len(texts) > 1]
    if not swept:
        raise JobError("-m: no key has several values, as in sampling.guidance_scale=2,4,8")
    last = {words[at][0]: words[at][0].rpartition(".")[2] for at in swept}
    ends = Counter(last.values())
    short = {key: end if ends[end] == 1 else key for key, end in last.items()}
    given: dict[str, list[str]] = {}
    for texts in itertools.product(*choices):
        own = {words[at][0]: texts[at] for at in swept}
        label = ",".join(f"{short[key]}={text}" for key, text in own.items())
        if label in given:
            raise JobError(f"-m: {label} is there twice")
        given[label] = [key + sign + text for (key, sign, _), text in zip(words, texts)]
    jobs = {label: load_job(job, each) for label, each in given.items()}
    outputs = {each.output for each in jobs.values()}
    if len(outputs) == 1:
        output = outputs.pop().rstrip("/")
        folders = dict(zip(jobs, _folders([*jobs])))
        if len({*folders.values()}) < len(jobs):
            raise JobError(
                "-m: the values make no names of folders: refer to the keys in output, as in output='out/${scheduler.name}'"
            )
        jobs = {
            label: load_job(job, [*each, f"output={values.literal(f'{output}/{folders[label]}')}"])
            for label, each in given.items()
        }
    elif len(outputs) == len(jobs):
        output = _above(outputs)
    else:
        raise JobError(
            f"-m: {len(jobs)} jobs have only {len(outputs)} outputs: output must refer to each key that has several values"
        )
    if storage.at(output).exists(FIRST_PLAN):
        raise JobError(f"-m: {output} is a dataset, and no place for several: give another output")
    exports = [each.export["folder"] for each in jobs.values() if each.export]
    if len({*exports}) < len(exports):
        raise JobError(
            "-m: each job's export needs a folder of its own: refer to the keys in it, as in export.folder='exports/${scheduler.name}'"
        )
    kept = f"{output}/{PROMPT_CACHE}"
    jobs = {label: each if each.prompt_cache else replace(each, prompt_cache=kept) for label, each in jobs.items()}
    return Sweep(next(iter(jobs.values())).name, output, jobs)


def run_sweep(sweep: Sweep, tell: Callable[[str], None], **options: Any) -> int:
    """Run the jobs, one after the other; ``options`` as of ``run``. Returns the exit code: of the first that failed, or 130.

    One that fails stops none of the others. Ray is started once, and workers go on from one job to the next.
    """
    code = 0
    done: list[str] = []
    with _one_cluster(next(iter(sweep.jobs.values()))), shared_workers() as left:
        for number, (label, job) in enumerate(sweep.jobs.items(), 1):
            tell(f"[{number}/{len(sweep.jobs)}] {label}")
            try:
                with as_ctrl_c():
                    result: Result = run(job, left=left, **options)
            except KeyboardInterrupt:  # before it had begun
                tell(f"stopped: {len(done)} of {len(sweep.jobs)} jobs are done; the same command goes on")
                return 130
            except (LatentmillError, OSError) as error:
                tell(f"  failed: {one_line(error, 1000)}")
                code = code or (error.exit_code if isinstance(error, LatentmillError) else StorageError.exit_code)
                continue
            tell("".join(f"  {line}\n" for line in result.text.splitlines()).rstrip("\n"))
            if result.interrupted:
                tell(f"{len(done)} of {len(sweep.jobs)} jobs are done; the same command goes on")
                return 130
            code = code or (NO_ROW if result.failed and not result.ok else 0)
            done.append(label)
    tell(f"{len(done)} of {len(sweep.jobs)} jobs are done")
    try:
        datasets = {label: load(storage.at(sweep.jobs[label].output)) for label in done}
        if datasets and make_side_by_side(storage.at(sweep.output), sweep.name, datasets):
            tell(f"{sweep.output}/contact_sheet.png shows them side by side")
    except Exception as error:  # a font, a picture, a disk: the datasets are there
        logger.warning(f"contact_sheet.png could not be made: {one_line(f'{type(error).__name__}: {error}')}")
    return code


@contextmanager
def _one_cluster(job: Job) -> Iterator[None]:
    """Ray, started or joined once for all jobs."""
    if job.cluster.kind == "inline":
        yield
        return
    from latentmill.workers import cluster

    owned = cluster.connect(job.cluster.address if job.cluster.kind == "ray" else None)
    try:
        yield
    finally:
        if owned:
            cluster.disconnect()


def _values(override: str) -> list[str]:
    """The values that an override has for its key; one, where it has no several. Raises JobError."""
    _, _, text = override.partition("=")
    if not SEVERAL.search(text):
        return [text]
    try:
        parsed = OverridesParser.create().parse_override(override)
        if not parsed.is_sweep_override():
            return [text]
        several = parsed.value()
        if isinstance(several, Glob):
            raise JobError(f"-m {override}: glob is not known here: write the names, with commas between")
        found = [*parsed.sweep_iterator(transformer=Transformer.identity)]
        texts = _texts(override) if isinstance(several, ChoiceSweep) else []
        return [_written(value, text) for value, text in itertools.zip_longest(found, texts)]
    except HydraException as error:
        said = one_line(str(error).partition("\n")[0], 200)
        raise JobError(f"-m {override}: {said}; a value with a comma or a bracket in it stands in quotes") from error


def _texts(override: str) -> list[str]:
    """The elements of ``key=a,b`` or ``key=choice(a,b)`` as they were written, in Hydra's own tokens; "" for a call, as ``int(3)``."""
    tokens = OverrideLexer(InputStream(override)).getAllTokens()
    kinds = [OverrideLexer.symbolicNames[token.type] for token in tokens]
    at = kinds.index("EQUAL") + 1
    if [token.text for token in tokens[at : at + 1]] == ["choice"] and kinds[at + 1 : at + 2] == ["POPEN"]:
        tokens, kinds, at = tokens[:-1], kinds[:-1], at + 2
    texts, depth, calls = [""], 0, False
    for token, kind in zip(tokens[at:], kinds[at:]):
        depth += (kind in OPENING_TOKENS) - (kind in CLOSING_TOKENS)
        if kind == "COMMA" and not depth:
            texts.append("")
            calls = False
            continue
        calls = calls or kind == "POPEN"
        texts[-1] = "" if calls else texts[-1] + (token.text.strip() if kind in SIGN_TOKENS else token.text)
    return [text.strip() for text in texts]


def _written(value: Any, text: str | None) -> str:
    """A value as it would stand behind the = alone; ``text``: how it was written. Hydra reads 1.10 as a number, and its key may want text."""
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, str):
        return value
    if text:
        return text
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(Override._get_value_element_as_str(value))


def _folders(labels: Sequence[str]) -> Iterator[str]:
    """A name of a folder for each."""
    for label in labels:
        name = re.sub(r"[^\w.=,+@-]+", "-", label)
        if len(name) > LONGEST_FOLDER or len(name.encode()) > MOST_BYTES:
            begin = name.encode()[:LONGEST_FOLDER].decode(errors="ignore")
            name = f"{begin}...{hashlib.sha256(label.encode()).hexdigest()[:12]}"  # whatever other jobs there are
        yield name


def _above(outputs: Iterator[str] | set[str]) -> str:
    """The folder that they all are in."""
    parts = [output.split("/") for output in outputs]
    common = list(itertools.takewhile(lambda each: len({*each}) == 1, zip(*parts)))
    return "/".join(each[0] for each in common) or ("/" if common else ".")
