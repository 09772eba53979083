"""The contract between latentmill and its plugins: all that a plugin author imports.

A plugin is a class below, subclassed, and one line in a ``pyproject.toml``::

    [project.entry-points."latentmill.vaes"]
    my_vae = "my_package:MyVAE"

The class is built from the job's YAML, one keyword argument a key (``vae: {name: my_vae, tile: 64}`` calls
``MyVAE(tile=64)``), once in the driver and once in every worker. Building must be cheap and must not touch a device: the
driver builds plugins only to ask them what they are. ``load(device)`` is called in workers alone, before first use.

Words. ``B`` is the batch axis and always comes first; a row is one sample. Time ``t`` is float64 in [0, 1]: 0 is
clean, 1 is noise. A latent at time t is ``x = alpha(t) * x0 + sigma(t) * noise``; ``alpha`` and ``sigma`` are the noise schedule.

Tensors that a plugin is given may lie in memory that other processes share: read them, never write into them.

What a plugin gives back is held against what is said here: shapes, counts, row ids. A plugin that breaks its contract, can't be
loaded, or fails for every row ends the job with its name; ``RowError``, and ``reject``, are for a row that can't be used, and ``reject``
with ``Filtered`` for one that is not wanted; ``StorageError`` says that a store which is read from fails, and no row is to blame.
"""

from latentmill.errors import RowError, StorageError
from latentmill.plugin.contract import CONTRACT, Filtered, Plugin, Reason, Reject, RowField, WeightsPath
from latentmill.plugin.denoiser import Denoiser, FollowsAuthors, Prediction
from latentmill.plugin.launcher import (
    RETRY_CODES,
    Launcher,
    LaunchState,
    StateWord,
    Submission,
    Submitted,
    WorkerNeeds,
)
from latentmill.plugin.scheduler import Field, Grid, NoiseSchedule, Scheduler, Start, State
from latentmill.plugin.sink import OpenSideFile, Sink, StoredShard
from latentmill.plugin.source import Fragment, Source
from latentmill.plugin.stage import (
    CommittingStage,
    ContinuousStage,
    Declaration,
    FixedShape,
    Request,
    Stage,
    StageContext,
)
from latentmill.plugin.text_encoder import Conditioning, TensorSpec, TextEncoder
from latentmill.plugin.vae import VAE, LatentSpec, statistics_digest

__all__ = [
    "CONTRACT",
    "RETRY_CODES",
    "CommittingStage",
    "Conditioning",
    "ContinuousStage",
    "Declaration",
    "Denoiser",
    "Field",
    "Filtered",
    "FixedShape",
    "FollowsAuthors",
    "Fragment",
    "Grid",
    "LatentSpec",
    "LaunchState",
    "Launcher",
    "NoiseSchedule",
    "OpenSideFile",
    "Plugin",
    "Prediction",
    "Reason",
    "Reject",
    "Request",
    "RowError",
    "RowField",
    "Scheduler",
    "Sink",
    "Source",
    "Stage",
    "StageContext",
    "Start",
    "State",
    "StateWord",
    "StorageError",
    "StoredShard",
    "Submission",
    "Submitted",
    "TensorSpec",
    "TextEncoder",
    "VAE",
    "WeightsPath",
    "WorkerNeeds",
    "statistics_digest",
]
