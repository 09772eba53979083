"""Where a model lies: a folder as ``save_pretrained`` writes it, or a repository of the Hugging Face Hub at one revision.

A model's folder holds ``model_index.json``, which names the class of each part, and a folder for each part: ``config.json``
and weights as safetensors. Everything here reads small files, and weights only for the fingerprint, once (``latentmill.weights.digests``).
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from latentmill.weights import digests, record
from latentmill_diffusers import quantized
from latentmill_diffusers.configs import MODEL_INDEX, downscale_of, part_config, read_json
from latentmill_diffusers.hub import SMALL, locate
from latentmill_diffusers.loading import naming, part_class, require_finite, require_words
from latentmill_diffusers.single_file import WEIGHTS_SUFFIXES, SingleFile

LOCATION = ("path", "revision", "config")
"""Settings of a plugin that say where its model lies: the fingerprint is of what is there."""


class Folder:
    """A model's folder. Raises ValueError, in one line that says what to do, if there is none at ``path``.

    ``path`` is a local folder, or ``org/name`` on the Hub, which needs ``revision``: a commit, or a tag that stays. It may
    also be a single file of weights, ``.safetensors``, or ``.gguf`` of a network alone; then ``config`` is such a folder or
    name, of a model of the same kind, from which all but the weights is taken.
    """

    def __init__(self, path: str, revision: str | None = None, config: str | None = None) -> None:
        if not path:
            raise ValueError("model.path must be a model's folder, or org/name on the Hugging Face Hub")
        self.single_file: SingleFile | None = None
        if Path(path).suffix in WEIGHTS_SUFFIXES:
            self.single_file = SingleFile(path, config)
        self.root = locate(path, revision) if self.single_file is None else locate(str(config), revision, weights=False)
        self._fingerprints: dict[tuple[str, ...], str] = {}

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    @cached_property
    def index(self) -> dict[str, Any]:
        """``model_index.json``. Raises ValueError if the folder has none."""
        if not (self.root / MODEL_INDEX).is_file():
            raise ValueError(
                f"{self.root} holds no {MODEL_INDEX}: a folder in diffusers' layout is expected, as save_pretrained writes it"
            )
        return read_json(self.root / MODEL_INDEX)

    @property
    def pipeline(self) -> str:
        """The name of the pipeline's class."""
        return str(self.index.get("_class_name"))

    def class_of(self, part: str) -> tuple[str, str] | None:
        """``(library, class)`` of a part, as ``("diffusers", "AutoencoderKL")``; None if the model has no such part."""
        found = self.index.get(part)
        if not isinstance(found, list) or len(found) != 2 or None in found:
            return None
        return str(found[0]), str(found[1])

    def config(self, part: str) -> dict[str, Any]:
        """A part's config. Raises ValueError if there is none."""
        return part_config(self.root, part)

    def load(self, cls: Any, part: str, dtype: torch.dtype, **options: Any) -> Any:
        """A part with its weights, of the class ``cls`` of diffusers or transformers, to be used and not trained.

        Raises ValueError if they can't be read, some are missing, which the libraries would make up, or some are not finite.
        """
        told: dict[str, Any] = {"dtype": dtype, "local_files_only": True, **options}
        record(*self.files(part))
        with naming(self.single_file.path if self.single_file is not None else self.root / part):
            if self.single_file is not None:
                if self.quantized:
                    told["quantization_config"] = quantized.of_gguf(dtype)
                model, missing = self.single_file.load(cls, part, self.root, told)
            else:
                more = {"use_safetensors": True, "variant": self._variant(part), "output_loading_info": True}
                model, found = cls.from_pretrained(self.root / part, **told, **more)
                missing = found["missing_keys"]
            if missing:
                others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                raise ValueError(f"it has no {sorted(missing)[0]}{others}")
            if self.quantized:
                quantized.restore(model, dtype)
            if "quantization_config" in told:
                quantized.require_quantized(model)
            require_finite(model)
        return model.eval().requires_grad_(False)

    def quantization(self, settings: Mapping[str, Any] | None, library: str) -> dict[str, Any]:
        """What ``load`` is told to quantise plain weights of ``diffusers`` or ``transformers``. Raises ValueError."""
        if settings is None:
            return {}
        if self.single_file is not None:  # diffusers would take them for quantised, and leave them as they are
            raise ValueError(
                f"quantization is for the weights of a folder, and {self.single_file.path} is a single file"
            )
        return {"quantization_config": quantized.of_settings(settings, library)}

    def quantizer(self, settings: Mapping[str, Any] | None) -> tuple[str, ...]:
        """The package whose numbers quantised weights are, or none."""
        return ("gguf",) if self.quantized else quantized.package_of(settings or {})

    @property
    def quantized(self) -> bool:
        """Whether the weights are quantised as they lie."""
        return self.single_file is not None and self.single_file.quantized

    @property
    def downscale(self) -> int:
        """Pixels of the picture per pixel of the VAE's latents, on each side."""
        return downscale_of(self.config("vae"))

    def load_pipeline(self, dtype: torch.dtype, encoders: bool = True, **options: Any) -> Any:
        """The model's pipeline with its text encoders, tokenizers and scheduler, and none of the other parts.

        ``options`` are for loading each text encoder; without ``encoders`` there are none.
        """
        import diffusers

        parts = {name: found for name in self.index if (found := self.class_of(name))}
        given: dict[str, Any] = {
            name: self.load(part_class(*found), name, dtype, **options)
            if encoders and name.startswith("text_")
            else None
            for name, found in parts.items()
            if not name.startswith(("tokenizer", "scheduler"))
        }
        # Stable Diffusion 3 may come without its T5: each part that isn't there has to be said.
        given |= {name: None for name, value in self.index.items() if value == [None, None]}
        if "requires_safety_checker" in self.index:
            given["requires_safety_checker"] = False  # it would say at each start that there is none
        for name in parts:
            if encoders and name.startswith(("tokenizer", "scheduler")):
                record(*self.files(name))
        with naming(self.root):
            pipeline = getattr(diffusers, self.pipeline).from_pretrained(self.root, local_files_only=True, **given)
        for name in parts:
            if name.startswith("tokenizer"):
                require_words(getattr(pipeline, name), self.root / name)
        return pipeline

    def _variant(self, part: str) -> str | None:
        """``fp16`` where weights lie in halves only: their files have it in their names."""
        files = [file.name for file in (self.root / part).glob("*.safetensors")]
        return "fp16" if files and all(".fp16" in name for name in files) else None

    def files(self, part: str) -> list[Path]:
        """What a part is read from: configs and the like, and its weights, without the halves and others that may lie beside them."""
        there = sorted((self.root / part).glob("*"))
        found = [path for path in there if path.suffix in SMALL]
        if self.single_file is not None:
            return [self.single_file.path, *found]
        halves = self._variant(part) is not None
        return found + [
            path
            for path in there
            if path.suffix == ".safetensors" and ((".fp16" in path.name) == halves) and ".non_ema" not in path.name
        ]

    def require_weights(self, part: str) -> None:
        """Raise ValueError unless a part has weights that are no pickles."""
        if self.single_file is not None:
            cls = self.class_of(part) if part.startswith("text_encoder") else None
            self.single_file.require(part, cls[1] if cls else "")
        elif not any((self.root / part).glob("*.safetensors")):
            raise ValueError(
                f"{self.root / part} holds no .safetensors: weights as pickles are refused, "
                "and save_pretrained(..., safe_serialization=True) writes them anew"
            )

    def fingerprint(self, *parts: str, index: bool = True) -> str:
        """16 hex digits over the configs and weights of these parts, all of them, read once, and over ``model_index.json``.

        Without the ``index`` for a VAE: one latent space is many models', a base model's and its refiner's among them.
        """
        if parts not in self._fingerprints:
            files = [("", self.root / MODEL_INDEX)] if index and (self.root / MODEL_INDEX).is_file() else []
            files += [(part, path) for part in parts for path in self.files(part)]
            digest = hashlib.blake2b(digest_size=8)
            for (part, path), content in zip(files, digests(path for _, path in files)):
                name = part if self.single_file and path == self.single_file.path else f"{part}/{path.name}"
                digest.update(f"{name}\0{content}\0".encode())
            self._fingerprints[parts] = digest.hexdigest()
        return self._fingerprints[parts]


def pipeline_class(folder: Folder) -> Any:
    """The class of the model's pipeline. Raises ValueError if the installed diffusers has none of the name."""
    import diffusers

    if not hasattr(diffusers, folder.pipeline):
        raise ValueError(f"{folder.root}: the installed diffusers has no {folder.pipeline}")
    return part_class("diffusers", folder.pipeline)


def require_layers(folder: Folder, clip_skip: int | None = None) -> None:
    """Raise ValueError if a text encoder has fewer layers than the pipeline takes its output from, or than are to be skipped.

    FLUX.2's takes three from the middle, as its call has them by default (``text_encoder_out_layers``), and Krea 2's those that
    the model's index names (``text_encoder_select_layers``).
    """
    given = inspect.signature(pipeline_class(folder).__call__).parameters.get("text_encoder_out_layers")
    taken = max(given.default if given is not None else folder.index.get("text_encoder_select_layers") or [0])
    for part in folder.index:
        if not re.fullmatch(r"text_encoder(_\d)?", part) or not (found := folder.class_of(part)):
            continue
        cls = part_class(*found)
        if taken or (clip_skip is not None and cls.__name__.startswith("CLIPText")):
            folder.config(part)  # that there is none is said better here
            layers = cls.config_class.from_pretrained(folder / part).get_text_config().num_hidden_layers
            if layers < taken:
                raise ValueError(
                    f"{folder / part} has {layers} layers, and {folder.pipeline} takes layer {taken}'s output"
                )
            if clip_skip is not None and not 0 <= clip_skip < layers:
                raise ValueError(f"text_encoder.clip_skip must be from 0 to {layers - 1}, not {clip_skip}")
