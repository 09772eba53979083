"""Nodes that load models, and those that change them: each becomes settings of the parts called ``comfy``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from latentmill.comfy.inputs import LOADED, LOADED_ONCE, Inputs
from latentmill.comfy.links import Clip, Model, UpscaleModel, Vae

CLIP_TYPES = ("stable_diffusion", "sdxl", "sd3", "flux")
"""What CLIPLoader and its like call the families whose text encoders we have."""
WEIGHT_DTYPES = ("default", "fp8_e4m3fn", "fp8_e5m2")
DISCRETE_KINDS = ("eps", "v_prediction", "lcm", "x0")


def checkpoint(given: Inputs) -> Sequence[Any]:
    """Denoiser, text_encoder and vae `comfy`, of one file."""
    settings = {"checkpoint": _file(given, "ckpt_name")}
    return Model(given.node, settings), Clip(given.node, settings), Vae(given.node, settings)


def unet(given: Inputs) -> Sequence[Any]:
    """Denoiser `comfy`, of a file of its own."""
    settings = {"unet": _file(given, "unet_name")}
    dtype = given.one_of("weight_dtype", WEIGHT_DTYPES, "default")
    return (Model(given.node, settings if dtype == "default" else {**settings, "weight_dtype": dtype}),)


def clip(given: Inputs) -> Sequence[Any]:
    """Text_encoder `comfy`, of one to three files; `type` stable_diffusion, sdxl, sd3 or flux."""
    numbers = {"CLIPLoader": [""], "DualCLIPLoader": ["1", "2"], "TripleCLIPLoader": ["1", "2", "3"]}[given.node.type]
    settings = {"files": [_file(given, f"clip_name{number}") for number in numbers]}
    given.one_of("device", ("default", "cpu"), "default")
    if given.node.type == "TripleCLIPLoader":
        return (Clip(given.node, {**settings, "type": "sd3"}),)
    return (Clip(given.node, {**settings, "type": given.one_of("type", CLIP_TYPES)}),)


def vae(given: Inputs) -> Sequence[Any]:
    """Vae `comfy`, of a file of its own."""
    name = _file(given, "vae_name")
    if name in ("pixel_space", "taesd", "taesdxl", "taesd3", "taef1"):
        raise given.refuse(f"vae_name {name} is not supported: a file of a VAE is")
    return (Vae(given.node, {"vae": name}),)


def lora(given: Inputs) -> Sequence[Any]:
    """One more of `loras` of the denoiser and the text encoder."""
    model, strength = given.take("model", Model), given.fixed("strength_model", float, LOADED)
    file = _file(given, "lora_name")
    if strength != 0:
        model = model.with_lora(file, strength)
    if given.node.type == "LoraLoaderModelOnly":
        return (model,)
    found, strength = given.take("clip", Clip), given.fixed("strength_clip", float, LOADED)
    return model, found.with_lora(file, strength) if strength != 0 else found


def clip_skip(given: Inputs) -> Sequence[Any]:
    """`text_encoder.clip_skip`, one less than the layers counted from the end."""
    found, layer = given.take("clip", Clip), given.fixed("stop_at_clip_layer", int)
    if not -24 <= layer <= -1:
        raise given.refuse(f"stop_at_clip_layer must be from -24 to -1, not {layer}")
    return (replace(found, settings={**found.settings, "clip_skip": -layer - 1}),)


def shift(given: Inputs) -> Sequence[Any]:
    """`denoiser.shift`."""
    settings = {"shift": given.fixed("shift", float)}
    if given.node.type == "ModelSamplingAuraFlow":
        settings["multiplier"] = 1.0
    return (_sampled(given, settings),)


def flux_shift(given: Inputs) -> Sequence[Any]:
    """`denoiser.max_shift`, `base_shift` and the size between them."""
    settings = {name: given.fixed(name, float) for name in ("max_shift", "base_shift")}
    size = [given.fixed(name, int) for name in ("width", "height")]
    return (_sampled(given, {**settings, "shift_size": size}),)


def discrete(given: Inputs) -> Sequence[Any]:
    """`denoiser.prediction` and `zsnr`."""
    prediction = given.one_of("sampling", DISCRETE_KINDS)
    return (_sampled(given, {"prediction": prediction, "zsnr": given.fixed("zsnr", bool, default=False)}),)


def upscale_model(given: Inputs) -> Sequence[Any]:
    """The model of a stage upscale_model."""
    return (UpscaleModel(given.node, _file(given, "model_name")),)


def _file(given: Inputs, name: str) -> str:
    """The name of a file of the folder of models."""
    file: str = given.fixed(name, str, LOADED_ONCE)
    if "://" in file:
        raise given.refuse(f"{name} is a web address: fetch the file into the folder of models, and name it")
    return file


OF_SCHEDULE = ("shift", "multiplier", "max_shift", "base_shift", "shift_size", "prediction", "zsnr")


def _sampled(given: Inputs, settings: dict[str, Any]) -> Model:
    """The model with these settings of its noise schedule, which take the place of earlier ones."""
    model = given.take("model", Model)
    kept = {name: value for name, value in model.settings.items() if name not in OF_SCHEDULE}
    return Model(model.node, {**kept, **settings})
