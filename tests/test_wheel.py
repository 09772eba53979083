"""What is installed from wheels, outside the checkout: the packages' contents, and jobs that run from them."""

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
SOURCES = {
    "latentmill": ["", ["pyproject.toml", "README.md", "LICENSE", "framework", "conf", "jobs"]],
    "latentmill_shapes": ["plugins/shapes", ["pyproject.toml", "README.md", "src"]],
    "latentmill_diffusers": ["plugins/diffusers", ["pyproject.toml", "README.md", "src"]],
    "latentmill_example": ["plugins/example", ["pyproject.toml", "README.md", "src"]],
    "latentmill_filters": ["plugins/filters", ["pyproject.toml", "README.md", "src"]],
    "latentmill_comfy": ["plugins/comfy", ["pyproject.toml", "README.md", "src"]],
}
NO_SOURCE = shutil.ignore_patterns("__pycache__", "*.egg-info")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Wheels by package, built from copies so that nothing is written into the checkout or taken from an old build."""
    work = tmp_path_factory.mktemp("wheels")
    for package, (folder, names) in SOURCES.items():
        (work / package).mkdir()
        for name in names:
            path = ROOT / folder / name
            if path.is_dir():
                shutil.copytree(path, work / package / name, ignore=NO_SOURCE)
            else:
                shutil.copy(path, work / package / name)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(work / 'dist')!r})"
    (work / "dist").mkdir()
    for package in SOURCES:
        subprocess.run([sys.executable, "-c", build], cwd=work / package, check=True, capture_output=True)
    return {package: next((work / "dist").glob(f"{package}-*.whl")) for package in SOURCES}


@pytest.fixture(scope="module")
def installed(wheels, tmp_path_factory):
    """The commands of a venv with framework, shapes, example and filters. What they depend on is lent by this one: torch is large."""
    work = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(work / "venv")], check=True)
    (work / "lent").mkdir()
    for path in (
        path for folder in sys.path if Path(folder).name == "site-packages" for path in Path(folder).iterdir()
    ):
        lent = work / "lent" / path.name
        if "latentmill" not in path.name and path.suffix != ".pth" and not lent.exists():
            lent.symlink_to(path)
    site = next((work / "venv").glob("lib/python*/site-packages"))
    (site / "lent.pth").write_text(f"{work / 'lent'}\n")
    heavy = ("latentmill_diffusers", "latentmill_comfy")
    chosen = [str(wheel) for package, wheel in wheels.items() if package not in heavy]
    pip = [sys.executable, "-m", "pip", "--python", str(work / "venv" / "bin" / "python")]
    subprocess.run([*pip, "install", "-q", "--no-index", "--no-deps", *chosen], check=True)
    return work / "venv" / "bin"


def files(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}


def latentmill(installed, cwd, *arguments):
    """Run the installed command in a folder of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [str(installed / "latentmill"), *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pictures(output):
    rows = [row for path in sorted(output.glob("data/*.parquet")) for row in pq.read_table(path).to_pylist()]
    return [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows], rows


def test_the_framework_is_one_package_with_its_config_and_jobs_inside(wheels):
    expected = {f"latentmill/{name}" for name in files(ROOT / "framework" / "latentmill")}
    expected |= {f"latentmill/conf/{name}" for name in files(ROOT / "conf")}
    expected |= {f"latentmill/jobs/{name}" for name in files(ROOT / "jobs")}
    assert contents(wheels["latentmill"]) == expected
    assert {"latentmill/conf/job.yaml", "latentmill/jobs/txt2img.yaml", "latentmill/py.typed"} <= expected


@pytest.mark.parametrize(
    "package",
    ["latentmill_shapes", "latentmill_diffusers", "latentmill_example", "latentmill_filters", "latentmill_comfy"],
)
def test_a_plugin_is_one_package(wheels, package):
    expected = {name for name in files(ROOT / SOURCES[package][0] / "src") if ".egg-info/" not in name}
    assert contents(wheels[package]) == expected
    assert {name.split("/")[0] for name in expected} == {package}


def test_the_shapes_weights_are_inside_and_small(wheels):
    weights = [name for name in contents(wheels["latentmill_shapes"]) if name.endswith(".safetensors")]
    assert weights
    assert wheels["latentmill_shapes"].stat().st_size <= 8 * 2**20


@pytest.fixture(scope="module")
def listed(installed, tmp_path_factory):
    return json.loads(latentmill(installed, tmp_path_factory.mktemp("listed"), "plugins", "--json", "--check"))


def test_the_plugins_are_listed(listed):
    assert {entry["state"] for entry in listed} == {"ok"}
    by_distribution = {entry["distribution"] for entry in listed}
    assert by_distribution == {"latentmill", "latentmill-shapes", "latentmill-example", "latentmill-filters"}


def test_the_examples_vae_and_scheduler_are_selected_by_name_and_their_pictures_arrive(installed, listed, tmp_path):
    own = {entry["group"]: entry["name"] for entry in listed if entry["distribution"] == "latentmill-example"}
    vae, scheduler = own["latentmill.vaes"], own["latentmill.schedulers"]

    latentmill(installed, tmp_path, "run", "reconstruct", f"vae={vae}", "cluster=inline", "output=vae")
    made, rows = pictures(tmp_path / "vae")
    assert made and min(row["psnr"] for row in rows) > 15

    few = ["cluster=inline", "samples_per_row=1", "sampling.steps=4"]
    latentmill(installed, tmp_path, "run", "txt2img", f"scheduler.name={scheduler}", *few, "output=scheduler")
    made, rows = pictures(tmp_path / "scheduler")
    assert made and all(picture.size == (64, 64) for picture in made)
    assert {row["scheduler"] for row in rows} == {scheduler}
    assert (tmp_path / "scheduler" / "contact_sheet.png").exists()


@pytest.fixture(scope="module")
def refusals(installed, tmp_path_factory):
    """Exit code and words of shipped jobs that need the diffusers plugin, which isn't there: one process asks for all."""
    command = [str(installed / "python"), "-c", ASK, *OF_DIFFUSERS]
    folder = tmp_path_factory.mktemp("refused")
    return json.loads(subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout)


OF_DIFFUSERS = ["sd15_txt2img", "sdxl_txt2img", "flux_txt2img", "sd15_img2img", "cache_latents_sdxl"]
ASK = """
import contextlib, io, json, sys
from latentmill.cli import main

said = {}
for job in sys.argv[1:]:
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        code = main(["run", job, "model.path=x"])
    said[job] = code, errors.getvalue()
print(json.dumps(said))
"""


@pytest.mark.parametrize("job", OF_DIFFUSERS)
def test_a_shipped_job_that_needs_another_plugin_says_which(refusals, job):
    code, said = refusals[job]
    missing = "vae 'diffusers'" if job == "cache_latents_sdxl" else "scheduler 'model'"
    wanted = f"latentmill: {job}: there is no {missing}; there are: "
    assert code == 2 and said.startswith(wanted)
    assert said.endswith("; pip install latentmill-diffusers brings it\n") and said.count("\n") == 1


def test_the_module_and_its_types_are_usable_from_the_wheel(installed, tmp_path):
    code = "import latentmill, sys; print(latentmill.__file__); print(callable(latentmill.run), 'ray' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(installed / "python"), "-c", code]
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    where, usable = said.splitlines()
    assert where.startswith(str(installed.parent)) and usable == "True False"
