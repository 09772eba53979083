"""The end of a run, in a few lines for people."""

from __future__ import annotations

from collections.abc import Mapping

from latentmill.driver.stopping import Stopping
from latentmill.half_done import HALF_DONE
from latentmill.progress import counted, duration_text, rate_text
from latentmill.storage import Storage


def summary(
    name: str,
    store: Storage,
    *,
    planned: int,
    ok: int,
    failed: int,
    filtered: int = 0,
    not_needed: int = 0,
    wanted: int | None = None,
    made: int,
    seconds: float,
    interrupted: bool = False,
    stopping: Stopping | None = None,
    warnings: Mapping[str, int] | None = None,
) -> str:
    """The end of a run, in a few lines for people.

    ``planned``, ``ok``, ``failed``, ``filtered`` and ``not_needed`` are rows of the whole dataset, of which so many ok ones were ``wanted``,
    or any number; ``made`` of them, in ``seconds``, this run's own;
    ``stopping`` says of a run that was told to stop what it has kept; ``warnings`` are rows by what is to be known of them.
    """
    done = ok + failed + filtered + not_needed
    if done == planned and not made:
        lines = [f"{name}: nothing to do, all {counted(planned, 'row')} were finished before"]
    else:
        lines = [f"{name}: {done:,} of {counted(planned, 'row')}"]
        if seconds and made:
            earlier = "" if made == done - not_needed else f", {made:,} of them now"
            lines[0] += f"{earlier}, in {duration_text(seconds)} ({rate_text(made / seconds)} rows/s)"
    if interrupted:
        lines[0] = lines[0].replace(f"{name}: ", f"{name}: stopped after ", 1)
        lines.append("  to go on      run the same command again; finished shards stay as they are")
    lines += _half_done(stopping, store.url) if interrupted and stopping is not None else []
    output = store.url
    if store.holds_any("data"):
        lines.append(f"  dataset       {output}/data ({ok:,} rows)")
    if failed and store.holds_any("errors"):
        lines.append(f"  failed        {output}/errors ({counted(failed, 'row')}, each with its reason)")
    if filtered and store.holds_any("filtered"):
        every = ": all that were planned, so that the dataset has no row" * (filtered == planned)
        lines.append(f"  filtered      {output}/filtered ({counted(filtered, 'row')}, each with its reason{every})")
    if not_needed:
        lines.append(f"  not needed    {counted(not_needed, 'row')}, since {ok:,} were accepted before")
    elif wanted and done == planned and ok < wanted:
        lines.append(
            f"  accepted      {ok:,} of the {counted(wanted, 'row')} that accept.rows asks for: no more are planned"
        )
    lines += [f"  warning       {counted(rows, 'row')}: {text}" for text, rows in (warnings or {}).items()]
    for label, name in (("pictures", "contact_sheet.png"), ("report", "report.html")):
        if store.exists(name):
            lines.append(f"  {label:<13} {output}/{name}")
    return "\n".join(lines)


def _half_done(stopping: Stopping, output: str) -> list[str]:
    """What was kept of shards that were not complete, and what was thrown away."""
    if stopping.how != "stopped":
        return ["  thrown away   all that was done of shards that were not complete"]
    lines = [
        f"  half done     {output}/{HALF_DONE} ({counted(stopping.kept, 'row')}, with which the same command goes on)"
    ]
    lines = lines if stopping.kept else []
    for stage, rows in stopping.begun_again.items():
        lines.append(
            f"  begun again   {counted(rows, 'row')} in {stage}, which could not be asked for them as they were"
        )
    if stopping.thrown_away:
        lines.append(
            f"  thrown away   {counted(stopping.thrown_away, 'row')}, which could not be kept: {stopping.reason}"
        )
    return lines
