"""What comes over a workflow's links, as far as a job is concerned: which files, which settings, in which order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from latentmill.comfy.workflow import WorkflowNode


@dataclass(frozen=True)
class Setting:
    """An input that may differ from row to row: what the workflow says, and the column that is asked before."""

    value: Any
    column: str | None = None
    place: tuple[str, str] | None = field(default=None, compare=False)
    """Where it stands: node id and input."""


class Latent:
    """Latents, however they come to be."""


class Picture:
    """A picture, however it comes to be."""


@dataclass(frozen=True)
class Model:
    """A denoiser: the settings of our ``comfy``, without the folder."""

    node: WorkflowNode
    settings: Mapping[str, Any]

    def with_lora(self, file: str, weight: float) -> Model:
        return replace(self, settings=_with_lora(self.settings, file, weight))


@dataclass(frozen=True)
class Clip:
    """A text encoder, likewise."""

    node: WorkflowNode
    settings: Mapping[str, Any]

    def with_lora(self, file: str, weight: float) -> Clip:
        return replace(self, settings=_with_lora(self.settings, file, weight))


@dataclass(frozen=True)
class Vae:
    """A VAE, likewise."""

    node: WorkflowNode
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Words:
    """A text on its way into a conditioning."""

    node: WorkflowNode
    text: Setting


@dataclass(frozen=True)
class Tree:
    """What is made of texts or of other conditionings: an operation, what it takes by name, and its numbers."""

    operation: str
    """As text encoder ``comfy`` calls it; "text" has one Words."""
    parts: tuple[tuple[str, Tree | Words], ...]
    numbers: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def size(self) -> int:
        """How many texts there are in it."""
        return sum(part.size if isinstance(part, Tree) else 1 for _, part in self.parts)


@dataclass(frozen=True)
class Cond:
    """A conditioning: what it is made of, by which text encoder."""

    node: WorkflowNode
    tree: Tree
    clip: Clip
    guidance: Setting | None = None
    """The guidance that a distilled network is told."""


@dataclass(frozen=True)
class Loaded(Picture):
    """A picture from ComfyUI's folder of inputs."""

    node: WorkflowNode
    image: Setting


@dataclass(frozen=True)
class LoadedMask:
    """The mask of a loaded picture."""

    node: WorkflowNode
    image: Setting
    channel: str
    """As ``masks`` of a source calls it: "image" of LoadImage's."""
    changes: tuple[Any, ...] = ()
    """What is done to it, as ``masks`` calls that."""


@dataclass(frozen=True)
class Decoded(Picture):
    """A picture out of latents."""

    node: WorkflowNode
    latent: Latent
    vae: Vae
    tiling: Mapping[str, Any]


@dataclass(frozen=True)
class Scaled(Picture):
    """A picture of another size."""

    node: WorkflowNode
    image: Picture
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Empty(Latent):
    """Latents of nothing, ``batch`` of them."""

    node: WorkflowNode
    width: Setting
    height: Setting
    batch: int


@dataclass(frozen=True)
class Encoded(Latent):
    """Latents of a picture."""

    node: WorkflowNode
    image: Picture
    vae: Vae
    mask: LoadedMask | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Repeated(Latent):
    """Each of the latents so many times."""

    node: WorkflowNode
    latent: Latent
    amount: int


@dataclass(frozen=True)
class FromBatch(Latent):
    """``length`` of a batch of latents, from the ``first`` one on."""

    node: WorkflowNode
    latent: Latent
    first: int
    length: int


@dataclass(frozen=True)
class ScaledLatent(Latent):
    """Latents of another size."""

    node: WorkflowNode
    latent: Latent
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Sampler:
    """A solver and its settings."""

    node: WorkflowNode
    name: str
    """Of ComfyUI's."""
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Sigmas:
    """A grid: its settings, and over how many steps of how many."""

    node: WorkflowNode
    settings: Mapping[str, Any]
    steps: Setting
    denoise: Setting
    model: Model | None = None
    """The model whose noise they are laid by; None: the sampler's, or no model's."""
    by_sampler: bool = False
    """Whether the sampler's own node has laid it, which asks more of it for some samplers."""


@dataclass(frozen=True)
class Guider:
    """What a sampler asks: a model with conditionings, and how they are put together."""

    node: WorkflowNode
    model: Model
    positive: Cond
    negative: Cond | None
    cfg: Setting


@dataclass(frozen=True)
class Noise:
    """The noise that is added first."""

    node: WorkflowNode
    seed: Setting
    """0 where none is added, as ComfyUI has it."""
    added: bool


@dataclass(frozen=True)
class Sampled(Latent):
    """Latents that a sampler has made."""

    node: WorkflowNode
    latent: Latent
    guider: Guider
    sampler: Sampler
    sigmas: Sigmas
    noise: Noise


@dataclass(frozen=True)
class UpscaleModel:
    """A network that enlarges pictures."""

    node: WorkflowNode
    file: str


@dataclass(frozen=True)
class Output:
    """A picture that is kept."""

    node: WorkflowNode
    image: Picture


def _with_lora(settings: Mapping[str, Any], file: str, weight: float) -> Mapping[str, Any]:
    return {**settings, "loras": [*settings.get("loras", []), {"file": file, "weight": weight}]}
