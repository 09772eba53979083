"""A text encoder that counts in a file, and jobs with it."""

import json
import sys
from collections import Counter

CODE = '''
import hashlib, json, os
import pyarrow as pa
import torch
from latentmill.plugin import VAE, Denoiser, LatentSpec, RowError, RowField, Stage, TextEncoder
from latentmill.plugin import tensors
from latentmill.schedulers.noise_schedules import VariancePreserving

def note(**what):
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps(what) + "\\n")

class Counting(TextEncoder):
    """What it makes follows from text, tone and path, and from slot and size of its call if ``slotted``, as a matrix product's may."""

    contract = 2
    row_fields = (RowField("tone", pa.float64(), "how it is said", default=0.0),)
    fingerprinted = ("path",)

    def __init__(self, path: str = "", bias: float = 0.0, voice: str = "", slotted: bool = False) -> None:
        self.path, self.bias, self.slotted = path, bias + len(voice), slotted
        self.bad = os.environ.get("BAD", "")

    def fingerprint(self):
        return open(self.path).read() if self.path else "" if self.bad == "nameless" else "counting"

    def check(self, prompt):
        if prompt == "refused":
            raise RowError("a refused prompt")

    def warn(self, prompt):
        return "the prompt is longer than 12 letters" if len(prompt) > 12 else ""

    def encode(self, prompts, tone):
        note(prompts=list(prompts), by=os.getpid())
        if self.bad == "raise" and any("bad" in prompt for prompt in prompts):
            raise RuntimeError("out of words")
        made = [self.number(prompt) + tone + self.bias for prompt in prompts]
        if self.bad == "nan":
            made = [float("nan") if "bad" in prompt else value for prompt, value in zip(prompts, made)]
        if self.bad == "draw":
            made = [value + float(torch.rand(1)) for value in made]
        if self.slotted:
            made = [value + 0.001 * slot + len(prompts) for slot, value in enumerate(made)]
        embeds = torch.tensor(made)[:, None].repeat(1, 65 if self.bad == "wide" else 64)
        if self.bad == "turned":
            embeds = embeds.reshape(-1, 32, 2).transpose(1, 2)
        return {"embeds": embeds, "count": torch.tensor([len(p) for p in prompts])}

    def number(self, prompt):
        return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=2).digest(), "little") / 1000

class Zeros(Counting):
    """Has something else for no negative prompt, as Stable Diffusion XL."""

    contract = 2
    def encode_negative(self, prompts, tone):
        note(negative=list(prompts))
        return {n: 0 * v for n, v in super().encode([prompt or "" for prompt in prompts], tone).items()}

class Shown(Denoiser):
    """Its latents are what it is told."""

    contract, prediction, noise_schedule = 2, "sample", VariancePreserving()

    def predict(self, x, t, conditioning):
        return (0 * x) + conditioning["embeds"][:, :1, None, None]

class Guided(Shown):
    contract, guidance_embedded = 2, True
class Inpainting(Shown):
    contract, inpaints = 2, True

class Seen(VAE):
    contract = 2
    spec = LatentSpec(channels=3, downscale=1, scale=1.0, shift=0.0, dtype="float32", fingerprint="seen")

    def encode(self, images):
        note(pictures=len(images))
        return images

    def decode(self, latents):
        return latents

class Controls(Stage):
    """Brings a conditioning of its own, before prompts are encoded; of odd rows one that is not finite."""

    contract = 2
    adds = ("prompt:control",)

    def __call__(self, batch, reject):
        odd = torch.tensor([row % 2 for row in batch.column("row").to_pylist()])
        return tensors.with_tensor(batch, "prompt:control", torch.where(odd == 1, float("nan"), 1.0)[:, None])

class Looks(Stage):
    """A stage of somebody who knows of tensors what Arrow does."""

    contract = 2
    def __call__(self, batch, reject):
        column = batch.column("prompt:embeds").combine_chunks()
        note(looks=column.to_numpy_ndarray()[:, 0].tolist(), kind=str(batch.schema.field("prompt:embeds").type))
        return batch
'''
POINTS = {
    "text_encoder": ["counting = acme_prompts:Counting", "zeros = acme_prompts:Zeros"],
    "denoiser": ["shown = acme_prompts:Shown", "guided = acme_prompts:Guided", "inpainting = acme_prompts:Inpainting"],
    "vae": ["seen = acme_prompts:Seen"],
    "stage": ["looks = acme_prompts:Looks", "controls = acme_prompts:Controls"],
}


class Acme:
    """Jobs with a text encoder that counts."""

    def __init__(self, latentmill, folder, rows):
        self.latentmill, self.folder, self.read = latentmill, folder, rows
        self.notes, self.runs = folder / "notes", 0
        self.given = [
            "denoise", "cluster=inline", "samples_per_row=1", "vae.name=seen", "denoiser.name=shown",
            "text_encoder.name=counting", "scheduler.name=euler", "sampling.steps=1", "sampling.width=1", "sampling.height=1",
            "sampling.guidance_scale=1", f"source.path={folder}/rows.jsonl",
        ]  # fmt: skip

    def source(self, rows):
        given = [row if isinstance(row, dict) else {"prompt": row} for row in rows]
        (self.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))

    def job(self, *more):
        self.runs += 1
        self.output = self.folder / f"out{self.runs}"
        return [*self.given, *map(str, more), f"output={self.output}"]

    def __call__(self, *more, code=0):
        """Run a job; the values of its rows, of the last sample of each, by their place in the source."""
        self.notes.write_text("")
        assert self.latentmill("run", *self.job(*more)) == code, self.latentmill.said
        return {int(row["row_id"].partition("-")[0]): row.get("latents", [0])[0] for row in self.read(self.output)}

    def noted(self, what):
        return [line[what] for line in map(json.loads, self.notes.read_text().splitlines()) if what in line]

    def number(self, prompt):
        return sys.modules["acme_prompts"].Counting.number(None, prompt)

    def encoded(self):
        """How often each text was encoded."""
        return Counter(text for texts in self.noted("prompts") for text in texts)
