"""The three parts as latentmill plugins, all named `shapes`; each reads its weights from inside this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from latentmill import weights
from latentmill.plugin import VAE, Conditioning, Denoiser, LatentSpec, TensorSpec, TextEncoder, tensors
from latentmill.schedulers.noise_schedules import VariancePreserving
from latentmill_shapes.autoencoder import Autoencoder
from latentmill_shapes.denoiser import UNet
from latentmill_shapes.text import LENGTH, POOLED, WIDTH, TextTransformer, tokenise

WEIGHTS = Path(__file__).parent / "weights"
"""Float16 safetensors, computed with in float32; metadata holds what belongs to the weights (see `train.export`)."""
Module = TypeVar("Module", bound=nn.Module)


def fingerprint(part: str) -> str:
    """The first 16 hex digits of the SHA-256 of a part's weights file."""
    return weights.digest(WEIGHTS / f"{part}.safetensors")[:16]


def metadata(part: str) -> dict[str, str]:
    """What a part's weights file says about itself."""
    return _metadata(WEIGHTS / f"{part}.safetensors")


@cache
def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def _filled(cls: Callable[[], Module], part: str, device: torch.device) -> Module:
    """A model with its float32 weights, on `device`, ready for use. No weights are made up that others take the place of."""
    with torch.device("meta"):
        model = cls()
    found = weights.load(WEIGHTS / f"{part}.safetensors", model.state_dict())
    model.load_state_dict({name: each.to(torch.float32, copy=True) for name, each in found.items()}, assign=True)
    model.eval().requires_grad_(False).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types forget memory_format
    return model


class ShapesVAE(VAE):
    """Pictures with sides divisible by 4 to four channels at a quarter of the side; trained on 64x64."""

    contract = 2

    def __init__(self) -> None:
        self._model: Autoencoder | None = None

    @property
    def spec(self) -> LatentSpec:
        about = metadata("vae")
        return LatentSpec(
            channels=4,
            downscale=4,
            scale=float(about["scale"]),
            shift=float(about["shift"]),
            dtype="float32",
            fingerprint=fingerprint("vae"),
        )

    def load(self, device: torch.device) -> None:
        self._model = _filled(Autoencoder, "vae", device)

    def encode(self, images: Tensor) -> Tensor:
        assert self._model is not None, "load() comes first"
        mean, _ = self._model.posterior(images.contiguous(memory_format=torch.channels_last))
        return ((mean - self.spec.shift) * self.spec.scale).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        assert self._model is not None, "load() comes first"
        z = latents / self.spec.scale + self.spec.shift
        return self._model.decode(z.contiguous(memory_format=torch.channels_last)).contiguous()


class ShapesTextEncoder(TextEncoder):
    """Prompts over the captions' vocabulary: `embeds` [B, 12, 64] and `pooled` [B, 192]."""

    contract = 2

    def __init__(self) -> None:
        self._model: TextTransformer | None = None
        self._device = torch.device("cpu")

    def fingerprint(self) -> str:
        return fingerprint("text_encoder")

    def load(self, device: torch.device) -> None:
        self._model, self._device = _filled(TextTransformer, "text_encoder", device), device

    def conditioning_spec(self) -> Mapping[str, TensorSpec]:
        return {"embeds": TensorSpec((LENGTH, WIDTH), "float32"), "pooled": TensorSpec((POOLED,), "float32")}

    def check(self, prompt: str) -> None:
        tokenise(prompt)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        assert self._model is not None, "load() comes first"
        tokens = torch.tensor([tokenise(p) for p in prompts], device=self._device)
        embeds, pooled = self._model(tokens)
        return {"embeds": embeds, "pooled": pooled}


class ShapesDenoiser(Denoiser):
    """Predicts v on Stable Diffusion's noise schedule. Trained on latents of 16x16."""

    contract = 2
    prediction = "v"
    multiple_of = 4

    def __init__(self) -> None:
        self.noise_schedule = VariancePreserving()
        self._model: UNet | None = None

    def fingerprint(self) -> str:
        return fingerprint("denoiser")

    def check(self, spec: LatentSpec) -> None:
        expected = metadata("denoiser")["vae"]
        if spec.fingerprint != expected:
            found = spec.fingerprint or "an unnamed VAE"
            raise ValueError(f"trained on latents of the shapes VAE (fingerprint {expected}), not of {found}")

    def load(self, device: torch.device) -> None:
        self._model = _filled(UNet, "denoiser", device)

    def predict(self, x: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        assert self._model is not None, "load() comes first"
        alpha, sigma = self.noise_schedule.scale(t)
        log_ratio = tensors.send(torch.log(alpha / sigma.clamp(min=1e-3)).to(x.dtype), x.device)
        x = x.contiguous(memory_format=torch.channels_last)
        predicted: Tensor = self._model(x, log_ratio, conditioning["embeds"], conditioning["pooled"]).contiguous()
        return predicted
