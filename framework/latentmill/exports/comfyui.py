"""ComfyUI's LoadLatent."""

from __future__ import annotations

from collections.abc import Mapping

from latentmill.exports.formats import ExportFormat, ExportRow, safetensors_file


def _path(row: ExportRow) -> str:
    return f"{row.name}.latent"


def _files(row: ExportRow) -> Mapping[str, bytes]:
    """Without the empty marker the reader would take the latents for Stable Diffusion's, scaled, and scale them back."""
    import torch

    latents = torch.from_numpy(row.raw())[None]
    if row.family is not None and row.family.name == "wan":  # of video, with an axis of frames
        latents = latents[:, :, None]
    return {_path(row): safetensors_file({"latent_tensor": latents, "latent_format_version_0": torch.zeros(0)})}


COMFYUI = ExportFormat(
    name="comfyui",
    reader="ComfyUI's LoadLatent at 040a324",
    layout="STEM.latent, safetensors: latent_tensor, raw, float32 [1, C, h, w] (wan: [1, C, 1, h, w]), and the marker of version 0",
    checked="safetensors, and what the node does: numbers of each family",
    families=("sd", "sdxl", "sd3", "flux", "wan"),
    names="used",
    apart=True,
    files=_files,
    path=_path,
)
