"""Tiny tokenizers and text encoders."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"


def tokenizer(
    length: int,
    begin: str | None = "<s>",
    end: str | None = "</s>",
    pad: str = "<pad>",
    side: str = "right",
    template: str | None = None,
    extra: dict[str, str] | None = None,
) -> Any:
    """A token a character, between ``begin`` and ``end``; ``extra`` tokens, by what the tokenizer calls them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<pad>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*special, *CHARACTERS])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    around = " ".join(token for token in (begin, "$A", end) if token)
    used = [(token, vocabulary[token]) for token in (begin, end) if token]
    inner.post_processor = processors.TemplateProcessing(single=around, special_tokens=used)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token=begin,
        eos_token="</s>",
        pad_token=pad,
        padding_side=side,
        model_max_length=length,
        chat_template=template,
        extra_special_tokens=extra or {},
    )


VOCABULARY = 4 + len(CHARACTERS)


TEXT = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1, "vocab_size": VOCABULARY}


def clip(width: int = 32, projection: int | None = None, length: int = 77) -> Any:
    """A CLIP text model, with a projection if its width is given."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        **TEXT,
        hidden_size=width,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        max_position_embeddings=length,
        projection_dim=projection or width,
    )
    return CLIPTextModelWithProjection(config).eval() if projection else CLIPTextModel(config).eval()


def t5(width: int = 32, vocabulary: int = 0) -> Any:
    """The encoder of a T5."""
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": width, "d_ff": 37, "d_kv": 8, "num_heads": 2, "num_layers": 2}
    return T5EncoderModel(T5Config(vocab_size=vocabulary or VOCABULARY, pad_token_id=1, eos_token_id=3, **sizes)).eval()


def gemma(width: int = 16) -> Any:
    """A Gemma 2."""
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
        Gemma2Config(
            **TEXT,
            hidden_size=width,
            intermediate_size=37,
            head_dim=8,
            num_attention_heads=1,  # of thousands of characters
            num_key_value_heads=1,
            num_hidden_layers=2,
        )
    ).eval()


CHAT = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}|{% endfor %}"


def sentencepiece() -> Path:
    """The file of a sentencepiece model of single characters."""
    import tempfile

    from sentencepiece import SentencePieceTrainer

    stem = Path(tempfile.mkdtemp()) / "tokenizer"
    SentencePieceTrainer.train(
        sentence_iterator=iter(CHARACTERS.split()),
        model_prefix=str(stem),
        model_type="char",
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return stem.with_suffix(".model")
