"""``latentmill submit JOB --to kuberay``: RayJobs against KubeRay's own schema."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from tests.outside.launch_parts import ANY, FUSED, JOBS, SECRET, SEVERAL, TOKEN, job, shown, wrong_in

IMAGE = "target.image=acme/latentmill:0.1.0"
TYPES = ("target.groups.H100={gpus: 8, cpus: 32, memory: 128GiB, node_selector: {gpu: h100}}", "target.groups.L4.node_selector={gpu: l4}")  # fmt: skip
pytestmark = pytest.mark.usefixtures("records")


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
        # A type is asked for without a GPU, too; and more nodes of it are of use to workers that ask for any
        (JOBS["cpu"] + "stages: {write: {accelerator_type: L4}}\n", TYPES, [("l4", 1, 1, 1)]),
        (ANY, (*TYPES, "target.max_nodes=4"), [("h100", 1, 4, 8)]),
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
        "cluster.kind=ray", "cluster.address=auto", "cluster.wait=30m",
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
        (JOBS["cpu"], ("output=/shared/../out", "target.volumes.a=/shared"), "output=/shared/../out would be lost with its pod"),
        (JOBS["cpu"], ("output=/shared/out",), "output=/shared/out would be lost with its pod: give a URL, or a path on a volume"),
        (JOBS["cpu"], ("export={to: [mds], folder: /exports}",), "export.folder=/exports would be lost with its pod: give a URL"),
        (JOBS["cpu"], ("prompt_cache=/kept", "target.volumes.a=/shared"), "prompt_cache=/kept would be lost with its pod"),
        (JOBS["cpu"], ("grace=3m",), "target.grace=120 is less than the job's own grace of 180 s"),
        (JOBS["cpu"], ("cluster=inline",), "the job says cluster=inline, and a RayJob is a cluster"),
        (FUSED, ("stages.denoise.num_gpus=2",), "encode + denoise + decode asks for more than a node of group gpu has"),
        (FUSED, ("stages.denoise.resources={fast: 1}",), "asks for fast: nodes that are made have CPUs, GPUs and memory alone"),
        (JOBS["cpu"], ("target.groups.cpu.gpu=1",), "groups.cpu.gpu is no setting (did you mean 'gpus'?)"),
        (JOBS["cpu"], ("target.object_store=1",), "target.object_store=1 leaves nothing"),
        (JOBS["cpu"], ("target.volumes.claim=shared",), "target.volumes: 'shared' is no path from the root"),
        (JOBS["cpu"], ("target.max_nodes=0",), "target.max_nodes=0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_a_line(latentmill, text, words, says):
    assert latentmill("submit", job(text), "--to", "kuberay", "--dry-run", IMAGE, *words) == 2, latentmill.said
    assert says in latentmill.err and len(latentmill.err.splitlines()) == 1


def test_what_is_no_type_of_a_setting_is_a_line(latentmill):
    file = job(JOBS["cpu"])
    for word, says in [
        ("target.secrets=abc", "secrets must be a list, not 'abc'"),
        ("target.pull_secrets=[1]", "pull_secrets.0 must be str, not 1"),
        ("target.node_selector={a.b/c: true}", "node_selector.a.b/c must be str, not True"),
        ("target.groups={cpu: {node_selector: {a: true}}}", "groups.cpu.node_selector.a must be str, not True"),
        ("target.groups.cpu=abc", "groups.cpu must be a dict, not 'abc'"),
        ("target.groups.cpu.nodes=two", "groups.cpu.nodes must be int, not 'two'"),
        ("target.head.gpus=1", "head.gpus is no setting"),
        ("target.memory=lots", "target.memory=lots: a size is expected, as 32GiB"),
        ("target.object_store=-0.5", "target.object_store=-0.5 leaves nothing"),
        ("target.volumes={a: 3}", "volumes.a must be str, not 3"),
    ]:
        assert latentmill("submit", file, "--to", "kuberay", "--dry-run", IMAGE, word) == 2, word
        assert says in latentmill.err and len(latentmill.err.splitlines()) == 1, latentmill.err
    words = ("target.groups.cpu.memory=64000000000", "target.labels.commit=12e4567", "target.node_selector={gpu: 'y', at: '1e3'}")  # fmt: skip
    document = shown(latentmill, file, "kuberay", IMAGE, *words)
    assert document["metadata"]["labels"] == {"commit": "12e4567"}
    # As YAML's readers in Go have it, these are a number and a boolean, if they are not in quotes
    assert all(text in latentmill.out for text in ("'12e4567'", "'y'", "'1e3'"))


def test_a_variable_with_a_default_need_not_go_along_unless_it_is_set_here(latentmill, monkeypatch):
    file = job(SECRET.replace("${oc.env:ACME_TOKEN}", "${oc.env:NIX,a} \\${oc.env:NOR_THIS}"))
    shown(latentmill, file, "kuberay", IMAGE)
    monkeypatch.setenv("NIX", "b")
    assert latentmill("submit", file, "--to", "kuberay", "--dry-run", IMAGE) == 2
    assert "the job needs NIX of its environment" in latentmill.err


@pytest.mark.skipif(not shutil.which("pgrep"), reason="needs procps")
def test_a_node_waits_for_workers_and_not_for_rays_agents(latentmill):
    document = shown(latentmill, job(JOBS["cpu"]), "kuberay", IMAGE)
    spec = document["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    hook = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    mine = f"ray{os.getpid()}::"  # others may run Ray on this machine
    hook = [word.replace("ray::", mine) for word in hook]
    started = []

    def start(title):
        started.append(subprocess.Popen(["bash", "-c", f"exec -a {mine}{title} sleep 60"]))

    try:
        for title in ("IDLE", "IDLE_SpillWorker", "DashboardAgent", "RuntimeEnvAgent"):
            start(title)
        assert subprocess.run(hook, timeout=20).returncode == 0
        start("Worker.work")
        with subprocess.Popen(hook) as waiting:
            with pytest.raises(subprocess.TimeoutExpired):
                waiting.wait(1.5)
            started[-1].kill()
            started[-1].wait()
            assert waiting.wait(20) == 0
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_what_of_an_autoscaled_cluster_is_said_to_ray(latentmill):
    cluster = shown(latentmill, job(JOBS["cpu"]), "kuberay", IMAGE, "target.max_nodes=2")["spec"]["rayClusterSpec"]
    assert cluster["workerGroupSpecs"][0]["rayStartParams"]["num-cpus"] == "8"
    container = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert cluster["autoscalerOptions"]["securityContext"] == container["securityContext"]
