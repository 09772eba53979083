"""The job that a workflow becomes: its flow, its parts, and what each row is made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from latentmill.comfy.inputs import RefusedError
from latentmill.comfy.links import (
    Cond,
    Decoded,
    Empty,
    Encoded,
    FromBatch,
    Latent,
    Loaded,
    Model,
    Output,
    Picture,
    Repeated,
    Sampled,
    Scaled,
    ScaledLatent,
    Setting,
    Vae,
)
from latentmill.comfy.pictures import MOST_PICTURES
from latentmill.comfy.texts import Texts
from latentmill.schedulers.comfy_names import SAMPLERS

MODELS = "${model.models}"
MOST_STAGES = 50
UNSAID_GUIDANCE = Setting(3.5)
"""What ComfyUI tells a distilled network where no node says a guidance."""


@dataclass
class Recipe:
    """A job for one output, without its source."""

    config: dict[str, Any] = field(default_factory=dict)
    """Keys of the job: flow, parts, stages."""
    rows: dict[str, Setting] = field(default_factory=dict)
    """What may differ from row to row, by the names that a source's rows have for it: ``seed``, ``steps``, ``refine.steps``."""
    shared: list[str] = field(default_factory=list)
    """Stages whose seed one node gives with the first one's: of other fields that it gives, they have the row's."""
    batch: range = range(1)
    """Pictures of a row, by their numbers in ComfyUI's batch."""
    texts: dict[str, Setting] = field(default_factory=dict)
    """Further texts of a row, by their names there."""
    masks: Any = None
    """Where the row's mask is, as a source is told; None: there is none."""
    places: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """Of each of them: the workflow's inputs that have that value, by node id and name."""
    notices: list[str] = field(default_factory=list)
    """What is likely not meant."""
    stages: dict[str, str] = field(default_factory=dict)
    """What nodes have become a stage: its name, by their ids."""

    def fixed(self) -> dict[str, Any]:
        """What must be alike of rows of one job."""
        columns = {name: each.column for name, each in (self.rows | self.texts).items()}
        return {**self.config, "columns": columns, "batch": self.batch, "masks": self.masks}


def part(**settings: Any) -> dict[str, Any]:
    """A part that is read out of ComfyUI's files."""
    return {"name": "comfy", "models": MODELS, **settings}


def recipe(output: Output) -> Recipe:
    """The recipe of an output. Raises RefusedError for what no flow of ours does."""
    return _Writer().write(output)


class _Writer:
    def __init__(self) -> None:
        self.made = Recipe()
        self.flow: list[Any] = ["read"]
        self.texts = Texts()
        self.parts: dict[str, Any] = {}
        """The job's own parts."""
        self.told: dict[str, Any] | None = None
        """What the text encoder was told for the sampler before."""
        self.sampling: dict[str, Any] = {}
        self.overrides: dict[str, dict[str, Any]] = {}
        """Parts of stages that are not the job's."""
        self.samplers = 0

    def write(self, output: Output) -> Recipe:
        line = _line(output.image)
        for at, each in enumerate(line):
            if isinstance(each, Loaded):
                self.made.rows["image"] = each.image
            elif isinstance(each, Empty):
                self.made.rows |= {"width": each.width, "height": each.height}
                self.made.batch = range(each.batch)
            elif isinstance(each, Repeated):
                self._repeated(each)
            elif isinstance(each, FromBatch):
                length = len(self.made.batch)
                first = min(each.first, length - 1)
                self.made.batch = self.made.batch[first : first + each.length]
            elif isinstance(each, (ScaledLatent, Decoded)) and _empty(each):
                raise RefusedError(
                    each.node, "it is supported behind a sampler or an encoded picture, and its latents are empty"
                )
            elif isinstance(each, (Scaled, ScaledLatent)):
                self._scaled(each, next((of for of in line[at:] if isinstance(of, (Encoded, Sampled))), None))
            elif isinstance(each, Encoded):
                self._encoded(each, [of for of in line[at:] if isinstance(of, Sampled)])
            elif isinstance(each, Sampled):
                self._sampled(each)
            else:
                made_by = [of for of in line[:at] if isinstance(of, Sampled)]
                self._vae(each, each.vae, self._stage(each, "decode"), made_by[-1:], each.tiling)
        self.flow.append("write")
        self.made.rows |= self.texts.fields  # a later sampler's, too
        self.made.texts = self.texts.more
        of_flux = (
            self.parts.get("text_encoder", {}).get("type") == "flux"
            or "guidance" in self.made.rows
            or "max_shift" in self.parts.get("denoiser", {})
        )
        dtype = {"dtype": "bfloat16" if of_flux else "float16"} if "denoiser" in self.parts else {}
        model = {"model": {"models": "", **dtype}} if self.parts else {}
        made_again = any(
            isinstance(each, (Decoded, Scaled)) and isinstance(of, (Scaled, Encoded)) for each, of in pairwise(line)
        )
        floats = {"float_pictures": True} if made_again else {}
        self.made.config = {**model, **self.parts, "flow": self.flow, **floats}
        once: dict[str, list[tuple[str, str]]] = {}
        for name, of in self.made.rows.items():
            if of.place is not None and [of.place] not in once.values():
                once[name] = [of.place]
        self.made.places, self.made.notices = {**once, **self.texts.places}, self.texts.notices
        if self.sampling:
            self.made.config["sampling"] = self.sampling
        if self.overrides:
            self.made.config["stages"] = self.overrides
        return self.made

    def _stage(self, each: Any, plugin: str, name: str | None = None, **settings: Any) -> str:
        """Put a stage into the flow, under a name of its own, and return that."""
        name = name or plugin
        taken = {item if isinstance(item, str) else item.get("as", item["name"]) for item in self.flow}
        if len(taken) > MOST_STAGES:
            raise RefusedError(each.node, f"a job of more than {MOST_STAGES} stages is not supported")
        names = (name, *(f"{name}{n}" for n in range(2, MOST_STAGES + 2)))
        called = next(free for free in names if free not in taken)
        plain = called == plugin and not settings
        self.flow.append(
            plugin if plain else {"name": plugin, **({} if called == plugin else {"as": called}), **settings}
        )
        self.made.stages[each.node.id] = called
        return called

    def _scaled(self, each: Scaled | ScaledLatent, then: Encoded | Sampled | None) -> None:
        if isinstance(each, ScaledLatent):
            self._stage(each, "latent_upscale", **each.settings)
        elif "model" in each.settings:
            self._stage(each, "upscale_model", **each.settings, models=MODELS)
        else:
            masked = isinstance(then, Encoded) and then.mask is not None
            self._stage(each, "image_upscale", None, **each.settings, **({"keep_mask": True} if masked else {}))

    def _vae(
        self, each: Decoded | Encoded, vae: Vae, stage: str, samplers: Sequence[Sampled], tiling: Mapping[str, Any]
    ) -> None:
        """``samplers``: the one, first of all, that makes the latents or that they go to: how they are scaled is its network's."""
        config = part(**vae.settings, **({"tiling": dict(tiling)} if tiling else {}))
        if "vae" in vae.settings:
            if not samplers:
                raise RefusedError(
                    each.node,
                    "a VAE of a file of its own is supported where a sampler's model tells how its latents are scaled",
                )
            model = samplers[0].guider.model.settings
            config |= {name: model[name] for name in ("checkpoint", "unet") if name in model}
        if self.parts.setdefault("vae", config) != config:
            self.overrides.setdefault(stage, {})["vae"] = config

    def _encoded(self, each: Encoded, samplers: list[Sampled]) -> None:
        if each.mask is not None:
            self.made.masks = [each.mask.channel, *each.mask.changes] if each.mask.changes else each.mask.channel
            if each.mask.channel != "image":
                self.made.rows["mask"] = each.mask.image
        if self.made.batch.start and any(of.noise.added for of in samplers):
            raise RefusedError(
                each.node,
                "behind LatentFromBatch of other than the first pictures it is not supported before noise is added: ComfyUI counts them anew",
            )
        both = bool(samplers) and not self.samplers  # pictures and texts in one stage
        if both:
            self._text_encoder(samplers[0])
        stage = self._stage(each, "encode" if both else "encode_images", **each.settings)
        self._vae(each, each.vae, stage, samplers, {})

    def _repeated(self, each: Repeated) -> None:
        if self.samplers or self.made.batch.start:
            raise RefusedError(each.node, "it is supported before the first sampler, and before LatentFromBatch")
        if len(self.made.batch) * each.amount > MOST_PICTURES:
            raise RefusedError(each.node, f"a batch of more than {MOST_PICTURES} pictures is not supported")
        self.made.batch = range(len(self.made.batch) * each.amount)

    def _text_encoder(self, each: Sampled) -> None:
        clip = each.guider.positive.clip
        if (negative := each.guider.negative) is not None and negative.clip.settings != clip.settings:
            raise RefusedError(each.node, "positive and negative come from two text encoders, and one is supported")
        config = part(**clip.settings, **self.texts.settings(each.guider))
        if self.told is None:
            self.parts["text_encoder"] = config
        elif self.told != config:
            name = self._stage(each, "encode_text", f"{_called(self.samplers)}_text")
            self.overrides.setdefault(name, {})["text_encoder"] = config
        self.told = config

    def _sampled(self, each: Sampled) -> None:
        first, rows = self.samplers == 0, self.made.rows
        if first and self.told is None:
            self._text_encoder(each)
            self._stage(each, "encode")
        elif not first:
            self._text_encoder(each)
        stage = self._stage(each, "denoise", None if first else _called(self.samplers))
        self.samplers += 1
        guider, sigmas = each.guider, each.sigmas
        denoiser = part(dtype="${model.dtype}", **guider.model.settings)
        named = SAMPLERS[each.sampler.name]
        grid = {"name": "comfy", **sigmas.settings, **named.grid, **(named.of_steps if sigmas.by_sampler else {})}
        scheduler = {"name": "comfy", "sampler": each.sampler.name, **each.sampler.settings, "grid": grid}
        counted = next((of for of in reversed(_line(each)) if isinstance(of, (FromBatch, Encoded))), None)
        noise = "none" if not each.noise.added else "comfy_each" if isinstance(counted, FromBatch) else "comfy"
        self._check(each)
        own = {"steps": sigmas.steps, "guidance_scale": guider.cfg, "strength": sigmas.denoise}
        if (told := guider.positive.guidance or self._unsaid_guidance(each)) is not None:
            own["guidance"] = told
        own["seed"] = each.noise.seed
        if first:
            self.parts |= {"denoiser": denoiser, "scheduler": scheduler}
            self.sampling = {"first_noise": noise}
            negative = {} if guider.negative is None else {"negative_prompt": Setting("")}
            rows |= own | negative
            return
        for name, of in own.items():
            shared = name in rows and of.column is None and of.place is not None and of.place == rows[name].place
            if shared and name == "seed":
                self.made.shared.append(stage)
            if not shared or name == "seed":
                rows[f"{stage}.{name}"] = of
        changed: dict[str, Any] = {"sampling": {"first_noise": noise}}
        changed |= {
            name: of for name, of in (("denoiser", denoiser), ("scheduler", scheduler)) if of != self.parts[name]
        }
        self.overrides[stage] = changed

    def _unsaid_guidance(self, each: Sampled) -> Setting | None:
        """ComfyUI's own, for a sampler that says none: its row would have the first one's. None: that says none, or this network is told none."""
        said, clip = self.made.rows.get("guidance"), each.guider.positive.clip.settings
        if said is None:
            return None
        alike = (clip, self.parts["text_encoder"]), (each.guider.model.settings, self.parts["denoiser"])
        files = ("checkpoint", "files", "unet")
        if clip.get("type") == "flux" or any(of.get(key, 0) == first.get(key) for of, first in alike for key in files):
            return UNSAID_GUIDANCE
        if "checkpoint" in clip and said != UNSAID_GUIDANCE:
            raise RefusedError(
                each.node,
                "the first sampler says a guidance and this one none, and whether its network takes one is not known: FluxGuidance before it says so",
            )
        return None

    def _check(self, each: Sampled) -> None:
        """Raises RefusedError for what is put together here and can't be."""
        guider, model = each.guider, each.sigmas.model
        if model is not None and _noise_of(model) != _noise_of(guider.model):
            raise RefusedError(
                each.node,
                f"its sigmas, {each.sigmas.node}, are laid by another model than it samples, and one is supported",
            )
        pp = each.sampler.name.endswith("_cfg_pp")
        counts = guider.negative is not None and (pp or guider.cfg != Setting(1.0))
        if counts and _guidance(guider.positive) != _guidance(guider.negative):
            raise RefusedError(each.node, "positive and negative have different guidance, and one is supported")
        encoded = next((of for of in reversed(_line(each)) if isinstance(of, Encoded)), None)
        if each.sampler.name == "ddim" and encoded is not None and encoded.mask is not None:
            raise RefusedError(
                each.node,
                "ddim with a mask is not supported: ComfyUI draws other noise for what stays; euler makes the same steps with the first noise",
            )
        one_sigma = each.sigmas.settings.get("end_at_step") == 0 and not each.sigmas.by_sampler
        if one_sigma and each.noise.added:
            raise RefusedError(
                each.node, f"noise without a step is not supported, and {each.sigmas.node} leaves it one sigma"
            )
        if pp and guider.negative is None:
            raise RefusedError(each.node, f"{each.sampler.name} without a negative is not supported")


def _noise_of(model: Model) -> dict[str, Any]:
    """What tells of a model's noise: its file, and how it is sampled."""
    return {name: value for name, value in model.settings.items() if name not in ("loras", "weight_dtype")}


def _guidance(cond: Cond | None) -> Setting:
    """What a network is told by a conditioning; ComfyUI's own, where it says nothing."""
    return cond.guidance if cond is not None and cond.guidance is not None else UNSAID_GUIDANCE


def _called(samplers: int) -> str:
    """The stage of a sampler that is not the first."""
    return "refine" if samplers == 1 else f"refine{samplers}"


def _empty(each: Decoded | ScaledLatent) -> bool:
    """Whether what a node is given are latents of nothing."""
    made_by = next((of for of in reversed(_line(each)) if isinstance(of, (Empty, Encoded, Sampled))), None)
    return isinstance(made_by, Empty)


def _line(end: Picture | Latent) -> list[Any]:
    """What leads to a picture or to latents, from the beginning: each has one before it."""
    line: list[Any] = []
    at: Picture | Latent | None = end
    while at is not None:
        line.append(at)
        at = (
            at.image
            if isinstance(at, (Scaled, Encoded))
            else at.latent
            if isinstance(at, (Decoded, ScaledLatent, Repeated, FromBatch, Sampled))
            else None
        )
    return line[::-1]
