"""Where models lie: folders, the Hub's cache, and one line for whatever is wrong."""

import hashlib
import importlib
import inspect
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import diffusers
import huggingface_hub
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import latentmill
from latentmill.cli import main
from latentmill.config import load_job
from latentmill.errors import PlanError, PluginError
from latentmill.parts import parts
from latentmill_diffusers.denoiser import DiffusersDenoiser
from latentmill_diffusers.folder import Folder
from latentmill_diffusers.pipeline.encode import PipelineEncode
from latentmill_diffusers.text_encoder import DiffusersTextEncoder
from latentmill_diffusers.vae import DiffusersVAE

REVISION = "0123456789abcdef0123456789abcdef01234567"


def refused(folder, *overrides):
    """The one line that the driver says before it starts anything."""
    with pytest.raises((PluginError, PlanError)) as caught:
        parts(load_job("txt2img", ["model=diffusers", "scheduler=model", f"model.path={folder}", *overrides]))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def copy(model, tmp_path):
    """A copy of Stable Diffusion's folder, to be damaged."""
    return shutil.copytree(model("StableDiffusionPipeline"), tmp_path / "model")


def test_a_folder_that_is_not_there_or_is_none_of_a_model(tmp_path):
    nowhere = f"there is no folder {tmp_path / 'no'}, and it is no org/name of the Hugging Face Hub either"
    assert refused(tmp_path / "no") == f"vae diffusers: {nowhere}"
    assert refused(tmp_path).startswith(f"vae diffusers: {tmp_path / 'vae'} holds no config.json: ")
    with pytest.raises(ValueError, match=r"holds no model_index\.json: a folder in diffusers' layout is expected"):
        _ = Folder(str(tmp_path)).index


def test_weights_that_are_missing_or_pickles_are_refused_before_anything_starts(copy):
    for part, who in (("vae", "vae"), ("unet", "denoiser"), ("text_encoder", "text_encoder")):
        for file in (copy / part).glob("*.safetensors"):
            file.rename(file.with_suffix(".bin"))
        said = refused(copy)
        assert said.startswith(f"{who} diffusers: {copy / part} holds no .safetensors: weights as pickles are refused")
        for file in (copy / part).glob("*.bin"):
            file.rename(file.with_suffix(".safetensors"))


def test_a_family_that_we_don_t_know_is_named_with_those_that_we_do(copy):
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "_class_name": "LTXPipeline"}))
    _, _, said = refused(copy).partition(" diffusers: ")  # of whichever part is built first
    assert said.startswith("LTXPipeline is none of the families that run on our schedulers (")


def test_a_config_that_can_t_be_read(copy):
    (copy / "unet" / "config.json").write_text("{")
    assert refused(copy).startswith(f"denoiser diffusers: {copy / 'unet' / 'config.json'} can't be read: ")


def test_a_schedule_that_we_don_t_know_is_one_line(copy):
    file = copy / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "trained_betas": [0.1, 0.2]}))
    assert refused(copy).startswith("scheduler model: PNDMScheduler: ")


def test_a_vae_of_other_channels_does_not_fit(model):
    said = refused(model("StableDiffusionPipeline"), f"vae.path={model('Flux2Pipeline')}")
    assert said.endswith("don't fit: the network takes latents of 4 channels, and the VAE's have 16")


AUTOENCODERS = [
    name for name in dir(diffusers) if name.startswith(("Autoencoder", "AsymmetricAuto", "ConsistencyDec", "VQ"))
]
RUN = """
    AsymmetricAutoencoderKL AutoencoderDC AutoencoderKL AutoencoderKLFlux2 AutoencoderKLHunyuanImage AutoencoderKLQwenImage
    AutoencoderKLQwenImage21 AutoencoderKLWan AutoencoderTiny ConsistencyDecoderVAE VQModel
""".split()


@pytest.mark.parametrize("name", sorted({*AUTOENCODERS} - {*RUN} - {"VQDiffusionPipeline", "VQDiffusionScheduler"}))
def test_autoencoders_of_video_and_sound_are_refused_at_plan(name, tmp_path, capsys):
    """Each of diffusers' that no test runs, by its own config."""
    signature = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    config = {p.name: p.default for p in signature if p.default is not p.empty}
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name, **config}, default=str))
    save_file({"x": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    told = ["vae=diffusers", f"vae.path={tmp_path}", "cluster=inline"]
    assert main(["plan", "encode", *told, f"output={tmp_path / 'out'}"]) == 2
    [said] = capsys.readouterr().err.strip().splitlines()
    assert f"{tmp_path}: {name} is none of the autoencoders that run here: Asymm" in said


@pytest.mark.parametrize(("name", "layers"), [("Flux2Pipeline", 30), ("Flux2KleinPipeline", 27)])
def test_a_text_encoder_of_too_few_layers_is_refused_at_plan(name, layers, model, tmp_path, capsys):
    folder = shutil.copytree(model(name), tmp_path / "model")
    file = folder / "text_encoder" / "config.json"
    config = json.loads(file.read_text())
    text = config.get("text_config", config)
    text.pop("layer_types", None)  # one for each layer
    text["num_hidden_layers"] = layers - 1
    file.write_text(json.dumps(config))
    for tier in ("diffusers", "pipeline"):
        capsys.readouterr()
        told = [f"model={tier}", f"model.path={folder}", "cluster=inline", f"output={tmp_path / 'out'}"]
        assert main(["plan", "txt2img", *told, *(["scheduler=model"] if tier == "diffusers" else [])]) == 2
        [said] = capsys.readouterr().err.strip().splitlines()
        if (tier, name) != ("pipeline", "Flux2KleinPipeline"):
            wanted = f"{file.parent} has {layers - 1} layers, and {name} takes layer {layers}'s output"
            assert wanted in said


def test_layers_of_clip_that_are_not_there_can_not_be_skipped(model):
    folder = model("StableDiffusionXLPipeline")
    assert refused(folder, "text_encoder.clip_skip=3").endswith("text_encoder.clip_skip must be from 0 to 2, not 3")
    assert refused(folder, "text_encoder.clip_skip=-1").endswith("text_encoder.clip_skip must be from 0 to 2, not -1")
    assert refused(model("FluxPipeline"), "text_encoder.clip_skip=1").endswith("FluxPipeline has no clip_skip")


def test_settings_that_are_wrong(model, tmp_path):
    folder = model("StableDiffusionPipeline")
    assert refused(folder, "model.dtype=float8").endswith("dtype must be float32, float16, bfloat16, not 'float8'")
    assert "storage must be a dtype of torch" in refused(folder, "denoiser.storage=float7")
    assert "has no setting 'atention' (did you mean 'attention'?)" in refused(folder, "denoiser.atention=flash")
    assert "there is no file /no.safetensors" in refused(folder, "model.loras=[{path: /no.safetensors}]")
    assert "expected {path: a .safetensors file" in refused(folder, "model.loras=[{file: x}]")


def command(tmp_path, *arguments, **variables):
    """Run the command without a network, if ``variables`` don't say otherwise, with a cache of its own.

    In a process forked from this one, since diffusers takes seconds to import; the Hub's constants are read anew there.
    """
    out, err = tmp_path / "stdout", tmp_path / "stderr"
    child = os.fork()
    if not child:
        code = 70
        try:
            for number, path in ((1, out), (2, err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            logging.getLogger().handlers.clear()
            os.environ.update({"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), **variables})
            importlib.reload(huggingface_hub.constants)
            os.chdir(tmp_path)
            code = main(list(arguments))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return SimpleNamespace(returncode=code, stdout=out.read_text(), stderr=err.read_text())


def test_the_hub_s_models_come_from_the_cache_or_one_line_says_how_to_get_them(model, tmp_path):
    assert "give model.revision too, a commit, so that it stays the same" in refused("org/name")
    job = ["plan", "txt2img", "model=diffusers", "scheduler=model", "model.path=org/name", f"model.revision={REVISION}"]
    said = command(tmp_path, *job).stderr
    assert said.count("\n") == 1 and f"`hf download org/name --revision {REVISION}` where there is a network" in said
    cached = tmp_path / "hf" / "hub" / "models--org--name" / "snapshots" / REVISION
    shutil.copytree(model("StableDiffusionPipeline"), cached)
    done = command(tmp_path, *job)
    assert done.returncode == 0, done.stderr


class Hub(BaseHTTPRequestHandler):
    """Speaks the Hub's protocol, as far as a download needs it, for one repository: ``folder`` at REVISION."""

    folder: Path
    sent: set[str]

    def do_GET(self):
        self.answer(body=True)

    def do_HEAD(self):
        self.answer(body=False)

    def answer(self, body):
        path = self.path.partition("?")[0]
        found, listed = self.folder / path.partition(f"/resolve/{REVISION}/")[2], b""
        headers = {}
        if path == f"/api/models/org/name/tree/{REVISION}":
            files = [file for file in sorted(self.folder.rglob("*")) if file.is_file()]
            told = [
                {"type": "file", "path": str(f.relative_to(self.folder)), "size": f.stat().st_size, "oid": str(i)}
                for i, f in enumerate(files)
            ]
            listed, headers = json.dumps(told).encode(), {"Content-Type": "application/json"}
        elif found.is_file():
            listed = found.read_bytes()
            headers = {"ETag": f'"{hashlib.sha256(listed).hexdigest()}"', "X-Repo-Commit": REVISION}
            if body:
                self.sent.add(str(found.relative_to(self.folder)))
        self.send_response(200 if headers else 404)
        for name, value in {**headers, "Content-Length": str(len(listed))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(listed)

    def log_message(self, *told):
        pass


@pytest.fixture
def hub(copy):
    handler = type("OfCopy", (Hub,), {"folder": copy, "sent": set()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler.sent
        server.shutdown()


def test_a_model_is_downloaded_once_and_only_what_is_needed_of_it(hub, copy, tmp_path):
    address, sent = hub
    weights = {part: next((copy / part).glob("*.safetensors")) for part in ("unet", "vae", "text_encoder")}
    weights["text_encoder"] = weights["text_encoder"].rename(copy / "text_encoder" / "model.fp16.safetensors")
    shutil.copy(weights["unet"], copy / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    shutil.copy(weights["unet"], copy / "unet" / "diffusion_pytorch_model.bin")
    shutil.copy(weights["unet"], copy / "whole.safetensors")
    (copy / "safety_checker").mkdir()
    shutil.copy(weights["vae"], copy / "safety_checker" / "model.safetensors")
    index = json.loads((copy / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (copy / "model_index.json").write_text(json.dumps(index))
    (copy / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    job = ["plan", "txt2img", "model=diffusers", "scheduler=model", "model.path=org/name", f"model.revision={REVISION}"]
    done = command(tmp_path, *job, HF_HUB_OFFLINE="0", HF_ENDPOINT=address)
    assert done.returncode == 0, done.stderr
    big = {name for name in sent if not name.endswith((".json", ".txt", ".jinja"))}
    assert big == {str(file.relative_to(copy)) for file in weights.values()}
    assert "tokenizer/chat_template.jinja" in sent
    sent.clear()
    again = command(tmp_path, *job)
    assert again.returncode == 0 and again.stdout == done.stdout, again.stderr
    gone = command(tmp_path, *job[:-1], "model.revision=fedcba9876543210fedcba9876543210fedcba98", HF_HUB_OFFLINE="0", HF_ENDPOINT=address)  # fmt: skip
    assert not sent and gone.returncode == 2
    assert gone.stderr.count("\n") == 1 and "is not in the local cache and can't be downloaded" in gone.stderr


def test_a_cache_that_has_only_a_part_of_a_model_is_filled(hub, copy, tmp_path):
    """Others put single parts there, and the cache itself doesn't know that the rest is missing."""
    address, sent = hub
    cached = tmp_path / "hf" / "hub" / "models--org--name" / "snapshots" / REVISION
    shutil.copytree(copy / "vae", cached / "vae")
    job = ["plan", "txt2img", "model=diffusers", "scheduler=model", "model.path=org/name", f"model.revision={REVISION}"]
    offline = command(tmp_path, *job)
    assert offline.returncode == 2 and "is not in the local cache" in offline.stderr
    done = command(tmp_path, *job, HF_HUB_OFFLINE="0", HF_ENDPOINT=address)
    assert done.returncode == 0 and "model_index.json" in sent, done.stderr


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="it is there")
def test_a_tokenizer_that_needs_another_package_says_which(copy):
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "tokenizer": ["transformers", "PixtralProcessor"]}))
    assert refused(copy).endswith("PixtralProcessor needs torchvision: pip install torchvision")


@pytest.mark.parametrize("name", ["CLIPTokenizer", "T5Tokenizer"])
def test_a_tokenizer_without_its_words_is_not_made_up(name, copy):
    shutil.rmtree(copy / "tokenizer")
    (copy / "tokenizer").mkdir()
    (copy / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "tokenizer": ["transformers", name]}))
    with pytest.raises(ValueError, match=f"^{copy / 'tokenizer'} holds no words, only how a tokenizer is set up"):
        DiffusersTextEncoder(str(copy)).load(torch.device("cpu"))


def test_of_a_single_file_s_model_no_weights_are_downloaded(hub, copy, tmp_path):
    address, sent = hub
    file = shutil.copy(next((copy / "unet").glob("*.safetensors")), tmp_path / "unet.safetensors")
    code = (
        f"from latentmill_diffusers.folder import Folder; print(Folder({str(file)!r}, {REVISION!r}, 'org/name').root)"
    )
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf")}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip().endswith(REVISION)
    assert "unet/config.json" in sent and not [name for name in sent if name.endswith(".safetensors")]


def test_each_part_is_fingerprinted_by_what_it_reads(model, tmp_path):
    same = tiny.build("StableDiffusionPipeline", tmp_path / "same")
    other = tiny.build("StableDiffusionPipeline", tmp_path / "other", seed=1)
    folders = [Folder(str(path)) for path in (model("StableDiffusionPipeline"), same, other)]
    for part in ("vae", "unet", "text_encoder"):
        first, second, third = (folder.fingerprint(part) for folder in folders)
        assert first == second != third
    assert folders[0].fingerprint("vae") != folders[0].fingerprint("unet")


def test_what_cleans_captions_is_of_the_plan(model):
    """Without one of them, or with another version, the same prompt is encoded otherwise, and diffusers says nothing."""
    cleaners = {"ftfy", "beautifulsoup4"}
    for part in (DiffusersTextEncoder, PipelineEncode):
        assert cleaners <= {*part(str(model("PixArtSigmaPipeline"))).libraries}
        assert not cleaners & {*part(str(model("StableDiffusionPipeline"))).libraries}


def test_a_chat_template_counts(model, tmp_path):
    """A tokenizer or processor has it in a file of its own, which a prompt is put into."""
    folder = shutil.copytree(model("ZImagePipeline"), tmp_path / "model")
    first = Folder(str(folder)).fingerprint("tokenizer")
    (folder / "tokenizer" / "chat_template.jinja").write_text("{{ messages[0].content }}?")
    assert Folder(str(folder)).fingerprint("tokenizer") != first


def test_a_single_file_of_weights_with_the_configs_of_a_model_of_its_kind(model, tmp_path):
    """Network and VAE from files of their own make what the folder makes that they are from."""
    folder = model("StableDiffusionPipeline")
    configs = shutil.copytree(folder, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    alone = [f"model.path={folder}"]
    for part, kind in (("unet", "denoiser"), ("vae", "vae")):
        shutil.copy(next((folder / part).glob("*.safetensors")), tmp_path / f"{part}.safetensors")
        alone += [f"{kind}.path={tmp_path / part}.safetensors", f"{kind}.config={configs}"]
    found = {}
    for name, told in {"folder": [f"model.path={folder}"], "files": alone}.items():
        output = tmp_path / name
        job = ["model=diffusers", "scheduler=model", "cluster=inline", "samples_per_row=1", "sampling.steps=2"]
        job += ["source.path=pkg://latentmill.jobs/data/prompts.txt", "sampling.width=16", "sampling.height=16"]
        assert latentmill.run("txt2img", [*job, *told, f"output={output}"]).failed == 0
        found[name] = pq.read_table(output / "data").column("image").to_pylist()
    assert found["files"] == found["folder"]


def test_a_single_file_that_is_no_safetensors_or_says_nothing_of_itself(tmp_path):
    assert "there is no file /no.safetensors" in refused("/no.safetensors")
    assert "/no.ckpt is a pickle, or may be one" in refused("/no.ckpt")
    (tmp_path / "x.safetensors").write_bytes(b"")
    assert "x.safetensors holds weights alone: give model.config too" in refused(tmp_path / "x.safetensors")


def damaged(path, how):
    """Rewrite a file of weights: without its first tensor, with a NaN in it, or cut short."""
    if how == "short":
        path.write_bytes(path.read_bytes()[:-100])
        return
    weights = load_file(path)
    first = sorted(name for name, value in weights.items() if value.is_floating_point())[0]
    if how == "missing":
        del weights[first]
    else:
        weights[first].view(-1)[0] = math.nan
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder"])
@pytest.mark.parametrize("how", ["missing", "nan", "short"])
def test_damaged_weights_are_one_line_when_they_are_loaded(part, how, copy):
    damaged(next((copy / part).glob("*.safetensors")), how)
    built = {"vae": DiffusersVAE, "unet": DiffusersDenoiser, "text_encoder": DiffusersTextEncoder}[part](str(copy))
    with pytest.raises(ValueError, match=r"can't be loaded: ") as caught:
        built.load(torch.device("cpu"))
    said = str(caught.value)
    assert "\n" not in said and said.startswith(str(copy))
    assert {"missing": ": it has no ", "nan": " is not finite: ", "short": ""}[how] in said
