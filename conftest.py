"""What all tests share: what is imported is no garbage, and workers of Ray are forked from one process."""

import gc

import pytest

gc.disable()  # a sixth of what it takes to import torch, Ray and diffusers is the collector, which finds nothing there


def pytest_collection_finish():
    """Whatever the collector looks at from now on is of a test: torch, diffusers and 4,000 items are millions of objects.

    And it looks more seldom: a model is thousands of objects, of which few are garbage when it is half made.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 10)
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes():
    """Before xdist's processes begin, which get this one's environment."""
    from tests import forked

    forked.start_server()
