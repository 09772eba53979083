"""The command line: ``latentmill run | plan | status | verify | export | push | plugins | schedulers``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import metadata
from typing import Any

from latentmill import listings, registry, storage
from latentmill.errors import JobError, LatentmillError, PlanError
from latentmill.streams import guard
from latentmill.text import escaped, plural

BUCKETS_A_LINE = 8

# A command imports what it needs when it is run: --help, plugins and status take neither torch nor Hydra nor Ray.

MANY_SHARDS = 20_000
"""Files in one folder from which listing them, and reading their footers at the end, takes minutes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The ``latentmill`` command. Returns the exit code.

    ==== =====================================================================================
    0    done
    1    it stopped, and the same command may go on; rows failed, and not one succeeded; ``verify``: not sound
    2    the job, or what was asked, is wrong: do not retry. Nothing has been started or written
    3    the output, or what is told on stdout, can't be written
    4    there is no place on the cluster now: retry later
    130  it was interrupted, by Ctrl-C or SIGTERM: the same command goes on
    ==== =====================================================================================

    ``run`` and ``verify`` speak of the dataset alone: what they print may be lost.
    """
    stdout = guard()
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser, ours = _parser()
    if words and words[0] not in ours and _is_plugins(words[0]):
        options = argparse.Namespace(command=_theirs, words=words, debug="--debug" in words)
    else:
        options = _options(parser, words)
    command: Callable[[Any], int] = options.command
    try:
        code = command(options)
        sys.stdout.flush()
        if stdout and stdout.error and not (command is _verify or (command is _run and not options.cfg)):
            raise OSError(stdout.error.errno, stdout.error.strerror, "stdout")
        return code
    except KeyboardInterrupt:
        print("stopped before anything was begun", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        memory = _is_memory(error)
        if options.debug or not (memory or isinstance(error, (LatentmillError, OSError))):
            raise
        print(f"latentmill: {'out of memory: ' if memory else ''}{escaped(str(error))}", file=sys.stderr)
        return 1 if memory else error.exit_code if isinstance(error, LatentmillError) else 3


def _is_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # that is not there has run out of nothing
    return isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))


def _options(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    options, rest = parser.parse_known_args(words)
    if hasattr(options, "overrides"):  # argparse takes no more of them once an option has come
        options.overrides += [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _is_plugins(word: str) -> bool:
    """Whether a plugin brings a command. Ours come first: a plugin's of the same name is chosen with its distribution."""
    return any(entry.name == word.rpartition(":")[2] for entry in registry.entries("command"))


def _theirs(options: Any) -> int:
    name, *words = options.words
    return registry.command(name)(words) or 0


def _run(options: Any) -> int:
    from latentmill import values
    from latentmill.config import load_job
    from latentmill.runner import run

    if options.cfg:
        print(load_job(options.job, options.overrides).config, end="")
        return 0
    if options.fork:
        if storage.at(options.fork).exists("plan.json"):
            raise PlanError(
                f"--fork {options.fork}: there is a dataset already; a fork begins anew, in a place of its own"
            )
        options.overrides.append(f"output={values.literal(options.fork)}")
    if (options.stage or options.reason) and not options.retry_failed:
        raise JobError("--stage and --reason say which failed rows --retry-failed does again: give it, too")

    def wanted(error: Mapping[str, Any]) -> bool:
        return error["stage"] == (options.stage or error["stage"]) and (options.reason or "") in error["reason"]

    result = run(options.job, options.overrides, wanted if options.retry_failed else None, options.grow)
    print(result.text)
    if result.interrupted:
        return 130
    return 1 if result.failed and not result.ok else 0  # not one row: whoever started this wants to know


def _plan(options: Any) -> int:
    from latentmill import generations, parts, plan_files
    from latentmill import plan as planning
    from latentmill.config import load_job
    from latentmill.dataset import Dataset
    from latentmill.workers import pools

    job = load_job(options.job, options.overrides)
    built = parts.parts(job)
    store = storage.at(job.output)
    plan = generations.settle(planning.plan(job, built), store, built.source, options.grow)
    there = Dataset(store, plan, built.sink)
    done = len(there.adopt())
    if options.json:
        print(plan.to_json(), end="")
        return 0
    sources = sum(fragment.rows for fragment in plan.fragments)
    print(f"job      {job.name}: {' > '.join(job.flow)}")
    print(f"source   {sources:,} rows in {len(plan.fragments):,} files, x {plan.samples_per_row} samples")
    print(
        f"planned  {plan.rows:,} rows in {plan.shards:,} shards of {plan.rows_per_shard:,}, of which {done:,} are done"
    )
    if job.attempts:
        print(f"accept   of each row up to {plural(job.attempts, 'sample')}, until one is not filtered")
    if plan.shards > MANY_SHARDS:
        print(
            f"         that is many files: rows_per_shard={-(-plan.rows // MANY_SHARDS // 100) * 100} would make fewer"
        )
    print(f"output   {job.output}")
    hosted, why = pools.hosted(job, plan)
    print(f"workers  {', '.join(' + '.join(plan.stages[stage].name for stage in stages) for stages in hosted)} ({why})")
    plugins = {
        kind: about
        for kind, about in plan.plugins.items()
        if (kind[:5], about["distribution"]) != ("stage", "latentmill")
    }
    for kind, about in plugins.items():
        print(
            f"{kind:<13} {about['name']} ({about['distribution']} {about['version']}) {about['fingerprint']}".rstrip()
        )
    print(f"{'libraries':<13} {', '.join(f'{name} {version}' for name, version in plan.libraries.items())}")
    if beside := [f"{column.name} {column.type}" for column in plan.columns.schema()]:
        print(f"{'columns':<13} {', '.join(beside)}")
    if job.size is not None:
        found, of = parts.bucket_counts(job, built, plan.fragments)
        counts = [f"{bucket} {count:,}" for bucket, count in found.most_common()]
        lines = [", ".join(counts[start : start + BUCKETS_A_LINE]) for start in range(0, len(counts), BUCKETS_A_LINE)]
        for at, line in enumerate([*lines, of]):
            print(f"{'' if at else 'buckets':<13} {line}")
    print(f"hash     {plan.hash}")
    for line in [
        *parts.notices(built),
        *parts.foreign_prompts(job, built, plan.fragments),
        *plan_files.changed_libraries(plan, store),
        *(f"{job.output}/data/{name} is no shard of this dataset" for name in there.foreign()),
    ]:
        print(f"notice   {line}")
    return 0


def _status(options: Any) -> int:
    from latentmill.dataset import status

    now = status(options.output)
    if options.json:
        print(json.dumps(now))
        return 0
    filtered = now.get("filtered", 0)
    made = now["ok"] + now["failed"] + filtered
    state = "complete" if now["success"] else "not complete; the same command goes on with it"
    if now["lost"]:
        state = f"was complete, and has lost {now['lost']:,} shards; the same command does them again"
    print(f"{now['output']}: job {now['name']}, {state}")
    counts = f"{now['ok']:,} ok, {now['failed']:,} failed" + f", {filtered:,} filtered" * bool(filtered)
    print(f"{made:,} of {now['planned']:,} rows: {counts}")
    print(f"{now['shards_done']:,} of {now['shards']:,} shards")
    for name in now["foreign"]:
        print(f"data/{name} is no shard of this dataset")
    for text, rows in now["warnings"].items():
        print(f"warning: {rows:,} rows: {text}")
    return 0


def _verify(options: Any) -> int:
    from latentmill import verify

    store = storage.at(options.output)
    found = verify.verify(store)
    plan = found.plan
    print(f"{options.output}: job {plan.name}, {plan.rows:,} rows planned in {plan.shards:,} shards")
    filtered = f", {found.filtered:,} filtered with one" * bool(found.filtered)
    print(f"{found.ok:,} rows ok, {found.failed:,} failed with a reason{filtered}, each once")
    if found.missing:
        print(f"{len(found.missing):,} shards are not done yet")
    for shard, wrong in found.damaged.items():
        print(f"shard {shard} {wrong}")
    for line in [
        *(f"data/{name} is no shard of this dataset" for name in found.foreign),
        *(f"files/{name} is no file of this dataset" for name in found.stray),
        *found.strange,
    ]:
        print(line)
    if options.repair:
        for line in verify.repair(store, found):
            print(line)
    print("sound" if found.sound else "NOT SOUND" + ("" if options.repair else "; --repair takes out what is wrong"))
    return 0 if found.sound else 1


def _export(options: Any) -> int:
    from latentmill.exports.export import export

    def tell(line: str) -> None:
        print(escaped(line), file=sys.stderr)

    try:
        found = export(
            options.output, [name.strip() for name in options.to.split(",")], options.folder, options.names, tell
        )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    for name in found.written:
        there = f", {found.there[name]:,} were there" if found.there[name] else ""
        print(f"{name}: {plural(found.written[name], 'file')} written{there}")
    return 0


def _push(options: Any) -> int:
    from latentmill.push import push

    try:
        print(push(options.output, options.target))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


def _parser() -> tuple[argparse.ArgumentParser, Collection[str]]:
    """The parser, and the names of our commands."""
    theirs = [f"  {entry.name:<20}of {entry.distribution} {entry.version}" for entry in registry.entries("command")]
    parser = argparse.ArgumentParser(
        prog="latentmill",
        description="Batch latent diffusion: rows of prompts, images or latents become datasets, each row exactly once.",
        epilog="\n".join(["commands of plugins:", *theirs]) if theirs else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"latentmill {metadata.version('latentmill')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: Callable[[Any], int], about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about)
        command.set_defaults(command=function)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return command

    job_help = f"a job that is installed ({', '.join(registry.jobs())}) or the path of a YAML file"
    runs = add("run", _run, "Run a job to its end, or go on where an earlier run stopped.")
    plans = add("plan", _plan, "Say what a job would make, and run nothing.")
    for command in (runs, plans):
        command.add_argument("job", metavar="JOB", help=job_help)
        command.add_argument(
            "overrides", metavar="key=value", nargs="*", help="a value of the job, as sampling.steps=10"
        )
        command.add_argument(
            "--grow",
            action="store_true",
            help="take in rows that have come to the source since; those that are there stay",
        )
    runs.add_argument("--cfg", choices=["job"], help="print the whole composed config, and run nothing")
    runs.add_argument(
        "--fork",
        metavar="OUT2",
        type=storage.place,
        help="begin anew in OUT2, for a job that has changed; nothing is reused",
    )
    runs.add_argument(
        "--retry-failed",
        action="store_true",
        help="do shards with failed rows again, once what made them fail is mended",
    )
    runs.add_argument("--stage", metavar="NAME", help="with --retry-failed: only for rows that failed in this stage")
    runs.add_argument("--reason", metavar="TEXT", help="with --retry-failed: only for rows whose reason has this in it")
    plans.add_argument("--json", action="store_true", help="print the plan as it would be written to plan.json")
    states = add("status", _status, "Say how far a dataset is, from its folder alone.")
    states.add_argument("output", metavar="OUT", type=storage.place)
    states.add_argument("--json", action="store_true")
    checks = add("verify", _verify, "Read a dataset back whole: checksums, and each planned row exactly once.")
    checks.add_argument("output", metavar="OUT", type=storage.place)
    checks.add_argument(
        "--repair",
        action="store_true",
        help="move damaged shards and foreign files to quarantine/; the next run does the shards again",
    )
    exports = add("export", _export, "Write a finished dataset in formats that trainers read.")
    exports.add_argument("output", metavar="OUT", type=storage.place)
    exports.add_argument(
        "folder", metavar="FOLDER", type=storage.place, help="where to; of several formats each has a folder in it"
    )
    exports.add_argument("--to", metavar="FORMATS", required=True, help="names of formats, with commas between")
    exports.add_argument(
        "--names",
        metavar="COLUMN",
        help="the column that says what the pictures are called: file or id, if nothing is said",
    )
    exports.add_argument("--formats", action=listings.Formats, nargs=0, help="list the formats, and end")
    pushes = add("push", _push, "Upload a finished dataset, with its card, to the Hugging Face Hub.")
    pushes.add_argument("output", metavar="OUT", type=storage.place)
    pushes.add_argument("target", metavar="hf://datasets/OWNER/NAME", help="made if it is not there")
    plugins = add("plugins", listings.plugins, "List all installed plugins.")
    plugins.add_argument("--json", action="store_true")
    plugins.add_argument("--check", action="store_true", help="import each, in another process, and say its state")
    schedulers = add(
        "schedulers", listings.schedulers, "Say of each scheduler its order, what a step costs, and the paper."
    )
    schedulers.add_argument("--json", action="store_true")
    return parser, commands.choices


if __name__ == "__main__":
    sys.exit(main())
