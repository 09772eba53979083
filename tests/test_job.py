"""A job is checked whole: every wrong thing is one line that names it, and what is right is what was written."""

import json
import os
import re
import subprocess
import sys
import warnings

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from latentmill import values
from latentmill.config import load_job, shipped
from latentmill.errors import JobError, PlanError, PluginError
from latentmill.parts import parts
from latentmill.workers.pools import max_bytes_in_flight

HEAD = """\
defaults: [job, model: shapes, scheduler: euler, source: prompts, sink: parquet, cluster: inline, _self_]
output: out/mine
source: {path: p.txt}
"""
JOBS = (
    "cache_latents_sdxl, decode, denoise, encode, encode_text, flux_txt2img, hires, img2img, reconstruct, "
    "sd15_img2img, sd15_txt2img, sdxl_txt2img, txt2img"
)


def refused(job, *overrides):
    """The one line that says what is wrong."""
    with pytest.raises((JobError, PluginError)) as caught:
        load_job(str(job), overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def file(folder, text=HEAD, name="mine.yaml"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


# ------------------------------------------------------------------------------------------------- what is right


def test_a_job_that_is_loaded_again_is_what_its_files_are_by_then(tmp_path, monkeypatch):
    """Its own file, one that comes to lie before a shipped one, one that goes, the environment."""
    job = file(tmp_path)
    first = load_job(str(job)).config
    assert load_job(str(job)).config == first and "grid: trailing" in first

    file(tmp_path / "scheduler", "name: euler\ngrid: karras\neta: 0.0\n", "euler.yaml")
    assert load_job(str(job)).config == first.replace("grid: trailing", "grid: karras")
    (tmp_path / "scheduler" / "euler.yaml").unlink()
    assert load_job(str(job)).config == first

    file(tmp_path, HEAD.replace("_self_", "_self_, mine@_global_: one"))
    one = file(tmp_path / "mine", "samples_per_row: 3\n", "one.yaml")
    assert load_job(str(job)).samples_per_row == load_job(str(job)).samples_per_row == 3
    one.unlink()
    assert "mine" in refused(job)

    file(tmp_path, HEAD.replace("scheduler: euler", "scheduler: '${oc.env:SCHEDULER}'"))
    for name in ("heun", "unipc"):
        monkeypatch.setenv("SCHEDULER", name)
        assert load_job(str(job)).scheduler["name"] == name
        assert load_job("txt2img", ["scheduler=${oc.env:SCHEDULER}"]).scheduler["name"] == name


@pytest.mark.parametrize(
    ("name", "flow", "source"),
    [
        ("txt2img", "read encode denoise decode write", "prompts.txt"),
        ("img2img", "read encode denoise decode write", "edits.jsonl"),
        ("hires", "read encode denoise latent_upscale refine decode write", "prompts.txt"),
        ("encode", "read encode write", "pictures"),
        ("encode_text", "read encode_text write", "prompts.txt"),
        ("denoise", "read encode denoise write", "prompts.txt"),
        ("decode", "read decode write", "latents.parquet"),
        ("reconstruct", "read encode decode write", "pictures"),
    ],
)
def test_the_shipped_jobs_load(name, flow, source):
    job = load_job(name)
    assert (job.name, job.output, job.flow) == (name, f"out/{name}", tuple(flow.split()))
    assert job.source["path"] == f"pkg://latentmill.jobs/data/{source}" and job.vae == {"name": "shapes"}
    assert shipped() == JOBS.split(", ")


def test_what_the_parts_of_a_model_share_is_said_once_and_is_part_of_the_meaning(tmp_path):
    path = file(tmp_path, HEAD + "model: {path: /one}\nvae: {folder: '${model.path}'}\n")
    job = load_job(str(path), ["model.path=/two"])
    assert job.model == {"path": "/two"} and job.vae == {"name": "shapes", "folder": "/two"}
    assert job.meaning()["model"] == {"path": "/two"} and "model" not in load_job("txt2img").meaning()
    said = refused(path, "model.paths=/two")
    assert said == "mine: there is no key model.paths (did you mean 'path'?): no part of the model reads it"


def test_the_posterior_s_standard_deviation_may_be_asked_for():
    assert load_job("encode", ["latents_std=true"]).meaning()["latents_std"] is True
    assert "latents_std" not in load_job("encode").meaning()
    said = r"txt2img: latents_std is of latents as they were encoded, so flow must end with encode, write"
    with pytest.raises(PlanError, match=said):
        parts(load_job("txt2img", ["latents_std=true"]))


def test_overrides_reach_every_part_of_a_job(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    job = load_job(
        "txt2img",
        "seed=7 sampling.steps=3 scheduler=euler scheduler.eta=0.5 stages=gpu cluster=ray ~text_encoder output=~/x "
        "stages.denoise.replicas=8 vae.tile=4 vae.deep.down=1".split(),
    )
    assert (job.seed, job.sampling["steps"], job.sampling["guidance_scale"]) == (7, 3, 4.0)
    assert job.scheduler == {"name": "euler", "grid": "trailing", "eta": 0.5} and job.text_encoder is None
    assert job.vae == {"name": "shapes", "tile": 4, "deep": {"down": 1}}, "a plugin's setting needs no +"
    assert (job.stages["denoise"].replicas, job.stages["denoise"].num_gpus) == (8, 0.5)
    assert (job.cluster.kind, job.cluster.address, job.output) == ("ray", "auto", "/home/me/x")


@pytest.mark.parametrize("given, found", [
    ("scheduler={name: comfy, sampler: euler}", {"name": "comfy", "grid": "trailing", "sampler": "euler"}),
    ("scheduler={name: euler, eta: 0.5}", {"name": "euler", "grid": "trailing", "eta": 0.5}),
    ("scheduler={eta: 0.5}", {"name": "dpmpp_2m", "grid": "trailing", "eta": 0.5}),
])  # fmt: skip
def test_a_part_may_be_given_as_a_dict(given, found):
    assert load_job("txt2img", [given]).scheduler == found


@pytest.mark.parametrize("name", ["mine.yaml", "v1.2.yaml", "with space.yaml", "a=b,c.yaml", "txt2img.yaml"])
def test_a_file_of_one_s_own_may_be_anywhere(name, tmp_path, monkeypatch):
    path = file(tmp_path / "deep" / "a=1, b", HEAD + "seed: 5\n", name)
    monkeypatch.chdir(tmp_path)
    for way in (path, os.path.relpath(path), os.path.join(".", os.path.relpath(path))):
        job = load_job(str(way), ["sampling.steps=3"])
        assert (job.name, job.output, job.seed, job.sampling["steps"]) == (path.stem, "out/mine", 5, 3)


def test_what_lies_beside_a_file_can_be_chosen_in_it(tmp_path):
    file(tmp_path / "scheduler", "name: euler\neta: 0.25\n", "soft.yaml")
    assert load_job(str(file(tmp_path)), ["scheduler=soft"]).scheduler == {"name": "euler", "eta": 0.25}


def test_what_lies_beside_a_file_is_read_anew_for_each_job(tmp_path):
    path = file(tmp_path, HEAD.replace("_self_]", "_self_, override stages: mine]"))
    for cpus in (1.5, 2.5):
        file(tmp_path / "stages", f"denoise: {{num_cpus: {cpus}}}\n", "mine.yaml")
        for _ in range(2):
            assert load_job(str(path)).stages["denoise"].num_cpus == cpus


@pytest.mark.parametrize("text", [
    "plain", "", "no", "1e3", "- a: b #", "it's", 'a "b"', "two\nlines", "caf\u00e9", "\U0001f600", "\ufeff", "x" * 130, "word " * 40,
    "\x07 in  a  long  line  that  is  broken" * 4,
])  # fmt: skip
def test_a_job_is_written_as_omegaconf_writes_it(text):
    held = {"key": text, text: 1, "list": [text, {"deep": [text]}], "nothing": [None, {}, [], 0.1, 1e20, True]}
    assert values.to_yaml(held) == OmegaConf.to_yaml(OmegaConf.create(held))


def test_a_file_without_self_keeps_its_own_values_and_nothing_is_said(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a ResourceWarning may be of another test
        assert load_job(str(file(tmp_path, HEAD.replace(", _self_", "") + "seed: 5\n"))).seed == 5


def test_another_program_s_use_of_hydra_stays_as_it_is(tmp_path):
    load_job("txt2img")
    folder = str(file(tmp_path, "number: 2026_11_25\n", "theirs.yaml").parent)
    with initialize_config_dir(folder, version_base="1.3"):
        theirs = compose("theirs", return_hydra_config=True)
        assert theirs.number == 20261125 and theirs.hydra.runtime.choices["hydra/job_logging"] == "default"
    assert load_job("txt2img").name == "txt2img"


def test_secrets_stay_in_the_environment(monkeypatch):
    monkeypatch.setenv("SECRET", "s3cr3t")
    job = load_job("txt2img", ["source.path=${oc.env:SECRET}"])
    assert job.source["path"] == "s3cr3t"
    assert job.meaning()["source"]["path"] == "${oc.env:SECRET}"
    assert "path: ${oc.env:SECRET}" in job.config and "s3cr3t" not in job.config


def test_where_and_by_how_many_a_job_is_done_means_nothing():
    plain = load_job("txt2img").meaning()
    assert not plain.keys() & {"output", "cluster", "stages"} and plain["sampling"]["steps"] == 20
    means_nothing = ["output=b", "cluster=inline", "stages.decode.replicas=3", "stages.decode.num_cpus=2"]
    means_nothing += ["stages.decode.num_gpus=1", "stages.decode.memory=9", "+stages.decode.resources.tpu=1"]
    assert load_job("txt2img", [*means_nothing, "stages.decode.batch_size=3"]).meaning() == plain
    for change in (
        "seed=1",
        "samples_per_row=3",
        "rows_per_shard=5",
        "sampling.steps=3",
        "vae.tile=4",
        "scheduler=euler",
    ):
        assert load_job("txt2img", [change]).meaning() != plain, change


def test_batch_sizes_mean_something_in_a_deterministic_job_in_its_own_stages():
    sizes = load_job("encode", ["deterministic=true", "stages.encode.batch_size=3"]).meaning()["stages"]
    assert {name: stage["batch_size"] for name, stage in sizes.items()} == {"read": 64, "encode": 3, "write": 32}
    threads = load_job("encode", ["deterministic=true", "stages.encode.num_cpus=2"]).meaning()["stages"]
    assert (threads["encode"]["threads"], threads["read"]["threads"]) == (2, 1), "a sum over two threads has other bits"


# ------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        # keys
        ("sede=1", r"there is no key sede \(did you mean 'seed'\?\)"),
        ("+sede=1", r"there is no key sede \(did you mean 'seed'\?\)"),
        ("sampling.step=3", r"there is no key sampling\.step \(did you mean 'sampling\.steps'\?\)"),
        ("steps=3", r"there is no key steps \(did you mean 'sampling\.steps'\?\)"),
        ("sampling.seed=3", r"there is no key sampling\.seed \(did you mean 'seed'\?\)"),
        ("stages.denoise.replica=3", r"there is no key .*replica \(did you mean 'stages\.denoise\.replicas'\?\)"),
        ("stages.denois.replicas=3", r"there is no key .*replicas \(did you mean 'stages\.denoise\.replicas'\?\)"),
        ("+qwxyz=1", r"there is no key qwxyz"),
        ("=1", r"'=1' is no override: key=value is expected, as in sampling\.steps=10"),
        # types
        ("seed=abc", r"seed: Value 'abc' of type 'str' could not be converted to Integer"),
        ("seed=a\nb", r"seed: Value 'a"),
        ("sampling.steps=1.5", r"sampling\.steps: Value '1\.5' of type 'float' could not be converted to Integer"),
        ("sampling.guidance_scale=abc", r"sampling\.guidance_scale: Value 'abc' .* converted to Float"),
        ("deterministic=maybe", r"deterministic: Value 'maybe' is not a valid bool.*"),
        ("seed=null", r"seed: field 'seed' is not Optional"),
        ("scheduler.grid=3", r"scheduler\.grid must be a name, or a name with settings, not 3"),
        # values
        ("samples_per_row=0", r"samples_per_row must be 1 or more, not 0"),
        ("rows_per_shard=0", r"rows_per_shard must be 1 or more, not 0"),
        ("sampling.steps=0", r"sampling\.steps must be from 1 to 100000, not 0"),
        ("sampling.width=-8", r"sampling\.width must be from 1 to 65536, not -8"),
        ("sampling.height=null", r"sampling\.width and sampling\.height must be given together, or neither"),
        ("sampling.guidance_scale=nan", r"sampling\.guidance_scale must be a finite number, not nan"),
        ("sampling.strength=1.1", r"sampling\.strength must be from 0 to 1, not 1\.1"),
        ("stages.decode.replicas=0", r"stages\.decode\.replicas must be auto, or 1 or more, not 0"),
        ("stages.decode.batch_size=-1", r"stages\.decode\.batch_size must be auto, or 1 or more, not -1"),
        ("stages.denoise.batch_size=much", r"stages\.denoise\.batch_size must be auto, or 1 or more, not 'much'"),
        ("stages.decode.retries=-1", r"stages\.decode\.retries must be 0 or more, not -1"),
        (
            "stages.decode.timeout=0",
            r"stages\.decode\.timeout must be more than 0 seconds, as 10m, 90s or a number, or null, not 0",
        ),
        ("placement=together", r"placement must be auto, split or fused, not 'together'"),
        ("max_bytes_in_flight=much", r"max_bytes_in_flight must be bytes, as 8GiB, 500MB or a number, not 'much'"),
        ("on_error=carry_on", r"on_error must be quarantine or stop, not 'carry_on'"),
        ("max_error_rate=2", r"max_error_rate must be from 0 to 1, not 2\.0"),
        ("stages.decode.num_gpus=1.5", r"stages\.decode\.num_gpus above 1 must be whole, not 1\.5"),
        ("scheduler.grid=karas", r"scheduler\.grid: there is no grid 'karas' \(did you mean 'karras'\?\).*"),
        ("cluster=ray cluster.address=null", r"cluster\.address must be set for cluster=ray: an address, or auto"),
        ("cluster.kind=moon", r"cluster\.kind must be one of local, inline, ray, not 'moon'"),
        ("flow=[read,encode,encode,write]", r"flow has encode twice: give one of them a name of its own, .*"),
        ("flow=[read,{as:encode},write]", r"flow: \{'as': 'encode'\} has no name: .*"),
        # what isn't there
        ("output=", r"output must name a folder or a URL, not ''"),
        ("output=???", r"output has no value; set it in the job, or as output=\.\.\."),
        ("source.path=???", r"source\.path has no value; set it in the job, or as source\.path=\.\.\."),
        ("~seed", r"seed has no value; set it in the job, or as seed=\.\.\."),
        ("~cluster", r"cluster\.kind has no value; set it in the job, or as cluster\.kind=\.\.\."),
        ("source.path=${oc.env:NOT_SET}", r"source\.path: .*Environment variable 'NOT_SET' not found.*"),
        ("seed=${nothing}", r"seed: Interpolation key 'nothing' not found; \\\$\{ is \$\{ as it stands"),
        (
            "vae=shapes:shape",
            r"there is no vae 'shapes:shape' \(did you mean 'shapes'\?\); there are: [^:]*shapes[^:]*",
        ),
        ("vae=shape", r"there is no vae 'shape' \(did you mean 'shapes'\?\); there are: .*shapes.*"),
        ("model=shape", r"there is no model 'shape' \(did you mean 'shapes'\?\); there are: .*shapes.*"),
        ("cluster=moon", r"there is no cluster 'moon'; there are: inline, local, ray"),
        ("stages=tpu", r"there is no stages 'tpu' .*there are: cpu, gpu"),
        ("vae=null", r"vae=null: a name is expected; ~vae leaves it out"),
        # not the job's business, so without its name
        ("vae.name=shape", r"no vae plugin 'shape' is installed \(did you mean 'shapes'\?\); there are: .*shapes.*"),
        ("flow=[read,blur,write]", r"no stage plugin 'blur' is installed; there are: .*"),
        # code is never named in a job
        ("+vae._target_=os.system", r"'\+vae\._target_=os\.system': _target_ is refused; plugins are chosen by name"),
        ("++vae={a:{_target_:x}}", r".*_target_ is refused; plugins are chosen by name"),
    ],
)
def test_a_wrong_override_is_one_line(overrides, said):
    assert re.fullmatch(said, refused("txt2img", *overrides.split(" ")).removeprefix("txt2img: "))


@pytest.mark.parametrize(
    ("instead_of", "text", "said"),
    [
        ("", "sede: 1", r"mine: there is no key sede \(did you mean 'seed'\?\)"),
        ("", "stages: {denoise: {replica: 1}}", r"mine: .*replica \(did you mean 'stages\.denoise\.replicas'\?\)"),
        ("", "stages: {denois: {replicas: 1}}", r"mine: stages\.denois: .*\(did you mean 'denoise'\?\)"),
        ("", "sampling: {steps: many}", r"mine: sampling\.steps: Value 'many' .* converted to Integer"),
        ("", "vae: shapes", r"mine: vae: keys and their values are expected, not text"),
        ("", "sampling: 5", r"mine: keys and their values are expected, not 5"),
        ("", "flow: 5", r"mine: flow: a list is expected"),
        ("", "flow: [read, [encode], write]", r"no stage plugin .* is installed.*"),
        ("", "vae: {_target_: os.system}", r"mine: vae\._target_ is refused; plugins are chosen by name"),
        ("", "vae: {a: [{_target_: x}]}", r"mine: vae\.a\.0\._target_ is refused; plugins are chosen by name"),
        ("path: p.txt", "", r"mine: source\.path has no value; set it in the job, or as source\.path=\.\.\."),
        ("source: prompts, ", "", r"mine: source\.name must be the name of a plugin, not None"),
        ("euler", "eulre", r"mine: .*'eulre' \(did you mean 'euler'\?\); there are: .*"),
        ("[job", "[jbo", r"mine: there is no config 'jbo' \(did you mean 'job'\?\); there are: job"),
        ("[job, ", "[", r".*mine\.yaml: its defaults must begin with job, as in: .*"),
        (HEAD, "seed: 1", r".*mine\.yaml: its defaults must begin with job, as in: .*"),
        (HEAD, "", r".*mine\.yaml: its defaults must begin with job, as in: .*"),
        (HEAD, "defaults: [mine, job]", r"mine: its defaults lead back to themselves"),
        ("_self_]", "_self_, override hydra/job_logging: none]", r"mine: .*Could not override 'hydra/job_logging'\..*"),
        (HEAD, "defaults: job", r"mine: .*defaults must be a list \(got str\)"),
        (HEAD, "[1, 2]", r"mine: .*must be a DictConfig, got ListConfig"),
        ("", "sampling: {steps: 3", r"mine: line 5: expected ',' or '}', but got '<stream end>'"),
        ("", "sampling:\n\tsteps: 3", r"mine: line 5: found character '\\t' that cannot start any token"),
        ("", "seed: 1\nseed: 2", r"mine: line 5: found duplicate key seed"),
        (HEAD, "output: ü", r"mine: 'utf-8' codec can't decode byte 0xfc in position 8: .*"),
    ],
)
def test_a_wrong_file_is_one_line(instead_of, text, said, tmp_path):
    text = HEAD.replace(instead_of, text) if instead_of else HEAD + text
    assert re.fullmatch(said, refused(file(tmp_path, (text + "\n").encode("latin-1"))))


def test_a_job_that_is_not_there_is_one_line_and_what_is_there(tmp_path):
    ends = "ends in .yaml, or in .json if it is a workflow of ComfyUI"
    there = f"there are: {JOBS}; a file's name {ends}"
    assert refused("txt2imh") == f"there is no job 'txt2imh' (did you mean 'txt2img'?); {there}"
    assert refused("qwxyz") == f"there is no job 'qwxyz'; {there}"
    for path in (tmp_path / "no.yaml", tmp_path, tmp_path / "no"):
        assert refused(path) == f"there is no job file {path}; shipped jobs are chosen by name: {JOBS}"
    assert refused(path := file(tmp_path, HEAD, "mine.yml")) == f"{path}: a job file's name {ends}"
    assert refused("txt2img", f"output={path}") == f"txt2img: output must name a folder or a URL, not '{path}'"


@pytest.mark.parametrize("name", ["job", "schema"])
def test_a_file_of_one_s_own_may_be_called_as_what_all_jobs_begin_with(name, tmp_path):
    path = file(tmp_path, HEAD + "seed: 5\n", f"{name}.yaml")
    assert (load_job(str(path)).name, load_job(str(path)).seed) == (name, 5)
    assert load_job(str(file(tmp_path))).seed == 0, "and the one beside it begins with ours"


# ----------------------------------------------------------------------------------- what other distributions bring

ASKED = {
    "configured": ["vae=configured"],
    "overridden": ["vae=configured", "vae.tile=3", "vae.new=1"],
    "by name": ["vae=plain", "scheduler=solver"],
    "twice": ["vae=twice"],
    "chosen": ["vae=broken-conf:twice"],
    "ours": ["vae=shapes:shapes"],
    "stage": ["flow=[read,encode,blur,write]"],
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What jobs are where two more distributions are installed: in another process, for each asks only once."""
    site = tmp_path_factory.mktemp("site")
    points = "[latentmill.vaes]\nconfigured = theirs:Theirs\nplain = theirs:Theirs\ntwice = theirs:Theirs\n"
    points += "[latentmill.stages]\nblur = theirs:Blur\n[latentmill.conf]\ntheirs = theirs.conf\n"
    broken = "[latentmill.vaes]\ntwice = theirs:Theirs\n[latentmill.schedulers]\nsolver = theirs:Solver\n"
    broken += "[latentmill.conf]\nbroken = broken.conf\n"
    for name, lines in {"theirs": points, "broken-conf": broken}.items():
        file(site / f"{name}-1.5.dist-info", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n", "METADATA")
        file(site / f"{name}-1.5.dist-info", lines, "entry_points.txt")
    file(
        site / "theirs" / "conf" / "vae", "name: configured\ntile: 64\n", "configured.yaml"
    )  # no __init__.py, and no code
    file(site / "broken", "raise RuntimeError('no\\nluck')", "__init__.py")
    blur = HEAD + "flow: [read, encode, blur, write]\nstages: {blur: {replicas: 2, settings: {radius: 1}}}\n"
    code = f"""
import json
from latentmill.config import load_job
jobs = {{name: ("txt2img", overrides) for name, overrides in {ASKED!r}.items()}}
jobs["set"] = ({str(file(site, blur))!r}, ["stages.blur.settings.radius=3", "stages.blur.settings.soft=true"])
for name, (job, overrides) in jobs.items():
    try:
        job = load_job(job, overrides)
        found = job.vae, job.scheduler, vars(job.stages["blur"]) if "blur" in job.flow else None, job.meaning()
    except Exception as error:
        found = f"{{type(error).__name__}}: {{error}}"
    print(json.dumps([name, found]))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *sys.path])}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return {**dict(map(json.loads, told.stdout.splitlines())), "stderr": told.stderr}


def test_a_distribution_s_config_makes_its_plugins_selectable_with_their_settings(answers):
    assert answers["configured"][0] == {"name": "configured", "tile": 64}
    assert answers["overridden"][0] == {"name": "configured", "tile": 3, "new": 1}


def test_a_plugin_without_config_is_selectable_by_its_name(answers):
    assert answers["by name"][:2] == [{"name": "plain"}, {"name": "solver", "grid": "trailing"}]
    assert answers["chosen"][0] == {"name": "broken-conf:twice"} and answers["ours"][0] == {"name": "shapes:shapes"}
    said = "vae 'twice' is in broken-conf 1.5 and theirs 1.5: write broken-conf:twice or theirs:twice"
    assert answers["twice"] == f"PluginError: {said}"


def test_a_broken_config_costs_one_line_of_warning_and_no_job(answers):
    said = "the config of broken-conf:broken (broken-conf 1.5) is left out: RuntimeError: no luck"
    assert answers["stderr"] == said + "\n"


def test_a_plugin_s_stage_has_workers_and_settings_of_its_own(answers):
    assert answers["stage"][2]["replicas"] == "auto" and answers["stage"][2]["settings"] == {}
    assert answers["set"][2]["replicas"] == 2 and answers["set"][2]["settings"] == {"radius": 3, "soft": True}
    assert answers["set"][3]["stages"] == {"blur": {"settings": {"radius": 3, "soft": True}}}


def test_one_worker_can_not_be_on_two_accelerators():
    words = ["placement=fused", "stages.encode.accelerator_type=A10G", "stages.denoise.accelerator_type=H100"]
    with pytest.raises(
        JobError, match="placement=fused has one worker for stages that ask for accelerators A10G, H100"
    ):
        load_job("txt2img", words)
    load_job("txt2img", ["placement=split", *words[1:]])


def test_bytes_in_flight_are_the_job_s_or_without_a_cluster_as_many_as_there_are():
    assert max_bytes_in_flight(load_job("txt2img", ["max_bytes_in_flight=8GiB"])) == 8 * 2**30
    assert max_bytes_in_flight(load_job("txt2img", ["cluster=inline"])) == float("inf")
