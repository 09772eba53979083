"""ComfyUI's workflows: what ``latentmill comfy`` says of them, and what is refused before anything starts."""

import io
import json
import tarfile

import pytest
from PIL import ExifTags, Image
from tests.outside.comfy_parts import TEXT_TO_IMAGE, node, with_changes, without, written


@pytest.fixture
def said(latentmill, tmp_path):
    """``said(WORKFLOW, *OVERRIDES)``: the exit code of ``latentmill comfy``, and what it says of each node, by id, and of all."""

    def said(workflow, *overrides):
        code = latentmill("comfy", written(tmp_path, workflow), *overrides)
        table, _, rest = latentmill.out.partition("\n\n")
        words = [line.split(maxsplit=1) for line in table.splitlines()[1:]]
        return code, dict(word for word in words if len(word) == 2), rest + latentmill.err

    return said


def refusal(latentmill, tmp_path, workflow, *overrides):
    """The line with which ``run`` refuses a workflow, and that it has made nothing."""
    overrides = ["comfy.models=models", f"output={tmp_path / 'out'}", *overrides]
    assert latentmill("run", written(tmp_path, workflow), *overrides) == 2
    assert not (tmp_path / "out").exists()
    [line] = latentmill.err.splitlines()
    return line.removeprefix(f"latentmill: {tmp_path / 'light.json'}: ")


def test_each_node_is_told_with_what_it_becomes(said):
    code, nodes, rest = said(TEXT_TO_IMAGE)
    assert code == 0
    assert [*nodes] == ["1", "2", "3", "4", "5", "6", "7"]
    assert "sd15.safetensors" in nodes["1"]
    assert nodes["2"].startswith("CLIPTextEncode") and "Positive prompt" in nodes["2"]
    assert "text is negative_prompt" in nodes["3"] and "width" not in nodes["4"]
    assert "stage denoise; dpmpp_2m, karras, 12 steps, guidance 6.5; cfg is guidance_scale" in nodes["5"]
    assert "flow: read > encode > denoise > decode > write" in rest


def test_a_class_that_is_not_supported_is_told_and_refused_by_id_class_and_title(said, latentmill, tmp_path):
    workflow = with_changes(
        TEXT_TO_IMAGE,
        _8=node("ImageSharpen", "Sharper", image=["6", 0], alpha=1.0),
        _7={"images": ["8", 0]},
        _9=node("ShowText|pysssss", text=["2", 0]),
    )
    code, nodes, rest = said(workflow)
    assert code == 2
    assert "REFUSED" in nodes["8"] and "images waits for node 8" in nodes["7"]
    assert "does not hang on it" in nodes["9"], "nothing that is saved"
    assert "REFUSED" not in "".join(told for id, told in nodes.items() if id != "8")
    assert "1 node of 8 can't become part of a job: ImageSharpen" in rest
    line = refusal(latentmill, tmp_path, workflow)
    assert line == "node 8 ImageSharpen (Sharper): nodes of this class are not supported"


def test_only_what_an_output_hangs_on_counts(said):
    loose = with_changes(
        TEXT_TO_IMAGE, _8=node("ControlNetLoader", control_net_name="x"), _9=node("Custom", of=["10", 0])
    )
    assert said(loose)[0] == 0, "even a link to nowhere, as in ComfyUI"
    preview = with_changes(TEXT_TO_IMAGE, _8=node("Custom"), _9=node("PreviewImage", images=["8", 0]))
    code, nodes, _ = said(preview)
    assert code == 0 and "it is not kept" in nodes["9"]
    assert said(preview, "comfy.output=9")[0] == 2, "unless it is asked for"
    assert said(with_changes(TEXT_TO_IMAGE, _7=node("PreviewImage", images=["6", 0])))[0] == 0, (
        "or is all that there is"
    )


@pytest.mark.parametrize(
    ("workflow", "line"),
    [
        ("[1, 2", "it is no JSON"),
        ("{}", "it is no workflow of ComfyUI"),
        (
            {"nodes": [{"id": 1}], "links": []},
            "as ComfyUI's editor saves it, without what runs: in ComfyUI, Workflow > Export (API)",
        ),
        (
            {"1": {"inputs": {}}},
            "none of it is a node of a workflow, with a class_type; in ComfyUI, Workflow > Export (API)",
        ),
        (with_changes(TEXT_TO_IMAGE, _7=None), "there is no SaveImage or PreviewImage in it"),
        (
            with_changes(TEXT_TO_IMAGE, _5={"positive": ["99", 0]}),
            "node 5 KSampler: positive is linked to node 99, which is not there",
        ),
        (with_changes(TEXT_TO_IMAGE, _1=node("LoraLoader", model=["5", 0])), "lead back to themselves: nodes 5, 1"),
        (
            with_changes(TEXT_TO_IMAGE, _6={"vae": ["1", 3]}),
            "node 6 VAEDecode: vae is linked to output 3 of node 1, which we don't have",
        ),
        (
            with_changes(TEXT_TO_IMAGE, _5={"model": ["1", 1]}),
            "node 5 KSampler: model is linked to something else than it needs",
        ),
        (without(TEXT_TO_IMAGE, "5", "model"), "node 5 KSampler: model is not linked"),
        (without(TEXT_TO_IMAGE, "5", "cfg"), "node 5 KSampler: it has no input cfg"),
        (
            with_changes(TEXT_TO_IMAGE, _5={"steps": "many"}),
            "node 5 KSampler: steps must be a whole number, not 'many'",
        ),
        (with_changes(TEXT_TO_IMAGE, _5={"eta": 0.5}), "node 5 KSampler: its input eta is not understood"),
        (
            with_changes(TEXT_TO_IMAGE, _5={"scheduler": "vp"}),
            "node 5 KSampler: scheduler 'vp' is not supported; simple, ",
        ),
        (
            with_changes(TEXT_TO_IMAGE, _1={"ckpt_name": "https://example.org/a.safetensors"}),
            "node 1 CheckpointLoaderSimple: ckpt_name is a web address: fetch the file into the folder of models",
        ),
        (
            with_changes(TEXT_TO_IMAGE, _5={"sampler_name": "slow"}),
            "node 5 KSampler: sampler_name 'slow' is not supported",
        ),
    ],
)
def test_what_is_wrong_is_one_line_that_says_where(latentmill, tmp_path, workflow, line):
    assert line in refusal(latentmill, tmp_path, workflow)


def test_where_the_models_are_must_be_said(latentmill, tmp_path):
    assert latentmill("run", written(tmp_path, TEXT_TO_IMAGE), "--cfg", "job") == 2
    assert "comfy.models=FOLDER" in latentmill.err


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("map.9.text=prompt", "there is no node 9"),
        ("map.Positive.text=prompt", "there is no node Positive (did you mean 'Positive prompt'?)"),
        ("map.2.words=prompt", "node 2 CLIPTextEncode (Positive prompt): it has no input words; it has text, clip"),
        ("map.2.clip=prompt", "clip is a link, and no column can give it"),
        (
            "map.1.ckpt_name=model",
            "ckpt_name can't come from the column model: model files are loaded once, for all rows",
        ),
        ("map.5.scheduler=grid", "scheduler can't come from the column grid"),
        ("map.7.filename_prefix=name", "filename_prefix can't come from a column"),
        ("map.2=prompt", "map.NODE.INPUT=COLUMN is expected"),
        ("comfy.model=x", "there is no key comfy.model (did you mean 'models'?)"),
        ("comfy.seed=mine", "comfy.seed must be row or workflow, not 'mine'"),
        ("comfy.output=2", "node 2 CLIPTextEncode (Positive prompt) is no output"),
        ("map.2.text=caption", "which file has the column caption is not said"),
    ],
)
def test_what_can_not_be_mapped_is_refused_by_name(latentmill, tmp_path, override, line):
    assert line in refusal(latentmill, tmp_path, TEXT_TO_IMAGE, override)


def test_a_title_of_two_nodes_is_not_enough(latentmill, tmp_path):
    workflow = with_changes(TEXT_TO_IMAGE)
    workflow["3"]["_meta"]["title"] = "Positive prompt"
    line = refusal(latentmill, tmp_path, workflow, "map.Positive prompt.text=prompt")
    assert "2 nodes have the title Positive prompt: write the id, 2 or 3" in line


def test_rows_may_stand_in_the_job_itself(latentmill, tmp_path, rows, patches):
    """The very rows of a file: same seeds, same pictures."""
    (tmp_path / "two.csv").write_text("prompt,seed,width\na cat,3,4\na dog,,8\n")
    common = ["encode", *patches, "sampling.height=4", "sampling.width=4"]
    inline = "source.rows=[{prompt: a cat, seed: 3}, {prompt: a dog, width: 8}]"
    file = ["source=prompts", f"source.path={tmp_path / 'two.csv'}"]
    assert latentmill("run", *common, *file, f"output={tmp_path / 'a'}") == 0, latentmill.said
    assert latentmill("run", *common, "source=rows", inline, f"output={tmp_path / 'b'}") == 0, latentmill.said
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert [(row["prompt"], row["width"]) for row in rows(tmp_path / "b")] == [("a cat", 4), ("a dog", 8)]
    assert latentmill("plan", *common, "source=rows", "source.rows=[{promt: a cat}]") == 2
    assert "a row has no field promt (did you mean 'prompt'?)" in latentmill.err


def test_pictures_of_rows_in_the_job_are_below_its_path(latentmill, tmp_path, rows, patches, pictures):
    inline = "source.rows=[{image: 1.png}, {image: 3.png}]"
    job = ["run", "encode", *patches, "source=rows", f"source.path={pictures}", inline, f"output={tmp_path / 'out'}"]
    assert latentmill(*job) == 0, latentmill.said
    other = ["run", "encode", *patches, f"source.path={pictures}", f"output={tmp_path / 'all'}"]
    assert latentmill(*other) == 0, latentmill.said
    made = [row["latents"] for row in rows(tmp_path / "all")]
    assert [row["latents"] for row in rows(tmp_path / "out")] == [made[1], made[3]]


def test_a_row_says_what_its_source_says_where_the_file_says_nothing(latentmill, tmp_path, rows, patches, pictures):
    (tmp_path / "seeds.csv").write_text("seed,note\n,x\n9,y\n")
    common = ["encode", *patches, "sampling.height=4", "sampling.width=4", "source=prompts"]
    job = ["run", *common, f"source.path={tmp_path / 'seeds.csv'}", f"output={tmp_path / 'out'}"]
    assert latentmill(*job) == 2 and "has no column prompt or image" in latentmill.err
    assert latentmill(*job, "source.defaults={sed: 5}") == 2 and "sed is no column of ours" in latentmill.err
    for wrong, said in (
        ("seed: '5'", "seed must be a whole number"),
        ("prompt: 5", "prompt must be text"),
        ("image: 7", "image must be text"),
        ("steps: 0", "steps must be from 1"),
    ):
        assert (
            latentmill(*job, f"source.defaults={{prompt: a, {wrong}}}") == 2 and f"defaults: {said}" in latentmill.err
        ), latentmill.err
    defaults = f"source.defaults={{prompt: a cat, seed: 5, image: '{pictures / '2.png'}'}}"
    assert latentmill(*job, defaults) == 0, latentmill.said
    assert [(row["prompt"], row["seed"]) for row in rows(tmp_path / "out")] == [("a cat", 5), ("a cat", 9)]
    other = ["run", "encode", *patches, f"source.path={pictures}", f"output={tmp_path / 'all'}"]
    assert latentmill(*other) == 0, latentmill.said
    assert [row["latents"] for row in rows(tmp_path / "out")] == [rows(tmp_path / "all")[2]["latents"]] * 2


def test_pictures_are_opened_as_comfyui_opens_them(latentmill, tmp_path, rows, patches):
    """Upright, and where they are transparent with the colours behind it; ours are laid on white."""
    pixels = Image.new("RGBA", (2, 1))
    pixels.putdata([(200, 10, 10, 0), (10, 200, 10, 255)])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    pixels.save(tmp_path / "a.png", exif=exif)
    job = ["run", "encode", *patches, "source=rows", f"source.path={tmp_path}", "source.rows=[{image: a.png}]"]
    assert latentmill(*job, "flow=[read,write]", f"output={tmp_path / 'ours'}") == 0, latentmill.said
    assert latentmill(*job, "flow=[read,write]", "source.opened=comfy", f"output={tmp_path / 'theirs'}") == 0
    ours, theirs = (Image.open(io.BytesIO(rows(tmp_path / name)[0]["image"]["bytes"])) for name in ("ours", "theirs"))
    assert theirs.size == (1, 2)
    assert [theirs.getpixel((0, y)) for y in (0, 1)] == [(200, 10, 10), (10, 200, 10)]
    assert [ours.getpixel((0, y)) for y in (0, 1)] == [(255, 255, 255), (10, 200, 10)]
    assert latentmill(*job, "source.opened=theirs") == 2 and "opened must be ours or comfy" in latentmill.err


@pytest.mark.parametrize("sink", ["parquet", "webdataset"])
def test_pictures_carry_what_the_sink_is_told_with_the_row_s_values(latentmill, tmp_path, rows, patches, sink):
    (tmp_path / "job.yaml").write_text(
        f"defaults: [job, vae: shapes, source: rows, sink: {sink}, cluster: local, _self_]\n"
        "flow: [read, write]\nsampling: {width: 4, height: 4}\n"
        "source: {rows: [{image: a.png, prompt: 'ä', seed: 18446744073709551615}, {image: a.png, seed: 3}]}\n"
        "sink: {picture_text: {prompt: {'1': {inputs: {seed: {column: seed}, text: [{column: prompt}, '2', 0]}}}, other: [7]}}\n"
    )
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "a.png")
    job = ["run", tmp_path / "job.yaml", *patches, f"source.path={tmp_path}", f"output={tmp_path / 'out'}"]
    assert latentmill(*job) == 0, latentmill.said
    if sink == "parquet":
        files = [row["image"]["bytes"] for row in rows(tmp_path / "out")]
    else:
        with tarfile.open(tmp_path / "out/data/00000.tar") as tar:
            files = [tar.extractfile(name).read() for name in sorted(tar.getnames()) if name.endswith(".png")]
    pictures = [Image.open(io.BytesIO(file)) for file in files]
    assert [json.loads(picture.text["prompt"])["1"]["inputs"] for picture in pictures] == [
        {"seed": 18446744073709551615, "text": ["ä", "2", 0]},
        {"seed": 3, "text": ["", "2", 0]},
    ]
    assert pictures[0].text["other"] == "[7]" and pictures[0].getpixel((0, 0)) == (1, 2, 3)
    job[-1] = f"output={tmp_path / 'other'}"
    assert latentmill(*job, "sink.image_format=webp") == 2 and "picture_text is what png carries" in latentmill.err
