"""Train the three parts from pictures drawn here: first the autoencoder, then denoiser and text encoder together.

    python -m latentmill_shapes.train --out runs/shapes

Seeded: step i draws from (seed, i) alone, so a run that was stopped goes on with --resume where it would have been.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentmill.schedulers.noise_schedules import VariancePreserving
from latentmill_shapes.autoencoder import Autoencoder
from latentmill_shapes.denoiser import UNet
from latentmill_shapes.draw import Scene, draw, training_scenes
from latentmill_shapes.muon import Muon
from latentmill_shapes.text import TextTransformer, tokenise

Loss = Callable[[nn.Module, torch.Generator], tuple[Tensor, dict[str, float]]]


def optimise(
    model: nn.Module,
    loss: Loss,
    *,
    matrices: Iterable[str],
    steps: int,
    lr: float,
    warm_up: int,
    horizon: int,
    cooldown: int,
    ema_decay: float,
    seed: int,
    checkpoint: Path,
    resume: bool,
    save_seconds: float = 240.0,
) -> nn.Module:
    """Train `model` for `steps` steps and return its exponential moving average.

    Muon moves the weights named in `matrices`, AdamW all others. The learning rate rises over `warm_up` steps, follows a
    cosine that reaches 0 after `horizon` steps, and is led to 0 along a line over the last `cooldown` steps: so how long to
    train can still be decided on the way.
    """
    ema = copy.deepcopy(model).requires_grad_(False)
    named = dict(model.named_parameters())
    chosen = set(matrices)
    hidden = [p for n, p in named.items() if n in chosen]
    rest = [p for n, p in named.items() if n not in chosen]
    optimisers = [Muon(hidden, lr), torch.optim.AdamW(rest, lr, betas=(0.9, 0.99), weight_decay=0.01)]
    done, spent = 0, 0.0
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        done, spent = state["done"], state["seconds"]
    started = saved_at = time.monotonic()

    def save() -> None:
        torch.save(
            {
                "model": model.state_dict(),
                "ema": ema.state_dict(),
                "optimisers": [o.state_dict() for o in optimisers],
                "done": done,
                "seconds": spent + time.monotonic() - started,
            },
            checkpoint.with_suffix(".new"),
        )
        checkpoint.with_suffix(".new").replace(checkpoint)

    totals: dict[str, float] = {}
    while done < steps:
        cosine = 0.5 * (1 + math.cos(math.pi * done / horizon))
        rate = lr * cosine * min(1.0, (done + 1) / warm_up, (steps - done) / cooldown)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
        value, report = loss(model, torch.Generator().manual_seed(seed * 1_000_003 + done))
        model.zero_grad(set_to_none=True)
        value.backward()
        for optimiser in optimisers:
            optimiser.step()
        done += 1
        decay = min(ema_decay, (1 + done) / (10 + done))
        with torch.no_grad():
            for average, p in zip(ema.parameters(), model.parameters(), strict=True):
                average.lerp_(p, 1 - decay)
        for key, number in report.items():
            totals[key] = totals.get(key, 0.0) + number
        if done % 50 == 0 or done == steps:
            elapsed = spent + time.monotonic() - started
            means = " ".join(f"{k} {v / ((done - 1) % 50 + 1):.4f}" for k, v in totals.items())
            print(f"{checkpoint.stem} step {done}/{steps} {means} lr {rate:.5f} {elapsed:.0f} s", flush=True)
            totals = {}
        if time.monotonic() - saved_at > save_seconds or done == steps:
            save()
            saved_at = time.monotonic()
    return ema


def draw_training(count: int, seed: int) -> tuple[list[Scene], Tensor]:
    """`count` training scenes and their pictures, uint8 [count, 3, 64, 64]; one in eight scenes has one thing."""
    rng = np.random.default_rng(seed)
    one = [s for s in training_scenes() if s.second is None]
    two = [s for s in training_scenes() if s.second is not None]
    scenes = [
        one[rng.integers(len(one))] if rng.uniform() < 0.125 else two[rng.integers(len(two))] for _ in range(count)
    ]
    return scenes, torch.from_numpy(draw(scenes, seed)).permute(0, 3, 1, 2)


def as_model_input(pictures: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] to float32 in [-1, 1], channels last in memory."""
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def train_autoencoder(
    out: Path, *, pictures: int, steps: int, batch: int, lr: float, seed: int, resume: bool
) -> Autoencoder:
    """Train on `pictures` pictures, `batch` a step; returns the averaged model."""
    torch.manual_seed(seed)
    _, data = draw_training(pictures, seed)
    model = Autoencoder().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types forget memory_format

    def loss(m: nn.Module, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        assert isinstance(m, Autoencoder)
        x = as_model_input(data[torch.randint(len(data), (batch,), generator=generator)])
        mean, log_variance = m.posterior(x)
        z = mean + torch.randn(mean.shape, generator=generator) * (0.5 * log_variance).exp()
        error = (m.decode(z) - x).square().mean()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return error + 5e-5 * kl, {"psnr": -10 * math.log10(error.item() / 4), "kl": kl.item()}

    matrices = [n for n, p in model.named_parameters() if p.ndim == 4 and (".conv1." in n or ".conv2." in n)]
    ema = optimise(
        model,
        loss,
        matrices=matrices,
        steps=steps,
        lr=lr,
        warm_up=40,
        horizon=steps,
        cooldown=1,
        ema_decay=0.998,
        seed=seed,
        checkpoint=out / "autoencoder.pt",
        resume=resume,
    )
    assert isinstance(ema, Autoencoder)
    return ema


@torch.inference_mode()
def cache_latents(autoencoder: Autoencoder, count: int, seed: int) -> tuple[Tensor, Tensor, float, float]:
    """Latents [count, 4, 16, 16] and tokens [count, LENGTH] of fresh training pictures, and their shift and scale.

    Latents latents are (z - shift) * scale, of mean 0 and standard deviation 1 over everything.
    """
    latents, tokens = [], []
    for start in range(0, count, 2000):
        scenes, pictures = draw_training(min(2000, count - start), seed + 1 + start)
        latents.append(
            torch.cat([autoencoder.posterior(as_model_input(p))[0] for p in pictures.split(250)]).contiguous()
        )
        tokens.append(torch.tensor([tokenise(s.caption) for s in scenes]))
    z = torch.cat(latents)
    shift, scale = float(z.mean()), 1 / float(z.std())
    return (z - shift) * scale, torch.cat(tokens), shift, scale


class Conditional(nn.Module):
    """Denoiser and text encoder, trained as one."""

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = UNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types forget memory_format
        self.text_encoder = TextTransformer()

    def forward(self, x: Tensor, log_ratio: Tensor, tokens: Tensor) -> Tensor:
        v: Tensor = self.denoiser(x, log_ratio, *self.text_encoder(tokens))
        return v


def train_denoiser(
    autoencoder: Autoencoder, out: Path, *, pictures: int, steps: int, batch: int, lr: float, seed: int, resume: bool
) -> tuple[Conditional, float, float]:
    """Train on cached latents; returns (averaged model, latents' shift, latents' scale)."""
    torch.manual_seed(seed)
    cache = out / "latents.pt"
    if not (resume and cache.exists()):
        torch.save(cache_latents(autoencoder.eval(), pictures, seed), cache)
    latents, tokens, shift, scale = torch.load(cache, weights_only=True)
    print(f"{len(latents)} latents, shift {shift:.4f}, scale {scale:.4f}", flush=True)
    model = Conditional()
    alpha_bar = VariancePreserving().log_alpha_bar[1:].exp().float()  # of each of the 1000 timesteps
    empty = torch.tensor(tokenise(""))

    def loss(m: nn.Module, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        which = torch.randint(len(latents), (batch,), generator=generator)
        # One time in each of `batch` equal strata: less noise in the gradient than independent times.
        u = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        a2 = alpha_bar[(u * len(alpha_bar)).long().clamp(max=len(alpha_bar) - 1)]
        alpha, sigma = a2.sqrt()[:, None, None, None], (1 - a2).sqrt()[:, None, None, None]
        x0 = latents[which]
        noise = torch.randn(x0.shape, generator=generator)
        drop = torch.rand(batch, generator=generator) < 0.1
        words = torch.where(drop[:, None], empty, tokens[which])
        x = (alpha * x0 + sigma * noise).contiguous(memory_format=torch.channels_last)
        v = m(x, 0.5 * torch.log(a2 / (1 - a2)), words)
        error = (v - (alpha * noise - sigma * x0)).square().mean((1, 2, 3))
        # 1 / (1 - a2) = snr + 1 turns an error of v into one of x0 over sigma: weigh nearly clean latents down.
        weight = (6 * (1 - a2)).clamp(max=1)
        noisy = a2 < 0.5
        return (weight * error).mean(), {"v": error.mean().item(), "noisy": error[noisy].mean().item()}

    edges = ("denoiser.enter", "denoiser.leave", "denoiser.canvas.where", "text_encoder.token", "text_encoder.position")
    matrices = [n for n, p in model.named_parameters() if p.ndim >= 2 and not n.startswith(edges)]
    ema = optimise(
        model,
        loss,
        matrices=matrices,
        steps=steps,
        lr=lr,
        warm_up=100,
        horizon=8000,
        cooldown=2000,
        ema_decay=0.998,
        seed=seed + 1,
        checkpoint=out / "denoiser.pt",
        resume=resume,
    )
    assert isinstance(ema, Conditional)
    return ema, shift, scale


def export(autoencoder: nn.Module, model: Conditional, shift: float, scale: float, weights: Path) -> None:
    """Write the three parts' averaged weights as float16 safetensors."""
    weights.mkdir(parents=True, exist_ok=True)

    def write(part: str, module: nn.Module, about: dict[str, str]) -> str:
        half = {name: tensor.half().contiguous() for name, tensor in module.state_dict().items()}
        file = weights / f"{part}.safetensors"
        save_file(half, file, metadata=about)
        file.chmod(0o644)
        return hashlib.sha256(file.read_bytes()).hexdigest()[:16]

    vae = write("vae", autoencoder, {"shift": repr(shift), "scale": repr(scale)})
    write("denoiser", model.denoiser, {"vae": vae})
    write("text_encoder", model.text_encoder, {})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--autoencoder", type=Path, help="vae.safetensors to start from, instead of training one")
    parser.add_argument("--autoencoder-steps", type=int, default=3600)
    parser.add_argument("--pictures", type=int, default=100_000, help="pictures whose latents the denoiser learns from")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=0.004)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.autoencoder:
        autoencoder = Autoencoder()
        autoencoder.load_state_dict(load_file(args.autoencoder))
    else:
        autoencoder = train_autoencoder(
            args.out,
            pictures=30_000,
            steps=args.autoencoder_steps,
            batch=32,
            lr=0.01,
            seed=args.seed,
            resume=args.resume,
        )
    autoencoder.half().float()  # as it is shipped: the denoiser learns the latents that people will get
    model, shift, scale = train_denoiser(
        autoencoder,
        args.out,
        pictures=args.pictures,
        steps=args.steps,
        batch=args.batch,
        lr=args.lr,
        seed=args.seed,
        resume=args.resume,
    )
    export(autoencoder, model, shift, scale, args.out / "weights")


if __name__ == "__main__":
    main()
