"""A plugin of each kind, as an installed distribution has it; ``wrong`` says what is wrong with it."""

from pathlib import Path

import pyarrow as pa
import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from latentmill.plugin import (
    VAE,
    Denoiser,
    FollowsAuthors,
    Fragment,
    LatentSpec,
    RowError,
    Scheduler,
    Source,
    Stage,
    TextEncoder,
    tensors,
)
from latentmill.schedulers.noise_schedules import RectifiedFlow
from latentmill.sinks.parquet import Parquet


class Fine(VAE):
    """Two pixels a side become one. ``wrong`` says what is wrong with it."""

    contract = 2

    def __init__(self, wrong: str = "", weights: str = ""):
        if wrong == "init":
            raise KeyError("no such setting")
        self.wrong, self.weights = wrong, weights

    @property
    def spec(self):
        if self.wrong == "spec":
            raise AttributeError("no config yet")
        if self.wrong == "dtype":
            return LatentSpec(12, 2, 1.0, 0.0, "float99", "fine")
        downscale = 4 if self.wrong == "downscale" else 2
        return None if self.wrong == "no spec" else LatentSpec(12, downscale, 1.0, 0.0, "float32", "fine")

    def fingerprint(self):
        if self.wrong == "fingerprint":
            raise ValueError("two weights:\nwhich?")
        return 7 if self.wrong == "number" else "fine"

    def notices(self):
        if self.wrong == "notices":
            raise ZeroDivisionError("nothing to say")
        return ()

    def load(self, device):
        if self.weights and not Path(self.weights).exists():
            raise OSError(f"no weights at {self.weights}")

    def encode(self, images):
        if self.wrong == "raises":
            raise RuntimeError("shapes of kernel and input differ")
        if self.wrong == "raises for blue":
            assert not (images[:, 2] > 0.5).any(), "blue"
        if self.wrong == "nan":
            return pixel_unshuffle(images, 2) * float("nan")
        if self.wrong == "tuple":
            return (images,)
        if self.wrong == "one":
            return pixel_unshuffle(images, 2)[:1]
        return pixel_unshuffle(images, 2)

    def posterior(self, images):
        return self.encode(images), torch.zeros(len(images)) if self.wrong == "std" else self.encode(images)

    def decode(self, latents):
        if self.wrong == "decode raises":
            raise RuntimeError("no kernel image")
        if self.wrong == "black":
            return pixel_shuffle(latents, 2) * float("nan")
        made = pixel_shuffle(latents, 2)
        return made.repeat_interleave(2, 2).repeat_interleave(2, 3) if self.wrong == "decode" else made


class Words(TextEncoder):
    contract = 2

    def __init__(self, wrong: str = ""):
        self.wrong = wrong

    def check(self, prompt):
        if self.wrong == "check" and prompt:
            raise KeyError(prompt)
        if "zebra" in prompt:
            raise RowError("unknown word 'zebra'")

    def encode(self, prompts):
        if self.wrong == "raises":
            raise RuntimeError("expected scalar type Half")
        width = max(map(len, prompts)) if self.wrong == "shapes" else 3
        count = 1 if self.wrong == "batch" else len(prompts)
        made = {"embeds": torch.ones(count, width)}
        return list(made) if self.wrong == "list" else made


class Network(FollowsAuthors, Denoiser):
    contract, prediction = 2, "flow"

    def __init__(self, wrong: str = ""):
        self.wrong, self._noise_schedule = wrong, RectifiedFlow()

    @property
    def noise_schedule(self):
        if self.wrong == "noise_schedule":
            raise ValueError("trained_betas are not understood")
        return self._noise_schedule

    def check(self, spec):
        if self.wrong == "check":
            raise TypeError("no config")

    def times(self, steps, shape):
        if self.wrong == "times":
            raise IndexError("list index out of range")
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def predict(self, x, t, conditioning):
        if self.wrong == "shape":
            return x[:, :6]
        if self.wrong == "nan":
            return x * float("nan")
        if self.wrong == "nan for some":
            return torch.where(x[:, :1, :1, :1] > 0, x * float("nan"), x)
        if self.wrong == "raises":
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        return x

    def guide(self, prompt, negative, scale):
        return prompt[:1] if self.wrong == "guide" else prompt


class Solver(Scheduler):
    contract = 2

    def __init__(self, wrong: str = ""):
        self.wrong = wrong

    def init(self, field, x, t):
        return {"n": torch.zeros(1 + len(x))} if self.wrong == "init" else {}

    def step(self, field, x, t, s, state):
        if self.wrong == "nan":
            x = x / 0 * 0
        clean = field.clean(x, t)
        return (clean[0] if self.wrong == "shape" else clean), (None if self.wrong == "state" else state)


class Between(Stage):
    contract = 2

    def __init__(self, wrong: str = ""):
        self.wrong = wrong

    def __call__(self, batch, reject):
        if self.wrong == "raises":
            raise RuntimeError("no scorer")
        if self.wrong == "loses":
            return batch.slice(1)
        if self.wrong == "dict":
            return [batch.to_pydict()]
        if self.wrong == "twice":
            return [batch, batch]
        if self.wrong == "row":
            return batch.drop_columns(["row"])
        if self.wrong == "column":
            return batch.drop_columns(["seed"])

        def put(name, value):
            return batch.set_column(batch.schema.get_field_index(name), name, value)

        if self.wrong == "row_id":
            return put("row_id", pa.array(batch["row_id"].to_pylist()[::-1]))
        if self.wrong == "type":
            return put("width", batch["width"].cast(pa.int64()))
        large = tensors.from_arrow(batch, "image").repeat_interleave(2, 1).repeat_interleave(2, 2)
        if self.wrong == "unsized":
            return tensors.with_tensor(batch, "image", large)
        return batch


class Packs(Parquet):
    contract = 2

    def __init__(self, wrong: str = ""):
        super().__init__()
        self.wrong = wrong

    def pack(self, batch):
        packed = super().pack(batch)
        return packed.slice(1) if self.wrong == "loses" else packed.drop_columns(["row_id"])


class Rows(Source):
    """Nine rows of the prompts a, bb, ccc ...."""

    contract = 2

    def __init__(self, wrong: str = "", rows: int = 9):
        self.wrong, self.rows, self.calls = wrong, rows, 0

    @property
    def id_column(self):
        return "id" if self.wrong == "ids" else None

    def latent_spec(self):
        if self.wrong == "latent_spec":
            raise RuntimeError("not a file of ours")

    def fragments(self):
        if self.wrong == "fragments":
            raise KeyError("rows")
        if self.wrong == "negative":
            return [Fragment("all", -1)]
        return [Fragment("all", self.rows)] * (2 if self.wrong == "fragment twice" else 1)

    def texts(self, fragment):
        if self.wrong == "texts":
            raise UnboundLocalError("texts of no file")
        return super().texts(fragment)

    def read(self, fragment, start, stop):
        self.calls += 1
        if self.wrong == "raises":
            raise TypeError("'NoneType' object is not subscriptable")
        if self.wrong == "ignores start":
            stop = stop - start
            start = 0
        if self.wrong == "ignores start alone" and stop - start == 1:
            start, stop = 0, 1
        if self.wrong == "changes" and self.calls > 1:
            start, stop = start + 1, stop + 1
        if self.wrong == "few":
            stop -= 1
        if self.wrong == "many":
            stop += 1
        for number in range(start, stop):
            if self.wrong == "bad rows":
                yield RowError("no picture")
            elif self.wrong == "none":
                yield None
            else:
                yield {"prompt": "abcdefghij"[number % 10] * (1 + number), "width": 4, "height": 4}
