"""What a pipeline's tokenizers cut off a prompt: they are watched while its own ``encode_prompt`` runs, with or without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentmill_diffusers.folder import Folder
from latentmill_diffusers.loading import part_class


@dataclass(frozen=True)
class Tokenized:
    """A text that was tokenized where the rest is cut off."""

    text: str
    tokens: int
    """As many as it has, with what begins and ends it."""
    limit: int
    """As many as the encoder is given."""


class Watched:
    """A pipeline whose tokenizers note, in ``seen``, what they are given and how long it is."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.seen: list[Tokenized] = []
        # Qwen-Image cuts off once more, behind its template, what its tokenizer left.
        self.behind = pipeline.prompt_template_encode_start_idx if _named(pipeline, "QwenImage") else None
        for name, part in pipeline.components.items():
            if name.startswith("tokenizer") and part is not None:
                _watch(part if hasattr(part, "model_max_length") else part.tokenizer, self.seen)

    def given(self, most: int | None) -> list[Tokenized]:
        """What was encoded just now; ``most`` is the pipeline's ``max_sequence_length``."""
        if self.behind is None or most is None:
            return list(self.seen)
        return [Tokenized(t.text, t.tokens, min(t.limit, most + self.behind)) for t in self.seen]


def warning_of(seen: Sequence[Tokenized], prompt: str) -> tuple[str, bool]:
    """What to say of a prompt that was tokenized so, "" if nothing; and whether some of it is read by no text encoder."""
    cut = [each for each in seen if each.tokens > each.limit]
    if not cut:
        return "", False
    lost, limit = len(cut) == len(seen), max(each.limit for each in cut)
    more = ", with what the pipeline adds to it," if min(len(each.text) for each in seen) > len(prompt) + 8 else ""
    which, rest = (
        ("the text encoder", "the rest is cut off")
        if lost
        else ("one text encoder of the model", "another of them reads more")
    )
    return f"the prompt{more} is longer than the {limit} tokens that {which} reads: {rest}", lost


def _named(pipeline: Any, name: str) -> bool:
    return type(pipeline).__name__.startswith(name) and hasattr(pipeline, "prompt_template_encode_start_idx")


def _watch(tokenizer: Any, seen: list[Tokenized]) -> None:
    """Make a tokenizer note what it cuts off. Its class is replaced, since templates call it by that."""
    cls = type(tokenizer)

    def call(self: Any, text: Any, *args: Any, **named: Any) -> Any:
        if named.get("truncation"):
            limit = int(named.get("max_length") or self.model_max_length)
            special = named.get("add_special_tokens", True)
            for one in [text] if isinstance(text, str) else text:
                tokens = len(cls.__call__(self, one, add_special_tokens=special, verbose=False)["input_ids"])
                seen.append(Tokenized(one, tokens, limit))
        return cls.__call__(self, text, *args, **named)

    tokenizer.__class__ = type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


class Silent(nn.Module):
    """Stands in a pipeline for a text encoder, and answers with zeros in the shapes that it would."""

    def __init__(self, folder: Folder, part: str, dtype: torch.dtype) -> None:
        super().__init__()
        cls = part_class(*(folder.class_of(part) or ("", "")))
        self.config = cls.config_class.from_pretrained(folder / part)
        self.projected = "Projection" in cls.__name__
        self.tokens_first = cls.__name__ == "ChatGLMModel"
        self.dtype, self.device = dtype, torch.device("cpu")

    @property
    def text_model(self) -> Any:
        """For pipelines that normalise the output of a layer that is not the last."""
        return self

    def final_layer_norm(self, x: Tensor) -> Tensor:
        return x

    def forward(self, input_ids: Tensor | None = None, *args: Any, **named: Any) -> _Said:
        return _Said(self, input_ids, bool(named.get("output_hidden_states")))


class _Said:
    """What transformers' models return, of zeros that take no memory."""

    def __init__(self, encoder: Silent, ids: Any, hidden: bool) -> None:
        config = getattr(encoder.config, "text_config", None) or encoder.config
        width = int(getattr(config, "d_model", None) or config.hidden_size)
        layers = int(getattr(config, "num_hidden_layers", None) or config.num_layers)
        nothing = torch.zeros((), dtype=encoder.dtype)
        tokens = ids.T if encoder.tokens_first else ids
        self.last_hidden_state = nothing.expand(*tokens.shape, width)
        self.hidden_states = (self.last_hidden_state,) * (layers + 1)
        self.all: tuple[Any, ...]
        if encoder.projected:  # compel takes the other one where there is one
            self.text_embeds = nothing.expand(len(ids), getattr(config, "projection_dim", None) or width)
            self.all = (self.text_embeds, self.last_hidden_state)
        else:
            self.pooler_output = nothing.expand(len(ids), width)
            self.all = (self.last_hidden_state, self.pooler_output)
        self.all += (self.hidden_states,) * hidden  # where clip_skip looks for them

    def __getitem__(self, at: int) -> Any:
        return self.all[at]


def without_weights(folder: Folder, parts: Sequence[str], dtype: torch.dtype) -> Watched:
    """A model's pipeline that encodes prompts without weights, to see what its tokenizers cut off."""
    pipeline = folder.load_pipeline(dtype, encoders=False)
    for part in parts:
        pipeline.__dict__[part] = Silent(folder, part, dtype)  # diffusers would look for a place of its class
    return Watched(pipeline)
