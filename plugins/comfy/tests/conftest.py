"""What tests of several modules share: ComfyUI's models folder with tiny models, made once, and figures of ComfyUI itself."""

import json
from pathlib import Path

import pytest  # and no large library: xdist's own process reads this, too, before others begin

VALUES = Path(__file__).parent / "values"


class Models:
    """A models folder, whose files are made when they are asked for."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, *names):
        import comfy_tiny

        missing = [name for name in names if not (self.folder / f"{name}.safetensors").is_file()]
        if missing:
            comfy_tiny.build(self.folder, *missing)
        return str(self.folder)


@pytest.fixture(scope="session")
def comfy_models(tmp_path_factory):
    """``comfy_models("checkpoints/sd15", "vae/ae")``: the folder, with these of comfy_tiny's files in it."""
    return Models(tmp_path_factory.mktemp("comfy") / "models")


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """diffusers' converter for FLUX, which knows one width alone, 3072, told of the tiny model's."""
    from diffusers.loaders import single_file_utils

    convert = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    code = convert.__code__
    narrower = code.replace(co_consts=tuple(64 if value == 3072 else value for value in code.co_consts))
    monkeypatch.setattr(convert, "__code__", narrower)


@pytest.fixture(scope="session")
def comfyui():
    """Figures of ComfyUI itself, by the name of their file."""
    return lambda name: json.loads((VALUES / f"{name}.json").read_text())
