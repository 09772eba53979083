"""Networks of transformers out of local folders, and what the stages have in common that score pictures by one."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from latentmill.batch import fixed_slots
from latentmill.plugin import RowError, StageContext, WeightsPath, tensors
from latentmill.text import one_line
from latentmill.weights import digests, record
from latentmill_filters.scorer import Scorer, no_pictures

NETWORK_DTYPES = ("float32", "float16", "bfloat16")
WORDS = (("tokenizer.json",), ("vocab.json", "merges.txt"))
"""Files that a tokenizer may have its words in."""


NETWORK = WeightsPath(loads_late=True)
"""Marks the setting with the folder of a network."""


class NetworkFolder:
    """A network's folder, as ``save_pretrained`` of transformers writes it: config, preparation, and weights as safetensors.

    No code out of the folder is run. Raises ValueError if there is no such folder.
    """

    def __init__(self, path: str) -> None:
        if find_spec("transformers") is None:
            raise ValueError("it needs transformers: pip install 'latentmill-filters[networks]'")
        if not path:
            raise ValueError("path must be a network's folder, as save_pretrained of transformers writes it")
        self.root = Path(path).expanduser()
        if not self.root.is_dir():
            raise ValueError(f"there is no folder {path}; one of the Hub's is written hf://OWNER/NAME@COMMIT")
        if not (self.root / "config.json").is_file():
            raise ValueError(f"{path} holds no config.json: a folder as save_pretrained writes it is expected")
        if not any(self.root.glob("*.safetensors")):
            raise ValueError(
                f"{path} holds no .safetensors: weights as pickles are refused, and save_pretrained writes others"
            )

    @cached_property
    def config(self) -> dict[str, Any]:
        """What config.json says."""
        found: dict[str, Any] = json.loads((self.root / "config.json").read_text(encoding="utf-8"))
        return found

    def files(self) -> list[Path]:
        """All files that a network may be read from."""
        return sorted(
            path for path in self.root.iterdir() if path.suffix in (".json", ".txt", ".model", ".safetensors")
        )

    def fingerprint(self) -> str:
        """16 hex digits over names and contents."""
        digest = hashlib.blake2b(digest_size=8)
        for path, content in zip(self.files(), digests(self.files())):
            digest.update(f"{path.name}\0{content}\0".encode())
        return digest.hexdigest()

    def load(self, cls: Any, dtype: str, device: torch.device) -> Any:
        """The network of a class of transformers, to be used and not trained.

        Raises ValueError if it can't be read, lacks weights, which transformers would make up, or has some that are not finite.
        """
        record(*self.files())
        network, found = self._read(
            cls, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"{self.root} has no {missing[0]}" + f" and {len(missing) - 1} more" * (len(missing) > 1))
        for name, parameter in network.named_parameters():
            if not parameter.isfinite().all():
                raise ValueError(f"{self.root}: {name} is not finite: the file is damaged, or its training failed")
        return network.eval().requires_grad_(False).to(device)

    def processor(self) -> Any:
        """What makes pictures into the network's input, in Pillow and numpy: torchvision's numbers are others."""
        from transformers import AutoImageProcessor

        return self._read(AutoImageProcessor, backend="pil", trust_remote_code=False)

    def require_tokenizer(self) -> None:
        """Raise ValueError unless the words of a CLIP's tokenizer are there: without them transformers makes one of two words."""
        if not any(all((self.root / name).is_file() for name in names) for names in WORDS):
            raise ValueError(f"{self.root} holds no tokenizer: {' or '.join(' and '.join(names) for names in WORDS)}")

    def tokenizer(self) -> Any:
        """What makes text into the network's input."""
        from transformers import AutoTokenizer

        return self._read(AutoTokenizer, trust_remote_code=False)

    def _read(self, cls: Any, **options: Any) -> Any:
        try:
            return cls.from_pretrained(self.root, local_files_only=True, **options)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # transformers, tokenizers and safetensors raise all kinds
            raise ValueError(f"{self.root} can't be loaded: {one_line(error)}") from error


class NetworkScorer(Scorer):
    """Scores pictures by a network of transformers in the folder ``path``, on a GPU if the stage's workers have one.

    In a deterministic job a row stands in its slot, so that its score is the same bits in every run. In others it may differ in the
    last digits, by the rows that are computed with it.
    """

    contract = 2
    libraries: Sequence[str] = ("transformers",)
    fingerprinted: Sequence[str] = ("path",)
    resources: Mapping[str, Any] = {"batch_size": 32}
    needs_prompt = False
    """Whether a row without a prompt is an error."""
    network: Any

    def __init__(self, path: str, dtype: str, column: str) -> None:
        if dtype not in NETWORK_DTYPES:
            raise ValueError(f"dtype must be {', '.join(NETWORK_DTYPES)}, not {dtype!r}")
        self.folder, self.dtype, self.column = NetworkFolder(path), dtype, column
        self.adds = (pa.field(column, pa.float64(), nullable=False),)

    def fingerprint(self) -> str:
        return self.folder.fingerprint()

    def prepare(self, context: StageContext) -> None:
        self.fixed = context.fixed

    @abstractmethod
    def network_class(self) -> Any:
        """The class of transformers that the folder is read by."""

    @abstractmethod
    def judged(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """The scores ``[B]`` of pictures as the processor makes them, ``[B, 3, h, w]`` on the network's device, with their prompts."""

    def load(self, device: torch.device) -> None:
        self.device, self.processor = device, self.folder.processor()
        self.network = self.folder.load(self.network_class(), self.dtype, device)

    @torch.inference_mode()
    def scores(self, batch: pa.Table) -> Iterable[Mapping[str, float] | RowError]:
        if without := no_pictures(batch):
            return without
        slots, size = fixed_slots(batch, self.fixed)
        pictures = [Image.fromarray(picture) for picture in tensors.from_arrow(batch, "image").numpy()]
        pixels = self.processor(pictures, return_tensors="pt")["pixel_values"]
        prompts = [""] * size
        given = batch.column("prompt").to_pylist()
        for slot, prompt in zip(slots.tolist(), given):
            prompts[slot] = prompt
        found = self.judged(
            tensors.send(tensors.spread(pixels, slots, size), self.device).to(self.network.dtype), prompts
        )
        return [
            RowError("it has no prompt to be scored against")
            if self.needs_prompt and not prompt.strip()
            else {self.column: score}
            for prompt, score in zip(given, found.double().cpu()[slots].tolist())
        ]
