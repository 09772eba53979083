"""Batches as stages and sinks are given them, to try them on."""

from __future__ import annotations

import pyarrow as pa
import torch

from latentmill.batch import from_dicts, with_latents
from latentmill.plugin import LatentSpec, tensors

SPEC = LatentSpec(4, 8, 0.5, 0.1, "float32", "the suite's")


def rows(count: int = 5, height: int = 7, width: int = 5) -> pa.Table:
    """``count`` rows without tensors. Their ids are in no order, their prompts are of several alphabets, and one is empty."""
    prompts = ["a fox", "", 'two "houses", by\nthe sea', "лиса 狐 🦊", "a hen"]
    return from_dicts(
        [
            {
                "row": 10 + at,
                "row_id": f"{(at * 7 + 3) % 10:09d}-{at:03d}",
                "prompt": prompts[at % len(prompts)],
                "negative_prompt": None if at % 2 else "grey",
                "seed": 2**64 - 1 - at,
                "steps": 4,
                "scheduler": "euler",
                "strength": 1.0,
                "guidance_scale": 4.0,
                "height": height,
                "width": width,
                "warning": "",
            }
            for at in range(count)
        ]
    )


def with_pictures(count: int = 5, height: int = 7, width: int = 5) -> pa.Table:
    """Rows with a column ``image``, uint8 ``[H, W, 3]``: of odd sizes, from 0 to 255, each row's another."""
    drawn = torch.randint(0, 256, (count, height, width, 3), generator=torch.Generator().manual_seed(0))
    drawn[0], drawn[-1] = 0, 255
    return tensors.with_tensor(rows(count, height, width), "image", drawn.to(torch.uint8))


def with_clips(count: int = 5, frames: int = 3, height: int = 7, width: int = 5) -> pa.Table:
    """Rows with a column ``video``, uint8 ``[T, H, W, 3]``."""
    drawn = torch.randint(0, 256, (count, frames, height, width, 3), generator=torch.Generator().manual_seed(0))
    return tensors.with_tensor(rows(count, height, width), "video", drawn.to(torch.uint8))


def with_stored_latents(count: int = 5, dtype: torch.dtype = torch.float32) -> pa.Table:
    """Rows with a column ``latents`` of the space ``SPEC``, ``[4, 3, 5]``."""
    drawn = torch.randn(count, 4, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    return with_latents(rows(count, 24, 40), drawn, SPEC)
