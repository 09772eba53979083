"""Imports run one way: a module imports what stands before it in ORDER, and nothing behind."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "framework" / "latentmill"
ORDER = """
    failpoints errors text tally usage streams notices values plugin digests weights libraries syntax ids identity buckets pixels resampling fields declarations registry schedulers batch columns checks storage
    models comfy config flow parts survey plan plan_files half_done generations shards shard_index dataset stored
    sources sinks launchers
    stages verify exports
    progress metrics snapshots driver workers report push runner sweep submissions doctor estimates probe commands cli
    testing
""".split()
DOOR = {"config", "dataset", "runner", "stored"}
"""What ``latentmill/__init__.py`` may open: it is the public door, and no module goes through it."""


def modules() -> list[Path]:
    return [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


def dotted(path: Path) -> list[str]:
    """Its name under latentmill, part by part."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return list(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, package: Path = ROOT) -> set[str]:
    """Full names of what a module of ours imports from ours, wherever in the file, TYPE_CHECKING included."""
    inside = ["latentmill", *path.relative_to(package).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{name}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "latentmill"}


def units(names: set[str]) -> set[str]:
    """The entries of ORDER that full names stand for."""
    return {name.split(".")[1] for name in names if "." in name and name.split(".")[1] in ORDER}


def test_every_module_has_a_place_in_the_order():
    assert {dotted(path)[0] for path in modules()} <= {*ORDER, "conf", "jobs"}


@pytest.mark.parametrize("path", modules(), ids=lambda path: ".".join(dotted(path)))
def test_no_import_runs_back_up(path):
    unit = dotted(path)[0]
    names = imports(path)
    assert "latentmill" not in names, "the package's door is for users"
    assert all(name.count(".") >= 1 for name in names)
    unknown = {name for name in names if name.split(".")[1] not in ORDER}
    assert not unknown, f"{unit} imports through the package's door: {unknown}"
    later = {other for other in units(names) if ORDER.index(other) > ORDER.index(unit)}
    assert not later, f"{unit} imports {later}, which stand behind it"


def test_no_circle_inside_a_folder_either():
    graph: dict[str, set[str]] = {}
    names = {".".join(["latentmill", *dotted(path)]) for path in modules()}
    for path in modules():
        module = ".".join(["latentmill", *dotted(path)])
        reached = set()
        for name in imports(path):
            # ``from latentmill.a import b``: b is a module, or a name in a.
            reached.add(name if name in names else name.rpartition(".")[0])
        graph[module] = (reached & names) - {module}
    while leaves := {module for module, reached in graph.items() if not reached & graph.keys()}:
        graph = {module: reached for module, reached in graph.items() if module not in leaves}
    assert not graph, f"a circle among {sorted(graph)}"


def test_the_door_opens_only_public_rooms():
    assert units(imports(ROOT / "__init__.py")) <= DOOR


def test_plugins_import_the_contract_and_what_goes_with_it():
    for path in sorted(ROOT.parents[1].glob("plugins/*/src/*/**/*.py")):
        if path.name != "evaluate.py":  # measures whole stages, as a user would
            allowed = {
                "plugin",
                "weights",
                "syntax",
                "text",
                "batch",
                "fields",
                "schedulers",
                "sinks",
                "testing",
            }  # schedulers: its noise schedules; sinks: rows as batches again
            names = imports(path, path.parents[1])
            assert "latentmill" not in names, (
                f"{path}: what it takes of the door is not to be seen: from latentmill import read"
            )
            assert {name.split(".")[1] for name in names} <= {*allowed, "read"}, path


def test_the_reader_sees_every_kind_of_import(tmp_path):
    module = tmp_path / "schedulers" / "euler.py"
    module.parent.mkdir()
    module.write_text(
        """
from __future__ import annotations
import latentmill.run
from latentmill import rows
from . import noise
from ..plan import Plan
if TYPE_CHECKING:
    from latentmill.config import Job
def late():
    from latentmill.workers.ray_pool import RayPool
"""
    )
    assert imports(module, tmp_path) == {
        "latentmill.run",
        "latentmill.rows",
        "latentmill.schedulers.noise",
        "latentmill.plan.Plan",
        "latentmill.config.Job",
        "latentmill.workers.ray_pool.RayPool",
    }
