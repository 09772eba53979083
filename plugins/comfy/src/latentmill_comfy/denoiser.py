"""The networks of ComfyUI's files, told what ComfyUI tells them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import pad

from latentmill.plugin import NoiseSchedule, Prediction, RowField, tensors
from latentmill.schedulers.comfy_sampling import sampling_of
from latentmill_comfy import lora
from latentmill_comfy.folders import find
from latentmill_comfy.headers import FP8, NETWORK, Header, in_dtype
from latentmill_comfy.lora import Target, loras_of
from latentmill_comfy.names import network_keys, unread
from latentmill_comfy.recognition import recognised
from latentmill_comfy.sampling import DistilledBetas, Wanted, sampled
from latentmill_comfy.single import Part
from latentmill_diffusers.denoiser import DiffusersDenoiser
from latentmill_diffusers.networks import first

KEPT_IN = ("default", "fp8_e4m3fn", "fp8_e5m2")
"""Those of the node UNETLoader; its fp8_e4m3fn_fast multiplies in eight bits, on some GPUs."""
GUIDANCE = RowField(
    "guidance",
    pa.float64(),
    "the guidance that the network is told (FluxGuidance); guidance_scale is the sampler's cfg",
    default=3.5,
    least=0.0,
)


class ComfyDenoiser(DiffusersDenoiser):
    """The network in a ``checkpoint``, or of a file ``unet`` of its own, of ComfyUI's models folder; what it is, its tensors say.

    ``loras``, ``[{file: NAME, weight: strength_model}]``, are merged in order. ``weight_dtype`` is the node UNETLoader's. ``shift`` and
    ``multiplier`` are those of ModelSamplingSD3 and ModelSamplingAuraFlow, ``max_shift``, ``base_shift`` and ``shift_size`` (width and height) those
    of ModelSamplingFlux, ``prediction`` and ``zsnr`` those of ModelSamplingDiscrete. Rows are guided at every scale but 1, by ComfyUI's rule.
    """

    contract = 2
    row_fields: Sequence[RowField] = (GUIDANCE,)
    """Known before the file is: it says whether the network is told any."""
    fingerprinted = ("models", "checkpoint", "unet", "loras")

    def __init__(
        self,
        models: str = "",
        checkpoint: str | None = None,
        unet: str | None = None,
        dtype: str = "float32",
        weight_dtype: str = "default",
        loras: Sequence[Mapping[str, Any]] = (),
        shift: float | None = None,
        multiplier: float | None = None,
        max_shift: float | None = None,
        base_shift: float | None = None,
        shift_size: Sequence[int] | None = None,
        prediction: str | None = None,
        zsnr: bool | None = None,
        attention: str | None = None,
        compile: bool = False,
        offload: bool = False,
    ) -> None:
        if (checkpoint is None) == (unet is None):
            raise ValueError("denoiser comfy: give checkpoint or unet: the name of a file in ComfyUI's models folder")
        if weight_dtype not in KEPT_IN:
            raise ValueError(f"denoiser.weight_dtype must be {', '.join(KEPT_IN)}, not {weight_dtype!r}")
        self.header = Header(find(models, "checkpoints" if unet is None else "unet", str(checkpoint or unet)))
        self.found = recognised(self.header)
        self.header.require_known_scales(self.found.prefix)
        size = (int(shift_size[0]), int(shift_size[1])) if shift_size is not None else None
        wanted = Wanted(shift, multiplier, max_shift, base_shift, size, prediction, zsnr)
        self._schedule, self._prediction = sampled(self.found, wanted)
        self.sampling = sampling_of(self._schedule)
        self.merged = loras_of(models, loras)
        self.kept_in = self._kept_in(weight_dtype)
        storage = str(self.kept_in).removeprefix("torch.") if self.kept_in and not self.merged else None
        self.loras = ()
        part = Part(self.header, self.found.configs())
        self._made_of(part, dtype, attention, compile, offload, storage, None)
        part.tensors(self._state)
        self.guidance_embedded, self.inpaints = False, False
        self.parted_by = ("length", "window")
        # FLUX.1 schnell is told none, and workflows have the node FluxGuidance in front of it all the same.
        self.row_fields = (GUIDANCE,) if self.found.pipeline == "FluxPipeline" else ()

    def _kept_in(self, weight_dtype: str) -> torch.dtype | None:
        """The eight bits that weights are rounded to: asked for, or those of most of the file without scales."""
        if weight_dtype != "default":
            return {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[weight_dtype]
        scaled = any(name.endswith(("scaled_fp8", ".scale_weight")) for name in self.header.under(self.found.prefix))
        return None if scaled else FP8.get(self.header.main_dtype(self.found.prefix))

    @property
    def noise_schedule(self) -> NoiseSchedule:  # type: ignore[override]
        return self._schedule

    @property
    def prediction(self) -> Prediction:  # type: ignore[override]
        return self._prediction

    @cached_property
    def keys(self) -> dict[str, Target]:
        """The network's layers by all that LoRA files call them."""
        return network_keys(self.found, self.header, self.cls)

    def fingerprint(self) -> str:
        return self.folder.fingerprint() + lora.fingerprint(self.merged)

    def notices(self) -> Sequence[str]:
        said = lora.notices(self.merged, self.keys, self.found.family) if self.merged else []
        if unknown := unread(self.found, self.header, self.cls):
            said.append(f"{self.header.path.name} has {len(unknown)} tensors that no layer takes: {unknown[0]}, ...")
        if self.kept_in and self.merged:
            said.append(
                "ComfyUI rounds weights of eight bits with a LoRA at random; here they keep the dtype that is computed in"
            )
        return said

    def times(self, steps: int, shape: Sequence[int]) -> Tensor:
        raise ValueError("a file of ComfyUI's has no grid of its own: scheduler.grid.name=comfy has ComfyUI's")

    def start_scale(self, t: Tensor) -> Tensor:
        """ComfyUI begins with ``sqrt(1 + sigma^2)`` of noise, which is 1 where variance is preserved."""
        return torch.ones_like(t) if self.prediction != "flow" else self.noise_schedule.scale(t)[1]

    def guides(self, scale: float, negative_prompt: str | None) -> bool:
        return not math.isclose(scale, 1.0)

    def predict(self, x: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """As the contract has it. Conditioning is that of the text encoder ``comfy``: one vector for each token, or a list of entries."""
        told = dict(conditioning)
        sigma, timestep = self._times_told(t)
        timestep = tensors.send(timestep, x.device)
        if "entries" not in told:
            return self._answer(x, timestep, sigma, told)
        return self._mean(x, t, sigma, timestep, told)

    def _times_told(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """ComfyUI's sigma at times ``t[B]``, and what the network is told of it, float32, in the unit of diffusers' class."""
        alpha, sigma = self.noise_schedule.scale(t)
        if self.prediction != "flow":
            return (sigma / alpha).float(), self.noise_schedule.timestep(t).float()
        told = self.sampling.timestep(sigma.float())
        return sigma.float(), told if self.found.pipeline == "StableDiffusion3Pipeline" else 1000 * told

    def _mean(self, x: Tensor, t: Tensor, sigma: Tensor, timestep: Tensor, told: dict[str, Tensor]) -> Tensor:
        """The mean over a row's entries whose window holds its sigma; where none does, what makes the clean estimate 0."""
        lengths, windows = told.pop("length").tolist(), told.pop("window").tolist()
        entries, shared = told.pop("entries"), {n: told.pop(n) for n in [*told] if n in ("guidance",)}
        groups: dict[tuple[int, int, int], list[int]] = {}
        for row, (each, spans) in enumerate(zip(lengths, windows)):
            for entry, (length, (start, end)) in enumerate(zip(each, spans)):
                within = self.sampling.percent(start) >= float(sigma[row]) >= self.sampling.percent(end)
                if length and within:
                    # On the CPU each row is called for alone, and so has the same bits in any company.
                    alone = row if x.device.type == "cpu" else -1
                    groups.setdefault((entry, length, alone), []).append(row)
        total, count = torch.zeros_like(x, dtype=torch.float32), [0] * len(x)
        for (entry, length, _), rows in groups.items():
            at = tensors.send(torch.tensor(rows), x.device)
            one = {name: value[at, entry] for name, value in told.items()} | {n: v[at] for n, v in shared.items()}
            one["embeds"] = entries[at, entry, :length]
            total[at] += self._answer(x[at], timestep[at], sigma[rows], one)
            for row in rows:
                count[row] += 1
        alpha, scale = self.noise_schedule.scale(t)
        nothing = {"epsilon": 1 / scale, "v": alpha / scale, "flow": 1 / scale, "sample": torch.zeros_like(scale)}
        shape = (-1, *(1 for _ in x.shape[1:]))
        empty = tensors.send(torch.tensor(count) == 0, x.device).reshape(shape)
        shares = tensors.send(torch.tensor([max(1, n) for n in count]), x.device).reshape(shape)
        none = x.float() * tensors.send(nothing[self.prediction].float(), x.device).reshape(shape)
        return torch.where(empty, none, total / shares)

    def _answer(self, x: Tensor, timestep: Tensor, sigma: Tensor, told: dict[str, Tensor]) -> Tensor:
        """What is predicted of rows whose prompts have one length, whose ``sigma[B]`` is ComfyUI's, on the CPU."""
        said = self._said(x, timestep, told)
        if not isinstance(self._schedule, DistilledBetas):
            return said
        shape = (-1, *(1 for _ in x.shape[1:]))
        sigma = tensors.send(sigma, x.device).reshape(shape)
        return self._schedule.clean(said, x.float() * (1 + sigma**2).sqrt(), sigma, timestep.reshape(shape))

    @property
    def multiple_of(self) -> int:  # type: ignore[override]
        """Any: what is lacking is filled up."""
        return 1

    def _said(self, x: Tensor, timestep: Tensor, told: dict[str, Tensor]) -> Tensor:
        assert self._network is not None, "load() comes first"
        guidance, size, score = (told.pop(name, None) for name in ("guidance", "size", "score"))
        dense = {n: v.to(self.logical) if v.is_floating_point() else v for n, v in told.items()}
        # ComfyUI fills sides up to whole patches with what stands at their other ends, and cuts that off again.
        height, width = x.shape[-2:]
        x = pad(x.to(self.logical), (0, -width % self.patch, 0, -height % self.patch), mode="circular")
        if guidance is not None and self.config.get("guidance_embeds"):
            dense["guidance_scale"] = guidance
        if "pooled" in dense and self.found.part == "unet":
            ids = self._time_ids(x, size, score)
            more = {"added_cond_kwargs": {"text_embeds": dense["pooled"], "time_ids": ids}}
            found = self._network.model(x, timestep, encoder_hidden_states=dense["embeds"], **more, return_dict=False)
            return first(found).float()
        return self.family.call(self._network, x, timestep, dense)[..., :height, :width].float()

    def _time_ids(self, x: Tensor, size: Tensor | None, score: Tensor | None) -> Tensor:
        """SDXL's numbers: height, width, crop, target; the refiner's score is the last of five. -1 stands for the picture's own."""
        own = x.new_tensor([x.shape[-2] * 8, x.shape[-1] * 8], dtype=torch.float32).expand(len(x), 2)
        ids = torch.cat([own, torch.zeros_like(own), own], 1)
        if size is not None:
            size = size.to(ids)
            first_two = torch.where(size[:, :2] < 0, own, size[:, :2])
            ids = torch.cat(
                [first_two, size[:, 2:4].clamp(min=0), torch.where(size[:, 4:] < 0, first_two, size[:, 4:])], 1
            )
        return ids if score is None else torch.cat([ids[:, :4], score[:, None].to(ids)], 1)

    def _state(self) -> dict[str, Tensor]:
        """The network's tensors as its authors name them, to compute with, and with what LoRA files add."""
        state = in_dtype(self.header.read(self.found.prefix), self.logical, self.kept_in)
        lora.fuse(state, self.merged, self.keys)
        return {NETWORK + name: tensor for name, tensor in state.items()}
