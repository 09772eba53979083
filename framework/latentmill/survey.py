"""What is to be known of a job before it runs: what its plugins say, prompts in another tool's language, the sizes of its pictures and texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice

from latentmill import registry, syntax
from latentmill.batch import NEGATIVE_PREFIX, PROMPT_PREFIX
from latentmill.buckets import Size
from latentmill.config import Job
from latentmill.parts import Parts
from latentmill.plugin import Fragment, RowError, Sink, TensorSpec, TextEncoder
from latentmill.plugin.stage import named
from latentmill.text import in_units, plural


def notices(job: Job, built: Parts) -> list[str]:
    """What people should know before a job starts, a line each; of a source, once ``plan`` has asked for its fragments."""
    lines: list[str] = []
    for plugin in built.plugins().values():
        with registry.asking(plugin):
            lines += plugin.notices()
    return list(dict.fromkeys([*lines, *_passes_lost(job, built)]))


def _passes_lost(job: Job, built: Parts) -> Iterator[str]:
    """Of stages that denoise from pure noise, since nobody has said a strength, what another has denoised."""
    passes = [stage.name for stage in built.flow if "denoiser" in stage.needs]
    for first, second in zip(passes, passes[1:]):
        said = job.stages[second].sampling.get("strength")
        if said is None and job.sampling["strength"] == 1 and not job.sampling_of(first)["until"]:
            yield (
                f"{second} begins with pure noise, and nothing is left of what {first} has made: its strength is 1, unless a row says "
                f"{second}.strength. stages.{second}.sampling.strength=0.5 keeps it in part"
            )


READ_BY_PLAN = 1_000_000
"""Prompts that ``plan`` looks into, at most."""


@dataclass(frozen=True)
class EncodedText:
    """What a text encoder makes of a job's prompts where a dataset stores it."""

    encoder: TextEncoder
    name: str
    """The plugin's."""
    negative: bool
    """Whether negative prompts are stored, too."""

    @cached_property
    def spec(self) -> Mapping[str, TensorSpec] | None:
        """Of one prompt; None if the text encoder doesn't say it."""
        with registry.asking(self.encoder):
            return self.encoder.conditioning_spec()

    @cached_property
    def bytes(self) -> int:
        """Of one prompt."""
        return sum(of.bytes for of in (self.spec or {}).values())


def encoded_text(job: Job, built: Parts) -> EncodedText | None:
    """None of a job whose dataset has none."""
    maker = None
    for stage in built.flow:
        if any(named(PROMPT_PREFIX, each) for each in stage.drops):
            maker = None
        maker = stage if PROMPT_PREFIX in stage.added() else maker
    if maker is None or "text_encoder" not in maker.needs:
        return None
    place = job.place("text_encoder", maker.name)
    return EncodedText(built.at(place), (job.choice(place) or {})["name"], NEGATIVE_PREFIX in maker.added())


def text_lines(text: EncodedText, rows: int, counts: tuple[int, int], sink: Sink) -> list[str]:
    """How large it is in a dataset of so many rows; ``counts``: of prompts and negative prompts."""
    if text.spec is None:
        return [f"text encoder {text.name} doesn't say how large what it makes is: plan --probe 64 measures it"]
    tensors = ", ".join(f"{name} {[*of.shape]} {of.dtype}" for name, of in text.spec.items())
    stored = sum(sink.stored_bytes(of, rows, count) for of in text.spec.values() for count in counts if count)
    said = [plural(count, what) for count, what in zip(counts, ("prompt", "negative prompt")) if count]
    return [
        f"{tensors}: {in_units(text.bytes)} a prompt",
        f"{' and '.join(said)}, each once a shard, of {plural(rows, 'row')}: at most {in_units(stored)} beside other columns",
    ]


class DistinctTexts:
    """How many prompts and negative prompts the shards have, each shard for itself."""

    def __init__(self, job: Job) -> None:
        self.samples, self.rows_per_shard = job.samples_per_row, job.rows_per_shard
        self.row = self.shard = 0
        self.counts = [0, 0]
        self.seen: tuple[set[str | None], set[str | None]] = set(), set()

    def add(self, both: Sequence[str | None]) -> None:
        """Those of the source's next row."""
        first, end = self.row * self.samples, (self.row + 1) * self.samples
        self.row += 1
        for shard in range(first // self.rows_per_shard, (end - 1) // self.rows_per_shard + 1):
            if shard != self.shard:
                self.shard, self.seen = shard, (set(), set())
            for k, text in enumerate(both):
                self.counts[k] += text not in self.seen[k]
                self.seen[k].add(text)

    def of(self, rows: int) -> tuple[int, int]:
        """The counts where the source has so many rows. Those that nobody has told of have each their own."""
        left = rows - self.row
        left += left * (self.samples - 1) // self.rows_per_shard  # of a row whose samples are in two shards
        return self.counts[0] + left, self.counts[1] + left


def look_into_texts(
    job: Job, built: Parts, fragments: Sequence[Fragment], text: EncodedText | None
) -> tuple[list[str], tuple[int, int]]:
    """How many rows of the source hold prompts in another tool's language, a line for each kind; and how many prompts and negative
    prompts are stored, of ``text``. Reads their texts alone, once, of READ_BY_PLAN rows at most.
    """
    reads, distinct = _syntax_read(built), DistinctTexts(job)
    # What a text becomes hangs on the fields of the text encoder, too, if it has some, and texts don't say those.
    counts = text is not None and text.spec is not None and not text.encoder.row_fields
    default = job.sampling["prompt"], job.sampling["negative_prompt"]
    texts = chain.from_iterable(built.source.texts(fragment) for fragment in fragments)
    found: Counter[str] = Counter()
    looked_at = 0
    with registry.asking(built.source):
        for both in islice(texts, READ_BY_PLAN if counts or reads is not None else 0):
            looked_at += 1
            prompt, negative = (default[k] if words is None else words for k, words in enumerate(both))
            if counts:
                distinct.add((prompt, negative))
            if reads is not None:
                found.update(syntax.told(prompt or "", reads))
                found.update(f"negative_prompt: {line}" for line in syntax.told(negative or "", reads))
    first = "first " * (looked_at == READ_BY_PLAN)
    lines = [f"{rows:,} of the {first}{looked_at:,} rows: {line}" for line, rows in found.most_common()]
    prompts, negatives = distinct.of(sum(fragment.rows for fragment in fragments))
    return lines, (prompts, negatives * (text is not None and text.negative))


def _syntax_read(built: Parts) -> Mapping[str, str | None] | None:
    """What the job's text encoder, or another of its stages, makes of other tools' syntax."""
    encoders = [plugin for plugin in built.plugins().values() if isinstance(plugin, TextEncoder)]
    readers = encoders or built.stages.values()
    return next((reader.reads for reader in readers if reader.reads is not None), None)


SIZES_READ = 10_000
"""Pictures whose size ``plan`` looks at, at most."""


def bucket_counts(job: Job, built: Parts, fragments: Sequence[Fragment]) -> tuple[Counter[str], str]:
    """How many pictures of the source get which bucket, as ``832x1216``, and of how many in words. Reads their headers alone.

    Of a source of more than SIZES_READ rows an even share of each fragment's first. Of several areas each picture has a bucket.
    """
    assert job.size is not None
    size, total = Size.of(job.size), sum(fragment.rows for fragment in fragments)
    found: Counter[str] = Counter()
    looked_at = pictures = reached = told = 0
    with registry.asking(built.source):
        for fragment in fragments:
            reached += fragment.rows
            share = min(fragment.rows, reached * min(total, SIZES_READ) // total - looked_at)
            looked_at += share
            for row in built.source.sizes(fragment.name, 0, share):
                told += 1
                if isinstance(row, RowError) or row.get("image") is None:
                    continue
                sides, own = row["image"], (row.get("width"), row.get("height"))
                if None in own and own != (None, None):
                    continue  # an error row
                pictures += 1
                for sample in range(len(size.area)):
                    try:
                        width, height = size.fit(sides[0], sides[1], sample).bucket if own == (None, None) else own
                        found[f"{width}x{height}"] += 1
                    except RowError:
                        found["too small"] += 1
    if not told:
        return found, f"source {job.source['name']} doesn't say how large its pictures are"
    areas = f", each at {len(size.area)} areas" if len(size.area) > 1 else ""
    among = f" of the {looked_at:,} rows looked at" if looked_at < total else f" of {total:,} rows"
    return found, f"{pictures:,} pictures{among}{areas}"
