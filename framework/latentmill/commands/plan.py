"""``latentmill plan``."""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from typing import Any

from latentmill import storage
from latentmill.commands.command import Command, add_grow, add_job
from latentmill.errors import JobError
from latentmill.text import in_units, plural, without_secrets

BUCKETS_A_LINE = 8
MANY_SHARDS = 20_000
"""Files in one folder from which listing them, and reading their footers at the end, takes minutes."""


def _options(parser: argparse.ArgumentParser) -> None:
    add_job(parser)
    add_grow(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the plan as it would be written to plan.json; with --probe: what is reckoned",
    )
    parser.add_argument(
        "--probe", metavar="ROWS", type=int, help="run that many rows, and say what the whole job would take"
    )
    parser.add_argument("--price", metavar="PRICE", type=float, help="with --probe: of a GPU for an hour")


def _plan(options: Any) -> int:
    from latentmill import generations, models, parts, plan_files, survey
    from latentmill import plan as planning
    from latentmill.config import load_job
    from latentmill.dataset import Dataset
    from latentmill.exports import of_job
    from latentmill.workers import pools

    if options.price is not None and options.probe is None:
        raise JobError("--price is of what --probe finds: give it, too")
    job = load_job(options.job, options.overrides)
    built = parts.parts(job)
    store = storage.at(job.output)
    plan = generations.settle(planning.plan(job, built), store, built.source, options.grow)
    left_out: list[str] = []
    formats = of_job.require(job, built, plan, left_out.append)
    there = Dataset(store, plan, built.sink)
    done = len(there.adopt())
    if options.probe is not None:
        from latentmill.commands.probing import told
        from latentmill.probe import probe

        with redirect_stdout(sys.stderr):  # Ray prints there when a node dies
            probed = probe(job, plan, built.sink, options.probe, done)
        print(told(job, plan, probed, options.price, options.json))
        return 0
    if options.json:
        print(plan.to_json(), end="")
        return 0
    sources = sum(fragment.rows for fragment in plan.fragments)
    print(f"job      {job.name}: {' > '.join(job.flow)}")
    print(f"source   {sources:,} rows in {len(plan.fragments):,} files, x {plan.samples_per_row} samples")
    print(
        f"planned  {plan.rows:,} rows in {plan.shards:,} shards of {plan.rows_per_shard:,}, of which {done:,} are done"
    )
    if plan.accept_rows:
        print(f"accept   the first {plural(plan.accept_rows, 'row')} that are not filtered; no more are made")
    if job.attempts:
        print(f"{'accept':<{9}}of each row up to {plural(job.attempts, 'sample')}, until one is not filtered")
    if plan.shards > MANY_SHARDS:
        print(
            f"         that is many files: rows_per_shard={-(-plan.rows // MANY_SHARDS // 100) * 100} would make fewer"
        )
    print(f"output   {job.output}")
    hosted, why = pools.hosted(job, job.flow)
    print(f"workers  {', '.join(' + '.join(plan.stages[stage].name for stage in stages) for stages in hosted)} ({why})")
    if job.cluster.kind != "inline":
        print(f"replicas {', '.join(pools.replicas_text(job, plan, stages) for stages in hosted)}")
    plugins = {
        kind: about
        for kind, about in plan.plugins.items()
        if (kind[:5], about["distribution"]) != ("stage", "latentmill")
    }
    wide = max(13, *map(len, plugins))
    for kind, about in plugins.items():
        print(
            f"{kind:<{wide}} {about['name']} ({about['distribution']} {about['version']}) {about['fingerprint']}".rstrip()
        )
    for model in models.lacking(built.models.wanted()):
        url = without_secrets(model.url, job.config)
        commit = f" at {model.pin.version[:8]}" * bool(model.pin.version)
        here = f"{in_units(model.bytes)} are not on this machine yet" if model.bytes else "all on this machine"
        print(
            f"{'fetched':<{wide}} {url}{commit}: {plural(len(model.pin.files), 'file')}, {in_units(model.pin.bytes)}; {here}"
        )
    print(f"{'libraries':<{wide}} {', '.join(f'{name} {version}' for name, version in plan.libraries.items())}")
    if beside := [f"{column.name} {column.type}" for column in plan.columns.schema()]:
        print(f"{'columns':<{wide}} {', '.join(beside)}")
    if job.size is not None:
        found, of = survey.bucket_counts(job, built, plan.fragments)
        counts = [f"{bucket} {count:,}" for bucket, count in found.most_common()]
        lines = [", ".join(counts[start : start + BUCKETS_A_LINE]) for start in range(0, len(counts), BUCKETS_A_LINE)]
        for at, line in enumerate([*lines, of]):
            print(f"{'' if at else 'buckets':<13} {line}")
    text = survey.encoded_text(job, built)
    foreign, texts = survey.look_into_texts(job, built, plan.fragments, text)
    if text is not None:
        for at, line in enumerate(survey.text_lines(text, plan.rows, texts, built.sink)):
            print(f"{'' if at else 'text':<{wide}} {line}")
    for at, line in enumerate(of_job.lines(job, formats, plan.rows, text, texts[0])):
        print(f"{'' if at else 'export':<{wide}} {line}")
    print(f"hash     {plan.hash}")
    for line in [
        *survey.notices(job, built),
        *left_out,
        *foreign,
        *plan_files.changed_libraries(plan, store),
        *(f"{job.output}/data/{name} is no shard of this dataset" for name in there.foreign()),
    ]:
        print(f"notice   {line}")
    return 0


PLAN_COMMAND = Command("plan", "Say what a job would make, and run nothing.", _options, _plan)
