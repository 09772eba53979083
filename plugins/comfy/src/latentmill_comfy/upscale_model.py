"""Pictures made larger by a network for that (ESRGAN, SwinIR, DAT and the like), as ComfyUI's ImageUpscaleWithModel does it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Annotated, Any

import pyarrow as pa
import torch
from torch import Tensor

from latentmill import weights
from latentmill.plugin import Reject, Stage, StageContext, WeightsPath, tensors
from latentmill_comfy.folders import find
from latentmill_comfy.tiles import in_tiles

WRAPPED = "module."
"""How the names of tensors begin in files that were saved while training on several GPUs."""


class UpscaleByModel(Stage):
    """Makes ``image`` larger by the network in ``model``: as much larger as the network was trained for. Width and height of the row follow;
    where a later stage encodes the picture, what is over a multiple of the VAE's downscale is cut evenly from both edges.

    ``model`` is a file in ``upscale_models`` of ComfyUI's folder ``models``, or a whole path: ``.safetensors``, or a pickle of weights
    alone (``.pth``). spandrel knows what network it is of. Computed in float32, in tiles of ``tile_size`` pixels that ``overlap``: a tile's
    memory is what a picture's is, however large. A mask beside the picture grows with it. A row of more pixels than
    ``sampling.max_pixels`` is an error.
    """

    contract = 2
    takes = ("image",)
    adds = ("image",)
    drops = ("image",)
    cuts = True
    takes_floats = True
    resources: Mapping[str, Any] = {"batch_size": 4}
    fingerprinted = ("models", "model")

    def __init__(
        self, model: Annotated[str, WeightsPath()] = "", models: str = "", tile_size: int = 512, overlap: int = 32
    ) -> None:
        if not model:
            raise ValueError("upscale_model: give model, a file in ComfyUI's folder upscale_models, or a whole path")
        if not 0 <= overlap < tile_size:
            raise ValueError(f"overlap must be from 0 to less than tile_size, {tile_size} pixels, not {overlap}")
        if find_spec("spandrel") is None:
            raise ValueError("upscale_model needs spandrel: pip install 'latentmill-comfy[upscale]'")
        self.path = find(models, "upscale_models", model)
        self.tile_size, self.overlap, self.most = tile_size, overlap, 1 << 62
        self.multiple_of, self.floats = 1, False

    def fingerprint(self) -> str:
        return weights.digest(self.path)

    def prepare(self, context: StageContext) -> None:
        self.most = int(context.sampling.get("max_pixels") or self.most)
        encodes = any("vae" in stage.needs and "latents" in stage.added() for stage in context.after)
        self.multiple_of = context.multiple_of if encodes else 1
        self.floats = context.gives_floats

    def load(self, device: torch.device) -> None:
        """Raises ValueError if no network of pictures is known that has such tensors."""
        import spandrel

        state = weights.load(self.path, allow_pickle=True)
        if all(name.startswith(WRAPPED) for name in state):
            state = {name.removeprefix(WRAPPED): tensor for name, tensor in state.items()}
        try:
            network: Any = spandrel.ModelLoader(device="cpu").load_from_state_dict(state)
        except spandrel.UnsupportedModelError as error:
            raise ValueError(f"{self.path} holds no network that spandrel knows: {error}") from error
        if not isinstance(network, spandrel.ImageModelDescriptor) or network.input_channels != 3:
            raise ValueError(f"{self.path} holds a {network.architecture.name}, which makes no picture of one picture")
        self.network, self.scale, self.device = network.to(device).eval(), int(network.scale), device

    @torch.inference_mode()
    def __call__(self, batch: pa.Table, reject: Reject) -> pa.Table:
        if "image" not in batch.column_names:
            for row in range(len(batch)):
                reject(row, "it is no picture, and a network makes only pictures larger: put the stage behind decode")
            return batch.slice(0, 0)
        high, wide = (side * self.scale for side in tensors.shape_of(batch.schema.field("image"))[:2])
        if wide * high > self.most:
            for row in range(len(batch)):
                reject(row, f"{wide}x{high} are {wide * high} pixels, more than sampling.max_pixels={self.most} allows")
            return batch.slice(0, 0)
        top, left = (side % self.multiple_of // 2 for side in (high, wide))
        high, wide = (side - side % self.multiple_of for side in (high, wide))
        middle = slice(top, top + high), slice(left, left + wide)
        pictures = [self._larger(picture)[middle].contiguous() for picture in tensors.from_arrow(batch, "image")]
        batch = tensors.with_tensor(batch, "image", torch.stack(pictures))
        if "mask" in batch.column_names:
            mask = tensors.from_arrow(batch, "mask").repeat_interleave(self.scale, 1).repeat_interleave(self.scale, 2)
            batch = tensors.with_tensor(batch, "mask", mask[:, *middle].contiguous())
        for name, side in (("width", wide), ("height", high)):
            at = batch.schema.get_field_index(name)
            field = batch.schema.field(at)
            batch = batch.set_column(at, field, pa.array([side] * len(batch), field.type))
        return batch

    def _larger(self, picture: Tensor) -> Tensor:
        """One picture ``[H, W, 3]``: alone, so that its pixels don't hang on its company."""
        given = tensors.as_floats(picture.to(self.device).permute(2, 0, 1)[None])
        sides = (self.tile_size, self.tile_size)
        found = in_tiles(self.network, given, sides, self.overlap, self.scale)
        shown = found[0].clamp(0, 1)
        return (shown if self.floats else tensors.as_bytes(shown)).permute(1, 2, 0).cpu()
