"""Where a model lies: a folder as ``save_pretrained`` writes it, or a repository of the Hugging Face Hub at one revision.

A model's folder holds ``model_index.json``, which names the class of each part, and a folder for each part: ``config.json``
and weights as safetensors. Everything here reads small files, and weights only for the fingerprint, once (``latentmill.weights.digests``).
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from latentmill.text import one_line
from latentmill.weights import digests, record
from latentmill_diffusers import messages as messages  # its filters, wherever the libraries are used
from latentmill_diffusers import quantized

INDEX = "model_index.json"
DTYPES = ("float32", "float16", "bfloat16")
NETWORKS = ("unet", "transformer")
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of pipelines that no job asks for."""
GGUF = ".gguf"
WEIGHED = ("text_encoder", "unet", "transformer", "vae")
"""How the names of parts begin that have weights: others may have such."""
SMALL = ("*.json", "*.txt", "*.model", "*.jinja")
"""Configs, tokenizers and templates of prompts."""
HASHED = (".json", ".txt", ".model", ".jinja")
LOCATION = ("path", "revision", "config")
"""Settings of a plugin that say where its model lies: the fingerprint is of what is there."""
IN_ONE_FILE = {
    "vae": ("first_stage_model.", "vae.", "encoder.", "decoder.", "quant_conv.", "post_quant_conv."),
    "CLIPTextModel": ("cond_stage_model.", "conditioner.embedders.", "text_encoders.clip_"),
    "CLIPTextModelWithProjection": ("conditioner.embedders.", "text_encoders.clip_"),
    "T5EncoderModel": ("text_encoders.t5xxl.",),
}
"""How the names of tensors begin, in a single file, of a VAE and of the text encoders, by class, that diffusers finds there."""


class Folder:
    """A model's folder. Raises ValueError, in one line that says what to do, if there is none at ``path``.

    ``path`` is a local folder, or ``org/name`` on the Hub, which needs ``revision``: a commit, or a tag that stays. It may
    also be a single file of weights, ``.safetensors``, or ``.gguf`` of a network alone; then ``config`` is such a folder or
    name, of a model of the same kind, from which all but the weights is taken.
    """

    def __init__(self, path: str, revision: str | None = None, config: str | None = None) -> None:
        if not path:
            raise ValueError("model.path must be a model's folder, or org/name on the Hugging Face Hub")
        self.weights: Path | None = None
        if Path(path).suffix in (".safetensors", GGUF, ".ckpt", ".pt", ".bin"):
            self.weights = _single_file(path, config)
        self.root = locate(path, revision) if self.weights is None else locate(str(config), revision, weights=False)
        self._fingerprints: dict[tuple[str, ...], str] = {}

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    @cached_property
    def index(self) -> dict[str, Any]:
        """``model_index.json``. Raises ValueError if the folder has none."""
        if not (self.root / INDEX).is_file():
            raise ValueError(
                f"{self.root} holds no {INDEX}: a folder in diffusers' layout is expected, as save_pretrained writes it"
            )
        return read_json(self.root / INDEX)

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
        for name in ("config.json", "scheduler_config.json"):
            if (self.root / part / name).is_file():
                return read_json(self.root / part / name)
        raise ValueError(
            f"{self.root / part} holds no config.json: the download is not complete, or it is another folder"
        )

    def load(self, cls: Any, part: str, dtype: torch.dtype, **options: Any) -> Any:
        """A part with its weights, of the class ``cls`` of diffusers or transformers, to be used and not trained.

        Raises ValueError if they can't be read, some are missing, which the libraries would make up, or some are not finite.
        """
        told: dict[str, Any] = {"dtype": dtype, "local_files_only": True, **options}
        record(*self.files(part))
        with _naming(self.weights or self.root / part):
            if self.weights is not None:
                if self.quantized:
                    told["quantization_config"] = quantized.of_gguf(dtype)
                model, missing = self._from_single_file(cls, part, told)
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
            _require_finite(model)
        return model.eval().requires_grad_(False)

    def quantization(self, settings: Mapping[str, Any] | None, library: str) -> dict[str, Any]:
        """What ``load`` is told to quantise plain weights of ``diffusers`` or ``transformers``. Raises ValueError."""
        if settings is None:
            return {}
        if self.weights is not None:  # diffusers would take them for quantised, and leave them as they are
            raise ValueError(f"quantization is for the weights of a folder, and {self.weights} is a single file")
        return {"quantization_config": quantized.of_settings(settings, library)}

    def quantizer(self, settings: Mapping[str, Any] | None) -> tuple[str, ...]:
        """The package whose numbers quantised weights are, or none."""
        return ("gguf",) if self.quantized else quantized.package_of(settings or {})

    @property
    def quantized(self) -> bool:
        """Whether the weights are quantised as they lie."""
        return self.weights is not None and self.weights.suffix == GGUF

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
        with _naming(self.root):
            return getattr(diffusers, self.pipeline).from_pretrained(self.root, local_files_only=True, **given)

    def _from_single_file(self, cls: Any, part: str, told: dict[str, Any]) -> tuple[Any, list[str]]:
        """A part out of the single file, whoever named its tensors, and those that aren't there."""
        from diffusers.loaders import single_file_utils
        from safetensors.torch import load_file

        if hasattr(cls, "from_single_file"):
            try:
                model = cls.from_single_file(str(self.weights), config=str(self.root), subfolder=part, **told)
            except NotImplementedError:  # torch's, of tensors without values
                return None, self._missing(cls, part)
            except IndexError as error:  # a converter's, that counts blocks and finds none
                raise ValueError(f"it holds no {cls.__name__}") from error
        else:
            t5 = cls.__name__ == "T5EncoderModel"
            create = (
                single_file_utils.create_diffusers_t5_model_from_checkpoint
                if t5
                else single_file_utils.create_diffusers_clip_model_from_ldm
            )
            model = create(cls, load_file(self.weights), part, str(self.root), told["dtype"], local_files_only=True)
            if t5:
                model.tie_weights()  # the file may have the one embedding under one of its two names
        return model, [name for name, tensor in model.named_parameters() if tensor.is_meta]

    def _missing(self, cls: Any, part: str) -> list[str]:
        """What diffusers didn't find in the single file, which it doesn't say: by its names as they are, or converted."""
        from accelerate import init_empty_weights
        from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
        from diffusers.loaders.single_file_utils import load_single_file_checkpoint

        config = self.config(part)
        with init_empty_weights():
            wanted = cls.from_config(config).state_dict().keys()
        convert = SINGLE_FILE_LOADABLE_CLASSES[cls.__name__]["checkpoint_mapping_fn"]
        state = load_single_file_checkpoint(str(self.weights))
        as_they_are = wanted - state.keys()
        return list(min(as_they_are, wanted - convert(checkpoint=state, config=config).keys(), key=len))

    def _variant(self, part: str) -> str | None:
        """``fp16`` where weights lie in halves only: their files have it in their names."""
        files = [file.name for file in (self.root / part).glob("*.safetensors")]
        return "fp16" if files and all(".fp16" in name for name in files) else None

    def files(self, part: str) -> list[Path]:
        """What a part is read from: configs and the like, and its weights, without the halves and others that may lie beside them."""
        there = sorted((self.root / part).glob("*"))
        found = [path for path in there if path.suffix in HASHED]
        if self.weights is not None:
            return [self.weights, *found]
        halves = self._variant(part) is not None
        return found + [
            path
            for path in there
            if path.suffix == ".safetensors" and ((".fp16" in path.name) == halves) and ".non_ema" not in path.name
        ]

    def require_weights(self, part: str) -> None:
        """Raise ValueError unless a part has weights that are no pickles."""
        if self.weights is not None:
            self._require_in_file(part)
        elif not any((self.root / part).glob("*.safetensors")):
            raise ValueError(
                f"{self.root / part} holds no .safetensors: weights as pickles are refused, "
                "and save_pretrained(..., safe_serialization=True) writes them anew"
            )

    def _require_in_file(self, part: str) -> None:
        """Raise ValueError unless there are names in the single file that begin as this part's do."""
        setting = "text_encoder" if part.startswith("text_encoder") else "denoiser" if part in NETWORKS else "vae"
        if self.quantized and setting != "denoiser":
            raise ValueError(f"{self.weights}: a {GGUF} is taken for a network alone: give {setting}.path, a folder")
        if setting == "denoiser":
            others = tuple(chain.from_iterable(IN_ONE_FILE.values()))
            there = not all(name.startswith(others) for name in self.names)
        else:
            cls = (self.class_of(part) or ("", ""))[1] if setting == "text_encoder" else "vae"
            there = any(name.startswith(IN_ONE_FILE.get(cls, ())) for name in self.names)
        if not there:
            raise ValueError(
                f"{self.weights} holds no {part or setting} that is known there: give {setting}.path, a folder"
            )

    @cached_property
    def names(self) -> list[str]:
        """The tensors' names in the single file of weights. Raises ValueError if it can't be read."""
        assert self.weights is not None
        with _naming(self.weights):
            if self.quantized:
                from gguf import GGUFReader

                return [tensor.name for tensor in GGUFReader(self.weights).tensors]
            with safe_open(self.weights, "pt") as file:
                return list(file.keys())

    def fingerprint(self, *parts: str, index: bool = True) -> str:
        """16 hex digits over the configs and weights of these parts, all of them, read once, and over ``model_index.json``.

        Without the ``index`` for a VAE: one latent space is many models', a base model's and its refiner's among them.
        """
        if parts not in self._fingerprints:
            files = [("", self.root / INDEX)] if index and (self.root / INDEX).is_file() else []
            files += [(part, path) for part in parts for path in self.files(part)]
            digest = hashlib.blake2b(digest_size=8)
            for (part, path), content in zip(files, digests(path for _, path in files)):
                name = part if path == self.weights else f"{part}/{path.name}"
                digest.update(f"{name}\0{content}\0".encode())
            self._fingerprints[parts] = digest.hexdigest()
        return self._fingerprints[parts]


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Whatever goes wrong with weights, as a ValueError of one line that says where."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except KeyError as error:  # of a converter of names
        raise ValueError(f"{path} can't be loaded: it has no {error.args[0]}") from error
    except Exception as error:  # what diffusers, transformers, accelerate and safetensors raise is of all kinds
        raise ValueError(f"{path} can't be loaded: {one_line(error)}") from error


def _require_finite(model: torch.nn.Module) -> None:
    for name, tensor in model.named_parameters():
        if type(tensor).dequantize is not torch.Tensor.dequantize:  # torchao's
            tensor = tensor.dequantize()
        elif type(tensor) is not torch.nn.Parameter:  # of another quantiser, packed
            continue
        if tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel():
            low, high = tensor.aminmax()
            if not (low.isfinite() and high.isfinite()):
                raise ValueError(f"{name} is not finite: the file is damaged, or its training failed")


def _single_file(path: str, config: str | None) -> Path:
    """The file of weights. Raises ValueError if there is none, it is a pickle, or nothing says what is in it."""
    file = Path(path).expanduser()
    if file.suffix not in (".safetensors", GGUF):
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
    return file.resolve()


def locate(path: str, revision: str | None = None, weights: bool = True) -> Path:
    """The local folder of a model, downloaded first, with or without weights, where ``path`` is ``org/name``. Raises ValueError."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local.resolve()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        raise ValueError(f"there is no folder {path}, and it is no org/name of the Hugging Face Hub either")
    if revision is None:
        raise ValueError(
            f"there is no folder {path}; for the Hub's model of that name give model.revision too, a commit, so that it stays the same"
        )
    return _from_hub(path, revision, weights)


@cache
def _from_hub(repository: str, revision: str, weights: bool) -> Path:
    try:
        return _snapshot(repository, revision, weights, local_files_only=True)
    except Exception:  # not here yet: the cache has many ways to say so
        pass
    try:
        return _snapshot(repository, revision, weights, local_files_only=False)
    except Exception as error:  # the network's, the Hub's
        raise ValueError(
            f"{repository} at {revision} is not in the local cache and can't be downloaded ({type(error).__name__}): "
            f"`hf download {repository} --revision {revision}` where there is a network, or give a folder as model.path"
        ) from error


def _snapshot(repository: str, revision: str, weights: bool, local_files_only: bool) -> Path:
    """The folder, with small files and, if asked for, the weights of the parts: beside them many a repository has the same again.

    That is in one file, in other formats, or in halves; halves are taken where there is nothing else.
    """
    from huggingface_hub import constants, snapshot_download

    wanted = {"repo_id": repository, "revision": revision, "local_files_only": local_files_only}
    folder = Path(snapshot_download(**wanted, allow_patterns=list(SMALL)))
    if not weights:
        return folder
    index = read_json(folder / INDEX) if (folder / INDEX).is_file() else {}
    parts = [n for n, value in index.items() if isinstance(value, list) and None not in value and n not in UNUSED]
    needed = [f"{name}/*.safetensors" for name in parts] or ["*.safetensors"]
    snapshot_download(**wanted, allow_patterns=needed, ignore_patterns=["*.fp16*", "*.non_ema*"])
    if local_files_only or constants.HF_HUB_OFFLINE:
        _require_complete(folder, [p for p in needed if p.startswith((*WEIGHED, "*"))])
    halves = [pattern.replace("*.", "*.fp16*") for pattern in needed if not any(folder.glob(pattern))]
    if halves:
        snapshot_download(**wanted, allow_patterns=halves)
    return folder


def _require_complete(folder: Path, needed: list[str]) -> None:
    """Raise ValueError unless the folder of a cache has what a model needs: others put single parts of models there."""
    if not any((folder / name).is_file() for name in (INDEX, "config.json")):
        raise ValueError(f"{folder} has no {INDEX}")
    for pattern in needed:
        if not any(folder.glob(pattern)):
            raise ValueError(f"{folder} has no {pattern}")
        for index in folder.glob(f"{pattern}.index.json"):
            for name in set(read_json(index)["weight_map"].values()):
                if not (index.parent / name).is_file():
                    raise ValueError(f"{index.parent} has no {name}")


def part_class(library: str, name: str) -> Any:
    """A part's class, as ``model_index.json`` names it. Raises ValueError if it isn't diffusers' or transformers'."""
    import diffusers
    import transformers

    home = {"diffusers": diffusers, "transformers": transformers}.get(library)
    found = getattr(home or getattr(diffusers.pipelines, library, None), name, None)
    if found is None:
        raise ValueError(f"model_index.json names {library}.{name}, which is neither in diffusers nor in transformers")
    if type(found).__name__ == "DummyObject":  # stands there for a class that would need another package
        raise ValueError(f"{name} needs {' and '.join(found._backends)}: pip install {' '.join(found._backends)}")
    return found


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


def completed(cls: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of diffusers, with the class's defaults for what an old one leaves out."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {**{p.name: p.default for p in parameters if p.default is not p.empty}, **config}


def dtype_of(name: str) -> torch.dtype:
    """The dtype of that name. Raises ValueError."""
    if name not in DTYPES:
        raise ValueError(f"dtype must be {', '.join(DTYPES)}, not {name!r}")
    found: torch.dtype = getattr(torch, name)
    return found


def downscale_of(config: dict[str, Any]) -> int:
    """Pixels of the picture per latent pixel, on each side, by a VAE's config."""
    if "temperal_downsample" in config:
        return int(2 ** len(config["temperal_downsample"]) * (config.get("patch_size") or 1))
    for name in ("down_block_out_channels", "encoder_block_out_channels", "block_out_channels"):
        if name in config:
            return int(2 ** (len(config[name]) - 1))
    raise ValueError(f"{config.get('_class_name')} is no autoencoder of pictures")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object out of a file. Raises ValueError, naming the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found
