"""Denoisers and text encoders of each family by the framework's suite; rows in mixed company; what they load."""

import json
import shutil
import subprocess
import sys
from functools import partial

import diffusers
import pyarrow.parquet as pq
import pytest
import tiny
import torch
import transformers

import latentmill
from latentmill.plugin import RowError
from latentmill.testing import DenoiserSuite, SchedulerSuite
from latentmill_diffusers.denoiser import DiffusersDenoiser
from latentmill_diffusers.folder import Folder
from latentmill_diffusers.schedule import scheduler_of, shared_scheduler_of
from latentmill_diffusers.scheduler import ModelScheduler
from latentmill_diffusers.text_encoder import COMPEL, DiffusersTextEncoder

CPU = torch.device("cpu")
PROMPTS = ["a red fox", "", "two houses by the sea, at night, and a boat that is longer than both of them"]


@pytest.fixture(scope="module")
def encoded(model):
    """The conditioning of PROMPTS, by family; encoded once."""
    made = {}

    def conditioning(name):
        if name not in made:
            encoder = DiffusersTextEncoder(str(model(name)))
            encoder.load(CPU)
            with torch.inference_mode():
                made[name] = {key: value.clone() for key, value in encoder.encode(PROMPTS).items()}
        return made[name]

    return conditioning


@pytest.fixture(params=tiny.BUILDERS)
def name(request):
    return request.param


@pytest.mark.usefixtures("plain_convolutions")
class TestSuite(DenoiserSuite):
    has_grid = True

    @pytest.fixture(autouse=True)
    def _of(self, name, model, encoded):
        folder = str(model(name))
        type(self).denoiser = staticmethod(partial(DiffusersDenoiser, folder))
        config = DiffusersDenoiser(folder)
        channels = 4 if config.inpaints else config.config["in_channels"] // config.family.packed**2
        type(self).shape, type(self).told = (channels, 8, 16), dict(encoded(name))
        with torch.inference_mode():
            yield

    def conditioning(self):
        return dict(type(self).told)


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "FluxPipeline"])
def test_what_a_scheduler_is_told_it_keeps_from_the_one_that_all_share(name, model):
    folder = Folder(str(model(name)))
    before = told_of(shared_scheduler_of(folder))
    DiffusersDenoiser(str(model(name))).times(3, (16, 8, 8))
    assert told_of(shared_scheduler_of(folder)) == before
    one, other = scheduler_of(folder), scheduler_of(folder)
    assert told_of(one) == told_of(other) == before
    one.sigmas.zero_()
    assert told_of(other) == before


def told_of(scheduler):
    return {
        name: value.tolist() if isinstance(value, torch.Tensor) else repr(value)
        for name, value in vars(scheduler).items()
    }


class TestScheduler(SchedulerSuite):
    """Those that the models name: PNDM, Euler on a VP and on a flow path, DPM-Solver++."""

    @pytest.fixture(
        autouse=True, params=["StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline", "SanaPipeline"]
    )
    def _of(self, request, model):
        type(self).scheduler = staticmethod(partial(ModelScheduler, str(model(request.param))))


def rows_of(tmp_path, folder, prompts, *overrides):
    """The latents of a job over rows, by seed."""
    output = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
    source = output.with_suffix(".jsonl")
    source.write_text("\n".join(map(json.dumps, prompts)))
    told = ["model=diffusers", "scheduler=model", "cluster=inline", f"model.path={folder}", f"source.path={source}"]
    result = latentmill.run("denoise", [*told, f"output={output}", *overrides])
    assert (result.ok, result.failed) == (len(prompts), 0), (output / "errors/00000.jsonl").read_text()
    rows = [row for path in sorted((output / "data").iterdir()) for row in pq.read_table(path).to_pylist()]
    return {row["seed"]: torch.tensor(row["latents"]).reshape(row["shape"]) for row in rows}


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "FluxPipeline", "CogView4Pipeline"])
def test_rows_of_one_batch_have_their_own_steps_guidance_size_and_prompts(name, model, tmp_path):
    each = [
        {"prompt": PROMPTS[i % 3], "negative_prompt": "x" * i, "seed": i, "steps": 2 + i, "width": 32 * (1 + i % 2),
         "height": 32, "guidance_scale": [1.0, 3.0, 7.5][i % 3]}
        for i in range(6)
    ]  # fmt: skip
    together = rows_of(tmp_path, model(name), each)
    for row in each[::2]:
        alone = rows_of(tmp_path, model(name), [row])[row["seed"]]
        found = together[row["seed"]]
        assert float((found - alone).norm() / alone.norm()) <= 1e-5, row


def test_each_stage_loads_what_is_its_own(model):
    folder = str(model("StableDiffusionXLPipeline"))
    encoder = DiffusersTextEncoder(folder)
    encoder.load(CPU)
    there = {name for name, part in encoder._pipeline.components.items() if isinstance(part, torch.nn.Module)}
    assert there == {"text_encoder", "text_encoder_2"}
    denoiser = DiffusersDenoiser(folder)
    denoiser.load(CPU)
    assert type(denoiser._network.model).__name__ == "UNet2DConditionModel"


def test_workers_of_other_stages_never_see_diffusers(model, tmp_path):
    folder = model("StableDiffusionPipeline")
    rows_of(tmp_path, folder, [{"prompt": "a", "seed": 0, "width": 32, "height": 32, "steps": 1}])
    [output] = tmp_path.glob("out-*[0-9]")
    told = [
        "model=diffusers",
        "scheduler=model",
        f"model.path={folder}",
        f"source.path={output}.jsonl",
        f"output={output}",
    ]
    code = f"""
import sys
from latentmill import config, plan_files, storage
from latentmill.workers import context
class Asked:
    def find_spec(self, name, *_):
        if name == "diffusers":
            sys.exit("diffusers")
sys.meta_path.insert(0, Asked())
job = config.load_job("denoise", {told!r})
plan = plan_files.load(storage.at(job.output, False))
for name in ("read", "write", "denoise"):
    print(name, flush=True)
    context.make_stage(job, plan, name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["read", "write", "denoise"], done.stderr
    assert done.stderr.splitlines()[-1] == "diffusers", "the one that needs it asks for it"


def test_weights_in_halves_are_found_by_their_names(model, tmp_path):
    folder = shutil.copytree(model("StableDiffusionPipeline"), tmp_path / "model")
    for part in ("unet", "vae", "text_encoder"):
        for file in (folder / part).glob("*.safetensors"):
            file.rename(file.with_suffix(".fp16.safetensors"))
    assert len(rows_of(tmp_path, folder, [{"prompt": "a", "seed": 0, "width": 32, "height": 32, "steps": 1}])) == 1


def test_negative_prompts_are_what_the_model_takes_them_for(model, tmp_path):
    """SDXL has zeros for none, unless its index says otherwise; an empty one is encoded as any other."""
    folder = shutil.copytree(model("StableDiffusionXLPipeline"), tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    del index["force_zeros_for_empty_prompt"]
    found = {}
    for zeros in (True, False, None):  # without the key, as SDXL's pipeline has it by default
        told = {} if zeros is None else {"force_zeros_for_empty_prompt": zeros}
        (folder / "model_index.json").write_text(json.dumps({**index, **told}))
        encoder = DiffusersTextEncoder(str(folder))
        encoder.load(CPU)
        with torch.inference_mode():
            found[zeros] = encoder.encode_negative([None, "", "blurry"])
    for name in ("embeds", "pooled"):
        assert not found[True][name][0].any() and not found[None][name][0].any()
        assert torch.equal(found[False][name][0], found[False][name][1]) and found[False][name][1].any()
        assert all(torch.equal(found[True][name][1:], found[other][name][1:]) for other in (False, None))


@torch.inference_mode()
def test_clip_skip_and_length_reach_the_pipeline_s_encode_prompt(model):
    folder = str(model("StableDiffusionPipeline"))
    plain, skipping = DiffusersTextEncoder(folder), DiffusersTextEncoder(folder, clip_skip=1)
    plain.load(CPU)
    skipping.load(CPU)
    clip = transformers.CLIPTextModel.from_pretrained(f"{folder}/text_encoder").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{folder}/tokenizer")
    tokens = tokenizer(["a fox"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    wanted = clip.final_layer_norm(clip(tokens, output_hidden_states=True).hidden_states[-2])
    found = skipping.encode(["a fox"])["embeds"]
    assert torch.equal(found, wanted) and not torch.equal(found, plain.encode(["a fox"])["embeds"])
    for name in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):  # what a job asks before it has weights
        for skip in (0, 1):
            encoder = DiffusersTextEncoder(str(model(name)), clip_skip=skip)
            assert encoder.conditioning_spec()["embeds"].shape[0] == 77
            assert "longer than the 77 tokens" in encoder.warn("a red fox " * 60)

    short = DiffusersTextEncoder(str(model("FluxPipeline")), max_length=32)
    short.load(CPU)
    assert short.encode(["a fox"])["embeds"].shape[1] == 32
    padded = DiffusersTextEncoder(str(model("QwenImagePipeline")), max_length=700)
    padded.load(CPU)
    assert padded.encode(["a fox"])["embeds"].shape[1] == 700
    with pytest.raises(
        ValueError, match=r"text_encoder\.max_length: StableDiffusionPipeline has no max_sequence_length"
    ):
        DiffusersTextEncoder(folder, max_length=32)
    with pytest.raises(ValueError, match="HunyuanDiTPipeline has no max_sequence_length"):
        DiffusersTextEncoder(str(model("HunyuanDiTPipeline")), max_length=64)
    for wrong in (0, -1, 7.5, True):
        with pytest.raises(ValueError, match=f"max_length must be a whole number from 1, not {wrong}"):
            DiffusersTextEncoder(str(model("FluxPipeline")), max_length=wrong)


@torch.inference_mode()
def test_the_last_token_of_a_prompt_counts_where_a_pipeline_fills_up_to_more(model):
    """CogView 4 fills up to a multiple of 16, in front."""
    encoder = DiffusersTextEncoder(str(model("CogView4Pipeline")), max_length=20)
    encoder.load(CPU)
    text = "a b c d e f g h i j k l m n o p"
    first, second = (
        next(found for length in range(len(text), 0, -1) if not encoder.warn(found := text[:length] + last))
        for last in "!?"
    )
    first, second = (encoder.encode([found])["embeds"] for found in (first, second))
    assert first.shape == second.shape == (1, 32, 32) and not torch.equal(first, second)


def weighted(folder, **settings):
    encoder = DiffusersTextEncoder(str(folder), compel=True, **settings)
    encoder.load(CPU)
    return encoder


@torch.inference_mode()
@pytest.mark.parametrize("name", COMPEL)
def test_prompts_with_weights(name, model):
    """A prompt without weights is what it is to the pipeline; weighted words are moved away from nothing by as much."""
    plain = DiffusersTextEncoder(str(model(name)))
    plain.load(CPU)
    encoder = weighted(model(name))
    prompts = ["a red fox", "", "two houses by the sea"]
    for found, wanted in (
        (encoder.encode(prompts), plain.encode(prompts)),
        (encoder.encode_negative(prompts), plain.encode_negative(prompts)),
    ):
        assert set(found) == set(wanted)
        for key, value in wanted.items():
            assert torch.allclose(found[key], value, atol=1e-6), key
    [bare, nothing], [found] = plain.encode(["a red fox", ""])["embeds"], encoder.encode(["(a red fox)1.5"])["embeds"]
    tokenizer = plain._pipeline.tokenizer_2 if name == "FluxPipeline" else plain._pipeline.tokenizer
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token else []
    words = slice(len(begin), len(tokenizer("a red fox")["input_ids"]) - 1)  # between begin and end
    wanted = bare.clone()
    wanted[words] = nothing[words] + 1.5 * (bare[words] - nothing[words])
    assert torch.allclose(found, wanted, atol=1e-5) and not torch.allclose(found, bare, atol=1e-2)


@torch.inference_mode()
def test_prompts_beyond_77_tokens(model):
    """They are encoded in pieces, and all prompts of a job come to one length. Our tokenizers know no ends of words to split at."""
    folder = model("StableDiffusionXLPipeline")
    plain = DiffusersTextEncoder(str(folder))
    plain.load(CPU)
    encoder = weighted(folder, max_length=3 * 77)
    text = "a red fox in deep snow at night, beside a river that is wide. a small house stands on the other bank."
    first, second = text[:75], text[75:]
    found = encoder.encode([text, first, ""])
    one, two, nothing = plain.encode([first, second, ""])["embeds"]
    assert found["embeds"].shape[1] == 3 * 77
    for embeds, pieces in zip(found["embeds"], ([one, two, nothing], [one, nothing, nothing], [nothing] * 3)):
        assert torch.allclose(embeds, torch.cat(pieces), atol=1e-5)
    encoder.check(text)
    with pytest.raises(RowError, match="a prompt of 154 tokens, by pieces of 77, and max_length is 77"):
        weighted(folder).check(text)


def test_prompts_that_compel_can_t_read(model, tmp_path):
    """Each is its row's error; a job with the others goes through, long ones among them."""
    prompts = ["a (red)1.3 fox", '("a", "b").blend(1)', "a cat.swap(dog)", "a fox. " * 13, "a fox. " * 100]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    told = ["model=diffusers", "scheduler=model", "cluster=inline", f"model.path={model('StableDiffusionPipeline')}"]
    told += [f"source.path={tmp_path / 'rows.jsonl'}", f"output={tmp_path / 'out'}", "sampling.steps=1"]
    told += ["sampling.width=32", "sampling.height=32", "text_encoder.compel=true", "text_encoder.max_length=154"]
    result = latentmill.run("denoise", told)
    assert (result.ok, result.failed) == (2, 3)
    errors = [json.loads(line) for line in (tmp_path / "out/errors/00000.jsonl").read_text().splitlines()]
    assert [error["row"] for error in errors] == [1, 2, 4]
    assert errors[0]["reason"].startswith(
        'compel can\'t read the prompt \'("a", "b").blend(1)\': while parsing Blend: '
    )
    assert errors[1]["reason"].endswith(".swap() changes attention inside the network, which no job does")
    assert errors[2]["reason"] == "a prompt of 770 tokens, by pieces of 77, and max_length is 154"


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("KolorsPipeline", {}, "KolorsPipeline is not among what it knows: StableDiffusionPipeline, "),
        ("StableDiffusionPipeline", {"clip_skip": 1}, "clip_skip and compel exclude each other"),
        ("StableDiffusionPipeline", {"max_length": 100}, "with compel: expected 77 or a multiple, not 100"),
        ("FluxPipeline", {"max_length": 154}, "with compel: expected nothing: T5's is fixed, not 154"),
    ],
)
def test_what_compel_can_not_be_asked_for(name, settings, said, model):
    with pytest.raises(ValueError, match=said):
        DiffusersTextEncoder(str(model(name)), compel=True, **settings)


def test_compel_is_not_there(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "compel", None)
    with pytest.raises(ValueError, match="needs the library of that name: pip install compel"):
        DiffusersTextEncoder(str(model("StableDiffusionPipeline")), compel=True)


@torch.inference_mode()
def test_precision_storage_attention_and_compilation(model, encoded):
    """What each setting does to the network, and that it still predicts the same, as far as its numbers go."""
    folder, told = str(model("FluxPipeline")), {**encoded("FluxPipeline"), "guidance_scale": torch.full((3,), 3.5)}
    x = torch.randn(3, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    predicted = {}
    for name, settings in {
        "plain": {},
        "bfloat16": {"dtype": "bfloat16"},
        "float8": {"storage": "float8_e4m3fn"},
        "native": {"attention": "native"},
        "offload": {"offload": True},
    }.items():
        denoiser = DiffusersDenoiser(folder, **settings)
        denoiser.load(CPU)
        predicted[name] = denoiser.predict(x, t, told)
        assert predicted[name].dtype == torch.float32
        dtypes = {parameter.dtype for parameter in denoiser._network.model.parameters()}
        assert (torch.float8_e4m3fn in dtypes) == (name == "float8") and (torch.bfloat16 in dtypes) == (
            name == "bfloat16"
        )
    scale = predicted["plain"].abs().mean()
    for name, tolerance in {"bfloat16": 0.05, "float8": 0.3, "native": 1e-5, "offload": 1e-5}.items():
        error = float((predicted[name] - predicted["plain"]).abs().mean() / scale)
        assert error <= tolerance, (name, error)
        assert (error > 1e-4) == (name in ("bfloat16", "float8"))
    denoiser = DiffusersDenoiser(folder, compile=True)
    denoiser.load(CPU)
    blocks = [m for m in denoiser._network.model.modules() if type(m).__name__ == "FluxTransformerBlock"]
    assert blocks and all(block._compiled_call_impl is not None for block in blocks)


def test_attention_is_of_one_network_alone_and_refused_where_none_is_asked(model):
    from diffusers.models import attention_dispatch

    def active():
        return attention_dispatch._AttentionBackendRegistry._active_backend

    before = active()
    denoiser = DiffusersDenoiser(str(model("FluxPipeline")), attention="_native_math")
    denoiser.load(CPU)
    chosen = {
        getattr(m.processor, "_attention_backend", "")
        for m in denoiser._network.model.modules()
        if hasattr(m, "processor")
    }
    assert chosen == {"_native_math"} and active() == before
    with pytest.raises(ValueError, match="has attention of its own, and takes no backend of diffusers: leave it out"):
        DiffusersDenoiser(str(model("StableDiffusion3Pipeline")), attention="_native_math").load(CPU)
    assert active() == before


@torch.inference_mode()
def test_the_guidance_scale_is_not_rounded_on_its_way(model, encoded):
    """A latent consistency model's embedding of it counts in thousandths; its pipeline makes it in float32."""
    name, seen = "LatentConsistencyModelPipeline", []
    denoiser = DiffusersDenoiser(str(model(name)), dtype="bfloat16")
    denoiser.load(CPU)
    denoiser._network.model.register_forward_pre_hook(
        lambda module, args, named: seen.append(named["timestep_cond"]), with_kwargs=True
    )
    told = {**encoded(name), "guidance_scale": torch.tensor([7.3, 4.7, 8.5])}
    denoiser.predict(torch.randn(3, 4, 8, 8), torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64), told)
    embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    width = denoiser.config["time_cond_proj_dim"]
    assert torch.equal(seen[0], embed(None, told["guidance_scale"] - 1, width).to(torch.bfloat16))


def test_offload_is_refused_where_diffusers_can_t(model):
    with pytest.raises(ValueError, match=r"denoiser\.offload: HunyuanDiT2DModel can't be moved group by group"):
        DiffusersDenoiser(str(model("HunyuanDiTPipeline")), offload=True)


@pytest.mark.parametrize("scheduler", ["model", "euler"])
def test_a_size_that_the_network_can_t_take_is_its_row_s_error(scheduler, model, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "width": 36}\n{"prompt": "b", "width": 34}\n')
    told = ["model=diffusers", f"scheduler={scheduler}", "cluster=inline", f"model.path={model('FluxPipeline')}"]
    told += [
        f"source.path={tmp_path / 'rows.jsonl'}",
        f"output={tmp_path / 'out'}",
        "sampling.height=32",
        "sampling.steps=1",
    ]
    result = latentmill.run("denoise", told)
    assert (result.ok, result.failed) == (1, 1)
    [error] = [json.loads(line) for line in (tmp_path / "out/errors/00000.jsonl").read_text().splitlines()]
    takes = "the network takes sides that are multiples of 2, of pictures multiples of 4"
    assert error["reason"] == f"latents of 17x16: {takes}"


def test_parts_that_nobody_needs_are_not_missed(model, tmp_path):
    """Stable Diffusion's safety checker, named in the index as on the Hub, is not there, and nothing asks for it."""
    folder = shutil.copytree(model("StableDiffusionPipeline"), tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    index["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert len(rows_of(tmp_path, folder, [{"prompt": "a", "seed": 0, "width": 32, "height": 32, "steps": 1}])) == 1


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "QwenImagePipeline"])
def test_a_deterministic_job_does_a_shard_again_to_the_same_bytes(name, model, tmp_path):
    rows = [{"prompt": PROMPTS[i % 3], "steps": 1 + i, "guidance_scale": 1.0 + i} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    output = tmp_path / "out"
    told = ["model=diffusers", "scheduler=model", "cluster=inline", f"model.path={model(name)}", f"output={output}"]
    told += [f"source.path={tmp_path / 'rows.jsonl'}", "sampling.width=32", "sampling.height=32"]
    told += ["samples_per_row=1", "deterministic=true", "rows_per_shard=3", "stages.denoise.batch_size=3"]
    assert latentmill.run("txt2img", told).ok == 4
    first = (output / "data" / "00000.parquet").read_bytes()
    (output / "data" / "00000.parquet").unlink()
    (output / "_SUCCESS").unlink()
    assert latentmill.run("txt2img", told).ok == 4
    assert (output / "data" / "00000.parquet").read_bytes() == first
