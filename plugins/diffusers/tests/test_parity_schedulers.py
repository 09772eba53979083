"""``scheduler=model``: our job against the pipeline with the scheduler of the model's config, with the same seeds."""

import json
import os

import diffusers
import pytest
from beside import PROMPTS, denoised, difference, made_by

pytestmark = pytest.mark.usefixtures("plain_convolutions")
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = {**SD, "timestep_spacing": "leading", "steps_offset": 1}
PLAIN = {"clip_sample": False, "set_alpha_to_one": False}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS = {
    "ddim, sd 1": ("DDIMScheduler", {**LEADING, **PLAIN}),
    "ddim, v, zero snr, trailing": (
        "DDIMScheduler",
        {
            **SD,
            **PLAIN,
            "timestep_spacing": "trailing",
            "rescale_betas_zero_snr": True,
            "prediction_type": "v_prediction",
        },
    ),
    "ddim, sample": ("DDIMScheduler", {**LEADING, **PLAIN, "prediction_type": "sample"}),
    "pndm": ("PNDMScheduler", {**LEADING, "skip_prk_steps": True}),
    "euler, leading": ("EulerDiscreteScheduler", LEADING),
    "euler, linspace": ("EulerDiscreteScheduler", SD),
    "euler, trailing, v": (
        "EulerDiscreteScheduler",
        {**SD, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    ),
    "heun": ("HeunDiscreteScheduler", LEADING),
    "lms": ("LMSDiscreteScheduler", LEADING),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {**LEADING, "final_sigmas_type": "zero"}),
    "dpmpp_2m, karras": ("DPMSolverMultistepScheduler", {**SD, "use_karras_sigmas": True}),
    "dpmpp_2m, flow": ("DPMSolverMultistepScheduler", FLOW),
    "unipc": ("UniPCMultistepScheduler", {**SD, "final_sigmas_type": "zero"}),
    "euler, karras": ("EulerDiscreteScheduler", {**SD, "use_karras_sigmas": True}),
    "euler, beta": ("EulerDiscreteScheduler", {**SD, "use_beta_sigmas": True}),
    "unipc, sigma_min": (
        "UniPCMultistepScheduler",
        {**SD, "final_sigmas_type": "sigma_min", "lower_order_final": False},
    ),
    "deis": ("DEISMultistepScheduler", {**SD, "solver_order": 2, "lower_order_final": False}),
    "kdpm2": ("KDPM2DiscreteScheduler", LEADING),
}


@pytest.fixture(scope="module")
def parts(model):
    """The parts of a pipeline, loaded once."""
    return diffusers.StableDiffusionPipeline.from_pretrained(model("StableDiffusionPipeline"), use_safetensors=True).components  # fmt: skip


@pytest.mark.parametrize("case", SCHEDULERS)
def test_path_prediction_grid_and_solver_are_what_the_scheduler_config_says(case, model, parts, tmp_path):
    """The same network under each: what it was trained for is nothing that random weights would mind."""
    name, settings = SCHEDULERS[case]
    source, folder = model("StableDiffusionPipeline"), tmp_path / "model"
    folder.mkdir()
    for part in source.iterdir():
        if part.name not in ("scheduler", "model_index.json"):
            os.symlink(part, folder / part.name)
    index = json.loads((source / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", name]}))
    getattr(diffusers, name)(**settings).save_pretrained(folder / "scheduler")
    prompts = PROMPTS[1:]  # two rows in a batch, which is what a scheduler sees of them
    rows = denoised(tmp_path, folder, prompts)
    scheduler = getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler")
    pipeline = diffusers.StableDiffusionPipeline(**parts | {"scheduler": scheduler}, requires_safety_checker=False)
    wanted = made_by(pipeline, "StableDiffusionPipeline", prompts, decode=False)
    for row, (latents, _) in zip(rows, wanted, strict=True):
        assert difference(row, latents, name) <= 1e-5
