"""The text encoders of diffusers' image models, through the pipelines' own ``encode_prompt``."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property, lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Annotated, Any

import torch
from torch.nn.functional import pad

from latentmill.plugin import Conditioning, RowError, TensorSpec, TextEncoder, WeightsPath
from latentmill.text import one_line
from latentmill_diffusers import lora, tokens
from latentmill_diffusers.configs import completed
from latentmill_diffusers.families import Family, family_of
from latentmill_diffusers.folder import (
    LOCATION,
    Folder,
    pipeline_class,
    require_layers,
)
from latentmill_diffusers.hub import weights_of
from latentmill_diffusers.loading import CAPTION_CLEANERS, dtype_of, part_class
from latentmill_diffusers.lora import loras_of
from latentmill_diffusers.messages import quiet

SCORES = {False: 6.0, True: 2.5}
"""What SDXL's refiner is told of a picture's beauty, of those wanted and of those to be guided away from, as its pipeline does."""
COMPEL = {
    "StableDiffusionPipeline": "CompelForSD",
    "LatentConsistencyModelPipeline": "CompelForSD",
    "StableDiffusionXLPipeline": "CompelForSDXL",
    "FluxPipeline": "CompelForFlux",
}
"""What compel calls its classes, by pipeline."""
COMPEL_READERS = ("compel", "compel_1", "compel_2")
"""What its classes call those that read a prompt, one for each text encoder."""


class DiffusersTextEncoder(TextEncoder):
    """Tokenizers and text encoders of the model at ``path``, and nothing else of it.

    What a prompt becomes is what the model's pipeline makes of it: templates, lengths, layers, pooled embeddings, masks.
    So it is of the negative prompt of a row that gives none: an empty one, or zeros (SDXL's ``force_zeros_for_empty_prompt``).

    ``clip_skip`` takes CLIP's output so many layers before its last; ``max_length`` is in tokens, where the pipeline lets one
    choose (its ``max_sequence_length``). ``loras`` are the denoiser's: some change text encoders, too.
    ``quantization`` is what transformers' quantisers take, as the denoiser's. ``long_prompts`` says what becomes of a prompt of
    which some is read by no text encoder: ``cut``, with a warning in its row, or ``error``.

    ``compel`` reads prompts in the syntax of that library, with weights: ``a (red fox)1.3 in the snow--``. Of CLIP's models
    ``max_length`` is then how many tokens every prompt comes to, 77 or a multiple: prompts are encoded in pieces of 77, split
    between sentences, and shorter ones are filled up with the encoding of an empty prompt.
    """

    contract = 2
    fingerprinted = (*LOCATION, "loras")

    def __init__(
        self,
        path: Annotated[str, weights_of("text_encoder")] = "",
        revision: str | None = None,
        config: Annotated[str | None, weights_of()] = None,
        dtype: str = "float32",
        loras: Annotated[Sequence[Mapping[str, Any]], WeightsPath()] = (),
        clip_skip: int | None = None,
        max_length: int | None = None,
        compel: bool = False,
        quantization: Mapping[str, Any] | None = None,
        long_prompts: str = "cut",
    ) -> None:
        self.folder = Folder(path, revision, config)
        self.loras = loras_of(loras)
        asked = {"clip_skip": clip_skip, "max_sequence_length": max_length}
        self.asked = {name: value for name, value in asked.items() if value is not None}
        self.logical = dtype_of(dtype)
        self.family: Family = family_of(self.folder.pipeline)
        self.cls = pipeline_class(self.folder)
        self.parts = [
            name for name in self.folder.index if name.startswith("text_encoder") and self.folder.class_of(name)
        ]
        for part in self.parts:
            self.folder.require_weights(part)
        for name in self.folder.index:
            if name.startswith("tokenizer") and (found := self.folder.class_of(name)):
                part_class(*found)  # which some are only if a package is there
        if max_length is not None and (
            isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1
        ):
            raise ValueError(f"text_encoder.max_length must be a whole number from 1, not {max_length!r}")
        taken, called = (inspect.signature(of).parameters for of in (self.cls.encode_prompt, self.cls.__call__))
        for setting in self.asked if not compel else ():
            if (
                setting not in taken or setting not in called
            ):  # what a pipeline lets nobody choose is another for each of its encoders
                name = "max_length" if setting == "max_sequence_length" else setting
                raise ValueError(f"text_encoder.{name}: {self.folder.pipeline} has no {setting}")
        require_layers(self.folder, clip_skip)
        self.compel = compel
        if compel:
            self._require_compel(clip_skip, max_length)
        self.reads = {"lora": "name the file in model.loras, for all rows"}
        if self.folder.pipeline in COMPEL:
            weights = (
                "compel, which is on, has it as (word)1.2" if compel else "text_encoder.compel=true reads (word)1.2"
            )
            written = None if compel else "text_encoder.compel=true reads it"
            self.reads |= {"weight": weights, "emphasis": weights, "compel": written}
        self._compel: Any = None
        self.options = self.folder.quantization(quantization, "transformers")
        if long_prompts not in ("cut", "error"):
            raise ValueError(f"text_encoder.long_prompts must be cut or error, not {long_prompts!r}")
        self.long_prompts = long_prompts
        cleaners = CAPTION_CLEANERS if "clean_caption" in taken else ()
        self.libraries = ("diffusers", "tokenizers", "transformers", *cleaners, *self.folder.quantizer(quantization))
        self._pipeline: Any = None
        self._device = torch.device("cpu")

    def fingerprint(self) -> str:
        tokenizers = [name for name in self.folder.index if name.startswith("tokenizer") and self.folder.class_of(name)]
        made_by = f" compel {version('compel')}" if self.compel else ""
        return self.folder.fingerprint(*self.parts, *tokenizers) + lora.fingerprint(self.loras) + made_by

    def _require_compel(self, clip_skip: int | None, max_length: int | None) -> None:
        name = self.folder.pipeline
        if find_spec("compel") is None:
            raise ValueError("text_encoder.compel needs the library of that name: pip install compel")
        if name not in COMPEL:
            raise ValueError(f"text_encoder.compel: {name} is not among what it knows: {', '.join(COMPEL)}")
        if clip_skip is not None:
            raise ValueError("text_encoder.clip_skip and compel exclude each other")
        if max_length is not None and (name == "FluxPipeline" or max_length < 77 or max_length % 77):
            expected = "nothing: T5's is fixed" if name == "FluxPipeline" else "77 or a multiple"
            raise ValueError(f"text_encoder.max_length with compel: expected {expected}, not {max_length}")

    def load(self, device: torch.device) -> None:
        self._pipeline = self._with_network_s_config(self.folder.load_pipeline(self.logical, **self.options))
        unet = self.folder.config("unet") if self.family.network == "unet" else None
        for part in self.parts:
            encoder = getattr(self._pipeline, part)
            if hasattr(encoder, "final_layer_norm"):  # transformers 5 has it here, and clip_skip looks for it inside
                encoder.__dict__["text_model"] = encoder
            lora.fuse(encoder, part, self._pipeline, self.loras, unet)
        self._pipeline.to(device)
        self._device = device
        if self.compel:
            self._compel = self._compel_of(self._pipeline)
            self._nothing = self._compel("").embeds

    def _with_network_s_config(self, pipeline: Any) -> Any:
        """Without a T5 Stable Diffusion 3's pipeline asks the network's config how wide the zeros in its place are."""
        network = self.family.network
        if getattr(pipeline, network, None) is None and (cls := self.folder.class_of(network)):
            config = completed(part_class(*cls), self.folder.config(network))
            setattr(pipeline, network, SimpleNamespace(config=SimpleNamespace(**config)))
        return pipeline

    def warn(self, prompt: str) -> str:
        return self._cut(prompt)[0]

    def _cut(self, prompt: str) -> tuple[str, bool]:
        """What to say of a prompt that is too long, if it is, and whether some of it is read by no text encoder."""
        if not self.compel:
            if prompt.isascii() and len(prompt) <= self._room:  # a token has a character or more
                return "", False
            return tokens.warning_of(self._read(prompt), prompt)
        readers = [getattr(self._reading, name) for name in COMPEL_READERS[1:] if hasattr(self._reading, name)]
        with quiet(self._silent):
            return tokens.warning_of([each for reader in readers for each in _cut_by_compel(reader, prompt)], prompt)

    def _read(self, prompt: str) -> list[tokens.Tokenized]:
        self._watched.seen.clear()
        with torch.inference_mode():
            self._reader._encoded([prompt], negative=False)
        most = self._reader._defaults().get("max_sequence_length")
        return self._watched.given(self.asked.get("max_sequence_length", most))

    @cached_property
    def _room(self) -> float:
        """Characters that a prompt may have, if all are ASCII, and surely not be too long."""
        return min((t.limit - t.tokens for t in self._read("")), default=math.inf) - 8  # of those that end it

    @cached_property
    def _watched(self) -> tokens.Watched:
        return tokens.without_weights(self.folder, self.parts, self.logical)

    @cached_property
    def _reader(self) -> DiffusersTextEncoder:
        """A copy that encodes without weights, with a pipeline of its own: what encodes is not to be touched."""
        reader = copy(self)
        reader._device = torch.device("cpu")
        if self.compel:
            reader._compel, reader._nothing = self._reading, self._reading("").embeds
        else:
            reader._pipeline = self._with_network_s_config(self._watched.pipeline)
        return reader

    def conditioning_spec(self) -> Mapping[str, TensorSpec]:
        """Of what the pipeline makes of an empty prompt where text encoders answer with zeros."""
        with torch.inference_mode():
            found = self._reader._all([""], negative=False)
        return {name: TensorSpec.of(value[0]) for name, value in found.items()}

    def check(self, prompt: str) -> None:
        if self.compel:
            self._check_compel(prompt)
        if self.long_prompts == "error":
            text, lost = self._cut(prompt)
            if lost:
                raise RowError(text)

    def _check_compel(self, prompt: str) -> None:
        reader = self._reader_of_compel
        try:
            count = _tokens(reader, prompt)
        except Exception as error:  # compel's own, and pyparsing's
            raise RowError(f"compel can't read the prompt {prompt!r}: {one_line(error)}") from error
        if count > self._length:
            raise RowError(f"a prompt of {count} tokens, by pieces of {self._piece}, and max_length is {self._length}")

    @cached_property
    def _silent(self) -> Any:
        """A pipeline without weights, for compel to read prompts with."""
        return tokens.without_weights(self.folder, self.parts, self.logical).pipeline

    @cached_property
    def _reading(self) -> Any:
        """compel, to ask what it reads of a prompt; it encodes nothing."""
        return self._compel_of(self._silent)

    def _compel_of(self, pipeline: Any) -> Any:
        import compel

        made = getattr(compel, COMPEL[self.folder.pipeline])(pipeline)
        for name in COMPEL_READERS:
            if hasattr(made, name):
                getattr(made, name).parse_prompt_string = _parsed
        return made

    @property
    def _reader_of_compel(self) -> Any:
        return self._reading.compel if hasattr(self._reading, "compel") else self._reading.compel_2

    @property
    def _piece(self) -> int:
        """Tokens that compel encodes at a time."""
        return int(self._reader_of_compel.conditioning_provider.max_token_count)

    @property
    def _length(self) -> int:
        """Tokens that a prompt comes to by compel."""
        return self.asked.get("max_sequence_length") or self._piece

    @cached_property
    def _index(self) -> dict[str, Any]:
        """The model's index, with the pipeline's defaults for what an old one leaves out."""
        return completed(self.cls, self.folder.index)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return self._all(prompts, negative=False)

    def encode_negative(self, prompts: Sequence[str | None]) -> Conditioning:
        negative = any("-" in returned for returned in self.family.encoded)
        encoded = self._all([prompt or "" for prompt in prompts], negative)
        if self._index.get("force_zeros_for_empty_prompt"):
            none = torch.tensor([prompt is None for prompt in prompts], device=self._device)
            for name in ("embeds", "pooled"):
                encoded[name] = encoded[name].masked_fill(none.reshape(-1, *(1 for _ in encoded[name].shape[1:])), 0)
        return encoded

    def _all(self, prompts: Sequence[str], negative: bool) -> Conditioning:
        if self._compel is not None:
            return self._weighted(prompts)
        if not self.family.pad:
            encoded = self._encoded(list(prompts), negative)
            if self._index.get("requires_aesthetics_score"):
                encoded["score"] = torch.full((len(prompts),), SCORES[negative])
            return encoded
        each = [self._encoded([prompt], negative)["embeds"] for prompt in prompts]
        embeds, longest = [found[0] for found in each], self.asked.get("max_sequence_length", self.family.pad)
        longest = -(-longest // self.family.pad_to) * self.family.pad_to
        if (most := max(map(len, embeds))) > longest:
            raise ValueError(f"{self.folder.pipeline} makes {most} tokens of a prompt, where {longest} are the most")
        return {
            "embeds": torch.stack([pad(value, (0, 0, 0, longest - len(value))) for value in embeds]),
            "length": torch.tensor([len(value) for value in embeds]),
        }

    def _weighted(self, prompts: Sequence[str]) -> Conditioning:
        """Each alone: compel fills a prompt up to the longest of its company."""
        each = [self._compel(prompt) for prompt in prompts]
        pieces = self._length // len(self._nothing[0])
        filled = [torch.cat([one.embeds, *[self._nothing] * pieces], 1)[:, : self._length] for one in each]
        encoded = {"embeds": torch.cat(filled)}
        if each[0].pooled_embeds is not None:
            encoded["pooled"] = torch.cat([one.pooled_embeds for one in each])
        return encoded

    def _encoded(self, prompts: list[str], negative: bool) -> Conditioning:
        conditioning: Conditioning = {}
        for returned, more in zip(self.family.encoded, self.family.with_each):
            arguments = {**self._defaults(), **more, **self.asked, "device": self._device}
            arguments |= (
                {"prompt": [""] * len(prompts), "negative_prompt": prompts} if negative else {"prompt": prompts}
            )
            arguments["do_classifier_free_guidance"] = negative
            known = inspect.signature(self._pipeline.encode_prompt).parameters
            with quiet(self._pipeline):
                found = self._pipeline.encode_prompt(**{n: value for n, value in arguments.items() if n in known})
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


@lru_cache(maxsize=256)
def _parsed(prompt: str) -> Any:
    """What compel makes of a prompt, which nobody may change. It takes a second for a few hundred words, and several ask."""
    from compel import Compel

    return Compel.parse_prompt_string(prompt)


def _cut_by_compel(reader: Any, prompt: str) -> Iterator[tokens.Tokenized]:
    """The pieces of a prompt that are cut off each for itself, as compel does it for FLUX.1; none where it makes more pieces."""
    provider = reader.conditioning_provider
    if provider.truncate_to_model_max_length:
        ends = len(provider.bos_sequence) + len(provider.eos_sequence)
        for part in _parsed(prompt).prompts:
            for blended in getattr(part, "prompts", [part]):
                texts = [child.text for child in blended.children]
                ids = provider.get_token_ids(texts, include_start_and_end_markers=False, truncation_override=False)
                yield tokens.Tokenized(prompt, sum(map(len, ids)) + ends, provider.max_token_count)


def _tokens(reader: Any, prompt: str) -> int:
    """How many tokens a prompt comes to, with those that its pieces are filled up with. Raises what compel does."""
    total = 0
    for part in _parsed(prompt).prompts:
        lengths = []
        for blended in getattr(part, "prompts", [part]):
            if blended.wants_cross_attention_control:
                raise ValueError(".swap() changes attention inside the network, which no job does")
            texts = [child.text for child in blended.children]
            ids, *_ = reader.conditioning_provider.get_token_ids_and_expand_weights(texts, [1.0] * len(texts), "cpu")
            lengths.append(len(ids))
        total += max(lengths)
    return total
