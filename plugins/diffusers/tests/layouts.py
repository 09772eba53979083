"""In what order the pipelines of diffusers have latents, written out: what tests expect goes through no code of ours."""

PATCHES = """
    BriaPipeline ChromaPipeline FluxPipeline Krea2Pipeline LongCatImagePipeline NucleusMoEImagePipeline OvisImagePipeline
    QwenImagePipeline
""".split()
"""Tokens of 2x2 latent pixels: of each channel the four pixels stand together."""
TOKENS = ["BriaFiboPipeline", "Flux2Pipeline", "Flux2KleinPipeline", "Ideogram4Pipeline", "QwenImage21Pipeline"]
"""Tokens of a latent pixel."""
PIXELS = ["BriaFibo2Pipeline"]
"""The VAE's pixels, where we have patches of 2x2."""


def ordered(name, latents, channels, height, width):
    """Latents ``[C, h, w]`` of one picture, as the pipeline of that name has them."""
    if name in PATCHES:
        assert latents.shape == (1, height * width // 4, 4 * channels)
        grid = latents.reshape(height // 2, width // 2, channels, 2, 2)
        return grid.permute(2, 0, 3, 1, 4).reshape(channels, height, width)
    if name in TOKENS:
        assert latents.shape == (1, height * width, channels)
        return latents[0].reshape(height, width, channels).permute(2, 0, 1)
    if name in PIXELS:
        assert latents.shape == (1, channels // 4, 2 * height, 2 * width)
        grid = latents.reshape(channels // 4, height, 2, width, 2)
        return grid.permute(0, 2, 4, 1, 3).reshape(channels, height, width)
    if name == "Kandinsky5T2IPipeline":
        assert latents.shape == (1, 1, height, width, channels)
        return latents[0, 0].permute(2, 0, 1)
    assert latents.shape == (1, channels, height, width)
    return latents[0]
