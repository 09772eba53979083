"""What both stages have in common: a pipeline that is called with some of its parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Annotated, Any

import torch

from latentmill import weights
from latentmill.plugin import Stage
from latentmill.text import near
from latentmill_diffusers.folder import Folder, pipeline_class, require_layers
from latentmill_diffusers.hub import weights_of
from latentmill_diffusers.loading import CAPTION_CLEANERS, dtype_of, part_class
from latentmill_diffusers.pipeline.absent import Absent, AbsentNetwork, config_of
from latentmill_diffusers.pipeline.known import (
    ENCODERS,
    GUIDANCE,
    NETWORK_PARTS,
    OFF,
    SINGLE,
    SKIPPED,
    TOLD,
    UNSET,
    refused,
)


@contextmanager
def _torch_seeded(seed: int, device: torch.device) -> Iterator[Callable[[], bool]]:
    """Torch's own generators begin with a number made of ``seed``, and are afterwards as before. Yields what says whether one was drawn from."""
    devices = [device] if device.type == "cuda" else []

    def states() -> list[bytes]:
        found = [torch.random.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
        return [state.numpy().tobytes() for state in found]

    with torch.random.fork_rng(devices):
        torch.manual_seed(seed ^ NOT_THE_FIRST_NOISE)
        before = states()
        yield lambda: states() != before


NOT_THE_FIRST_NOISE = 0x9E3779B97F4A7C15
"""A row's first noise is of its seed: what is drawn later may not be the same numbers."""


class Pipeline(Stage):
    """What both stages have in common: the pipeline of the model at ``path``, called with some of its parts.

    ``call`` holds more arguments for the pipeline, for all rows: ``{max_sequence_length: 128}``, say.
    """

    contract = 2
    libraries: Sequence[str] = ("diffusers", "tokenizers", "transformers")
    fingerprinted = ("path", "revision")

    def __init__(
        self,
        path: Annotated[str, weights_of("")] = "",
        revision: str | None = None,
        dtype: str = "float32",
        call: dict[str, Any] | None = None,
    ) -> None:
        self.folder = Folder(path, revision)
        self.logical = dtype_of(dtype)
        self.call = call or {}
        self.parameters = inspect.signature(self.cls.__call__).parameters
        if "clean_caption" in self.parameters:
            self.libraries = (*type(self).libraries, *CAPTION_CLEANERS)
        for name in self.call:
            if name not in self.parameters:
                raise ValueError(f"call: {self.folder.pipeline} takes no {name!r}{near(name, self.parameters)}")
        if reason := refused(self.cls):
            raise ValueError(f"{self.folder.pipeline} can't be run by its parts: {reason}")
        self.guidance = self._guidance()
        for name in self.call:
            if name in (*TOLD, self.guidance):
                raise ValueError(f"call: {name} is told row by row: a column of the source, or the job, has it")
        require_layers(self.folder)
        self.encoders = [name for name in ENCODERS if hasattr(self.cls, name)]
        self.single = self.folder.pipeline in SINGLE
        self.device = torch.device("cpu")
        self.draws = False
        """Whether it has drawn from torch's own generator, as schedulers do that are given no other."""

    def _guidance(self) -> str | None:
        """What the pipeline calls a row's guidance scale; of two names, the one that it looks at."""
        names = [name for name in GUIDANCE if name in self.parameters]
        if "true_cfg_scale" in names and "guidance_scale" in names:
            network = next(part for part in self.folder.index if part.startswith(NETWORK_PARTS))
            return "guidance_scale" if self.folder.config(network).get("guidance_embeds") else "true_cfg_scale"
        return next(iter(names), None)

    @cached_property
    def cls(self) -> Any:
        """The pipeline's class. Raises ValueError if diffusers has none of the name."""
        return pipeline_class(self.folder)

    def fingerprint(self) -> str:
        import diffusers

        return f"diffusers {diffusers.__version__} {self.folder.fingerprint(*filter(self.loads, self.folder.index))}"

    def loads(self, part: str) -> bool:
        """Whether the stage loads this part."""
        raise NotImplementedError

    def load(self, device: torch.device) -> None:
        given: dict[str, Any] = {}
        for name in inspect.signature(self.cls.__init__).parameters:
            if name in self.folder.index:
                value = self.folder.index[name]
                part = isinstance(value, list) and all(isinstance(each, (str, type(None))) for each in value)
                given[name] = self._part(name, device) if part else value
        self.device, self.pipeline = device, self.cls(**given)
        self.pipeline.set_progress_bar_config(disable=True)

    def _part(self, name: str, device: torch.device) -> Any:
        found = self.folder.class_of(name)
        if found is None or name.startswith(SKIPPED):
            return None
        cls = part_class(*found)
        if not issubclass(cls, torch.nn.Module):
            # Schedulers and guiders are light, and tokenizers aren't; a processor may be asked when the pipeline is built.
            if not (self.loads(name) or found[0] == "diffusers" or name == "processor"):
                return None
            weights.record(*self.folder.files(name))
            return cls.from_pretrained(self.folder / name)
        if self.loads(name):
            return self.folder.load(cls, name, self.logical).to(device)
        absent = AbsentNetwork if name.startswith(NETWORK_PARTS) else Absent
        return absent(config_of(cls, self.folder, name), self.logical)

    def run(
        self, given: Sequence[Mapping[str, Any]], instead: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> Any:
        """Call the pipeline, with ``instead`` of each of its encoders, for rows of one group: of equal steps, guidance and size.

        Either all of them give a negative prompt, or none does. torch's own generator, which is one for all, begins with a number made of the
        first row's seed: what is drawn from it is a row's only where that is called for alone.
        """
        first, known = given[0], self.parameters
        arguments: dict[str, Any] = {name: False for name in OFF if name in known} | {
            **{name: None for name in UNSET if name in known},
            **self.call,
            "prompt": [row["prompt"] for row in given],
            "height": first["height"],
            "width": first["width"],
            "num_inference_steps": first["steps"],
            "generator": [torch.Generator("cpu").manual_seed(row["seed"]) for row in given],
            "output_type": "latent",
            "return_dict": False,
        }
        if self.guidance:
            arguments[self.guidance] = first["guidance_scale"]
        for name, part in self.pipeline.components.items():
            if name.endswith("guider") and part is not None:  # HunyuanImage's have the scale
                part.guidance_scale = first["guidance_scale"]
        if "negative_prompt" in known and first["negative_prompt"] is not None:
            arguments["negative_prompt"] = [row["negative_prompt"] for row in given]
        if self.single:
            arguments |= {name: arguments[name][0] for name in ("prompt", "negative_prompt") if name in arguments}
        for name in self.encoders:
            setattr(self.pipeline, name, instead(getattr(self.pipeline, name)))
        try:
            with _torch_seeded(first["seed"], self.device) as has_drawn:
                made = self.pipeline(**arguments)[0]
                self.draws = self.draws or has_drawn()
                return made
        finally:
            for name in self.encoders:
                delattr(self.pipeline, name)
