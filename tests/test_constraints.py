"""The versions of constraints.txt go with each Python that latentmill says it runs on."""

import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]


def test_each_version_takes_the_oldest_python_that_we_take():
    """Debian 12 has Python 3.11.2, and pip sees no release that asks for more."""
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    [oldest] = [each.version + ".0" for each in SpecifierSet(asked)]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    refusing, read = {}, 0
    for pin in pins:
        try:
            found = metadata.metadata(pin.name)
        except metadata.PackageNotFoundError:  # of an extra that nobody asked for
            continue
        if pin.specifier.contains(found["Version"]):
            read += 1
            pythons = found.get("Requires-Python", "")
            if not SpecifierSet(pythons).contains(oldest):
                refusing[str(pin)] = pythons
    assert refusing == {}
    assert read > len(pins) // 2, "most are installed from there"
