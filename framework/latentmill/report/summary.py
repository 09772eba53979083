"""The end of a run, in a few lines for people."""

from __future__ import annotations

from collections.abc import Mapping

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
    made: int,
    seconds: float,
    interrupted: bool = False,
    warnings: Mapping[str, int] | None = None,
) -> str:
    """The end of a run, in a few lines for people.

    ``planned``, ``ok``, ``failed`` and ``filtered`` are rows of the whole dataset; ``made`` of them, in ``seconds``, this run's own;
    ``warnings`` are rows by what is to be known of them.
    """
    done = ok + failed + filtered
    if done == planned and not made:
        lines = [f"{name}: nothing to do, all {counted(planned, 'row')} were finished before"]
    else:
        lines = [f"{name}: {done:,} of {counted(planned, 'row')}"]
        if seconds and made:
            earlier = "" if made == done else f", {made:,} of them now"
            lines[0] += f"{earlier}, in {duration_text(seconds)} ({rate_text(made / seconds)} rows/s)"
    if interrupted:
        lines[0] = lines[0].replace(f"{name}: ", f"{name}: stopped after ", 1)
        lines.append("  to go on      run the same command again; finished shards stay as they are")
    output = store.url
    if store.holds_any("data"):
        lines.append(f"  dataset       {output}/data ({ok:,} rows)")
    if failed and store.holds_any("errors"):
        lines.append(f"  failed        {output}/errors ({counted(failed, 'row')}, each with its reason)")
    if filtered and store.holds_any("filtered"):
        every = ": all that were planned, so that the dataset has no row" * (filtered == planned)
        lines.append(f"  filtered      {output}/filtered ({counted(filtered, 'row')}, each with its reason{every})")
    lines += [f"  warning       {counted(rows, 'row')}: {text}" for text, rows in (warnings or {}).items()]
    for label, name in (("pictures", "contact_sheet.png"), ("report", "report.html")):
        if store.exists(name):
            lines.append(f"  {label:<13} {output}/{name}")
    return "\n".join(lines)
