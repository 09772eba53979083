"""Which classes of nodes become part of a job, and by what. All others are refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from latentmill.comfy import conditioning, loaders, pictures, sampling
from latentmill.comfy.inputs import Inputs

SAVED = ("SaveImage", "SaveImageWebsocket")
PREVIEWS = ("PreviewImage",)
OUTPUTS = (*SAVED, *PREVIEWS)
"""What is run: these, and what they hang on."""

NODES: Mapping[str, Callable[[Inputs], Sequence[Any]]] = {
    "CheckpointLoaderSimple": loaders.checkpoint,
    "UNETLoader": loaders.unet,
    "CLIPLoader": loaders.clip,
    "DualCLIPLoader": loaders.clip,
    "TripleCLIPLoader": loaders.clip,
    "VAELoader": loaders.vae,
    "LoraLoader": loaders.lora,
    "LoraLoaderModelOnly": loaders.lora,
    "CLIPSetLastLayer": loaders.clip_skip,
    "ModelSamplingSD3": loaders.shift,
    "ModelSamplingAuraFlow": loaders.shift,
    "ModelSamplingFlux": loaders.flux_shift,
    "ModelSamplingDiscrete": loaders.discrete,
    "UpscaleModelLoader": loaders.upscale_model,
    "CLIPTextEncode": conditioning.encode,
    "CLIPTextEncodeSDXL": conditioning.encode_sdxl,
    "CLIPTextEncodeSDXLRefiner": conditioning.encode_refiner,
    "CLIPTextEncodeFlux": conditioning.encode_flux,
    "CLIPTextEncodeSD3": conditioning.encode_sd3,
    "FluxGuidance": conditioning.guidance,
    "ConditioningZeroOut": conditioning.zero_out,
    "ConditioningSetTimestepRange": conditioning.timestep_range,
    "ConditioningCombine": conditioning.combine,
    "ConditioningConcat": conditioning.concat,
    "ConditioningAverage": conditioning.average,
    "KSampler": sampling.ksampler,
    "KSamplerAdvanced": sampling.ksampler_advanced,
    "SamplerCustom": sampling.sampler_custom,
    "SamplerCustomAdvanced": sampling.sampler_custom_advanced,
    "BasicGuider": sampling.basic_guider,
    "CFGGuider": sampling.cfg_guider,
    "RandomNoise": sampling.random_noise,
    "DisableNoise": sampling.no_noise,
    "KSamplerSelect": sampling.sampler_select,
    **dict.fromkeys(sampling.SAMPLER_NODES, sampling.sampler_node),
    "BasicScheduler": sampling.basic_scheduler,
    **dict.fromkeys(sampling.SIGMA_NODES, sampling.sigma_node),
    "SplitSigmas": sampling.split_sigmas,
    "EmptyLatentImage": pictures.empty,
    "EmptySD3LatentImage": pictures.empty,
    "EmptyHunyuanLatentVideo": pictures.empty,
    "RepeatLatentBatch": pictures.repeat,
    "LatentFromBatch": pictures.from_batch,
    "LoadImage": pictures.load,
    "LoadImageMask": pictures.load_mask,
    "InvertMask": pictures.invert_mask,
    "GrowMask": pictures.grow_mask,
    "VAEEncode": pictures.encode,
    "VAEEncodeForInpaint": pictures.encode_for_inpaint,
    "SetLatentNoiseMask": pictures.set_mask,
    "VAEDecode": pictures.decode,
    "VAEDecodeTiled": pictures.decode_tiled,
    "LatentUpscale": pictures.scale_latent,
    "LatentUpscaleBy": pictures.scale_latent,
    "ImageScale": pictures.scale_image,
    "ImageScaleBy": pictures.scale_image,
    "ImageScaleToTotalPixels": pictures.scale_image,
    "ImageUpscaleWithModel": pictures.scale_by_model,
    **dict.fromkeys(pictures.CONSTANTS, pictures.constant),
    **dict.fromkeys(OUTPUTS, pictures.save),
}
