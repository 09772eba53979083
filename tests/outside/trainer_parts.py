"""A VAE whose latents are worked out in the head, of any family of VAEs, and a folder of pictures for it."""

import hashlib
from functools import cached_property

from PIL import Image

from latentmill.plugin import statistics_digest

POINTS = "[latentmill.vaes]\nknown = acme_known:Known\n"
CODE = '''
import os
import torch
from torch.nn.functional import avg_pool2d
from latentmill.plugin import VAE, LatentSpec


class Known(VAE):
    """Of a block of 8 x 8 pixels of one red, from -1 to 1, channel c is ``2 * red + c``, and its spread ``0.5 + c``: raw, before scale and shift."""

    contract = 2

    def __init__(self, channels: int = 4, scale: float = 0.18215, shift: float = 0.0, dtype: str = "float32", downscale: int = 8, statistics: str = ""):
        self.told = LatentSpec(channels, downscale, scale, shift, dtype, "known", statistics=statistics)

    @property
    def spec(self):
        return self.told

    def encode(self, images):
        return self.posterior(images)[0]

    def posterior(self, images):
        red = avg_pool2d(images[:, :1], self.told.downscale)
        channel = torch.arange(self.told.channels).reshape(1, -1, 1, 1)
        broken, black = os.environ.get("ACME_BROKEN"), red[:, :, :1, :1] < 0  # for pictures that begin black
        if broken == "1":
            red = red.masked_fill(black, float("nan"))
        mean, std = 2 * red + channel, (0.5 + channel).expand(len(red), -1, *red.shape[2:])
        if broken == "std":
            std = std.masked_fill(black, float("inf"))
        return (mean - self.told.shift) * self.told.scale, std * self.told.scale

    def decode(self, latents):
        red = (latents[:, :1] / self.told.scale + self.told.shift) / 2
        return red.repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1)
'''
WAN_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
WAN = statistics_digest(WAN_MEAN, WAN_STD)
FAMILIES = {
    "sd": {"channels": 4, "scale": 0.18215, "shift": 0.0},
    "sdxl": {"channels": 4, "scale": 0.13025, "shift": 0.0},
    "sd3": {"channels": 16, "scale": 1.5305, "shift": 0.0609},
    "flux": {"channels": 16, "scale": 0.3611, "shift": 0.1159},
    "wan": {"channels": 16, "scale": 1.0, "shift": 0.0, "statistics": WAN},
}
PICTURES = {
    "a b.png": ([[255, 0]], "two blocks"),
    "cats/tom.png": ([[255], [255], [0]], 'a cat, ünder "quotes"'),
    "cats/dog.v2.png": ([[0, 255, 255], [255, 0, 0]], None),
}
"""Pictures by name: of each block its red, and the prompt. In the order in which they are read."""


def save(folder):
    for name, (blocks, prompt) in PICTURES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", (8 * len(blocks[0]), 8 * len(blocks)))
        for y, line in enumerate(blocks):
            for x, red in enumerate(line):
                picture.paste((red, 0, 0), (8 * x, 8 * y, 8 * x + 8, 8 * y + 8))
        picture.save(path)
        if prompt is not None:
            path.with_suffix(".txt").write_text(prompt, encoding="utf-8")
    return folder


class Trainers:
    """``encode(FAMILY, *settings)``: the folder of a dataset of the pictures; ``export(OUT, FORMATS)``: the folder of its export.

    Datasets are made once for all tests, in ``shared``; a test that changes one, or its ``pictures``, makes its ``own``.
    """

    def __init__(self, latentmill, tmp_path, shared):
        self.latentmill, self.root, self.shared = latentmill, tmp_path, shared

    @cached_property
    def pictures(self):
        return save(self.root / "pictures")

    def encode(self, family="sd", *settings):
        name = hashlib.sha256(" ".join((family, *settings)).encode()).hexdigest()[:16]
        if not (self.shared / "pictures").exists():
            save(self.shared / "pictures")
        return self._made(family, settings, self.shared / "pictures", self.shared / name)

    def own(self, family="sd", *settings, output="encoded"):
        return self._made(family, settings, self.pictures, self.root / output)

    def _made(self, family, settings, pictures, output):
        known = [f"vae.{name}={value}" for name, value in FAMILIES[family].items()]
        texts = any(each.startswith("text_encoder") for each in settings)
        name = ["encode_text", "source=images"] if texts else ["encode"]
        job = ["run", *name, "cluster=inline", "vae.name=known", *known, f"source.path={pictures}"]
        keep = [] if any(each.startswith(("source.keep", "source=")) for each in settings) else ["source.keep=[file]"]
        if not (output / "_SUCCESS").exists() or "--retry-failed" in settings:
            command = [*job, *keep, "rows_per_shard=2", *settings, f"output={output}"]
            assert self.latentmill(*command) == 0, self.latentmill.said
        return output

    def export(self, output, formats, *options, folder="export"):
        assert self.latentmill("export", output, self.root / folder, "--to", formats, *options) == 0, (
            self.latentmill.said
        )
        return self.root / folder

    def refused(self, output, formats, *options, folder="refused"):
        """The one line that is said, when nothing is written."""
        assert self.latentmill("export", output, self.root / folder, "--to", formats, *options) == 2, (
            self.latentmill.said
        )
        assert not (self.root / folder).exists()
        [line] = self.latentmill.err.splitlines()
        return line.removeprefix("latentmill: ")


def files(folder):
    """The files of an export by their names, less what it remembers."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in sorted(found.items()) if not name.startswith((".latentmill/", ".tmp/"))}
