"""What was found, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from printed import lines as table

Line = dict[str, Any]


def verdict(lines: Sequence[Line]) -> int:
    """1 if something was wrong or failed."""
    return int(any(line["kind"] == "failed" or line.get("ok") is False for line in lines))


def markdown(lines: Sequence[Line]) -> str:
    """All of it."""

    def of(kind: str) -> list[Line]:
        return [line for line in lines if line["kind"] == kind]

    out = ["# On a GPU", ""]
    for line in of("machine"):
        memory = f", {line['memory']:.0f} GiB" if line["memory"] else ""
        versions = ", ".join(f"{name} {version}" for name, version in line["versions"].items())
        cuda = f", CUDA {line['cuda']}" if line["cuda"] else ""
        out += [
            f"{line['device']}{memory}{cuda}; Python {line['python']}, {versions}; commit {line['commit']}, {line['date']}.",
            "Written by `python benchmarks/gpu.py`; random weights, real shapes.",
            "",
        ]
    if checks := of("correctness"):
        out += [
            "## Correctness",
            "",
            *table(("what", "model", "dtype", "found", "bound", ""), map(_check, checks)),
            "",
        ]
    if rates := of("rate"):
        told = "; ".join(f"{line['model']}: {line['flops'] / 1e12:.3g} TFLOP/s in {line['dtype']}" for line in rates)
        out += ["## Pictures a second", "", f"The roofline's matrix products, measured: {told}.", ""]
    if speeds := of("speed"):
        head = ("model", "side", "batch", "steps", "", "ours", "loop", "ours / loop", "roofline", "ours / roofline")
        head += ("ours idle", "loop idle", "ours, GiB at most", "loop, GiB at most")
        out += [*table(head, map(_speed, speeds)), ""]
    if apart := of("split"):
        fused = {
            (line["model"], line["size"], line["batch"]): line.get("ours") for line in speeds if line["how"] == "eager"
        }
        out += [
            "## Split against fused",
            "",
            "Three processes on the one device, batches through pipes; pictures a second.",
            "",
        ]
        head = ("model", "side", "batch", "split", "fused", "fused / split")
        out += [*table(head, (_split(line, fused) for line in apart)), ""]
    if memory := of("memory"):
        head = ("model", "side", "rows", "stage", "weights, MiB", "above all weights at its height, MiB")
        out += ["## Memory of a stage", "", *table(head, map(_memory, memory)), ""]
    if gone := of("left out"):
        out += ["## Left out", "", *(f"- {line['part']}: {line['what']}: {line['why']}" for line in gone), ""]
    if failed := of("failed"):
        out += ["## Failed", "", "Tracebacks are in gpu.json.", ""]
        out += [*(f"- {line['part']}: {line['what']}: {line['why']}" for line in failed), ""]
    return "\n".join(out)


def _number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def _ratio(mine: float | None, other: float | None) -> str:
    return "" if not mine or not other else f"{mine / other:.2f}"


def _check(line: Line) -> list[str]:
    told = "right" if line["ok"] else "WRONG"
    return [line["what"], line["model"], line["dtype"], f"{line['found']:.2g}", f"{line['bound']:.2g}", told]


def _speed(line: Line) -> list[str]:
    ours, loop, bound = line.get("ours"), line.get("loop"), line["roofline"]
    idle = [_number(line.get(f"{way}_idle"), ".0%") for way in ("ours", "loop")]
    peaks = [_number(line.get(f"{way}_peak"), ".1f") for way in ("ours", "loop")]
    rates = [_number(ours), _number(loop), _ratio(ours, loop), _number(bound), _ratio(ours, bound)]
    return [line["model"], *(str(line[name]) for name in ("size", "batch", "steps", "how")), *rates, *idle, *peaks]


def _split(line: Line, fused: dict[tuple[str, int, int], float | None]) -> list[str]:
    there = fused.get((line["model"], line["size"], line["batch"]))
    rates = [_number(line["split"]), _number(there), _ratio(there, line["split"])]
    return [line["model"], str(line["size"]), str(line["batch"]), *rates]


def _memory(line: Line) -> list[str]:
    each = [_number(line[name], ".0f") for name in ("weights", "working")]
    return [line["model"], str(line["size"]), str(line["batch"]), line["stage"], *each]
