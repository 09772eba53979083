"""Whatever is done to a dataset's files is found, and repaired by doing the shard again: the same bytes."""

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

import latentmill
from latentmill import storage
from latentmill.cli import main
from latentmill.errors import PlanError
from latentmill.sinks.parquet import Parquet
from latentmill.verify import repair, verify

PROMPTS = [f"a {colour} star on a white background" for colour in ("red", "blue", "green", "black", "yellow")]
PROMPTS.insert(2, "a zebra")  # a word that the model doesn't know


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Six rows in three shards, one of them failed; and the command that made them."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    command = [
        "txt2img", f"source.path={folder / 'prompts.txt'}", "samples_per_row=1", "rows_per_shard=2", "cluster=inline",
        "sampling.steps=2", "deterministic=true", "stages.denoise.batch_size=2", "sampling.width=32", "sampling.height=32",
    ]  # fmt: skip
    latentmill.run(command[0], [*command[1:], f"output={folder / 'out'}"])
    return command, {p.relative_to(folder / "out"): p.read_bytes() for p in (folder / "out").rglob("*") if p.is_file()}


@pytest.fixture
def out(made, tmp_path):
    for name, content in made[1].items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(content)
    return tmp_path / "out"


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)


def change(path, table=lambda table: table, **metadata):
    """As somebody would who writes shards as we do."""
    changed = table(pq.read_table(path))
    about = {**changed.schema.metadata, **{name.encode(): value for name, value in metadata.items()}}
    Parquet().write(str(path), changed.replace_schema_metadata(about), {})


def test_a_sound_dataset_is_sound(out, capsys):
    assert main(["verify", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{out}: job txt2img, 6 rows planned in 3 shards",
        "5 rows ok, 1 failed with a reason, each once",
        "sound",
    ]


def test_rows_are_in_the_plan_s_order_which_is_not_that_of_their_names(tmp_path):
    """The thousandth sample's name has a digit more."""
    (tmp_path / "in").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "in" / "a.png")
    settings = [f"source.path={tmp_path / 'in'}", "samples_per_row=1002", "rows_per_shard=2000", "cluster=inline"]
    latentmill.run("encode", [*settings, f"output={tmp_path / 'out'}"])
    verdict = verify(storage.at(str(tmp_path / "out")))
    assert verdict.sound and verdict.ok == 1002


DAMAGE = {
    "a bit of a picture": (lambda p: flip(p, 2000), "can't be read: ValueError: it is not as it was written"),
    "the footer": (lambda p: flip(p, -20), "can't be read"),
    "a column's name": (lambda p: p.write_bytes(p.read_bytes().replace(b"guidance_scale", b"guidance_scald")), "can't be read"),
    "what a column says of itself": (lambda p: p.write_bytes(p.read_bytes().replace(b"huggingface", b"huggingfacf")), "can't be read"),
    "written anew by another": (lambda p: pq.write_table(pq.read_table(p), p), "can't be read: ValueError: it is not as it was written"),
    "cut off": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "can't be read"),
    "empty": (lambda p: p.write_bytes(b""), "can't be read"),
    "a row too few": (lambda p: change(p, lambda t: t.slice(1)), "has not the planned rows: 1 missing, 0 twice, 0 foreign"),
    "a row twice": (lambda p: change(p, lambda t: t.take([0, 0, 1])), "has not the planned rows: 0 missing, 1 twice, 0 foreign"),
    "another's rows": (lambda p: p.write_bytes(p.with_name("00002.parquet").read_bytes()), "2 missing, 0 twice, 2 foreign"),
    "another order": (lambda p: change(p, lambda t: t.take([1, 0])), "has its rows in another order"),
    "another plan": (lambda p: change(p, **{"latentmill.plan": "0123"}), "was made by another plan, 0123"),
    "errors that are none": (lambda p: change(p, **{"latentmill.errors": "[1"}), "has errors in it that can't be read"),
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_found_and_repaired(how, out, made, capsys):
    command, before = made
    damage, said = DAMAGE[how]
    damage(out / "data" / "00000.parquet")
    verdict = verify(storage.at(str(out)))
    assert verdict.damaged.keys() == {0} and verdict.strange == ["_SUCCESS is there, and not all rows are"]
    assert (verdict.ok, verdict.failed) == (3, 1)
    assert main(["verify", str(out)]) == 1
    assert re.search(f"shard 0 .*{said}", capsys.readouterr().out)
    assert main(["verify", str(out), "--repair"]) == 1
    [moved] = (out / "quarantine").iterdir()
    assert f"moved data/00000.parquet -> quarantine/{moved.name}" in capsys.readouterr().out
    assert not (out / "_SUCCESS").exists()
    assert main(["verify", str(out)]) == 0 and "1 shards are not done yet" in capsys.readouterr().out
    assert main(["run", *command, f"output={out}"]) == 0
    for name, content in before.items():
        if name.name != "report.html":
            assert (out / name).read_bytes() == content, name


def test_errors_that_were_changed_and_files_that_are_not_ours_are_found(out):
    errors = out / "errors" / "00001.jsonl"
    errors.write_text(json.dumps({**json.loads(errors.read_text()), "row_id": "000000003-000"}) + "\n")
    (out / "data" / "00003.parquet").write_bytes((out / "data" / "00002.parquet").read_bytes())
    verdict = verify(storage.at(str(out)))
    assert not verdict.damaged
    assert verdict.foreign == ["00003.parquet"]
    assert verdict.strange == ["errors/00001.jsonl is not what data/00001.parquet says"]


def test_error_files_are_copies_and_are_made_again(out, made):
    """One that was changed, and one beside a shard of which no row failed."""
    right = (out / "errors" / "00001.jsonl").read_bytes()
    (out / "errors" / "00001.jsonl").write_bytes(right + right)
    (out / "errors" / "00000.jsonl").write_bytes(right)
    store = storage.at(str(out))
    assert list(repair(store, verify(store))) == ["made errors/00000.jsonl again", "made errors/00001.jsonl again"]
    assert [path.read_bytes() for path in (out / "errors").iterdir()] == [right] and verify(store).sound


def test_error_files_that_are_gone_and_those_of_no_shard_are_found_and_put_right(out, capsys):
    right = (out / "errors" / "00001.jsonl").read_bytes()
    (out / "errors" / "00001.jsonl").rename(out / "errors" / "00007.jsonl")
    (out / "filtered").mkdir()
    (out / "filtered" / "notes.txt").write_text("mine")
    (out / "filtered" / ".hidden").write_text("a file system's")
    said = [
        "filtered/notes.txt is no shard's",
        "errors/00001.jsonl is not there, to hold what data/00001.parquet says",
    ]
    assert main(["verify", str(out)]) == 1
    assert sorted([*said, "errors/00007.jsonl is no shard's"]) == sorted(capsys.readouterr().out.splitlines()[2:-1])
    assert main(["verify", str(out), "--repair"]) == 1 and main(["verify", str(out)]) == 0
    assert (out / "errors" / "00001.jsonl").read_bytes() == right and not (out / "errors" / "00007.jsonl").exists()
    assert (out / "quarantine" / "foreign-filtered-notes.txt").read_text() == "mine"


def test_before_a_dataset_is_complete_a_driver_may_be_about_to_write_an_error_file(out):
    (out / "_SUCCESS").unlink()
    (out / "errors" / "00001.jsonl").unlink()
    assert verify(storage.at(str(out))).sound


def test_a_shard_taken_out_by_hand_is_done_again_and_nothing_says_complete_before(out, made):
    """What is in data/ is the progress, whatever else lies there."""
    command, files = made
    (out / "data" / "00000.parquet").unlink()
    (out / "errors" / "00000.jsonl").write_bytes(files[Path("errors/00001.jsonl")])  # of another time
    seen = []
    write = Path(out, "_SUCCESS")

    class Watched(latentmill.run.__globals__["Leases"]):
        def __enter__(self):
            seen.append(write.exists())
            return super().__enter__()

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(latentmill.run.__globals__, "Leases", Watched)
        result = latentmill.run(command[0], [*command[1:], f"output={out}"])
    assert seen == [False] and (result.ok, result.failed) == (5, 1)
    assert {p.relative_to(out): p.read_bytes() for p in (out / "data").iterdir()} == {
        name: content for name, content in files.items() if name.parts[0] == "data"
    }
    assert write.exists() and not (out / "errors" / "00000.jsonl").exists()


def test_a_shard_that_another_driver_is_taking_out_of_a_bucket_is_heard_of_once_it_is_gone(out):
    """A bucket copies it, and then deletes it: whoever looks in between sees both."""
    from latentmill import dataset

    there = dataset.load(storage.at(str(out)))
    (out / "quarantine").mkdir(exist_ok=True)
    (out / "quarantine" / "00000.parquet-damaged-0").write_bytes(b"of long ago")
    for _ in range(2):
        assert not there.newly_taken_out()
    shard = out / "data" / "00001.parquet"
    (out / "quarantine" / "00001.parquet-retried-1").write_bytes(shard.read_bytes())
    assert not there.newly_taken_out()
    shard.unlink()
    assert there.newly_taken_out() == {1} and not there.newly_taken_out()


def test_a_plan_that_was_changed_is_found(out):
    text = (out / "plan.json").read_text()
    (out / "plan.json").write_text(text.replace('"seed": 0', '"seed": 1', 1))
    with pytest.raises(PlanError, match=r"plan\.json was changed: its hash is \w+, and its contents' \w+"):
        verify(storage.at(str(out)))


def test_an_unfinished_dataset_may_be_sound(out, capsys):
    (out / "data" / "00001.parquet").unlink()
    (out / "_SUCCESS").unlink()
    assert main(["verify", str(out)]) == 0
    assert "1 shards are not done yet" in capsys.readouterr().out


def test_in_a_bucket_as_on_a_disk(out, bucket, capsys):
    store = storage.at(f"{bucket}/out")
    for path in out.rglob("*"):
        if path.is_file():
            store.put(str(path.relative_to(out)), path.read_bytes())
    assert main(["verify", f"{bucket}/out"]) == 0
    store.put("data/00002.parquet", b"PAR1")
    assert main(["verify", f"{bucket}/out", "--repair"]) == 1
    assert sorted(store.names("data")) == ["00000.parquet", "00001.parquet"] and len(store.names("quarantine")) == 1


def test_a_changed_job_begins_anew_elsewhere(out, made, tmp_path, capsys):
    command, before = made
    changed = [*command, f"output={out}", "sampling.steps=3"]
    assert main(["run", *changed]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith("sampling.steps: 2 -> 3. Choose another output; --fork begins one.")
    assert main(["run", *changed, "--fork", str(tmp_path / "fork")]) == 0
    assert {name for name in before} == {
        p.relative_to(tmp_path / "fork") for p in (tmp_path / "fork").rglob("*") if p.is_file()
    }
    assert all((out / name).read_bytes() == content for name, content in before.items())
    assert main(["run", *changed, "--fork", str(tmp_path / "fork")]) == 2
    assert "there is a dataset already" in capsys.readouterr().err.splitlines()[-1]
    assert Path(tmp_path / "fork" / "_SUCCESS").exists()
