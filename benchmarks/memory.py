"""Stable Diffusion 1.5 in its real architecture with random weights: that it runs, and what each stage holds in memory.

    python benchmarks/memory.py

needs 5 GB of disk for a while and prints a table: two pictures of 256x256 pixels in 2 steps with guidance, on the CPU in float32.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from printed import begin, table

sys.path.append(str(Path(__file__).parents[1] / "plugins/diffusers/tests"))  # whose tiny models have a tokenizer

STAGES = ("encode", "denoise", "decode")
PROMPTS = ["a red fox", "two houses by the sea"]
SIZE = (32, 32)
"""Of the latents."""


def build(folder: Path, small: bool = False) -> Path:
    """Write the model: 860M parameters of the UNet, 123M of the text encoder, 84M of the VAE; fewer, to try it, if ``small``."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from tiny.text import tokenizer
    from tiny.unets import SD_BETAS
    from transformers import CLIPTextConfig, CLIPTextModel

    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            cross_attention_dim=768, sample_size=64, **({"block_out_channels": (32,) * 4} if small else {})
        ),
        scheduler=PNDMScheduler(**SD_BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False),
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text, vocab_size=49408, projection_dim=768)),
        tokenizer=tokenizer(77, pad="</s>"),
        safety_checker=None,
        feature_extractor=None,
    ).save_pretrained(folder)
    return folder


@torch.inference_mode()
def measure(stage: str, folder: str) -> dict[str, Any]:
    """What a process that is one stage's worker holds: MiB at its height, MiB before the weights came, and seconds."""
    import diffusers
    import transformers

    from latentmill_diffusers.denoiser import DiffusersDenoiser
    from latentmill_diffusers.text_encoder import DiffusersTextEncoder
    from latentmill_diffusers.vae import DiffusersVAE

    _ = diffusers.StableDiffusionPipeline, transformers.CLIPTextModel  # which import what they need when they are named
    before, start, cpu = _peak(), time.perf_counter(), torch.device("cpu")
    if stage == "encode":
        encoder = DiffusersTextEncoder(folder)
        encoder.load(cpu)
        encoder.encode(PROMPTS)
    elif stage == "denoise":
        denoiser = DiffusersDenoiser(folder)
        denoiser.load(cpu)
        told = {"embeds": torch.randn(4, 77, 768)}
        for t in (1.0, 0.5):
            denoiser.predict(torch.randn(4, 4, *SIZE), torch.full((4,), t, dtype=torch.float64), told)
    else:
        vae = DiffusersVAE(folder)
        vae.load(cpu)
        vae.decode(torch.randn(2, 4, *SIZE))
    return {"before": before, "peak": _peak(), "seconds": time.perf_counter() - start}


def _peak() -> float:
    # Not getrusage's, which begins with what the parent held.
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024


def main() -> None:
    """Build it, run the shipped job on it, and print the table."""
    import latentmill

    begin(__doc__)
    with tempfile.TemporaryDirectory() as work:
        folder = build(Path(work) / "sd15", small="--small" in sys.argv)
        sizes = {
            part: sum(file.stat().st_size for file in (folder / part).glob("*.safetensors")) / 2**20
            for part in ("text_encoder", "unet", "vae")
        }
        (Path(work) / "prompts.txt").write_text("\n".join(PROMPTS))
        told = ["cluster=inline", "stages=cpu", "model.dtype=float32", "samples_per_row=1", "sampling.steps=2"]
        told += ["sampling.width=256", "sampling.height=256", f"source.path={work}/prompts.txt", f"output={work}/out"]
        result = latentmill.run("sd15_txt2img", [f"model.path={folder}", *told])
        print(f"sd15_txt2img: {result.ok} of {result.planned} pictures in {result.seconds:.0f} s\n")
        found = []
        for stage, part in zip(STAGES, sizes):
            again = [sys.executable, __file__, "measure", stage, str(folder)]
            said = subprocess.run(again, capture_output=True, text=True, check=True).stdout
            held = json.loads(said.splitlines()[-1])
            above = held["peak"] - held["before"]
            each = (f"{sizes[part]:.0f}", f"{held['peak']:.0f}", f"{held['before']:.0f}", f"{above / sizes[part]:.2f}")
            found.append((stage, *each, f"{held['seconds']:.0f}"))
    head = (
        "stage",
        "weights, MiB",
        "peak of its process, MiB",
        "of which before the weights",
        "the rest / weights",
        "s",
    )
    table(head, found)


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[2:]))) if sys.argv[1:2] == ["measure"] else main()
