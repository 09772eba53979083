"""The encode stages: prompts to conditioning, pictures to latents, and an empty latent for a row that has neither.

``encode`` does both in one worker's process. ``encode_text`` and ``encode_images`` do one each, and can be sized apart; they may
stand in either order. Their rows are the same, bit by bit in a deterministic job with equal batch sizes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d, pad

from latentmill import checks, weights
from latentmill.batch import (
    NEGATIVE_PREFIX,
    PROMPT_PREFIX,
    SCHEDULER_KEY,
    SPACED,
    fixed_slots,
    frames_of,
    with_latents,
    with_warnings,
)
from latentmill.errors import NoRowError
from latentmill.plugin import (
    VAE,
    Declaration,
    LatentSpec,
    Reject,
    RowError,
    Stage,
    StageContext,
    tensors,
)
from latentmill.stages.prompts import GUIDED, PromptEncoding, not_finite

RESOURCES: Mapping[str, Any] = {"batch_size": 32, "num_cpus": 0.25}


class Encode(Stage):
    """Adds ``latents`` and, where a later stage denoises, ``prompt:*``; ``negative:*`` and ``masked`` only where one reads them.

    A picture becomes the mean of the VAE's posterior. A row without picture and latents gets zeros of its width and height,
    and is marked in ``from_noise``. What of a prompt the encoder will not read becomes the row's warning. The picture
    travels on as ``source_image`` where it is decoded again at once, to measure the reconstruction against it;
    ``latents_std`` is the posterior's standard deviation, which is 0 where there was no picture. ``latents_flipped`` are the
    latents of the mirrored picture, not mirrored latents.
    """

    contract = 2
    shares_tensors = True
    takes_floats = True
    text, images = True, True
    """Which of the two it encodes."""
    drops: Sequence[str] = ("image", "video")
    resources = RESOURCES
    grow_mask_by: int | None = None

    def __init__(self, grow_mask_by: int | None = None) -> None:
        """``grow_mask_by``: the picture is grey under its mask, which is then so many pixels larger, as ComfyUI's VAE Encode (for Inpainting) has it."""
        if grow_mask_by is not None and not 0 <= grow_mask_by <= 64:
            raise ValueError(f"grow_mask_by must be from 0 to 64 pixels, not {grow_mask_by}")
        self.grow_mask_by = grow_mask_by

    def declare(self, context: StageContext) -> Declaration:
        denoises = context.needed_later("denoiser")
        needs, adds = list[str](), list[str]()
        if self.images:
            needs.append("vae")
            adds += ["latents_std"] * context.latents_std + ["latents"] + ["mask", "from_noise"] * denoises
            adds += ["masked"] * (denoises and context.is_read("masked"))
            if not denoises and (context.size or {}).get("flip"):
                adds += ["latents_flipped"] + ["latents_std_flipped"] * context.latents_std
            if not denoises and any("source_image" in stage.drops for stage in context.after):
                adds.append("source_image")
        if self.text and (denoises or not self.images):
            needs.append("text_encoder")
            adds += [PROMPT_PREFIX] + [NEGATIVE_PREFIX] * context.is_read(NEGATIVE_PREFIX)
        return replace(super().declare(context), needs=tuple(needs), adds=tuple(adds))

    def prepare(self, context: StageContext) -> None:
        needs, self.fixed = context.declaration.needs, context.fixed
        self.pictures = PictureEncoding(context, self.grow_mask_by) if "vae" in needs else None
        self.prompts = PromptEncoding(context) if "text_encoder" in needs else None
        self.denoises = context.needed_later("denoiser")

    def load(self, device: torch.device) -> None:
        if self.pictures is not None:
            self.pictures.device = device
        if self.prompts is not None:
            self.prompts.load(device)

    @torch.inference_mode()
    def __call__(self, batch: pa.Table, reject: Reject) -> Iterator[pa.Table]:
        groups = defaultdict(list)
        warnings: list[Sequence[str]] = [()] * len(batch)
        own = self.prompts.fields if self.prompts is not None else []
        columns = ["prompt", *GUIDED, "scheduler", "width", "height", *own]
        for i, row in enumerate(batch.select(columns).to_pylist()):
            try:
                if self.prompts is not None:
                    warnings[i] = self.prompts.check(row)
                shape = self.pictures.shape(row, batch) if self.pictures is not None else ()
                groups[shape, row["scheduler"] if self.denoises else "", tuple(row[name] for name in own)].append(i)
            except RowError as error:
                reject(i, str(error))
        if any(warnings):
            batch = with_warnings(batch, warnings)
        good_rows, wrong_rows = 0, dict[int, str]()
        for (shape, scheduler, _), members in groups.items():
            part = batch if len(members) == len(batch) else batch.take(members)
            slots, size = fixed_slots(part, self.fixed)
            if self.pictures is not None:
                part, good = self.pictures.encode(part, shape, slots, size)
                fine = good.tolist()
                wrong_rows |= {
                    i: "the VAE's latents of this picture are not finite" for i, ok in zip(members, fine) if not ok
                }
                members, slots = [i for i, ok in zip(members, fine) if ok], slots[good]
            if self.prompts is not None and len(part):
                part = self.prompts.encode(part, slots, size)
                wrong = not_finite(part)
                wrong_rows |= {members[k]: reason for k, reason in wrong.items()}
                if wrong:
                    part = part.filter(pa.array([k not in wrong for k in range(len(part))]))
            if len(part):
                good_rows += len(part)
                yield part.replace_schema_metadata({SCHEDULER_KEY: scheduler} if scheduler else None)
        if wrong_rows and not good_rows:
            raise NoRowError(next(iter(wrong_rows.values())))
        for i, reason in wrong_rows.items():
            reject(i, reason)


class EncodeText(Encode):
    """Adds ``prompt:*`` and, only where a later stage reads them, ``negative:*``. Its workers have the text encoder, and no VAE."""

    text, images = True, False
    drops = ()

    def __init__(self) -> None:
        super().__init__()


class EncodeImages(Encode):
    """Adds ``latents`` and, where a row has a mask, ``mask``; ``masked`` only where a later stage reads it. Its workers have the VAE, and no text encoder."""

    text, images = False, True


class PictureEncoding:
    """Pictures to latents, by a VAE that is loaded when the first picture comes: text-to-image jobs never need its weights."""

    def __init__(self, context: StageContext, grow_mask_by: int | None = None) -> None:
        self.grow_mask_by = grow_mask_by
        self.vae: VAE = context.plugin("vae")
        self.fixed, self.adds, self.place = context.fixed, context.declaration.added(), context.place("vae")
        self.marks = context.needed_later("denoiser")
        self.masked = not context.after or (self.marks and context.is_read("masked"))
        self.device = torch.device("cpu")
        self.loaded = False

    def shape(self, row: Mapping[str, Any], batch: pa.Table) -> tuple[int, ...]:
        """The shape of the latents of a row of this batch. Raises RowError."""
        return self.vae.spec.shape(row["height"], row["width"], frames_of(batch, self.vae.spec))

    def encode(self, part: pa.Table, shape: tuple[int, ...], slots: Tensor, size: int) -> tuple[pa.Table, Tensor]:
        """The rows with their latents, less those whose latents are not finite, and which those are, as bools ``[B]``."""
        from_noise = not {"latents", "image", "video"} & {*part.column_names}
        found = dict(zip(("latents", "latents_std"), self._latents(part, shape, slots, size)))
        if "latents_flipped" in self.adds:
            mirrored = self._latents(part, shape, slots, size, mirrored=True)
            found |= dict(zip(("latents_flipped", "latents_std_flipped"), mirrored))
        good = torch.stack([found[name].isfinite().flatten(1).all(1) for name in found]).all(0)
        if not bool(good.all()):
            part, slots = part.filter(pa.array(good.tolist())), slots[good]
            found = {name: values[good] for name, values in found.items()}
        if not len(part):
            return part, good
        if "mask" in part.column_names:
            part = self._with_mask(part, tuple(found["latents"].shape[-2:]), slots, size)
        for name in ("latents_std", "latents", "latents_flipped", "latents_std_flipped"):
            if name in SPACED and name in found:
                part = with_latents(part, found[name], self.vae.spec, name)
            elif name in found:
                part = tensors.with_tensor(part, name, found[name])
        if self.marks:
            part = part.append_column("from_noise", pa.array([from_noise] * len(part)))
        pictures = self.vae.spec.decoded
        if pictures in part.column_names:
            at = part.schema.get_field_index(pictures)
            if "source_image" in self.adds:
                part = part.set_column(at, part.schema.field(at).with_name("source_image"), part.column(at))
            else:
                part = part.remove_column(at)
        return part, good

    def _latents(
        self, part: pa.Table, shape: tuple[int, ...], slots: Tensor, size: int, mirrored: bool = False
    ) -> tuple[Tensor, ...]:
        """Latents and, if asked for, the posterior's standard deviation, both ``[B, C, h, w]``, on the CPU."""
        wanted = "latents_std" in self.adds
        if "latents" in part.column_names:
            latents = tensors.from_arrow(part, "latents")
            return (latents, torch.zeros_like(latents)) if wanted else (latents,)
        dtype = stored_dtype(self.vae.spec)
        if not {"image", "video"} & {*part.column_names}:
            zeros = torch.zeros(len(part), *shape, dtype=dtype)
            return (zeros, zeros) if wanted else (zeros,)
        if not self.loaded:
            with weights.reading(self.place):
                checks.load(self.vae, self.device)
            self.loaded = True
        images = self._images(part, slots, size)
        if mirrored:
            images = images.flip(-1)
        if not wanted:
            return (self._back(self._encoded(images), slots),)
        with checks.inside(self.vae):
            mean, std = self.vae.posterior(images)
        for values in (mean, std):
            checks.latents(self.vae, self.vae.spec, "posterior", values, images)
        return self._back(mean, slots), self._back(std, slots)

    def _encoded(self, images: Tensor) -> Tensor:
        with checks.inside(self.vae):
            latents = self.vae.encode(images)
        checks.latents(self.vae, self.vae.spec, "encode", latents, images)
        return latents

    def _back(self, values: Tensor, slots: Tensor) -> Tensor:
        """Those of ``values[size, ...]`` in these slots, as they are stored, on the CPU."""
        return values[tensors.send(slots, values.device)].to(stored_dtype(self.vae.spec)).cpu()

    def _images(self, part: pa.Table, slots: Tensor, size: int) -> Tensor:
        """Pictures ``[size, 3, H, W]``, or clips ``[size, 3, T, H, W]``, in [-1, 1], each in its slot."""
        images = tensors.spread(tensors.from_arrow(part, self.vae.spec.decoded), slots, size)
        images = tensors.send(images, self.device).movedim(-1, 1)
        images = images * 2.0 - 1.0 if images.is_floating_point() else images.to(torch.float32) / 127.5 - 1.0
        if self.grow_mask_by is None or "mask" not in part.column_names:
            return images
        mask = tensors.spread(self._of_picture(part).to(torch.float32).round(), slots, size)
        return images * (1 - tensors.send(mask, self.device))

    def _of_picture(self, part: pa.Table) -> Tensor:
        """Masks ``[B, 1, H, W]`` of the pictures' size: soft ones may have another."""
        mask, pictures = tensors.from_arrow(part, "mask")[:, None], self.vae.spec.decoded
        if not mask.is_floating_point() or pictures not in part.column_names:
            return mask
        return interpolate(mask, tensors.shape_of(part.schema.field(pictures))[-3:-1], mode="bilinear")

    def _with_mask(self, part: pa.Table, shape: tuple[int, ...], slots: Tensor, size: int) -> pa.Table:
        """The mask in the size of the latents, and, for a network that was trained for inpainting, ``masked``."""
        mask = tensors.from_arrow(part, "mask")[:, None]
        if self.grow_mask_by is not None:
            mask = grown(self._of_picture(part).to(torch.float32), self.grow_mask_by).to(mask.dtype)
        if mask.is_floating_point():  # a soft one is brought to the latents' size where they are denoised
            return tensors.with_tensor(part, "mask", mask)
        smaller = tensors.with_tensor(part, "mask", interpolate(mask, shape, mode="nearest"))
        if not self.masked:
            return smaller
        kept = tensors.send(tensors.spread(1 - mask, slots, size), self.device)
        masked = self._encoded(self._images(part, slots, size) * kept)
        return tensors.with_tensor(smaller, "masked", self._back(masked, slots))


def grown(mask: Tensor, by: int) -> Tensor:
    """``mask[B, 1, H, W]``, 0 or 1, with each part of it ``by - 1`` pixels longer and higher."""
    if by > 1:
        before = -(-(by - 1) // 2)
        mask = max_pool2d(pad(mask.round(), (before,) * 4), by, stride=1)[..., : mask.shape[-2], : mask.shape[-1]]
    return mask.round()


def stored_dtype(spec: LatentSpec) -> torch.dtype:
    """The torch dtype that ``spec.dtype`` names."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return dtype
