"""Whether a picture shows what it shouldn't, by a classifier of one's own choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from torch import Tensor

from latentmill_filters.network import NETWORK, NetworkScorer
from latentmill_filters.scorer import written

INDEPENDENT = "multi_label_classification"
"""What a config of transformers says where labels don't exclude each other."""


class Safety(NetworkScorer):
    """Scores how surely a picture has the label ``label``, and filters what is above ``max_score``.

    The score, in the column ``column``, is what transformers' pipeline ``image-classification`` says: softmax over all labels, from 0 to
    1; a sigmoid where labels don't exclude each other, or there is only one. ``path`` is the folder of a classifier of pictures, of any
    architecture of transformers; networks of timm, in its wrapper, are refused. With another ``column`` the stage may stand twice in a job.
    """

    contract = 2

    def __init__(
        self,
        path: Annotated[str, NETWORK] = "",
        label: str = "",
        max_score: float | None = 0.5,
        column: str = "unsafe",
        dtype: str = "float32",
    ) -> None:
        super().__init__(path, dtype, column)
        self.label, self.max_score = label, max_score
        config = self.folder.config
        if config.get("model_type") == "timm_wrapper":
            raise ValueError(f"{path} is a network of timm, and those of transformers alone are taken")
        # transformers leaves out of a config what is its default.
        unnamed = {str(at): f"LABEL_{at}" for at in range(config.get("num_labels", 2))}
        labels = {name: int(at) for at, name in config.get("id2label", unnamed).items()}
        if label not in labels:
            raise ValueError(f"label must be one of the classifier's, {', '.join(labels)}, not {label!r}")
        if config.get("problem_type") == "regression":
            raise ValueError(f"{path} is no classifier: its config says that it is of a regression")
        self.at, self.independent = labels[label], len(labels) == 1 or config.get("problem_type") == INDEPENDENT

    def network_class(self) -> Any:
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification

    def judged(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        logits: Tensor = self.network(pixel_values=pixels).logits.float()
        return (logits.sigmoid() if self.independent else logits.softmax(-1))[:, self.at]

    def reason(self, scores: Mapping[str, float]) -> str:
        if self.max_score is not None and scores[self.column] > self.max_score:
            return f"{self.label} {written(scores[self.column], self.max_score)} is above {self.max_score:g}"
        return ""
