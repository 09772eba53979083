"""Latents of the denoise stage beside those of ComfyUI's whole KSampler: network, sigmas, noise and solver (values/latents.json).

``LATENTS=all`` tries all; else each solver is tried on one network.
"""

import os

import pyarrow as pa
import pytest
import torch
from test_comfy_files import CPU, FILES, SHAPES, denoiser, drawn

from latentmill.batch import from_dicts, with_latents
from latentmill.fields import NOISE_INDEX
from latentmill.plugin import LatentSpec, StageContext, tensors
from latentmill.schedulers.comfy_names import named_sampler
from latentmill.schedulers.comfy_sampler import ComfySampler
from latentmill.stages.denoise import Denoise

MOST = 1e-4
TRIED = {
    "sd15": {"euler", "heun", "lms", "uni_pc", "uni_pc_bh2", "euler_cfg_pp", "dpmpp_2m_cfg_pp"},
    "sdxl": {"dpmpp_2m", "gradient_estimation_cfg_pp"},
    "sd3": {"deis", "res_multistep", "dpmpp_2m_cfg_pp"},
    "flux": {"dpm_2", "ipndm", "ipndm_v", "heunpp2", "gradient_estimation"},
}
"""Of each network's figures, unless all are asked for."""


def batch(family, said):
    """The second picture of KSampler's two."""
    channels, width, pooled = SHAPES[family]
    row = {
        "row": 0, "row_id": "0", "prompt": "", "negative_prompt": "", "seed": 77, "steps": 6, "width": 64, "height": 64,
        "guidance_scale": said.get("cfg", 1.0 if family == "flux" else 4.0), "strength": said["denoise"], "scheduler": "comfy",
    }  # fmt: skip
    begun = drawn(9, 2, channels, 8, 8)[1:] * 0.5 if said["denoise"] < 1 else torch.zeros(1, channels, 8, 8)
    table = with_latents(from_dicts([row]), begun, LatentSpec(channels, 8, 1.0, 0.0, "float32", "test"))
    table = table.append_column(NOISE_INDEX.name, pa.array([1], NOISE_INDEX.type))
    if family == "flux":
        table = table.append_column("guidance", pa.array([3.5], pa.float64()))
    for prefix, seed in (("prompt", 2), ("negative", 12)):
        table = tensors.with_tensor(table, f"{prefix}:embeds", drawn(seed, 1, 7, width))
        if pooled:
            table = tensors.with_tensor(table, f"{prefix}:pooled", drawn(seed + 1, 1, pooled))
    return table


@pytest.mark.parametrize("family", FILES)
def test_latents_are_those_of_ksampler(family, comfy_models, comfyui):
    network, sampler = denoiser(comfy_models, family), ComfySampler()
    network.load(CPU)
    chosen = [said for said in comfyui("latents")["rows"] if said["family"] == family]
    assert {said["sampler"] for said in chosen} >= TRIED[family]
    for said in chosen:
        if said["sampler"] not in TRIED[family] and os.environ.get("LATENTS") != "all":
            continue
        known, sampler = named_sampler(said["sampler"]), ComfySampler(said["sampler"])
        grid = {"name": "comfy", "scheduler": said["scheduler"], **known.grid, **known.of_steps}
        stage = Denoise()
        context = StageContext.of(
            {"denoiser": network, "scheduler": sampler},
            batch_size=4,
            sampling={"until": 0.0, "first_noise": "comfy"},
            choices={"scheduler": {"name": "comfy", "grid": grid}},
            scheduler_of=lambda name, sampler=sampler: sampler,
        )
        stage.prepare(context)
        [made] = stage(batch(family, said), lambda i, reason: pytest.fail(reason))
        x = tensors.from_arrow(made, "latents")[0].double().flatten()
        some = torch.tensor(said["some"], dtype=torch.float64)
        off = float((x[:: len(x) // 6] - some).abs().max() / x.abs().mean())
        print(f"{family:5} {said['sampler']:28} {off:.1e}")
        assert float(x.norm()) == pytest.approx(said["norm"], rel=MOST), said
        assert off <= MOST, said
