"""Plugins by name: what is installed is listed without a look inside, and what can't be used is said in one line."""

import os
import sys

import pytest

from latentmill import registry
from latentmill.errors import PluginError

VAES = """
from latentmill.plugin import VAE, Scheduler

class Whole(VAE):
    contract = 2
    spec = None

    def __init__(self, path: str, tile: int = 8, gain: float = 1.0, soft: bool = False, note=None):
        if tile < 0:
            raise ValueError("tile is negative:\\n  use 0")
        if path == "nowhere":
            open("nowhere/at/all")
        self.settings = (path, tile, gain, soft)

    def encode(self, images): return images
    def decode(self, latents): return latents

class Anything(Whole):
    def __init__(self, **settings): self.settings = settings

class Bare(VAE):
    contract, spec, encode, decode = 2, None, Whole.encode, Whole.decode

class Later(Whole):
    contract = 3

class Half(VAE):
    contract = 2

class Silent(VAE):
    spec, encode, decode = None, Whole.encode, Whole.decode

class Stranger: pass

class Euler(Scheduler):
    def step(self, field, x, t, s, state): return x, state

def maker(): return Whole("x")
"""
NAMES = "whole=Whole anything=Anything bare=Bare later=Later half=Half silent=Silent stranger=Stranger euler=Euler maker=maker"


def distribution(folder, name, version, points, **modules):
    """An installed distribution, as far as importlib.metadata is concerned. ``points``: lines of entry_points.txt."""
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (about / "entry_points.txt").write_text("\n".join(points))
    for module, code in modules.items():
        (folder / f"{module}.py").write_text(code)


def refusal(function, *arguments):
    """The one line that a PluginError says."""
    with pytest.raises(PluginError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def acme(tmp_path, monkeypatch):
    points = [point.replace("=", " = acme_vaes:") for point in NAMES.split()]
    distribution(tmp_path, "acme", "1.0", ["[latentmill.vaes]", *points], acme_vaes=VAES)
    monkeypatch.syspath_prepend(tmp_path)


def test_listing_and_finding_import_nothing_and_loading_does(tmp_path, monkeypatch):
    leaves_a_mark = "import pathlib\npathlib.Path(__file__).with_suffix('.imported').touch()\n" + VAES
    points = ["[latentmill.vaes]", "quiet = quiet_plugin:Whole", "[latentmill.conf]", "quiet = quiet_plugin"]
    distribution(tmp_path, "quiet", "3.2", points, quiet_plugin=leaves_a_mark)
    monkeypatch.syspath_prepend(tmp_path)
    listed = [entry for entry in registry.entries() if entry.distribution == "quiet"]
    assert [(entry.group, entry.name, entry.version, entry.state) for entry in listed] == [
        ("latentmill.vaes", "quiet", "3.2", "ok"),
        ("latentmill.conf", "quiet", "3.2", "ok"),
    ]
    assert registry.find("vae", "quiet") == listed[0] and listed[0] not in registry.entries("scheduler")
    assert registry.provenance("vae", "quiet") == {"distribution": "quiet", "version": "3.2"}
    assert not (tmp_path / "quiet_plugin.imported").exists()
    assert registry.load("vae", "quiet").__name__ == "Whole" and (tmp_path / "quiet_plugin.imported").exists()


def test_ours_come_by_the_same_door():
    assert {e.name for e in registry.entries("scheduler")} >= {"euler", "euler_ancestral", "dpmpp_2m"}
    assert registry.load("sink", "latentmill:parquet").__module__ == "latentmill.sinks.parquet"


def test_an_unknown_name_is_answered_with_what_is_installed_and_the_nearest(tmp_path, monkeypatch):
    ours = [entry.name for entry in registry.entries("stage")]
    assert refusal(registry.find, "stage", "blur").startswith("no stage plugin 'blur' is installed; there are: ")
    distribution(tmp_path, "filters", "1", ["[latentmill.stages]", "sharpen = nowhere:S", "blur = nowhere:B"])
    monkeypatch.syspath_prepend(tmp_path)
    there = f"there are: {', '.join(sorted(['blur', 'sharpen', *ours]))}"
    said = f"no stage plugin 'blurr' is installed (did you mean 'blur'?); {there}"
    assert refusal(registry.find, "stage", "blurr") == said
    assert refusal(registry.find, "stage", "xyz") == f"no stage plugin 'xyz' is installed; {there}"
    assert refusal(registry.find, "stage", "other:blur").startswith("no stage plugin 'other:blur' is installed")


def test_a_name_taken_twice_is_chosen_with_its_distribution(tmp_path, monkeypatch):
    distribution(tmp_path, "acme", "1.0", ["[latentmill.vaes]", "both = acme_both:Whole"], acme_both=VAES)
    distribution(tmp_path, "zenith_tools", "2.1", ["[latentmill.vaes]", "both = zenith:Anything"], zenith=VAES)
    monkeypatch.syspath_prepend(tmp_path)
    said = "vae 'both' is in acme 1.0 and zenith_tools 2.1: write acme:both or zenith_tools:both"
    assert refusal(registry.find, "vae", "both") == said == refusal(registry.load, "vae", "both")
    assert registry.load("vae", "acme:both").__module__ == "acme_both"
    assert registry.load("vae", "zenith_tools:both").__name__ == "Anything"
    assert registry.provenance("vae", "Zenith-Tools:both") == {"distribution": "zenith_tools", "version": "2.1"}
    assert registry.find("vae", "shapes:shapes").distribution == "latentmill-shapes"


@pytest.mark.parametrize(
    ("at", "code", "cause"),
    [
        ("no_library:V", "raise OSError('libgone.so: no such file\\nmore')", "OSError: libgone.so: no such file"),
        ("no_licence:V", "raise SystemExit('no licence')", "SystemExit: no licence"),
        ("no_grammar:V", "def", "SyntaxError: invalid syntax (no_grammar.py, line 1)"),
        ("no_class:V", "", "AttributeError: module 'no_class' has no attribute 'V'"),
        ("no_module:V", None, "ModuleNotFoundError: No module named 'no_module'"),
    ],
)
def test_a_plugin_that_can_not_be_imported_is_named_with_the_cause(at, code, cause, tmp_path, monkeypatch):
    module = {} if code is None else {at.partition(":")[0]: code}
    distribution(tmp_path, "acme", "1.0", ["[latentmill.vaes]", f"broken = {at}"], **module)
    monkeypatch.syspath_prepend(tmp_path)
    assert refusal(registry.load, "vae", "broken") == f"vae 'broken' of acme 1.0 can't be imported: {cause}"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("stranger", "vae 'stranger' of acme 1.0: acme_vaes:Stranger is no subclass of latentmill.plugin.VAE"),
        ("euler", "vae 'euler' of acme 1.0: acme_vaes:Euler is no subclass of latentmill.plugin.VAE"),
        ("maker", "vae 'maker' of acme 1.0: acme_vaes:maker is no subclass of latentmill.plugin.VAE"),
        ("later", "vae 'later' of acme 1.0 was written for contract 3, and this latentmill has 2"),
        (
            "silent",
            "vae 'silent' of acme 1.0 doesn't say for which contract it was written: write contract = 2 in Silent",
        ),
        ("half", "vae 'half' is not complete: it lacks decode, encode, spec"),
    ],
)
def test_a_class_that_does_not_keep_the_contract_is_refused(name, said, acme):
    assert refusal(registry.build, "vae", {"name": name}) == said


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ("whole pth=x", "has no setting 'pth' (did you mean 'path'?); it has: path, tile, gain, soft, note"),
        ("whole path=x zzz=1", "has no setting 'zzz'; it has: path, tile, gain, soft, note"),
        ("bare tile=1", "has no setting 'tile'; it has: none"),
        ("whole", "needs a value for 'path'"),
        ("whole path=None", "needs a value for 'path'"),
        ("whole path=7", "path must be str, not 7"),
        ("whole path=x tile=2.0", "tile must be int, not 2.0"),
        ("whole path=x tile=True", "tile must be int, not True"),
        ("whole path=x tile=big", "tile must be int, not 'big'"),
        ("whole path=x gain=loud", "gain must be float, not 'loud'"),
        ("whole path=x gain=True", "gain must be float, not True"),
        ("whole path=x soft=1", "soft must be bool, not 1"),
        ("whole path=x tile=-1", "tile is negative: use 0"),
        ("whole path=nowhere", "[Errno 2] No such file or directory: 'nowhere/at/all'"),
    ],
)
def test_a_wrong_setting_is_named_with_the_right_ones(choice, said, acme):
    name, *pairs = choice.split()
    words = {"None": None, "True": True, "7": 7, "1": 1, "-1": -1, "2.0": 2.0}
    settings = {key: words.get(value, value) for key, value in (pair.split("=") for pair in pairs)}
    got = refusal(registry.build, "vae", {"name": name, **settings}).replace(" of acme 1.0", "")
    assert got.removeprefix(f"vae {name}").removeprefix(":").strip() == said


def test_right_settings_are_the_constructor_s_arguments(acme):
    choice = {"name": "whole", "path": "x", "gain": 2, "soft": True, "note": [1]}
    assert registry.build("vae", choice).settings == ("x", 8, 2, True)
    assert choice["name"] == "whole", "the job's own settings were changed"
    assert registry.build("vae", {"name": "anything", "path": 7, "zzz": 1}).settings == {"path": 7, "zzz": 1}


def test_examining_imports_each_in_another_process_and_says_what_became_of_it(tmp_path, monkeypatch):
    distribution(
        tmp_path / "site",
        "acme",
        "1.0",
        [
            *("[latentmill.vaes]", "whole = examined:Whole", "later = examined:Later", "twice = examined:Whole"),
            *("[latentmill.conf]", "conf = conf_breaks", "zz_last = process_ends"),
            *("[latentmill.stages]", "breaks = plugin_breaks:Stage"),
        ],
        examined="print('latentmill: I print', end='')\n" + VAES,
        plugin_breaks="import libgone",
        conf_breaks="raise RuntimeError('no\\nconfig')",
        process_ends="import os\nos._exit(3)",
    )
    distribution(tmp_path / "site", "zenith", "2.0", ["[latentmill.vaes]", "twice = examined:Anything"])
    distribution(tmp_path / "here", "here", "1", ["[latentmill.schedulers]", "aaa = nowhere:A"])
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.chdir(tmp_path / "here")  # what lies in the current folder isn't installed, and moves nothing
    assert os.getcwd() not in sys.path and "" not in sys.path
    states = {(e.distribution, e.name): e.state for e in registry.examine()}
    assert {key: state for key, state in states.items() if key[0] in ("acme", "zenith", "here")} == {
        ("acme", "whole"): "ok",
        ("acme", "later"): "vae 'acme:later' of acme 1.0 was written for contract 3, and this latentmill has 2",
        ("acme", "twice"): "ok; the name is taken twice, choose acme:twice",
        ("zenith", "twice"): "ok; the name is taken twice, choose zenith:twice",
        ("acme", "breaks"): "stage 'acme:breaks' of acme 1.0 can't be imported: "
        "ModuleNotFoundError: No module named 'libgone'",
        ("acme", "conf"): "can't be imported: RuntimeError: no config",
        ("acme", "zz_last"): "not examined: importing a plugin ended the process",
    }
    assert states["latentmill", "euler"] == states["latentmill", "parquet"] == "ok"
    assert not {"examined", "plugin_breaks", "conf_breaks"} & sys.modules.keys()
