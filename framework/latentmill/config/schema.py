"""The keys of a job, their types, and what they may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias, get_type_hints

from omegaconf import MISSING, OmegaConf

from latentmill import registry, values
from latentmill.buckets import Size
from latentmill.fields import IN_JOB, of_first_noise, python_type
from latentmill.plugin import RowField

FIRST_NOISE = ("latentmill", "diffusers", "comfy", "comfy_each", "none")

ON_ERROR = ("quarantine", "stop")
PLACEMENTS = ("auto", "split", "fused")

CLUSTERS = ("local", "inline", "ray")

OWN_PARTS = ("vae", "text_encoder", "denoiser", "scheduler")
"""Kinds of plugins of which a stage may have one of its own."""

if TYPE_CHECKING:
    Sampling: TypeAlias = Any
else:
    Sampling = make_dataclass(
        "Sampling",
        [
            (key, python_type(of) | (None if of.default is None else python_type(of)), field(default=of.default))
            for key, of in IN_JOB.items()
        ],
        namespace={"__module__": __name__},
    )
    """The keys of ``sampling`` and their types, as ``fields`` has them."""


@dataclass
class StageSettings:
    """A stage's pool of workers. What a worker asks for is said in Ray's words."""

    name: str | None = None
    """The plugin that fills the stage; None: the one of the stage's own name."""
    replicas: Any = "auto"
    """Workers; ``auto``: as many as are of use and the cluster has room for."""
    min_replicas: int | None = None
    """Where ``replicas`` is a number: so many are enough to begin with, and to go on; None: all to begin with, one to go on."""
    batch_size: Any = "auto"
    """Rows; of denoise, evaluations of a call. ``auto``: FIRST_BATCH_SIZE; denoise grows from there up to four times as many rows, for
    as long as that is faster, unless other workers share its GPU."""
    num_gpus: float = 0.0
    num_cpus: float = 1.0
    memory: Any = None
    """Bytes, as a number or in words: ``8GiB``, ``500MB``."""
    resources: dict[str, float] = field(default_factory=dict)
    accelerator_type: str | None = None
    retries: int = 1
    """How often a batch that failed is tried again as it is, before it is split to find the row."""
    timeout: Any = None
    """Seconds, as a number or in words (``10m``), in which a worker that has work must finish some of it; else it counts as hanging
    and is replaced."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The plugin's own."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """What rows are made with in this stage alone; what it doesn't say is the row's."""
    vae: dict[str, Any] = field(default_factory=dict)
    """This and those below: a plugin of the stage's own; without a name it is the job's, with these settings changed."""
    text_encoder: dict[str, Any] = field(default_factory=dict)
    denoiser: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)

    @property
    def own_parts(self) -> dict[str, dict[str, Any]]:
        """The plugins that it has for itself, by kind."""
        return {kind: own for kind in OWN_PARTS if (own := getattr(self, kind))}

    @property
    def own_fields(self) -> bool:
        """Whether rows have fields for it alone: ``refine.steps``."""
        return bool(self.sampling or self.own_parts)

    @property
    def first_batch_size(self) -> int:
        """``batch_size`` as a number; of a deterministic job it stays so."""
        return FIRST_BATCH_SIZE if self.batch_size == "auto" else int(self.batch_size)

    @property
    def threads(self) -> int:
        """Torch's threads in a worker: one a CPU asked for, so that workers on a machine don't fight over its cores."""
        return max(1, int(self.num_cpus))

    @property
    def bytes(self) -> int | None:
        """``memory`` as a number."""
        return None if self.memory is None else int(values.in_bytes(self.memory))

    @property
    def timeout_seconds(self) -> float | None:
        """``timeout`` as a number."""
        return None if self.timeout is None else values.in_seconds(self.timeout)


FIRST_BATCH_SIZE = 16
"""Of a stage whose ``batch_size`` is auto."""
DEFAULTS = {"replicas": "auto", "batch_size": "auto", "num_gpus": 0.0, "num_cpus": 1.0, "retries": 1}
"""Of a stage's workers, where neither the job nor the stage's ``resources`` say more."""
OF_POOL = (*DEFAULTS, "min_replicas", "memory", "resources", "accelerator_type", "timeout")
"""What is said of a stage's workers."""

if TYPE_CHECKING:
    StageKeys: TypeAlias = Any
else:
    StageKeys = make_dataclass(
        "StageKeys",
        [
            (of.name, get_type_hints(StageSettings)[of.name] | None, field(default=None))
            if of.name in DEFAULTS
            else (
                of.name,
                get_type_hints(StageSettings)[of.name],
                field(default=None) if of.default is None else field(default_factory=of.default_factory),
            )
            for of in fields(StageSettings)
        ],
        namespace={"__module__": __name__},
    )
    """The keys of ``stages.NAME`` in a job: as StageSettings, and null is what the stage declares."""


@dataclass
class Cluster:
    """Where the workers run: ``local`` starts Ray here, ``inline`` is this process, ``ray`` joins a cluster."""

    kind: str = MISSING
    address: str | None = None
    wait: Any = None
    """Seconds, as a number or in words (``10m``), to wait for workers' places, at the start and whenever nodes have gone; None: none for
    nodes that are not there at the start, a minute for others to make room, and no end to it later."""

    @property
    def wait_seconds(self) -> float | None:
        """``wait`` as a number."""
        return None if self.wait is None else values.in_seconds(self.wait)


@dataclass
class Schema:
    """The keys of a job and their types. Defaults are in conf/job.yaml, for people to read."""

    output: str = MISSING
    single_writer: bool = False
    seed: int = MISSING
    samples_per_row: int = MISSING
    deterministic: bool = MISSING
    rows_per_shard: int = MISSING
    on_error: str = MISSING
    max_error_rate: float = MISSING
    flow: list[Any] = MISSING
    latents_std: bool = False
    float_pictures: bool = False
    prompt_cache: str | None = None
    size: dict[str, Any] | None = None
    accept: dict[str, Any] | None = None
    export: dict[str, Any] | None = None
    source: dict[str, Any] = MISSING
    sink: dict[str, Any] = MISSING
    model: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] | None = None
    denoiser: dict[str, Any] | None = None
    text_encoder: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stages: dict[str, StageKeys] = field(default_factory=dict)
    placement: str = "auto"
    max_bytes_in_flight: Any = None
    grace: Any = "30s"
    cluster: Cluster = field(default_factory=Cluster)


@dataclass(frozen=True)
class Job:
    """A checked job."""

    name: str
    config: str
    """YAML of everything, environment variables left as ``${oc.env:...}``: what ``--cfg job`` prints."""
    output: str
    single_writer: bool
    seed: int
    samples_per_row: int
    deterministic: bool
    rows_per_shard: int
    on_error: str
    max_error_rate: float
    flow: tuple[str, ...]
    latents_std: bool
    float_pictures: bool
    prompt_cache: str | None
    """A folder or a URL where encoded prompts are kept from run to run."""
    size: dict[str, Any] | None
    """How each picture is brought to a size of its own (``latentmill.buckets``); None: to ``sampling``'s."""
    accept: dict[str, Any] | None
    """``attempts``: how many samples of a row are drawn at most, until one is not filtered; unless said, one. ``rows``: how many accepted
    rows the dataset ends with; unless said, all."""
    export: dict[str, Any] | None
    """Into which formats the dataset is written once it is finished: ``to``, ``folder`` and ``names`` as ``latentmill export`` has them."""
    source: dict[str, Any]
    sink: dict[str, Any]
    model: dict[str, Any]
    """What the parts of one model share, for their configs to point at: ``vae.path: ${model.path}``."""
    vae: dict[str, Any] | None
    denoiser: dict[str, Any] | None
    text_encoder: dict[str, Any] | None
    scheduler: dict[str, Any] | None
    sampling: dict[str, Any]
    """What each row is made with; a column of the source of the same name takes a value's place, row by row."""
    stages: dict[str, StageSettings]
    placement: str
    """``split``: each stage has workers of its own; ``fused``: one worker hosts all stages between the first and the last; ``auto``:
    those share a worker that one device has room for."""
    max_bytes_in_flight: Any
    """What may be between stages, in bytes: a number or words; None leaves a share of Ray's object store."""
    grace: Any
    """How long the machine stays after it has told the run to stop: seconds, or words, as ``2m``."""
    cluster: Cluster

    @property
    def grace_seconds(self) -> float:
        """``grace`` in seconds."""
        return values.in_seconds(self.grace)

    @property
    def attempts(self) -> int | None:
        """What ``accept`` says of them; None if nothing."""
        return (self.accept or {}).get("attempts")

    def place(self, kind: str, stage: str) -> str:
        """Where in a plan the plugin of a kind stands that a stage works with: ``denoiser``, or ``refine.denoiser``, its own."""
        return f"{stage}.{kind}" if kind in self.stages[stage].own_parts else kind

    def choice(self, place: str) -> dict[str, Any] | None:
        """What is said of a plugin, by its place."""
        stage, _, kind = place.rpartition(".")
        found: dict[str, Any] | None = getattr(self.stages[stage], kind) if stage else getattr(self, kind, None)
        return found

    def sampling_of(self, stage: str) -> dict[str, Any]:
        """What rows are made with in a stage, that don't say otherwise."""
        own = self.stages[stage].sampling
        return {**self.sampling, **{key: value for key, value in own.items() if value is not None}}

    def meaning(self) -> dict[str, Any]:
        """What of the config changes the dataset: no cluster, output, workers or what they ask for.

        Batch sizes and threads count only if the job is deterministic. In plugins' settings environment variables stay
        ``${oc.env:...}``: secrets are none of a dataset's business.
        """
        config: dict[str, Any] = values.read_yaml(self.config)
        meant: dict[str, Any] = {
            "seed": self.seed,
            "samples_per_row": self.samples_per_row,
            "deterministic": self.deterministic,
            "rows_per_shard": self.rows_per_shard,
            "flow": list(self.flow),
            "sampling": self.sampling,
            **({"model": config["model"]} if config["model"] else {}),
            **({"latents_std": True} if self.latents_std else {}),
            **({"float_pictures": True} if self.float_pictures else {}),
            **({} if self.size is None else {"size": Size.of(self.size).about()}),
            **({} if self.accept is None else {"accept": {key: n for key, n in self.accept.items() if n is not None}}),
            **{kind: config[kind] for kind in registry.KINDS if kind in config},
        }
        stages: dict[str, Any] = {}
        for name in self.flow:
            written = config["stages"].get(name) or {}
            if isinstance(written, str):  # an interpolation that stands for all of it; others stay as they were written
                written = OmegaConf.to_container(OmegaConf.create(self.config).stages[name])
            stage: dict[str, Any] = written  # type: ignore[assignment]
            kept: dict[str, Any] = {}
            if self.deterministic:  # what a matrix product gives depends on its size, and on how many threads share it
                kept = {"batch_size": self.stages[name].first_batch_size, "threads": self.stages[name].threads}
            if stage.get("settings"):
                kept["settings"] = stage["settings"]
            if (self.stages[name].name or name) != name:
                kept["name"] = self.stages[name].name
            if self.stages[name].sampling:
                kept["sampling"] = self.stages[name].sampling
            for kind in self.stages[name].own_parts:
                own: Any = stage[kind]
                if isinstance(own, str):
                    own = OmegaConf.to_container(OmegaConf.create(self.config).stages[name][kind])
                kept[kind] = whole_choice(own, config.get(kind))
            if kept:
                stages[name] = kept
        return {**meant, "stages": stages} if stages else meant


@cache
def types(schema: Any) -> dict[str, Any]:
    """Of each key of a dataclass of these its type. Each is code that is evaluated anew whenever it is asked for."""
    return get_type_hints(schema)


def whole_choice(own: Mapping[str, Any], of_job: Any) -> dict[str, Any]:
    """A stage's own plugin as it is chosen: by its name, or the job's with some settings changed."""
    return {**own} if "name" in own or not isinstance(of_job, Mapping) else {**of_job, **own}


def plugin_fields(config: Any) -> dict[str, RowField] | None:
    """The row fields that the classes of a config's plugins declare; None if one declares them only once it is built."""
    chosen = [(kind, config.get(kind)) for kind in registry.KINDS if isinstance(config.get(kind), Mapping)]
    flow, stages = config.get("flow"), config.get("stages") or {}
    for stage in flow if isinstance(flow, Sequence) and not isinstance(flow, str) else ():
        said = stage if isinstance(stage, Mapping) else stages.get(stage)
        chosen.append(("stage", {"name": (said.get("name") if isinstance(said, Mapping) else None) or stage}))
    found = [registry.row_fields(kind, str(choice.get("name"))) for kind, choice in chosen]
    first = of_first_noise(config.get("sampling") or {})
    return None if None in found else {**first, **{of.name: of for each in found for of in each or ()}}
