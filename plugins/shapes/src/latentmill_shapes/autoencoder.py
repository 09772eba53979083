"""The KL autoencoder: pictures [B, 3, H, W] to latents [B, 4, H/4, W/4] and back.

After Kingma & Welling 2014 (arXiv:1312.6114) and the first stage of Rombach et al. 2022 (arXiv:2112.10752). All but
the last layer works at a quarter of the side: 4x4 pixels are folded into channels first and unfolded last. There is no
normalisation over the picture, so a latent depends only on pixels near it and pictures of any size behave alike.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """x + conv(silu(conv(silu(x)))), starting as the identity; [B, C, H, W] to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]  # these have one

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv2(F.silu(self.conv1(F.silu(x))))
        return x + h


class Autoencoder(nn.Module):
    """A KL autoencoder of pictures in [-1, 1], with sides divisible by 4."""

    def __init__(self, channels: int = 4, width: int = 64, fine: int = 24) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, width, 3, padding=1),
            Residual(width),
            nn.SiLU(),
            nn.Conv2d(width, 2 * channels, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            Residual(width),
            Residual(width),
            nn.SiLU(),
            nn.Conv2d(width, 4 * fine, 1),
            nn.PixelShuffle(2),
            nn.SiLU(),
            nn.Conv2d(fine, fine, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(fine, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def posterior(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z | picture), each [B, 4, H/4, W/4]."""
        mean, log_variance = self.encoder(pictures).chunk(2, dim=1)
        return mean, log_variance.clamp(-20, 4)

    def decode(self, z: Tensor) -> Tensor:
        """Latents [B, 4, h, w] to pictures [B, 3, 4h, 4w] in about [-1, 1]."""
        pictures: Tensor = self.decoder(z)
        return pictures
