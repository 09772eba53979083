"""The dataset card, ``README.md``, which Hugging Face reads."""

from __future__ import annotations

import json
from collections.abc import Sequence

from latentmill import plan_files
from latentmill.buckets import PIXEL_WAYS
from latentmill.progress import counted
from latentmill.report.files import MARK, put
from latentmill.report.material import Material, identity


def make(dataset: Material) -> None:
    """Write the card."""
    sizes = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
    size = next((label for most, label in sizes.items() if dataset.ok < most), "n>10M")
    parts = [
        f"---\npretty_name: {json.dumps(dataset.name)}\nsize_categories:\n- {size}\ntags:\n- latentmill\n- synthetic\n"
        "configs:\n- config_name: default\n  data_files: data/*" + dataset.there.sink.suffix + "\n---",
        f"# {dataset.name}",
        f"{counted(dataset.ok, 'row')}, made by latentmill"
        + (f"; {dataset.failed:,} more failed, with their reasons in `errors/`" if dataset.failed else "")
        + (f"; {dataset.filtered:,} more were filtered, with their reasons in `filtered/`" if dataset.filtered else "")
        + (f"; {dataset.not_needed:,} more were planned, and not needed" if dataset.not_needed else "")
        + f". The plan that it follows, down to the weights' hashes, is `plan.json` (hash `{dataset.there.plan.first_hash}`)."
        + _grown(dataset),
    ]
    if dataset.warnings:
        parts.append("\n".join(f"- {counted(rows, 'row')}: {text}" for text, rows in dataset.warnings.items()))
    if dataset.tiles:
        parts.append("![pictures from all over the dataset](contact_sheet.png)")
    parts.append(
        '```python\nimport datasets\n\ndataset = datasets.load_dataset("PATH_OF_THIS_FOLDER", split="train")\n```'
    )
    known = dataset.there.plan.columns
    columns = [[f"`{name}`", found or known.meaning(name)] for name, found in dataset.columns.items()]
    parts.append(_markdown(["column", "meaning"], columns))
    plugins = [[kind, *identity(plugin)] for kind, plugin in dataset.plan["plugins"].items()]
    parts.append("## Made with\n\n" + _markdown(["part", "plugin", "from", "weights"], plugins))
    if dataset.plan.get("latents"):
        facts = ", ".join(f"{key} {value}" for key, value in dataset.plan["latents"].items())
        parts.append(f"Latent space: {facts}. Stored latents are scaled: `(z - shift) * scale`.")
    if size := dataset.plan["config"].get("size"):
        buckets = size["buckets"] if isinstance(size["buckets"], str) else "a list"
        parts.append(
            f"Pictures were opened {PIXEL_WAYS[size['pixels']]}; each was brought to the bucket of its shape, of {buckets}, and cut "
            + ("in the middle." if size["crop"] == "center" else "where its row's seed says.")
        )
    parts.append(f"## Config\n\n```json\n{json.dumps(dataset.plan['config'], indent=1)}\n```\n")
    parts.append(f"<!-- {MARK} -->\n")
    put(dataset.store, "README.md", "\n\n".join(parts).encode())


def _grown(dataset: Material) -> str:
    """In a sentence, by how many rows of the source it has grown each time; "" if it never has."""
    later = dataset.there.plan.generations[1:]
    which = ", ".join(
        f"`{plan_files.name_of(number)}` ({counted(each.rows, 'row')} of the source)"
        for number, each in enumerate(later, 1)
    )
    return f" It has grown since: {which}." if later else ""


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
