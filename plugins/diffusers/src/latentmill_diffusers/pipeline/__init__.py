"""Any text-to-image pipeline of diffusers, with its own loop: two stages in place of encode and denoise.

    stages: {encode: {name: pipeline_encode, ...}, denoise: {name: pipeline_denoise, ...}}

A pipeline is called as everyone calls it, twice, and each time with only some of its parts. In ``pipeline_encode`` it has text
encoders and no network: what its ``encode_prompt`` returns is noted, and when the network is first called, the call ends. In
``pipeline_denoise`` it has the network and no text encoders: ``encode_prompt`` returns what was noted. So what a pipeline
calls its inputs, how it pads, guides and packs latents, is its own affair and in no table here. A few make more of a prompt than
``encode_prompt`` does, in a method of another name: that is noted in the same way. Where the network itself reads the prompt, there
is nothing to note, and the tokenizer goes with it.

Prompts are encoded one by one, and each row draws with a generator of its seed, so a row depends on itself alone. Rows that
agree in steps, guidance, size, and whether they give a negative prompt, go together.
"""

from latentmill_diffusers.pipeline.denoise import PipelineDenoise
from latentmill_diffusers.pipeline.encode import PipelineEncode

__all__ = ["PipelineDenoise", "PipelineEncode"]
