"""CLIP's and T5's networks, by transformers, with tokens that are vectors and a weight for each, as ComfyUI runs them.

Weights are kept in the dtype that they come in, and all is computed in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from latentmill.plugin import tensors
from latentmill_comfy.tokens import Chunks, TokenChunk, weighs

HEAD_CHANNELS = 64
"""Channels of each of CLIP's heads."""


class KeptLinear(nn.Module):
    """A linear layer whose weights are kept in one dtype and used in float32. ``scale`` is what those of an fp8 file are times."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("kept", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("scale", scale)

    @property
    def weight(self) -> Tensor:
        kept: Tensor = self.get_buffer("kept").to(torch.float32)
        return kept if self.scale is None else kept * self.get_buffer("scale")

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, None if self.bias is None else self.get_buffer("bias").to(torch.float32))


class TextNetwork(ABC):
    """One text encoder's. ``state`` has its tensors, named as transformers does."""

    embedding_name: str

    def __init__(self, key: str, state: Mapping[str, Tensor]) -> None:
        self.key, self.device = key, torch.device("cpu")
        self.words = state[self.embedding_name]
        self.model = self._built(state)
        self.layers = self._layers()
        _fill(self.model, state, key)
        self.model.eval().requires_grad_(False)

    @abstractmethod
    def _built(self, state: Mapping[str, Tensor]) -> nn.Module:
        """The network on the meta device, with sizes out of the tensors' shapes."""

    @abstractmethod
    def _layers(self) -> int:
        """How many layers it has."""

    @abstractmethod
    def _run(self, embedded: Tensor, layer: int | None, norm: bool) -> tuple[Tensor, Tensor]:
        """What comes of ``embedded[n, L, width]``: the hidden states asked for, and the last layer's, normed."""

    def to(self, device: torch.device) -> None:
        self.device, self.words = device, self.words.to(device)
        self.model.to(device)

    @property
    def width(self) -> int:
        return int(self.words.shape[1])

    def encode(
        self, chunks: Sequence[TokenChunk], reader: Chunks, layer: int | None, norm: bool
    ) -> tuple[Tensor, Tensor]:
        """Hidden states ``[n * L, width]`` of a prompt's chunks one behind the other, and the first one's pooled ``[P]``.

        ``layer`` counts from 0, from the end if it is below; None, or one that there is not: the last, normed. ``norm``: whether another one is.
        A token with a weight is moved that much further away from what stands there in an empty prompt of the same length.
        """
        if layer is not None and abs(layer) > self.layers:
            layer = None
        numbers: list[Sequence[int | Tensor]] = [[token for token, _ in chunk] for chunk in chunks]
        weighed = weighs(chunks) or not chunks
        if weighed:
            numbers.append(reader.empty(max(map(len, chunks), default=0)))
        embedded, ends = zip(*(self._embedded(each, reader) for each in numbers))
        hidden, last = self._run(torch.stack(embedded), layer, norm)
        pooled = self._pooled(last[0, ends[0]])
        if not chunks:
            return hidden[-1], pooled
        if weighed:
            weights = tensors.send(torch.tensor([[w for _, w in chunk] for chunk in chunks]), self.device)[:, :, None]
            moved = (hidden[:-1] - hidden[-1:]) * weights + hidden[-1:]
            hidden = torch.where(weights == 1, hidden[:-1], moved)
        return hidden.flatten(0, 1), pooled

    def _pooled(self, hidden: Tensor) -> Tensor:
        return hidden

    def _embedded(self, tokens: Sequence[int | Tensor], reader: Chunks) -> tuple[Tensor, int]:
        """``[L, width]``, float32, and where the chunk's words end. Vectors of other widths are left out, and make room for padding."""
        fitting = [token for token in tokens if isinstance(token, int) or token.shape[-1] == self.width]
        numbers = [token if isinstance(token, int) else reader.pad for token in fitting]
        numbers += [reader.pad] * (len(tokens) - len(fitting))
        found = self._looked_up(torch.tensor(numbers, device=self.device))
        plain = [token for token in fitting if isinstance(token, int)]
        ends = plain.index(reader.end) if reader.end in plain else len(plain) - 1
        for at, token in enumerate(fitting):
            if not isinstance(token, int):
                found[at] = tensors.send(token, self.device)
        return found, ends + len(fitting) - len(plain)

    def _looked_up(self, numbers: Tensor) -> Tensor:
        if self.words.element_size() > 1:
            return embedding(numbers, self.words).to(torch.float32)
        # torch can't look up in 8-bit floats, but in bytes.
        return embedding(numbers, self.words.view(torch.uint8)).view(self.words.dtype).to(torch.float32)


class ClipNetwork(TextNetwork):
    """CLIP's. Its pooled state is the one of the token that ends the words, projected if ``projects``."""

    embedding_name = "embeddings.token_embedding.weight"

    def __init__(self, key: str, state: Mapping[str, Tensor], projects: bool) -> None:
        super().__init__(key, state)
        self.positions = state["embeddings.position_embedding.weight"].to(torch.float32)
        self.projection = None
        if projects:
            if "text_projection.weight" not in state:
                raise ValueError(f"{key} has no text_projection")
            self.projection = KeptLinear(state["text_projection.weight"], None, None)

    @property
    def length(self) -> int:
        """Tokens of a chunk."""
        return len(self.positions)

    def _built(self, state: Mapping[str, Tensor]) -> nn.Module:
        from transformers import CLIPTextConfig, CLIPTextModel

        vocabulary, width = state[self.embedding_name].shape
        config = CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=state["encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=_count(state, "encoder.layers."),
            num_attention_heads=max(1, width // HEAD_CHANNELS),
            max_position_embeddings=len(state["embeddings.position_embedding.weight"]),
            hidden_act="quick_gelu" if self.key == "clip_l" else "gelu",
        )
        with torch.device("meta"):
            model: Any = CLIPTextModel(config)
        inner: nn.Module = getattr(model, "text_model", model)
        return inner

    def _layers(self) -> int:
        return len(self.model.encoder.layers)  # type: ignore[union-attr, arg-type]

    def _run(self, embedded: Tensor, layer: int | None, norm: bool) -> tuple[Tensor, Tensor]:
        model: Any = self.model
        x = embedded + self.positions
        length = x.shape[1]
        mask = torch.full((length, length), torch.finfo(x.dtype).min, device=x.device).triu(1)[None, None]
        hidden = x
        for number, each in enumerate(model.encoder.layers):
            x = each(x, mask)
            if layer is not None and number == layer % self.layers:
                hidden = x
        last: Tensor = model.final_layer_norm(x)
        if layer is None:
            return last, last
        return model.final_layer_norm(hidden) if norm else hidden, last

    def _pooled(self, hidden: Tensor) -> Tensor:
        return hidden if self.projection is None else self.projection(hidden)

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.positions = self.positions.to(device)
        if self.projection is not None:
            self.projection.to(device)


class T5Network(TextNetwork):
    """The encoder of a T5 v1.1. Padding is seen as words are; there is nothing pooled."""

    embedding_name = "shared.weight"

    def _built(self, state: Mapping[str, Tensor]) -> nn.Module:
        from transformers import T5Config, T5EncoderModel

        vocabulary, width = state[self.embedding_name].shape
        first = "encoder.block.0.layer.0.SelfAttention"
        buckets, heads = state[f"{first}.relative_attention_bias.weight"].shape
        config = T5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=state[f"{first}.q.weight"].shape[0] // heads,
            d_ff=state["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
            num_layers=_count(state, "encoder.block."),
            num_heads=heads,
            relative_attention_num_buckets=buckets,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
        with torch.device("meta"):
            return T5EncoderModel(config)

    def _layers(self) -> int:
        return len(self.model.encoder.block)  # type: ignore[union-attr, arg-type]

    def _run(self, embedded: Tensor, layer: int | None, norm: bool) -> tuple[Tensor, Tensor]:
        stack: Any = self.model.encoder
        found = stack(inputs_embeds=embedded, output_hidden_states=layer is not None)
        last: Tensor = found.last_hidden_state
        if layer is None or layer % self.layers == self.layers - 1:
            return last, last
        return stack.final_layer_norm(found.hidden_states[layer % self.layers + 1]), last


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix))


def _fill(model: nn.Module, state: Mapping[str, Tensor], key: str) -> None:
    """Put the tensors into a network on the meta device. Raises ValueError for those that are missing or of other shapes."""
    for name, module in list(model.named_modules()):
        of_module = {
            own: _fitting(state, f"{name}.{own}", value, key) for own, value in module.named_parameters(recurse=False)
        }
        if isinstance(module, nn.Linear):
            scale = state.get(f"{name}.scale_weight")
            kept = KeptLinear(
                of_module["weight"], of_module.get("bias"), None if scale is None else scale.to(torch.float32)
            )
            _replace(model, name, kept)
        elif name.endswith(("token_embedding", "position_embedding", "shared", "embed_tokens")):
            _replace(model, name, nn.Identity())  # looked up by ourselves
        else:
            for own, value in of_module.items():
                setattr(module, own, nn.Parameter(value.to(torch.float32), requires_grad=False))
        for own in [own for own, value in module.named_buffers(recurse=False) if value.is_meta]:
            delattr(module, own)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def _fitting(state: Mapping[str, Tensor], name: str, expected: Tensor, key: str) -> Tensor:
    found = state.get(name.replace("encoder.embed_tokens", "shared"))
    if found is None:
        raise ValueError(f"the file has no {key}.{name}")
    if found.shape != expected.shape:
        raise ValueError(f"{key}.{name} is of shape {tuple(found.shape)}, and {tuple(expected.shape)} was expected")
    return found
