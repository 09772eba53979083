"""Whose latents an export takes: of VAEs that are alike in channels, sides, scale and shift, those with the same statistics."""

import json

import pytest
from tests.outside.trainer_parts import WAN_MEAN, WAN_STD, files

from latentmill.plugin import statistics_digest

UNSAID = (
    "are of no VAE that is known here (16 channels, 1/8 of the sides, scale 1, shift 0); they don't say their statistics of each "
    "channel: if they are wan's (Qwen-Image, and Wan 2.1 for one frame), made by an older version, encode them again, into another output"
)
OWN = "are of no VAE that is known here (16 channels, 1/8 of the sides, scale 1, shift 0, and statistics of each channel of its own)"


@pytest.mark.parametrize("format", ["musubi-qwen-image", "musubi", "automodel", "comfyui", "fastvideo"])
@pytest.mark.parametrize(
    ("statistics", "said"), [("", UNSAID), (statistics_digest(WAN_MEAN, [2 * of for of in WAN_STD]), OWN)]
)
def test_latents_like_wan_s_without_its_statistics_are_refused(trainers, format, statistics, said):
    output = trainers.encode("wan", f"vae.statistics={statistics}")
    assert trainers.refused(output, format).endswith(f"and those of {output} {said}")


def test_statistics_make_another_space_of_a_family_without(trainers):
    output = trainers.encode("sd", f"vae.statistics={statistics_digest([0.5], [2.0])}")
    assert "and statistics of each channel of its own" in trainers.refused(output, "comfyui")


def forget(output):
    """As an older version wrote the dataset: less the statistics, which its shards say, too."""
    plan = json.loads((output / "plan.json").read_text())
    del plan["latents"]["statistics"]
    (output / "plan.json").write_text(json.dumps(plan))


def test_a_dataset_without_the_statistics_goes_on_and_stays_of_its_vae_s_space(trainers, latentmill, tmp_path):
    output = trainers.own("wan")
    made = files(output)
    forget(output)
    for path in (output / "_SUCCESS", output / "data" / "00001.parquet"):
        path.unlink()
    assert trainers.refused(output, "comfyui").endswith("is not finished: 1 of its 2 shards are missing")
    trainers.own("wan")
    assert files(output)["data/00001.parquet"] == made["data/00001.parquet"]
    assert trainers.refused(output, "comfyui").endswith(UNSAID)


def test_latents_stored_without_the_statistics_are_decoded_by_their_vae(trainers, latentmill, tmp_path):
    output, known = trainers.encode("wan", "vae.statistics="), trainers.encode("wan")
    vae = ["vae.name=known", "vae.channels=16", "vae.scale=1.0"]
    digest = statistics_digest(WAN_MEAN, WAN_STD)
    for number, (source, statistics) in enumerate([(output, digest), (known, ""), (known, digest)]):
        job = [f"source.path={source}", f"vae.statistics={statistics}", f"output={tmp_path / str(number)}"]
        assert latentmill("run", "decode", "cluster=inline", *vae, *job) == 0, latentmill.said
    # Of another space it is said in what they differ, and the statistics are no part of that.
    other = [
        "vae.name=known",
        "vae.channels=16",
        "vae.scale=0.5",
        f"source.path={output}",
        f"output={tmp_path / 'other'}",
    ]
    assert latentmill("run", "decode", "cluster=inline", *other, f"vae.statistics={statistics_digest([1], [1])}") == 2
    assert latentmill.err.strip().endswith("'s: scale 1.0 and not 0.5")
