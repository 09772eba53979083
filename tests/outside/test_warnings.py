"""Rows that are made and of which people should know something; what libraries say in workers; prompts of other tools."""

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

CODE = """
import logging, warnings
import torch
from latentmill.plugin import Denoiser, RowError, TextEncoder
from latentmill.schedulers.noise_schedules import VariancePreserving

logger = logging.getLogger("acme.models")
logger.propagate = False

class Words(TextEncoder):
    contract = 2

    def __init__(self, weights: bool = False) -> None:
        self.reads = {"weight": None if weights else "words.weights=true reads it"}

    def load(self, device):
        logger.warning("some weights were newly initialized")
        logger.info("nothing that matters")

    def check(self, prompt):
        if prompt == "bad":
            raise RowError("a bad prompt")

    def warn(self, prompt):
        return "the prompt is longer than 40 letters; the rest is cut off" if len(prompt) > 40 else ""

    def encode(self, prompts):
        for prompt in prompts:
            logger.warning(f"a line for each prompt: {prompt}")
        warnings.warn("a dtype that was not asked for")
        return {"embeds": torch.zeros(len(prompts), 1)}

class Nothing(Denoiser):
    contract, prediction, noise_schedule = 2, "epsilon", VariancePreserving()

    def predict(self, x, t, conditioning):
        return torch.zeros_like(x)
"""
LONG = "a prompt that is so long that nobody reads its end"
CUT = "the prompt is longer than 40 letters, the rest is cut off"
WEIGHT = "the prompt holds a weight as (word:1.2), which is read as words: words.weights=true reads it"
LORA = "the prompt holds a LoRA as <lora:name:0.8>, which is read as words"


@pytest.fixture
def acme(install):
    """Overrides of a job with a text encoder and a denoiser of a distribution that is installed for a test."""
    points = (
        "[latentmill.text_encoders]\nwords = acme_models:Words\n[latentmill.denoisers]\nnothing = acme_models:Nothing\n"
    )
    install("acme", points, acme_models=CODE)
    size = ("sampling.width=4", "sampling.height=4", "sampling.steps=1")
    parts = (
        "vae.name=patches",
        "vae.side=1",
        "denoiser.name=nothing",
        "text_encoder.name=words",
        "scheduler.name=euler",
    )
    return ("cluster=inline", "samples_per_row=1", *parts, *size)


@pytest.fixture
def prompts(tmp_path):
    """A file of four rows, of which one fails."""
    given = [
        {"prompt": LONG},
        {"prompt": "a (red:1.2) fox", "negative_prompt": f"{LONG} <lora:x:1>"},
        {"prompt": "bad"},
        {"prompt": "a fox"},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, given)))
    return file


def test_a_row_s_warning_is_in_the_dataset_and_counted_wherever_it_is_told_of(
    latentmill, rows, acme, prompts, tmp_path
):
    out = tmp_path / "out"
    job = (
        "txt2img",
        *acme,
        f"source.path={prompts}",
        f"output={out}",
        "rows_per_shard=2",
        "sampling.negative_prompt=x",
    )
    assert latentmill("run", *job) == 0
    both = [WEIGHT, f"negative_prompt: {LORA}", f"negative_prompt: {CUT}"]
    assert [row["warning"] for row in rows(out)] == [CUT, "; ".join(both), ""]
    for text in (CUT, *both):
        assert f"  warning       1 row: {text}\n" in latentmill.out
    assert latentmill("status", out) == 0
    assert f"warning: 1 rows: {CUT}\n" in latentmill.out
    assert latentmill("status", out, "--json") == 0
    assert json.loads(latentmill.out)["warnings"] == {text: 1 for text in (CUT, *both)}
    for page in ("report.html", "README.md"):
        assert CUT in (out / page).read_text()
    found = [pq.read_metadata(path).metadata.get(b"latentmill.warnings") for path in sorted(out.glob("data/*"))]
    assert (json.loads(found[0]), found[1]) == ({text: 1 for text in (CUT, *both)}, None)

    assert latentmill("plan", *job[:-1], "text_encoder.weights=true") == 2  # another plan: nothing of it is in out
    assert latentmill("plan", *job, "text_encoder.weights=true", f"output={tmp_path / 'other'}") == 0
    assert [line for line in latentmill.out.splitlines() if "read as words" in line] == [
        f"notice   1 of the 4 rows: negative_prompt: {LORA}"
    ]


def test_all_shards_have_the_column_and_a_job_that_goes_on_from_stored_latents_keeps_it(
    latentmill, rows, acme, prompts, tmp_path
):
    """Also a shard of which all rows failed."""
    latents, pictures = tmp_path / "latents", tmp_path / "pictures"
    job = ("denoise", *acme, f"source.path={prompts}", "rows_per_shard=1", f"output={latents}")
    assert latentmill("run", *job) == 0
    schemas = {str(pq.read_schema(path).remove_metadata()) for path in latents.glob("data/*")}
    assert len(schemas) == 1
    assert "warning: string not null" in schemas.pop()
    told = [row["warning"] for row in rows(latents)]
    assert told[0] == CUT
    job = ("decode", "cluster=inline", "vae.name=patches", "vae.side=1", f"source.path={latents}", f"output={pictures}")
    assert latentmill("run", *job) == 0
    assert [row["warning"] for row in rows(pictures)] == told
    assert f"  warning       1 row: {CUT}\n" in latentmill.out


CLEARLY = {
    "a LoRA as <lora:name:0.8>": ["a fox <lora:snow:0.8>", "<lyco:snow:1> a fox"],
    "a weight as (word:1.2)": ["a (red:1.2) fox", "(worst quality:1.4)", "a (fox in snow:.9)", "(red, 8k:1)"],
    "a weight as (word)1.2 or (word)++": ["a (red fox)1.3 in snow", "(red fox)++", "a fox (red)--, snow"],
    "emphasis as ((word))": ["((red)) fox", "(((masterpiece)))", "[[dull]] sky", "{{red}} fox"],
    "words for some of the steps as [cat:dog:0.5]": ["a [cat:dog:0.5]", "[cat::10]", "a [cat|dog]"],
    "the keyword BREAK": ["a fox BREAK snow", "a fox, BREAK, snow"],
    "the keyword AND": ["a fox AND a dog", "a fox :1.2 AND (a dog)"],
    "a choice as {cat|dog}": ["a {cat|dog}", "{2$$cat|dog|fox}"],
    "a wildcard as __name__": ["an __animal__ in snow", "__pets/big*__"],
    "an embedding as embedding:name": ["embedding:easynegative, bad hands"],
    "a parameter as --ar 16:9 or a weight as word::2": ["a fox --ar 16:9", "a fox --v 5 --tile", "a fox::2 snow::1"],
}
PLAIN = [
    "a red fox", "a fox (red)", "a man, 50 years (old)", "[untitled]", "A CAT AND A DOG", "TAKE A BREAK", "a photo (1:1)",
    "the Taj Mahal (1632:1653)", "he said -- no", "a well--known fox", "x__y", "____", "{json}", "f(x) = 2", "f(x)2", "C++ book",
    "at 12:30", "(12:30)", "a|b", "a map (scale 1:100)", "R AND B singer", "Simon AND Garfunkel", "I <3 you", "<b>bold</b>",
    "a :: b", "std::vector", "(floor 3) 2nd", "(c) 2020", "(2020)1", "a --seed", "Genesis (1:1) [3:16]", "__init__x", "[12:30:15]",
]  # fmt: skip


@pytest.mark.parametrize("suffix", ["txt", "parquet"])
def test_plan_counts_prompts_in_another_tool_s_language_and_no_others(latentmill, acme, tmp_path, suffix):
    prompts = [prompt for some in CLEARLY.values() for prompt in some] + PLAIN
    file = tmp_path / f"prompts.{suffix}"
    if suffix == "txt":
        file.write_text("\n".join(prompts))
    else:  # nothing of the pictures is read
        pq.write_table(pa.table({"prompt": prompts, "image": [b"no picture"] * len(prompts)}), file)
    assert latentmill("plan", "txt2img", *acme, f"source.path={file}", f"output={tmp_path / 'out'}") == 0
    found = {}
    for line in latentmill.out.splitlines():
        if line.startswith("notice   ") and "read as words" in line:
            count, _, what = line.removeprefix("notice   ").partition(f" of the {len(prompts)} rows: the prompt holds ")
            found[what.partition(", which is")[0]] = int(count)
    assert found == {what: len(some) for what, some in CLEARLY.items()}


def test_plan_reads_captions_and_decodes_no_picture(latentmill, acme, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, caption in enumerate(["a fox", "a (red:1.2) fox", None]):
        (folder / f"{number}.png").write_bytes(b"no picture")
        if caption is not None:
            (folder / f"{number}.txt").write_text(caption)
    job = ("img2img", *acme, f"source.path={folder}", f"output={tmp_path / 'out'}", "source=images")
    assert latentmill("plan", *job) == 0
    notices = [line for line in latentmill.out.splitlines() if "read as words" in line]
    assert notices == [f"notice   1 of the 3 rows: {WEIGHT}"]


def test_what_libraries_say_in_workers_reaches_the_driver_s_log(latentmill, acme, tmp_path, caplog):
    """Once for a stage; of a line of code that has one for each row, the first three."""
    (tmp_path / "prompts.txt").write_text("\n".join(f"fox {number}" for number in range(8)))
    job = ("txt2img", *acme, f"source.path={tmp_path / 'prompts.txt'}", f"output={tmp_path / 'out'}")
    factory = logging.getLogRecordFactory()
    with caplog.at_level(logging.WARNING, "latentmill"):
        assert latentmill("run", *job, "stages.encode.batch_size=2") == 0
    heard = [record.getMessage() for record in caplog.records if record.name == "latentmill"]
    assert heard.count("encode: acme.models: some weights were newly initialized") == 1
    assert heard.count("encode: UserWarning: a dtype that was not asked for") == 1
    assert sum("a line for each prompt" in line for line in heard) == 3
    assert not any("nothing that matters" in line for line in heard)
    assert logging.getLogRecordFactory() is factory


def test_pictures_of_rows_with_warnings_are_pictures(latentmill, rows, acme, prompts, tmp_path):
    """A warning changes nothing of a row but its warning."""
    made = {}
    for weights in ("true", "false"):
        out = tmp_path / weights
        job = ("txt2img", *acme, f"source.path={prompts}", f"output={out}", f"text_encoder.weights={weights}")
        assert latentmill("run", *job) == 0
        made[weights] = rows(out)
        for row in made[weights]:
            Image.open(out / "contact_sheet.png").verify()
            del row["warning"]
    assert made["true"] == made["false"]
