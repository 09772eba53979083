"""Any path and any text on the command line and in a job's file, and one line for what can't be."""

import json
import random

import pytest
import yaml
from PIL import Image

STRINGS = [
    "My Pictures (1)",
    "a,b",
    "a, b, c",
    "it's",
    'say "so"',
    "'quoted'",
    '"quoted"',
    "[v2]",
    "[v2] a",
    "[a, b]",
    "[",
    "]",
    "{a}",
    "{a: 1}",
    "{a|b}",
    "{",
    "(word:1.2)",
    "a=b",
    "=",
    "a&b",
    "#1",
    "a # b",
    "~x",
    "~",
    "a|b",
    "a@b",
    "100%",
    "%A_%a",
    "$HOME",
    "$(id)",
    "`id`",
    "a;b",
    "a:b",
    "a: b",
    "- a",
    "-a",
    "*",
    "?",
    "!",
    "&a",
    "%YAML",
    " leading",
    "trailing ",
    "two  spaces",
    "tab\there",
    "two\nlines",
    "back\\slash",
    "\\",
    "\\n",
    "é",
    "e\u0301",
    "日本語",
    "🙂",
    "a\u00a0b",
    "a\u2028b",
    "2026_11_25",
    "2026-11-25",
    "4711_3",
    "1_000",
    "1.10",
    "12e3",
    "12e3456",
    "0x10",
    "0123",
    "12:30",
    "true",
    "no",
    "None",
    "null",
    "nan",
    "-1",
    "+1",
    "_target_",
    "hydra.run.dir=x",
    "<lora:name:0.8>",
    "choice(a,b)",
    "a,,b",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(latentmill, *arguments):
    """The composed job, as ``--cfg job`` prints it."""
    assert latentmill("run", *arguments, "--cfg", "job") == 0, latentmill.err
    return yaml.safe_load(latentmill.out)


def line(latentmill, *arguments):
    """The one line with which a command is refused."""
    assert latentmill(*arguments) == 2, latentmill.said
    assert latentmill.out == "" and latentmill.err.startswith("latentmill: ") and latentmill.err.count("\n") == 1
    return latentmill.err.removeprefix("latentmill: ").rstrip("\n")


@pytest.mark.parametrize("text", STRINGS, ids=ascii)
def test_any_text_is_a_path_an_output_and_a_prompt(text, here, latentmill, patches, rows):
    (here / "in" / text).mkdir(parents=True)
    Image.new("RGB", (4, 4), "red").save(here / "in" / text / "0.png")
    source, output = (f"in/{text}", text) if text != "~" else ("in/~", "./out")  # ~ alone is home
    job = ("encode", *patches, f"source.path={source}", f"output={output}", f"sampling.prompt={text}")
    assert latentmill("run", *job) == 0, latentmill.err
    assert {path.name for path in here.iterdir()} == {"in", output.removeprefix("./")}
    assert [row["prompt"] for row in rows(here / output)] == [text]
    assert (here / output / "_SUCCESS").is_file()
    assert latentmill("verify", f"./{output}") == 0, latentmill.said


def test_what_was_written_under_any_name_is_read_under_it(here, latentmill, patches, pictures, rows):
    for number, name in enumerate(["a:b", "[v2] *", "100% é (1)", "~x"]):
        latents = ("encode", *patches, f"source.path={pictures}", f"output={name}")
        assert latentmill("run", *latents) == 0, latentmill.err
        assert latentmill("run", "decode", *patches, f"source.path={name}", f"output={number}") == 0, latentmill.err
        assert len(rows(here / f"{number}")) == 4


# ------------------------------------------------------------------------------------- text, numbers, lists, dicts


def test_a_fork_has_the_name_that_it_was_given(here, latentmill, patches, pictures):
    for name in ("4711_3", "471_13", "1.10", "a ${b} (1)"):
        job = ("encode", *patches, f"source.path={pictures}", "output=out")
        assert latentmill("run", *job, "--fork", name) == 0, latentmill.err
        assert (here / name / "_SUCCESS").is_file()
    assert sorted(path.name for path in here.iterdir()) == ["1.10", "4711_3", "471_13", "a ${b} (1)", "pictures"]


JOB = "defaults: [job, model: shapes, scheduler: euler, source: prompts, sink: parquet, cluster: inline, _self_]\n"


@pytest.mark.parametrize("text", ["2026_11_25", "1_000", "1.10", "12e3456", "0x10", "0123", "12:30", "true", "no", "4"])
def test_what_reads_as_a_number_is_text_in_yaml_where_text_is_wanted(text, here, latentmill):
    (here / "source").mkdir()
    (here / "source" / "mine.yaml").write_text(f"name: prompts\npath: {text}\n")
    (here / "mine.yaml").write_text(
        f"{JOB}output: {text}\nsource: {{id_column: {text}}}\nsampling: {{prompt: {text}}}\n"
    )
    found = config(latentmill, "mine.yaml", "source=mine")
    assert found["output"] == found["sampling"]["prompt"] == text
    assert found["source"] == {"name": "prompts", "path": text, "id_column": text}
    assert (
        config(latentmill, "mine.yaml", f"source.path={text}", f"source.id_column={text}")["source"] == found["source"]
    )


def test_what_a_model_s_parts_share_is_text_if_one_of_them_wants_text(here, latentmill):
    (here / "mine.yaml").write_text(
        JOB + "output: o\nmodel: {file: 12e3456, side: 1_6}\nsource: {path: '${model.file}'}\n"
        "vae: {name: patches, side: '${model.side}'}\n"
    )
    assert config(latentmill, "mine.yaml")["model"] == {"file": "12e3456", "side": 16}
    assert config(latentmill, "mine.yaml", "model.file=471_13", "model.side=8")["model"] == {
        "file": "471_13",
        "side": 8,
    }


def test_numbers_stay_numbers_where_numbers_are_wanted(latentmill):
    given = "seed=1_000 sampling.steps=7 sampling.guidance_scale=1e1 deterministic=true stages.read.timeout=null"
    found = config(latentmill, "txt2img", *given.split(), "vae.x=7", "vae.y=1e3", "vae.z=1_000", "vae.n=Null")
    assert (found["seed"], found["sampling"]["steps"], found["sampling"]["guidance_scale"]) == (1000, 7, 10.0)
    assert found["deterministic"] is True and found["stages"]["read"]["timeout"] is None
    assert found["vae"] == {"name": "shapes", "x": 7, "y": 1000.0, "z": "1_000", "n": None}


def test_lists_and_dicts_keep_hydra_s_grammar(latentmill):
    found = config(
        latentmill,
        "txt2img",
        "stages.denoise.resources={special: 1, of a kind: 0.5}",
        "vae.list=[1, 'a b', {c: null}]",
        "vae.text='[1]'",
        "flow=[read, encode, write]",
    )
    assert found["stages"]["denoise"]["resources"] == {"special": 1.0, "of a kind": 0.5}
    assert found["vae"] == {"name": "shapes", "list": [1, "a b", {"c": None}], "text": "[1]"}
    assert found["flow"] == ["read", "encode", "write"]
    said = line(latentmill, "run", "txt2img", "vae.list=[a (1)]")
    assert said.startswith("txt2img: vae.list: '[a (1)]' can't be read as a list or dict: in [a, 'b (1)'] ")


def test_an_interpolation_is_one_as_in_yaml_and_can_be_written_as_text(
    here, latentmill, patches, pictures, monkeypatch, rows
):
    monkeypatch.setenv("WHERE", "pictures")
    job = ("encode", *patches, "source.path=${oc.env:WHERE}", "output=out", r"sampling.prompt=a \${b} ${seed}")
    assert latentmill("run", *job) == 0, latentmill.err
    assert {row["prompt"] for row in rows("out")} == {"a ${b} 0"}
    for text, said in [
        ("a ${b}", r"Interpolation key 'b' not found; \${ is ${ as it stands"),
        ("a ${b", r"${ begins what can't be read; ${oc.env:NAME} is an environment variable, "),
        ("${sampling.prompt}", "sampling.prompt: Recursive interpolation detected; "),
    ]:
        assert said in line(latentmill, "plan", "encode", f"sampling.prompt={text}")


def test_what_is_brought_in_for_a_dict_must_be_one(here, latentmill):
    for key, value in [("stages", "${seed}"), ("vae", "${seed}")]:
        (here / "mine.yaml").write_text(f"{JOB}output: o\nsource: {{path: p.txt}}\n{key}: {value}\n")
        assert "must hold keys and their values, not 0" in line(latentmill, "plan", "mine.yaml")


def test_memory_is_said_in_words(latentmill):
    for text in ("8GiB", "500MB", "8589934592", "1.5 TB"):
        assert (
            str(config(latentmill, "txt2img", f"stages.denoise.memory={text}")["stages"]["denoise"]["memory"]) == text
        )
    said = line(latentmill, "plan", "txt2img", "stages.denoise.memory=8 pounds")
    assert said == "txt2img: stages.denoise.memory must be bytes, as 8GiB, 500MB or a number, not '8 pounds'"


# ------------------------------------------------------------------------------------------------- names of configs


def test_a_plugin_chosen_by_name_brings_its_own_settings(latentmill):
    by_name, by_config = (
        config(latentmill, "txt2img", "scheduler=euler", f"scheduler{key}=euler_ancestral") for key in (".name", "")
    )
    assert by_name["scheduler"] == by_config["scheduler"] == {"name": "euler_ancestral", "grid": "trailing", "eta": 1.0}


def test_a_folder_beside_a_job_does_not_make_a_key_a_choice(here, latentmill):
    for name in ("output", "seed", "source.path"):
        (here / name).mkdir()
    (here / "mine.yaml").write_text(JOB)
    found = config(latentmill, "mine.yaml", "output=x", "seed=3", "source.path=y")
    assert (found["output"], found["seed"], found["source"]["path"]) == ("x", 3, "y")


def test_a_job_file_that_is_a_link_keeps_its_name_and_finds_what_is_beside_either(here, latentmill):
    real = here / "..data" / "1"
    (real / "scheduler").mkdir(parents=True)
    (real / "scheduler" / "soft.yaml").write_text("name: euler\neta: 0.25\n")
    (real / "contents").write_text(JOB + "output: o\nsource: {path: p.txt}\n")
    (here / "p.txt").write_text("a red circle\n")
    for name in ("job.yaml", "My job (1), é.yaml", "a@b:c.yaml"):
        (here / name).symlink_to(real / "contents")
        assert config(latentmill, name, "scheduler=soft")["scheduler"] == {"name": "euler", "eta": 0.25}
        assert latentmill("plan", name, "--json") == 0, latentmill.err
        assert json.loads(latentmill.out)["name"] == name.removesuffix(".yaml")


# ------------------------------------------------------------------------------------------------------- one line


def test_every_error_is_one_line_whatever_stands_in_it(here, latentmill):
    assert line(latentmill, "run", "txt2img", "source.path=no\nsuch\x1b").endswith(r" no such\x1b")
    assert line(latentmill, "run", "no\nsuch.yaml").startswith(r"there is no job file no\nsuch.yaml; ")
    assert line(latentmill, "status", "no\nsuch").startswith(r"no\nsuch holds no dataset of ours: ")
    for key in ("output", "sampling.prompt"):  # bytes that are no UTF-8, as Python hands them on from a shell
        said = line(latentmill, "run", "txt2img", f"{key}=caf\udce9")
        assert said == rf"txt2img: {key} must be UTF-8, not 'caf\udce9'"
    assert list(here.iterdir()) == []


BITS = [
    *"[]{}()'\"\\,:=#~|@%&*?!$ .-+_/\n\té🙂a1",
    "${",
    "}",
    "${x}",
    "${oc.env:",
    "${}",
    "\\${",
    "1_0",
    "null",
    "choice(",
    "<<",
]
KEYS = "sampling.prompt seed vae.x vae flow source.path stages.denoise.resources scheduler.grid scheduler.name output".split()
GRAMMAR = ("Lexer", "mismatched input", "no viable alternative", "token recognition", "extraneous input", "hydra.cc")


def test_nobody_sees_a_lexer_s_message(here, latentmill):
    chance = random.Random(12)
    for _ in range(40):
        given = f"{chance.choice(KEYS)}={''.join(chance.choices(BITS, k=chance.randrange(10)))}"
        if chance.random() < 0.3:
            text = given.partition("=")[2]
            (here / "mine.yaml").write_text(f"{JOB}output: o\nvae: {text}\n")
            given = "seed=1"
        assert latentmill("run", chance.choice(["txt2img", "mine.yaml"]), "--cfg", "job", given) in (0, 2), given
        if latentmill.code:
            assert latentmill.err.count("\n") == 1 and not [word for word in GRAMMAR if word in latentmill.err], given
