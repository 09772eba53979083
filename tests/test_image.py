"""The Dockerfile, read: what it copies is there and let through, what it builds on is there. Nothing is built here."""

import fnmatch
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TARGETS = ("cpu", "cuda")


def instructions(text):
    """Word and rest of each, continued lines in one, comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in whole.splitlines()]


def stages():
    """By name: what it is built on, and its instructions."""
    found = {}
    for word, rest in instructions((ROOT / "Dockerfile").read_text()):
        if word == "FROM":
            base, _, name = rest.split()
            found[name] = (base, [])
        else:
            list(found.values())[-1][1].append((word, rest))
    return found


def of(stage, word):
    return [rest for each, rest in stages()[stage][1] if each == word]


def test_each_stage_is_built_on_one_that_stands_before_it_and_the_first_on_our_python():
    names = list(stages())
    assert set(TARGETS) <= set(names)
    outside = [base for base, _ in stages().values() if base not in names]
    python = re.search(r"\(Python ([\d.]+)\)", (ROOT / "constraints.txt").read_text())[1]
    assert len(outside) == 1 and outside[0].startswith(f"python:{python}-slim")
    for at, (base, body) in enumerate(stages().values()):
        lent = re.findall(r"from=(\S+?)[,\s]", " ".join(rest for _, rest in body))
        assert {base, *lent} - {outside[0]} <= set(names[:at])


def test_what_is_copied_is_there_and_let_through():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    let = {line[1:] for line in ignored if line.startswith("!")}
    copied = {source for name in stages() for rest in of(name, "COPY") for source in rest.split()[:-1]}
    assert copied == let and all((ROOT / source).exists() for source in copied)
    assert ignored[0] == "*", "nothing else is sent to who builds"
    for kept in ("framework/latentmill/cli.py", "plugins/shapes/pyproject.toml", "jobs/txt2img.yaml"):
        assert not any(fnmatch.fnmatch(kept, pattern) for pattern in ignored if pattern[0] not in "!*")


def test_wheels_are_made_of_all_that_their_projects_name():
    [build] = of("wheels", "RUN")
    made = [word for word in build.split() if word.startswith("plugins/")]
    assert made == ["plugins/shapes", "plugins/diffusers", "plugins/filters", "plugins/comfy"] and " . " in build
    there = {rest.split()[1].removeprefix("/source/") for rest in of("wheels", "COPY")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]
    for package in sorted((ROOT / "framework").glob("latentmill/**/__init__.py")):
        assert ".".join(package.parent.relative_to(ROOT / "framework").parts) in packages
    folders = {folder or "." for folder in project["tool"]["setuptools"]["package-dir"].values()}
    assert folders <= there


def test_each_target_has_the_tested_versions_and_is_nobody_special():
    for name in TARGETS:
        base, body = stages()[name]
        installs = [rest for rest in of(name, "RUN") if "pip install" in rest]
        assert installs and all(
            "--constraint /constraints.txt" in rest or "/constraints.txt)" in rest for rest in installs
        )
        assert "/wheels/latentmill-*.whl /wheels/latentmill_*.whl" in installs[-1]
        assert body[-2:] == [("ARG", "RUN_AS=1000"), ("USER", "$RUN_AS")] and base == "base"
        assert ("VOLUME", "/cache") in body
    # KubeRay's user, and its commands: they must find ray, and start what they like.
    assert any("useradd --uid 1000 " in rest and " wget" in rest and " bash" in rest for rest in of("base", "RUN"))
    assert not any(word == "ENTRYPOINT" for _, body in stages().values() for word, _ in body)
    text = (ROOT / "Dockerfile").read_text()
    assert not re.search(r"TOKEN|SECRET|PASSWORD|KEY", text)
