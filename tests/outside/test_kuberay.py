"""``latentmill submit JOB --to kuberay``: RayJobs against KubeRay's own schema, and what kubectl is given."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from tests.outside.launch_parts import FUSED, JOBS, SECRET, SEVERAL, program, shown, wrong_in

IMAGE = "target.image=acme/latentmill:0.1.0"
TYPES = ("target.groups.H100={gpus: 8, cpus: 32, memory: 128GiB, node_selector: {gpu: h100}}", "target.groups.L4.node_selector={gpu: l4}")  # fmt: skip
TOKEN = "hunter2hunter2"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("ACME_TOKEN", TOKEN)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", TOKEN)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "state" / "latentmill" / "jobs"


def job(text, name="my-job"):
    with open(f"{name}.yaml", "w") as file:
        file.write(text)
    return f"{name}.yaml"


def groups(document):
    """Name, least, most and GPUs of a node, of each worker group."""
    found = document["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = [group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in found]
    return [
        (group["groupName"], group["minReplicas"], group["maxReplicas"], int(limit.get("nvidia.com/gpu", 0)))
        for group, limit in zip(found, limits, strict=True)
    ]


def test_the_schema_sees_what_is_wrong(latentmill):
    document = shown(latentmill, job(JOBS["cpu"]), "kuberay", IMAGE)
    for where, key, value, says in [
        ("spec", "backoffLimits", 3, "'backoffLimits' was unexpected"),
        ("spec", "entrypoint", ["latentmill"], "is not of type 'string'"),
        ("spec.rayClusterSpec.authOptions", "mode", "tokens", "is not one of"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.volumes.0", "emptyDirs", {}, "'emptyDirs' was unexpected"),
        ("spec.rayClusterSpec.workerGroupSpecs.0", "maxReplicas", "9", "is not of type 'integer'"),
    ]:
        broken = part = copy.deepcopy(document)
        for step in where.split("."):
            part = part[int(step) if step.isdigit() else step]
        part[key] = value
        [found] = wrong_in(broken, "rayjobs")
        assert says in found


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        # 16 workers on nodes of 8 GPUs; 2 x 0.25 + 4 x 0.5 GPUs on nodes of one
        (SEVERAL, TYPES, [("h100", 2, 2, 8), ("l4", 3, 3, 1)]),
        # A worker has its share, 0.6, of one GPU: ten GPUs, not six
        (FUSED, ("target.gpus=4",), [("gpu", 3, 3, 4)]),
        (FUSED, ("target.gpus=4", "target.nodes=5"), [("gpu", 5, 5, 4)]),
        # 8 GPUs of a node are not all of use if it has CPUs for four workers
        (SEVERAL, (*TYPES, "target.groups.H100.cpus=9"), [("h100", 4, 4, 8), ("l4", 3, 3, 1)]),
        (JOBS["cpu"], ("target.max_nodes=6", "target.nodes=2"), [("cpu", 2, 6, 0)]),
        (SECRET, ("target.env=[ACME_TOKEN]", "target.secrets=[s3]", "target.auth_secret=ray"), [("cpu", 1, 1, 0)]),
    ],
)
def test_a_manifest_is_what_kuberay_takes_and_its_nodes_hold_the_workers(latentmill, text, words, expected):
    document = shown(latentmill, job(text), "kuberay", IMAGE, *words)
    assert wrong_in(document, "rayjobs") == [] and TOKEN not in latentmill.said
    assert groups(document) == expected
    autoscaled = any(least < most for _, least, most, _ in expected)
    assert document["spec"]["rayClusterSpec"].get("enableInTreeAutoscaling", False) == autoscaled


def test_a_node_has_memory_for_its_store_and_a_disk_to_spill_to(latentmill):
    text = SEVERAL.replace("accelerator_type: L4", "accelerator_type: L4, memory: 2GiB")
    document = shown(
        latentmill, job(text), "kuberay", IMAGE, *TYPES, "target.tolerations=[{key: mine, operator: Exists}]"
    )
    cluster = document["spec"]["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        spec, start = group["template"]["spec"], group["rayStartParams"]
        [container], volumes = spec["containers"], {volume["name"]: volume for volume in spec["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        memory = {"128Gi": 2**37, "32Gi": 2**35}[container["resources"]["limits"]["memory"]]
        shared = mounts["/dev/shm"]["emptyDir"]
        assert shared == {"medium": "Memory", "sizeLimit": f"{(int(start['object-store-memory']) >> 20) + 256}Mi"}
        assert int(start["object-store-memory"]) == int(0.3 * memory) >> 20 << 20
        assert int(start["memory"]) + int(start["object-store-memory"]) + 2**28 == memory
        assert mounts[start["object-spilling-directory"]]["emptyDir"] == {"sizeLimit": "100Gi"}
        assert [toleration["key"] for toleration in spec["tolerations"]] == ["nvidia.com/gpu", "mine"]
        assert spec["nodeSelector"] == {"gpu": group["groupName"]}
        accelerator = json.loads(start["resources"][1:-1].replace("\\", ""))  # as Ray's autoscaler reads it
        assert accelerator == {f"accelerator_type:{group['groupName'].upper()}": 1}


@pytest.mark.skipif(not shutil.which("pgrep"), reason="needs procps")
def test_before_a_head_goes_its_driver_is_told_and_waited_for(latentmill, tmp_path, monkeypatch):
    document = shown(latentmill, job(JOBS["cpu"]), "kuberay", IMAGE, "target.grace=70")
    spec = document["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    [container] = spec["containers"]
    assert spec["terminationGracePeriodSeconds"] == 100
    assert container["env"] == [{"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "70"}]
    driver, seen = tmp_path / "bin" / "latentmill", tmp_path / "seen"
    driver.parent.mkdir()
    driver.write_text(
        f"#!{sys.executable}\nimport signal, sys, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: (time.sleep(0.5), open(sys.argv[2], 'w').close(), sys.exit(130)))\n"
        "print('up', flush=True)\ntime.sleep(60)\n"
    )
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{driver.parent}{os.pathsep}{os.environ['PATH']}")
    # As Ray has it: a shell that runs the wrapper, which runs the driver. The first two must not be told.
    command = f"{sys.executable} -m latentmill.launchers.rayjob latentmill run {seen}; exit $?"
    with subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE) as running:
        assert running.stdout.readline() == b"up\n"
        # On this machine others may run such a job: its own one is meant.
        hook = [
            word.replace("bin/[l]", f"{tmp_path}/bin/[l]")
            for word in container["lifecycle"]["preStop"]["exec"]["command"]
        ]
        assert subprocess.run(hook, timeout=30).returncode == 0 and seen.exists()
        assert running.wait(30) == 130


def test_volumes_and_secrets_are_those_of_every_pod(latentmill):
    words = ("target.volumes.claim=/shared", "output=/shared/out", "target.secrets=[s3]", "target.env=[ACME_TOKEN]", "target.pull_secrets=[registry]")  # fmt: skip
    document = shown(latentmill, job(SECRET), "kuberay", IMAGE, *words)
    cluster, name = document["spec"]["rayClusterSpec"], document["metadata"]["name"]
    pods = [cluster["headGroupSpec"]["template"]["spec"], cluster["workerGroupSpecs"][0]["template"]["spec"]]
    for spec in pods:
        [container] = spec["containers"]
        assert {"mountPath": "/shared", "name": "volume-0"} in container["volumeMounts"]
        assert {"name": "volume-0", "persistentVolumeClaim": {"claimName": "claim"}} in spec["volumes"]
        assert [source["secretRef"]["name"] for source in container["envFrom"]] == ["s3", f"{name}-env"]
    for spec in (*pods, document["spec"]["submitterPodTemplate"]["spec"]):
        assert spec["imagePullSecrets"] == [{"name": "registry"}] and spec["securityContext"]["runAsNonRoot"]
        assert spec["containers"][0]["image"] == "acme/latentmill:0.1.0"


def test_the_job_travels_with_its_pod_and_its_command_through_a_shell(latentmill):
    document = shown(latentmill, job(JOBS["cpu"], "it's $HOME; Ä"), "kuberay", IMAGE)
    template = document["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    [container] = template["spec"]["containers"]
    [volume] = [volume for volume in template["spec"]["volumes"] if volume["name"] == "job"]
    [item] = volume["downwardAPI"]["items"]
    key = re.fullmatch(r"metadata\.annotations\['(.+)'\]", item["fieldRef"]["fieldPath"])[1]
    assert template["metadata"]["annotations"][key].startswith("defaults: [job, _self_]\n")
    assert {"name": "job", "mountPath": "/etc/latentmill", "readOnly": True} in container["volumeMounts"]
    assert item["path"] == "it's $HOME; Ä.yaml"
    words = subprocess.check_output(["bash", "-c", f"printf '%s\\n' {document['spec']['entrypoint']}"], text=True)  # fmt: skip
    assert words.splitlines() == [
        "python", "-m", "latentmill.launchers.rayjob", "latentmill", "run", "/etc/latentmill/it's $HOME; Ä.yaml",
        "cluster.kind=ray", "cluster.address=auto",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["9 Lives_", "ÄÖ" + "x" * 80])
def test_a_name_is_a_label_of_dns_whatever_the_job_is_called(latentmill, name):
    text = SEVERAL.replace("H100", "NVIDIA_H100.80G")
    words = ("target.groups={NVIDIA_H100.80G: {node_selector: {gpu: a}}, L4: {node_selector: {gpu: b}}}", "target.env=[ACME_TOKEN]")  # fmt: skip
    document = shown(latentmill, job(text, name), "kuberay", IMAGE, *words)
    label = r"[a-z]([a-z0-9-]*[a-z0-9])?"
    assert re.fullmatch(label, document["metadata"]["name"]) and len(document["metadata"]["name"]) <= 47
    found = document["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [group["groupName"] for group in found] == ["nvidia-h100-80g", "l4"]


@pytest.mark.parametrize(
    ("text", "words", "says"),
    [
        (SEVERAL, (), "which nodes have the accelerator_type H100? Labels say so: target.groups.H100.node_selector={"),
        (SECRET, (), "the job needs ACME_TOKEN of its environment: target.env=[ACME_TOKEN] sends it along"),
        (JOBS["cpu"], ("output=/shared/out",), "output=/shared/out would be lost with its pod: give a URL, or a path on a volume"),
        (JOBS["cpu"], ("cluster=inline",), "the job says cluster=inline, and a RayJob is a cluster"),
        (FUSED, ("stages.denoise.num_gpus=2",), "encode + denoise + decode asks for more than a node of group gpu has"),
        (FUSED, ("stages.denoise.resources={fast: 1}",), "asks for fast: nodes that are made have CPUs, GPUs and memory alone"),
        (JOBS["cpu"], ("target.groups.cpu.gpu=1",), "target.groups.cpu.gpu is no setting (did you mean 'gpus'?)"),
        (JOBS["cpu"], ("target.object_store=1",), "leaves nothing of memory=32GiB"),
        (JOBS["cpu"], ("target.volumes.claim=shared",), "target.volumes: 'shared' is no path from the root"),
        (JOBS["cpu"], ("target.max_nodes=0",), "target.max_nodes=0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_a_line(latentmill, text, words, says):
    assert latentmill("submit", job(text), "--to", "kuberay", "--dry-run", IMAGE, *words) == 2, latentmill.said
    assert says in latentmill.err and len(latentmill.err.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------- kubectl

MADE = json.dumps({"metadata": {"namespace": "team", "name": "my-job-1", "uid": "1234"}})
CONTEXT = ["config current-context", 0, "arn:aws:eks:eu:1:cluster/a\n"]


def status(**values):
    return ["get rayjob", 0, json.dumps({"status": values})]


def submitted(latentmill, tmp_path, monkeypatch, *answers):
    """A job that was submitted; what kubectl was given until now."""
    answers = [CONTEXT, ["create", 0, MADE], *answers]
    calls = program(tmp_path, monkeypatch, "kubectl", answers, ["ACME_TOKEN"])
    assert latentmill("submit", job(SECRET), "--to", "kuberay", IMAGE, "target.env=[ACME_TOKEN]") == 0, latentmill.said
    return calls


AT = ["--context", "arn:aws:eks:eu:1:cluster/a", "--namespace", "team"]


def test_what_is_submitted_and_the_secret_that_goes_along(latentmill, tmp_path, monkeypatch, home):
    calls = submitted(latentmill, tmp_path, monkeypatch)
    [_, created, secret] = calls()
    assert created["words"][:2] == AT[:2] and created["words"][2:4] == ["create", "-f"]
    assert created["files"] == [next(home.glob("*/rayjob.yaml")).read_text()]
    sent = json.loads(secret["stdin"])
    assert secret["words"] == [*AT, "create", "-f", "-"] and sent["stringData"] == {"ACME_TOKEN": TOKEN}
    assert sent["metadata"]["ownerReferences"] == [
        {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": "my-job-1", "uid": "1234"}
    ]
    assert f"secretRef: {{name: {sent['metadata']['name']}}}" in created["files"][0], "the pods take it"
    kept = [file.read_text() for file in home.rglob("*") if file.is_file()]
    assert kept and not any(
        TOKEN in text for text in [*kept, latentmill.said, *(str(call["words"]) for call in calls())]
    )


def test_how_it_is(latentmill, tmp_path, monkeypatch):
    submitted(latentmill, tmp_path, monkeypatch)
    for word, more, log, expected in [
        ("", {}, "", ("queued", None, "")),
        ("Initializing", {}, "", ("queued", None, "its cluster starts")),
        ("Running", {"jobStatus": "RUNNING"}, "", ("running", None, "")),
        ("Running", {"failed": 1}, "", ("running", None, "retry 1 of 3")),
        ("Retrying", {"failed": 1}, "", ("queued", None, "it failed, and gets a new cluster")),
        ("Complete", {"jobStatus": "SUCCEEDED"}, "", ("ended", 0, "")),
        ("Complete", {"jobStatus": "STOPPED"}, "no\nlatentmill: ended with exit code 2\n", ("ended", 2, "stopped")),
        ("Complete", {"jobStatus": "STOPPED"}, "it was killed\n", ("ended", None, "stopped")),
        ("Failed", {"message": "it\nfailed"}, "latentmill: ended with exit code 1\n", ("ended", 1, "it")),
        ("ValidationFailed", {"message": "bad"}, "", ("ended", None, "bad")),
    ]:
        pods = ["get pods -l job-name=my-job-1 ", 0, "pod/a\npod/b\n"]
        answers = [status(jobDeploymentStatus=word, **more), pods, ["logs pod/b --tail", 0, log]]
        program(tmp_path, monkeypatch, "kubectl", answers)
        assert latentmill("jobs", "--json") == 0, latentmill.said
        [found] = json.loads(latentmill.out)
        assert (found["state"], found["exit_code"], found["detail"]) == expected


def test_one_that_is_gone_and_one_that_cannot_be_asked(latentmill, tmp_path, monkeypatch):
    gone = 'Error from server (NotFound): rayjobs.ray.io "my-job-1" not found\n'
    submitted(latentmill, tmp_path, monkeypatch, ["get rayjob", 1, gone])
    assert latentmill("jobs", "--json") == 0 and json.loads(latentmill.out)[0]["detail"] == f"kubectl: {gone.strip()}"
    assert latentmill("cancel", "my-job") == 2
    program(tmp_path, monkeypatch, "kubectl", [["get rayjob", 1, "Unable to connect to the server\n"]])
    assert latentmill("cancel", "my-job") == 4 and "Unable to connect" in latentmill.err


def test_without_its_secret_nothing_is_left(latentmill, tmp_path, monkeypatch, home):
    answers = [
        CONTEXT,
        ["create -f -$", 1, "Error from server (Forbidden): secrets\n"],
        ["create", 0, MADE],
        ["delete", 0, ""],
    ]
    calls = program(tmp_path, monkeypatch, "kubectl", answers)
    assert latentmill("submit", job(SECRET), "--to", "kuberay", IMAGE, "target.env=[ACME_TOKEN]") == 2
    assert calls()[-1]["words"] == [*AT, "delete", "rayjob", "my-job-1", "--wait=false"] and not [*home.iterdir()]


def test_its_log_and_its_end(latentmill, tmp_path, monkeypatch):
    submitted(latentmill, tmp_path, monkeypatch)
    answers = [
        status(jobDeploymentStatus="Failed", message="it ended"),
        ["get pods", 0, "pod/a\npod/b\npod/c\n"],
        ["logs pod/a --follow", 0, "once\n"],
        ["logs pod/b --follow", 1, "Error: it is waiting to start\n"],
        ["logs pod/c --follow", 0, "and again\n"],
    ]
    program(tmp_path, monkeypatch, "kubectl", answers)
    assert latentmill("logs", "my-job", "--follow") == 0 and latentmill.out == "once\nand again\n", latentmill.said

    answers = [
        status(jobDeploymentStatus="Running", rayClusterName="c-1", jobId="j-1"),
        ["get pods -l ray.io/cluster=c-1,ray.io/node-type=head ", 0, "pod/head\n"],
        ["exec pod/head", 0, ""],
    ]
    calls = program(tmp_path, monkeypatch, "kubectl", answers)
    assert latentmill("cancel", "my-job") == 0, latentmill.said
    stop = ["ray", "job", "stop", "--no-wait", "--address", "http://127.0.0.1:8265", "j-1"]
    assert calls()[-1]["words"] == [*AT, "exec", "pod/head", "-c", "ray-head", "--", *stop]


def test_one_that_does_not_run_yet_is_suspended(latentmill, tmp_path, monkeypatch):
    calls = submitted(latentmill, tmp_path, monkeypatch, status(jobDeploymentStatus="Initializing"), ["patch", 0, ""])
    assert latentmill("cancel", "my-job") == 0, latentmill.said
    patch = ["patch", "rayjob", "my-job-1", "--type=merge", "-p", '{"spec":{"suspend":true}}']
    assert calls()[-1]["words"] == [*AT, *patch]
    program(tmp_path, monkeypatch, "kubectl", [status(jobDeploymentStatus="Suspended")])
    assert latentmill("jobs", "--json") == 0
    [found] = json.loads(latentmill.out)
    assert (found["state"], found["detail"]) == ("ended", "cancelled")


@pytest.mark.parametrize(
    ("said", "code"),
    [("error: unknown field \"spec.more\"\n", 2), ("Unable to connect to the server: timeout\n", 4)],
)  # fmt: skip
def test_a_refusal_is_final_and_silence_is_not(latentmill, tmp_path, monkeypatch, home, said, code):
    program(tmp_path, monkeypatch, "kubectl", [CONTEXT, ["create", 1, said]])
    assert latentmill("submit", job(JOBS["cpu"]), "--to", "kuberay", IMAGE) == code
    assert said.strip() in latentmill.err and not [*home.iterdir()]
