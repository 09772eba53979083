"""What tests of several modules share: tiny models, built once, and numbers that schedulers of diffusers compute again and again."""

import fcntl
import os
from functools import cache

import pytest  # and no large library: xdist's own process reads this, too, before others begin


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a tiny model, by its pipeline's name: built once for all processes of a run, and changed by nobody."""
    import tiny

    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "models"
    root.mkdir(exist_ok=True)

    def folder(name):
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (root / name).exists():
                tiny.build(name, root / f"{name}.new").rename(root / name)
        return root / name

    return folder


@pytest.fixture(scope="session", autouse=True)
def remembering():
    """Integrals of polynomials, and timesteps that are looked up one after another: milliseconds each, and the same on a grid."""
    import diffusers
    from answers import in_numpy, never, remembered
    from diffusers.hooks import group_offloading

    with pytest.MonkeyPatch.context() as patch:
        for name, method, of in (
            ("LMSDiscreteScheduler", "get_lms_coefficient", ["sigmas"]),
            ("KDPM2DiscreteScheduler", "_sigma_to_t", []),
            ("KDPM2AncestralDiscreteScheduler", "_sigma_to_t", []),
            ("DPMSolverSDEScheduler", "_sigma_to_t", []),
            ("SASolverScheduler", "get_coefficients_fn", ["predict_x0"]),
        ):
            cls = getattr(diffusers, name)
            compute = getattr(cls, method)
            patch.setattr(cls, method, remembered(in_numpy(compute, "sigmas") if "lms" in method else compute, of))
        of_groups = "_get_top_level_group_offload_hook"  # a pipeline asks for it dozens of times a call
        patch.setattr(group_offloading, of_groups, never(getattr(group_offloading, of_groups)))
        yield


@pytest.fixture(scope="session", autouse=True)
def reading_once():
    """See reading; and of text encoders, which read the same prompts in every test, see answers."""
    import diffusers
    import reading
    import transformers
    from answers import answering_once

    with pytest.MonkeyPatch.context() as patch:
        reading.once(diffusers.ModelMixin, patch)
        reading.once(transformers.PreTrainedModel, patch, cache(lambda cls: answering_once(cls, patch)))
        yield


@pytest.fixture
def plain_convolutions(monkeypatch):
    """For tests that hold what goes into networks, and not their bits: oneDNN prepares a small convolution for longer than it takes."""
    import torch

    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
