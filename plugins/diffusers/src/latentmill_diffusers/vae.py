"""The autoencoders of diffusers: pictures to scaled latents and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from latentmill.plugin import VAE, LatentSpec, statistics_digest
from latentmill_diffusers.configs import MODEL_INDEX, completed, downscale_of
from latentmill_diffusers.folder import LOCATION, Folder
from latentmill_diffusers.hub import weights_of
from latentmill_diffusers.loading import dtype_of, part_class

VAE_PARTS = ("vae", "movq")
"""What pipelines call it. They have a movq decode without its codebook."""
AUTOENCODERS = (
    "AsymmetricAutoencoderKL",
    "AutoencoderDC",
    "AutoencoderKL",
    "AutoencoderKLFlux2",
    "AutoencoderKLHunyuanImage",
    "AutoencoderKLQwenImage",
    "AutoencoderKLQwenImage21",
    "AutoencoderKLWan",
    "AutoencoderTiny",
    "ConsistencyDecoderVAE",
    "VQModel",
)
"""Classes that are compared with themselves run directly. Most others of diffusers are of video or sound."""
UNSCALED = ("GlmImagePipeline", "Kandinsky3Pipeline")
"""Pipelines that pass over the VAE's scaling factor."""
PIXEL_BY_PIXEL = ("Ideogram4Pipeline",)
"""Pipelines of FLUX.2's VAE whose 2x2 patches, and its batch norm, hold the channels of one pixel after another's."""


class DiffusersVAE(VAE):
    """The VAE of the model at ``path``, or a VAE alone, if ``path`` is its own folder.

    Latents are scaled as the model's denoiser sees them. Where that is more than one scale and one shift (statistics of
    each channel, as Qwen-Image's and Wan's; FLUX.2's batch norm over 2x2 patches) it is part of encode and decode, and the
    spec says scale 1 and shift 0. Autoencoders of video take and give a single frame.

    ``slicing`` decodes picture by picture and ``tiling`` in tiles that overlap, both to save memory. With ``dtype`` float16 a
    VAE that its config calls unsafe in it (``force_upcast``) stays in float32.
    """

    contract = 2
    libraries = ("diffusers",)
    fingerprinted: Sequence[str] = LOCATION

    def __init__(
        self,
        path: Annotated[str, weights_of(*VAE_PARTS)] = "",
        revision: str | None = None,
        config: Annotated[str | None, weights_of()] = None,
        dtype: str = "float32",
        slicing: bool = False,
        tiling: bool = False,
        compile: bool = False,
    ) -> None:
        self._made_of(Folder(path, revision, config), dtype, slicing, tiling, compile)

    def _made_of(self, folder: Folder, dtype: str, slicing: bool, tiling: bool, compile: bool) -> None:
        """Take what is in ``folder``, which says ``path`` and its like, with settings as they are. Raises ValueError."""
        self.folder = folder
        alone = (self.folder / "config.json").is_file()
        self.part = "" if alone else next((name for name in VAE_PARTS if (self.folder / name).is_dir()), VAE_PARTS[0])
        pipeline = self.folder.pipeline if (self.folder / MODEL_INDEX).is_file() else ""
        self.scaled, self.pixel_by_pixel = pipeline not in UNSCALED, pipeline in PIXEL_BY_PIXEL
        self.dtype, self.slicing, self.tiling, self.compile = dtype, slicing, tiling, compile
        self.logical = dtype_of(dtype)
        self.config = self.folder.config(self.part)
        self._require_known()
        self.folder.require_weights(self.part)
        self._model: Any = None
        self._device = torch.device("cpu")

    @property
    def spec(self) -> LatentSpec:
        config, patch = self._complete(), self.patch
        scaled = config.get("latents_mean") is None and patch == 1 and self.scaled
        return LatentSpec(
            channels=self._channels(config) * patch**2,
            downscale=downscale_of(config) * patch,
            scale=float(config.get("scaling_factor") or 1.0) if scaled else 1.0,
            shift=float(config.get("shift_factor") or 0.0) if scaled else 0.0,
            dtype=self.dtype,
            fingerprint=self.folder.fingerprint(self.part, index=False),
            statistics=self._statistics(config),
        )

    @property
    def patch(self) -> int:
        """FLUX.2's latents travel as 2x2 patches: its batch norm is over them."""
        return 2 if self.config.get("_class_name") == "AutoencoderKLFlux2" else 1

    def load(self, device: torch.device) -> None:
        cls = self._class()
        # Not the class's default, which is true: Stable Diffusion 1's config has no such key, and its VAE is safe.
        unsafe = self.logical == torch.float16 and self.config.get("force_upcast")
        self._model = self.folder.load(cls, self.part, torch.float32 if unsafe else self.logical).to(device)
        self._device = device
        if self.slicing:
            self._model.enable_slicing()
        if self.tiling:
            self._model.enable_tiling()
        if self.compile:
            self._model.encoder.compile()
            self._model.decoder.compile()

    def encode(self, images: Tensor) -> Tensor:
        return self.posterior(images)[0]

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(self._model.dtype)
        if self._complete().get("in_channels") == 4:  # opaque
            images = torch.cat([images, torch.ones_like(images[:, :1])], 1)
        encoded = self._model.encode(images[:, :, None] if self._frames else images)
        if "latent_dist" in encoded:
            mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
        else:
            mean = encoded["latents"] if "latents" in encoded else encoded["latent"]
            std = torch.zeros_like(mean)
        if self._frames:
            mean, std = mean[:, :, 0], std[:, :, 0]
        if self.patch > 1:
            mean, std = self._patched(mean), self._patched(std)
        gain, offset = self._affine()
        return (mean.float() - offset) / gain, std.float() / gain

    def decode(self, latents: Tensor) -> Tensor:
        gain, offset = self._affine()
        z = (latents * gain + offset).to(self._model.dtype)
        if self.pixel_by_pixel:
            z = z.unflatten(1, (self.patch**2, -1)).transpose(1, 2).flatten(1, 2)
        if self.patch > 1:
            z = pixel_shuffle(z, self.patch)
        if self.config["_class_name"] == "ConsistencyDecoderVAE":  # it draws noise: the same for every picture
            drawn = [torch.Generator(z.device).manual_seed(0) for _ in z]
            return torch.cat([self._model.decode(one[None], g).sample for one, g in zip(z, drawn)]).float()
        more = {"force_not_quantize": True} if self.part == "movq" else {}
        images: Tensor = self._model.decode(z[:, :, None] if self._frames else z, **more).sample.float()
        if self._frames:
            images = images[:, :, 0]
        if images.shape[1] == 4:  # transparency, laid on white
            opaque = (images[:, 3:].clamp(-1, 1) + 1) / 2
            images = 1 + (images[:, :3].clamp(-1, 1) - 1) * opaque
        return images

    def _patched(self, z: Tensor) -> Tensor:
        """What the VAE knows, ``[B, c, h, w]``, as patches, ``[B, C, h / patch, w / patch]``."""
        z = pixel_unshuffle(z, self.patch)
        return z.unflatten(1, (-1, self.patch**2)).transpose(1, 2).flatten(1, 2) if self.pixel_by_pixel else z

    @property
    def _frames(self) -> bool:
        """Whether it is an autoencoder of video."""
        return "temperal_downsample" in self._complete()

    def _affine(self) -> tuple[Tensor, Tensor]:
        """``(gain, offset)``, float32 ``[1, C, 1, 1]`` or numbers: what the VAE knows is ``latents * gain + offset``."""
        config = self._complete()
        if self.patch > 1:
            statistics = self._model.bn
            spread = torch.sqrt(statistics.running_var.float() + config["batch_norm_eps"])
            return spread.reshape(1, -1, 1, 1), statistics.running_mean.float().reshape(1, -1, 1, 1)
        scale = float(config.get("scaling_factor") or 1.0) if self.scaled else 1.0
        if config.get("latents_mean") is not None:
            std, mean = (torch.tensor(config[name], device=self._device) for name in ("latents_std", "latents_mean"))
            return std.reshape(1, -1, 1, 1) / scale, mean.reshape(1, -1, 1, 1)
        return torch.tensor(1.0 / scale), torch.tensor(float(config.get("shift_factor") or 0.0))

    def _statistics(self, config: dict[str, Any]) -> str:
        """As LatentSpec has them. FLUX.2's are among its weights, and are said by the fingerprint alone."""
        if config.get("latents_mean") is None or self.patch > 1:
            return ""
        scale = float(config.get("scaling_factor") or 1.0) if self.scaled else 1.0
        return statistics_digest(config["latents_mean"], [std / scale for std in config["latents_std"]])

    def _require_known(self) -> None:
        """Raise ValueError unless it makes pictures of latents, and is known to do so here."""
        name, where = self.config.get("_class_name"), self.folder / self.part
        if name not in AUTOENCODERS:
            raise ValueError(f"{where}: {name} is none of the autoencoders that run here: {', '.join(AUTOENCODERS)}")

    def _class(self) -> Any:
        return part_class("diffusers", self.config["_class_name"])

    def _complete(self) -> dict[str, Any]:
        """The config, with the class's defaults for what an old one leaves out."""
        return completed(self._class(), self.config)

    @staticmethod
    def _channels(config: dict[str, Any]) -> int:
        return int(config.get("z_dim") or config.get("vq_embed_dim") or config["latent_channels"])
