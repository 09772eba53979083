"""The dashboard's metrics are those that are exported. By hand, PROMETHEUS=1 (Debian: prometheus): a real Prometheus scrapes a real Ray."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request

import pytest
from tests import ray_forks

import latentmill as package
from latentmill.metrics import METRICS, RAY_PREFIX

PLUGIN = '''
import os, time
from pathlib import Path
from latentmill.plugin import Stage

class Troubled(Stage):
    """Takes a second a row; its process ends once, memory runs out once, and a row fails."""
    contract = 2

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def __call__(self, batch, reject):
        if not (self.folder / "died").exists():
            (self.folder / "died").touch()
            os._exit(1)
        if len(batch) > 2:
            raise MemoryError("too many")
        time.sleep(len(batch))
        if 5 in batch.column("row").to_pylist():
            reject(batch.column("row").to_pylist().index(5), "not this one")
            batch = batch.filter([number != 5 for number in batch.column("row").to_pylist()])
        return batch
'''


def queries(latentmill):
    """Each query of the dashboard, of which ``$job`` is any."""
    assert latentmill("top", "--dashboard") == 0
    found = [target["expr"] for panel in json.loads(latentmill.out)["panels"] for target in panel["targets"]]
    return [query.replace("$job", ".*").replace("$__rate_interval", "20s") for query in found]


def test_a_metric_is_in_the_dashboard_and_the_reverse(latentmill):
    asked = {name for query in queries(latentmill) for name in re.findall(r"\w+", query) if name.startswith(RAY_PREFIX)}
    assert asked == {RAY_PREFIX + metric.name for metric in METRICS}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.skipif(not os.environ.get("PROMETHEUS"), reason="PROMETHEUS=1 scrapes a real Ray, for a minute")
@pytest.mark.skipif(not shutil.which("prometheus"), reason="there is no prometheus")
def test_a_real_prometheus_answers_each_query_of_the_dashboard(latentmill, install, tmp_path, monkeypatch):
    install("acme", "[latentmill.stages]\ntroubled = acme:Troubled\n", acme=PLUGIN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ["PYTHONPATH"]]))
    metrics, web = free_port(), free_port()
    there = ray_forks.Cluster(num_cpus=2, metrics_export_port=metrics, include_dashboard=True)
    scrape = {"job_name": "ray", "scrape_interval": "2s", "static_configs": [{"targets": [f"127.0.0.1:{metrics}"]}]}
    (tmp_path / "prometheus.yml").write_text(json.dumps({"scrape_configs": [scrape]}))
    command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/tsdb"]
    server = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{web}"], stderr=subprocess.DEVNULL)

    def ask(query):
        words = urllib.parse.urlencode({"query": query})
        with urllib.request.urlopen(f"http://127.0.0.1:{web}/api/v1/query?{words}") as answer:
            return json.load(answer)["data"]["result"]

    (tmp_path / "prompts.txt").write_text("a red circle\n" * 40)
    flow = f"flow=[read,encode,denoise,{{name: troubled, folder: '{tmp_path}'}},decode,write]"
    words = [flow, "samples_per_row=1", "sampling.steps=2", "stages.troubled.batch_size=4", "max_error_rate=1"]
    words += [f"source.path={tmp_path}/prompts.txt", f"output={tmp_path}/out", "placement=split", "rows_per_shard=4"]
    words += [f"stages.{name}.num_cpus=0.1" for name in ("read", "encode", "denoise", "troubled", "decode", "write")]
    words += ["cluster=ray", f"cluster.address={there.address}", "stages.troubled.replicas=1"]
    job = threading.Thread(target=package.run, args=("txt2img", words))
    try:
        job.start()
        wanted, answered, actors = queries(latentmill), {}, ""
        while job.is_alive():
            time.sleep(2)
            for query in wanted:
                try:
                    if found := ask(query):
                        answered[query] = [each["metric"] | {"value": each["value"][1]} for each in found]
                except OSError:  # it is not there yet
                    pass
            if answered and not actors:
                listing = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "list", "actors"]
                actors = subprocess.run([*listing, "--address", there.address], capture_output=True, text=True).stdout
        for query, found in answered.items():
            print(query, json.dumps(found), sep="\n  ")
        print(actors)
        assert [query for query in wanted if query not in answered] == [each for each in wanted if "_gpu_" in each]
        assert re.search(r"txt2img/troubled-1@\w{6}", actors)
    finally:
        job.join()
        server.terminate()
        server.wait()
        there.shutdown()
