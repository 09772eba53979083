"""Several denoise stages in one job, each with sampling and parts of its own."""

import json
import signal
from shutil import rmtree

import pytest
from tests.outside.drain_parts import CODE, POINTS, Counted

FLOW = "flow=[read,encode,denoise,{name: denoise, as: refine},decode,write]"
BASE_AND_REFINER = (
    FLOW,
    "stages.denoise.sampling={until: 0.5}",
    "stages.refine.batch_size=4",
    "stages.refine.scheduler={name: euler_ancestral}",
    "rows_per_shard=4",
)
"""The first stops half-way, and another solver goes on."""


@pytest.fixture
def counted(latentmill, install, tmp_path):
    install("acme", POINTS, acme_counts=CODE)
    return Counted(latentmill, tmp_path, rows=12)


@pytest.fixture(scope="module")
def made():
    """Rows of jobs that were run, by what was said of them."""
    return {}


@pytest.fixture
def twice(latentmill, rows, tmp_path, made):
    """``twice(*SETTINGS)``: rows of a job that denoises twice; the second begins anew. Run once, unless ``out`` asks for it."""
    (tmp_path / "prompts.csv").write_text("prompt\na red ring on a blue background\na blue star on a red background\n")

    def run(*settings, source="prompts.csv", out="out", code=0):
        if (found := made.get((settings, source, out))) is not None:
            return found
        rmtree(tmp_path / out, ignore_errors=True)
        arguments = [
            "run", "txt2img", "cluster=inline", f"source.path={tmp_path / source}",
            FLOW, "samples_per_row=1", "rows_per_shard=4",
            "sampling={steps: 2, width: 16, height: 16}", f"output={tmp_path / out}",
        ]  # fmt: skip
        assert latentmill(*arguments, *settings) == code, latentmill.said
        if code == 0 and source == "prompts.csv":
            made[settings, source, out] = rows(tmp_path / out)
        return None if code else rows(tmp_path / out)

    return run


def go_on(counted, *more, code=0):
    """A second job, over the latents in ``base``, into ``two``."""
    arguments = [
        "run", "txt2img", *(s for s in counted.settings if not s.startswith("source.")), "flow=[read,encode,denoise,decode,write]",
        "source=latents", f"source.path={counted.place('base')}", f"output={counted.place('two')}",
    ]  # fmt: skip
    assert counted.latentmill(*arguments, *more) == code, counted.latentmill.said


def test_base_and_refiner_in_one_job_are_two_jobs_in_a_row_and_a_stop_throws_nothing_away(counted, rows):
    whole = counted.run("one", *BASE_AND_REFINER)
    assert (counted.notes / "loaded").stat().st_size == 1, "two stages of one worker share the network"
    counted.run("base", "flow=[read,encode,denoise,write]", "sampling.until=0.5")
    go_on(counted, "source.keep_sampling=false", "scheduler=euler_ancestral")
    one, two = rows(counted.place("one")), rows(counted.place("two"))
    assert len(one) == len(two) == 12 and [row["image"] for row in one] == [row["image"] for row in two]
    assert len({row["image"]["bytes"] for row in one}) == 12
    assert {(row["refine.seed"] == row["seed"], row["scheduler"], row["refine.scheduler"]) for row in one} == {
        (True, "dpmpp_2m", "euler_ancestral")
    }

    made, stages = [], set()
    for when in (10, 34, 110):  # of the 120 evaluations: in the first stage and in the second
        counted.stop(signal.SIGTERM, when - sum(made))
        made.append(counted.run("out", *BASE_AND_REFINER, "grace=0s", code=130)[1])
        stages |= {stage for name in counted.kept("out") for stage in half_done_stages(counted, name)}
    made.append(counted.run("out", *BASE_AND_REFINER)[1])
    assert stages >= {2, 3}, "rows waited in both"
    assert sum(made) == whole[1]
    assert counted.files("out") == counted.files("one") and not counted.kept("out")


def test_a_second_job_over_clean_latents_is_a_stage_called_again_in_one_job(counted, rows):
    """Its noise is not that of the first job again, which would come out as what it was made from."""
    flow = "flow=[read,encode,denoise,{name: denoise, as: again},decode,write]"
    counted.run("one", flow, "stages.again.sampling={strength: 0.5}")
    counted.run("base", "flow=[read,encode,denoise,write]")
    go_on(counted, "source.keep_sampling=false", "sampling.strength=0.5")
    one, two = rows(counted.place("one")), rows(counted.place("two"))
    assert [row["image"] for row in one] == [row["image"] for row in two] and len(one) == 12
    assert [row["again.seed"] for row in one] == [row["seed"] for row in two]
    assert not {row["seed"] for row in one} & {row["seed"] for row in two}


def test_sampling_of_a_stage_s_own_goes_on_in_a_second_job_or_that_is_refused(counted, rows):
    own = "stages.denoise.sampling={steps: 8, until: 0.5}"
    counted.run("one", "stages.denoise.sampling={steps: 8}", "deterministic=true")
    counted.run("base", "flow=[read,encode,denoise,write]", own, "deterministic=true")
    go_on(counted, "deterministic=true", code=2)
    assert "half-way through stage denoise, with steps of its own (denoise.steps)" in counted.latentmill.err
    assert not counted.place("two").exists()
    go_on(counted, "deterministic=true", "stages.denoise.sampling={steps: 8}")
    one, two = rows(counted.place("one")), rows(counted.place("two"))
    assert [row["image"] for row in one] == [row["image"] for row in two]


def half_done_stages(counted, name):
    text = (counted.place("out") / "half_done" / name).read_bytes()
    about, _ = json.JSONDecoder().raw_decode(text[text.index(b'{"plan"') :].decode("latin-1"))
    return about["stages"]


def test_a_stage_s_fields_are_the_row_s_unless_its_column_or_the_job_says_otherwise(twice, tmp_path):
    (tmp_path / "said.csv").write_text(
        "prompt,seed,guidance_scale,refine.steps,refine.seed,refine.strength\n"
        "a red ring on a blue background,5,3,,,\na red ring on a blue background,5,3,7,9,1\n"
    )
    own = "stages.refine.sampling={steps: 6, strength: 0.5, guidance_rescale: 0.1}"
    first, second = twice(own, source="said.csv")
    assert (first["refine.steps"], first["refine.strength"], second["refine.steps"], second["refine.strength"]) == (
        6,
        0.5,
        7,
        1.0,
    )
    for row in (first, second):
        assert (row["steps"], row["strength"], row["guidance_scale"], row["refine.guidance_scale"]) == (2, 1.0, 3, 3)
        assert (row["guidance_rescale"], row["refine.guidance_rescale"], row["refine.scheduler"]) == (
            0.0,
            0.1,
            "dpmpp_2m",
        )
    assert second["refine.seed"] == 9 and first["refine.seed"] not in (5, 9), "its noise is not the first's again"
    assert first["image"] != second["image"]


def test_a_first_pass_of_which_nothing_is_left_is_said(latentmill, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red ring\n")

    def plan(*settings):
        here = f"source.path={tmp_path / 'prompts.txt'}", f"output={tmp_path / 'out'}"
        assert latentmill("plan", "txt2img", *here, FLOW, *settings) == 0
        return latentmill.said

    assert "refine begins with pure noise, and nothing is left of what denoise has made" in plan()
    for told in ("stages.refine.sampling.strength=1", "sampling.strength=0.5", "stages.denoise.sampling.until=0.5"):
        assert "pure noise" not in plan(told)


HALF, SEEDED = "stages.refine.sampling={strength: 0.5}", "stages.refine.sampling={strength: 0.5, seed: 3}"


def test_a_stage_s_noise_follows_its_seed_alone(twice):
    same, again = ([row["image"] for row in twice(SEEDED, out=out)] for out in ("out", "again"))
    other = [row["image"] for row in twice("stages.refine.sampling={strength: 0.5, seed: 4}")]
    anew = twice(HALF)
    assert same == again and all(a != b for a, b in zip(same, other))
    assert len({row["refine.seed"] for row in anew}) == 2 and all(row["refine.seed"] != row["seed"] for row in anew)
    of_row = twice("stages.refine.sampling={strength: 0.5, seed: row}")
    assert len({row["seed"] for row in of_row}) == 2 and all(row["refine.seed"] == row["seed"] for row in of_row)


def test_what_a_stage_says_is_null_it_doesn_t_say(twice):
    assert twice("stages.refine.sampling={strength: 0.5, until: null, steps: null}") == twice(HALF)


def test_a_stage_with_a_part_of_its_own_is_another_dataset_and_without_it_is_the_job_s(latentmill, tmp_path):
    said = []
    for number, own in enumerate(
        ("retries=1", "scheduler={grid: karras}", "denoiser={name: shapes}", "sampling={steps: 2}")
    ):
        job = ("txt2img", FLOW, "cluster=inline", "sampling={steps: 1, width: 8, height: 8}", f"stages.refine.{own}")
        assert latentmill("plan", *job, f"output={tmp_path / str(number)}") == 0, latentmill.said
        words = [line.split() for line in latentmill.out.splitlines()]
        said.append({first: rest for first, *rest in words})
    assert len({plan["hash"][0] for plan in said}) == len(said)
    assert said[1].keys() - said[0].keys() == {"refine.scheduler", "columns"}
    assert said[2]["refine.denoiser"] == said[0]["denoiser"] and said[1]["refine.scheduler"] == said[0]["scheduler"]


def test_a_part_that_changes_the_job_s_is_whole_in_the_plan(twice, tmp_path):
    twice("stages.refine.scheduler={grid: karras}", "sampling.steps=1")
    config = json.loads((tmp_path / "out" / "plan.json").read_text())["config"]
    assert config["stages"]["refine"]["scheduler"] == {**config["scheduler"], "grid": "karras"}


def test_text_of_the_second_pass_s_own(twice):
    """The second denoise takes the conditioning of the first, unless a text stage stands between them."""
    between = "flow=[read,encode,denoise,{name: encode_text, as: refine_text},{name: denoise, as: refine},decode,write]"
    plain = [row["image"] for row in twice(SEEDED)]
    assert [row["image"] for row in twice(SEEDED, between)] == plain
    own = twice(SEEDED, between, "stages.refine_text.sampling={prompt: a green cross on a white background}")
    assert {row["refine_text.prompt"] for row in own} == {"a green cross on a white background"}
    assert all(row["image"] != image for row, image in zip(own, plain))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("stages.refine.sampling={step: 5}", "there is no key stages.refine.sampling.step (did you mean 'steps'?)"),
        ("stages.refine.sampling={width: 32}", "there is no key stages.refine.sampling.width"),
        ("stages.refine.sampling={steps: 0}", "stages.refine.sampling.steps must be from 1 to"),
        ("stages.refine.sampling={until: 2}", "stages.refine.sampling.until must be a time from 0 to less than 1, not 2"),
        ("stages.refine.scheduler={name: dpmp_2m}", "no scheduler plugin 'dpmp_2m' is installed"),
        ("stages.refine.scheduler={grid: karas}", "stages.refine.scheduler.grid: there is no grid 'karas'"),
        ("stages.refine.denoiser={weights: x}", "denoiser shapes has no setting 'weights'"),
        ("stages.refine.sampling={until: 0.5}", "stage refine leaves latents half-way, so flow must end with denoise, write"),
        ("stages.refine.text_encoder={name: shapes}", "there is no key stages.refine.text_encoder: refine works with no text_encoder"),
        ("stages.refine.vae=patches", "keys and their values are expected"),
    ],
)  # fmt: skip
def test_what_a_stage_can_t_have_is_one_line(twice, latentmill, setting, said):
    twice(setting, code=2)
    assert said in latentmill.err and "Traceback" not in latentmill.err


def test_pictures_of_one_batch_have_noise_of_their_own_in_a_pass_that_is_not_comfyui_s(twice, tmp_path):
    (tmp_path / "one.csv").write_text("prompt,seed\na red ring on a blue background,3\n")
    found = {
        first: twice("samples_per_row=2", "sampling.first_noise=comfy", f"stages.refine.sampling={{strength: 0.5, first_noise: {first}}}",
                     source="one.csv", out=first)
        for first in ("comfy", "latentmill")
    }  # fmt: skip
    for first, batch in found.items():
        assert [(row["seed"], row["noise_index"]) for row in batch] == [(3, 0), (3, 1)]
        assert len({row["refine.seed"] for row in batch}) == (1 if first == "comfy" else 2)
    assert found["comfy"][0]["refine.seed"] == found["latentmill"][0]["refine.seed"]


@pytest.mark.parametrize(
    ("settings", "workers"),
    [
        (("stages=gpu",), "encode + denoise + refine + decode,"),
        (("stages=gpu", "stages.denoise.num_gpus=1"), "encode, denoise, refine, decode,"),
        (("stages=gpu", "stages.refine.num_gpus=1"), "encode + denoise, refine, decode,"),
        (("stages=gpu", "stages.denoise.accelerator_type=H100"), "encode, denoise + refine, decode,"),
        (("stages.denoise.replicas=2", "stages.denoise.min_replicas=2", "stages.refine.replicas=1"), "encode, denoise, refine, decode,"),
    ],
)  # fmt: skip
def test_a_second_pass_asks_for_what_the_first_does_unless_it_says_otherwise(latentmill, tmp_path, settings, workers):
    """A part of a GPU they share: one has room for both."""
    here = f"output={tmp_path / 'out'}"  # the checkout may have an out/txt2img, by make demo
    assert latentmill("plan", "txt2img", FLOW, "cluster=local", here, *settings) == 0, latentmill.said
    assert f"workers  read, {workers} write (" in latentmill.out


def test_a_size_that_the_second_network_can_t_take_is_its_row_s_error(latentmill, rows, tmp_path):
    sizes = [{"prompt": "a red ring", "width": side, "height": side} for side in (16, 16, 32, 16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, sizes)))
    told = ["cluster=inline", f"source.path={tmp_path / 'rows.jsonl'}", f"output={tmp_path / 'out'}"]
    told += ["sampling.steps=1", "stages.refine.sampling.steps=1", "max_error_rate=1.0", "stages.refine.batch_size=1"]
    assert latentmill("run", "hires", *told) == 0, latentmill.said
    assert [row["width"] for row in rows(tmp_path / "out")] == [48]
    errors = [json.loads(line) for line in (tmp_path / "out" / "errors" / "00000.jsonl").read_text().splitlines()]
    takes = "latents of 6x6: the network takes sides that are multiples of 4, of pictures multiples of 16"
    assert [(error["row"], error["stage"], error["reason"]) for error in errors] == [
        (row, "refine", takes) for row in (0, 1, 3)
    ]
