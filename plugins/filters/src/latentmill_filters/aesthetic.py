"""How much people would like a picture, by the aesthetic predictor of LAION."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, Sequential
from torch.nn.functional import normalize

from latentmill.plugin import WeightsPath
from latentmill.weights import digest
from latentmill.weights import load as load_tensors
from latentmill_filters.network import NETWORK, NetworkScorer
from latentmill_filters.scorer import written

WIDTH = 768
"""Of the embeddings of CLIP ViT-L/14, for which the predictor was trained."""
VIT_L_14 = {
    "projection_dim": WIDTH,
    "patch_size": 14,
    "image_size": 224,
    "num_hidden_layers": 24,
    "hidden_act": "quick_gelu",
}
"""What a config says of it. Others, and those trained elsewhere with another activation, have embeddings as wide."""
LEFT_OUT = {"patch_size": 32, "image_size": 224, "num_hidden_layers": 12, "hidden_act": "quick_gelu"}
"""What a config of transformers means that doesn't say it."""


class Aesthetic(NetworkScorer):
    """Scores a picture's aesthetics, and filters what is below ``min_score``.

    The score, in the column ``column``, is what LAION's predictor of version 2 says, about 1 to 10: linear layers, 768 to 1024, 128, 64, 16 and 1 without
    activations between, over CLIP's embedding of the picture, brought to length 1 (Schuhmann,
    github.com/christophschuhmann/improved-aesthetic-predictor).

    ``path`` is the folder of CLIP ViT-L/14 with OpenAI's weights, openai/clip-vit-large-patch14, and ``weights`` the predictor's file, as
    sac+logos+ava1-l14-linearMSE.pth: a .safetensors, or a .pth, of which nothing but tensors is read. Those with ReLU have other
    layers, and are refused.
    """

    contract = 2
    fingerprinted = ("path", "weights")

    def __init__(
        self,
        path: Annotated[str, NETWORK] = "",
        weights: Annotated[str, WeightsPath()] = "",
        min_score: float | None = None,
        dtype: str = "float32",
        column: str = "aesthetic",
    ) -> None:
        super().__init__(path, dtype, column)
        self.weights, self.min_score = Path(weights).expanduser(), min_score
        if not self.weights.is_file():
            raise ValueError(f"weights must be the predictor's file, and there is no file {weights!r}")
        config = self.folder.config
        found = {**LEFT_OUT, **config.get("vision_config", {}), "projection_dim": config.get("projection_dim")}
        for name, wanted in VIT_L_14.items():
            if found[name] != wanted:
                raise ValueError(
                    f"the predictor is for OpenAI's CLIP ViT-L/14, whose {name} is {wanted}, not {found[name]}"
                )

    def fingerprint(self) -> str:
        both = f"{super().fingerprint()} {digest(self.weights)}"
        return hashlib.blake2b(both.encode(), digest_size=8).hexdigest()

    def network_class(self) -> Any:
        from transformers import CLIPModel

        return CLIPModel

    def load(self, device: torch.device) -> None:
        super().load(device)
        self.network.text_model = None  # it is not asked for, and is a third of the weights
        layers = predictor()
        pickled = self.weights.suffix in (".pth", ".pt")
        layers.load_state_dict(load_tensors(self.weights, layers.state_dict(), allow_pickle=pickled))
        self.predictor = layers.eval().requires_grad_(False).to(device)

    def judged(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        embeddings = self.network.get_image_features(pixel_values=pixels).pooler_output
        found: Tensor = self.predictor(normalize(embeddings.float()))
        return found[:, 0]

    def reason(self, scores: Mapping[str, float]) -> str:
        if self.min_score is not None and scores[self.column] < self.min_score:
            return f"aesthetic score {written(scores[self.column], self.min_score)} is below {self.min_score:g}"
        return ""


def predictor() -> Sequential:
    """The layers, by the names that they have in the file: of numbers that are left out dropout stood there, in training."""
    sides = {"0": (WIDTH, 1024), "2": (1024, 128), "4": (128, 64), "6": (64, 16), "7": (16, 1)}
    layers: OrderedDict[str, Module] = OrderedDict((number, Linear(*each)) for number, each in sides.items())
    return Sequential(OrderedDict(layers=Sequential(layers)))
