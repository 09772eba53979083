"""Bytes between stages are bounded, whatever the batches are and however slow a stage is."""

import pytest
from tests.driver_world import World, state

from latentmill.driver.messages import Dispatch, Finished

LATENT, PICTURE, FILE = 64 * 1024, 3 * 1024 * 1024, 400 * 1024
"""Bytes of a row behind denoise, behind decode (1024 x 1024), and behind write."""
SIZES = {0: 200, 1: 2000, 2: LATENT, 3: PICTURE, 4: FILE}


class Weighed(World):
    """Knows how large blocks are; decode is ten times slower than what is before it, or write than decode."""

    def __init__(self, *args, slow, **settings):
        super().__init__(*args, **settings)
        self.slow, self.peak = slow, 0

    def pick(self):
        others = [
            i for i, order in enumerate(self.orders) if not (isinstance(order, Dispatch) and order.stage == self.slow)
        ]
        return self.random.choice(others) if others and self.random.random() < 0.95 else 0

    def carry_out(self, order):
        event = super().carry_out(order)
        if isinstance(event, Finished) and order.task != "commit":
            event = Finished(event.id, event.tables, event.rejected, SIZES[order.stage] * len(order.rows))
        return event

    def check_bounds(self):
        self.peak = max(self.peak, self.state.bytes_held)


@pytest.mark.parametrize("slow", [3, 4])
@pytest.mark.parametrize("cap", [1_000_000, 64_000_000, 256_000_000])
def test_no_more_is_between_stages_than_may_be_and_a_batch_a_worker(cap, slow):
    sizes, replicas = (64, 32, 16, 16, 32), (1, 1, 4, 4, 2)
    world = Weighed(
        state(rows=3000, rows_per_shard=500, sizes=sizes, replicas=replicas, max_bytes_in_flight=cap), seed=3, slow=slow
    ).run()
    assert len(world.ok()) == 3000
    assert world.peak <= cap + PICTURE * 16 * 4
    if slow == 4 and cap > 100_000_000:  # and it is used
        assert world.peak > cap / 2


def test_without_a_bound_it_is_more():
    sizes, replicas = (64, 32, 16, 16, 32), (1, 1, 4, 4, 2)
    world = Weighed(state(rows=3000, rows_per_shard=500, sizes=sizes, replicas=replicas), seed=3, slow=4).run()
    assert world.peak > 300_000_000
