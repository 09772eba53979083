"""Who may enter a cluster that we start, and what a job must not bring out."""

import os
import stat
import subprocess
import sys

START = """
import os, sys
from latentmill import pool
assert pool.connect(None)
import ray
print(ray.get_runtime_context().gcs_address, ray._private.worker._global_node.webui_url or "none", flush=True)
sys.stdin.read()
pool.disconnect()
"""
ENTER = """
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    print("in", len(GcsClient(address=sys.argv[1]).internal_kv_keys(b"", None)) > 0)
except AuthenticationError:
    print("refused")
"""


def test_a_cluster_that_we_start_lets_in_whoever_has_the_token_and_shows_no_dashboard(tmp_path):
    unset = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment = {**unset, "HOME": str(tmp_path)}
    driver = subprocess.Popen(
        [sys.executable, "-c", START], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        address, dashboard = driver.stdout.readline().split()
        assert dashboard == "none"
        token = tmp_path / ".ray" / "auth_token"
        assert stat.S_IMODE(token.stat().st_mode) == 0o600 and len(token.read_text()) == 64

        def enter(**other):
            command = [sys.executable, "-c", ENTER, address]
            return subprocess.run(command, env={**environment, **other}, capture_output=True, text=True).stdout.split()

        assert enter(RAY_AUTH_MODE="token") == ["in", "True"]
        assert enter(RAY_AUTH_MODE="disabled") == ["refused"]
        assert enter(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64) == ["refused"]
    finally:
        driver.communicate("")
    assert driver.returncode == 0
