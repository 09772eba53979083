"""Whether a picture shows what it shouldn't, by a classifier of one's own choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from torch import Tensor

from latentmill_filters.network import NetworkScorer

INDEPENDENT = "multi_label_classification"
"""What a config of transformers says where labels don't exclude each other."""


class Safety(NetworkScorer):
    """Scores how surely a picture has the label ``label``, and filters what is above ``max_score``.

    The score, in the column ``column``, is what transformers' pipeline ``image-classification`` says: softmax over all labels, from 0 to
    1; a sigmoid where labels don't exclude each other, or there is only one. ``path`` is the folder of a classifier of pictures, of any
    architecture of transformers. With another ``column`` the stage may stand twice in a job.
    """

    contract = 2

    def __init__(
        self,
        path: str = "",
        label: str = "",
        max_score: float | None = 0.5,
        column: str = "unsafe",
        dtype: str = "float32",
    ) -> None:
        super().__init__(path, dtype)
        self.label, self.max_score, self.column = label, max_score, column
        self.adds = (pa.field(column, pa.float64(), nullable=False),)
        config = self.folder.config
        # transformers leaves out of a config what is its default.
        labels = {name: int(at) for at, name in config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"}).items()}
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
            return f"{self.label} {scores[self.column]:.2f} is above {self.max_score:g}"
        return ""
