"""What all tests share: a shipped job is composed once, and what is imported is no garbage."""

import gc
from importlib import import_module

import pytest

pytest_plugins = ["tests.processes"]
IMPORTED_LATER = ("moto.s3.responses", "moto.server", "ray.job_submission")
"""What takes half a second to import and more, and no module of tests does before its tests run: once for all processes."""
gc.disable()  # a sixth of what it takes to import torch, Ray and diffusers is the collector, which finds nothing there


def pytest_collection(session):
    """What processes have Ray's workers forked from is started once for all of them, and imports while this process does."""
    if session.config.option.processes > 1:
        from tests import ray_forks

        ray_forks.begin_server()


def pytest_collection_finish(session):
    """Whatever the collector looks at from now on is of a test: torch, diffusers and 4,000 items are millions of objects.

    And it looks more seldom: a model is thousands of objects, of which few are garbage when it is half made.
    """
    if session.config.option.processes > 1:
        from tests import ray_forks

        for module in IMPORTED_LATER:
            import_module(module)
        ray_forks.start_server()
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 10)
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def composing_once():
    """See tests.composing."""
    from tests import composing

    with pytest.MonkeyPatch.context() as patch:
        composing.once(patch.setattr)
        yield
