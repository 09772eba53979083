"""What a scheduler asks of the rows that it moves, answered by a denoiser: prediction type, conditioning and guidance hidden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from latentmill import checks
from latentmill.plugin import Conditioning, Denoiser, Field, Prediction, tensors
from latentmill.schedulers import noise
from latentmill.stages.inpainting import InpaintingMask


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


class Both:
    """The conditioning ``[B + G, ...]`` of B rows and, once more, of the G of them that are ``guided``: the same while they are."""

    def __init__(
        self, prompt: Conditioning, negative: Conditioning, guided: tuple[bool, ...], device: torch.device
    ) -> None:
        self.guided = guided
        self.rows = torch.tensor([k for k, on in enumerate(guided) if on])
        self.there = self.rows if all(guided) else tensors.send(self.rows, device)
        self.conditioning = {name: torch.cat([value, self.guided_of(negative[name])]) for name, value in prompt.items()}

    def guided_of(self, values: Tensor) -> Tensor:
        """Those of ``values[B, ...]`` that are of guided rows."""
        if all(self.guided):
            return values
        return values[self.rows if values.device.type == "cpu" else self.there]


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
        inpainting: InpaintingMask | None = None,
    ) -> None:
        self.inpainting = inpainting
        self.denoiser, self.prompt, self.negative, self.guidance = denoiser, prompt, negative, guidance
        self.noise_schedule = denoiser.noise_schedule
        self.ahead: Sequence[Sequence[float]] = ()
        """Of each row the times of its grid behind this step."""
        self.seeds, self.shape, self.device, self.fixed = seeds, shape, device, fixed
        scale, rescale, start, stop, on = (
            torch.tensor([getattr(g, name) for g in guidance], dtype=torch.float64)
            for name in ("scale", "rescale", "start", "stop", "on")
        )
        self.start, self.stop = torch.where(on > 0, start, -1.0), stop
        self._known: dict[object, tuple[Tensor, ...]] = {}
        """Numbers of this step, on the CPU: of a time, by its ``id``, itself, alpha and sigma; the blend's."""
        self._there: dict[object, tuple[Tensor, ...]] = {}
        """Those that are where the latents are, shaped to broadcast against them."""
        sent = (self.column(each) for each in self.send(scale, rescale, self.start, self.stop))
        self.guidance_scale, self.guidance_rescale, self.start_there, self.stop_there = sent
        self.rescales = bool(rescale.any())
        self.unsound = torch.zeros(len(seeds), dtype=torch.bool, device=device)
        """Rows for which the network predicted something that is not finite, of latents that were."""
        self._both: Both | None = None

    def column(self, values: Tensor) -> Tensor:
        """``values[B]``, shaped to broadcast against the latents."""
        return values.reshape(-1, *(1 for _ in self.shape))

    def begin(self, t: Tensor, s: Tensor, blend: tuple[Tensor, ...] = ()) -> None:
        """A step begins. ``blend``: numbers ``[B]`` to be sent with its first, which ``blend`` then gives."""
        self._known, self._there = {"blend": blend} if blend else {}, {}
        self.expect(t, s)

    def blend(self) -> tuple[Tensor, ...]:
        return self._sent("blend")

    def expect(self, *times: Tensor) -> None:
        for t in times:
            if id(t) not in self._known:
                self._known[id(t)] = (t, *self.denoiser.noise_schedule.scale(t))

    def numbers(self, t: Tensor) -> tuple[Tensor, Tensor]:
        _, alpha, sigma = self._known.get(id(t)) or (t, *self.denoiser.noise_schedule.scale(t))
        return self.column(alpha), self.column(sigma)

    def scale(self, t: Tensor) -> tuple[Tensor, Tensor]:
        self.expect(t)
        _, alpha, sigma = self._sent(id(t))
        return alpha.clone(), sigma.clone()

    def send(self, *numbers: Tensor) -> Sequence[Tensor]:
        waiting = [key for key in self._known if key not in self._there]
        given = [*numbers, *(each for key in waiting for each in self._known[key])]
        if self.device.type != "cpu" and given:
            flat = tensors.send(torch.cat([each.flatten() for each in given]), self.device)
            given = [part.view(each.shape) for part, each in zip(flat.split([each.numel() for each in given]), given)]
        columns = map(self.column, given[len(numbers) :])
        for key in waiting:
            self._there[key] = tuple(islice(columns, len(self._known[key])))
        return given[: len(numbers)]

    def _sent(self, key: object) -> tuple[Tensor, ...]:
        if key not in self._there:
            self.send()
        return self._there[key]

    def time(self, ratio: Tensor) -> Tensor:
        return self.denoiser.noise_schedule.time(ratio.flatten().cpu())

    def following(self, s: Tensor) -> Tensor:
        found = super().following(s)
        for row, ahead in zip(found, self.ahead):
            row[: len(ahead)] = torch.tensor(ahead[:4], dtype=row.dtype)
        return found

    def clean(self, x: Tensor, t: Tensor) -> Tensor:
        x = self._masked(x, t)
        return self._kept(self._to_clean(self._evaluated(x, t)[0], x, t))

    def guided(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x = self._masked(x, t)
        predicted, negative = self._evaluated(x, t)
        return self._kept(self._to_clean(predicted, x, t)), self._to_clean(negative, x, t)

    def _to_clean(self, predicted: Tensor, x: Tensor, t: Tensor) -> Tensor:
        self.expect(t)
        _, alpha, sigma = self._sent(id(t))
        return to_clean(self.denoiser.prediction, predicted, x, alpha, sigma)

    def _masked(self, x: Tensor, t: Tensor) -> Tensor:
        """What the network is given."""
        x = x.to(torch.float32)
        if self.inpainting is None:
            return x
        self.expect(t)
        _, alpha, sigma = self._sent(id(t))
        return self.inpainting.noisy(x, alpha, sigma)

    def _kept(self, clean: Tensor) -> Tensor:
        return clean if self.inpainting is None else self.inpainting.kept(clean.to(torch.float32))

    def _evaluated(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What the network predicts, guided, and what it does of the negative prompt; of rows that aren't guided twice the same."""
        guided = tuple(((self.stop < t) & (t <= self.start)).tolist())
        if not any(guided):
            predicted = negative = self._predict(x, t, self.prompt)
        elif self.fixed:
            prompt, negative = self._predict(x, t, self.prompt), self._predict(x, t, self.negative)
            predicted = self._guide(prompt, negative, t, guided)
            negative = self._where_guided(negative, prompt, t, guided)
        else:
            if self._both is None or self._both.guided != guided:
                self._both = Both(self.prompt, self.negative, guided, self.device)
            both = self._both
            times = torch.cat([t, both.guided_of(t)])
            evaluated = self._predict(torch.cat([x, both.guided_of(x)]), times, both.conditioning)
            predicted, negative = evaluated[: len(x)], evaluated[len(x) :]
            if not all(guided):
                negative = predicted.index_copy(0, both.there, negative)
            predicted = self._guide(predicted, negative, t, guided)
        self.unsound |= _finite(x) & ~_finite(predicted)
        return predicted, negative

    def noise(self, t: Tensor, s: Tensor) -> Tensor:
        pinned = self.device.type == "cuda"
        return tensors.send(noise.between_all(self.seeds, t.tolist(), s.tolist(), self.shape, pinned), self.device)

    def _predict(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        if self.fixed and len(x) > 1 and self.denoiser.parted_by:
            each = range(len(x))
            one = ((x[i : i + 1], t[i : i + 1], {n: v[i : i + 1] for n, v in conditioning.items()}) for i in each)
            return torch.cat([self._predict(*row) for row in one])
        with checks.inside(self.denoiser):
            predicted = self.denoiser.predict(x, t, conditioning)
        checks.tensor(self.denoiser, "predict", predicted, x.shape, "the shape of x")
        return predicted

    def _guide(self, prompt: Tensor, negative: Tensor, t: Tensor, guided: Sequence[bool]) -> Tensor:
        with checks.inside(self.denoiser):
            result = self.denoiser.guide(prompt, negative, self.guidance_scale.to(prompt.dtype))
        checks.tensor(self.denoiser, "guide", result, prompt.shape, "the shape of both predictions")
        if self.rescales:
            axes = tuple(range(1, prompt.ndim))
            share = self.guidance_rescale.to(prompt.dtype)
            spread = prompt.std(dim=axes, keepdim=True) / result.std(dim=axes, keepdim=True)
            result = torch.where(share > 0, share * (result * spread) + (1 - share) * result, result)
        return self._where_guided(result, prompt, t, guided)

    def _where_guided(self, values: Tensor, others: Tensor, t: Tensor, guided: Sequence[bool]) -> Tensor:
        """``values`` of guided rows, and ``others`` of those that aren't."""
        if all(guided):
            return values
        self.expect(t)
        time = self._sent(id(t))[0]
        return torch.where((self.stop_there < time) & (time <= self.start_there), values, others)


def _finite(x: Tensor) -> Tensor:
    largest: Tensor = torch.linalg.vector_norm(x.flatten(1), torch.inf, dim=1)
    return largest < torch.inf


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
