"""A row that gives no negative prompt is not one whose negative prompt is empty, and the dataset says which it was."""

import json

PROMPT, OTHER = "a red circle", "a blue square"
GIVEN = ({}, {"negative_prompt": None}, {"negative_prompt": ""}, {"negative_prompt": OTHER})


def test_none_stays_none_and_takes_the_job_s(latentmill, rows, tmp_path):
    lines = [json.dumps({"prompt": PROMPT, "seed": 7, **given}) for given in GIVEN]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "rows.csv").write_text(f"prompt,seed,negative_prompt\n{PROMPT},7,\n{PROMPT},7,{OTHER}\n")
    made = {}
    for name, file, more in (
        ("none", "rows.jsonl", []),
        ("job", "rows.jsonl", [f"sampling.negative_prompt={OTHER}"]),
        ("csv", "rows.csv", []),
    ):
        told = ["cluster=inline", "samples_per_row=1", "sampling.steps=2", f"source.path={tmp_path / file}", *more]
        assert latentmill("run", "denoise", *told, f"output={tmp_path / name}") == 0, latentmill.said
        made[name] = rows(tmp_path / name)
    said = {name: [row["negative_prompt"] for row in found] for name, found in made.items()}
    assert said == {"none": [None, None, "", OTHER], "job": [OTHER, OTHER, "", OTHER], "csv": [None, OTHER]}
    # To a model that has nothing else for none it is an empty one.
    none, null, empty, other = (row["latents"] for row in made["none"])
    assert none == null == empty != other
    assert [row["latents"] for row in made["job"]] == [other, other, empty, other]


def test_none_goes_on_through_stored_latents(latentmill, rows, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": PROMPT, **given}) for given in GIVEN))
    told = ["cluster=inline", "samples_per_row=1", "sampling.steps=2"]
    first = [f"source.path={tmp_path / 'rows.jsonl'}", "sampling.until=0.5"]
    assert latentmill("run", "denoise", *told, *first, f"output={tmp_path / 'half'}") == 0, latentmill.said
    then = ["source=latents", f"source.path={tmp_path / 'half'}"]
    assert latentmill("run", "denoise", *told, *then, f"output={tmp_path / 'whole'}") == 0, latentmill.said
    assert [row["negative_prompt"] for row in rows(tmp_path / "whole")] == [None, None, "", OTHER]
