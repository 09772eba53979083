"""What tests of several modules share: tiny models, built once."""

import pytest
import tiny


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a tiny model, by its pipeline's name."""
    root, built = tmp_path_factory.mktemp("models"), {}

    def folder(name):
        if name not in built:
            built[name] = tiny.build(name, root / name)
        return built[name]

    return folder
