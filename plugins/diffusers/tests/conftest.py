"""What tests of several modules share: tiny models, built once, and numbers that schedulers of diffusers compute again and again."""

import functools

import numpy as np
import pytest
import reading
import tiny
import torch


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a tiny model, by its pipeline's name."""
    root, built = tmp_path_factory.mktemp("models"), {}

    def folder(name):
        if name not in built:
            built[name] = tiny.build(name, root / name)
        return built[name]

    return folder


def bits(value):
    """All that there is to a number, an array or a tensor, or a list of them."""
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    if isinstance(value, list):
        return tuple(map(bits, value))
    return (value.dtype.str, value.tobytes()) if isinstance(value, np.ndarray) else value


def remembered(compute, of=()):
    """A method whose answers are kept, by its arguments and by what else of its object, ``of``, they hang on."""
    answers = {}

    @functools.wraps(compute)
    def answer(self, *arguments):
        with torch._C.DisableTorchFunction():  # nobody watches single numbers
            key = (*map(bits, arguments), *(bits(getattr(self, name)) for name in of))
            if key not in answers:
                answers[key] = compute(self, *arguments)
            kept = answers[key]
            return [each.clone() for each in kept] if isinstance(kept, list) else kept

    return answer


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
            patch.setattr(cls, method, remembered(getattr(cls, method), of))
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
