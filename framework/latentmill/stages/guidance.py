"""What a scheduler asks of the rows that it moves, answered by a denoiser: prediction type, conditioning and guidance hidden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentmill import checks
from latentmill.plugin import Conditioning, Denoiser, Field, Prediction
from latentmill.schedulers import noise


@dataclass(frozen=True)
class Guidance:
    """How a row is guided. A row's times run from 1, noise, to 0, clean."""

    scale: float
    """As ``Denoiser.guide`` takes it: ``negative + scale * (prompt - negative)``, as a rule."""
    rescale: float = 0.0
    """How far the guided prediction is brought back to the spread of the unguided one (Lin et al. 2024, eq. 15 and 16)."""
    start: float = 1.0
    stop: float = 0.0
    """Guided where ``stop < t <= start`` (Kynkäänniemi et al. 2024)."""
    on: bool = True
    """Whether the row is guided at all, as ``FollowsAuthors.guides`` says."""

    def guides(self, t: float, s: float) -> bool:
        """Whether a step from ``t`` to ``s`` asks for a guided evaluation anywhere."""
        return self.on and s <= self.start and t > self.stop


class ModelField(Field):
    """The field of some rows: ``prompt`` and ``negative`` conditioning ``[B, ...]``, one ``guidance`` and seed for each row.

    An evaluation of a row that is guided costs two of the network's; all of a call go in one batch. Where ``fixed``, a
    call is two batches of B instead: neither's bits may depend on who else is guided.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        prompt: Conditioning,
        negative: Conditioning,
        guidance: Sequence[Guidance],
        seeds: Sequence[int],
        shape: torch.Size,
        device: torch.device,
        fixed: bool,
    ) -> None:
        self.denoiser, self.prompt, self.negative, self.guidance = denoiser, prompt, negative, guidance
        self.seeds, self.shape, self.device, self.fixed = seeds, shape, device, fixed
        scale, rescale, start, stop, on = (
            torch.tensor([getattr(g, name) for g in guidance], dtype=torch.float64)
            for name in ("scale", "rescale", "start", "stop", "on")
        )
        self.start, self.stop = torch.where(on > 0, start, -1.0), stop
        self.guidance_scale, self.guidance_rescale = self.column(scale), self.column(rescale)
        self.rescales = bool(rescale.any())
        self.unsound = torch.zeros(len(seeds), dtype=torch.bool, device=device)
        """Rows for which the network predicted something that is not finite, of latents that were."""

    def column(self, values: Tensor) -> Tensor:
        """``values[B]``, shaped to broadcast against the latents, where they are."""
        return values.to(self.device).reshape(-1, *(1 for _ in self.shape))

    def scale(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.denoiser.noise_schedule.scale(t)
        return self.column(alpha), self.column(sigma)

    def time(self, ratio: Tensor) -> Tensor:
        return self.denoiser.noise_schedule.time(ratio.flatten().cpu())

    def clean(self, x: Tensor, t: Tensor) -> Tensor:
        x = x.to(torch.float32)
        guided = (self.stop < t) & (t <= self.start)
        if not bool(guided.any()):
            predicted = self._predict(x, t, self.prompt)
        elif self.fixed:
            predicted = self._predict(x, t, self.prompt)
            predicted = self._guide(predicted, self._predict(x, t, self.negative), guided)
        else:
            also = guided.nonzero()[:, 0].to(self.device)
            both = {name: torch.cat([value, self.negative[name][also]]) for name, value in self.prompt.items()}
            evaluated = self._predict(torch.cat([x, x[also]]), torch.cat([t, t[also.cpu()]]), both)
            predicted, negative = evaluated[: len(x)], evaluated[: len(x)].clone()
            negative[also] = evaluated[len(x) :]
            predicted = self._guide(predicted, negative, guided)
        self.unsound |= _finite(x) & ~_finite(predicted)
        alpha, sigma = self.scale(t)
        return to_clean(self.denoiser.prediction, predicted, x, alpha, sigma)

    def noise(self, t: Tensor, s: Tensor) -> Tensor:
        shape = tuple(self.shape)
        drawn = [noise.between(seed, a, b, shape) for seed, a, b in zip(self.seeds, t.tolist(), s.tolist())]
        return torch.stack(drawn).to(self.device)

    def _predict(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        with checks.inside(self.denoiser):
            predicted = self.denoiser.predict(x, t, conditioning)
        checks.tensor(self.denoiser, "predict", predicted, x.shape, "the shape of x")
        return predicted

    def _guide(self, prompt: Tensor, negative: Tensor, guided: Tensor) -> Tensor:
        with checks.inside(self.denoiser):
            result = self.denoiser.guide(prompt, negative, self.guidance_scale.to(prompt.dtype))
        checks.tensor(self.denoiser, "guide", result, prompt.shape, "the shape of both predictions")
        if self.rescales:
            axes = tuple(range(1, prompt.ndim))
            share = self.guidance_rescale.to(prompt.dtype)
            spread = prompt.std(dim=axes, keepdim=True) / result.std(dim=axes, keepdim=True)
            result = torch.where(share > 0, share * (result * spread) + (1 - share) * result, result)
        return torch.where(self.column(guided), result, prompt)


def _finite(x: Tensor) -> Tensor:
    return x.flatten(1).isfinite().all(1)


def to_clean(prediction: Prediction, predicted: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The clean latents that a prediction stands for, given ``x = alpha * x0 + sigma * noise``. Shapes broadcast.

    epsilon: ``(x - sigma * noise) / alpha`` · sample: itself · v (Salimans and Ho 2022, ``alpha * noise - sigma * x0``):
    ``(alpha * x - sigma * v) / (alpha² + sigma²)`` · flow (``noise - x0``): ``(x - sigma * flow) / (alpha + sigma)``.
    """
    if prediction == "epsilon":
        return (x - sigma * predicted) / alpha
    if prediction == "v":
        return (alpha * x - sigma * predicted) / (alpha**2 + sigma**2)
    if prediction == "flow":
        return (x - sigma * predicted) / (alpha + sigma)
    if prediction == "sample":
        return predicted
    raise ValueError(f"prediction {prediction!r}: expected epsilon, v, sample or flow")
