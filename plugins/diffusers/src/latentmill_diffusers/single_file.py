"""A model's weights in one file, whoever named its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from latentmill_diffusers import quantized
from latentmill_diffusers.configs import part_config
from latentmill_diffusers.loading import naming

NETWORKS = ("unet", "transformer")
GGUF = ".gguf"
SAFETENSORS = (".safetensors", ".sft")
WEIGHTS_SUFFIXES = (*SAFETENSORS, GGUF, ".ckpt", ".pt", ".bin")
"""How the names of files of weights end; some are refused."""
IN_ONE_FILE = {
    "vae": ("first_stage_model.", "vae.", "encoder.", "decoder.", "quant_conv.", "post_quant_conv."),
    "CLIPTextModel": ("cond_stage_model.", "conditioner.embedders.", "text_encoders.clip_"),
    "CLIPTextModelWithProjection": ("conditioner.embedders.", "text_encoders.clip_"),
    "T5EncoderModel": ("text_encoders.t5xxl.",),
}
"""How the names of tensors begin, in a single file, of a VAE and of the text encoders, by class, that diffusers finds there."""


class SingleFile:
    """The file of weights at ``path``: ``.safetensors``, or ``.gguf`` of a network alone.

    Raises ValueError if there is none, it is a pickle, or nothing, as ``config`` would, says what is in it.
    """

    def __init__(self, path: str, config: str | None) -> None:
        file = Path(path).expanduser()
        if file.suffix not in (*SAFETENSORS, GGUF):
            raise ValueError(f"{path} is a pickle, or may be one: such weights are refused; convert it to .safetensors")
        if not file.is_file():
            raise ValueError(f"there is no file {path}")
        if file.suffix == GGUF:
            quantized.require("gguf", path)
        if config is None:
            raise ValueError(
                f"{path} holds weights alone: give model.config too, the folder of a model of the same kind, or org/name and "
                "model.revision, for its configs and tokenizers"
            )
        found = file.resolve()
        self.path = found if found.suffix == file.suffix else file.absolute()  # in caches a link has the name

    @property
    def quantized(self) -> bool:
        """Whether the weights are quantised as they lie."""
        return self.path.suffix == GGUF

    @cached_property
    def names(self) -> list[str]:
        """The tensors' names. Raises ValueError if the file can't be read."""
        with naming(self.path):
            if self.quantized:
                from gguf import GGUFReader

                return [tensor.name for tensor in GGUFReader(self.path).tensors]
            with safe_open(self.path, "pt") as file:
                return list(file.keys())

    def checkpoint(self) -> str | dict[str, Tensor]:
        """What diffusers makes a part of: the file, or its tensors."""
        # diffusers knows safetensors by one end of a name alone.
        return load_file(self.path) if self.path.suffix == ".sft" else str(self.path)

    def load(self, cls: Any, part: str, root: Path, told: dict[str, Any]) -> tuple[Any, list[str]]:
        """A part, with the config in ``root``, and the names of its tensors that aren't there."""
        from diffusers.loaders import single_file_utils

        if hasattr(cls, "from_single_file"):
            try:
                model = cls.from_single_file(self.checkpoint(), config=str(root), subfolder=part, **told)
            except NotImplementedError:  # torch's, of tensors without values
                return None, self._missing(cls, part_config(root, part))
            except IndexError as error:  # a converter's, that counts blocks and finds none
                raise ValueError(f"it holds no {cls.__name__}") from error
        else:
            t5 = cls.__name__ == "T5EncoderModel"
            create: Any = (
                single_file_utils.create_diffusers_t5_model_from_checkpoint
                if t5
                else single_file_utils.create_diffusers_clip_model_from_ldm
            )
            model = create(cls, load_file(self.path), part, str(root), told["dtype"], local_files_only=True)
            if t5:
                model.tie_weights()  # the file may have the one embedding under one of its two names
        return model, [name for name, tensor in model.named_parameters() if tensor.is_meta]

    def require(self, part: str, cls: str) -> None:
        """Raise ValueError unless there are names in the single file that begin as this part's do, of the class ``cls``."""
        setting = "text_encoder" if part.startswith("text_encoder") else "denoiser" if part in NETWORKS else "vae"
        if self.quantized and setting != "denoiser":
            raise ValueError(f"{self.path}: a {GGUF} is taken for a network alone: give {setting}.path, a folder")
        if setting == "denoiser":
            others = tuple(chain.from_iterable(IN_ONE_FILE.values()))
            there = not all(name.startswith(others) for name in self.names)
        else:
            known = IN_ONE_FILE.get(cls if setting == "text_encoder" else "vae", ())
            there = any(name.startswith(known) for name in self.names)
        if not there:
            raise ValueError(
                f"{self.path} holds no {part or setting} that is known there: give {setting}.path, a folder"
            )

    def _missing(self, cls: Any, config: dict[str, Any]) -> list[str]:
        """What diffusers didn't find in the single file, which it doesn't say: by its names as they are, or converted."""
        from accelerate import init_empty_weights
        from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
        from diffusers.loaders.single_file_utils import load_single_file_checkpoint

        with init_empty_weights():
            wanted = cls.from_config(config).state_dict().keys()
        known: Mapping[str, Any] = SINGLE_FILE_LOADABLE_CLASSES
        convert = known[cls.__name__]["checkpoint_mapping_fn"]
        found = self.checkpoint()
        state = load_single_file_checkpoint(found) if isinstance(found, str) else found
        as_they_are = wanted - state.keys()
        fewest: set[str] = min(as_they_are, wanted - convert(checkpoint=state, config=config).keys(), key=len)
        return list(fewest)
