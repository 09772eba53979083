"""Nodes with pictures and latents: each becomes what a row brings, or a stage."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from latentmill.comfy.inputs import Inputs
from latentmill.comfy.links import (
    Decoded,
    Empty,
    Encoded,
    FromBatch,
    Latent,
    Loaded,
    LoadedMask,
    Output,
    Picture,
    Repeated,
    Scaled,
    ScaledLatent,
    Setting,
    UpscaleModel,
    Vae,
)

LATENT_METHODS = ("nearest-exact", "bilinear", "area", "bicubic", "bislerp")
IMAGE_METHODS = ("nearest-exact", "bilinear", "area", "bicubic", "lanczos")
ANNOTATED = re.compile(r"(.*?)(?: \[(input|output|temp)\])?", re.DOTALL)
"""A picture's name, and the folder that may stand behind it."""
CROPPINGS = ("disabled", "center")
CONSTANTS: Mapping[str, type[Any]] = {
    "PrimitiveInt": int,
    "PrimitiveFloat": float,
    "PrimitiveString": str,
    "PrimitiveStringMultiline": str,
    "PrimitiveBoolean": bool,
    "INTConstant": int,
    "FloatConstant": float,
    "StringConstant": str,
    "Seed (rgthree)": int,
}
"""Nodes that are one value, and of which kind."""
MOST_PICTURES = 4096
"""In a batch, as ComfyUI bounds it."""
MOST_GROWN = 16384
"""Pixels by which a mask grows, as ComfyUI bounds them."""
CHANNELS = ("alpha", "red", "green", "blue")


def empty(given: Inputs) -> Sequence[Any]:
    """`width`, `height`, and as many pictures as the batch has."""
    if given.node.type == "EmptyHunyuanLatentVideo" and given.fixed("length", int) != 1:
        raise given.refuse("length above 1 is a video, and pictures are supported")
    sides = [given.whole(name) for name in ("width", "height")]
    whole = [replace(side, value=side.value // 8 * 8) for side in sides]  # as many latents as there are whole ones
    return (Empty(given.node, whole[0], whole[1], _count(given, "batch_size")),)


def repeat(given: Inputs) -> Sequence[Any]:
    """So many pictures of each."""
    return (Repeated(given.node, given.take("samples", Latent), _count(given, "amount")),)


def from_batch(given: Inputs) -> Sequence[Any]:
    """Some pictures of a batch, with their own noise."""
    first = given.fixed("batch_index", int)
    if first < 0:
        raise given.refuse(f"batch_index must be 0 or more, not {first}")
    return (FromBatch(given.node, given.take("samples", Latent), first, _count(given, "length")),)


def load(given: Inputs) -> Sequence[Any]:
    """The row's `image`, and its transparent part as `mask`."""
    image = _file(given)
    return Loaded(given.node, image), LoadedMask(given.node, image, "image")


def load_mask(given: Inputs) -> Sequence[Any]:
    """The row's `mask`, a channel of a picture of its own."""
    return (LoadedMask(given.node, _file(given), given.one_of("channel", CHANNELS)),)


def invert_mask(given: Inputs) -> Sequence[Any]:
    """The mask turned over: `invert` of the source's `masks`."""
    return (_with_change(given, "invert"),)


def grow_mask(given: Inputs) -> Sequence[Any]:
    """The mask larger by some pixels, or smaller: `grow` of the source's `masks`."""
    by, tapered = given.fixed("expand", int), given.fixed("tapered_corners", bool)
    if abs(by) > MOST_GROWN:
        raise given.refuse(f"expand must be from -{MOST_GROWN} to {MOST_GROWN}, not {by}")
    return (_with_change(given, {"grow": by, "tapered": tapered}),)


def _with_change(given: Inputs, change: Any) -> LoadedMask:
    mask = given.take("mask", LoadedMask)
    return replace(mask, changes=(*mask.changes, change))


def encode(given: Inputs) -> Sequence[Any]:
    """A stage encode, or encode_images behind the first sampler."""
    return (Encoded(given.node, given.take("pixels", Picture), given.take("vae", Vae)),)


def encode_for_inpaint(given: Inputs) -> Sequence[Any]:
    """The same with a mask."""
    settings = {"grow_mask_by": given.fixed("grow_mask_by", int)}
    found = Encoded(given.node, given.take("pixels", Picture), given.take("vae", Vae), settings=settings)
    return (_masked(given, found),)


def set_mask(given: Inputs) -> Sequence[Any]:
    """A mask beside encoded latents."""
    found = given.take("samples", Latent)
    if not isinstance(found, Encoded):
        raise given.refuse("a mask is supported where samples is a picture just encoded")
    return (_masked(given, found),)


def decode(given: Inputs) -> Sequence[Any]:
    """A stage decode."""
    return (Decoded(given.node, given.take("samples", Latent), given.take("vae", Vae), {}),)


def decode_tiled(given: Inputs) -> Sequence[Any]:
    """The same, tile by tile."""
    tiling = {"tile_size": given.fixed("tile_size", int), "overlap": given.fixed("overlap", int, default=64)}
    for name, default in (("temporal_size", 64), ("temporal_overlap", 8)):  # of videos
        given.fixed(name, int, default=default)
    return (Decoded(given.node, given.take("samples", Latent), given.take("vae", Vae), tiling),)


def scale_latent(given: Inputs) -> Sequence[Any]:
    """A stage latent_upscale."""
    latent, settings = given.take("samples", Latent), _sized(given, LATENT_METHODS, least=64)
    return (ScaledLatent(given.node, latent, settings) if settings else latent,)


def scale_image(given: Inputs) -> Sequence[Any]:
    """A stage image_upscale."""
    image = given.take("image", Picture)
    if "megapixels" in given.node.inputs:
        method = given.one_of("upscale_method", IMAGE_METHODS)
        if (multiple := given.fixed("resolution_steps", int, default=1)) != 1:  # of newer versions of the node
            raise given.refuse(f"resolution_steps {multiple} is not supported; 1 is")
        return (Scaled(given.node, image, {"method": method, "megapixels": given.fixed("megapixels", float)}),)
    settings = _sized(given, IMAGE_METHODS)
    return (Scaled(given.node, image, settings) if settings else image,)


def scale_by_model(given: Inputs) -> Sequence[Any]:
    """A stage upscale_model."""
    model = given.take("upscale_model", UpscaleModel)
    return (Scaled(given.node, given.take("image", Picture), {"model": model.file}),)


def save(given: Inputs) -> Sequence[Any]:
    """The dataset's `image`."""
    return (Output(given.node, given.take("images", Picture)),)


def constant(given: Inputs) -> Sequence[Any]:
    """A value, where it is linked to."""
    [name] = [name for name in ("value", "string", "seed") if name in given.node.inputs][:1] or ["value"]
    kind = CONSTANTS[given.node.type]
    read = {str: given.text, int: given.whole, float: given.real}.get(kind)
    return (read(name) if read else Setting(given.fixed(name, bool)),)


def _count(given: Inputs, name: str) -> int:
    """A number of pictures."""
    count: int = given.fixed(name, int)
    if not 1 <= count <= MOST_PICTURES:
        raise given.refuse(f"{name} must be from 1 to {MOST_PICTURES}, not {count}")
    return count


def _file(given: Inputs) -> Setting:
    """A file in ComfyUI's folder of inputs."""
    image = given.text("image")
    name, annotation = ANNOTATED.fullmatch(image.value).groups()  # type: ignore[union-attr]
    if annotation not in (None, "input"):
        raise given.refuse(
            f"image is from ComfyUI's folder {annotation}, and those from its folder input are supported"
        )
    return replace(image, value=name)


def _sized(given: Inputs, methods: Sequence[str], least: int = 1) -> dict[str, Any]:
    """How, and to which size; a side of 0 follows from the other, and is left out. Nothing if both are 0, which stands for as it is."""
    settings: dict[str, Any] = {"method": given.one_of("upscale_method", methods)}
    if "scale_by" in given.node.inputs:
        return {**settings, "scale": given.fixed("scale_by", float)}
    sides = {name: given.fixed(name, int) for name in ("width", "height")}
    crop = given.one_of("crop", CROPPINGS)
    sides = {name: max(least, side) for name, side in sides.items() if side}
    return {**settings, **sides, "crop": crop} if sides else {}


def _masked(given: Inputs, latent: Encoded) -> Encoded:
    mask, image = given.take("mask", LoadedMask), latent.image
    if latent.mask is not None:
        raise given.refuse("its latents have a mask already, and one is supported")
    while isinstance(image, Scaled) and "model" not in image.settings:
        image = image.image
    if not isinstance(image, Loaded):
        raise given.refuse("a mask is supported beside a picture as LoadImage gives it, or scaled without a model")
    if mask.channel == "image" and image.image != mask.image:
        raise given.refuse("a mask that LoadImage gives is supported beside the same LoadImage's picture")
    return replace(latent, mask=mask)
