"""Ray's side: a real Ray, workers that die, jobs that don't fit."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from tests import ray_forks

import latentmill
from latentmill.driver.decide import decide
from latentmill.driver.loop import drive
from latentmill.driver.messages import Died, Dispatch, HandOver, NodesSeen, StageSpec, Started, StartWorker, WorkerType
from latentmill.driver.state import DriverState
from latentmill.errors import PlacementError, RunError, UnreachableError
from latentmill.plugin import Stage, tensors
from latentmill.workers import ray_pool
from latentmill.workers.cluster import _require_ray, connect
from latentmill.workers.left import LeftWorkers
from latentmill.workers.node_folder import node_folder
from latentmill.workers.nodes import check_placement
from latentmill.workers.places import Places
from latentmill.workers.worker import StageWork, WorkerSetup


class Read(Stage):
    contract = 2

    def __call__(self, batch, reject):
        return tensors.with_tensor(batch, "latents", torch.ones(len(batch), 4, 8, 8))


class Double(Stage):
    """Doubles latents; its process dies at the row `kill`, hangs at `hangs`, raises at `raises`, and it rejects `rejects`."""

    contract = 2

    def __init__(self, kill=-1, raises=-1, rejects=-1, hangs=-1):
        self.kill, self.raises, self.rejects, self.hangs = kill, raises, rejects, hangs

    def __call__(self, batch, reject):
        numbers = batch.column("row").to_pylist()
        if self.kill in numbers:
            os._exit(1)
        while self.hangs in numbers:
            time.sleep(1)
        if self.raises in numbers:
            raise RuntimeError("no such luck")
        if self.rejects in numbers:
            reject(numbers.index(self.rejects), "not wanted")
            batch = batch.filter(pa.array([number != self.rejects for number in numbers]))
        return tensors.with_tensor(batch, "latents", tensors.from_arrow(batch, "latents") * 2)


class Forgets(Stage):
    contract = 2

    def __call__(self, batch, reject):
        return batch.slice(1)


class Broken(Stage):
    contract = 2

    def load(self, device):
        raise FileNotFoundError("weights.safetensors is not there")

    def __call__(self, batch, reject):
        return batch


class Write(Stage):
    """Commits into a folder: the rows and the sum of their latents."""

    contract = 2

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, batch, reject):
        return batch

    def commit(self, shard, packed, errors):
        rows = {
            n: t.sum().item() for p in packed for n, t in zip(p["row"].to_pylist(), tensors.from_arrow(p, "latents"))
        }
        failed = {error["row"]: error["reason"] for error in errors}
        (self.folder / f"{shard}").write_text(repr((rows, failed)))
        return True


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with (
        pytest.MonkeyPatch.context() as environment
    ):  # for the stages below: the working directory is on no worker's path
        environment.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        there = ray_forks.Cluster(num_cpus=2, num_gpus=2)
    try:
        connect(there.address)
        yield there
    finally:
        there.shutdown()


def run(folder, double, rows=24, replicas=2, timeout=None):
    work = [
        WorkerSetup((StageWork("read", Read),), num_cpus=0.1),
        WorkerSetup((StageWork("double", double, timeout=timeout),), replicas, num_cpus=0.1),
        WorkerSetup((StageWork("write", partial(Write, folder)),), num_cpus=0.1),
    ]
    specs = (StageSpec("read", 6), StageSpec("double", 4), StageSpec("write", 4))
    types = (WorkerType((0,)), WorkerType((1,), replicas), WorkerType((2,)))
    workers = ray_pool.RayPool(work)
    try:
        drive(DriverState(specs, rows, rows_per_shard=12, worker_types=types), workers, lambda: None)
    finally:
        workers.close()
    done = [eval(path.read_text()) for path in sorted(folder.iterdir())]
    return {k: v for rows, _ in done for k, v in rows.items()}, {k: v for _, failed in done for k, v in failed.items()}


def test_rows_go_through_and_each_ends_once(tmp_path):
    rows, failed = run(tmp_path, Double)
    assert rows == {row: 512.0 for row in range(24)} and not failed


def test_a_row_that_raises_is_found_and_the_others_of_its_batch_arrive(tmp_path):
    rows, failed = run(tmp_path, partial(Double, raises=5, rejects=9))
    assert failed == {5: "RuntimeError: no such luck", 9: "not wanted"}
    assert rows == {row: 512.0 for row in range(24) if row not in (5, 9)}


def test_a_worker_that_dies_is_replaced_and_the_row_that_kills_it_is_found(tmp_path):
    rows, failed = run(tmp_path, partial(Double, kill=7))
    assert list(failed) == [7] and "worker died" in failed[7]
    assert rows == {row: 512.0 for row in range(24) if row != 7}


def test_a_worker_that_hangs_is_replaced_and_the_row_at_which_it_does_is_found(tmp_path):
    rows, failed = run(tmp_path, partial(Double, hangs=7), timeout=1.5)
    assert failed == {7: "its worker died: it finished nothing for 1.5 s (stages.double.timeout)"}
    assert rows == {row: 512.0 for row in range(24) if row != 7}


class Slow(Double):
    def __call__(self, batch, reject):
        time.sleep(0.3)
        return super().__call__(batch, reject)


def test_workers_fill_the_room_that_there_is_and_one_is_there_at_first(tmp_path):
    """Two CPUs, of which 0.2 are taken: there is room for two workers of 0.8."""
    work = [
        WorkerSetup((StageWork("read", Read),), num_cpus=0.1),
        WorkerSetup((StageWork("double", Slow),), None, num_cpus=0.8),
        WorkerSetup((StageWork("write", partial(Write, tmp_path)),), num_cpus=0.1),
    ]
    types = tuple(WorkerType((stage,), setup.replicas, setup.asks) for stage, setup in enumerate(work))
    state = DriverState(tuple(StageSpec(name, 1) for name in ("read", "double", "write")), 40, 8, worker_types=types)
    workers = ray_pool.RayPool(work)
    found = [state.targets]
    try:
        drive(state, workers, lambda: found.append(state.targets))
    finally:
        workers.close()
    assert [1, 1, 1] in found and found[-1][1] == 2 and max(counts[1] for counts in found) == 2
    assert len([path for path in tmp_path.iterdir()]) == 5


class Waits(Read):
    """Says that it has begun, and reads as soon as ``folder/go`` is there."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, batch, reject):
        (self.folder / "begun").touch()
        while not (self.folder / "go").exists():
            time.sleep(0.01)
        return super().__call__(batch, reject)


def test_the_order_to_hand_over_waits_for_no_batch_and_all_that_wait_come_back(tmp_path):
    """Small batches may be more than there are threads: whoever stops has seconds, and a batch may take minutes."""
    workers = ray_pool.RayPool([WorkerSetup((StageWork("read", partial(Waits, tmp_path), calls=2),), num_cpus=0.1)])
    came, end = [], time.monotonic() + 30

    def until(count):
        came.extend(workers.collect(timeout=0.1))
        while len(came) < count and time.monotonic() < end:
            came.extend(workers.collect(timeout=0.5))
        assert len(came) == count, came

    try:
        workers.submit(StartWorker(0, 0))
        until(1)
        for id in range(6):
            workers.submit(Dispatch(id, "read", 0, 0, [id]))
        while not (tmp_path / "begun").exists():
            until(1)
        workers.submit(HandOver(0))
        until(6)
        assert all((event.tables, event.begun) == (None, False) for event in came[1:])
        (tmp_path / "go").touch()
        until(7)
        assert came[6].tables and {event.id for event in came[1:]} == {*range(6)}
    finally:
        workers.close()


def test_workers_that_a_run_leaves_are_taken_over_where_they_are():
    """Of those whose number is found one has a place of its own. Who asks for something else gets new ones, and those that were left end."""
    left, actors, setup = LeftWorkers(), [], WorkerSetup((StageWork("read", Read),), None, num_cpus=0.5)
    for setups, leave in ([setup], True), ([setup], True), ([replace(setup, num_cpus=0.6)], False):
        workers = ray_pool.RayPool(setups, left=left, wait=20)
        try:
            assert len(left.workers) == (3 if len(actors) == 1 else 0)
            for worker in range(3):
                workers.submit(StartWorker(0, worker))
            events, until = [], time.monotonic() + 60
            while len(events) < 3 and time.monotonic() < until:
                events += [event for event in workers.collect(timeout=1) if isinstance(event, Started)]
            assert not left.workers and len(events) == 3
            actors.append({actor._actor_id for actor in workers.actors.values()})
        finally:
            workers.close(leave)
        if leave:
            assert [each.place is not None for each in left.workers].count(True) == 1
    assert actors[0] == actors[1] and not actors[1] & actors[2] and not left.workers


def test_one_that_was_left_and_has_died_meanwhile_is_replaced_as_if_it_had_not_been():
    left, setup = LeftWorkers(), WorkerSetup((StageWork("read", Read),), num_cpus=0.5)
    for number in range(2):
        workers = ray_pool.RayPool([setup], left=left, wait=20)
        try:
            workers.submit(StartWorker(0, 0))
            events = []
            while not events:
                events = [event for event in workers.collect(timeout=1) if not isinstance(event, NodesSeen)]
            assert [type(event) for event in events] == [Started]
        finally:
            workers.close(leave=not number)
        for each in left.workers:
            ray.kill(each.worker)


def test_one_more_that_cannot_start_is_told_of_and_keeps_no_place(tmp_path, caplog):
    """The job can do without it, and another job may want its place."""
    make = partial(_unless_there, tmp_path / "broken")
    workers = ray_pool.RayPool([WorkerSetup((StageWork("read", make),), 2, num_cpus=0.5, min_replicas=1)], wait=20)
    try:
        assert _started(workers, 0) == [0]
        (tmp_path / "broken").touch()
        workers.submit(StartWorker(0, 1))
        assert len(workers.places.groups) == 2
        events = []
        while not events:
            events = [event for event in workers.collect(timeout=1) if isinstance(event, Died)]
        assert [(event.worker, event.at_start) for event in events] == [(1, True)]
        assert len(workers.places.groups) == 1 and [*workers.places.taken] == [0]
    finally:
        workers.close()
    assert [record.message for record in caplog.records if "one more worker of read could not start" in record.message]


def _unless_there(path):
    if path.exists():
        raise RuntimeError("no room on the GPU")
    return Read()


def _started(workers, *numbers):
    """Those of these that are ready before long, once they are asked for."""
    for worker in numbers:
        workers.submit(StartWorker(0, worker))
    events, until = [], time.monotonic() + 20
    while len(events) < len(numbers) and time.monotonic() < until:
        events += [event for event in workers.collect(timeout=1) if isinstance(event, Started)]
    return sorted(event.worker for event in events)


def test_who_is_left_and_not_asked_for_ends_and_nobody_is_sent_to_its_place(cluster):
    """After a while, or with the run. Where Ray itself ends with the run, it leaves nobody."""
    left, setup = LeftWorkers(), WorkerSetup((StageWork("read", Read),), 2, num_cpus=0.5, min_replicas=1)
    for asked, late, stay in ([0, 1], [], 2), ([0], [1], 2), ([0], [], 1), ([0, 1], [], 0):
        workers = ray_pool.RayPool([setup], owns_cluster=not stay, left=left, wait=20)
        try:
            assert _started(workers, *asked) == asked
            if late:
                workers.left.until = 0.0
                workers.collect(timeout=0)
                assert not left.workers and _started(workers, *late) == late
        finally:
            workers.close(leave=True)
        assert len(left.workers) == stay
    connect(cluster.address)


def test_a_worker_that_is_not_ready_for_long_is_told_of_once(caplog):
    workers = ray_pool.RayPool([WorkerSetup((StageWork("read", Read),), num_cpus=0.1)])
    try:
        workers.submit(StartWorker(0, 0))
        [worker] = workers.asked
        workers.asked[worker] -= ray_pool.PATIENCE
        for _ in range(2):
            assert workers.collect(timeout=0) == []
    finally:
        workers.close()
    said = [record.message for record in caplog.records if record.name == "latentmill"]
    assert said == ["a worker of read has not been ready for 60 s; is there a place for it?"]


def test_one_that_waits_for_the_place_of_one_that_leaves_is_not_given_up(caplog):
    """Its node is drained, and it has a long batch still."""
    workers = ray_pool.RayPool([WorkerSetup((StageWork("read", Read),), num_cpus=2)])
    try:
        workers.submit(StartWorker(0, 0))
        [ready] = workers.collect(timeout=30)
        workers.drained.told.add(ready.worker)
        workers.submit(StartWorker(0, 1))
        workers.asked[1] -= 2 * ray_pool.PATIENCE + 5 * ready.seconds
        assert workers.collect(timeout=0) == [] and 1 in workers.actors
    finally:
        workers.close()
    assert not [record for record in caplog.records if "could not start" in record.message]


def test_a_stage_that_loses_rows_without_a_reason_is_found_out(tmp_path):
    """It is the stage that is broken, and not its rows: the job ends, and condemns none of them."""
    with pytest.raises(
        RunError, match="stage double: stage Forgets was given .* each row must come back once or be rejected"
    ):
        run(tmp_path, Forgets)
    assert not list(tmp_path.iterdir())


def test_a_stage_that_cannot_start_ends_the_job_with_its_reason(tmp_path):
    with pytest.raises(RunError, match="stage double can't start: .*weights.safetensors is not there"):
        run(tmp_path, Broken)


def test_a_job_that_has_no_place_says_which_stage_asks_for_what_and_what_there_is():
    works = [
        WorkerSetup((StageWork("encode", Double),), num_cpus=1),
        WorkerSetup((StageWork("denoise", Double),), 3, num_cpus=1, num_gpus=1),
    ]
    nodes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0}]
    with pytest.raises(
        PlacementError,
        match=r"denoise asks for 3 x \(CPU 1, GPU 1\), which do not fit beside .* CPU 8, GPU 2; CPU 4, GPU 0",
    ):
        check_placement(works, nodes)
    check_placement(works, [*nodes, {"CPU": 1.0, "GPU": 1.0}])
    with pytest.raises(PlacementError, match="denoise asks for .* fit on no node"):
        check_placement([WorkerSetup((StageWork("denoise", Double),), accelerator_type="H100", num_gpus=1)], nodes)


class Sees(Stage):
    """Writes down which GPUs its process is shown."""

    contract = 2

    def __init__(self, folder):
        self.folder = folder

    def load(self, device):
        self.seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        (self.folder / str(os.getpid())).write_text(f"{device} {self.seen}")

    def __call__(self, batch, reject):
        return batch


def test_a_worker_sees_only_its_own_gpu(tmp_path):
    workers = ray_pool.RayPool(
        [WorkerSetup((StageWork("denoise", partial(Sees, tmp_path), gpu=True),), 2, num_cpus=0.1, num_gpus=1)]
    )
    try:
        for order in decide(DriverState((StageSpec("denoise", 1),), 0, 1, worker_types=(WorkerType((0,), 2),))):
            workers.submit(order)
        events = []
        while len(events) < 2:
            events += workers.collect(timeout=5)
    finally:
        workers.close()
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["cuda 0", "cuda 1"]


class Comes(Stage):
    """Notes whether a process had left its device before this one loads."""

    contract = 2

    def __init__(self, folder):
        self.folder = folder

    def load(self, device):
        (self.folder / "loaded").write_text(str((self.folder / "left").exists()))

    def __call__(self, batch, reject):
        return batch


STAYS = """
import pathlib, sys
from latentmill.workers.devices import wait_for
wait_for(sys.argv[1], ["GPU 0", "GPU 1"], 1.0)
print(flush=True)
sys.stdin.read()
pathlib.Path(sys.argv[2], "left").write_text("")
"""


def test_a_worker_loads_nothing_before_the_process_is_gone_that_had_its_gpu(tmp_path):
    """Ray gives it the GPU, as it does while a process ends that it has given up."""
    node = ray.get_runtime_context().get_node_id()
    command = [sys.executable, "-c", STAYS, node, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as before:
        assert before.stdout.readline()
        setup = WorkerSetup((StageWork("denoise", partial(Comes, tmp_path)),), num_cpus=0.1, num_gpus=1)
        workers = ray_pool.RayPool([setup])
        try:
            workers.submit(StartWorker(0, 0))
            while not any(len(file.read_text().splitlines()) > 1 for file in node_folder("devices").glob(f"{node}-*")):
                assert not workers.collect(timeout=0.1)
            before.stdin.close()
            while not (events := workers.collect(timeout=5)):
                pass
        finally:
            workers.close()
    assert isinstance(events[0], Started) and (tmp_path / "loaded").read_text() == "True"


def test_a_job_joins_the_cluster_at_its_address_and_leaves_it_running(tmp_path, cluster, monkeypatch):
    """Relative paths mean the driver's folder, wherever the cluster was started."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red star on a white background\n" * 3)
    settings = ["cluster=ray", f"cluster.address={cluster.address}", "sampling.steps=1", "samples_per_row=1"]
    result = latentmill.run("txt2img", [*settings, "source.path=prompts.txt", "output=out"])
    assert (result.ok, result.failed) == (3, 0) and Path("out/_SUCCESS").exists()
    assert ray.is_initialized() and ray.cluster_resources()["CPU"] == 2


def test_a_job_that_does_not_fit_is_refused_with_nothing_written(tmp_path):
    with pytest.raises(PlacementError, match="stage denoise asks for 1 x"):
        latentmill.run("txt2img", ["stages.denoise.num_gpus=3", f"output={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_an_address_at_which_nobody_answers_is_told_at_once(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(UnreachableError, match=f"nobody answers at cluster.address=127.0.0.1:{port}"):
        _require_ray(f"127.0.0.1:{port}")


def test_a_place_that_is_there_is_not_given_away_for_one_that_is_waited_for():
    """Of two places one has no room, since another job has it. The worker at the other dies: its place is for who comes next."""
    setup = WorkerSetup((StageWork("double", Double),), replicas=2, min_replicas=1, num_cpus=1)
    other = placement_group([{"CPU": 1}])
    assert other.wait(10)
    there = Places([setup], str)
    try:
        there.take(0, 0)
        there.take(0, 1)
        [place] = [there.taken[0]]
        there.give_back(0, starting={1})
        there.take(0, 2)
        assert there.taken[2] == place and there.taken[1] != place
        there.give_back(1, starting={1})
        assert list(there.groups) == [place]
    finally:
        there.close()
        remove_placement_group(other)
