"""A job: one YAML file, composed by Hydra, checked whole before anything starts."""

from latentmill.config.load import load_job
from latentmill.config.schema import Job
from latentmill.errors import JobError
from latentmill.registry import shipped

__all__ = ["Job", "JobError", "load_job", "shipped"]
