"""A model without weights that counts what it computes, in files, and sends a signal when it has counted so far."""

import logging
import os
from pathlib import Path

POINTS = (
    "[latentmill.text_encoders]\nletters = acme_counts:Letters\n[latentmill.denoisers]\ncounts = acme_counts:Counts\n"
)
CODE = '''
import os
import signal
import time
from pathlib import Path

import torch
from latentmill.plugin import Denoiser, TextEncoder
from latentmill.schedulers.noise_schedules import RectifiedFlow


def count(notes, what, rows):
    """Note so many; and stop the process that ``notes/stop`` names, if it is time. A worker of another process waits
    until ``notes/heard`` says that it has heard: it might be done by then. Returns how many there are."""
    with open(Path(notes, what), "ab") as file:
        file.write(b"." * rows)
        found = file.tell()
    stop = Path(notes, "stop")
    try:
        which, when, number, process = stop.read_text().split()
        if which == what and found >= int(when):
            stop.unlink()
            if (again := Path(notes, "stop again")).exists():
                again.rename(stop)
            os.kill(int(process), int(number))
            while int(process) != os.getpid() and not Path(notes, "heard").exists():
                time.sleep(0.01)
    except (FileNotFoundError, ValueError):
        pass


class Letters(TextEncoder):
    contract = 2

    def __init__(self, notes: str = ""):
        self.notes = notes

    def encode(self, prompts):
        count(self.notes, "encoded", sum(map(bool, prompts)))  # not the negative prompt: each worker encodes it once
        return {"letters": torch.tensor([[float(sum(map(ord, prompt)) % 97)] for prompt in prompts])}


class Counts(Denoiser):
    contract, prediction, noise_schedule = 2, "flow", RectifiedFlow()

    def __init__(self, notes: str = ""):
        self.notes = notes

    def load(self, device):
        count(self.notes, "loaded", 1)

    def predict(self, x, t, conditioning):
        count(self.notes, "evaluated", len(x))
        letters = conditioning["letters"].reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        return torch.sin(x * 3 + letters)
'''


class Counted:
    """A job of that model, and what was computed for it."""

    def __init__(self, latentmill, folder, rows=24):
        self.latentmill, self.folder, self.notes = latentmill, folder, folder / "notes"
        self.notes.mkdir()
        self.heard = logging.Handler()
        self.heard.emit = self._hear
        (folder / "prompts.txt").write_text("".join(f"prompt {row}\n" for row in range(rows)))
        self.settings = [
            "cluster=inline", "vae.name=patches", "vae.side=1", "text_encoder.name=letters", "denoiser.name=counts",
            f"text_encoder.notes={self.notes}", f"denoiser.notes={self.notes}", f"source.path={folder / 'prompts.txt'}",
            "samples_per_row=1", "rows_per_shard=8", "sampling.steps=10", "sampling.guidance_scale=1",
            "sampling.width=4", "sampling.height=4", "scheduler=dpmpp_2m",
            *(f"stages.{stage}.batch_size=4" for stage in ("read", "encode", "denoise", "decode", "write")),
        ]  # fmt: skip

    def run(self, output, *more, code=0):
        """Run it into that folder; what was computed: (prompts encoded, rows evaluated)."""
        before = self.computed()
        arguments = ("run", "txt2img", *self.settings, f"output={self.place(output)}", *more)
        logging.getLogger("latentmill").addHandler(self.heard)
        try:
            assert self.latentmill(*arguments) == code, self.latentmill.said
        finally:
            logging.getLogger("latentmill").removeHandler(self.heard)
        return tuple(now - then for now, then in zip(self.computed(), before))

    def _hear(self, record):
        if "what is half done is kept" in record.getMessage():
            (self.notes / "heard").touch()

    def stop(self, number, when, what="evaluated", process=None, name="stop"):
        """Have the signal sent to a process, this one, when so many more have been counted."""
        (self.notes / "heard").unlink(missing_ok=True)
        so_far = self.computed()[what == "evaluated"]
        (self.notes / name).write_text(f"{what} {so_far + when} {int(number)} {process or os.getpid()}")

    def computed(self):
        sizes = [self.notes / name for name in ("encoded", "evaluated")]
        return tuple(path.stat().st_size if path.exists() else 0 for path in sizes)

    def place(self, output):
        return output if "://" in str(output) else self.folder / output

    def files(self, output):
        return {path.name: path.read_bytes() for path in sorted(Path(self.place(output), "data").glob("*"))}

    def kept(self, output):
        return sorted(path.name for path in Path(self.place(output), "half_done").glob("*"))

    def damage(self, output, change):
        """Make another file of each file of half-done rows: ``change`` of its bytes."""
        for name in self.kept(output):
            path = self.place(output) / "half_done" / name
            path.write_bytes(change(path.read_bytes()))
