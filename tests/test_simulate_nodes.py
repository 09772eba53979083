"""The simulator finds what is wrong with how workers follow nodes, in the worlds whose nodes come and go."""

import random

import pytest
from tests.simulation.seeds import trial
from tests.simulation.settings import Settings

from latentmill.driver import failures, replicas
from latentmill.driver.state import DriverState


def a_place_never_given_back(monkeypatch):
    """Nodes go, and workers that are too many for those that are left keep their places, though others have none."""
    change = replicas._change
    monkeypatch.setattr(replicas, "_change", lambda state, counts: change(state, [*map(max, counts, state.targets)]))
    return "not finished after"


def a_stage_that_never_starts_again(monkeypatch):
    """A worker that goes with its node is not replaced where its type may have fewer."""
    start = DriverState.start_worker

    def starts(state, worker_type):
        if state.worker_types[worker_type].fewest is None or state.next_worker < 12:
            start(state, worker_type)

    monkeypatch.setattr(DriverState, "start_worker", starts)
    return "('workers "


def a_node_s_end_counted_as_its_workers_failure(monkeypatch):
    replace = failures._replace_worker

    def counts(state, worker_type, worker, deaths, reason):
        stages = state.worker_types[worker_type].stages
        replace(state, worker_type, worker, deaths or {stage: {-state.next_worker} for stage in stages}, reason)

    monkeypatch.setattr(failures, "_replace_worker", counts)
    return "nothing but nodes came and went, and the job ends"


def room_that_came_is_not_used(monkeypatch):
    """Nodes come, and nobody starts more workers."""
    monkeypatch.setattr(replicas, "_follow", lambda state: None)
    return "there is room for all workers"


def nodes_come_and_go(seed):
    return any(hosts.fewest for hosts in Settings.draw(random.Random(seed)).worker_types)


PLANTED = {
    a_place_never_given_back: 10,
    a_stage_that_never_starts_again: 10,
    a_node_s_end_counted_as_its_workers_failure: 180,
    room_that_came_is_not_used: 3,
}
"""With the seed that finds each soonest."""


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant, monkeypatch):
    """Where a change to the driver made its seed's world another, one of all the others finds it."""
    says = plant(monkeypatch)
    seeds = (PLANTED[plant], *range(200))
    found = (wrong for seed in filter(nodes_come_and_go, seeds) if (wrong := trial(seed)))
    assert any(says in wrong for wrong in found), "not found"
