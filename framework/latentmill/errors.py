"""Every error that a person can cause. Each says in one line what is wrong and what would be right, and has an exit code."""

from __future__ import annotations

import errno as numbers
import sys

NO_ROW = 5
"""The exit code of a run after which the dataset is complete, and not one row is ok: the same command would have nothing to do."""


class LatentmillError(Exception):
    """What all have in common. The command line prints the line and ends with ``exit_code``: see ``cli.main``."""

    exit_code = 2


# ------------------------------------------------------------------------ 2: found before anything starts, or is written


class JobError(LatentmillError, ValueError):
    """The job is not right; one line that names the key, what is there and what was expected."""


class PluginError(LatentmillError, ValueError):
    """A plugin can't be used; one line that names it, its distribution and the cause."""


class PlanError(LatentmillError, ValueError):
    """The job can't be planned, or another dataset is in its place."""


class AddressError(LatentmillError, ValueError):
    """What is no place for a dataset; one line that says what one looks like."""


class ExportError(LatentmillError, ValueError):
    """The dataset can't be exported so; one line that names the format, what it needs and what the dataset is."""


class PushError(LatentmillError, ValueError):
    """The dataset can't be pushed, or not there; one line that says why."""


class ClusterError(LatentmillError, ValueError):
    """The cluster can't be joined or started; one line that says why, and what to do."""


class PlacementError(ClusterError):
    """The cluster has no room for the job's workers; one line that says which stage asks for what."""


# ------------------------------------------------------------------------------------------------- 4: retry later


class UnreachableError(ClusterError):
    """There is no cluster at the address, now."""

    exit_code = 4


class BusyError(PlacementError):
    """The cluster would have room for the job's workers, and others use it now."""

    exit_code = 4


# ---------------------------------------------------------------------------------------- 1 and 3: the job had to stop


class RunError(LatentmillError, RuntimeError):
    """The job had to stop before its end; one line. The same command continues it."""

    exit_code = 1


class OutputError(RunError):
    """The job had to stop because its output can't be written: a full disk, a permission, a store that fails."""

    exit_code = 3


class StorageError(LatentmillError, OSError):
    """The store refuses or fails; one line that names it and the file."""

    exit_code = 3
    errno = numbers.EIO
    """As of a disk that fails: whoever reads a file knows by it that the file isn't to blame."""


# ----------------------------------------------------- raised in workers: the driver retries, or ends the job (RunError)


class WrongWorker(LatentmillError, RuntimeError):
    """A worker is not what the plan says: it would make other rows. One line that names the node."""

    exit_code = 1


class ContractError(LatentmillError, RuntimeError):
    """A plugin gave back what its contract doesn't allow; one line that names it, what came and what was expected."""

    exit_code = 1


class LoadError(LatentmillError, RuntimeError):
    """A plugin can't be loaded; one line that names it and the cause."""

    exit_code = 1


class NoRowError(LatentmillError, RuntimeError):
    """Not one row of a batch came out right, and no row is known to be bad; one line."""

    exit_code = 1


class RowError(LatentmillError, ValueError):
    """This row can't be used, and why, in one line. It ends in the error table; the job goes on."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine, or its GPU, has too little memory."""
    torch = sys.modules.get("torch")  # that is not there has run out of nothing
    return isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))
