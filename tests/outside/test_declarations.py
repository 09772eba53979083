"""What plugins say of themselves and don't mean so: refused by name, in one line, before a job starts; or the stage is, that doesn't do as it says."""

import pytest

BETWEEN = """import pyarrow as pa
from latentmill.plugin import Denoiser, RowField, Sink, Stage
class Wrong(Stage):
    contract = 2
    {said}
    def __call__(self, batch, reject):
        {does}
        return batch
"""
SINK = """from latentmill.sinks.parquet import Parquet
class Wrong(Parquet):
    contract = 2
    {said}
"""
STAGES = {
    'fingerprinted = ("path")': "fingerprinted must be a list of names, not 'path' (a comma is missing?)",
    'libraries = "numpy"': "libraries must be a list of names, not 'numpy' (a comma is missing?)",
    'adds = "score"': "adds must be a list of names, not 'score' (a comma is missing?)",
    'drops = "image"': "drops must be a list of names, not 'image' (a comma is missing?)",
    'row_fields = RowField("a", pa.float64(), "b")': "row_fields must be a list of RowField, not RowField(",
    'row_fields = (RowField("a", float, "b"),)': "the row field a has the type <class 'float'>, and an Arrow type is",
    "def resources(self): return {}": "resources must be a mapping, as {'num_cpus': 1}, not <function",
    'def __init__(self): self.libraries = "numpy"': "libraries must be a list of names, not 'numpy' (a comma is missing?)",
}
SINKS = {
    'suffix = "parquet"': "suffix must be how its files end, one, with the dot, as \".parquet\", not 'parquet'",
    'suffix = ".tar.gz"': "suffix must be how its files end, one, with the dot, as \".parquet\", not '.tar.gz'",
}


@pytest.mark.parametrize("said", [*STAGES, *SINKS])
def test_a_declaration_of_the_wrong_form_is_refused(said, install, latentmill, patches, pictures, tmp_path):
    kind, code, asked = (
        ("stage", BETWEEN, "flow=[read,wrong,encode,write]") if said in STAGES else ("sink", SINK, "sink=wrong")
    )
    install("acme", f"[latentmill.{kind}s]\nwrong = acme_wrong:Wrong\n", acme_wrong=code.format(said=said, does="pass"))
    job = ("encode", *patches, f"source.path={pictures}", f"output={tmp_path / 'out'}", asked)
    for command in ("plan", "run"):
        assert latentmill(command, *job) == 2, latentmill.said
        [line] = latentmill.err.splitlines()
        assert line.startswith(f"latentmill: {kind} ") and "wrong" in line and {**STAGES, **SINKS}[said] in line


def test_attributes_of_other_kinds_are_a_plugin_s_own(install, latentmill, patches, pictures, tmp_path):
    said = "def __init__(self):\n        super().__init__()\n        self.needs, self.resources, self.noise_schedule = 'all', None, int"
    install("acme", "[latentmill.sinks]\nwrong = acme_wrong:Wrong\n", acme_wrong=SINK.format(said=said))
    job = ("encode", *patches, f"source.path={pictures}", f"output={tmp_path / 'out'}", "sink=wrong")
    assert latentmill("plan", *job) == 0, latentmill.said


DOES = {
    "pass": "stage wrong of acme 1.0 returned rows without the column score, which its `adds` names",
    'batch = batch.append_column("score", pa.array(["a"] * len(batch)))': "stage wrong of acme 1.0 returned score as string, and its `adds` says double",
    'batch = batch.slice(1); reject(0, "")': "stage wrong of acme 1.0 rejects a row without a reason, as ''",
    'reject(-1, "why")': "reject(-1, ...): the batch has the rows 0 to",
}  # fmt: skip


@pytest.mark.parametrize("does", DOES)
def test_a_stage_that_doesn_t_do_as_it_says_ends_the_job_by_its_name(
    does, install, latentmill, patches, pictures, tmp_path
):
    said = 'adds = (pa.field("score", pa.float64()),)' if "reject" not in does else ""
    install("acme", "[latentmill.stages]\nwrong = acme_wrong:Wrong\n", acme_wrong=BETWEEN.format(said=said, does=does))
    job = (
        "encode",
        *patches,
        f"source.path={pictures}",
        f"output={tmp_path / 'out'}",
        "flow=[read,wrong,encode,write]",
    )
    assert latentmill("run", *job) == 1, latentmill.said
    assert DOES[does] in latentmill.err.splitlines()[-1], latentmill.err
    assert not [*(tmp_path / "out").glob("errors/*")] and not (tmp_path / "out" / "_SUCCESS").exists()
