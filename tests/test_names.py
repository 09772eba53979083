"""One name, one thing: no public class or constant stands twice under one name."""

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "logger",  # each module's way to the one logger, as everywhere in Python
    "T",  # a type variable, whose name means nothing
}


@cache
def names(path: Path) -> list[str]:
    """The public classes and constants of a module."""
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.Assign):
            found += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.append(node.target.id)
    return [name for name in found if not name.startswith("_")]


def twice(paths: list[Path]) -> dict[str, list[str]]:
    """Names that stand in several places, with their modules."""
    places = defaultdict(list)
    for path in paths:
        for name in names(path):
            places[name].append(path.stem)
    return {name: where for name, where in places.items() if len(where) > 1}


def test_no_public_name_stands_twice():
    """Neither in the framework, nor in it and one plugin: whoever searches for a name finds one thing."""
    framework = sorted(ROOT.glob("framework/latentmill/**/*.py"))
    for plugin in sorted(ROOT.glob("plugins/*/src")):
        found = twice([*framework, *sorted(plugin.glob("**/*.py"))])
        assert not {name: where for name, where in found.items() if name not in ALLOWED}


def test_the_reader_sees_every_way_to_name_a_thing(tmp_path):
    (tmp_path / "a.py").write_text("X = 1\nY: int = 2\n_Z = 3\nclass A:\n    INSIDE = 1\n")
    (tmp_path / "b.py").write_text("Y = X = 4\n_Z = 5\nclass A: pass\n")
    assert twice([tmp_path / "a.py", tmp_path / "b.py"]) == {name: ["a", "b"] for name in "XYA"}
    (tmp_path / "c.py").write_text("ONCE = 1\nAGAIN = 2\nAGAIN = 3\n")
    assert twice([tmp_path / "c.py"]) == {"AGAIN": ["c", "c"]}
