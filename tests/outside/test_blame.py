"""Plugins that break their contract, can't be loaded, or fail for every row: the job ends with their name, and no row is blamed."""

import json
from pathlib import Path

import pytest

KINDS = "vae=Fine text_encoder=Words denoiser=Network scheduler=Solver stage=Between sink=Packs source=Rows"


@pytest.fixture
def parts(install):
    """A distribution, wrong-parts 1.0, with a plugin ``strange`` of each kind."""
    points = [pair.split("=") for pair in KINDS.split()]
    lines = "".join(f"[latentmill.{kind}s]\nstrange = wrong_parts:{cls}\n" for kind, cls in points)
    install("wrong-parts", lines, wrong_parts=Path(__file__).with_name("wrong_parts.py").read_text())


FLOWS = {
    "prompts": ["read", "encode", "denoise", "decode", "write"],
    "encode": ["read", "encode", "write"],
    "reconstruct": ["read", "encode", "decode", "write"],
    "filter": ["read", "strange", "encode", "write"],
}


@pytest.fixture
def job(parts, tmp_path, pictures):
    """``job(FLOW, wrong={kind: what})``: a job of our parts, of which some are wrong, from pictures or from prompts."""

    def write(flow, wrong=(), **more):
        wrong = dict(wrong)
        kinds = ["vae", *(["text_encoder", "denoiser", "scheduler", "source"] if flow == "prompts" else []), *wrong]
        chosen = {kind: {"name": "strange", **({"wrong": wrong[kind]} if kind in wrong else {})} for kind in kinds}
        content = {
            "output": str(tmp_path / "out"),
            "rows_per_shard": 5,
            "flow": FLOWS[flow],
            "source": {"name": "images", "path": str(pictures)},
            "sink": {"name": "parquet"},
            "cluster": {"kind": "inline"},
            **chosen,
            "stages": {"read": {"batch_size": 4}, "encode": {"batch_size": 2}},
        }
        if "stage" in wrong:
            del content["stage"]
            content["stages"]["strange"] = {"settings": {"wrong": wrong["stage"]}}
        if flow == "prompts":
            content["sampling"] = {"steps": 2, "width": 4, "height": 4}
        for kind, value in more.items():
            content[kind] = {**content.get(kind, {}), **value} if isinstance(value, dict) else value
        path = tmp_path / "mine.yaml"
        path.write_text(json.dumps({"defaults": ["job", "_self_"], **content}))
        return path

    return write


def stopped(latentmill, out, code=1):
    """The one line with which the command ended, nothing being marked complete and no row being blamed."""
    assert latentmill.code == code, latentmill.said
    assert "Traceback" not in latentmill.said
    said = [line for line in latentmill.err.splitlines() if line.startswith("latentmill: ")]
    assert len(said) == 1 and latentmill.err.rstrip().endswith(said[0]), latentmill.err
    assert not (out / "_SUCCESS").exists() and not list(out.glob("errors/*"))
    return said[0].removeprefix("latentmill: ")


def test_the_parts_are_right_where_nothing_is_wrong_with_them(latentmill, job, tmp_path, rows):
    """Else what follows would show nothing."""
    for name in FLOWS:
        assert (
            latentmill("run", job(name, {"stage": ""} if name == "filter" else (), output=str(tmp_path / name))) == 0
        ), latentmill.said
        assert [row["row_id"] for row in rows(tmp_path / name)] == [
            f"{n:09d}-000" for n in range(9 if name == "prompts" else 4)
        ]


OF = "strange of wrong-parts 1.0"
CONTRACT = [
    ("encode", "vae", "one", "encode", f"vae {OF}: encode returned a tensor [1, 12, 2, 2], and [2, 12, 2, 2] was expected, the latents of 2 "
     "pictures of 4x4 pixels (channels 12, downscale 2)"),
    ("encode", "vae", "tuple", "encode", f"vae {OF}: encode returned a tuple, not a tensor [2, 12, 2, 2]"),
    ("encode", "vae", "downscale", "encode", f"vae {OF}: encode returned a tensor [2, 12, 2, 2], and [2, 12, 1, 1] was expected, the latents "
     "of 2 pictures of 4x4 pixels (channels 12, downscale 4)"),
    ("reconstruct", "vae", "decode", "decode", f"vae {OF}: decode returned a tensor [4, 3, 8, 8], and [4, 3, 4, 4] was expected, 4 pictures of "
     "4x4 pixels (downscale 2)"),
    ("prompts", "vae", "decode", "decode", f"vae {OF}: decode returned a tensor [9, 3, 8, 8], and [9, 3, 4, 4] was expected, 9 pictures of 4x4 "
     "pixels (downscale 2)"),
    ("prompts", "vae", "downscale", "decode", f"vae {OF}: decode returned a tensor [9, 3, 2, 2], and [9, 3, 4, 4] was expected, 9 pictures of "
     "4x4 pixels (downscale 4)"),
    ("prompts", "text_encoder", "batch", "encode", f"text_encoder {OF}: encode returned embeds of shape [1, 3] for 2 prompts: the batch axis "
     "comes first"),
    ("prompts", "text_encoder", "list", "encode", f"text_encoder {OF}: encode returned a list, not a dict of tensors"),
    ("prompts", "text_encoder", "shapes", "encode", f"text_encoder {OF}: encode returned embeds of shape [0] behind the batch axis, and "
     "of [2] for prompts before: shapes must be the same for all prompts (pad to one length)"),
    ("prompts", "denoiser", "shape", "denoise", f"denoiser {OF}: predict returned a tensor [16, 6, 2, 2], and [16, 12, 2, 2] was expected, the "
     "shape of x"),
    ("prompts", "denoiser", "guide", "denoise", f"denoiser {OF}: guide returned a tensor [1, 12, 2, 2], and [8, 12, 2, 2] was expected, the "
     "shape of both predictions"),
    ("prompts", "scheduler", "shape", "denoise", f"scheduler {OF}: step returned a tensor [12, 2, 2], and [8, 12, 2, 2] was expected, the shape "
     "of x"),
    ("prompts", "scheduler", "state", "denoise", f"scheduler {OF}: step returned None as state, not a dict of tensors"),
    ("prompts", "scheduler", "init", "denoise", f"scheduler {OF}: init returned state 'n' of shape [9] for 8 rows: the batch axis comes first"),
    ("filter", "stage", "loses", "strange", f"stage {OF} was given 4 rows, returned 3 and rejected 0: each row must come back once or be rejected"),
    ("filter", "stage", "twice", "strange", f"stage {OF} was given 4 rows, returned 8 and rejected 0: each row must come back once or be rejected"),
    ("filter", "stage", "dict", "strange", f"stage {OF} returned a dict, not a table"),
    ("filter", "stage", "row", "strange", f"stage {OF} returned rows without the column row"),
    ("filter", "stage", "row_id", "strange", f"stage {OF} returned row 000000000-000 with the row_id '000000003-000': keep it as it is"),
    ("filter", "stage", "column", "strange", f"stage {OF} returned rows without the column seed"),
    ("filter", "stage", "type", "strange", f"stage {OF} returned width as int64, and int32 was expected"),
    ("filter", "stage", "unsized", "strange", f"stage {OF} returned pictures of 8x8 pixels for a row of 4x4: width and height must be changed "
     "along with it"),
    ("encode", "sink", "loses", "write", f"sink {OF} was given 4 rows, returned 3 and rejected 0: each row must come back once or be rejected"),
    ("encode", "sink", "row_id", "write", f"sink {OF} returned rows without the column row_id"),
    ("prompts", "source", "few", "read", f"source {OF}: read was asked for rows 0 to 3 of all, 4 of them, and gave 3"),
    ("prompts", "source", "many", "read", f"source {OF}: read was asked for rows 0 to 3 of all, 4 of them, and gave more than that"),
    ("prompts", "source", "none", "read", f"source {OF}: read gave a NoneType for row 0 of all, not a dict or a RowError"),
    *(("prompts", "source", wrong, "read", f"source {OF}: read gave another row 3 of all when asked for rows 0 to 3 than for rows 3 to 3 (from 0 "
       "on): it must follow start and stop, and always give the same") for wrong in ("ignores start", "ignores start alone", "changes")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("flow", "kind", "wrong", "stage", "said"), CONTRACT, ids=[f"{c[1]} {c[2]} in {c[0]}" for c in CONTRACT]
)
def test_a_plugin_that_breaks_its_contract_ends_the_job_with_its_name(
    flow, kind, wrong, stage, said, latentmill, job, tmp_path
):
    latentmill("run", job(flow, {kind: wrong}, sampling={"guidance_scale": 2.0, "steps": 2, "width": 4, "height": 4}))
    assert stopped(latentmill, tmp_path / "out") == f"stage {stage}: {said}"
    assert not list((tmp_path / "out").glob("data/*"))


def test_a_standard_deviation_of_another_shape(latentmill, job, tmp_path):
    latentmill("run", job("encode", {"vae": "std"}, latents_std=True))
    assert f"vae {OF}: posterior returned a tensor [2], and [2, 12, 2, 2] was expected" in stopped(
        latentmill, tmp_path / "out"
    )


def test_a_source_that_passes_over_start_is_found_row_by_row_too(latentmill, job, tmp_path):
    latentmill("run", job("prompts", {"source": "ignores start"}, stages={"read": {"batch_size": 1}}))
    assert "read gave another row 1 of all when asked for rows 1 to 1 than for rows 0 to 1" in stopped(
        latentmill, tmp_path / "out"
    )


def test_a_part_whose_weights_are_first_wanted_in_the_middle_and_are_not_there(latentmill, job, tmp_path, rows):
    weights = tmp_path / "weights"
    mine = job("encode", vae={"weights": str(weights)})
    latentmill("run", mine)
    assert (
        stopped(latentmill, tmp_path / "out") == f"stage encode can't start: vae {OF}: OSError: no weights at {weights}"
    )
    weights.touch()
    assert latentmill("run", mine) == 0 and len(rows(tmp_path / "out")) == 4


ALL = [
    ("encode", "vae", "raises", "encode", f"RuntimeError: shapes of kernel and input differ (vae {OF})"),
    ("encode", "vae", "nan", "encode", "the VAE's latents of this picture are not finite"),
    ("reconstruct", "vae", "decode raises", "decode", f"RuntimeError: no kernel image (vae {OF})"),
    ("reconstruct", "vae", "black", "decode", "the VAE's picture of these latents is not finite"),
    ("prompts", "text_encoder", "raises", "encode", f"RuntimeError: expected scalar type Half (text_encoder {OF})"),
    ("prompts", "text_encoder", "check", "encode", f"' (text_encoder {OF})"),
    ("prompts", "denoiser", "raises", "denoise", f"RuntimeError: mat1 and mat2 shapes cannot be multiplied (denoiser {OF})"),
    ("prompts", "denoiser", "nan", "denoise", f"the denoised latents are not finite (nor was a prediction of denoiser {OF})"),
    ("prompts", "scheduler", "nan", "denoise", "the denoised latents are not finite (scheduler strange)"),
    ("prompts", "source", "raises", "read", f"TypeError: 'NoneType' object is not subscriptable (source {OF})"),
    ("filter", "stage", "raises", "strange", "RuntimeError: no scorer"),
]  # fmt: skip


@pytest.mark.parametrize(("flow", "kind", "wrong", "stage", "said"), ALL, ids=[f"{c[1]} {c[2]}" for c in ALL])
def test_a_stage_that_fails_for_every_row_of_a_small_job_ends_it_with_its_name(
    flow, kind, wrong, stage, said, latentmill, job, tmp_path
):
    mine = job(
        flow, {kind: wrong}, rows_per_shard=1 if kind in ("denoiser", "vae") else 100
    )  # one must not be done before the next
    latentmill("run", mine)
    line = stopped(latentmill, tmp_path / "out")
    assert line.startswith(f"stage {stage}") and said in line, line
    assert not list(tmp_path.glob("out/data/*"))


def test_one_row_alone_at_which_its_stage_fails(latentmill, job, tmp_path):
    latentmill("run", job("prompts", {"denoiser": "raises"}, source={"rows": 1}))
    said = "stage denoise failed for the only row that it was given: RuntimeError: mat1 and mat2 shapes"
    assert stopped(latentmill, tmp_path / "out").startswith(said)


def test_a_row_at_which_a_stage_fails_that_does_others_is_a_failed_row(latentmill, job, tmp_path, rows, failed):
    assert latentmill("run", job("encode", {"vae": "raises for blue"})) == 0
    assert [row["row_id"][:9] for row in rows(tmp_path / "out")] == ["000000001", "000000002", "000000003"]
    assert [(e["stage"], e["reason"]) for e in failed(tmp_path / "out")] == [
        ("encode", f"AssertionError: blue (vae {OF})")
    ]


def test_a_bad_row_that_is_left_alone_for_another_run_is_a_failed_row(latentmill, job, tmp_path, rows, failed):
    """In this run nothing shows that the stage works; the dataset does."""
    mine = job("encode", {"vae": "raises for blue"}, rows_per_shard=1)
    latentmill("run", mine)
    (tmp_path / "out" / "data" / "00000.parquet").unlink()
    (tmp_path / "out" / "errors" / "00000.jsonl").unlink()
    (tmp_path / "out" / "_SUCCESS").unlink()
    assert latentmill("run", mine) == 0
    assert len(rows(tmp_path / "out")) == 3 and [e["row_id"][:9] for e in failed(tmp_path / "out")] == ["000000000"]


def test_predictions_of_some_rows_that_are_not_finite_are_the_denoiser_s(latentmill, job, tmp_path, rows, failed):
    assert latentmill("run", job("prompts", {"denoiser": "nan for some"})) == 0
    reasons = {error["reason"] for error in failed(tmp_path / "out")}
    assert reasons == {f"the denoised latents are not finite (nor was a prediction of denoiser {OF})"} and rows(
        tmp_path / "out"
    )


def test_rows_that_are_rejected_with_a_reason_are_failed_rows_and_be_it_all(latentmill, job, tmp_path, failed):
    assert latentmill("run", job("prompts", {"source": "bad rows"})) == 5
    assert [error["reason"] for error in failed(tmp_path / "out")] == ["no picture"] * 9 and (
        tmp_path / "out" / "_SUCCESS"
    ).exists()


PLANNING = [
    ("vae", "init", "KeyError: 'no such setting' (--debug shows where)"),
    ("vae", "spec", "AttributeError: no config yet (--debug shows where)"),
    ("vae", "no spec", "its spec must be a LatentSpec with channels and downscale from 1 on, not None"),
    ("vae", "dtype", "its spec's dtype must be float32 or float16 or bfloat16, not 'float99'"),
    ("vae", "fingerprint", "two weights: which?"),
    ("vae", "number", "its fingerprint must be text, not 7"),
    ("vae", "notices", "ZeroDivisionError: nothing to say (--debug shows where)"),
    ("denoiser", "noise_schedule", "trained_betas are not understood"),
    ("denoiser", "check", "TypeError: no config (--debug shows where)"),
    ("denoiser", "times", "IndexError: list index out of range (--debug shows where)"),
    ("source", "latent_spec", "RuntimeError: not a file of ours (--debug shows where)"),
    ("source", "fragments", "KeyError: 'rows' (--debug shows where)"),
    ("source", "texts", "UnboundLocalError: texts of no file (--debug shows where)"),
    ("source", "fragment twice", "fragment 'all' is there twice, and its rows would be"),
    ("source", "negative", "fragments must be a list of Fragment, with rows from 0 on, and there is Fragment(name='all', rows=-1, fingerprint='')"),
    ("source", "ids", "KeyError: 'id' (--debug shows where)"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "wrong", "said"), PLANNING, ids=[f"{c[0]} {c[1]}" for c in PLANNING])
def test_what_a_plugin_raises_at_planning_is_one_line(kind, wrong, said, latentmill, job, tmp_path):
    more = {"scheduler": {"grid": "model"}} if wrong == "times" else {}
    latentmill("plan" if kind == "source" else "run", job("prompts", {kind: wrong}, **more))
    assert stopped(latentmill, tmp_path / "out", code=2) == f"{kind} {OF}: {said}"
