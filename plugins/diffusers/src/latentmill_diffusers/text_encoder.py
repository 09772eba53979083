"""The text encoders of diffusers' image models, through the pipelines' own ``encode_prompt``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from latentmill.plugin import Conditioning, TextEncoder
from latentmill_diffusers import lora
from latentmill_diffusers.families import Family, family_of
from latentmill_diffusers.folder import Folder, dtype_of
from latentmill_diffusers.lora import loras_of

SCORES = {False: 6.0, True: 2.5}
"""What SDXL's refiner is told of a picture's beauty, of those wanted and of those to be guided away from, as its pipeline does."""


class DiffusersTextEncoder(TextEncoder):
    """Tokenizers and text encoders of the model at ``path``, and nothing else of it.

    What a prompt becomes is what the model's pipeline makes of it: templates, lengths, layers, pooled embeddings, masks.
    An empty negative prompt is none: a model that has zeros for that gets them.

    ``clip_skip`` takes CLIP's output so many layers before its last; ``max_length`` is in tokens, where the pipeline lets one
    choose (its ``max_sequence_length``). ``loras`` are the denoiser's: some change text encoders, too.
    """

    contract = 1

    def __init__(
        self,
        path: str = "",
        revision: str | None = None,
        config: str | None = None,
        dtype: str = "float32",
        loras: Sequence[Mapping[str, Any]] = (),
        clip_skip: int | None = None,
        max_length: int | None = None,
    ) -> None:
        self.folder = Folder(path, revision, config)
        self.loras = loras_of(loras)
        self.asked = {"clip_skip": clip_skip, "max_sequence_length": max_length}
        self.asked = {name: value for name, value in self.asked.items() if value is not None}
        self.logical = dtype_of(dtype)
        self.family: Family = family_of(self.folder.pipeline)
        self.parts = [
            name for name in self.folder.index if name.startswith("text_encoder") and self.folder.class_of(name)
        ]
        for part in self.parts:
            self.folder.require_weights(part)
        self._pipeline: Any = None
        self._device = torch.device("cpu")

    def fingerprint(self) -> str:
        tokenizers = [name for name in self.folder.index if name.startswith("tokenizer") and self.folder.class_of(name)]
        return self.folder.fingerprint(*self.parts, *tokenizers) + lora.fingerprint(self.loras)

    def load(self, device: torch.device) -> None:
        self._pipeline = self.folder.load_pipeline(("text_encoder", "tokenizer"), self.logical)
        taken = inspect.signature(self._pipeline.encode_prompt).parameters
        for asked in self.asked:
            if asked not in taken:
                name = "max_length" if asked == "max_sequence_length" else asked
                raise ValueError(f"text_encoder.{name}: {self.folder.pipeline} has no {asked}")
        unet = self.folder.config("unet") if self.family.network == "unet" else None
        for part in self.parts:
            encoder = getattr(self._pipeline, part)
            if hasattr(encoder, "final_layer_norm"):  # transformers 5 has it here, and clip_skip looks for it inside
                encoder.__dict__["text_model"] = encoder
            lora.fuse(encoder, part, self._pipeline, self.loras, unet)
        self._pipeline.to(device)
        self._device = device

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return self._all(prompts, negative=False)

    def encode_negative(self, prompts: Sequence[str]) -> Conditioning:
        negative = any("-" in returned for returned in self.family.encoded)
        encoded = self._all(prompts, negative)
        if self.folder.index.get("force_zeros_for_empty_prompt"):
            told = torch.tensor([prompt != "" for prompt in prompts], device=self._device)
            for name in ("embeds", "pooled"):
                encoded[name] = encoded[name] * told.reshape(-1, *(1 for _ in encoded[name].shape[1:]))
        return encoded

    def _all(self, prompts: Sequence[str], negative: bool) -> Conditioning:
        if not self.family.pad:
            encoded = self._encoded(list(prompts), negative)
            if self.folder.index.get("requires_aesthetics_score"):
                encoded["score"] = torch.full((len(prompts),), SCORES[negative])
            return encoded
        each = [self._encoded([prompt], negative)["embeds"] for prompt in prompts]
        embeds, longest = [found[0] for found in each], self.asked.get("max_sequence_length", self.family.pad)
        return {
            "embeds": torch.stack([pad(value, (0, 0, 0, longest - len(value))) for value in embeds]),
            "length": torch.tensor([len(value) for value in embeds]),
        }

    def _encoded(self, prompts: list[str], negative: bool) -> Conditioning:
        conditioning: Conditioning = {}
        for returned, more in zip(self.family.encoded, self.family.with_each):
            arguments = {**self._defaults(), **more, **self.asked, "device": self._device}
            arguments |= (
                {"prompt": [""] * len(prompts), "negative_prompt": prompts} if negative else {"prompt": prompts}
            )
            arguments["do_classifier_free_guidance"] = negative
            known = inspect.signature(self._pipeline.encode_prompt).parameters
            found = self._pipeline.encode_prompt(**{name: value for name, value in arguments.items() if name in known})
            for name, value in zip(returned.split(), found, strict=True):
                if name.startswith("-") == negative and name != "_":
                    conditioning[name.removeprefix("-")] = value
        return conditioning

    def _defaults(self) -> dict[str, Any]:
        """What the pipeline's own call hands to ``encode_prompt`` if nobody says otherwise."""
        given = inspect.signature(type(self._pipeline).__call__).parameters
        taken = inspect.signature(self._pipeline.encode_prompt).parameters
        told = {name: given[name].default for name in taken if name in given}
        required = {name: None for name, p in taken.items() if p.default is p.empty}
        return required | {name: value for name, value in told.items() if value not in (None, inspect.Parameter.empty)}
