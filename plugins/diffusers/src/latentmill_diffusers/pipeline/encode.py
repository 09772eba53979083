"""The stage that has a pipeline's text encoders and no network."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from latentmill import syntax
from latentmill.batch import PROMPT_PREFIX, with_warnings
from latentmill.fields import BATCH_SCHEMA, OWN_FIELDS
from latentmill.plugin import Reject, RowError, tensors
from latentmill.text import one_line
from latentmill_diffusers.families import NO_NEGATIVE
from latentmill_diffusers.messages import quiet
from latentmill_diffusers.pipeline.absent import AbsentNetwork, Reached
from latentmill_diffusers.pipeline.known import DECODERS, GUIDES_WITH_NEGATIVE, NETWORK_PARTS, SKIPPED
from latentmill_diffusers.pipeline.noted import NOTED, form_of, kind_of, leaves_of
from latentmill_diffusers.pipeline.stage import Pipeline
from latentmill_diffusers.tokens import Watched, warning_of

READ_BY_LOOPS = ("steps", "guidance_scale")
"""What of the fields that say how a row is denoised a pipeline's own loop reads."""

NOTED_ROOM = 512 << 20
"""Bytes of what ``encode_prompt`` returned that a worker keeps: equal prompts are encoded once, wherever they stand in a run."""


class PipelineEncode(Pipeline):
    """Adds ``prompt:*``: what the pipeline's ``encode_prompt`` returns for the row's prompt and negative prompt."""

    reads: Mapping[str, str | None] = {}
    adds = (PROMPT_PREFIX,)

    def load(self, device: torch.device) -> None:
        super().load(device)
        self.watched = Watched(self.pipeline)
        self.forms: dict[str, Any] = {}
        """Of what ``encode_prompt`` returned so far, by what they have in common."""
        self.noted: OrderedDict[tuple[Any, ...], dict[str, Any]] = OrderedDict()
        """What it returned, by what it was told; what was asked for longest ago goes first."""
        self.noted_bytes = 0

    def notices(self) -> Sequence[str]:
        told = self.guidance == "guidance_scale" and "true_cfg_scale" in self.parameters  # the network is
        return (
            []
            if told or self.folder.pipeline not in GUIDES_WITH_NEGATIVE
            else [NO_NEGATIVE.format(self.folder.pipeline)]
        )

    def loads(self, part: str) -> bool:
        others = (*NETWORK_PARTS, *DECODERS, *SKIPPED)
        return bool(self.encoders) and self.folder.class_of(part) is not None and not part.startswith(others)

    @torch.inference_mode()
    def __call__(self, batch: pa.Table, reject: Reject) -> Iterator[pa.Table]:
        groups: dict[str, list[tuple[int, list[Tensor]]]] = {}
        columns = [name for name in BATCH_SCHEMA.names if name in batch.column_names]
        given = [name for name in ("image", "mask", "latents") if name in batch.column_names]
        sigmas = self.folder.index.get("sample_sigmas")
        told = ["prompt", "negative_prompt", "guidance_scale", "width", "height"] + ["seed"] * (len(self.encoders) > 1)
        warnings: list[Sequence[str]] = [()] * len(batch)
        for i, row in enumerate(batch.select(columns).to_pylist()):
            try:
                _check(row, self.folder.pipeline)
                if row["negative_prompt"] and "negative_prompt" not in self.parameters:
                    raise RowError(f"{self.folder.pipeline} takes no negative prompt, and the row has one")
                if sigmas and row["steps"] != len(sigmas):
                    own = f"the steps of its model's sample_sigmas: {len(sigmas)} is expected, not {row['steps']}"
                    raise RowError(f"{self.folder.pipeline} makes {own}")
                if given:
                    raise RowError(f"{self.folder.pipeline} begins from noise, and takes no {given[0]}")
                noted = self._known(tuple(row[n] for n in told), row)
                warnings[i] = noted["warnings"]
            except ValueError as error:
                reject(i, one_line(error))
                continue
            shapes = [[list(leaf.shape), str(leaf.dtype)] for leaf in noted["leaves"]]
            group = json.dumps([noted["form"], shapes])
            groups.setdefault(group, []).append((i, noted["leaves"]))
        if any(warnings):
            batch = with_warnings(batch, warnings)
        for group, members in groups.items():
            part = batch.take([i for i, _ in members])
            each = {id(leaves): leaves for _, leaves in members}
            index = [[*each].index(id(leaves)) for _, leaves in members]
            for k in range(len(members[0][1])):
                values = torch.stack([leaves[k] for leaves in each.values()])
                part = tensors.with_shared(part, f"{PROMPT_PREFIX}{k}", values, index)
            at = part.schema.get_field_index(f"{PROMPT_PREFIX}0")
            field = part.schema.field(at)
            about = {**field.metadata, NOTED: json.dumps(json.loads(group)[0]).encode()}
            yield part.set_column(at, field.with_metadata(about), part.column(at))

    def _known(self, key: tuple[Any, ...], row: Mapping[str, Any]) -> dict[str, Any]:
        """What is noted for a row, that is told as much as ``key`` says."""
        if key not in self.noted:
            self.noted[key] = self._note(row)
            self.noted_bytes += _bytes_of(self.noted[key])
        self.noted.move_to_end(key)
        found = self.noted[key]
        while self.noted_bytes > NOTED_ROOM:
            self.noted_bytes -= _bytes_of(self.noted.popitem(last=False)[1])
        return found

    def _note(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What ``encode_prompt`` returns for a row: its tensors, on the CPU, and its form.

        Which axis is the batch's is seen once for each form, by two of the row.
        """
        warnings = self._syntax(row)
        if not self.encoders:
            return {"form": [], "leaves": [torch.zeros(1)], "warnings": warnings}
        self.watched.seen.clear()
        returned = self._returned([row])
        most = self.call.get(
            "max_sequence_length", getattr(self.parameters.get("max_sequence_length"), "default", None)
        )
        for name, prefix in (("prompt", ""), ("negative_prompt", "negative_prompt: ")):
            if not row[name]:
                continue
            begins = " ".join(row[name].lower().split())[:40]  # some pipelines clean their prompts
            its = [each for each in self.watched.given(most) if begins in " ".join(each.text.lower().split())]
            text, _ = warning_of(its, row[name])
            warnings += [prefix + text] * bool(text)
        kind = json.dumps([kind_of(each) for each in returned])
        if kind not in self.forms:
            leaf = count()
            twice = returned if self.single else self._returned([row, row])
            self.forms[kind] = [form_of(one, two, leaf) for one, two in zip(returned, twice, strict=True)]
        form = self.forms[kind]
        leaves = [leaf.cpu() for one, each in zip(returned, form) for leaf in leaves_of(one, each)]
        if not leaves:
            raise ValueError(f"{self.folder.pipeline} calls no encode_prompt before its network")
        return {"form": form, "leaves": leaves, "warnings": warnings}

    def _syntax(self, row: Mapping[str, Any]) -> list[str]:
        negative = [f"negative_prompt: {line}" for line in syntax.told(row["negative_prompt"] or "", self.reads)]
        return [*syntax.told(row["prompt"], self.reads), *negative]

    def _returned(self, given: Sequence[Mapping[str, Any]]) -> list[Any]:
        returned = []

        def noting(original: Callable[..., Any]) -> Callable[..., Any]:
            def encode(*positional: Any, **named: Any) -> Any:
                returned.append(original(*positional, **named))
                for part in self.pipeline.components.values():
                    if isinstance(part, AbsentNetwork):
                        part.near = True
                return returned[-1]

            return encode

        try:
            with quiet(self.pipeline):
                self.run(given, noting)
        except Reached:
            return returned
        raise RuntimeError(f"{self.folder.pipeline} made latents without calling its network")


def _bytes_of(noted: Mapping[str, Any]) -> int:
    return 1000 + sum(int(leaf.nbytes) for leaf in noted["leaves"])


def _check(row: Mapping[str, Any], pipeline: str) -> None:
    """Raise RowError for what a pipeline's own loop doesn't do."""
    for field in OWN_FIELDS:
        if field.sampling and field.name not in READ_BY_LOOPS:
            name, plain = field.name, "" if field.name == "scheduler" else field.default
            if row[name] != plain:
                raise RowError(
                    f"{pipeline} runs its own loop, without {name}: {plain!r} is expected, not {row[name]!r}"
                )
