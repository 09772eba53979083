"""Rewrites the marked parts of the pages: ``python docs/make.py``. Each maker's text goes between its two marks."""

from __future__ import annotations

import inspect
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from latentmill import registry, submissions
from latentmill.comfy.nodes import NODES
from latentmill.commands.listings import scheduler_table
from latentmill.exports.spaces import VAE_FAMILIES
from latentmill.exports.table import EXPORT_FORMATS, NOT_MADE
from latentmill.exports.texts import TEXT_FAMILIES, shapes_in_words
from latentmill.fields import OWN_FIELDS, SOMETIMES, OwnField, limits, python_type
from latentmill.plugin.stage import BATCH_COLUMNS

DOCS = Path(__file__).parent


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def fields() -> str:
    """The fields of a row."""

    def default(field: OwnField) -> str:
        return "null" if field.default is None else f"`{field.default!r}`" if field.default != "" else "empty"

    def range_of(field: OwnField) -> str:
        if python_type(field) not in (int, float) or not field.in_source:
            return ""
        least, most = limits(field)
        shown = ["" if end is None else "2^64 - 1" if end == 2**64 - 1 else str(end) for end in (least, most)]
        return " to ".join(shown) if any(shown) else "finite"

    def given(field: OwnField) -> str:
        where = [what for what, yes in (("source", field.in_source), ("`sampling`", field.in_job)) if yes]
        return ", ".join(where) or "the framework"

    rows = [
        [
            f"`{field.name}`",
            str(field.type),
            given(field),
            default(field) if field.in_job else "",
            range_of(field),
            field.meaning,
            ", ".join(field.read_by),
            "yes" if field.stored else "no",
        ]
        for field in (*OWN_FIELDS, *SOMETIMES)
    ]
    return table(["field", "type", "given by", "default", "range", "meaning", "read by", "stored"], rows)


def comfy_nodes() -> str:
    """What becomes of ComfyUI's nodes."""
    found: dict[str, list[str]] = {}
    for name, convert in NODES.items():
        found.setdefault((inspect.getdoc(convert) or "").rstrip("."), []).append(f"`{name}`")
    return table(["class", "what it becomes"], [[", ".join(names), said] for said, names in found.items()])


def columns() -> str:
    """The columns of batches that are no fields."""
    rows = [
        [f"`{c.name}NAME`" if c.name.endswith(":") else f"`{c.name}`", c.type, c.meaning, c.way] for c in BATCH_COLUMNS
    ]
    return table(["column", "type", "meaning", "from, to"], rows)


def schedulers() -> str:
    """Our schedulers."""
    ours = [row for row in scheduler_table() if row["distribution"] == "latentmill"]
    rows = [
        [
            f"`{row['name']}`",
            str(row["order"]),
            str(row["evaluations"]),
            "yes" if row["stochastic"] else "",
            row["paper"],
        ]
        for row in ours
    ]
    return table(["name", "order", "evaluations", "draws noise", "paper"], rows)


def grids() -> str:
    """Our grids: what each is, and its settings with their defaults."""
    rows = []
    for entry in sorted(registry.entries("grid"), key=lambda entry: entry.name):
        if entry.distribution != "latentmill":
            continue
        grid = registry.load("grid", f"latentmill:{entry.name}")
        settings = [
            f"`{name}`" if setting.default in (None, setting.empty) else f"`{name}` {setting.default}"
            for name, setting in inspect.signature(grid).parameters.items()
        ]
        about = (grid.__doc__ or "").partition("\n")[0]
        rows.append([f"`{entry.name}`", about, ", ".join(settings)])
    return table(["name", "times", "settings"], rows)


def exports() -> str:
    """The formats that a dataset can be exported to."""
    rows = [
        [
            f"`{each.name}`",
            each.of,
            ", ".join(each.needs),
            each.layout,
            each.reader,
            each.checked,
        ]
        for each in EXPORT_FORMATS.values()
    ]
    return table(["format", "latents of", "needs", "files", "read by", "read back in tests by"], rows)


def families() -> str:
    """Whose latents exports know."""
    rows = [
        [f"`{each.name}`", each.about, str(each.channels), f"1/{each.downscale}", f"{each.scale:g}", f"{each.shift:g}"]
        for each in VAE_FAMILIES.values()
    ]
    return table(["latents of", "VAEs", "channels", "of the sides", "scale", "shift"], rows)


def texts() -> str:
    """Whose encodings of prompts exports know."""
    rows = [
        [
            f"`{each.name}`",
            each.about,
            shapes_in_words(each.shapes),
            f"`{each.made_with}`" if each.made_with else "",
            ", ".join(f"`{format.name}`" for format in EXPORT_FORMATS.values() if each in format.texts),
        ]
        for each in TEXT_FAMILIES.values()
    ]
    return table(["text of", "model", "`prompt:*`, each with its shape", "made with", "formats"], rows)


def not_made() -> str:
    """Encodings of prompts that are in no format."""
    return table(["format", "not made, since"], [[f"`{name}`", why] for name, why in NOT_MADE.items()])


CLUSTER_JOB = """\
defaults: [job, model: shapes, scheduler: dpmpp_2m, source: prompts, sink: parquet, cluster: local, override stages: gpu, _self_]
source: {path: "s3://bucket/prompts.parquet"}
sampling: {width: 1024, height: 1024}
stages:
  encode:  {replicas: 4, num_gpus: 0.25, accelerator_type: H100}
  denoise: {replicas: 16, num_gpus: 1, accelerator_type: H100}
  decode:  {replicas: 8, num_gpus: 0.5, accelerator_type: H100}
"""


def submitted(target: str, *words: str) -> str:
    """The page's job, the command, and what it shows; the id is another one each time, and the job's own file is cut off."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "my-job.yaml"
        file.write_text(CLUSTER_JOB)
        offer = submissions.prepare(str(file), [word.replace("'", "") for word in words], target)
    [text] = offer.files.values()
    text = text.replace(offer.submission.id, "my-job-1a2b3c4d")
    text = re.sub(
        r"( *)(defaults: \[job, _self_\]\n)(?:\1.*\n)*?(?= *LATENTMILL_JOB|(?! *\n)(?!\1))", r"\1\2\1[...]\n", text
    )
    command = " \\\n    ".join([f"latentmill submit my-job.yaml --to {target} --dry-run", *words])
    return f"```bash\n{command}\n```\n\n```yaml\n{text}```"


def cluster_job() -> str:
    """The page's job."""
    return f"```yaml\n{CLUSTER_JOB}```"


def rayjob() -> str:
    """A RayJob."""
    return submitted(
        "kuberay",
        "target.image=registry.example/latentmill:0.1.0",
        "target.volumes.models=/models",
        "'target.env=[AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY]'",
        "'target.groups.H100={gpus: 8, cpus: 64, memory: 512GiB, node_selector: {nvidia.com/gpu.product: NVIDIA-H100-80GB-HBM3}}'",
        "output=s3://bucket/my-job",
    )


def sky_task() -> str:
    """A task of SkyPilot."""
    return submitted(
        "skypilot",
        "target.image=registry.example/latentmill:0.1.0-root",
        "target.gpus=8",
        "target.cpus=64",
        "target.memory=512GiB",
        "target.spot=true",
        "'target.env=[AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY]'",
        "output=s3://bucket/my-job",
    )


PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "fields": ("fields.md", fields),
    "columns": ("fields.md", columns),
    "schedulers": ("schedulers.md", schedulers),
    "grids": ("schedulers.md", grids),
    "exports": ("trainers.md", exports),
    "families": ("trainers.md", families),
    "texts": ("trainers.md", texts),
    "not_made": ("trainers.md", not_made),
    "cluster_job": ("cluster.md", cluster_job),
    "rayjob": ("cluster.md", rayjob),
    "sky_task": ("cluster.md", sky_task),
    "comfy_nodes": ("comfyui.md", comfy_nodes),
}
"""For each marked part: the page that it is in, and what makes it."""


def renewed(page: str, name: str, made: str) -> str:
    """The page's text with the part ``name`` made anew."""
    marks = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    found = re.compile(re.escape(marks[0]) + ".*?" + re.escape(marks[1]), re.DOTALL)
    assert found.search(page), f"there are no marks of {name}"
    return found.sub(lambda _: f"{marks[0]}\n{made}\n{marks[1]}", page)


if __name__ == "__main__":
    for name, (page, make) in PARTS.items():
        path = DOCS / page
        path.write_text(renewed(path.read_text(encoding="utf-8"), name, make()), encoding="utf-8")
