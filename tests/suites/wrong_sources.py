"""Sources, each with one mistake."""

import random

import numpy as np
import torch
from tests.suites.mistakes import Mistake, suite_of

from latentmill.plugin import CONTRACT, Fragment, RowError, Source
from latentmill.testing import SourceSuite

STORED = {
    "a": [{"prompt": f"fox {i}", "seed": i, "id": f"a{i}"} for i in range(4)],
    "b": [{"prompt": "hen", "id": "b0"}, None, {"prompt": "cow", "id": "b2"}],
}


class Right(Source):
    """Two fragments; the second has a bad row, and pictures."""

    contract = CONTRACT
    id_column = "id"

    def __init__(self, stored=STORED):
        self.stored = stored

    def fragments(self):
        return [Fragment(name, len(rows), str(rows)) for name, rows in self.stored.items()]

    def item(self, fragment, at):
        row = self.stored[fragment][at]
        if row is None:
            return RowError("it is damaged")
        return {**row, "image": np.full((2, 3, 3), at, np.uint8)} if fragment == "b" else dict(row)

    def read(self, fragment, start, stop):
        for at in range(start, stop):
            yield self.item(fragment, at)

    def texts(self, fragment):
        for row in self.stored[fragment.name]:
            yield (None, None) if row is None else (row["prompt"], None)


class IgnoresStart(Right):
    def read(self, fragment, start, stop):
        return super().read(fragment, 0, stop - start)


class BeginsAtTheBeginning(Right):
    def read(self, fragment, start, stop):
        return super().read(fragment, 0, stop)


class IgnoresStop(Right):
    def read(self, fragment, start, stop):
        return super().read(fragment, start, len(self.stored[fragment]))


class OneTooFew(Right):
    def read(self, fragment, start, stop):
        return super().read(fragment, start, stop - 1 if stop - start > 1 else stop)


class DropsBadRows(Right):
    def read(self, fragment, start, stop):
        return (row for row in super().read(fragment, start, stop) if not isinstance(row, RowError))


class OneTooMany(Right):
    def read(self, fragment, start, stop):
        yield from super().read(fragment, start, stop)
        yield self.item(fragment, stop - 1)


class Turns(Right):
    """Every other reading of the whole goes backwards."""

    readings = 0

    def read(self, fragment, start, stop):
        rows = list(super().read(fragment, start, stop))
        if stop - start == len(self.stored[fragment]):
            self.readings += 1
        return iter(rows[::-1] if self.readings % 3 == 2 and stop - start == len(self.stored[fragment]) else rows)


class Backwards(Right):
    def item(self, fragment, at):
        return super().item(fragment, len(self.stored[fragment]) - 1 - at)

    def texts(self, fragment):
        return iter([*super().texts(fragment)][::-1])


class Trims(Right):
    def item(self, fragment, at):
        row = super().item(fragment, at)
        return row if isinstance(row, RowError) else {**row, "prompt": row["prompt"][:3]}

    def texts(self, fragment):
        return iter(())


class Counts(Right):
    """Names rows as they are read."""

    number = 0

    def item(self, fragment, at):
        row = super().item(fragment, at)
        self.number += 1
        return row if isinstance(row, RowError) else {**row, "seed": self.number}


class Draws(Right):
    def item(self, fragment, at):
        row = super().item(fragment, at)
        return row if isinstance(row, RowError) else {**row, "seed": random.randrange(1 << 32)}


class Lends(Right):
    """Its own dicts."""

    def __init__(self):
        super().__init__({name: [row and dict(row) for row in rows] for name, rows in STORED.items()})

    def item(self, fragment, at):
        row = self.stored[fragment][at]
        return RowError("it is damaged") if row is None else row


class OneName(Right):
    id_column = None

    def fragments(self):
        return [Fragment("a", 4), Fragment("a", 4)]


class SetOfFragments(Right):
    def __init__(self):
        super().__init__({name: [{"prompt": name, "id": f"{name}{at}"} for at in range(3)] for name in "abcdefgh"})

    def fragments(self):
        return [Fragment(name, 3) for name in {*self.stored}]


class HashedFragments(Right):
    def fragments(self):
        return [Fragment(f.name, f.rows, str(hash(f.fingerprint))) for f in super().fragments()]


class ConstantFragments(Right):
    def fragments(self):
        return [Fragment(f.name, f.rows) for f in super().fragments()]


class AlwaysChanged(Right):
    def changed(self, fragment):
        return True


class NeverStill(Right):
    def still(self, fragment, runs):
        return False


class AlwaysStill(Right):
    def still(self, fragment, runs):
        return True


class OtherIds(Right):
    def ids(self, fragment):
        return iter([f"{fragment.name}{at + 1}" for at in range(fragment.rows)])


class SameIds(Right):
    def item(self, fragment, at):
        row = super().item(fragment, at)
        return row if isinstance(row, RowError) else {**row, "id": str(at)}


class OtherTexts(Right):
    def texts(self, fragment):
        return ((prompt and prompt.upper(), negative) for prompt, negative in super().texts(fragment))


class OtherSizes(Right):
    def sizes(self, fragment, start, stop):
        for row in self.read(fragment, start, stop):
            yield {"image": row["image"].shape[:2]} if isinstance(row, dict) and "image" in row else row


class FloatPicture(Right):
    def item(self, fragment, at):
        row = super().item(fragment, at)
        return {**row, "image": np.zeros((2, 3, 3))} if not isinstance(row, RowError) and at == 2 else row


class Cuda(Right):
    def fragments(self):
        torch.cuda.is_available()
        return super().fragments()


class NoContract(Source):
    stored, id_column, fragments, item = STORED, "id", Right.fragments, Right.item
    read, texts = Right.read, Right.texts


class Suite(SourceSuite):
    def expected(self):
        return [*STORED["a"], *STORED["b"]]


def source(what, plugin, caught_by, says, **settings):
    return Mistake(what, suite_of(Suite, plugin, **settings), set(caught_by.split()), says)


NAMES, COUNT, START = (
    "fragments_have_names_and_counts", "a_fragment_has_as_many_rows_as_it_says", "read_begins_at_start_and_ends_at_stop",
)  # fmt: skip
SAME, RANDOM, IDS, STORES = (
    "rows_are_the_same_whenever_they_are_read", "no_global_random_generator_is_used", "ids_and_texts_are_those_of_the_rows",
    "rows_are_what_was_stored",
)  # fmt: skip
PROCESS, GPU, PRINT, PLUGIN = (
    "another_process_finds_the_same", "building_and_asking_touch_no_gpu", "the_fingerprint_follows_the_weights",
    "it_is_a_plugin_of_this_contract",
)  # fmt: skip

MISTAKES = [
    source("ignores `start`", IgnoresStart, START, "read ignores start"),
    source("reads from the beginning to `stop`", BeginsAtTheBeginning, START, "read ignores start"),
    source("ignores `stop`", IgnoresStop, START, "read ignores stop"),
    source("one row too few", OneTooFew, f"{COUNT} {IDS} {START}", "read gives too few rows"),
    source("leaves out bad rows", DropsBadRows, f"{COUNT} {IDS} {START}", "read gives too few rows"),
    source("one row too many", OneTooMany, f"{COUNT} {IDS} {START}", "read gives too many rows"),
    source("another order at the second reading", Turns, SAME, "read changes the order of rows"),
    source("another order than is stored", Backwards, STORES, "read gives the rows in another order than they are stored in"),
    source("cuts prompts off", Trims, STORES, "read gives row 0 with other content than is stored"),
    source("numbers rows as they are read", Counts, SAME, "read changes the content of rows"),
    source("seeds of the module random", Draws, RANDOM, "read draws from the global random generator of random"),
    source("lends rows that it keeps", Lends, SAME, "read gives out rows that it keeps"),
    source("one name for two fragments", OneName, NAMES, "two fragments have one name", expected=lambda self: None,
           id_column=None),
    source("fragments in the order of a set", SetOfFragments, PROCESS, "fragments differs between processes",
           expected=lambda self: None),
    source("fragments by `hash()`", HashedFragments, PROCESS, "fragments differs between processes"),
    source("fragments without fingerprints", ConstantFragments, PRINT, "the fragments' fingerprints stay",
           changed=lambda self: ConstantFragments({**STORED, "b": STORED["b"][::-1]})),
    source("says always that it changed", AlwaysChanged, NAMES, "changed says so of a fragment that is as it was"),
    source("says always that its rows are gone", NeverStill, NAMES, "still says that a fragment that is as it was planned is not"),
    source("says always that its rows are there still", AlwaysStill, PRINT, "still says that a fragment is what it was, whose content has changed",
           changed=lambda self: AlwaysStill({**STORED, "b": STORED["b"][::-1]})),
    source("ids of other rows", OtherIds, IDS, "ids gives other ids than read"),
    source("an id twice", SameIds, f"{IDS} {STORES}", "two rows have the id"),
    source("texts of other rows", OtherTexts, IDS, "texts gives other prompts than read"),
    source("sizes with the height first", OtherSizes, "sizes_are_those_of_the_pictures", "sizes gives (2, 3) for a picture of 3x2 pixels"),
    source("a picture of floats", FloatPicture, COUNT, "no uint8 array [H, W, 3]"),
    source("asks for a GPU in `fragments`", Cuda, GPU, "Cuda.fragments calls torch.cuda.is_available before load(device)"),
    source("no contract line", NoContract, PLUGIN, "does not say for which contract it was written"),
]  # fmt: skip

RIGHT = [suite_of(Suite, Right, changed=lambda self: Right({**STORED, "b": STORED["b"][::-1]}))]
