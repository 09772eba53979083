"""The networks of diffusers' image models, on our schedulers, every row at a time of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any

import torch
from torch import Tensor

from latentmill.plugin import (
    Denoiser,
    FollowsAuthors,
    LatentSpec,
    NoiseSchedule,
    Prediction,
    WeightsPath,
    tensors,
)
from latentmill_diffusers import lora
from latentmill_diffusers.configs import completed
from latentmill_diffusers.families import NO_NEGATIVE, Family, family_of
from latentmill_diffusers.folder import LOCATION, Folder
from latentmill_diffusers.hub import weights_of
from latentmill_diffusers.loading import dtype_of, part_class
from latentmill_diffusers.lora import loras_of
from latentmill_diffusers.networks import LoadedNetwork
from latentmill_diffusers.schedule import (
    noise_schedule_of,
    prediction_of,
    scheduler_of,
    starts_with_unit_variance,
    times_of,
)
from latentmill_diffusers.single_file import NETWORKS


class DiffusersDenoiser(FollowsAuthors, Denoiser):
    """The network of the model at ``path``: its UNet or transformer, with noise schedule, prediction and grid as its config says.

    ``loras`` are added to the weights: ``[{path: FILE.safetensors, weight: 0.8}]``. ``attention`` is a backend of diffusers
    (``flash``, ``sage``, ...); ``storage`` a dtype, float8_e4m3fn say, that the weights are kept in and cast from; ``offload``
    keeps them in the host's memory and brings each group to the device when it is its turn; ``quantization`` is what
    diffusers' quantisers take, ``{quant_method: torchao, quant_type: Int8WeightOnlyConfig}`` say, for plain weights.
    """

    contract = 2
    fingerprinted: Sequence[str] = (*LOCATION, "loras")

    def __init__(
        self,
        path: Annotated[str, weights_of(*NETWORKS)] = "",
        revision: str | None = None,
        config: Annotated[str | None, weights_of()] = None,
        dtype: str = "float32",
        loras: Annotated[Sequence[Mapping[str, Any]], WeightsPath()] = (),
        attention: str | None = None,
        compile: bool = False,
        offload: bool = False,
        storage: str | None = None,
        quantization: Mapping[str, Any] | None = None,
    ) -> None:
        folder = Folder(path, revision, config)
        self.loras = loras_of(loras)
        self._made_of(folder, dtype, attention, compile, offload, storage, quantization)

    def _made_of(
        self,
        folder: Folder,
        dtype: str,
        attention: str | None,
        compile: bool,
        offload: bool,
        storage: str | None,
        quantization: Mapping[str, Any] | None,
    ) -> None:
        """Take what is in ``folder``, which says ``path`` and its like, with settings as they are. Raises ValueError."""
        self.folder = folder
        self.attention, self.compile, self.offload = attention, compile, offload
        self.options = self.folder.quantization(quantization, "diffusers")
        self.libraries = ("diffusers", *(("peft",) if self.loras else ()), *self.folder.quantizer(quantization))
        if storage is not None and not isinstance(getattr(torch, storage, None), torch.dtype):
            raise ValueError(f"storage must be a dtype of torch, as float8_e4m3fn, not {storage!r}")
        self.storage: torch.dtype | None = getattr(torch, storage) if storage else None
        if quantization and storage:
            raise ValueError("storage and quantization exclude each other: both say how weights are kept")
        self.logical = dtype_of(dtype)
        self.family: Family = family_of(self.folder.pipeline)
        cls = self.folder.class_of(self.family.network)
        self.cls = part_class(*cls) if cls else None
        self.config = completed(self.cls, self.folder.config(self.family.network))
        if offload and not getattr(self.cls, "_supports_group_offloading", True):
            raise ValueError(f"denoiser.offload: {self.config['_class_name']} can't be moved group by group")
        self.folder.require_weights(self.family.network)
        if self.folder.quantized and self.folder.single_file is not None and (storage or self.loras):
            path = self.folder.single_file.path
            raise ValueError(f"{path} is quantised as it is: storage and loras are for plain weights")
        self.guidance_embedded = bool(
            self.config.get("guidance_embeds")
            or self.config.get("time_cond_proj_dim")
            or self.folder.index.get("is_distilled")
        )
        # Of 4 channels it is told latents alone; of 9, mask and the latents of the masked picture, too.
        self.inpaints = self.family.network == "unet" and int(self.config["in_channels"]) == 9
        self.parted_by = ("length",) if self.family.pad else self.family.parted_by
        self._network: LoadedNetwork | None = None
        self._times: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    @cached_property
    def scheduler(self) -> Any:
        """The scheduler that the model names."""
        return scheduler_of(self.folder)

    # Attributes of the contract, read of the model's files when they are first asked for.
    @cached_property
    def noise_schedule(self) -> NoiseSchedule:  # type: ignore[override]
        return noise_schedule_of(self.scheduler)

    @cached_property
    def prediction(self) -> Prediction:  # type: ignore[override]
        return prediction_of(self.scheduler)

    def fingerprint(self) -> str:
        return self.folder.fingerprint(self.family.network, "scheduler") + lora.fingerprint(self.loras)

    def notices(self) -> Sequence[str]:
        guides = self.family.guides_without or self.guidance_embedded
        return [] if guides else [NO_NEGATIVE.format(self.folder.pipeline)]

    def times(self, steps: int, shape: Sequence[int]) -> Tensor:
        key = steps, tuple(shape)
        if key not in self._times:  # rows ask one by one, and mostly for the same
            scheduler = scheduler_of(self.folder)  # of its own: it keeps what it is told
            told = self.family.schedule(scheduler.config, steps, shape)
            self._times[key] = times_of(scheduler, self.noise_schedule, steps, told)
        return self._times[key]

    @property
    def multiple_of(self) -> int:  # type: ignore[override]
        return self.patch

    @property
    def patch(self) -> int:
        """Latents on each side of what a transformer takes for one."""
        patch = self.config.get("patch_size") or self.config.get("all_patch_size", [1])[0]
        return max(self.family.packed, int(patch))

    def start_scale(self, t: Tensor) -> Tensor:
        if starts_with_unit_variance(self.scheduler):
            return torch.ones_like(t)
        return super().start_scale(t)

    def guides(self, scale: float, negative_prompt: str | None) -> bool:
        return scale > self.family.guides_above and (negative_prompt is not None or self.family.guides_without)

    def guide(self, prompt: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
        if self.family.guide is None:
            return super().guide(prompt, negative, scale)
        return self.family.guide(prompt, negative, scale)

    def check(self, spec: LatentSpec) -> None:
        told = int(self.config["in_channels"])
        expected = (told - 1) // 2 if self.inpaints else told // self.family.packed**2
        if spec.channels != expected:
            raise ValueError(f"the network takes latents of {expected} channels, and the VAE's have {spec.channels}")

    def load(self, device: torch.device) -> None:
        import diffusers

        part = self.family.network
        model = self.folder.load(self.cls, part, self.logical, **self.options)
        unet = self.config if part == "unet" else None
        parts = [name for name in self.folder.index if self.folder.class_of(name)]
        lora.fuse(model, part, getattr(diffusers, self.folder.pipeline), self.loras, unet, parts)
        if self.storage is not None:
            model.enable_layerwise_casting(storage_dtype=self.storage, compute_dtype=self.logical)
        if self.offload:
            model.enable_group_offload(
                onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda"
            )
        else:
            model.to(device)
        if self.attention is not None:
            _set_attention(model, self.attention)
        if self.compile:
            model.compile_repeated_blocks() if model._repeated_blocks else model.compile()
        self._network = LoadedNetwork(model, self.folder.downscale)

    def predict(self, x: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        assert self._network is not None, "load() comes first"
        # Not the guidance scale: what is made of it, in steps of a thousandth, would be another in bfloat16.
        plain = {n for n, v in conditioning.items() if n == "guidance_scale" or not v.is_floating_point()}
        told = {n: v if n in plain else v.to(self.logical) for n, v in conditioning.items()}
        timestep = self.noise_schedule.timestep(t)
        if self.family.told is not None:
            timestep = self.family.told(self.scheduler.config, timestep, x.shape[1:])
        timestep = tensors.send(timestep.to(torch.float32), x.device)
        predicted = self._called(self._network, x.to(self.logical), timestep, told)
        if predicted.shape[1] == 2 * x.shape[1]:  # the network learned a variance, too
            predicted = predicted.chunk(2, dim=1)[0]
        return predicted.float()

    def _called(self, network: LoadedNetwork, x: Tensor, timestep: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        if not self.family.pad:
            parted = {name: tensors.send(told[name], x.device) for name in self.parted_by}
            return self.family.call(network, x, timestep, {**told, **parted})
        lengths, rows = told["length"].tolist(), range(len(x))
        plain = {name: value for name, value in told.items() if name != "length"}
        # On the CPU each is called for alone, and so has the same bits in any company.
        if x.device.type == "cpu":
            parts = [[i] for i in rows]
        else:
            parts = [[i for i in rows if lengths[i] == length] for length in dict.fromkeys(lengths)]
        each = []
        for part in parts:
            together = part == [*range(part[0], part[-1] + 1)]
            at = slice(part[0], part[-1] + 1) if together else tensors.send(torch.tensor(part), x.device)
            one = {name: value[at] for name, value in plain.items()}
            one["embeds"] = one["embeds"][:, : lengths[part[0]]]
            each.append(self.family.call(network, x[at], timestep[at], one))
        predicted, order = torch.cat(each), [i for part in parts for i in part]
        if order == [*rows]:
            return predicted
        return predicted[tensors.send(torch.tensor(sorted(rows, key=order.__getitem__)), x.device)]


def _set_attention(model: Any, backend: str) -> None:
    """Have a network compute attention so, and no other network of this process. Raises ValueError if it has no choice."""
    from diffusers.models.attention_dispatch import attention_backend

    with attention_backend(backend):  # what diffusers sets for all networks, too, is afterwards as before
        model.set_attention_backend(backend)
    processors = (getattr(module, "processor", None) for module in model.modules())
    if not any(getattr(processor, "_attention_backend", None) == backend for processor in processors):
        raise ValueError(
            f"denoiser.attention={backend}: {type(model).__name__} has attention of its own, and takes no backend of diffusers: leave it out"
        )
