"""Tiny networks of transformers, as their authors would store them: random, and always the same."""

import pytest  # and no large library: xdist's own process reads this, too, before others begin

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
"""CLIP's."""
LAYERS = {"0": (768, 1024), "2": (1024, 128), "4": (128, 64), "6": (64, 16), "7": (16, 1)}
"""The predictor's, by its authors' names for them."""
CHARACTERS = [chr(code) for code in range(33, 127)] + ["Ġ"]


def processor(side):
    """CLIP's preparation, for pictures of ``side`` pixels."""
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def tokenizer():
    """A token a character, as CLIP's would have with nothing learnt."""
    from transformers import CLIPTokenizer

    tokens = [*CHARACTERS, *(f"{each}</w>" for each in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: at for at, token in enumerate(tokens)}, merges=[], model_max_length=24)


def clip(folder, width, seed, side=30, **of_vision):
    """A CLIP with embeddings of ``width`` for pictures of ``side`` pixels, in a folder."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    words = tokenizer()
    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {
        "vocab_size": len(words),
        "max_position_embeddings": 24,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    vision = {"image_size": side, "patch_size": 10, **of_vision}
    torch.manual_seed(seed)
    config = CLIPConfig(text_config={**small, **text}, vision_config={**small, **vision}, projection_dim=width)
    network = CLIPModel(config).eval()
    with torch.no_grad():  # as they are drawn, they make nearly the same of every picture
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    for part in (network, words, processor(side)):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    return str(clip(tmp_path_factory.mktemp("clip"), 12, 0))


@pytest.fixture(scope="session")
def other_clip_folder(tmp_path_factory):
    """The same with other weights."""
    return str(clip(tmp_path_factory.mktemp("other_clip"), 12, 1))


@pytest.fixture(scope="session")
def wide_clip_folder(tmp_path_factory):
    """One with embeddings of 768, patches and layers as ViT-L/14 has, though narrow."""
    return str(clip(tmp_path_factory.mktemp("wide_clip"), 768, 0, 224, patch_size=14, num_hidden_layers=24))


@pytest.fixture(scope="session")
def predictor(tmp_path_factory):
    """The tensors of an aesthetic predictor by name, and the .safetensors that holds them."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    found = {}
    for number, (inside, out) in LAYERS.items():
        found[f"layers.{number}.weight"] = torch.randn(out, inside) / inside**0.5
        found[f"layers.{number}.bias"] = torch.randn(out) / 10
    path = tmp_path_factory.mktemp("predictor") / "predictor.safetensors"
    save_file(found, path)
    return found, str(path)


@pytest.fixture(scope="session")
def classifier_folder(tmp_path_factory):
    """A vision transformer with the labels safe, unsafe and drawing."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    torch.manual_seed(0)
    labels = {0: "safe", 1: "unsafe", 2: "drawing"}
    network = ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            intermediate_size=24,
            num_attention_heads=2,
            num_hidden_layers=2,
            image_size=32,
            patch_size=8,
            id2label=labels,
            label2id={name: at for at, name in labels.items()},
        )
    ).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    folder = tmp_path_factory.mktemp("classifier")
    network.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def drawn():
    """``drawn(SEED)``: a picture of its own, 48 x 40 pixels: soft colours with a few edges."""
    import numpy as np
    from PIL import Image

    def draw(seed, width=48, height=40):
        random = np.random.default_rng(seed)
        picture = Image.fromarray(random.integers(0, 256, (5, 6, 3), np.uint8)).resize((width, height))
        colour, corner = random.integers(0, 256, 3).tolist(), random.integers(0, 20, 2).tolist()
        picture.paste(tuple(colour), (*corner, 30, 28))
        return picture

    return draw
