"""The encode stage: prompts to conditioning, pictures to latents, and an empty latent for a row that has neither."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from latentmill import checks, syntax, tensors, weights
from latentmill.batch import (
    NEGATIVE_PREFIX,
    PROMPT_PREFIX,
    SCHEDULER_KEY,
    FixedShape,
    fixed_slots,
    frames_of,
    with_latents,
    with_warnings,
)
from latentmill.errors import NoRowError
from latentmill.plugin import VAE, Conditioning, LatentSpec, Reject, RowError, Stage, TextEncoder


class Encode(Stage):
    """Adds ``latents``, and ``prompt:*`` and ``negative:*`` where there is a text encoder.

    A picture becomes the mean of the VAE's posterior. A row without picture and latents starts from an empty latent of
    its width and height. What of a prompt the encoder will not read becomes the row's warning. ``keep_image`` passes the picture on as ``source_image``, to measure a reconstruction against;
    ``latents_std`` adds the posterior's standard deviation, which is 0 where there was no picture.
    """

    contract = 2

    def __init__(
        self,
        vae: VAE,
        text_encoder: TextEncoder | None,
        fixed: FixedShape | None = None,
        keep_image: bool = False,
        latents_std: bool = False,
    ) -> None:
        self.vae, self.text_encoder, self.fixed, self.keep_image = vae, text_encoder, fixed, keep_image
        self.latents_std = latents_std
        self.device = torch.device("cpu")
        self.vae_loaded = False
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of the conditioning, by name, as the text encoder's first call made it."""

    def load(self, device: torch.device) -> None:
        self.device = device
        if self.text_encoder is not None:
            with weights.reading("text_encoder"):
                checks.load(self.text_encoder, device)

    @torch.inference_mode()
    def __call__(self, batch: pa.Table, reject: Reject) -> Iterator[pa.Table]:
        groups = defaultdict(list)
        warnings: list[Sequence[str]] = [()] * len(batch)
        told: dict[str | None, list[str]] = {None: []}
        frames = frames_of(batch, self.vae.spec)
        own = [field.name for field in self.text_encoder.row_fields] if self.text_encoder is not None else []
        columns = ["prompt", "negative_prompt", "scheduler", "width", "height", *own]
        for i, row in enumerate(batch.select(columns).to_pylist()):
            try:
                if self.text_encoder is not None:
                    with checks.inside(self.text_encoder):
                        self.text_encoder.check(row["prompt"])
                        if row["negative_prompt"] is not None:
                            self.text_encoder.check(row["negative_prompt"])
                        for name in ("prompt", "negative_prompt"):
                            if row[name] not in told:  # samples of one prompt stand side by side
                                told[row[name]] = of_prompt(self.text_encoder, row[name])
                    negative = [f"negative_prompt: {text}" for text in told[row["negative_prompt"]]]
                    warnings[i] = [*told[row["prompt"]], *negative]
                shape = self.vae.spec.shape(row["height"], row["width"], frames)
                scheduler = row["scheduler"] if self.text_encoder is not None else ""
                groups[shape, scheduler, tuple(row[name] for name in own)].append(i)
            except RowError as error:
                reject(i, str(error))
        if any(warnings):
            batch = with_warnings(batch, warnings)
        good_rows, wrong_rows = 0, dict[int, str]()
        for (shape, scheduler, _), members in groups.items():
            part = batch if len(members) == len(batch) else batch.take(members)
            slots, size = fixed_slots(part, self.fixed)
            latents, std = self._latents(part, shape, slots, size)
            good = latents.isfinite().flatten(1).all(1).tolist()
            for i, fine in zip(members, good):
                if not fine:
                    wrong_rows[i] = "the VAE's latents of this picture are not finite"
            if not all(good):
                kept = torch.tensor(good)
                part, slots = part.filter(pa.array(good)), slots[kept]
                latents, std = latents[kept], std[kept]
                members = [i for i, fine in zip(members, good) if fine]
            if len(part):
                if "mask" in part.column_names:
                    part = self._with_mask(part, tuple(latents.shape[-2:]), slots, size)
                if self.latents_std:
                    part = tensors.with_tensor(part, "latents_std", std)
                part = self._with_text(with_latents(part, latents, self.vae.spec), slots, size)
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

    def _latents(self, part: pa.Table, shape: tuple[int, ...], slots: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Latents and the posterior's standard deviation, both ``[B, C, h, w]``; the latter is made only if asked for."""
        if "latents" in part.column_names:
            latents = tensors.from_arrow(part, "latents")
            return latents, torch.zeros_like(latents)
        if not {"image", "video"} & {*part.column_names}:
            return (torch.zeros(len(part), *shape, dtype=stored_dtype(self.vae.spec)),) * 2
        if not self.vae_loaded:  # a text-to-image job's encode workers never need the VAE's weights
            with weights.reading("vae"):
                checks.load(self.vae, self.device)
            self.vae_loaded = True
        images = self._images(part, slots, size)
        if not self.latents_std:
            mean = std = self._encoded(images)
        else:
            with checks.inside(self.vae):
                mean, std = self.vae.posterior(images)
            for values in (mean, std):
                checks.latents(self.vae, self.vae.spec, "posterior", values, images)
        mean, std = (values[slots].to(stored_dtype(self.vae.spec)) for values in (mean, std))
        return mean, std

    def _encoded(self, images: Tensor) -> Tensor:
        with checks.inside(self.vae):
            latents = self.vae.encode(images)
        checks.latents(self.vae, self.vae.spec, "encode", latents, images)
        return latents

    def _images(self, part: pa.Table, slots: Tensor, size: int) -> Tensor:
        """Pictures ``[size, 3, H, W]``, or clips ``[size, 3, T, H, W]``, in [-1, 1], each in its slot."""
        images = tensors.spread(tensors.from_arrow(part, self.vae.spec.decoded), slots, size).to(self.device)
        return images.movedim(-1, 1).to(torch.float32) / 127.5 - 1.0

    def _with_mask(self, part: pa.Table, shape: tuple[int, ...], slots: Tensor, size: int) -> pa.Table:
        """The mask in the size of the latents, and ``masked``: what a network that was trained for inpainting is told."""
        mask = tensors.from_arrow(part, "mask")[:, None]
        kept = tensors.spread(1 - mask, slots, size).to(self.device)
        masked = self._encoded(self._images(part, slots, size) * kept)[slots].to(stored_dtype(self.vae.spec))
        part = tensors.with_tensor(part, "mask", interpolate(mask, shape, mode="nearest"))
        return tensors.with_tensor(part, "masked", masked)

    def _with_text(self, part: pa.Table, slots: Tensor, size: int) -> pa.Table:
        pictures = self.vae.spec.decoded
        if pictures in part.column_names:
            at = part.schema.get_field_index(pictures)
            if self.keep_image:
                part = part.set_column(at, part.schema.field(at).with_name("source_image"), part.column(at))
            else:
                part = part.remove_column(at)
        if self.text_encoder is None:
            return part
        encoder = self.text_encoder
        told = {
            field.name: part.column(field.name)[0].as_py() for field in encoder.row_fields
        }  # one for all: see groups

        def checked(method: str, texts: Sequence[str]) -> Conditioning:
            with checks.inside(encoder):
                found = getattr(encoder, method)(texts, **told)
            return checks.conditioning(encoder, method, found, len(texts), self.shapes)

        for prefix, column, encode in (
            (PROMPT_PREFIX, "prompt", partial(checked, "encode")),
            (NEGATIVE_PREFIX, "negative_prompt", partial(checked, "encode_negative")),
        ):
            texts = part.column(column).to_pylist()
            for name, tensor in self._conditioning(encode, texts, slots, size).items():
                part = tensors.with_tensor(part, prefix + name, tensor)
        return part

    def _conditioning(
        self, encode: Callable[[Sequence[Any]], Conditioning], prompts: Sequence[str | None], slots: Tensor, size: int
    ) -> Conditioning:
        if self.fixed is not None:
            padded: list[str | None] = [""] * size
            for slot, prompt in zip(slots.tolist(), prompts):
                padded[slot] = prompt
            return {name: tensor[slots] for name, tensor in encode(padded).items()}
        # Samples of one prompt stand side by side and negative prompts are mostly empty: encode each text once.
        unique = list(dict.fromkeys(prompts))
        index = {prompt: i for i, prompt in enumerate(unique)}
        order = torch.tensor([index[prompt] for prompt in prompts])
        return {name: tensor.cpu()[order] for name, tensor in encode(unique).items()}


def of_prompt(encoder: TextEncoder, prompt: str) -> list[str]:
    """What of a prompt the encoder will not read as it is meant."""
    return [*syntax.told(prompt, encoder.reads), *filter(None, [encoder.warn(prompt)])]


def not_finite(part: pa.Table) -> dict[int, str]:
    """Rows whose conditioning has NaN or infinity in it, with the reason: no picture that is made of it would be right."""
    wrong: dict[int, str] = {}
    for prefix, prompt in ((PROMPT_PREFIX, "prompt"), (NEGATIVE_PREFIX, "negative prompt")):
        for column in part.column_names:
            if column.startswith(prefix):
                fine = tensors.from_arrow(part, column).reshape(len(part), -1).isfinite().all(1)
                for k in (~fine).nonzero()[:, 0].tolist():
                    wrong.setdefault(
                        k, f"the text encoder's {column.removeprefix(prefix)} of the {prompt} are not finite"
                    )
    return wrong


def stored_dtype(spec: LatentSpec) -> torch.dtype:
    """The torch dtype that ``spec.dtype`` names."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return dtype
