"""The script that ``latentmill submit JOB --to slurm`` writes, for many settings: bash can read it, and nothing secret is in it."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

BASH = shutil.which("bash")


def stand_ins(folder, shell, does, within=None):
    """Commands in place of Slurm's and others', each with what its script does; ``within``: the folder where it does so."""
    for name, script in does.items():
        (folder / name).write_text(f"#!{shell}\n" + f"cd {str(within)!r}\n" * bool(within) + f"{script}\n")
        (folder / name).chmod(0o755)


@pytest.fixture
def script(latentmill, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)

    def script(*words, job="txt2img"):
        assert latentmill("submit", job, "--to", "slurm", "--dry-run", *words) == 0, latentmill.said
        return latentmill.out.removeprefix("# ---- job.sh\n")

    return script


SETTINGS = {
    "as it is": (),
    "inline": ("cluster=inline",),
    "an array": ("target.drivers=3", "target.nodes=4", "target.gpus_per_node=8", "target.time=08:00:00", "target.exclusive=true"),
    "names with blanks and quotes": ("output=a 'b' $c `d` \"e\"", "target.partition=two words", "target.options=['--comment=a b']"),
    "a prompt that looks like the end": ("sampling.prompt=x\nEND_OF_JOB\ny",),
    "modules": ("target.setup=module load cuda\nsource /shared/venv/bin/activate", "target.requeue=false", "target.env=[HF_TOKEN]"),
}  # fmt: skip


@pytest.mark.parametrize("words", SETTINGS.values(), ids=SETTINGS)
def test_bash_can_read_it(script, words, tmp_path):
    text = script(*words)
    file = tmp_path / "job.sh"
    file.write_text(text)
    assert subprocess.run([BASH, "-n", file], capture_output=True, text=True).stderr == ""
    if shellcheck := shutil.which("shellcheck"):
        assert subprocess.run([shellcheck, "--severity=warning", file], capture_output=True, text=True).stdout == ""
    assert "#@" not in text, "a place of the script that was not filled"


def options(text):
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def test_what_sbatch_is_asked_for(script, tmp_path):
    found = options(
        script(
            "target.drivers=3",
            "target.nodes=2",
            "stages=gpu",
            "stages.denoise.replicas=5",
            "target.grace=60",
            "target.memory=64G",
        )
    )
    assert {
        "--nodes=2", "--array=0-2", "--gpus-per-node=2", "--cpus-per-task=5", "--signal=B:TERM@60", "--mem=64G", "--requeue", "--no-kill",
        "--export=ALL", f"--chdir={tmp_path}", "--open-mode=append",
    } <= {*found}  # fmt: skip
    found = options(script("target.exclusive=true", "target.requeue=false", "target.env=[HF_TOKEN]", "target.qos=low"))
    assert {"--exclusive", "--no-requeue", "--export=PATH,HOME,USER,LANG,HF_TOKEN", "--qos=low"} <= {*found}
    assert not [option for option in found if option.startswith(("--cpus", "--gpus", "--array", "--time"))]


def test_the_job_is_in_it_with_its_output_from_the_root(script, tmp_path):
    (tmp_path / "My 'job'.yaml").write_text(
        "defaults: [job, model: shapes, source: prompts, sink: parquet, cluster: inline, _self_]\n"
        "output: out/$HOME\nsource: {path: pkg://latentmill.jobs/data/prompts.txt}\n"
    )
    text = script(job="My 'job'.yaml")
    begin, end = "<<'END_OF_JOB'\n", "\nEND_OF_JOB\n"
    job = yaml.safe_load(text.split(begin)[1].split(end)[0])
    assert job["output"] == str(tmp_path / "out" / "$HOME")
    # What bash makes of the two lines that name the file.
    [heredoc] = [
        line.split("<<")[0].removeprefix("cat ")
        for line in text.splitlines()
        if line.startswith('cat >"$job/"') and "END_OF_JOB" in line
    ]
    [command] = [line for line in text.splitlines() if line.startswith("run latentmill ")]
    said = subprocess.run(
        [BASH, "-c", f'job={tmp_path}\nrun() {{ printf "%s\\n" "$@"; }}\n{command}\necho here {heredoc}'],
        capture_output=True,
        text=True,
    )
    assert said.stdout.splitlines() == ["latentmill", "run", str(tmp_path / "My 'job'.yaml")]
    assert (tmp_path / "My 'job'.yaml").read_text() == "here\n"


def test_no_value_of_the_environment_is_in_it(script, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("NOTE", "hunter2hunter2")
    text = script("target.env=[HF_TOKEN,NOTE]", "sampling.prompt=${oc.env:NOTE}")
    assert "verysecret" not in text and "hunter2" not in text and "${oc.env:NOTE}" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["target.time=00:02:59"], "target.time=00:02:59 must be target.grace, 120 seconds, and 60 more at least"),
        (["target.grace=20"], "target.grace=20 is less than the job's own grace of 30 s"),
        (["target.time=00:02:00"], "target.time=00:02:00 must be target.grace, 120 seconds"),
        (["target.time=1-0"], None),
        (["target.nodes=0"], "target.nodes must be 1 or more, not 0"),
        (["target.drivers=-1"], "target.drivers must be 1 or more, not -1"),
        (["target.nodes=2", "cluster=inline"], "cluster=inline is one process: target.nodes must be 1, not 2"),
        (["target.env=['A=1']"], "target.env holds names of environment variables, and 'A=1' is none"),
        (["target.options=[exclusive]"], "target.options holds options of sbatch, as --constraint=a100, and 'exclusive' is none"),
        (["target.partition=a\nb"], "it has a quote or a line break in it"),
        (["target.time=3"], None),
    ],
)  # fmt: skip
def test_settings_that_are_wrong(latentmill, script, words, says):
    code = latentmill("submit", "txt2img", "--to", "slurm", "--dry-run", *words)
    assert (code, says in latentmill.err) == (2, True) if says else code == 0, latentmill.said


def test_without_slurm_it_says_where_to_submit(latentmill, script, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert latentmill("submit", "txt2img", "--to", "slurm") == 2
    assert "sbatch is not installed here: --dry-run prints what it would be given" in latentmill.err


def test_what_looks_like_a_place_of_the_script_is_not_filled(script):
    text = script("target.setup=: a\n#@COMMAND\n: b")
    assert ": a\n#@COMMAND\n: b\n" in text and text.count("\nrun latentmill ") == 1


def test_a_backslash_is_kept_from_sbatch(script, tmp_path, monkeypatch):
    (tmp_path / "a\\b").mkdir()
    monkeypatch.chdir(tmp_path / "a\\b")
    assert f'--chdir="{tmp_path}/a\\\\b"' in options(script())


@pytest.mark.parametrize(
    ("code", "done", "lives"),
    [
        (0, True, 1),
        (1, False, 4),
        (1, True, 4),
        (2, False, 1),
        (3, False, 1),
        (4, False, 4),
        (4, True, 4),
        (5, True, 1),
        (130, False, 4),
    ],
)
def test_it_goes_back_to_the_queue_where_a_retry_may_help(script, tmp_path, code, done, lives):
    """The script is run as Slurm would, for as long as it asks to be put back; and it does so no more than 4 times in a row.
    Exit code 5: all is ``done``, and not one row came out right.
    """
    commands, folder, out = tmp_path / "bin", tmp_path / "a folder", tmp_path / "out"
    for path in (commands, folder, out):
        path.mkdir()
    if done:
        (out / "_SUCCESS").touch()
    asked = folder / "asked"
    stand_ins(
        commands,
        "/bin/sh",
        {
            "latentmill": f"exit {code}",
            "scontrol": f'[ "$1" = requeue ] && echo >>{str(asked)!r}; echo JobId=1 JobState=RUNNING',
            "sleep": "exit 0",
        },
    )
    file = folder / "job.sh"
    file.write_text(script("cluster=inline", f"output={out}", f"target.setup=export PATH={commands}:$PATH"))
    for _ in range(6):
        before = asked.read_text() if asked.exists() else ""
        with (folder / "log-0").open("ab") as log:
            life = subprocess.run(
                [BASH, file], stdout=log, stderr=log, env={"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "1"}
            )
        assert life.returncode == code, (folder / "log-0").read_text()
        if (asked.read_text() if asked.exists() else "") == before:
            break
    assert len(before) + 1 == lives and (folder / "exit_code-0").read_text() == f"{code}\n"


@pytest.mark.parametrize("refused", [2, 9])
def test_slurm_is_asked_again_and_what_became_of_it_is_said(script, tmp_path, refused):
    """scontrol fails ``refused`` times, as where the controller is busy."""
    commands, folder = tmp_path / "bin", tmp_path / "a folder"
    commands.mkdir()
    folder.mkdir()
    refuses = (
        'if [ "$1" = requeue ] || [ $n -le 2 ]; then [ $n -gt REFUSED ] || { echo busy >&2; exit 1; }; fi'.replace(
            "REFUSED", str(refused)
        )
    )
    stand_ins(
        commands,
        "/bin/sh",
        {
            "latentmill": "exit 1",
            "sleep": "exit 0",
            "scontrol": f"cd {str(tmp_path)!r}; echo >>asked; n=$(wc -l <asked)\n{refuses}\necho JobId=1 JobState=RUNNING",
        },
    )
    (folder / "job.sh").write_text(script("cluster=inline", f"target.setup=export PATH={commands}:$PATH"))
    with (folder / "log-0").open("ab") as log:
        subprocess.run([BASH, folder / "job.sh"], stdout=log, stderr=log, env={"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "1"})  # fmt: skip
    said = (folder / "log-0").read_text()
    assert ("ended with 1; in the queue again" in said) == (refused == 2), said
    assert ("ended with 1, and is not in the queue again: busy" in said) == (refused == 9), said


@pytest.mark.parametrize("told", [False, True])
def test_a_ray_that_does_not_start_is_known_at_once(script, tmp_path, told):
    """On the first node; what srun would start there is run here. Ray's last words are in the log, and no folder stays. So it is where
    the node is ``told`` to end as it begins: then Ray is not started."""
    commands, folder, places = tmp_path / "bin", tmp_path / "a folder", Path(tempfile.mkdtemp(dir="/tmp"))
    commands.mkdir()
    folder.mkdir()
    stand_ins(
        commands,
        BASH,
        {
            "scontrol": "echo JobId=1 JobState=RUNNING",
            "srun": 'while [ "$1" != bash ]; do shift; done\nexec "$@"',
            "python3": f'[ "$3" = ray.scripts.scripts ] && {{ echo no such library; exit 1; }}\nexec {sys.executable} "$@"',
            "mktemp": f'if [ "$RAY_TMPDIR" ] && [ "{told}" = True ]; then kill -USR1 $PPID; fi\nexec /usr/bin/mktemp "$@"',
        },
    )
    (folder / "job.sh").write_text(script("target.requeue=false", f"target.setup=export PATH={commands}:$PATH"))
    around = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_PROCID": "0", "SLURMD_NODENAME": "n7"}
    begun = time.monotonic()
    with (folder / "log-0").open("ab") as log:
        done = subprocess.run(
            [BASH, folder / "job.sh"],
            stdout=log,
            stderr=log,
            env={"PATH": "/usr/bin:/bin", "TMPDIR": str(places), "SLURM_CPUS_ON_NODE": "1", **around},
        )
    said = (folder / "log-0").read_text()
    assert done.returncode == 4 and time.monotonic() - begun < 60
    assert "Ray has not come up on the first node\n" in said and not list(places.iterdir())
    assert told is not ("no such library\n" in said) is ("latentmill: Ray has ended on node 0, n7\n" in said)
    places.rmdir()


def test_what_does_not_fit_on_the_nodes_that_are_left_may_fit_later(script, tmp_path):
    """Ray has come up on fewer nodes than were asked for, which is known by exit code 5 of what waits for it."""
    commands, folder = tmp_path / "bin", tmp_path / "a folder"
    commands.mkdir()
    folder.mkdir()
    stand_ins(
        commands,
        BASH,
        {
            "scontrol": "echo JobId=1 JobState=RUNNING",
            "srun": "exit 0",
            "latentmill": "exit 2",
            "python3": f'case $1 in */wait.py) exit "$WAITED" ;; esac\nexec {sys.executable} "$@"',
        },
    )
    (folder / "job.sh").write_text(script("target.requeue=false", f"target.setup=export PATH={commands}:$PATH"))
    around = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2"}
    codes = []
    for waited in ("0", "5"):
        with (folder / "log-0").open("ab") as log:
            done = subprocess.run([BASH, folder / "job.sh"], stdout=log, stderr=log, env={**around, "WAITED": waited})
        codes.append(done.returncode)
    assert codes == [2, 4], (folder / "log-0").read_text()


def test_a_first_notice_leaves_the_driver_time_and_a_second_is_not_handed_on(script, tmp_path):
    """The second is Slurm's end of the time, which the driver hears of from Slurm itself. A third would have it keep nothing."""
    commands, folder = tmp_path / "bin", tmp_path / "a folder"
    commands.mkdir()
    folder.mkdir()
    driver = "\n".join(f"trap 'echo {name} >>heard' {name}" for name in ("USR1", "TERM")) + "\n"
    driver += "echo >>begun\nuntil [ -e end ]; do read -t 0.05 <>pipe; done\nexit 130"
    stand_ins(commands, BASH, {"scontrol": "echo JobId=1 JobState=COMPLETING", "latentmill": driver}, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (folder / "job.sh").write_text(script("cluster=inline", f"target.setup=export PATH={commands}:$PATH"))
    with (folder / "log-0").open("ab") as log:
        running = subprocess.Popen(
            [BASH, folder / "job.sh"], stdout=log, stderr=log, env={"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "1"}
        )
    heard = tmp_path / "heard"
    until((tmp_path / "begun").exists)
    running.send_signal(signal.SIGTERM)
    until(heard.exists)
    running.send_signal(signal.SIGTERM)
    time.sleep(0.3)  # what is not to come has no sign that it has not
    (tmp_path / "end").touch()
    assert running.wait(30) == 130 and heard.read_text() == "USR1\n"


@pytest.mark.parametrize("notice", ["TERM", "INT"])
def test_a_notice_that_comes_as_the_driver_is_started_reaches_it(script, tmp_path, notice):
    """Before the script knows the driver's number. It is handed on once: twice would be the end of all that is half done."""
    commands, folder = tmp_path / "bin", tmp_path / "a folder"
    commands.mkdir()
    folder.mkdir()
    driver = "\n".join(f"trap 'echo {name} >>heard' {name}" for name in ("USR1", "TERM")) + "\necho >>begun\n"
    driver += "for turn in 1 2 3 4 5 6; do read -t 0.1 <>pipe; done\nexit 130"  # for as long as a second might come
    stand_ins(commands, BASH, {"scontrol": "echo JobId=1 JobState=COMPLETING", "latentmill": driver}, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    begun = tmp_path / "begun"
    at_once = f"until [ -e {begun} ]; do read -t 0.02 <>{tmp_path / 'pipe'}; done; kill -{notice} $$"
    setup = f'export PATH={commands}:$PATH\nset -T\ntrap \'if [ "$BASH_COMMAND" = "child=\\$!" ]; then {at_once}; fi\' DEBUG'
    (folder / "job.sh").write_text(script("cluster=inline", f"target.setup={setup}"))
    with (folder / "log-0").open("ab") as log:
        ended = subprocess.run(
            [BASH, folder / "job.sh"], stdout=log, stderr=log, env={"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "1"}
        )
    assert ended.returncode == 130, (folder / "log-0").read_text()
    assert (tmp_path / "heard").read_text() == {"TERM": "USR1\n", "INT": "TERM\n"}[notice]


def until(true):
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)
