"""Pipelines run by their parts, and the same ones called directly, whole, on tiny models of the real classes."""

import inspect
import json
from importlib.util import find_spec

import diffusers
import pytest
import tiny
import torch
from answers import written_once
from layouts import ordered

from latentmill.batch import from_dicts
from latentmill.plugin import tensors
from latentmill_diffusers.pipeline import PipelineDenoise, PipelineEncode, known

PROMPTS = [("a red fox", None), ("two houses by the 'sea'", "blurry"), ("a red fox", "bad")]
SIZES = {
    "BriaFiboPipeline": (64, 128),
    "GlmImagePipeline": (64, 128),
    "Kandinsky3Pipeline": (64, 128),
    "HiDreamImagePipeline": (64, 64),
    "Kandinsky5T2IPipeline": (64, 128),
    "LuminaPipeline": (64, 128),
    **dict.fromkeys(["QwenImage21Pipeline", "SanaPipeline", "SanaSprintPipeline"], (32, 64)),
}
"""Height and width, where 16 x 32 is none of a pipeline's: it has an area, a list, or a factor of 8, 16 or 32."""
SMALLER = {
    "HiDreamImagePipeline": {"default_sample_size": 32},
    "HunyuanImagePipeline": {"tokenizer_max_length": 256},
    "Kandinsky5T2IPipeline": {"resolutions": [(128, 64)]},
}
"""What a pipeline has for all its models, and would be 4096 tokens of a picture, or a thousand of a prompt, for tiny ones, too."""
CALLS = {
    "BriaPipeline": {"max_sequence_length": 128},
    "Ideogram4Pipeline": {"max_sequence_length": 64},
    "SanaSprintPipeline": {"complex_human_instruction": None},
}
WITH_TORCHVISION = ("OmniGenPipeline",)
"""Pipelines that ask for it. PyPI's doesn't load beside a torch for the CPU alone; where it does, they are tested."""
FAMILIES = [name for name in tiny.BUILDERS if not known.refused(getattr(diffusers, name))]
TESTED = FAMILIES + [name for name in tiny.PIPELINES if name not in WITH_TORCHVISION or find_spec("torchvision")]


def prompts_of(name):
    """PROMPTS, without the negative ones where the pipeline takes none."""
    takes = "negative_prompt" in inspect.signature(getattr(diffusers, name).__call__).parameters
    return [(prompt, negative if takes else None) for prompt, negative in PROMPTS]


def table_of(prompts, steps=2, guidance=4.0, size=(32, 64), **changes):
    return from_dicts(
        {
            "row": i, "row_id": str(i), "prompt": prompt, "negative_prompt": negative, "seed": i, "steps": steps,
            "guidance_scale": guidance, "strength": 1.0, "scheduler": "", "height": size[0], "width": size[1], **changes,
        }
        for i, (prompt, negative) in enumerate(prompts)
    )  # fmt: skip


def stages(folder, name):
    """The two stages, loaded."""
    call, device = CALLS.get(name), torch.device("cpu")
    encode = PipelineEncode(str(folder), call=call)
    denoise = PipelineDenoise(str(folder), call=call, vae={"name": "diffusers", "path": str(folder)})
    for stage in (encode, denoise):
        stage.load(device)
        _make_smaller(stage.pipeline, name)
    return encode, denoise


def ours(encode, denoise, table):
    """Latents by row number."""
    made = {}
    for part in encode(table, lambda i, reason: pytest.fail(reason)):
        for out in denoise(part, lambda i, reason: pytest.fail(reason)):
            numbers = out.column("row").to_pylist()
            made |= zip(numbers, tensors.from_arrow(out, "latents"), strict=True)
    return [made[number] for number in sorted(made)]


def _make_smaller(pipeline, name):
    for key, value in SMALLER.get(name, {}).items():
        assert hasattr(pipeline, key)
        setattr(pipeline, key, value)
    if name == "GlmImagePipeline" and isinstance(pipeline.vision_language_encoder, torch.nn.Module):
        pipeline.vision_language_encoder.generate = written_once(pipeline.vision_language_encoder)
        pipeline.processor._get_target_shape = lambda height, width: (height // 32, width // 32, 2, 4)


def directly(folder, name):
    """The pipeline itself, whole."""
    index = json.loads((folder / "model_index.json").read_text())
    absent = {part: None for part, value in index.items() if value == [None, None]}
    made = getattr(diffusers, name).from_pretrained(folder, use_safetensors=True, **absent)
    made.set_progress_bar_config(disable=True)
    _make_smaller(made, name)
    for part in made.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)  # where gradients may be asked for, convolutions round otherwise
    return made


def guided(whole, name, scale):
    """The argument that guides; or it is the guider that is told."""
    if name == "HunyuanImagePipeline":
        whole.guider.guidance_scale = scale
        return {}
    return {"true_cfg_scale" if name.startswith("QwenImage") else "guidance_scale": scale}


OFF = ("use_resolution_binning", "enable_prompt_rewrite", "use_pe", "prompt_upsampling")
"""What would change the size or the prompt."""


def theirs(whole, name, spec, table, kind="latent"):
    """Latents or pictures of the rows, one after another."""
    known = inspect.signature(whole.__call__).parameters
    made = []
    for row in table.to_pylist():
        told = {key: False for key in OFF if key in known} | CALLS.get(name, {})
        if "guidance_schedule" in known:  # it would stand in for the scale
            told["guidance_schedule"] = None
        if row["negative_prompt"] is not None:
            told["negative_prompt"] = row["negative_prompt"]
        one = whole(
            prompt=row["prompt"],
            num_inference_steps=row["steps"],
            height=row["height"],
            width=row["width"],
            generator=torch.Generator().manual_seed(row["seed"]),
            output_type=kind,
            return_dict=False,
            **guided(whole, name, row["guidance_scale"]),
            **told,
        )[0]
        if kind == "latent":
            made.append(
                ordered(name, one, spec.channels, row["height"] // spec.downscale, row["width"] // spec.downscale)
            )
        else:
            made.append(one[0])
    return made
