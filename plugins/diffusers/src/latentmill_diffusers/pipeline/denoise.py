"""The stage that has a pipeline's network and no text encoders."""

from __future__ import annotations

import inspect
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

from latentmill.batch import PROMPT_PREFIX, with_latents
from latentmill.fields import BATCH_SCHEMA
from latentmill.plugin import LatentSpec, Reject, RowError, tensors
from latentmill_diffusers.hub import weights_of
from latentmill_diffusers.pipeline.known import COMPARED, FRAME_FIRST, NETWORK_PARTS
from latentmill_diffusers.pipeline.noted import NOTED, filled, shared_leaves
from latentmill_diffusers.pipeline.stage import Pipeline
from latentmill_diffusers.vae import VAE_PARTS, DiffusersVAE


class PipelineDenoise(Pipeline):
    """Replaces ``prompt:*`` by ``latents``, clean and scaled as the VAE of the job, ``vae``, expects them.

    With ``alone`` the pipeline is called for each row by itself: a row's bits then don't depend on its company. So is one whose scheduler draws
    noise from torch's own generator, from when it first does.
    """

    shares_tensors = True
    takes = (PROMPT_PREFIX,)
    adds = ("latents",)
    drops = (PROMPT_PREFIX,)

    def __init__(
        self,
        path: Annotated[str, weights_of("")] = "",
        revision: str | None = None,
        dtype: str = "float32",
        call: dict[str, Any] | None = None,
        vae: Annotated[dict[str, Any] | None, weights_of(*VAE_PARTS)] = None,
        alone: bool = False,
    ) -> None:
        super().__init__(path, revision, dtype, call)
        self.alone = alone or self.single
        settings = dict(vae or {})
        if str(settings.pop("name", None)).rpartition(":")[2] != "diffusers":
            raise ValueError("vae must be the job's (vae: ${vae}), and that the pipeline's own: vae=diffusers")
        self.spec: LatentSpec = DiffusersVAE(**settings).spec

    def loads(self, part: str) -> bool:
        wanted = NETWORK_PARTS if self.encoders else (*NETWORK_PARTS, "tokenizer")
        return self.folder.class_of(part) is not None and part.startswith(wanted)

    @torch.inference_mode()
    def __call__(self, batch: pa.Table, reject: Reject) -> Iterator[pa.Table]:
        names = [f"{PROMPT_PREFIX}{k}" for k in range(sum(n.startswith(PROMPT_PREFIX) for n in batch.column_names))]
        form = json.loads(batch.schema.field(names[0]).metadata[NOTED])
        leaves = [tensors.from_arrow(batch, name) for name in names]
        shared = [k for k in shared_leaves(form)]
        given = batch.select(BATCH_SCHEMA.names).to_pylist()
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, row in enumerate(given):
            told = (i,) if self.alone else tuple(tuple(leaves[k][i].flatten().tolist()) for k in shared)
            none = row["negative_prompt"] is None
            key = row["steps"], row["guidance_scale"], row["height"], row["width"], none, told
            groups.setdefault(key, []).append(i)
        todo = deque(groups.values())
        while todo:
            members = todo.popleft()
            try:
                shape = self.spec.shape(given[members[0]]["height"], given[members[0]]["width"])
            except RowError as error:
                for i in members:
                    reject(i, str(error))
                continue
            noted = [filled(each, [leaf[members].to(self.device) for leaf in leaves]) for each in form]
            made = self.run([given[i] for i in members], _answering(noted))
            if self.draws and not self.alone:
                self.alone = True
                todo = deque([i] for each in (members, *todo) for i in each)
                continue
            latents = self._in_the_vae_s_order(made, *shape).float().cpu()
            name, reason = self.folder.pipeline, ""
            if tuple(latents.shape[1:]) != shape:
                reason = f"{name} makes no latents of this size: {tuple(latents.shape[1:])}, not {shape}"
            elif name not in COMPARED and len({*shape}) == 1:
                reason = f"{name} is not known here, and latents {shape} don't show their axes: take another size"
            if reason:
                for i in members:
                    reject(i, reason)
                continue
            part = batch.drop_columns(names).take(members)
            good = latents.isfinite().flatten(1).all(1).tolist()
            for i, fine in zip(members, good):
                if not fine:
                    reject(i, f"the latents of {self.folder.pipeline} are not finite")
            latents = latents.to(getattr(torch, self.spec.dtype))
            yield with_latents(part, latents, self.spec).filter(pa.array(good))

    def _in_the_vae_s_order(self, made: Tensor, channels: int, height: int, width: int) -> Tensor:
        """``[B, C, h, w]`` of what the pipeline made.

        Which axis is which is told by what the pipeline is, and never by numbers, which may be equal: with three axes it
        made tokens, ``[B, tokens, C]``, with four ``[B, C, h, w]``, and with five a frame of video.
        """
        if made.ndim == 3:
            made = self._of_tokens(made, height, width)
        elif made.ndim == 5 and self.folder.pipeline in FRAME_FIRST:
            made = made.permute(0, 4, 1, 2, 3)
        if made.ndim == 5:
            made = made.squeeze(2)
        if tuple(made.shape[1:]) == (channels // 4, 2 * height, 2 * width):  # pixels, where the VAE's are 2x2 patches
            made = pixel_unshuffle(made, 2)
        return made

    def _of_tokens(self, made: Tensor, height: int, width: int) -> Tensor:
        """Of tokens ``[B, tokens, C]`` of a pixel each, or, where there are fewer, by the pipeline's own ``_unpack_latents``."""
        if made.shape[1] == height * width:
            pixels: Tensor = made.transpose(1, 2).unflatten(2, (height, width))
            return pixels
        if not hasattr(self.pipeline, "_unpack_latents"):
            return made
        told = {"height": height * self.spec.downscale, "width": width * self.spec.downscale}
        known = inspect.signature(self.pipeline._unpack_latents).parameters
        if "vae_scale_factor" in known:
            told["vae_scale_factor"] = self.pipeline.vae_scale_factor
        if "patch_size" in known:
            told["patch_size"] = self.pipeline.transformer.config.patch_size
        unpacked: Tensor = self.pipeline._unpack_latents(made, **told)
        return unpacked


def _answering(noted: Iterable[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What stands in place of each encoder: one after another, what was ``noted``."""
    each = iter(noted)
    return lambda encoder: lambda *positional, **named: next(each)
