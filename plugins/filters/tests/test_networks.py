"""Scores of networks are what their own library says of the same pictures."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from latentmill.plugin import FixedShape, StageContext, tensors
from latentmill.testing import StageSuite
from latentmill.testing.batches import rows
from latentmill_filters.aesthetic import Aesthetic
from latentmill_filters.clip_score import ClipScore
from latentmill_filters.safety import Safety

CPU = torch.device("cpu")
PROMPTS = ["a fox", "x", "a red house by the sea, at night, with a boat", "HAT", "hen"]


@pytest.fixture(scope="module")
def pictures(drawn):
    return [drawn(seed) for seed in range(5)]


@pytest.fixture(scope="module")
def batch(pictures):
    """Five rows with pictures, whose prompts are of all lengths: one has more tokens than CLIP reads."""
    stacked = torch.from_numpy(np.stack([np.asarray(each) for each in pictures]))
    table = tensors.with_tensor(rows(5, *stacked.shape[1:3]), "image", stacked)
    return table.set_column(table.schema.get_field_index("prompt"), "prompt", pa.array(PROMPTS))


class TestClipScore(StageSuite):
    name = "clip_score"

    @pytest.fixture(autouse=True)
    def _of(self, clip_folder, other_clip_folder, batch):
        type(self).stage, type(self).given = staticmethod(partial(ClipScore, clip_folder)), batch
        type(self).other = other_clip_folder

    def batch(self):
        return self.given

    def changed(self):
        return ClipScore(self.other)


class TestAesthetic(StageSuite):
    name = "aesthetic"

    @pytest.fixture(autouse=True)
    def _of(self, wide_clip_folder, predictor, batch, tmp_path):
        type(self).stage = staticmethod(partial(Aesthetic, wide_clip_folder, predictor[1]))
        type(self).given, type(self).folder = batch, wide_clip_folder
        type(self).other = tmp_path / "other.safetensors"
        save_file({name: tensor * 2 for name, tensor in predictor[0].items()}, type(self).other)

    def batch(self):
        return self.given

    def changed(self):
        return Aesthetic(self.folder, str(self.other))


class TestSafety(StageSuite):
    name = "safety"

    @pytest.fixture(autouse=True)
    def _of(self, classifier_folder, batch, tmp_path):
        type(self).stage = staticmethod(partial(Safety, classifier_folder, "unsafe", None))
        type(self).given, type(self).other = batch, tmp_path / "other"
        shutil.copytree(classifier_folder, type(self).other)
        [path] = type(self).other.glob("*.safetensors")
        save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path, {"format": "pt"})

    def batch(self):
        return self.given

    def changed(self):
        return Safety(str(self.other), "unsafe", None)


def ready(stage, fixed=None):
    stage.prepare(StageContext.of({}, fixed=fixed))
    stage.load(CPU)
    return stage


def scored(stage, batch):
    """The scores of all rows."""
    table = stage(batch, lambda i, reason: pytest.fail(str(reason)))
    return table.column(stage.adds[0].name).to_pylist()


# ---------------------------------------------------------------------------------------------------------- exact scores


def test_a_clip_score_is_100_times_the_cosine_that_transformers_computes(clip_folder, pictures, batch):
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    network = CLIPModel.from_pretrained(clip_folder)
    words, prepare = CLIPTokenizer.from_pretrained(clip_folder), CLIPImageProcessorPil.from_pretrained(clip_folder)
    wanted = []
    for prompt, picture in zip(PROMPTS, pictures):
        tokens = words(prompt, truncation=True, max_length=24, return_tensors="pt")
        with torch.no_grad():
            found = network(**tokens, pixel_values=prepare(picture, return_tensors="pt")["pixel_values"])
        wanted.append(100 * float(found.logits_per_image / network.logit_scale.detach().exp()))
    found = scored(ready(ClipScore(clip_folder)), batch)
    assert found == pytest.approx(wanted, abs=1e-4)
    assert np.ptp(found) > 5


def test_a_row_without_a_prompt_has_no_clip_score(clip_folder, batch):
    """A bound would filter it by how well its picture fits no words."""
    prompts = pa.array(["", *PROMPTS[1:4], " "])
    told = {}
    found = ready(ClipScore(clip_folder))(
        batch.set_column(batch.schema.get_field_index("prompt"), "prompt", prompts), told.__setitem__
    )
    assert found.column("prompt").to_pylist() == PROMPTS[1:4]
    assert told == dict.fromkeys((0, 4), "it has no prompt to be scored against")
    assert found.column("clip_score").to_pylist() == pytest.approx(
        scored(ready(ClipScore(clip_folder)), batch)[1:4], abs=1e-4
    )


def test_pictures_are_prepared_as_clip_s_authors_do(clip_folder, pictures):
    """Scaled by Pillow's bicubic filter until the shorter side has 30 pixels, the middle cut out, less the mean, over the deviation."""
    prepare = ready(ClipScore(clip_folder)).processor
    found = prepare(pictures[:1], return_tensors="pt")["pixel_values"][0].numpy()
    scaled = pictures[0].resize((36, 30), Image.Resampling.BICUBIC).crop((3, 0, 33, 30))
    wanted = (np.asarray(scaled).astype(np.float32) / 255 - CLIP_MEAN) / CLIP_STD
    assert np.abs(found - wanted.transpose(2, 0, 1)).max() < 1e-6


CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def test_an_aesthetic_score_is_the_predictor_s_over_clip_s_embedding_of_length_1(
    wide_clip_folder, predictor, pictures, batch
):
    from transformers import CLIPImageProcessorPil, CLIPModel

    network, prepare = (
        CLIPModel.from_pretrained(wide_clip_folder),
        CLIPImageProcessorPil.from_pretrained(wide_clip_folder),
    )
    weights = {name: tensor.double().numpy() for name, tensor in predictor[0].items()}
    wanted = []
    for picture in pictures:
        with torch.no_grad():
            found = network.get_image_features(**prepare(picture, return_tensors="pt")).pooler_output
        x = found[0].double().numpy()
        x = x / np.linalg.norm(x)
        for number in "02467":
            x = weights[f"layers.{number}.weight"] @ x + weights[f"layers.{number}.bias"]
        wanted.append(float(x[0]))
    found = scored(ready(Aesthetic(wide_clip_folder, predictor[1])), batch)
    assert found == pytest.approx(wanted, abs=1e-5)
    assert np.ptp(found) > 0.01


def test_a_predictor_s_pth_gives_what_its_safetensors_gives(wide_clip_folder, predictor, batch, tmp_path):
    torch.save(predictor[0], tmp_path / "predictor.pth")
    both = [
        scored(ready(Aesthetic(wide_clip_folder, str(path))), batch)
        for path in (predictor[1], tmp_path / "predictor.pth")
    ]
    assert both[0] == both[1]


@pytest.mark.parametrize("problem", [None, "multi_label_classification"])
def test_a_safety_score_is_the_pipeline_s_of_transformers(classifier_folder, pictures, batch, tmp_path, problem):
    from transformers import ViTForImageClassification, ViTImageProcessorPil, pipeline

    folder = shutil.copytree(classifier_folder, tmp_path / "classifier")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace("{", f'{{"problem_type": "{problem}",', 1) if problem else config
    )
    network = ViTForImageClassification.from_pretrained(folder)
    judge = pipeline("image-classification", network, image_processor=ViTImageProcessorPil.from_pretrained(folder))
    for label in ("unsafe", "drawing"):
        wanted = [{each["label"]: each["score"] for each in judge(picture)}[label] for picture in pictures]
        found = scored(ready(Safety(str(folder), label, None)), batch)
        assert found == pytest.approx(wanted, abs=1e-6)
        assert np.ptp(found) > 0.01


# ------------------------------------------------------------------------------------------------------------- filtering


def test_each_has_a_bound(clip_folder, wide_clip_folder, predictor, classifier_folder, batch):
    for stage, bounded, below in (
        (ClipScore(clip_folder), lambda at: ClipScore(clip_folder, at), True),
        (Aesthetic(wide_clip_folder, predictor[1]), lambda at: Aesthetic(wide_clip_folder, predictor[1], at), True),
        (Safety(classifier_folder, "unsafe", None), lambda at: Safety(classifier_folder, "unsafe", at), False),
    ):
        name, scores = stage.adds[0].name, scored(ready(stage), batch)
        bound = sorted(scores)[2]
        told = {}
        kept = ready(bounded(bound))(batch, told.__setitem__).column(name).to_pylist()
        assert kept == [score for score in scores if (score >= bound if below else score <= bound)]
        assert len(kept) == 3
        assert {i: why.scores for i, why in told.items()} == {
            i: {name: score} for i, score in enumerate(scores) if score not in kept
        }
        assert all(f"is {'below' if below else 'above'} {bound:g}" in why.reason for why in told.values())


def test_in_a_deterministic_job_a_row_s_score_is_the_same_bits_in_any_company(clip_folder, batch):
    stage = ready(ClipScore(clip_folder), FixedShape(batch_size=8, rows_per_shard=16))
    together = scored(stage, batch)
    assert [scored(stage, batch.slice(at, 1))[0] for at in range(5)] == together
    assert scored(stage, batch.take([3, 1])) == [together[3], together[1]]


def test_scores_in_halves_are_near(clip_folder, batch):
    found = scored(ready(ClipScore(clip_folder, dtype="bfloat16")), batch)
    assert found == pytest.approx(scored(ready(ClipScore(clip_folder)), batch), abs=3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_of_embeddings_in_halves_the_cosine_is_exact(clip_folder, pictures, batch, dtype):
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    network = CLIPModel.from_pretrained(clip_folder, dtype=getattr(torch, dtype))
    words, prepare = CLIPTokenizer.from_pretrained(clip_folder), CLIPImageProcessorPil.from_pretrained(clip_folder)
    tokens = words(PROMPTS, padding="max_length", truncation=True, max_length=24, return_tensors="pt")
    pixels = prepare(pictures, return_tensors="pt")["pixel_values"].to(network.dtype)
    with torch.no_grad():
        of_pictures = network.get_image_features(pixel_values=pixels).pooler_output.double().numpy()
        of_prompts = network.get_text_features(**tokens).pooler_output.double().numpy()
    lengths = np.linalg.norm(of_pictures, axis=1) * np.linalg.norm(of_prompts, axis=1)
    wanted = 100 * (of_pictures * of_prompts).sum(1) / lengths
    assert scored(ready(ClipScore(clip_folder, dtype=dtype)), batch) == pytest.approx(wanted.tolist(), abs=1e-4)


# ------------------------------------------------------------------------------------------------------- what is refused


def refused(make):
    with pytest.raises(ValueError) as told:
        make().load(CPU)
    return str(told.value)


def test_what_is_no_network_s_folder_is_refused_when_the_stage_is_built(tmp_path, clip_folder, predictor):
    assert refused(ClipScore).startswith("path must be a network's folder")
    assert refused(lambda: ClipScore("openai/clip")) == (
        "there is no folder openai/clip; one of the Hub's is written hf://OWNER/NAME@COMMIT"
    )
    assert refused(lambda: ClipScore(str(tmp_path))).endswith(
        "holds no config.json: a folder as save_pretrained writes it is expected"
    )
    shutil.copy(Path(clip_folder) / "config.json", tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert "weights as pickles are refused" in refused(lambda: ClipScore(str(tmp_path)))
    assert refused(lambda: ClipScore(clip_folder, dtype="float8")).startswith(
        "dtype must be float32, float16, bfloat16"
    )
    assert refused(lambda: Aesthetic(clip_folder, predictor[1])) == (
        "the predictor is for OpenAI's CLIP ViT-L/14, whose projection_dim is 768, not 12"
    )
    assert "there is no file 'nowhere'" in refused(lambda: Aesthetic(clip_folder, "nowhere"))


@pytest.mark.parametrize(
    ("key", "other"), [("patch_size", 16), ("image_size", 336), ("num_hidden_layers", 12), ("hidden_act", "gelu")]
)
def test_a_clip_of_another_make_is_refused_though_its_embeddings_are_as_wide(
    wide_clip_folder, predictor, tmp_path, key, other
):
    folder = shutil.copytree(wide_clip_folder, tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"][key] = other
    (folder / "config.json").write_text(json.dumps(config))
    assert f"ViT-L/14, whose {key} is " in refused(lambda: Aesthetic(str(folder), predictor[1]))


def test_a_tokenizer_that_is_missing_is_not_made_up(clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    (folder / "tokenizer.json").unlink()
    assert refused(lambda: ClipScore(str(folder))) == (
        f"{folder} holds no tokenizer: tokenizer.json or vocab.json and merges.txt"
    )


def test_a_label_that_the_classifier_has_not_is_refused(classifier_folder):
    assert refused(lambda: Safety(classifier_folder, "nsfw")) == (
        "label must be one of the classifier's, safe, unsafe, drawing, not 'nsfw'"
    )


def test_labels_that_a_config_leaves_out_are_not_guessed(classifier_folder, tmp_path):
    folder = shutil.copytree(classifier_folder, tmp_path / "classifier")
    config = json.loads((folder / "config.json").read_text())
    del config["id2label"]
    (folder / "config.json").write_text(json.dumps({**config, "num_labels": 3}))
    assert Safety(str(folder), "LABEL_2").at == 2
    (folder / "config.json").write_text(json.dumps({"model_type": "timm_wrapper", "label_names": ["a", "b"]}))
    assert "is a network of timm" in refused(lambda: Safety(str(folder), "LABEL_0"))


@pytest.fixture
def damaged(clip_folder, tmp_path):
    """``damaged(CHANGE)``: a copy of the CLIP, of whose tensors CHANGE has made others."""

    def copy(change):
        folder = shutil.copytree(clip_folder, tmp_path / "damaged")
        [path] = folder.glob("*.safetensors")
        tensors_of = load_file(path)
        change(tensors_of)
        os.remove(path)
        save_file(tensors_of, path, {"format": "pt"})
        return str(folder)

    return copy


def test_weights_that_are_missing_are_not_made_up(damaged):
    folder = damaged(lambda found: found.pop("visual_projection.weight"))
    assert refused(lambda: ClipScore(folder)) == f"{folder} has no visual_projection.weight"


def test_weights_that_are_not_finite_are_refused(damaged):
    folder = damaged(lambda found: found["text_projection.weight"].fill_(float("nan")))
    assert "text_projection.weight is not finite" in refused(lambda: ClipScore(folder))


def test_a_predictor_with_relu_is_refused_and_so_is_a_pickle_of_more_than_tensors(
    wide_clip_folder, predictor, tmp_path
):
    renamed = {name.replace(".2.", ".3."): tensor for name, tensor in predictor[0].items()}
    save_file(renamed, tmp_path / "relu.safetensors")
    path = str(tmp_path / "relu.safetensors")
    assert "tensors that are missing: layers.2.bias" in refused(lambda: Aesthetic(wide_clip_folder, path))
    torch.save({"layers": os.system}, tmp_path / "code.pth")
    path = str(tmp_path / "code.pth")
    assert "a pickle of more than weights" in refused(lambda: Aesthetic(wide_clip_folder, path))


def test_a_score_that_is_not_finite_is_an_error_and_lets_no_row_pass(wide_clip_folder, predictor, batch, tmp_path):
    save_file({name: tensor * 1e30 for name, tensor in predictor[0].items()}, tmp_path / "huge.safetensors")
    told = {}
    found = ready(Aesthetic(wide_clip_folder, str(tmp_path / "huge.safetensors")))(batch, told.__setitem__)
    assert not len(found) and {*told.values()} == {"its aesthetic is not finite"}
