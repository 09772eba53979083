"""What tests of launchers share: jobs, what a dry run shows, the schemas, and stand-ins for kubectl and sky."""

import json
import os
import re
import sys
from pathlib import Path

import jsonschema
import yaml

TOKEN = "hunter2hunter2"
"""A value that is never to be seen."""
SCHEMAS = Path(__file__).parents[1] / "schemas"
JOB = """\
defaults: [job, model: shapes, scheduler: euler, source: prompts, sink: parquet, cluster: local, override stages: STAGES, _self_]
output: s3://bucket/out
source: {path: pkg://latentmill.jobs/data/prompts.txt}
sampling: {width: 64, height: 64}
"""
SEVERAL = JOB.replace("STAGES", "gpu") + (
    "stages:\n"
    "  encode: {replicas: 2, num_gpus: 0.25, accelerator_type: L4}\n"
    "  denoise: {replicas: 16, num_gpus: 1, num_cpus: 2, accelerator_type: H100}\n"
    "  decode: {replicas: 4, num_gpus: 0.5, accelerator_type: L4}\n"
)
FUSED = JOB.replace("STAGES", "gpu") + (
    "placement: fused\n"
    "stages: {encode: {num_gpus: 0.1}, denoise: {replicas: 10, num_gpus: 0.3}, decode: {num_gpus: 0.2}}\n"
)
ANY = JOB.replace("STAGES", "gpu") + (
    "placement: split\n"
    "stages: {encode: {replicas: 1, num_gpus: 0.5, accelerator_type: H100}, denoise: {num_gpus: 0.25}, decode: {replicas: 1, num_gpus: 0.1}}\n"
)
SECRET = JOB.replace("STAGES", "cpu").replace("height: 64", "height: 64, negative_prompt: '${oc.env:ACME_TOKEN}'")
JOBS = {"several": SEVERAL, "fused": FUSED, "cpu": JOB.replace("STAGES", "cpu"), "secret": SECRET}

PROGRAM = """\
#!{python}
# Stands in for {name}: it remembers what it is given, and answers as the test has said.
import json, os, re, signal, sys, time
words = sys.argv[1:]
call = {{"words": words, "files": [open(word).read() for word in words if word.endswith(".yaml")]}}
call["stdin"] = sys.stdin.read() if words[-1] == "-" else ""
call["variables"] = {{name: os.environ[name] for name in os.environ if name in {variables}}}
with open({calls!r}, "a") as file:
    file.write(json.dumps(call) + "\\n")
for pattern, code, said in json.load(open({answers!r})):
    if re.search(pattern, " ".join(words)):
        if code == "interrupt":
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(60)
        (sys.stderr if code else sys.stdout).buffer.write(said.encode(errors="surrogateescape"))
        then = {then!r}
        if os.path.exists(then) and re.search((last := json.load(open(then)))[0], " ".join(words)):
            json.dump(last[1], open({answers!r}, "w"))
        sys.exit(code)
sys.exit("no answer to " + " ".join(words))
"""


def program(folder, monkeypatch, name, answers, variables=()):
    """An executable ``name`` first on the path; a function that gives what it was called with until now.

    ``answers``: (pattern of its words, exit code, what it says), of which the first that fits counts. The code ``interrupt`` is
    Ctrl-C for who asks. A file ``NAME.then`` holds a pattern, and the answers from then on.
    """
    (folder / "bin").mkdir(exist_ok=True)
    calls, said = folder / f"{name}.calls", folder / f"{name}.answers"
    said.write_text(json.dumps(answers))
    text = PROGRAM.format(
        python=sys.executable,
        name=name,
        calls=str(calls),
        answers=str(said),
        then=str(folder / f"{name}.then"),
        variables=tuple(variables) or ("",),
    )
    (folder / "bin" / name).write_text(text)
    (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return lambda: [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


def shown(latentmill, job, target, *words):
    """What ``latentmill submit JOB --to TARGET --dry-run`` shows: its one file, read as YAML."""
    assert latentmill("submit", job, "--to", target, "--dry-run", *words) == 0, latentmill.said
    name, _, text = latentmill.out.partition("\n")
    assert re.fullmatch(r"# ---- \w+\.yaml", name) and "# ----" not in text
    return yaml.safe_load(text)


def wrong_in(document, schema):
    """Where a document is not what the schema ``schema``.json says: paths, and what is wrong there."""
    validator = jsonschema.Draft202012Validator(json.loads((SCHEMAS / f"{schema}.json").read_text()))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


def job(text, name="my-job"):
    """A job's file, in the folder that the test is in."""
    Path(f"{name}.yaml").write_text(text)
    return f"{name}.yaml"
