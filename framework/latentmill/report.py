"""What a person sees: a live view while a job runs; at its end a summary, a contact sheet, a dataset card, a report.

Everything after the live view is read back from the output's folder, so it can be made again at any time.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from typing import Any, BinaryIO, TextIO

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live as RichLive
from rich.progress_bar import ProgressBar
from rich.table import Table

from latentmill import storage
from latentmill.dataset import Dataset, data_name, errors_name
from latentmill.sinks.parquet import opened
from latentmill.storage import Storage
from latentmill.write import in_a_line

logger = logging.getLogger("latentmill")

# ---------------------------------------------------------------------------------------------- while a job runs


@dataclass(frozen=True)
class StageView:
    """A stage as it stands."""

    name: str
    done: int
    """Rows that have left it in this run, the rejected included."""
    queued: int
    """Rows that wait for it."""
    workers: int
    """Workers that have started."""
    busy: int
    """Workers that have something to do."""


@dataclass(frozen=True)
class View:
    """A run as it stands."""

    stages: Sequence[StageView]
    planned: int
    finished: int
    """Rows in committed shards, those of earlier runs included."""
    failed: int
    """Rows among them that this run could not make."""
    seconds: float
    """Since the run began."""
    shards_done: int
    shards: int
    elsewhere: int = 0
    """Shards that other drivers work on."""


class Pace:
    """Rates out of the views that follow one another; it has no clock but theirs."""

    def __init__(self) -> None:
        self.views: deque[View] = deque()
        self.before = 0
        """Rows that earlier runs had finished."""
        self._busy: defaultdict[str, float] = defaultdict(float)
        self._there: defaultdict[str, float] = defaultdict(float)

    @property
    def last(self) -> View:
        """The newest view."""
        return self.views[-1]

    def add(self, view: View) -> None:
        """Take in the next view. Those that no rate needs any more are forgotten."""
        if not self.views:
            self.before = view.finished
        else:
            passed = view.seconds - self.last.seconds
            for stage in self.last.stages:
                self._busy[stage.name] += passed * stage.busy
                self._there[stage.name] += passed * stage.workers
        if len(self.views) > 1 and view.seconds - self.views[-2].seconds < max(0.1, view.seconds / 500):
            self.views.pop()  # a fast loop shows thousands of views a second; the window below holds 150 at most
        self.views.append(view)
        # Rates are those of the last fifth of the run, and of 15 s at least: batches may take minutes.
        while len(self.views) > 1 and self.views[1].seconds <= view.seconds - max(15.0, view.seconds / 5):
            self.views.popleft()

    def rate(self, stage: int) -> float:
        """Rows a second that leave a stage. The wait for its first row is left out: workers start then."""
        last = self.last
        first = next((v for v in reversed(tuple(self.views)) if not v.stages[stage].done), self.views[0])
        passed = last.seconds - first.seconds
        return (last.stages[stage].done - first.stages[stage].done) / passed if passed > 0 else 0.0

    def busy(self, name: str) -> float:
        """The share of its workers' time, since they started, in which a stage had something to do."""
        return self._busy[name] / self._there[name] if self._there[name] else 0.0

    def progress(self) -> int:
        """Rows that are through, those included that wait for the rest of their shard."""
        return min(self.last.planned, max(self.last.finished, self.before + self.last.stages[-1].done))

    def left(self) -> float | None:
        """Seconds to go, by the stage that will be the last to finish; None as long as nobody can tell."""
        longest = 0.0
        for at, stage in enumerate(self.last.stages):
            rows = self.last.planned - self.before - stage.done
            if rows > 0 and self.last.finished < self.last.planned:
                rate = self.rate(at)
                if not rate:
                    return None
                longest = max(longest, rows / rate)
        return longest


class Live:
    """Shows a run on a terminal as one table that changes, elsewhere as a line every few seconds."""

    every = 5.0
    """Seconds between two lines."""

    def __init__(self, job_name: str, stream: TextIO) -> None:
        self.job_name, self.stream = job_name, stream
        self.pace = Pace()
        self._next_line = 0.0

    def show(self, view: View) -> None:
        """Take in how the run stands. Cheap: the loop calls it at every turn. Raises nothing: telling is not the work."""
        with suppress(Exception):
            self.pace.add(view)
            if not self.stream.isatty() and view.seconds >= self._next_line:
                self._next_line = view.seconds + self.every
                print(self.line(), file=self.stream, flush=True)

    def line(self) -> str:
        """The newest view in a line."""
        view = self.pace.last
        left = self.pace.left()
        parts = [f"{self.job_name}: {self.pace.progress():,} of {view.planned:,} rows"]
        parts += [f"{view.failed:,} failed"] * bool(view.failed)
        parts.append(" ".join(f"{stage.name} {stage.done:,}" for stage in view.stages))
        parts.append(f"{_rate(self.pace.rate(-1))} rows/s")
        parts.append("starting" if left is None else f"{_duration(round(left))} left")
        parts += [f"{_count(view.elsewhere, 'shard')} with other drivers"] * bool(view.elsewhere)
        return " | ".join(parts)

    def table(self) -> RenderableType:
        """The newest view as a table with a bar of the whole."""
        if not self.pace.views:
            return f"{self.job_name}: starting"
        view, left, rows = self.pace.last, self.pace.left(), self.pace.progress()
        head = Table.grid(padding=(0, 2))
        head.add_row(
            f"[bold]{self.job_name}[/]",
            ProgressBar(total=view.planned, completed=rows, width=32),
            f"{rows:,} of {view.planned:,} rows",
            f"{_duration(view.seconds)} so far" + ("" if left is None else f", about {_duration(round(left))} left"),
        )
        stages = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        stages.add_column("stage")
        for name in ("done", "queued", "rows/s", "workers busy"):
            stages.add_column(name, justify="right")
        for at, stage in enumerate(view.stages):
            workers = f"{stage.busy} of {stage.workers}" if stage.workers else "starting"
            stages.add_row(stage.name, f"{stage.done:,}", f"{stage.queued:,}", _rate(self.pace.rate(at)), workers)
        parts: list[RenderableType] = [head, stages]
        if view.elsewhere:
            parts.append(f"{_count(view.elsewhere, 'shard')} with other drivers")
        if view.failed:
            parts.append(f"[yellow]{_count(view.failed, 'row')} failed; the reasons are in errors/[/]")
        return Group(*parts)


@contextmanager
def live(job_name: str) -> Iterator[Live]:
    """A live view on stderr for the time of a run, as far as it can be shown."""
    shown = Live(job_name, sys.stderr or io.StringIO())
    with ExitStack() as on_screen:
        with suppress(Exception):
            if shown.stream.isatty():
                console = Console(file=shown.stream)
                table = RichLive(get_renderable=shown.table, console=console, refresh_per_second=4)
                on_screen.callback(_stop, table)
                table.start(refresh=True)
        yield shown


def _stop(table: RichLive) -> None:
    with suppress(Exception):
        table.stop()


# --------------------------------------------------------------------------------------------------- at the end


def summary(
    name: str,
    output: str,
    *,
    planned: int,
    ok: int,
    failed: int,
    made: int,
    seconds: float,
    interrupted: bool = False,
    warnings: Mapping[str, int] | None = None,
) -> str:
    """The end of a run, in a few lines for people.

    ``planned``, ``ok`` and ``failed`` are rows of the whole dataset; ``made`` of them, in ``seconds``, this run's own;
    ``warnings`` are rows by what is to be known of them.
    """
    done = ok + failed
    if done == planned and not made:
        lines = [f"{name}: nothing to do, all {_count(planned, 'row')} were finished before"]
    else:
        lines = [f"{name}: {done:,} of {_count(planned, 'row')}"]
        if seconds and made:
            earlier = "" if made == done else f", {made:,} of them now"
            lines[0] += f"{earlier}, in {_duration(seconds)} ({_rate(made / seconds)} rows/s)"
    if interrupted:
        lines[0] = lines[0].replace(f"{name}: ", f"{name}: stopped after ", 1)
        lines.append("  to go on      run the same command again; finished shards stay as they are")
    store = storage.at(output)
    if store.names("data"):
        lines.append(f"  dataset       {output}/data ({ok:,} rows)")
    if failed and store.names("errors"):
        lines.append(f"  failed        {output}/errors ({_count(failed, 'row')}, each with its reason)")
    lines += [f"  warning       {_count(rows, 'row')}: {text}" for text, rows in (warnings or {}).items()]
    for label, name in (("pictures", "contact_sheet.png"), ("report", "report.html")):
        if store.exists(name):
            lines.append(f"  {label:<13} {output}/{name}")
    return "\n".join(lines)


def finish(there: Dataset, pace: Pace | None = None) -> None:
    """Make ``contact_sheet.png``, the card ``README.md``, which Hugging Face reads, and ``report.html`` of a dataset.

    ``pace`` brings the rates of the run that just ended. A file of one of these names that we did not make stays as it is.
    What can't be made is a line in the log: the rows are there.
    """
    with _logged("contact sheet, card and report"):
        dataset = _Dataset(there)
        with _logged("contact_sheet.png"):
            _contact_sheet(dataset)
        with _logged("README.md"):
            _card(dataset)
        with _logged("report.html"):
            _html(dataset, pace)


@contextmanager
def _logged(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a font, a picture, a disk: whatever drawing and writing come upon
        said = in_a_line(f"{type(error).__name__}: {error}")
        logger.warning(f"{what} could not be made, and the dataset is complete without: {said}")


MARK = "made by latentmill, which replaces it at the end of each run; without this line it is yours"
"""In every file that people might have under the same name."""


def _put(store: Storage, name: str, content: bytes) -> None:
    """Put a file in place, unless there is one of that name that we did not make."""
    if store.exists(name) and MARK.encode() not in store.read(name):
        logger.warning(f"{store.url.rstrip('/')}/{name} was not made by latentmill, and stays as it is")
    else:
        store.put(name, content)


# ------------------------------------------------------------------------------------------ what a folder holds


@dataclass(frozen=True)
class _Tile:
    image: Image.Image
    caption: str


@dataclass
class _Dataset:
    """A dataset read back from where it lies."""

    there: Dataset
    most: int = 24
    """Pictures drawn from it at most."""
    errors: list[dict[str, Any]] = field(init=False, default_factory=list)
    """The first failed rows."""
    failed_in: Counter[str] = field(init=False, default_factory=Counter)

    def __post_init__(self) -> None:
        self.store = self.there.store
        self.plan: Mapping[str, Any] = json.loads(self.there.plan.to_json())
        names = [data_name(shard, self.there.sink) for shard in sorted(self.there.done())]
        self.files = [name.removeprefix("data/") for name in names if name.endswith(".parquet")]
        self.columns: list[str] = []
        if self.files:
            with self.store.open(f"data/{self.files[0]}") as file:
                self.columns = opened(file).schema_arrow.names
        self.ok, self.failed = self.there.counts()
        self.warnings = self.there.warnings()
        for shard in self.there.failed_shards():
            for line in self.store.read(errors_name(shard)).splitlines():
                error = json.loads(line)
                self.failed_in[error["stage"]] += 1
                if len(self.errors) < 200:
                    self.errors.append(error)

    @property
    def name(self) -> str:
        return str(self.plan["name"])

    @cached_property
    def tiles(self) -> list[_Tile]:
        """Pictures from all over the dataset; first of all one of each prompt."""
        if "image" not in self.columns:
            return []
        files = [self.files[at] for at in _evenly(len(self.files), self.most)]
        places: dict[str, list[tuple[str, int]]] = {}
        for name in files:
            with self.store.open(f"data/{name}") as file:
                prompts = opened(file).read(["prompt"], use_threads=False).column("prompt").to_pylist()
            for at, prompt in enumerate(prompts):
                places.setdefault(prompt, []).append((name, at))
        chosen = sorted(place for group in _choose(list(places.values()), self.most) for place in group)
        found = []
        for name in files:
            with self.store.open(f"data/{name}") as file:
                found += [_tile(row) for row in _read(file, [at for other, at in chosen if other == name])]
        return found


def _evenly(count: int, most: int) -> list[int]:
    """``most`` indices, or all, evenly drawn from ``range(count)``."""
    most = min(count, most)
    return [at * count // most for at in range(most)]


def _choose(groups: Sequence[list[Any]], most: int) -> Iterator[list[Any]]:
    """``most`` items of groups, or all: one of each group before two of any, evenly drawn among groups and within."""
    counts = [0] * len(groups)
    while most:
        open_groups = [at for at, group in enumerate(groups) if counts[at] < len(group)]
        if not open_groups:
            break
        for at in _evenly(len(open_groups), most):
            counts[open_groups[at]] += 1
            most -= 1
    for group, count in zip(groups, counts):
        yield [group[at] for at in _evenly(len(group), count)]


def _read(file: BinaryIO, wanted: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The rows ``wanted`` of a file, of which no other row group is read."""
    stored = opened(file)
    columns = [name for name in ("image", "prompt", "row_id", "psnr") if name in stored.schema_arrow.names]
    start = 0
    for group in range(stored.num_row_groups):
        stop = start + stored.metadata.row_group(group).num_rows
        here = [at - start for at in wanted if start <= at < stop]
        if here:
            yield from stored.read_row_group(group, columns=columns, use_threads=False).take(here).to_pylist()
        start = stop


def _tile(row: Mapping[str, Any]) -> _Tile:
    with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
        caption = row["prompt"] or row["row_id"]
        if row.get("psnr") is not None:
            caption += f" ({row['psnr']:.1f} dB)"
        return _Tile(image.convert("RGB"), caption)


# ------------------------------------------------------------------------------------------------ contact sheet

INK, FAINT, PAPER = (32, 33, 36), (110, 113, 119), (255, 255, 255)
SIDE, GAP, MARGIN = 192, 20, 32
"""Pixels: a picture's longer side, between pictures, around the sheet."""


def _contact_sheet(dataset: _Dataset) -> None:
    if not dataset.tiles:
        return
    pictures = [_fit(tile.image) for tile in dataset.tiles]
    text, title = ImageFont.load_default(14), ImageFont.load_default(24)
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    captions = [_wrap(tile.caption, text, max(width, 160), 4) for tile in dataset.tiles]
    rows = -(-len(pictures) // 6)
    columns = -(-len(pictures) // rows)
    line, cell = 18, max(width, 160)
    below = 8 + line * max(map(len, captions))
    head = 56
    sheet = Image.new(
        "RGB",
        (
            2 * MARGIN + columns * cell + (columns - 1) * GAP,
            2 * MARGIN + head + rows * (height + below) + (rows - 1) * GAP,
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 6), dataset.name, INK, title)
    shown = f"{len(pictures)} of {_count(dataset.ok, 'picture')}"
    draw.text((MARGIN, MARGIN + 25), shown, FAINT, text)
    for at, (picture, lines) in enumerate(zip(pictures, captions)):
        x = MARGIN + at % columns * (cell + GAP)
        y = MARGIN + head + at // columns * (height + below + GAP)
        sheet.paste(picture, (x, y + height - picture.height))
        for number, words in enumerate(lines):
            draw.text((x, y + height + 8 + number * line), words, INK, text)
    content = io.BytesIO()
    about = PngImagePlugin.PngInfo()
    about.add_text("Comment", MARK)
    sheet.save(content, "PNG", optimize=True, pnginfo=about)
    _put(dataset.store, "contact_sheet.png", content.getvalue())


def _fit(image: Image.Image) -> Image.Image:
    """The picture with its longer side at SIDE pixels; a small one enlarged by a whole factor."""
    scale: float = SIDE / max(image.size)
    scale = int(scale) if scale > 1 else scale
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)


def _wrap(text: str, font: Any, width: float, most: int) -> list[str]:
    """Lines of ``text`` no wider than ``width`` pixels, ``most`` at most."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        while font.getlength(word) > width:
            cut = max(1, next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width))
            lines += [line] * bool(line) + [word[:cut]]
            line, word = "", word[cut:]
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width:
            line = longer
        else:
            lines.append(line)
            line = word
    lines += [line] * bool(line)
    if len(lines) > most:
        last = lines[most - 1]
        while font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], last + "…"]
    return lines


# --------------------------------------------------------------------------------------------------------- card

MEANING = {
    "image": "the picture",
    "latents": "the latents, channels first, flattened",
    "shape": "shape of the latents: channels, height, width",
    "prompt": "what was asked for",
    "negative_prompt": "what was asked not to be there",
    "seed": "all noise of the row follows from it",
    "steps": "steps of the scheduler",
    "guidance_scale": "classifier-free guidance; 1 is none",
    "guidance_rescale": "how far guided predictions were brought back to the spread of unguided ones",
    "time": "half-way latents: the time that they are at, from 1 for noise down to 0",
    "trajectory": "half-way latents: the noise path that they are on, and the model and scheduler that state is of",
    "state": "half-way latents: what the scheduler remembers",
    "guidance_from": "the time, from 1 for noise down to 0, at which guidance began",
    "guidance_until": "the time at which it ended",
    "strength": "share of the noise path that was walked; 1 starts from pure noise",
    "scheduler": "the solver",
    "width": "pixels",
    "height": "pixels",
    "row": "the row's number in the plan",
    "row_id": "the row's name, which never changes",
    "id": "the row's own name in the source",
    "warning": "what is to be known of the row, and did not make it fail",
    "psnr": "PSNR of the reconstruction against the source picture, in dB",
}


def _card(dataset: _Dataset) -> None:
    sizes = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
    size = next((label for most, label in sizes.items() if dataset.ok < most), "n>10M")
    parts = [
        f"---\npretty_name: {json.dumps(dataset.name)}\nsize_categories:\n- {size}\ntags:\n- latentmill\n- synthetic\n"
        "configs:\n- config_name: default\n  data_files: data/*.parquet\n---",
        f"# {dataset.name}",
        f"{_count(dataset.ok, 'row')}, made by latentmill"
        + (f"; {dataset.failed:,} more failed, with their reasons in `errors/`" if dataset.failed else "")
        + f". The plan that it follows, down to the weights' hashes, is `plan.json` (hash `{dataset.plan['hash']}`).",
    ]
    if dataset.warnings:
        parts.append("\n".join(f"- {_count(rows, 'row')}: {text}" for text, rows in dataset.warnings.items()))
    if dataset.tiles:
        parts.append("![pictures from all over the dataset](contact_sheet.png)")
    parts.append(
        '```python\nimport datasets\n\ndataset = datasets.load_dataset("PATH_OF_THIS_FOLDER", split="train")\n```'
    )
    parts.append(_markdown(["column", "meaning"], [[f"`{name}`", MEANING.get(name, "")] for name in dataset.columns]))
    plugins = [[kind, *_identity(plugin)] for kind, plugin in dataset.plan["plugins"].items()]
    parts.append("## Made with\n\n" + _markdown(["part", "plugin", "from", "weights"], plugins))
    if dataset.plan.get("latents"):
        facts = ", ".join(f"{key} {value}" for key, value in dataset.plan["latents"].items())
        parts.append(f"Latent space: {facts}. Stored latents are scaled: `(z - shift) * scale`.")
    parts.append(f"## Config\n\n```json\n{json.dumps(dataset.plan['config'], indent=1)}\n```\n")
    parts.append(f"<!-- {MARK} -->\n")
    _put(dataset.store, "README.md", "\n\n".join(parts).encode())


def _identity(plugin: Mapping[str, Any]) -> list[str]:
    return [plugin["name"], f"{plugin['distribution']} {plugin['version']}", plugin["fingerprint"]]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


# --------------------------------------------------------------------------------------------------------- html

STYLE = """
:root { color-scheme: light dark; --faint: #6e7177; --rule: #8883; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; }
.faint, figcaption, th { color: var(--faint); }
.counts { display: flex; flex-wrap: wrap; gap: 2.5rem; margin: 1.5rem 0; }
.counts b { display: block; font-size: 1.6rem; font-variant-numeric: tabular-nums; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: 1.25rem; }
figure { margin: 0; } figcaption { font-size: .82rem; line-height: 1.35; margin-top: .4rem; overflow-wrap: anywhere; }
figure img { width: 100%; border-radius: 6px; display: block; }
table { border-collapse: collapse; } th { font-weight: normal; text-align: left; }
td, th { padding: .3rem 1.5rem .3rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
code, pre { font: .82rem/1.45 ui-monospace, monospace; overflow-wrap: anywhere; } pre { white-space: pre-wrap; }
"""


def _html(dataset: _Dataset, pace: Pace | None) -> None:
    counts = {"rows": dataset.ok, "failed": dataset.failed, "planned": dataset.plan["rows"]}
    figures = "".join(f"<div><b>{value:,}</b>{label}</div>" for label, value in counts.items())
    sections = []
    if dataset.tiles:
        figure = '<figure><img alt="" src="{}"><figcaption>{}</figcaption></figure>'
        pictures = "".join(figure.format(_data_uri(tile.image), escape(tile.caption)) for tile in dataset.tiles)
        sections.append(f'<h2>Pictures from all over the dataset</h2><div class="pictures">{pictures}</div>')
    if pace is not None and pace.views and pace.last.seconds:
        seconds, made = pace.last.seconds, pace.progress() - pace.before
        figures += f"<div><b>{_duration(seconds)}</b>for {made:,} rows in the last run</div>"
        figures += f"<div><b>{_rate(made / seconds)}</b>rows/s</div>"
        stages = [
            [s.name, f"{s.done:,}", _rate(s.done / seconds), f"{s.workers}", f"{pace.busy(s.name):.0%}"]
            for s in pace.last.stages
        ]
        head = ["stage", "rows", "rows/s", "workers", "busy"]
        sections.append("<h2>Stages in the last run</h2>" + _table(head, stages, numbers=range(1, 5)))
    if dataset.errors:
        by_stage = ", ".join(f"{stage} {count:,}" for stage, count in dataset.failed_in.most_common())
        first = f"the first {len(dataset.errors)} of {dataset.failed:,}" if dataset.failed > len(dataset.errors) else ""
        rows = [[error["row_id"], error["stage"], error["reason"]] for error in dataset.errors]
        sections.append(
            f'<h2>Failed rows</h2><p class="faint">{escape("; ".join(filter(None, [by_stage, first])))}</p>'
            + _table(["row", "stage", "reason"], rows)
        )
    if dataset.warnings:
        warnings = [[f"{rows:,}", text] for text, rows in dataset.warnings.items()]
        sections.append("<h2>Warnings</h2>" + _table(["rows", "what is to be known of them"], warnings, numbers=[0]))
    plugins = [[kind, *_identity(plugin)] for kind, plugin in dataset.plan["plugins"].items()]
    sections.append("<h2>Made with</h2>" + _table(["part", "plugin", "from", "weights"], plugins))
    sections.append(f"<h2>Config</h2><pre>{escape(json.dumps(dataset.plan['config'], indent=1))}</pre>")
    page = (
        f'<!doctype html><!-- {MARK} --><html lang="en"><meta charset="utf-8"><title>{escape(dataset.name)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>'
        f'<h1>{escape(dataset.name)}</h1><div class="faint">plan <code>{dataset.plan["hash"]}</code></div>'
        f'<div class="counts">{figures}</div>{"".join(sections)}</html>\n'
    )
    _put(dataset.store, "report.html", page.encode())


def _data_uri(image: Image.Image) -> str:
    content = io.BytesIO()
    kind = "png"
    if max(image.size) > SIDE:
        image, kind = image.copy(), "webp"
        image.thumbnail((2 * SIDE, 2 * SIDE), Image.Resampling.LANCZOS)
    image.save(content, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = [' class="number"' if at in numbers else "" for at in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{kind}>{escape(c)}</{tag}>" for kind, c in zip(kinds, cells)) + "</tr>"

    return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"


# ------------------------------------------------------------------------------------------------ ways to say it


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 1 or rate == 0 else f"{rate:.2g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    if minutes:
        return f"{minutes} min {rest:02d} s"
    return f"{rest} s" if rest >= 10 else f"{seconds:.2g} s"
