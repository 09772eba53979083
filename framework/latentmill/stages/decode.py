"""The decode stage: clean latents to pictures."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import torch
from torch import Tensor

from latentmill import checks, registry, weights
from latentmill.batch import fixed_slots, require_spec
from latentmill.errors import NoRowError
from latentmill.plugin import VAE, Declaration, Reject, Stage, StageContext, tensors


class Decode(Stage):
    """Replaces ``latents`` by ``image``, or by ``video`` where the VAE is one of clips; ``source_image``, where there is one, by ``psnr``."""

    contract = 2
    needs = ("vae",)
    takes = ("latents",)
    drops = ("latents", "source_image")
    shares_tensors = True

    def declare(self, context: StageContext) -> Declaration:
        vae: VAE = context.plugin("vae")
        with registry.asking(vae):
            pictures = vae.spec.decoded
        given = any("source_image" in stage.added() for stage in context.before)
        return replace(super().declare(context), adds=("psnr", pictures) if given else (pictures,))

    def prepare(self, context: StageContext) -> None:
        self.vae: VAE = context.plugin("vae")
        self.fixed, self.place, self.floats = context.fixed, context.place("vae"), context.gives_floats
        self.device = torch.device("cpu")

    def load(self, device: torch.device) -> None:
        self.device = device
        with weights.reading(self.place):
            checks.load(self.vae, device)

    @torch.inference_mode()
    def __call__(self, batch: pa.Table, reject: Reject) -> pa.Table:
        require_spec(batch, self.vae.spec)
        slots, size = fixed_slots(batch, self.fixed)
        latents = tensors.spread(tensors.from_arrow(batch, "latents"), slots, size)
        with checks.inside(self.vae):
            images = self.vae.decode(tensors.send(latents, self.device).to(torch.float32))
        checks.pictures(self.vae, self.vae.spec, images, latents)
        images = images[tensors.send(slots, images.device)]
        finite = images.isfinite().flatten(1).all(1)
        # Where they were decoded: bytes are a quarter of what they are made of, and a GPU makes them in no time.
        shown = (images.clamp(-1, 1) + 1) / 2
        shown = shown.to(torch.float32) if self.floats else tensors.as_bytes(shown)
        pixels = shown.movedim(1, -1).contiguous().cpu()
        good = finite.tolist()
        batch = batch.drop_columns(["latents"])
        if "source_image" in batch.column_names:
            both = (tensors.as_bytes(each) for each in (pixels, tensors.from_arrow(batch, "source_image")))
            quality = psnr(*both)
            batch = batch.drop_columns(["source_image"]).append_column("psnr", pa.array(quality.tolist(), pa.float64()))
        batch = tensors.with_tensor(batch, self.vae.spec.decoded, pixels)
        wrong = "the VAE's picture of these latents is not finite"
        if not any(good):
            raise NoRowError(wrong)
        if not all(good):
            for i, fine in enumerate(good):
                if not fine:
                    reject(i, wrong)
            batch = batch.filter(pa.array(good))
        return batch


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each of ``images[B, H, W, 3]`` (uint8), in dB; infinite for equal pictures."""
    error = (images.double() - references.double()).square().flatten(1).mean(1)
    return 10.0 * torch.log10(255.0**2 / error)
