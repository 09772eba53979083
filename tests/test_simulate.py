"""The simulator: our flow passes, and bugs planted on purpose don't."""

import pytest

from latentmill import flow, simulate
from latentmill.leases import Leases
from latentmill.simulate import Store, World, trial
from latentmill.stages import write

SEEDS = range(200)


def test_every_seed_ends_with_every_row_once():
    assert [(seed, wrong) for seed in SEEDS if (wrong := trial(seed))] == []


def test_a_seed_is_the_same_story_each_time():
    stories = [[], []]
    for story in stories:
        World(18, story.append).run()
    assert stories[0] == stories[1] and len(stories[0]) > 4


def commit_before_verify(monkeypatch):
    """A file has its name, and then is looked at."""

    def publish(store, name, write, check):
        with store.aside(name) as temporary:
            write(temporary)
            first = store.create(name, temporary)
            check(temporary)
        return first

    monkeypatch.setattr(write, "publish", publish)
    return "is not whole"


def an_acknowledgement_lost(monkeypatch):
    """A worker that died while it committed is taken for one that had."""
    again = flow._again

    def forgets(state, dispatch, attempts):
        if dispatch.kind != "commit":
            again(state, dispatch, attempts)

    monkeypatch.setattr(flow, "_again", forgets)
    return "not finished after"


def a_lease_trusted(monkeypatch):
    """Whoever has the lease need not ask whether the name is free."""

    def create(self, name, content):
        if name.startswith("leases/"):
            return honest(self, name, content)
        self.publish(name, content if isinstance(content, bytes) else self.temporary[content])
        return True

    honest = Store.create
    monkeypatch.setattr(Store, "create", create)
    return "was there, and is another now"


def half_of_a_batch_forgotten(monkeypatch):
    """A batch that failed twice is split into halves that leave out its last row."""
    cut = flow._slice
    monkeypatch.setattr(
        flow, "_slice", lambda pieces, side: cut(pieces, slice(side.start, side.stop and max(side.stop - 1, 0)))
    )
    return "was promised rows"


def a_block_released_too_early(monkeypatch):
    """As soon as some of its rows are not needed any more."""

    def drop(state, piece):
        if state.blocks.pop(piece.block, None):
            state.released.append(piece.block)

    monkeypatch.setattr(flow, "_drop", drop)
    return "is wanted, and was released"


def rows_of_a_lost_commit_forgotten(monkeypatch):
    """A node took packed rows with it; the shard is committed with what is left."""
    lost = flow._lost

    def forgets(state, dispatch, reason):
        if dispatch.kind == "commit":
            state.shards[dispatch.shard].packed = []
            state.shards[dispatch.shard].committing = False
        else:
            lost(state, dispatch, reason)

    monkeypatch.setattr(flow, "_lost", forgets)
    return "places"


def a_lease_given_back_that_is_another_s(monkeypatch):
    """Harmless, as far as rows go: leases save work, and decide nothing."""

    def keep(self, shards):
        for shard in self.held - shards:
            self.store.delete(f"leases/{shard:05d}")
        self.held &= shards

    monkeypatch.setattr(Leases, "keep", keep)
    return None


@pytest.mark.parametrize(
    "plant",
    [
        commit_before_verify,
        an_acknowledgement_lost,
        a_lease_trusted,
        half_of_a_batch_forgotten,
        a_block_released_too_early,
        rows_of_a_lost_commit_forgotten,
    ],
    ids=lambda plant: plant.__name__,
)
def test_a_planted_bug_is_found(plant, monkeypatch):
    says = plant(monkeypatch)
    found = (wrong for seed in SEEDS if (wrong := trial(seed)))
    assert any(says in wrong for wrong in found), "not found"


def test_leases_decide_nothing(monkeypatch):
    a_lease_given_back_that_is_another_s(monkeypatch)
    assert not any(map(trial, range(60)))


def test_a_seed_that_fails_says_how_to_see_it_again(monkeypatch, capfd):
    a_block_released_too_early(monkeypatch)
    wrong = trial(4)
    monkeypatch.setattr(simulate.multiprocessing, "Pool", lambda: Here())
    assert simulate.main(["--seeds", "5"]) == 1
    told = capfd.readouterr().out
    assert f"seed 4: {wrong}\n    python -m latentmill.simulate --seed 4\n" in told
    with pytest.raises(Exception, match="released"):
        simulate.main(["--seed", "4"])


class Here:
    """multiprocessing.Pool would start processes without the planted bug."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def imap(self, function, values, chunksize):
        return map(function, values)
