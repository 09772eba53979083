"""Stages, each with one mistake."""

import random

import pyarrow as pa
import torch
from tests.suites.mistakes import Mistake, suite_of

from latentmill.plugin import Filtered, Stage, tensors
from latentmill.testing import StageSuite
from latentmill_example import Brightness


def with_brightness(table, change):
    """The table with other values of brightness."""
    values = [float(value) for value in change(table.column("brightness").to_pylist())]
    at = table.schema.get_field_index("brightness")
    return table.set_column(at, table.schema.field(at), pa.array(values, pa.float64()))


class Drops(Brightness):
    def __call__(self, batch, reject):
        return super().__call__(batch, lambda i, reason: None)


class RejectsAndKeeps(Brightness):
    def __call__(self, batch, reject):
        reject(0, "too dark")
        return Brightness().__call__(batch, reject)


class RejectsWithoutReason(Brightness):
    def __call__(self, batch, reject):
        return super().__call__(batch, lambda i, reason: reject(i, ""))


class FiltersByNothing(Brightness):
    def __call__(self, batch, reject):
        return super().__call__(batch, lambda i, why: reject(i, Filtered(why.reason, {"brightness": "dark"})))


class RejectsByNumber(Brightness):
    """The row's number where its place in the batch belongs."""

    def __call__(self, batch, reject):
        numbers = batch.column("row").to_pylist()
        return super().__call__(batch, lambda i, reason: reject(numbers[i], reason))


class Twice(Brightness):
    def __call__(self, batch, reject):
        found = super().__call__(batch, reject)
        return pa.concat_tables([found, found.slice(0, 1)])


class Invents(Brightness):
    def __call__(self, batch, reject):
        found = super().__call__(batch, reject)
        numbers = pa.array([*found.column("row").to_pylist()[:-1], 99], pa.int64())
        return found.set_column(0, found.schema.field(0), numbers)


class SwapsIds(Brightness):
    def __call__(self, batch, reject):
        found = super().__call__(batch, reject)
        ids = found.column("row_id").to_pylist()
        return found.set_column(1, found.schema.field(1), pa.array(ids[::-1]))


class SwapsPictures(Brightness):
    def __call__(self, batch, reject):
        order = [*range(1, len(batch)), 0]
        return super().__call__(tensors.with_tensor(batch, "image", tensors.from_arrow(batch, "image")[order]), reject)


class NoTable(Brightness):
    def __call__(self, batch, reject):
        return super().__call__(batch, reject).to_pylist()


class LosesAColumn(Brightness):
    def __call__(self, batch, reject):
        return super().__call__(batch, reject).drop_columns(["negative_prompt"])


class AddsInSilence(Brightness):
    adds = ()


class AddsNothing(Brightness):
    adds = (*Brightness.adds, pa.field("contrast", pa.float64()))


class OtherType(Brightness):
    adds = (pa.field("brightness", pa.float32()),)


class Enlarges(Brightness):
    """And leaves width and height as they were."""

    def __call__(self, batch, reject):
        found = super().__call__(batch, reject)
        return tensors.with_tensor(found, "image", tensors.from_arrow(found, "image").repeat(1, 2, 2, 1))


class Writes(Brightness):
    def __call__(self, batch, reject):
        found = super().__call__(batch, reject)
        tensors.from_arrow(batch, "image").clamp_(1, 254)
        return found


class Counts(Brightness):
    number = 0

    def __call__(self, batch, reject):
        def numbered(values):
            self.number += len(values)
            return range(self.number - len(values), self.number)

        return with_brightness(super().__call__(batch, reject), numbered)


class Draws(Brightness):
    def __call__(self, batch, reject):
        return with_brightness(super().__call__(batch, reject), lambda values: [v + random.random() for v in values])


class Ranks(Brightness):
    def __call__(self, batch, reject):
        return with_brightness(
            super().__call__(batch, reject), lambda values: [sorted(values).index(v) for v in values]
        )


class Hashes(Brightness):
    def __call__(self, batch, reject):
        return with_brightness(super().__call__(batch, reject), lambda values: [v + hash("v") % 2**30 for v in values])


class Cuda(Brightness):
    def __init__(self):
        super().__init__()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class ConstantPrint(Brightness):
    """Of a scorer with weights."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = weight


class NoContract(Stage):
    adds, __init__, __call__ = Brightness.adds, Brightness.__init__, Brightness.__call__


class Dark(Brightness):
    """Filters the black picture of the suite's batch."""

    def __init__(self):
        super().__init__(least=0.1)


def stage(what, plugin, caught_by, says, **settings):
    return Mistake(what, suite_of(StageSuite, plugin, **settings), set(caught_by.split()), says)


EACH, COLUMNS = "each_row_comes_back_once_or_is_rejected", "columns_are_those_that_it_declares"
PROCESS, GPU, PRINT, PLUGIN = (
    "another_process_finds_the_same", "building_and_asking_touch_no_gpu", "the_fingerprint_follows_the_weights",
    "it_is_a_plugin_of_this_contract",
)  # fmt: skip
ROWS, WRITES, MEMORY, RANDOM = (
    "rows_do_not_touch_each_other", "arguments_are_left_as_they_were", "nothing_is_remembered_between_calls",
    "no_global_random_generator_is_used",
)  # fmt: skip


class DropsDark(Drops, Dark):
    pass


class WithoutReason(RejectsWithoutReason, Dark):
    pass


class ByNothing(FiltersByNothing, Dark):
    pass


class ByNumber(RejectsByNumber, Dark):
    pass


MISTAKES = [
    stage("drops a row without a word", DropsDark, EACH, "the stage drops row 10 without a word"),
    stage("rejects a row and gives it back", RejectsAndKeeps, EACH, "the stage rejects row 10 and gives it back"),
    stage("rejects without a reason", WithoutReason, EACH, "reject is given no reason"),
    stage("filters by scores that are none", ByNothing, EACH, "they are numbers, by name"),
    stage("rejects by the row's number", ByNumber, EACH, "it is a row's place in the batch"),
    stage("gives a row twice", Twice, EACH, "the stage gives row 10 twice"),
    stage("invents a row", Invents, EACH, "the stage invents row 99"),
    stage("swaps row ids", SwapsIds, f"{EACH} {ROWS}", "comes back under the row_id of another"),
    stage("swaps pictures", SwapsPictures, ROWS, "the stage swaps rows: row 10 comes back with the content of row 11"),
    stage("gives no table", NoTable, EACH, "the stage gives a dict: it gives a table, or several"),
    stage("loses a column", LosesAColumn, COLUMNS, "the stage loses the column 'negative_prompt'"),
    stage("adds a column that it does not declare", AddsInSilence, COLUMNS, "name it in `adds`"),
    stage("declares a column that it does not add", AddsNothing, COLUMNS, "the stage adds no column 'contrast'"),
    stage("a column of another type than it declares", OtherType, COLUMNS, "and `adds` says float"),
    stage("other sizes, and the old width and height", Enlarges, COLUMNS, "width and height must be changed along with it"),
    stage("writes into the pictures", Writes, WRITES, "the stage writes into the column 'image'"),
    stage("numbers rows as they come", Counts, MEMORY, "the stage gives rows otherwise after an earlier batch"),
    stage("a number of the module random", Draws, RANDOM, "the global random generator of random"),
    stage("ranks rows within the batch", Ranks, ROWS, "otherwise in a batch than alone"),
    stage("numbers that hang on `hash()`", Hashes, PROCESS, "the stage gives other results in another process"),
    stage("asks for a GPU in `__init__`", Cuda, GPU, "Cuda.__init__ calls torch.cuda.is_available before load(device)"),
    stage("no fingerprint of a scorer's weights", ConstantPrint, PRINT, "the fingerprint stays when the weights change",
          changed=lambda self: ConstantPrint(2.0)),
    stage("no contract line", NoContract, PLUGIN, "does not say for which contract it was written"),
]  # fmt: skip

RIGHT = [suite_of(StageSuite, Brightness), suite_of(StageSuite, Dark)]
