"""What the pages show, done: their links lead somewhere, and the plugins of docs/plugins.md make a dataset."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def text_of(page):
    return page.read_text(encoding="utf-8")


def anchors(page):
    heads = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_what_would_be_changed_is_where_the_page_says():
    table = text_of(ROOT / "docs" / "architecture.md").partition("<!-- where -->")[2].partition("<!-- end -->")[0]
    paths = re.findall(r"`((?:framework|plugins|conf|tests|docs)/[^`]*)`", table)
    assert len(paths) > 25
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.fixture
def written(install):
    """The code of docs/plugins.md as an installed distribution."""
    blocks = re.findall(r"```python\n(.*?)```", text_of(ROOT / "docs" / "plugins.md"), re.DOTALL)
    blocks.sort(key=lambda block: "latentmill.testing" in block)  # it uses what stands below it
    places = {
        "vaes": "my_patches = my_plugins:Patches",
        "text_encoders": "colours = my_plugins:Colours",
        "denoisers": "one_colour = my_plugins:OneColour",
        "schedulers": "my_euler = my_plugins:Euler",
        "stages": "brightness = my_plugins:Brightness",
        "sources": "repeat = my_plugins:Repeat",
    }
    points = "".join(f"[latentmill.{group}]\n{point}\n" for group, point in places.items())
    install("my-plugins", points, my_plugins="from __future__ import annotations\n" + "\n".join(blocks))


def test_the_plugins_of_the_page_make_a_dataset(written, tmp_path, latentmill, rows, failed, filtered):
    """A picture of one colour, out of six plugins; the rows that are too dark are filtered, with reason and score."""
    job = tmp_path / "job.yaml"
    job.write_text(
        "defaults: [job, sink: parquet, cluster: inline, _self_]\n"
        "flow: [read, encode, denoise, decode, {name: brightness, as: too_dark, least: 0.3}, write]\n"
        "vae: {name: my_patches, side: 1}\n"
        "text_encoder: {name: colours}\ndenoiser: {name: one_colour}\nscheduler: {name: my_euler}\n"
        "source: {name: repeat, prompt: blue, count: 3}\n"
        "sampling: {steps: 2, width: 4, height: 4, guidance_scale: 1.0}\n"
        f"output: {tmp_path / 'out'}\n"
    )
    assert latentmill("run", job) == 0, latentmill.said
    found = rows(tmp_path / "out")
    assert [row["brightness"] for row in found] == [pytest.approx(1 / 3)] * 3
    assert latentmill("run", job, f"output={tmp_path / 'dark'}", "stages.too_dark.settings.least=0.5") == 0
    told = [(row["stage"], row["reason"], row["scores"]) for row in filtered(tmp_path / "dark")]
    assert told == [("too_dark", "brightness 0.33 is below 0.5", {"brightness": pytest.approx(1 / 3)})] * 3
    assert latentmill("run", job, f"output={tmp_path / 'bad'}", "source.prompt=pink") == 5
    assert failed(tmp_path / "bad")[0]["reason"] == "'pink' is no colour; there are red, green, blue"
