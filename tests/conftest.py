"""What tests of several modules share: an S3 server, what happens at failpoints, and which files come first."""

import os
import urllib.request
from pathlib import Path

import pytest

FAILPOINTS = str(Path(__file__).parent / "faults" / "actions")
# Processes that tests start find there what is to happen at a failpoint.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [FAILPOINTS, os.environ.get("PYTHONPATH")]))

SLOW = (
    "test_run", "test_driver_faults", "test_suites", "test_denoiser", "test_worker_faults", "test_pipeline", "test_wait_and_grow",
    "test_soak", "test_store_faults", "test_cluster", "test_drain", "test_parity", "test_tiers", "test_multistep_settings",
    "test_stores", "test_pool", "test_scheduler_settings", "test_ray_drains", "test_vae", "test_folder", "test_accept_rows",
    "test_parity_schedulers", "test_sweep_workers", "test_operations", "test_blame", "test_command_line", "test_exports",
    "test_simulate", "test_gpu_benchmark", "test_traced", "test_schedulers", "test_accept", "test_jobs", "test_store_reading",
    "test_drivers", "test_original", "test_grow_drivers", "test_safety", "test_cli", "test_wheel", "test_export_texts",
    "test_shard_index", "test_job", "test_parity_pictures", "test_long_prompts", "test_telling", "test_prompt_files", "test_push",
    "test_kuberay", "test_wrong_worker", "test_mixed_rows", "test_sweep", "test_replicas", "test_halfway", "test_prompt_cache",
    "test_submit_targets", "test_model", "test_models", "test_our_sources_and_sinks", "test_fields", "test_webdataset",
    "test_grow",
)  # fmt: skip
"""Files that take longest, the longest first. Three processes share the files: one of these last would leave others idle for minutes."""


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(SLOW)}
    items.sort(key=lambda item: place.get(item.path.stem, len(SLOW)))


@pytest.fixture(scope="session")
def forks():
    """See tests.faults.forks."""
    from tests.faults.forks import Forks

    server = Forks()
    yield server
    server.close()


@pytest.fixture
def bucket(monkeypatch):
    """The URL of an empty bucket on a server of its own; the environment says where it is and who may enter."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    for path, method in (("moto-api/reset", "POST"), ("bucket", "PUT")):  # what it stores outlives it in the process
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{path}", method=method))
    yield "s3://bucket"
    server.stop()
