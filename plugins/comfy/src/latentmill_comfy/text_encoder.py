"""The text encoder ``comfy``: prompts to conditioning as ComfyUI makes it, out of its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import pad

from latentmill.plugin import Conditioning, RowError, RowField, TensorSpec, TextEncoder, WeightsPath
from latentmill.weights import digests
from latentmill_comfy import conditioning, folders, lora, prompts, text_names, tokenizers
from latentmill_comfy.conditioning import ConditioningEntry, ConditioningTree, Leaf
from latentmill_comfy.embeddings import Embeddings
from latentmill_comfy.text_families import FAMILIES, even, of_files
from latentmill_comfy.text_networks import ClipNetwork, T5Network, TextNetwork
from latentmill_comfy.tokens import Chunks, TokenChunk
from latentmill_diffusers.loading import dtype_of

NOWHERE = (-1.0,) * len(conditioning.SIZE_NAMES)
"""No sizes: the network is told those of the latents."""


class ComfyTextEncoder(TextEncoder):
    """Text encoders of ComfyUI's files, read as it reads prompts: weights, chunks, embeddings, and what its conditioning nodes do.

    ``models`` is the folder of its models; ``checkpoint`` a whole model's file in ``checkpoints`` there, or ``files`` those of text
    encoders in ``text_encoders`` or ``clip``, with the ``type`` that ComfyUI's loader is told where it tells models apart (sd3, flux, sdxl).
    Textual inversions are those in ``embeddings`` there; those that rows name are told of row by row, those in the job's own words by the fingerprint.

    ``clip_skip`` k is CLIPSetLastLayer's -(k + 1). ``positive`` and ``negative`` are trees of what stands between texts and the sampler
    (``latentmill_comfy.conditioning``): the row's prompt alone, unless said. ``texts`` are further columns of the source that leaves name.
    ``max_length`` is how many tokens a text may come to. ``dtype`` is what weights are rounded to, T5's unless its file's is narrower; all is computed
    in float32. ``tokenizers`` is a folder with CLIP's and T5's, else they are looked for beside ``models``, as ComfyUI has them, and in the
    Hub's cache.

    Conditioning: ``entries[B, E, L, D]``, of which ``length[B, E]`` tokens count, ``window[B, E, 2]``, and ``pooled[B, E, P]``, ``size[B, E, 6]`` and
    ``score[B, E]`` where the network reads them. Where every text comes to one length, and there is one entry for all of the time, it is
    ``embeds[B, L, D]`` and ``pooled[B, P]``, which other denoisers know, too.
    """

    contract = 2
    fingerprinted = ("models", "checkpoint", "files", "loras", "tokenizers")
    libraries = ("tokenizers", "transformers")
    reads: Mapping[str, str | None] = {
        "weight": None,
        "emphasis": None,
        "embedding": None,
        "lora": "name the file in text_encoder.loras and denoiser.loras, for all rows",
        "compel": "ComfyUI's weights are (word:1.2)",
    }

    def __init__(
        self,
        models: str = "",
        checkpoint: str | None = None,
        files: Sequence[str] = (),
        type: str = "",
        clip_skip: int | None = None,
        positive: Mapping[str, Any] | None = None,
        negative: Mapping[str, Any] | None = None,
        texts: Sequence[str] = (),
        loras: Sequence[Mapping[str, Any]] = (),
        tokenizers: Annotated[str | None, WeightsPath()] = None,
        max_length: int | None = None,
        dtype: str = "float16",
    ) -> None:
        if (checkpoint is None) == (not files):
            raise ValueError("text_encoder: give checkpoint, or files: one of both")
        self.dtype, self.tokenizers = dtype_of(dtype), tokenizers
        self.models = Path(models).expanduser()
        self.parts: dict[str, tuple[Path, dict[str, str]]] = {}
        """Of each text encoder: its file, and the names of its tensors there by ours."""
        for name in [checkpoint] if checkpoint is not None else files:
            path = folders.find(models, "text_encoders" if checkpoint is None else "checkpoints", str(name))
            for part, named in text_names.parts_of(path, whole=checkpoint is not None).items():
                if part in self.parts:
                    raise ValueError(f"text_encoder.files: {path.name} and {self.parts[part][0].name} are both {part}")
                self.parts[part] = path, named
        name = of_files(type, [*self.parts]) if checkpoint is None else text_names.family_of(path, self.parts)
        self.family = FAMILIES[name]
        missing = self.family.encoders.keys() - self.parts.keys()
        if missing and not self.family.some:
            raise ValueError(f"text_encoder: {name} needs {' and '.join(sorted(missing))} too")
        self.parts = {part: self.parts[part] for part in self.family.encoders if part in self.parts}
        self.layer = None if clip_skip is None else -(clip_skip + 1)
        if clip_skip is not None and clip_skip < 0:
            raise ValueError(f"text_encoder.clip_skip: expected 0 or more, not {clip_skip}")
        self.embeddings = Embeddings(self.models / "embeddings" if models else None)
        self.row_fields = [RowField(column, pa.string(), "a further text of the row's", default="") for column in texts]
        self.trees: list[ConditioningTree] = [
            conditioning.parse(tree or {"text": own}, f"text_encoder.{where}", frozenset({own, *texts}))
            for where, own, tree in (("positive", "prompt", positive), ("negative", "negative_prompt", negative))
        ]
        for leaf in self._leaves():
            if leaf.node and {part for part, _ in leaf.texts} - self.family.encoders.keys():
                raise ValueError(f"text_encoder: {leaf.node} is a node of other models than {name}")
        self.longest = self.family.longest if max_length is None else max_length
        if self.longest < self._shortest(Leaf(())):
            raise ValueError(f"text_encoder.max_length: {name} has {self._shortest(Leaf(()))} tokens at least")
        self.count = max(map(conditioning.entries, self.trees))
        self.room = max(conditioning.length(tree, lambda _: self.longest) for tree in self.trees)
        self.sized = any(leaf.size is not None for leaf in self._leaves())
        least = min(conditioning.length(tree, self._shortest) for tree in self.trees)
        windows = any(map(conditioning.in_windows, self.trees))
        self.plain = least == self.room and self.count == 1 and not (windows or self.sized)
        self.loras = lora.loras_of(models, loras)
        self._networks: dict[str, TextNetwork] = {}
        self._fixed: dict[Leaf, ConditioningEntry] = {}

    def _shortest(self, leaf: Leaf) -> int:
        return 1 if leaf.unfilled else self.family.shortest([*self.parts])

    def notices(self) -> Sequence[str]:
        for leaf in self._leaves():
            for _, text in leaf.texts:
                if text.column is None:
                    self.check(text.words)  # an error of every row is said before there are any
        names = [f"{part}.{name}" for part, (_, named) in self.parts.items() for name in text_names.parted_names(named)]
        return lora.notices(self.loras, text_names.lora_names(names), "text encoder")

    def fingerprint(self) -> str:
        words = [text.words for leaf in self._leaves() for _, text in leaf.texts if text.column is None]
        named = [*dict.fromkeys(path for path, _ in self.parts.values()), *self._tokenizer_files()]
        return " ".join(digests([*named, *self._embeddings_in(words)])) + lora.fingerprint(self.loras)

    def fingerprint_of(self, prompt: str, **fields: Any) -> str:
        texts = [prompt, *(str(fields.get(field.name) or "") for field in self.row_fields)]
        return " ".join(digests(self._embeddings_in(texts)))

    def _leaves(self) -> list[Leaf]:
        return [leaf for tree in self.trees for leaf in conditioning.leaves(tree)]

    def _embeddings_in(self, texts: Sequence[str]) -> list[Path]:
        """The files that texts ask for, in their order. Raises RowError."""
        parts = [part for text in texts for part in prompts.read(text, self.embeddings.exists)]
        found = [self.embeddings.find(part.name) for part in parts if isinstance(part, prompts.Embedding)]
        return [path for path in found if path is not None]

    def _tokenizer_files(self) -> list[Path]:
        return [path for kind in self._tokenizer_kinds for path in tokenizers.files(self._folder_of(kind))]

    @property
    def _tokenizer_kinds(self) -> list[str]:
        return sorted({"t5" if part == "t5xxl" else "clip" for part in self.parts})

    def _folder_of(self, kind: str) -> Path:
        return tokenizers.find(kind, self.tokenizers, self.models)

    @cached_property
    def readers(self) -> dict[str, Chunks]:
        """What cuts prompts, for each text encoder."""
        loaded = {kind: tokenizers.load(self._folder_of(kind), kind) for kind in self._tokenizer_kinds}
        found = {}
        for part, (path, names) in self.parts.items():
            shapes = text_names.shapes(path, names)
            width = _width(part, shapes)
            length = 0 if part == "t5xxl" else shapes["embeddings.position_embedding.weight"][0]
            tokenizer = loaded["t5" if part == "t5xxl" else "clip"]
            found[part] = Chunks(part, tokenizer, self.family.encoders[part].filling, width, length, self.embeddings)
        return found

    def conditioning_spec(self) -> Mapping[str, TensorSpec]:
        """By the shapes that the files' headers say."""
        encoded = {}
        for part, (path, names) in self.parts.items():
            shapes = text_names.shapes(path, names)
            width, projects = _width(part, shapes), self.family.encoders[part].projects
            whole = shapes["text_projection.weight"][0] if projects else width
            encoded[part] = torch.zeros(1, width), torch.zeros(whole)
        hidden, pooled = self.family.join(encoded)
        entry = ConditioningEntry(torch.zeros(self.room, hidden.shape[1]), pooled)
        found = self._packed([entry] * self.count, self.family.scores and self.family.scores[0])
        return {name: TensorSpec.of(value) for name, value in found.items()}

    def load(self, device: torch.device) -> None:
        state: dict[str, Tensor] = {}
        for path in dict.fromkeys(path for path, _ in self.parts.values()):
            state |= text_names.read(
                path, {part: names for part, (there, names) in self.parts.items() if there == path}
            )
        for name, tensor in state.items():
            if not name.endswith(".scale_weight") and f"{name.removesuffix('.weight')}.scale_weight" not in state:
                state[name] = tensor.to(self._dtype_of(name.partition(".")[0], state))
        lora.fuse(state, self.loras, text_names.lora_names(state))
        for part, how in self.family.encoders.items():
            own = {name.removeprefix(f"{part}."): state.pop(name) for name in [*state] if name.startswith(f"{part}.")}
            if own:
                network = T5Network(part, own) if part == "t5xxl" else ClipNetwork(part, own, how.projects)
                network.to(device)
                self._networks[part] = network

    def _dtype_of(self, part: str, state: Mapping[str, Tensor]) -> torch.dtype:
        """What a text encoder's weights are rounded to."""
        norm = state.get(f"{part}.encoder.final_layer_norm.weight")  # by which ComfyUI tells what a T5's file is in
        return self.dtype if norm is None or norm.dtype.itemsize > self.dtype.itemsize else norm.dtype

    def check(self, prompt: str) -> None:
        chunks = {part: reader.read(prompt) for part, reader in self.readers.items()}
        self._require_room(self._length(chunks))
        for part in prompts.read(prompt, self.embeddings.exists):
            if isinstance(part, prompts.Embedding) and not self._fits(part.name):
                raise RowError(
                    f"embedding:{part.name} is of another model: its vectors are of other widths than the text encoders'"
                )

    def warn(self, prompt: str) -> str:
        for part in prompts.read(prompt, self.embeddings.exists):
            if isinstance(part, prompts.Embedding) and len(fits := self._fits(part.name)) < len(self.readers):
                return f"an embedding in the prompt is read by {' and '.join(fits)} alone"
        return ""

    def _fits(self, name: str) -> list[str]:
        """The text encoders that an embedding is of."""
        wide = {
            part: self.embeddings.vectors(name, part, reader.width).shape[1] for part, reader in self.readers.items()
        }
        return [part for part, reader in self.readers.items() if wide[part] == reader.width]

    def _require_room(self, length: int) -> None:
        if length > self.longest:
            raise RowError(
                f"a prompt of {length} tokens, in whole chunks, and text_encoder.max_length is {self.longest}"
            )

    def _length(self, chunks: Mapping[str, list[TokenChunk]]) -> int:
        lengths = {part: sum(map(len, found)) for part, found in chunks.items()}
        nothing = {part: (torch.empty(length, 0), torch.empty(0)) for part, length in lengths.items()}
        return len(self.family.join(nothing)[0])

    def encode(self, prompts: Sequence[str], *_: Any, **fields: Any) -> Conditioning:
        return self._all([{"prompt": prompt, **fields} for prompt in prompts], negative=False)

    def encode_negative(self, prompts: Sequence[str | None], *_: Any, **fields: Any) -> Conditioning:
        return self._all([{"negative_prompt": prompt or "", **fields} for prompt in prompts], negative=True)

    def _all(self, rows: Sequence[Mapping[str, str]], negative: bool) -> Conditioning:
        """Each row by itself: what it comes to is the same in any company."""
        tree = self.trees[negative]
        score = self.family.scores[negative] if self.family.scores else None
        with torch.no_grad():
            each = [self._packed(conditioning.evaluate(tree, partial(self._leaf, row)), score) for row in rows]
        return {name: torch.stack([one[name] for one in each]) for name in each[0]}

    def _leaf(self, row: Mapping[str, str], leaf: Leaf) -> ConditioningEntry:
        of_part = dict(leaf.texts)
        constant = all(text.column is None for text in of_part.values())
        if constant and leaf in self._fixed:
            return self._fixed[leaf]
        chunks: dict[str, list[TokenChunk]] = {}
        for part in self.readers:
            text = of_part[part] if leaf.node else of_part[""]
            words = text.words if text.column is None else row[text.column]
            chunks[part] = [] if leaf.unfilled and not words else self.readers[part].read(words)
        if leaf.node in ("sdxl", "sd3"):
            even(chunks, lambda part: self.readers[part].read(""))
        asked = {part: found for part, found in chunks.items() if found or part == "t5xxl"}
        encoded = {}
        for part, found in asked.items():
            how = self.family.encoders[part]
            layer = how.layer if self.layer is None else self.layer
            encoded[part] = self._networks[part].encode(found, self.readers[part], layer, how.norm)
        hidden, pooled = self.family.join(encoded)
        self._require_room(len(hidden))
        entry = ConditioningEntry(hidden, pooled, size=leaf.size, score=leaf.score)
        if constant:
            self._fixed[leaf] = entry
        return entry

    def _packed(self, entries: Sequence[ConditioningEntry], score: float | None) -> Conditioning:
        """One row's."""
        if self.plain:
            [entry] = entries
            found = {"embeds": entry.hidden}
            if entry.pooled is not None:
                found["pooled"] = entry.pooled
            if score is not None:
                found["score"] = torch.tensor(score if entry.score is None else entry.score)
            return found
        none = self.count - len(entries)
        found = {
            "entries": torch.stack([pad(entry.hidden, (0, 0, 0, self.room - len(entry.hidden))) for entry in entries]),
            "length": torch.tensor([len(entry.hidden) for entry in entries]),
            "window": torch.tensor([entry.window for entry in entries]),
        }
        pooled = [entry.pooled for entry in entries if entry.pooled is not None]
        if pooled:
            found["pooled"] = torch.stack(pooled)
        if self.sized:
            found["size"] = torch.tensor([entry.size or NOWHERE for entry in entries])
        if score is not None:
            found["score"] = torch.tensor([score if entry.score is None else entry.score for entry in entries])
        return {name: pad(value, (*(0, 0) * (value.ndim - 1), 0, none)) for name, value in found.items()}


def _width(part: str, shapes: Mapping[str, Sequence[int]]) -> int:
    """Channels of a text encoder, by the shapes of its tensors."""
    return shapes["shared.weight" if part == "t5xxl" else ClipNetwork.embedding_name][1]
