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

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import count
from typing import Any, NoReturn

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

from latentmill import syntax, tensors, weights
from latentmill.batch import PROMPT_PREFIX, with_latents, with_warnings
from latentmill.fields import BATCH_SCHEMA, OWN_FIELDS
from latentmill.plugin import LatentSpec, Reject, RowError, Stage
from latentmill.text import near, one_line
from latentmill_diffusers.families import NO_NEGATIVE
from latentmill_diffusers.folder import Folder, completed, dtype_of, part_class, pipeline_class, require_layers
from latentmill_diffusers.messages import quiet
from latentmill_diffusers.tokens import Watched, warning_of
from latentmill_diffusers.vae import DiffusersVAE

NETWORKS = ("transformer", "unet", "unconditional_transformer")
DECODERS = ("vae", "movq", "vqgan")
"""How the names of the parts begin that are the network, and that make pictures of latents."""
READ_BY_LOOPS = ("steps", "guidance_scale")
"""What of the fields that say how a row is denoised a pipeline's own loop reads."""
SKIPPED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that no latents of a prompt need."""
OFF = ("use_resolution_binning", "enable_prompt_rewrite", "use_pe", "prompt_upsampling")
"""Parameters that are false here: they change the size that was asked for, or the prompt."""
UNSET = ("guidance_schedule",)
"""Parameters that are None here: what they stand in for is told row by row."""
TOLD = (
    "prompt",
    "negative_prompt",
    "height",
    "width",
    "num_inference_steps",
    "generator",
    "output_type",
    "return_dict",
)
"""Parameters that are a row's, or ours."""
GUIDANCE = ("guidance_scale", "true_cfg_scale", "distilled_guidance_scale")
"""What pipelines call a row's guidance scale."""
ENCODERS = ("encode_prompt", "generate_prior_tokens")
"""Methods whose results are noted. The second draws a picture's tokens, by a language model and with the row's seed."""
FRAME_FIRST = ("Kandinsky5T2IPipeline",)
"""Pipelines whose latents are ``[B, frame, h, w, C]``; all others' of video are ``[B, C, frame, h, w]``."""
SINGLE = ("DreamLitePipeline", "OmniGenPipeline", "PRXPipeline")
"""Pipelines that take no list of prompts, fail with one when they guide, or fill prompts up: their rows go one by one."""
COMPARED = (
    *(
        "AuraFlowPipeline",
        "BriaFibo2Pipeline",
        "BriaFiboPipeline",
        "BriaPipeline",
        "ChromaPipeline",
        "CogView3PlusPipeline",
    ),
    *(
        "CogView4Pipeline",
        "DreamLitePipeline",
        "ErnieImagePipeline",
        "Flux2Pipeline",
        "FluxPipeline",
        "GlmImagePipeline",
    ),
    *("HiDreamImagePipeline", "HunyuanDiTPipeline", "HunyuanImagePipeline", "Ideogram4Pipeline", "Kandinsky3Pipeline"),
    *(
        "Kandinsky5T2IPipeline",
        "KolorsPipeline",
        "Krea2Pipeline",
        "LatentConsistencyModelPipeline",
        "LongCatImagePipeline",
    ),
    *(
        "Lumina2Pipeline",
        "LuminaPipeline",
        "NucleusMoEImagePipeline",
        "OmniGenPipeline",
        "OvisImagePipeline",
        "PRXPipeline",
    ),
    *("PixArtAlphaPipeline", "PixArtSigmaPipeline", "QwenImage21Pipeline", "QwenImagePipeline", "SanaPipeline"),
    *("SanaSprintPipeline", "StableDiffusion3Pipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline"),
    "ZImagePipeline",
)
"""Pipelines whose latents were compared with their pictures, so that it is known which axis is which."""
GUIDES_WITH_NEGATIVE = ("FluxPipeline", "NucleusMoEImagePipeline", "QwenImage21Pipeline", "QwenImagePipeline")
"""Pipelines that guide only by a negative prompt that is given."""
REFUSED = {
    "Cosmos2TextToImagePipeline": "it makes a safety checker of its own, whatever it is given",
    "Flux2KleinPipeline": "it undoes the VAE's batch norm before it returns latents; model=diffusers runs it",
    "IFPipeline": "it makes pixels and no latents",
    "PRXPixelPipeline": "it makes pixels and no latents",
}
"""Pipelines that can't be run so, by name, and why."""
NOTED = b"latentmill_diffusers.noted"
"""Metadata key, on the first column of conditioning, of how ``encode_prompt`` returned it."""


class Pipeline(Stage):
    """What both stages have in common: the pipeline of the model at ``path``, called with some of its parts.

    ``call`` holds more arguments for the pipeline, for all rows: ``{max_sequence_length: 128}``, say.
    """

    contract = 2
    libraries = ("diffusers", "tokenizers", "transformers")
    fingerprinted = ("path", "revision")

    def __init__(
        self, path: str = "", revision: str | None = None, dtype: str = "float32", call: dict[str, Any] | None = None
    ) -> None:
        self.folder = Folder(path, revision)
        self.logical = dtype_of(dtype)
        self.call = call or {}
        self.parameters = inspect.signature(self.cls.__call__).parameters
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

    def _guidance(self) -> str | None:
        """What the pipeline calls a row's guidance scale; of two names, the one that it looks at."""
        names = [name for name in GUIDANCE if name in self.parameters]
        if "true_cfg_scale" in names and "guidance_scale" in names:
            network = next(part for part in self.folder.index if part.startswith(NETWORKS))
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
        absent = Network if name.startswith(NETWORKS) else Absent
        return absent(_config(cls, self.folder, name), self.logical)

    def run(
        self, given: Sequence[Mapping[str, Any]], instead: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> Any:
        """Call the pipeline, with ``instead`` of each of its encoders, for rows of one group: of equal steps, guidance and size.

        Either all of them give a negative prompt, or none does.
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
            return self.pipeline(**arguments)[0]
        finally:
            for name in self.encoders:
                delattr(self.pipeline, name)


class PipelineEncode(Pipeline):
    """Adds ``prompt:*``: what the pipeline's ``encode_prompt`` returns for the row's prompt and negative prompt."""

    reads: Mapping[str, str | None] = {}
    adds = (PROMPT_PREFIX,)

    def load(self, device: torch.device) -> None:
        super().load(device)
        self.watched = Watched(self.pipeline)
        self.forms: dict[str, Any] = {}
        """Of what ``encode_prompt`` returned so far, by what they have in common."""

    def notices(self) -> Sequence[str]:
        told = self.guidance == "guidance_scale" and "true_cfg_scale" in self.parameters  # the network is
        return (
            []
            if told or self.folder.pipeline not in GUIDES_WITH_NEGATIVE
            else [NO_NEGATIVE.format(self.folder.pipeline)]
        )

    def loads(self, part: str) -> bool:
        others = (*NETWORKS, *DECODERS, *SKIPPED)
        return bool(self.encoders) and self.folder.class_of(part) is not None and not part.startswith(others)

    @torch.inference_mode()
    def __call__(self, batch: pa.Table, reject: Reject) -> Iterator[pa.Table]:
        noted: dict[tuple[Any, ...], dict[str, Any]] = {}
        groups: dict[str, list[tuple[int, list[Tensor]]]] = {}
        columns = [name for name in BATCH_SCHEMA.names if name in batch.column_names]
        given = [name for name in ("image", "mask", "latents") if name in batch.column_names]
        sigmas = self.folder.index.get("sample_sigmas")
        told = ["prompt", "negative_prompt", "guidance_scale", "width", "height"] + ["seed"] * (len(self.encoders) > 1)
        warnings: list[Sequence[str]] = [()] * len(batch)
        for i, row in enumerate(batch.select(columns).to_pylist()):
            try:
                _check(row, self.folder.pipeline)
                if row["negative_prompt"] and "negative_prompt" not in self.parameters:
                    raise RowError(f"{self.folder.pipeline} takes no negative prompt, and the row has one")
                if sigmas and row["steps"] != len(sigmas):
                    own = f"the steps of its model's sample_sigmas: {len(sigmas)} is expected, not {row['steps']}"
                    raise RowError(f"{self.folder.pipeline} makes {own}")
                if given:
                    raise RowError(f"{self.folder.pipeline} begins from noise, and takes no {given[0]}")
                key = tuple(row[n] for n in told)
                if key not in noted:
                    noted[key] = self._note(row)
                warnings[i] = noted[key]["warnings"]
            except ValueError as error:
                reject(i, one_line(error))
                continue
            shapes = [[list(leaf.shape), str(leaf.dtype)] for leaf in noted[key]["leaves"]]
            group = json.dumps([noted[key]["form"], shapes])
            groups.setdefault(group, []).append((i, noted[key]["leaves"]))
        if any(warnings):
            batch = with_warnings(batch, warnings)
        for group, members in groups.items():
            part = batch.take([i for i, _ in members])
            for k in range(len(members[0][1])):
                part = tensors.with_tensor(
                    part, f"{PROMPT_PREFIX}{k}", torch.stack([leaves[k] for _, leaves in members])
                )
            at = part.schema.get_field_index(f"{PROMPT_PREFIX}0")
            field = part.schema.field(at)
            about = {**field.metadata, NOTED: json.dumps(json.loads(group)[0]).encode()}
            yield part.set_column(at, field.with_metadata(about), part.column(at))

    def _note(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What ``encode_prompt`` returns for a row: its tensors, on the CPU, and its form.

        Which axis is the batch's is seen once for each form, by two of the row.
        """
        warnings = self._syntax(row)
        if not self.encoders:
            return {"form": [], "leaves": [torch.zeros(1)], "warnings": warnings}
        self.watched.seen.clear()
        returned = self._returned([row])
        most = self.call.get(
            "max_sequence_length", getattr(self.parameters.get("max_sequence_length"), "default", None)
        )
        for name, prefix in (("prompt", ""), ("negative_prompt", "negative_prompt: ")):
            if not row[name]:
                continue
            begins = " ".join(row[name].lower().split())[:40]  # some pipelines clean their prompts
            its = [each for each in self.watched.given(most) if begins in " ".join(each.text.lower().split())]
            text, _ = warning_of(its, row[name])
            warnings += [prefix + text] * bool(text)
        kind = json.dumps([_kind(each) for each in returned])
        if kind not in self.forms:
            leaf = count()
            twice = returned if self.single else self._returned([row, row])
            self.forms[kind] = [_form(one, two, leaf) for one, two in zip(returned, twice, strict=True)]
        form = self.forms[kind]
        leaves = [leaf.cpu() for one, each in zip(returned, form) for leaf in _leaves(one, each)]
        if not leaves:
            raise ValueError(f"{self.folder.pipeline} calls no encode_prompt before its network")
        return {"form": form, "leaves": leaves, "warnings": warnings}

    def _syntax(self, row: Mapping[str, Any]) -> list[str]:
        negative = [f"negative_prompt: {line}" for line in syntax.told(row["negative_prompt"] or "", self.reads)]
        return [*syntax.told(row["prompt"], self.reads), *negative]

    def _returned(self, given: Sequence[Mapping[str, Any]]) -> list[Any]:
        returned = []

        def noting(original: Callable[..., Any]) -> Callable[..., Any]:
            def encode(*positional: Any, **named: Any) -> Any:
                returned.append(original(*positional, **named))
                for part in self.pipeline.components.values():
                    if isinstance(part, Network):
                        part.near = True
                return returned[-1]

            return encode

        try:
            with quiet(self.pipeline):
                self.run(given, noting)
        except _Reached:
            return returned
        raise RuntimeError(f"{self.folder.pipeline} made latents without calling its network")


class PipelineDenoise(Pipeline):
    """Replaces ``prompt:*`` by ``latents``, clean and scaled as the VAE of the job, ``vae``, expects them.

    With ``alone`` the pipeline is called for each row by itself: a row's bits then don't depend on its company.
    """

    takes = (PROMPT_PREFIX,)
    adds = ("latents",)
    drops = (PROMPT_PREFIX,)

    def __init__(
        self,
        path: str = "",
        revision: str | None = None,
        dtype: str = "float32",
        call: dict[str, Any] | None = None,
        vae: dict[str, Any] | None = None,
        alone: bool = False,
    ) -> None:
        super().__init__(path, revision, dtype, call)
        self.alone = alone or self.single
        settings = dict(vae or {})
        if str(settings.pop("name", None)).rpartition(":")[2] != "diffusers":
            raise ValueError("vae must be the job's (vae: ${vae}), and that the pipeline's own: vae=diffusers")
        self.spec: LatentSpec = DiffusersVAE(**settings).spec

    def loads(self, part: str) -> bool:
        wanted = NETWORKS if self.encoders else (*NETWORKS, "tokenizer")
        return self.folder.class_of(part) is not None and part.startswith(wanted)

    @torch.inference_mode()
    def __call__(self, batch: pa.Table, reject: Reject) -> Iterator[pa.Table]:
        names = [f"{PROMPT_PREFIX}{k}" for k in range(sum(n.startswith(PROMPT_PREFIX) for n in batch.column_names))]
        form = json.loads(batch.schema.field(names[0]).metadata[NOTED])
        leaves = [tensors.from_arrow(batch, name) for name in names]
        shared = [k for k in _shared(form)]
        given = batch.select(BATCH_SCHEMA.names).to_pylist()
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, row in enumerate(given):
            told = (i,) if self.alone else tuple(tuple(leaves[k][i].flatten().tolist()) for k in shared)
            none = row["negative_prompt"] is None
            key = row["steps"], row["guidance_scale"], row["height"], row["width"], none, told
            groups.setdefault(key, []).append(i)
        for members in groups.values():
            try:
                shape = self.spec.shape(given[members[0]]["height"], given[members[0]]["width"])
            except RowError as error:
                for i in members:
                    reject(i, str(error))
                continue
            noted = iter([_filled(each, [leaf[members].to(self.device) for leaf in leaves]) for each in form])
            made = self.run([given[i] for i in members], lambda _, noted=noted: lambda *a, **k: next(noted))
            latents = self._in_the_vae_s_order(made, *shape).float().cpu()
            name, reason = self.folder.pipeline, ""
            if tuple(latents.shape[1:]) != shape:
                reason = f"{name} makes no latents of this size: {tuple(latents.shape[1:])}, not {shape}"
            elif name not in COMPARED and len({*shape}) == 1:
                reason = f"{name} is not known here, and latents {shape} don't show their axes: take another size"
            if reason:
                for i in members:
                    reject(i, reason)
                continue
            part = batch.drop_columns(names).take(members)
            good = latents.isfinite().flatten(1).all(1).tolist()
            for i, fine in zip(members, good):
                if not fine:
                    reject(i, f"the latents of {self.folder.pipeline} are not finite")
            latents = latents.to(getattr(torch, self.spec.dtype))
            yield with_latents(part, latents, self.spec).filter(pa.array(good))

    def _in_the_vae_s_order(self, made: Tensor, channels: int, height: int, width: int) -> Tensor:
        """``[B, C, h, w]`` of what the pipeline made.

        Which axis is which is told by what the pipeline is, and never by numbers, which may be equal: with three axes it
        made tokens, ``[B, tokens, C]``, with four ``[B, C, h, w]``, and with five a frame of video.
        """
        if made.ndim == 3:
            made = self._of_tokens(made, height, width)
        elif made.ndim == 5 and self.folder.pipeline in FRAME_FIRST:
            made = made.permute(0, 4, 1, 2, 3)
        if made.ndim == 5:
            made = made.squeeze(2)
        if tuple(made.shape[1:]) == (channels // 4, 2 * height, 2 * width):  # pixels, where the VAE's are 2x2 patches
            made = pixel_unshuffle(made, 2)
        return made

    def _of_tokens(self, made: Tensor, height: int, width: int) -> Tensor:
        """Of tokens ``[B, tokens, C]`` of a pixel each, or, where there are fewer, by the pipeline's own ``_unpack_latents``."""
        if made.shape[1] == height * width:
            return made.transpose(1, 2).unflatten(2, (height, width))
        if not hasattr(self.pipeline, "_unpack_latents"):
            return made
        told = {"height": height * self.spec.downscale, "width": width * self.spec.downscale}
        known = inspect.signature(self.pipeline._unpack_latents).parameters
        if "vae_scale_factor" in known:
            told["vae_scale_factor"] = self.pipeline.vae_scale_factor
        if "patch_size" in known:
            told["patch_size"] = self.pipeline.transformer.config.patch_size
        unpacked: Tensor = self.pipeline._unpack_latents(made, **told)
        return unpacked


def refused(cls: Any) -> str | None:
    """Why a pipeline's class can't be run by its parts, or None if nothing is known against it."""
    if cls.__name__ in REFUSED:
        return REFUSED[cls.__name__]
    parameters = inspect.signature(cls.__call__).parameters
    if "prompt" not in parameters or "output_type" not in parameters:
        return "it doesn't make pictures out of prompts"
    if "strength" in parameters:
        return "it begins from a picture"
    return None


def _check(row: Mapping[str, Any], pipeline: str) -> None:
    """Raise RowError for what a pipeline's own loop doesn't do."""
    for field in OWN_FIELDS:
        if field.sampling and field.name not in READ_BY_LOOPS:
            name, plain = field.name, "" if field.name == "scheduler" else field.default
            if row[name] != plain:
                raise RowError(
                    f"{pipeline} runs its own loop, without {name}: {plain!r} is expected, not {row[name]!r}"
                )


class _Reached(BaseException):
    """The pipeline has come to its network."""


class Absent:
    """Stands in a pipeline for a part that this stage doesn't load. It knows the part's config."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        self.config, self.dtype = config, dtype

    def __getattr__(self, name: str) -> Any:
        config = self.__dict__.get("config", {})
        if isinstance(config, Mapping) and name in config:
            return config[name]
        raise AttributeError(name)


class Network(Absent):
    """The network, where prompts are encoded: the call ends when it comes here, and has encoded what it wants."""

    near = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if self.near and not name.startswith("_"):
                raise _Reached from None
            raise

    def __call__(self, *positional: Any, **named: Any) -> NoReturn:
        raise _Reached


def _config(cls: Any, folder: Folder, part: str) -> Any:
    """A model's config without the model."""
    if hasattr(cls, "config_class") and cls.config_class is not None:
        return cls.config_class.from_pretrained(folder / part)
    from diffusers.configuration_utils import FrozenDict

    return FrozenDict(completed(cls, folder.config(part)))


# ----------------------------------------------------------------------------------------- what encode_prompt returns


def _kind(value: Any) -> Any:
    """What values of one form have in common, whatever the prompt: JSON."""
    if isinstance(value, (list, tuple)):
        return [_kind(each) for each in value]
    return value.ndim if isinstance(value, Tensor) else type(value).__name__


def _form(single: Any, double: Any, leaf: Iterator[int]) -> Any:
    """The form of what came back for a row, which for the same row twice was ``double``; ``leaf`` numbers its tensors.

    JSON: null; ``{leaf, axis}``, with null for the axis of what both rows share, "list" for a list of each row's own, "ends" for
    ends of tokens, counted on; ``{number}``, of a leaf; ``[...]``. Raises ValueError for what can't travel.
    """
    if single is None:
        return None
    if isinstance(single, Tensor):
        if single.ndim == 1 and (len(single), len(double)) == (2, 3):
            return {"leaf": next(leaf), "axis": "ends"}
        axes = [k for k, (one, two) in enumerate(zip(single.shape, double.shape)) if one != two]
        if axes and (len(axes), single.shape[axes[0]], double.shape[axes[0]]) != (1, 1, 2):
            shapes = f"{tuple(single.shape)} for a row and {tuple(double.shape)} for two"
            raise ValueError(f"encode_prompt returned a tensor of {shapes}")
        return {"leaf": next(leaf), "axis": axes[0] if axes else None}
    if isinstance(single, (bool, int, float)):
        return {"number": next(leaf)}
    if isinstance(single, (list, tuple)):
        if len(double) == 2 * len(single) == 2 and isinstance(single[0], Tensor):
            return {"leaf": next(leaf), "axis": "list"}
        return [_form(one, two, leaf) for one, two in zip(single, double)]
    raise ValueError(f"encode_prompt returned a {type(single).__name__}, which can't travel")


def _leaves(value: Any, form: Any) -> Iterator[Tensor]:
    """The tensors of one row's value, without a batch axis, in the order of their numbers."""
    if isinstance(form, list):
        for one, each in zip(value, form):
            yield from _leaves(one, each)
    elif form is not None:
        axis = form.get("axis")
        if "number" in form:
            yield torch.tensor(value)
        elif isinstance(axis, str):
            yield value[{"list": 0, "ends": 1}[axis]]
        else:
            yield value if axis is None else value.squeeze(axis)


def _filled(form: Any, leaves: Sequence[Tensor]) -> Any:
    """What ``encode_prompt`` would have returned for several rows, out of their ``leaves``, each ``[B, ...]``."""
    if form is None:
        return None
    if isinstance(form, list):
        return tuple(_filled(each, leaves) for each in form)
    if "number" in form:
        return leaves[form["number"]][0].item()
    leaf = leaves[form["leaf"]]
    if form["axis"] == "list":
        return list(leaf)
    if form["axis"] == "ends":
        return torch.nn.functional.pad(leaf.cumsum(0), (1, 0)).to(leaf.dtype)
    return leaf[0] if form["axis"] is None else leaf.movedim(0, form["axis"]).contiguous()


def _shared(form: Any) -> Iterator[int]:
    """The leaves that rows must agree in to go together."""
    if isinstance(form, list):
        for each in form:
            yield from _shared(each)
    elif isinstance(form, dict) and (form.get("axis", 0) is None or "number" in form):
        yield form.get("leaf", form.get("number"))
