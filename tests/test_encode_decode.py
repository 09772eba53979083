"""Encoding and decoding with a VAE that loses nothing: pictures arrive as they left, each row's own."""

import pytest
import torch

from latentmill.batch import FixedShape, from_dicts, with_latents
from latentmill.plugin import VAE, Declaration, LatentSpec, RowError, StageContext, TextEncoder, tensors
from latentmill.stages.decode import Decode, psnr
from latentmill.stages.encode import Encode


def encode_with(vae, text=None, fixed=None, keep_image=False, latents_std=False):
    later = [Declaration("denoise", needs=("denoiser",))] if text is not None else []
    plugins = {"vae": vae, **({} if text is None else {"text_encoder": text})}
    adds = ["latents", *["latents_std"] * latents_std, *["source_image"] * keep_image]
    stage = Encode()
    stage.prepare(StageContext.of(plugins, adds, fixed=fixed, after=later))
    return stage


def decode_with(vae, fixed=None):
    stage = Decode()
    stage.prepare(StageContext.of({"vae": vae}, fixed=fixed))
    return stage


class Lossless(VAE):
    """Space to depth: 2x2 pixels of 3 colours are 12 channels. Counts loads."""

    contract = 2

    def __init__(self):
        self.loads = 0

    @property
    def spec(self):
        return LatentSpec(channels=12, downscale=2, scale=1.0, shift=0.0, dtype="float32", fingerprint="lossless")

    def load(self, device):
        self.loads += 1

    def encode(self, images):
        return torch.nn.functional.pixel_unshuffle(images, 2)

    def decode(self, latents):
        return torch.nn.functional.pixel_shuffle(latents, 2)


class Lengths(TextEncoder):
    """A prompt's length is its embedding; refuses the word 'bad'. Remembers what it encoded."""

    contract = 2

    def __init__(self):
        self.encoded = []

    def check(self, prompt):
        if "bad" in prompt:
            raise RowError("unknown word 'bad'")

    def encode(self, prompts):
        self.encoded.append(list(prompts))
        return {"length": torch.tensor([[float(len(p))] for p in prompts])}


def batch(prompts, sizes=None, images=None):
    sizes = sizes or [(4, 6)] * len(prompts)
    table = from_dicts(
        [
            {
                "row": n, "row_id": str(n), "prompt": prompt, "negative_prompt": "no", "seed": n, "steps": 1, "width": w,
                "guidance_scale": 1.0, "strength": 1.0, "scheduler": "euler", "height": h,
            }
            for n, (prompt, (h, w)) in enumerate(zip(prompts, sizes))
        ]
    )  # fmt: skip
    return table if images is None else tensors.with_tensor(table, "image", images)


def call(stage, table):
    rejected = {}
    stage.load(torch.device("cpu"))
    out = stage(table, rejected.__setitem__)
    return (out if hasattr(out, "schema") else list(out)), rejected


def test_a_prompt_alone_gets_an_empty_latent_and_the_vae_s_weights_stay_unloaded():
    vae, text = Lossless(), Lengths()
    [part], rejected = call(encode_with(vae, text), batch(["aa", "b", "aa"]))
    assert tensors.from_arrow(part, "latents").shape == (3, 12, 2, 3)
    assert not tensors.from_arrow(part, "latents").any()
    assert tensors.from_arrow(part, "prompt:length")[:, 0].tolist() == [2, 1, 2]
    assert tensors.from_arrow(part, "negative:length")[:, 0].tolist() == [2, 2, 2]
    assert text.encoded == [["aa", "b"], ["no"]]  # each text once
    assert vae.loads == 0 and not rejected


def test_prompts_are_kept_up_to_a_bound_and_the_one_asked_for_longest_ago_goes_first(monkeypatch):
    """Each takes a letter and a number: 5 bytes. The negative one takes 6."""
    monkeypatch.setattr("latentmill.stages.prompts.MEMORY", 16)
    text = Lengths()
    stage = encode_with(Lossless(), text)
    for prompts in ("ab", "b", "c", "b", "a", "c"):
        call(stage, batch([*prompts]))
    assert [each for each in text.encoded if each != ["no"]] == [["a", "b"], ["c"], ["a"], ["c"]]
    assert text.encoded.count(["no"]) == 1


def test_an_empty_latent_has_the_dtype_of_all_others():
    class Half(Lossless):
        spec = LatentSpec(**{**vars(Lossless().spec), "dtype": "float16"})

    [part], _ = call(encode_with(Half(), Lengths()), batch(["aa"]))
    assert tensors.from_arrow(part, "latents").dtype == torch.float16


def test_bad_rows_are_rejected_and_the_others_part_by_shape():
    parts, rejected = call(
        encode_with(Lossless(), Lengths()), batch(["a", "bad", "c", "d"], [(4, 4), (4, 4), (5, 4), (4, 8)])
    )
    assert [part.column("prompt").to_pylist() for part in parts] == [["a"], ["d"]]
    assert rejected == {1: "unknown word 'bad'", 2: "size 4x5 is not a multiple of 2, as the VAE needs"}


def test_pictures_come_back_as_they_were_and_psnr_says_so():
    images = torch.randint(0, 256, (3, 4, 6, 3), dtype=torch.uint8)
    [part], _ = call(encode_with(Lossless(), None, keep_image=True), batch(["", "", ""], images=images))
    assert "image" not in part.column_names
    out, _ = call(decode_with(Lossless()), part)
    assert torch.equal(tensors.from_arrow(out, "image"), images)
    assert out.column("psnr").to_pylist() == [float("inf")] * 3
    assert "latents" not in out.column_names and "source_image" not in out.column_names


def test_fixed_shapes_compute_at_the_row_s_slot():
    images = torch.randint(0, 256, (3, 4, 6, 3), dtype=torch.uint8)
    fixed = FixedShape(batch_size=5, rows_per_shard=5)
    text = Lengths()
    [part], _ = call(encode_with(Lossless(), text, fixed), batch(["a", "b", "c"], images=images).slice(1))
    assert text.encoded[0] == ["", "b", "c", "", ""]
    out, _ = call(decode_with(Lossless(), fixed), part)
    assert torch.equal(tensors.from_arrow(out, "image"), images[1:])


def test_a_vae_refuses_another_s_latents():
    [part], _ = call(encode_with(Lossless(), None), batch(["a"]))

    class Other(Lossless):
        @property
        def spec(self):
            return LatentSpec(**{**vars(super().spec), "fingerprint": "other"})

    with pytest.raises(ValueError, match="lossless"):
        call(decode_with(Other()), part)


@pytest.mark.parametrize("fixed", [None, FixedShape(batch_size=6, rows_per_shard=6)])
def test_conditioning_that_is_not_finite_is_rejected_and_names_the_text_encoder(fixed):
    class Overflowing(Lengths):
        def encode(self, prompts):
            lengths = torch.tensor([[float(len(p))] for p in prompts])
            lengths[torch.tensor(["huge" in p for p in prompts])] = float("inf")
            return {"length": torch.full((len(prompts), 2), 1, dtype=torch.int64), "embeds": lengths}

    table = batch(["a", "huge", "bad", "c", "d", "e"])
    negative = ["no", "no", "no", "huge", "no", "no"]
    at = table.schema.get_field_index("negative_prompt")
    table = table.set_column(at, table.schema.field(at), [negative])
    [part], rejected = call(encode_with(Lossless(), Overflowing(), fixed), table)
    assert part.column("row").to_pylist() == [0, 4, 5]
    assert rejected == {
        1: "the text encoder's embeds of the prompt are not finite",
        2: "unknown word 'bad'",
        3: "the text encoder's embeds of the negative prompt are not finite",
    }
    with pytest.raises(
        RuntimeError, match="^the text encoder's embeds of the prompt are not finite$"
    ):  # all: is it the rows?
        call(encode_with(Lossless(), Overflowing(), fixed), batch(["huge"] * 2))


def test_latents_of_a_picture_that_are_not_finite_are_rejected_and_the_next_row_keeps_its_number():
    class Broken(Lossless):
        def encode(self, images):
            return torch.where(images[:, :1, :1, :1] > 0, float("nan"), super().encode(images))

    class Overflowing(Lengths):
        def encode(self, prompts):
            return {"embeds": torch.tensor([[float("inf" if p == "huge" else 1)] for p in prompts])}

    images = torch.zeros(3, 4, 6, 3, dtype=torch.uint8)
    images[0] = 255
    [part], rejected = call(encode_with(Broken(), Overflowing()), batch(["a", "b", "huge"], images=images))
    assert part.column("row").to_pylist() == [1]
    assert rejected == {
        0: "the VAE's latents of this picture are not finite",
        2: "the text encoder's embeds of the prompt are not finite",
    }
    with pytest.raises(RuntimeError, match="^the VAE's latents of this picture are not finite$"):
        call(encode_with(Broken(), None), batch(["a"], images=images[:1]))


def test_pictures_that_are_not_finite_are_rejected():
    [part], _ = call(encode_with(Lossless(), None), batch(["a", "b"]))
    latents = tensors.from_arrow(part, "latents").clone()
    latents[0, 3, 1, 1] = float("nan")
    out, rejected = call(decode_with(Lossless()), with_latents(part, latents, Lossless().spec))
    assert rejected == {0: "the VAE's picture of these latents is not finite"}
    assert out.column("row").to_pylist() == [1]


def test_psnr_is_the_textbook_s():
    black = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    assert psnr(black, black + 16)[0] == pytest.approx(24.0485, abs=1e-3)  # 20 log10(255 / 16)


def test_negative_prompts_may_be_encoded_otherwise():
    class Zeros(Lengths):
        def encode_negative(self, prompts):
            return {name: 0 * value for name, value in self.encode(prompts).items()}

    [part], _ = call(encode_with(Lossless(), Zeros()), batch(["aa", "b"]))
    assert tensors.from_arrow(part, "prompt:length").flatten().tolist() == [2, 1]
    assert tensors.from_arrow(part, "negative:length").flatten().tolist() == [0, 0]


def test_the_posterior_s_standard_deviation_beside_the_latents():
    class Wide(Lossless):
        def posterior(self, images):
            return self.encode(images), self.encode(images) * 0 + images[:, :1, :1, :1].abs()

    images = torch.stack([torch.zeros(4, 6, 3), torch.full((4, 6, 3), 255.0)]).to(torch.uint8)
    [part], _ = call(encode_with(Wide(), None, latents_std=True), batch(["", ""], images=images))
    assert torch.equal(tensors.from_arrow(part, "latents_std"), torch.ones(2, 12, 2, 3))
    [part], _ = call(encode_with(Lossless(), None, latents_std=True), batch(["", ""], images=images))
    assert not tensors.from_arrow(part, "latents_std").any() and tensors.from_arrow(part, "latents")[1].eq(1).all()
    [part], _ = call(encode_with(Wide(), None), batch(["", ""], images=images))
    assert "latents_std" not in part.column_names


def test_a_mask_comes_to_the_size_of_the_latents():
    mask = torch.zeros(2, 4, 6, dtype=torch.uint8)
    mask[0, :2, 2:4], mask[1] = 1, 1
    table = tensors.with_tensor(batch(["", ""], images=torch.zeros(2, 4, 6, 3, dtype=torch.uint8)), "mask", mask)
    [part], _ = call(encode_with(Lossless(), None), table)
    assert tensors.from_arrow(part, "mask").tolist() == [[[[0, 1, 0], [0, 0, 0]]], [[[1, 1, 1], [1, 1, 1]]]]


@pytest.mark.parametrize("fixed", [None, FixedShape(batch_size=4, rows_per_shard=4)])
def test_the_masked_picture_is_gray_where_it_is_to_be_painted(fixed):
    images = torch.randint(0, 256, (3, 4, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(3, 4, 6, dtype=torch.uint8)
    mask[0, 1:3, 3], mask[2] = 1, 1  # finer than the latents are
    table = tensors.with_tensor(batch(["", "", ""], images=images), "mask", mask)
    [part], _ = call(encode_with(Lossless(), None, fixed), table)
    wanted = (images.permute(0, 3, 1, 2) / 127.5 - 1.0) * (1 - mask[:, None])
    assert torch.equal(tensors.from_arrow(part, "masked"), Lossless().encode(wanted))
