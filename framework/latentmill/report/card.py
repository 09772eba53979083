"""The dataset card, ``README.md``, which Hugging Face reads."""

from __future__ import annotations

import json
from collections.abc import Sequence

from latentmill.progress import counted
from latentmill.report.files import MARK, put
from latentmill.report.material import Material, identity

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
    "trajectory": "half-way latents: the noise schedule that they are on, and the model and scheduler that state is of",
    "state": "half-way latents: what the scheduler remembers",
    "guidance_from": "the time, from 1 for noise down to 0, at which guidance began",
    "guidance_until": "the time at which it ended",
    "strength": "share of the noise schedule that was walked; 1 starts from pure noise",
    "scheduler": "the solver",
    "width": "pixels",
    "height": "pixels",
    "row": "the row's number in the plan",
    "row_id": "the row's name, which never changes",
    "id": "the row's own name in the source",
    "warning": "what is to be known of the row, and did not make it fail",
    "psnr": "PSNR of the reconstruction against the source picture, in dB",
}


def make(dataset: Material) -> None:
    """Write the card."""
    sizes = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
    size = next((label for most, label in sizes.items() if dataset.ok < most), "n>10M")
    parts = [
        f"---\npretty_name: {json.dumps(dataset.name)}\nsize_categories:\n- {size}\ntags:\n- latentmill\n- synthetic\n"
        "configs:\n- config_name: default\n  data_files: data/*.parquet\n---",
        f"# {dataset.name}",
        f"{counted(dataset.ok, 'row')}, made by latentmill"
        + (f"; {dataset.failed:,} more failed, with their reasons in `errors/`" if dataset.failed else "")
        + f". The plan that it follows, down to the weights' hashes, is `plan.json` (hash `{dataset.plan['hash']}`).",
    ]
    if dataset.warnings:
        parts.append("\n".join(f"- {counted(rows, 'row')}: {text}" for text, rows in dataset.warnings.items()))
    if dataset.tiles:
        parts.append("![pictures from all over the dataset](contact_sheet.png)")
    parts.append(
        '```python\nimport datasets\n\ndataset = datasets.load_dataset("PATH_OF_THIS_FOLDER", split="train")\n```'
    )
    parts.append(_markdown(["column", "meaning"], [[f"`{name}`", MEANING.get(name, "")] for name in dataset.columns]))
    plugins = [[kind, *identity(plugin)] for kind, plugin in dataset.plan["plugins"].items()]
    parts.append("## Made with\n\n" + _markdown(["part", "plugin", "from", "weights"], plugins))
    if dataset.plan.get("latents"):
        facts = ", ".join(f"{key} {value}" for key, value in dataset.plan["latents"].items())
        parts.append(f"Latent space: {facts}. Stored latents are scaled: `(z - shift) * scale`.")
    parts.append(f"## Config\n\n```json\n{json.dumps(dataset.plan['config'], indent=1)}\n```\n")
    parts.append(f"<!-- {MARK} -->\n")
    put(dataset.store, "README.md", "\n\n".join(parts).encode())


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
