from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from latentmill_shapes.autoencoder import Autoencoder
from latentmill_shapes.draw import is_held_out
from latentmill_shapes.muon import orthogonalise
from latentmill_shapes.train import Conditional, draw_training, export, optimise


class Stopped(Exception):
    pass


def fit_a_matrix(checkpoint: Path, resume: bool, stop_at: int | None = None) -> tuple[Tensor, list[float]]:
    torch.manual_seed(0)
    model, losses = nn.Linear(6, 4), list[float]()

    def loss(m: nn.Module, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        if len(losses) == stop_at:
            raise Stopped
        x = torch.randn(16, 6, generator=generator)
        value = (m(x) - x[:, :4]).square().mean()
        losses.append(value.item())
        return value, {"loss": value.item()}

    ema = optimise(
        model,
        loss,
        matrices=["weight"],
        steps=60,
        lr=0.1,
        warm_up=4,
        horizon=60,
        cooldown=10,
        ema_decay=0.9,
        seed=5,
        checkpoint=checkpoint,
        resume=resume,
        save_seconds=0.0,
    )
    return ema.state_dict()["weight"], losses


def test_a_stopped_run_ends_bit_for_bit_where_it_would_have(tmp_path: Path) -> None:
    whole, losses = fit_a_matrix(tmp_path / "whole.pt", resume=False)
    assert losses[-1] < 0.1 * losses[0]
    with pytest.raises(Stopped):
        fit_a_matrix(tmp_path / "parts.pt", resume=False, stop_at=23)
    rest, later = fit_a_matrix(tmp_path / "parts.pt", resume=True)
    assert torch.equal(rest, whole)
    assert later == losses[23:]


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 32)])
def test_muon_s_update_has_singular_values_near_one(shape: tuple[int, int]) -> None:
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(g))
    assert float(values.min()) > 0.3
    assert float(values.max()) < 1.3
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    assert float((orthogonalise(g) * (u @ vh)).sum() / (orthogonalise(g).norm() * (u @ vh).norm())) > 0.95


def test_training_pictures_are_of_training_captions() -> None:
    scenes, pictures = draw_training(64, seed=3)
    assert not any(is_held_out(s) for s in scenes)
    assert pictures.shape == (64, 3, 64, 64)
    assert {s.second is None for s in scenes} == {True, False}


def test_export_writes_half_precision_and_ties_the_denoiser_to_the_latent_space(tmp_path: Path) -> None:
    import hashlib

    model = Conditional()
    export(Autoencoder(), model, 0.25, 0.5, tmp_path)
    with safe_open(tmp_path / "vae.safetensors", framework="pt") as vae:
        assert vae.metadata() == {"shift": "0.25", "scale": "0.5"}
    digest = hashlib.sha256((tmp_path / "vae.safetensors").read_bytes()).hexdigest()[:16]
    with safe_open(tmp_path / "denoiser.safetensors", framework="pt") as denoiser:
        assert denoiser.metadata() == {"vae": digest}
        stored = denoiser.get_tensor("down.weight")
        assert stored.dtype == torch.float16
        assert torch.equal(stored, model.denoiser.down.weight.half())
