"""A row's name and seed. Pinned: a change here changes every dataset that was ever begun."""

import hashlib

from latentmill.identity import row_id, row_seed


def hashed(text):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def test_a_row_s_name_is_its_place_and_its_sample():
    assert row_id(3, 1) == "000000003-001"


def test_the_seed_is_the_source_s_or_hangs_on_the_id_or_on_the_name():
    assert row_seed(5, "000000000-000", 0) == hashed("5/000000000-000") >> 1
    assert row_seed(5, "000000000-001", 1, id="cat") == hashed("5/id/001/cat") >> 1
    assert row_seed(5, "000000000-000", 0, given=2**64 - 1, id="cat") == 2**64 - 1
    assert row_seed(5, "000000000-001", 1, given=7) == hashed("7/1")


def test_seeds_of_rows_are_63_bits_and_all_different():
    seeds = {row_seed(0, row_id(*divmod(row, 2)), row % 2) for row in range(20)}
    assert len(seeds) == 20 and all(seed < 2**63 for seed in seeds)
