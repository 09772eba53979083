"""Tiny models of every family, random weights in the real classes, to test with: nothing is downloaded.

    tiny.build("StableDiffusionPipeline", folder)

writes what ``save_pretrained`` writes of a model of that pipeline's class. A second or two and a few megabytes each.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tiny import pipeline_models, qwens
from tiny.autoencoders import VAES
from tiny.transformer_models import (
    aura_flow,
    cogview_4,
    flux,
    flux_2_dev,
    flux_2_klein,
    hunyuan_dit,
    lumina_2,
    pixart,
    qwen_image,
    sana,
    stable_diffusion_3,
    z_image,
)
from tiny.unets import inpainting, kolors, latent_consistency, refiner, stable_diffusion, stable_diffusion_xl


def build(pipeline: str, folder: Path, seed: int = 0) -> Path:
    """Write a model of that pipeline's class into ``folder``, and return it. Raises KeyError for one without a builder."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = (BUILDERS | PIPELINES)[pipeline]()
    for part in parts.values():
        if isinstance(part, nn.Module):
            _nowhere_zero(part, seed)
    getattr(diffusers, pipeline)(**parts).save_pretrained(folder)
    return folder


def build_vae(name: str, folder: Path, seed: int = 0) -> Path:
    """Write one of VAES into ``folder``, and return it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        VAES[name]().save_pretrained(folder)
    return folder


def _nowhere_zero(model: nn.Module, seed: int) -> None:
    """Fill what starts at 0, as gates of transformer blocks do: a network that ignores its inputs tests nothing."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1, generator=generator)


BUILDERS: dict[str, Callable[[], dict[str, Any]]] = {
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionXLPipeline": stable_diffusion_xl,
    "StableDiffusionXLImg2ImgPipeline": refiner,
    "StableDiffusionInpaintPipeline": lambda: inpainting(stable_diffusion()),
    "StableDiffusionXLInpaintPipeline": lambda: inpainting(stable_diffusion_xl()),
    "LatentConsistencyModelPipeline": latent_consistency,
    "StableDiffusion3Pipeline": stable_diffusion_3,
    "FluxPipeline": flux,
    "PixArtAlphaPipeline": lambda: pixart(128, 0.18215),
    "PixArtSigmaPipeline": lambda: pixart(32, 0.13025),
    "SanaPipeline": sana,
    "Lumina2Pipeline": lumina_2,
    "AuraFlowPipeline": aura_flow,
    "HunyuanDiTPipeline": hunyuan_dit,
    "CogView4Pipeline": cogview_4,
    "KolorsPipeline": kolors,
    "QwenImagePipeline": qwen_image,
    "ZImagePipeline": z_image,
    "Flux2Pipeline": flux_2_dev,
    "Flux2KleinPipeline": flux_2_klein,
}
"""Families that both tiers know."""

PIPELINES: dict[str, Callable[[], dict[str, Any]]] = {
    "GlmImagePipeline": pipeline_models.glm_image,
    "BriaFibo2Pipeline": qwens.bria_fibo_2,
    "BriaFiboPipeline": pipeline_models.bria_fibo,
    "BriaPipeline": pipeline_models.bria,
    "ChromaPipeline": pipeline_models.chroma,
    "CogView3PlusPipeline": pipeline_models.cogview_3_plus,
    "DreamLitePipeline": qwens.dream_lite,
    "ErnieImagePipeline": qwens.ernie,
    "HiDreamImagePipeline": pipeline_models.hidream,
    "HunyuanImagePipeline": qwens.hunyuan_image,
    "Ideogram4Pipeline": qwens.ideogram_4,
    "Kandinsky3Pipeline": pipeline_models.kandinsky_3,
    "Kandinsky5T2IPipeline": qwens.kandinsky_5,
    "Krea2Pipeline": qwens.krea_2,
    "LongCatImagePipeline": qwens.longcat,
    "LuminaPipeline": pipeline_models.lumina,
    "NucleusMoEImagePipeline": qwens.nucleus,
    "OvisImagePipeline": qwens.ovis,
    "PRXPipeline": pipeline_models.prx,
    "QwenImage21Pipeline": qwens.qwen_image_21,
    "SanaSprintPipeline": pipeline_models.sana_sprint,
    "OmniGenPipeline": pipeline_models.omnigen,
}
"""Models that only their pipeline runs."""
