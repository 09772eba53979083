"""What is known of diffusers' pipelines by their names, and by those of their parts and parameters."""

from __future__ import annotations

import inspect
from typing import Any

NETWORK_PARTS = ("transformer", "unet", "unconditional_transformer")
DECODERS = ("vae", "movq", "vqgan")
"""How the names of the parts begin that are the network, and that make pictures of latents."""
SKIPPED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that no latents of a prompt need."""
OFF = ("use_resolution_binning", "enable_prompt_rewrite", "use_pe", "prompt_upsampling")
"""Parameters that are false here: they change the size that was asked for, or the prompt."""
UNSET = ("guidance_schedule",)
"""Parameters that are None here: what they stand in for is told row by row."""
TOLD = (
    "prompt",
    "negative_prompt",
    "height",
    "width",
    "num_inference_steps",
    "generator",
    "output_type",
    "return_dict",
)
"""Parameters that are a row's, or ours."""
GUIDANCE = ("guidance_scale", "true_cfg_scale", "distilled_guidance_scale")
"""What pipelines call a row's guidance scale."""
ENCODERS = ("encode_prompt", "generate_prior_tokens")
"""Methods whose results are noted. The second draws a picture's tokens, by a language model and with the row's seed."""
FRAME_FIRST = ("Kandinsky5T2IPipeline",)
"""Pipelines whose latents are ``[B, frame, h, w, C]``; all others' of video are ``[B, C, frame, h, w]``."""
SINGLE = ("DreamLitePipeline", "OmniGenPipeline", "PRXPipeline")
"""Pipelines that take no list of prompts, fail with one when they guide, or fill prompts up: their rows go one by one."""
COMPARED = (
    *(
        "AuraFlowPipeline",
        "BriaFibo2Pipeline",
        "BriaFiboPipeline",
        "BriaPipeline",
        "ChromaPipeline",
        "CogView3PlusPipeline",
    ),
    *(
        "CogView4Pipeline",
        "DreamLitePipeline",
        "ErnieImagePipeline",
        "Flux2Pipeline",
        "FluxPipeline",
        "GlmImagePipeline",
    ),
    *("HiDreamImagePipeline", "HunyuanDiTPipeline", "HunyuanImagePipeline", "Ideogram4Pipeline", "Kandinsky3Pipeline"),
    *(
        "Kandinsky5T2IPipeline",
        "KolorsPipeline",
        "Krea2Pipeline",
        "LatentConsistencyModelPipeline",
        "LongCatImagePipeline",
    ),
    *(
        "Lumina2Pipeline",
        "LuminaPipeline",
        "NucleusMoEImagePipeline",
        "OmniGenPipeline",
        "OvisImagePipeline",
        "PRXPipeline",
    ),
    *("PixArtAlphaPipeline", "PixArtSigmaPipeline", "QwenImage21Pipeline", "QwenImagePipeline", "SanaPipeline"),
    *("SanaSprintPipeline", "StableDiffusion3Pipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline"),
    "ZImagePipeline",
)
"""Pipelines whose latents were compared with their pictures, so that it is known which axis is which."""
GUIDES_WITH_NEGATIVE = ("FluxPipeline", "NucleusMoEImagePipeline", "QwenImage21Pipeline", "QwenImagePipeline")
"""Pipelines that guide only by a negative prompt that is given."""
NOT_BY_PARTS = {
    "Cosmos2TextToImagePipeline": "it makes a safety checker of its own, whatever it is given",
    "Flux2KleinPipeline": "it undoes the VAE's batch norm before it returns latents; model=diffusers runs it",
    "IFPipeline": "it makes pixels and no latents",
    "PRXPixelPipeline": "it makes pixels and no latents",
}
"""Pipelines that can't be run so, by name, and why."""


def refused(cls: Any) -> str | None:
    """Why a pipeline's class can't be run by its parts, or None if nothing is known against it."""
    if cls.__name__ in NOT_BY_PARTS:
        return NOT_BY_PARTS[cls.__name__]
    parameters = inspect.signature(cls.__call__).parameters
    if "prompt" not in parameters or "output_type" not in parameters:
        return "it doesn't make pictures out of prompts"
    if "strength" in parameters:
        return "it begins from a picture"
    return None
