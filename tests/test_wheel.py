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
BUILD = """
import os, sys
from setuptools.build_meta import build_wheel

for package in sys.argv[1:]:
    if not (child := os.fork()):
        os.chdir(package)
        build_wheel("../dist")
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{package} can't be built")
"""
"""Each in a process that has imported setuptools, and nothing of another build."""
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
    (work / "dist").mkdir()
    subprocess.run([sys.executable, "-c", BUILD, *SOURCES], cwd=work, check=True, capture_output=True)
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


ASK = """
import contextlib, io, json, sys
import latentmill

said = {"module": (latentmill.__file__, callable(latentmill.run), "ray" in sys.modules)}
from latentmill.cli import main

for name, command in json.loads(sys.argv[1]).items():
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(command)
    said[name] = code, out.getvalue(), errors.getvalue()
print(json.dumps(said))
"""
VAE, SCHEDULER = "patches", "trapezoid"
"""The example's."""
FEW = ["cluster=inline", "samples_per_row=1", "sampling.steps=1", "sampling.guidance_scale=1"]
OF_DIFFUSERS = ["sd15_txt2img", "sdxl_txt2img", "flux_txt2img", "sd15_img2img", "cache_latents_sdxl"]


@pytest.fixture(scope="module")
def answers(installed, tmp_path_factory):
    """What the package says of itself, and what its commands say, in a folder of its own: one process, since each imports torch."""
    folder = tmp_path_factory.mktemp("answers")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    commands = {
        "plugins": ["plugins", "--json", "--check"],
        "scheduler": ["run", "txt2img", f"scheduler.name={SCHEDULER}", *FEW, f"output={folder / 'scheduler'}"],
        **{job: ["run", job, "model.path=x"] for job in OF_DIFFUSERS},
    }
    command = [str(installed / "python"), "-c", ASK, json.dumps(commands)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"folder": folder}


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


def test_the_plugins_are_listed(answers):
    code, out, _ = answers["plugins"]
    listed = json.loads(out)
    assert code == 0 and {entry["state"] for entry in listed} == {"ok"}
    by_distribution = {entry["distribution"] for entry in listed}
    assert by_distribution == {"latentmill", "latentmill-shapes", "latentmill-example", "latentmill-filters"}


def test_the_example_s_vae_is_selected_by_name_with_the_installed_command(installed, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [str(installed / "latentmill"), "run", "reconstruct", f"vae={VAE}", "cluster=inline", "output=vae"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    made, rows = pictures(tmp_path / "vae")
    assert made and min(row["psnr"] for row in rows) > 15


def test_the_example_s_scheduler_is_selected_by_name_and_its_pictures_arrive(answers):
    assert answers["scheduler"][0] == 0, answers["scheduler"]
    made, rows = pictures(answers["folder"] / "scheduler")
    assert made and all(picture.size == (64, 64) for picture in made)
    assert {row["scheduler"] for row in rows} == {SCHEDULER}
    assert (answers["folder"] / "scheduler" / "contact_sheet.png").exists()


@pytest.mark.parametrize("job", OF_DIFFUSERS)
def test_a_shipped_job_that_needs_another_plugin_says_which(answers, job):
    code, _, said = answers[job]
    missing = "vae 'diffusers'" if job == "cache_latents_sdxl" else "scheduler 'model'"
    wanted = f"latentmill: {job}: there is no {missing}; there are: "
    assert code == 2 and said.startswith(wanted)
    assert said.endswith("; pip install latentmill-diffusers brings it\n") and said.count("\n") == 1


def test_the_module_and_its_types_are_usable_from_the_wheel(installed, answers):
    where, usable, ray_too = answers["module"]
    assert where.startswith(str(installed.parent)) and usable and not ray_too
