"""Rewrites the table of public workflows in comfyui.md: ``python docs/workflows.py FOLDER``.

Their files lie in FOLDER as OWNER+NAME/PATH; a workflow that stands in a program as PROGRAM.json, or several below PROGRAM.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from make import DOCS, renewed, table

from latentmill.comfy import explained
from latentmill.comfy.explanation import Explanation
from latentmill.errors import JobError

FAMILIES = {
    "flux-?2": "FLUX.2",
    "qwen[-_]image": "Qwen-Image",
    "z_image": "Z-Image",
    "hidream": "HiDream",
    "hunyuan_?video": "HunyuanVideo",
    "hunyuan_?image": "HunyuanImage",
    "wan2": "Wan 2.2",
    "ltx": "LTX-Video",
    "mochi": "Mochi",
    "cosmos": "Cosmos",
    "cogvideo": "CogVideoX",
    "supir": "SUPIR",
    "animatediff": "SD 1.5, AnimateDiff",
    "sd3(?!latent)": "SD 3",
    "flux": "FLUX.1",
    "xl": "SDXL",
}
"""By what a name in a workflow, or its own, has in it; the first that fits counts."""
NOT_KNOWN = "nodes of this class are not supported"


def family_of(path: Path) -> str:
    """Whose model a workflow takes, by its name, and those of files and classes in it."""
    inside = re.findall(r'"([^"\s]+\.(?:safetensors|gguf|ckpt|pth|sft)|[A-Z]\w+)"', path.read_text(encoding="utf-8"))
    named = " ".join([path.name, *inside])
    return next((name for pattern, name in FAMILIES.items() if re.search(pattern, named, re.IGNORECASE)), "SD 1.5")


def became(path: Path) -> str:
    """The stages of a workflow's job, or of each output's; or the nodes that are refused."""
    try:
        found = explained(str(path), [])
    except JobError as error:
        ends = re.findall(r"node (\S+) (\w+)", str(error).rpartition("; ")[2])
        return f"**refused**, it saves no picture: {', '.join(f'{id} `{kind}`' for id, kind in ends)}"
    saved = [id for id, kind, *_ in found.rows if kind == "SaveImage"]
    if found.runs or len(saved) < 2:
        return said_of(found)
    each = {id: explained(str(path), [f"comfy.output={id}"]) for id in saved}
    if not any(one.runs for one in each.values()):
        return said_of(found)
    return "; ".join(f"{id}: {said_of(one)}" for id, one in each.items())


def said_of(found: Explanation) -> str:
    """The stages of a job, without reading and writing; or the nodes that are refused."""
    refused = [(id, kind, said) for id, kind, _, said in found.rows if said.startswith("REFUSED: ")]
    if refused or not found.runs:
        return f"**refused**: {', '.join(in_words(*each) for each in refused)}"
    return found.lines[0].removeprefix("flow: read > ").removesuffix(" > write")


def in_words(id: str, kind: str, said: str) -> str:
    """A node that is refused."""
    why = said.removeprefix("REFUSED: ").partition("; ")[0]
    return f"{id} `{kind}`" + (f" ({why})" if why != NOT_KNOWN else "")


def rows(folder: Path) -> Iterator[list[str]]:
    """Of each workflow, files of equal content together."""
    alike: dict[tuple[str, str], list[Path]] = {}
    for path in sorted(folder.glob("*/**/*.json")):
        repository = path.relative_to(folder).parts[0].replace("+", "/")
        alike.setdefault((repository, path.read_text(encoding="utf-8")), []).append(path)
    for (repository, _), paths in alike.items():
        names = [str(Path(*path.relative_to(folder).parts[1:]).with_suffix("")) for path in paths]
        yield [repository, ", ".join(f"`{name}`" for name in names), family_of(paths[0]), became(paths[0])]


if __name__ == "__main__":
    page = DOCS / "comfyui.md"
    made = table(["repository", "file", "family", "becomes"], [*rows(Path(sys.argv[1]))])
    page.write_text(renewed(page.read_text(encoding="utf-8"), "workflows", made), encoding="utf-8")
