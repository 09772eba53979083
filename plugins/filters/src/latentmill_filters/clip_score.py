"""How well a picture fits its prompt, by CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from latentmill_filters.network import NETWORK, NetworkScorer
from latentmill_filters.scorer import written


class ClipScore(NetworkScorer):
    """Scores how well a picture fits its prompt, and filters what fits too badly.

    The score, in the column ``column``, is 100 times the cosine of CLIP's embeddings of picture and prompt: ``100 * cos(E_I, E_C)``, from -100 to 100. Hessel et
    al. 2021 (arXiv:2104.08718, eq. 1) have ``2.5 * max(cos, 0)``, torchmetrics ``max(100 * cos, 0)``. Of a prompt of more tokens than CLIP
    reads, 77, the end is not read. A row without a prompt is an error: what a picture has in common with no words is no score.

    ``path`` is the folder of a CLIPModel with its processor and tokenizer, as openai/clip-vit-large-patch14.
    """

    contract = 2
    needs_prompt = True
    libraries = ("transformers", "tokenizers")

    def __init__(
        self,
        path: Annotated[str, NETWORK] = "",
        min_score: float | None = None,
        dtype: str = "float32",
        column: str = "clip_score",
    ) -> None:
        super().__init__(path, dtype, column)
        self.folder.require_tokenizer()
        self.min_score = min_score

    def network_class(self) -> Any:
        from transformers import CLIPModel

        return CLIPModel

    def load(self, device: torch.device) -> None:
        super().load(device)
        self.tokenizer = self.folder.tokenizer()
        self.longest = self.network.config.text_config.max_position_embeddings

    def judged(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        # All to one length: what a prompt comes to must not hang on the longest beside it.
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.longest, return_tensors="pt"
        )
        of_pictures = self.network.get_image_features(pixel_values=pixels).pooler_output
        of_prompts = self.network.get_text_features(**tokens.to(self.device)).pooler_output
        # As 32 bits first: lengths in 16 are off by more than scores that are to be told apart.
        cosine: Tensor = (normalize(of_pictures.float()) * normalize(of_prompts.float())).sum(-1)
        return 100 * cosine

    def reason(self, scores: Mapping[str, float]) -> str:
        if self.min_score is not None and scores[self.column] < self.min_score:
            return f"CLIP score {written(scores[self.column], self.min_score)} is below {self.min_score:g}"
        return ""
