"""Samples of a row that are pictures of one batch, as ComfyUI draws them: one seed, and places in one draw."""

import pytest
import torch


def job(tmp_path, path, *more):
    (tmp_path / "job.yaml").write_text(
        "defaults: [job, model: shapes, scheduler: euler, source: prompts, sink: parquet, cluster: inline, _self_]\n"
        "flow: [read, encode, denoise, write]\nsampling: {steps: 2, width: 32, height: 32, first_noise: comfy}\n"
        f"scheduler: {{grid: {{name: comfy, scheduler: karras}}}}\nsource: {{path: {path}}}\n"
    )
    return (tmp_path / "job.yaml", *more)


def test_samples_are_pictures_of_one_batch(tmp_path, latentmill, rows):
    (tmp_path / "p.csv").write_text("prompt,seed,noise_index\na red circle,7,\na blue ring,7,2\n")
    (tmp_path / "each.csv").write_text("prompt,seed,noise_index\n" + "".join(f"a red circle,7,{k}\n" for k in range(3)))
    assert latentmill("run", *job(tmp_path, tmp_path / "p.csv", "samples_per_row=3", f"output={tmp_path / 'out'}")) == 0
    made = rows(tmp_path / "out")
    assert [(row["seed"], row["noise_index"]) for row in made] == [(7, k) for k in (0, 1, 2, 2, 3, 4)]
    assert latentmill("run", *job(tmp_path, tmp_path / "each.csv", f"output={tmp_path / 'each'}")) == 0
    # The k-th sample is the picture of the row that says k.
    each, samples = (torch.tensor([row["latents"] for row in some]) for some in (rows(tmp_path / "each"), made[:3]))
    torch.testing.assert_close(each, samples, rtol=1e-4, atol=1e-4)  # another call of the network
    assert len({str(row["latents"]) for row in made}) == 6


def test_without_a_seed_each_sample_has_its_own(tmp_path, latentmill, rows):
    (tmp_path / "p.csv").write_text("prompt\na red circle\n")
    assert latentmill("run", *job(tmp_path, tmp_path / "p.csv", "samples_per_row=2", f"output={tmp_path / 'out'}")) == 0
    made = rows(tmp_path / "out")
    assert len({row["seed"] for row in made}) == 2 and {row["noise_index"] for row in made} == {0}


def test_a_column_that_is_kept_is_no_place_in_a_batch(tmp_path, latentmill, rows):
    """Where the first noise is not ComfyUI's, ``noise_index`` is any name."""
    (tmp_path / "p.csv").write_text("prompt,seed,noise_index\na red circle,7,3\n")
    own = ("scheduler=euler_ancestral", "scheduler.grid=trailing", "sampling.first_noise=latentmill")
    made = []
    for out, keep in (("plain", "[]"), ("kept", "[noise_index]")):
        more = (*own, f"source.keep={keep}", f"output={tmp_path / out}")
        assert latentmill("run", *job(tmp_path, tmp_path / "p.csv", *more)) == 0, latentmill.said
        made += rows(tmp_path / out)
    assert made[0]["latents"] == made[1]["latents"]


def test_a_sample_beyond_the_largest_batch_is_an_error_row(tmp_path, latentmill, rows):
    (tmp_path / "p.csv").write_text("prompt,seed,noise_index\na red circle,7,4095\n")
    assert latentmill("run", *job(tmp_path, tmp_path / "p.csv", "samples_per_row=2", f"output={tmp_path / 'out'}")) == 0
    assert [row["noise_index"] for row in rows(tmp_path / "out")] == [4095]
    [error] = (tmp_path / "out" / "errors").rglob("*.jsonl")
    assert "noise_index must be" in error.read_text()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("scheduler.grid={name: comfy, end: sigma_min}", "end and shift are not for it"),
        ("scheduler.grid={name: comfy, scheduler: vp}", "sigma 152.167 is above"),
        ("scheduler.grid={name: comfy, scheduler: karas}", "there is no scheduler 'karas' (did you mean 'karras'?)"),
        ("sampling.first_noise=diffusers sampling.noise_index=2", "noise_index"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, latentmill, more, says):
    (tmp_path / "p.csv").write_text("prompt\na red circle\n")
    out = f"output={tmp_path / 'out'}"
    more = [more] if more.startswith("scheduler") else more.split()
    assert latentmill("run", *job(tmp_path, tmp_path / "p.csv", *more, out)) == 2
    assert says in latentmill.said


def test_a_sampler_by_its_name(tmp_path, latentmill, rows):
    """Each in a job: pictures of one kind, whatever the solver, and rows of several numbers of steps."""
    (tmp_path / "p.csv").write_text("prompt,seed,steps\na red circle,7,6\na red circle,7,9\n")
    made = {}
    for name, more in (("dpmpp_2m", ""), ("uni_pc", ", last_sigma: 0.001, drop_penultimate: true")):
        chosen = (f"scheduler.name=comfy +scheduler.sampler={name}", f"scheduler.grid={{name: comfy{more}}}")
        chosen = (*chosen[0].split(), chosen[1])
        out = tmp_path / name
        assert latentmill("run", *job(tmp_path, tmp_path / "p.csv", *chosen, f"output={out}")) == 0, latentmill.said
        made[name] = torch.tensor([row["latents"] for row in rows(out)])
    apart = (made["dpmpp_2m"] - made["uni_pc"]).abs().mean() / made["uni_pc"].abs().mean()
    assert 0 < float(apart) < 0.2
