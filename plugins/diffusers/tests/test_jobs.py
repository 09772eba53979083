"""The shipped jobs of diffusers' models, on tiny ones of their kind."""

import pyarrow.parquet as pq
import pytest

import latentmill
from latentmill.config import load_job
from latentmill.errors import JobError

JOBS = {
    "sd15_txt2img": "StableDiffusionPipeline",
    "sd15_img2img": "StableDiffusionPipeline",
    "sdxl_txt2img": "StableDiffusionXLPipeline",
    "flux_txt2img": "FluxPipeline",
    "cache_latents_sdxl": "StableDiffusionXLPipeline",
}
SMALL = [
    "cluster=inline",
    "stages=cpu",
    "samples_per_row=1",
    "sampling.width=32",
    "sampling.height=32",
    "model.dtype=float32",
]


@pytest.mark.parametrize("name", JOBS)
def test_a_job_needs_nothing_but_the_model_s_folder(name, model, tmp_path):
    output = tmp_path / name
    more = [] if name == "cache_latents_sdxl" else ["sampling.steps=2"]
    result = latentmill.run(name, [f"model.path={model(JOBS[name])}", f"output={output}", *SMALL, *more])
    assert result.failed == 0 and result.ok == result.planned > 0
    found = pq.read_table(output / "data")
    assert ("image" in found.column_names) == (name != "cache_latents_sdxl")
    if name == "cache_latents_sdxl":
        assert found.column("shape").to_pylist()[0] == [4, 16, 16]
        assert all(value > 0 for value in found.column("latents_std").to_pylist()[0])


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_for_one_gpu_and_asks_for_the_model(name, model):
    job = load_job(name, [f"model.path={model(JOBS[name])}"])
    assert job.stages["encode"].num_gpus > 0 and job.model["dtype"] in ("float16", "bfloat16")
    assert job.vae == {
        "name": "diffusers",
        "path": str(model(JOBS[name])),
        "revision": None,
        "config": None,
        "dtype": job.model["dtype"],
    }
    with pytest.raises(JobError, match=rf"^{name}: model\.path has no value; set it in the job, or as model\.path="):
        load_job(name)
