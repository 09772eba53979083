"""What tests of several modules share: tiny models, built once, and numbers that schedulers of diffusers compute again and again."""

import pytest
import reading
import tiny
from answers import in_numpy, remembered


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a tiny model, by its pipeline's name."""
    root, built = tmp_path_factory.mktemp("models"), {}

    def folder(name):
        if name not in built:
            built[name] = tiny.build(name, root / name)
        return built[name]

    return folder


@pytest.fixture(scope="session", autouse=True)
def remembering():
    """Integrals of polynomials, and timesteps that are looked up one after another: milliseconds each, and the same on a grid."""
    import diffusers

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
        yield


@pytest.fixture(scope="session", autouse=True)
def reading_once():
    """See reading."""
    import diffusers
    import transformers

    with pytest.MonkeyPatch.context() as patch:
        for cls in (diffusers.ModelMixin, transformers.PreTrainedModel):
            reading.once(cls, patch)
        yield
