"""What every source must hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from latentmill.plugin import Fragment, RowError, Source
from latentmill.testing.behaviour import GENERATORS, alike, copied, seed_all
from latentmill.testing.suite import PluginSuite, identity


class SourceSuite(PluginSuite):
    """What every source must hold. Give it a source of a few rows, three in a fragment at least, and say in ``expected`` what they are."""

    kind = "source"
    source: ClassVar[type[Source]]
    """The class, with its settings: ``functools.partial`` of it, or a subclass."""

    def expected(self) -> Sequence[Mapping[str, Any] | None] | None:
        """What the rows are, of all fragments in order, as far as you say; None for one that is an error. Without it this isn't checked."""
        return None

    def test_fragments_have_names_and_counts(self) -> None:
        """Asked once, in the driver, before anything starts."""
        source = self.source()
        first = list(source.fragments())
        assert first and all(isinstance(fragment, Fragment) for fragment in first), (
            "fragments gives no Fragment: give one at least, or raise ValueError that says what is missing"
        )
        names = [fragment.name for fragment in first]
        assert len({*names}) == len(names), "two fragments have one name: a name stands for its rows for ever"
        assert list(source.fragments()) == first == list(self.source().fragments()), (
            "fragments differ from one call to the next: names, order, counts and fingerprints follow from what is stored"
        )
        for fragment in first:
            assert not source.changed(fragment), "changed says so of a fragment that is as it was planned"
            assert source.still(fragment, [(fragment.name, 0, fragment.rows)]) is not False, (
                "still says that a fragment that is as it was planned is not: a dataset could not grow"
            )

    def test_a_fragment_has_as_many_rows_as_it_says(self) -> None:
        """One item for each, a mapping or a RowError."""
        source, fragments = self._opened()
        for fragment in fragments:
            found = list(source.read(fragment.name, 0, fragment.rows))
            few_or_many = "too few" if len(found) < fragment.rows else "too many"
            assert len(found) == fragment.rows, (
                f"read gives {few_or_many} rows: {len(found)} of a fragment that has {fragment.rows} as fragments says; a bad row is a "
                "RowError in its place"
            )
            for item in found:
                assert isinstance(item, (Mapping, RowError)), (
                    f"read gives a {type(item).__name__}: each row is a mapping, or a RowError"
                )
                if isinstance(item, Mapping):
                    _check_values(item)

    def test_read_begins_at_start_and_ends_at_stop(self) -> None:
        """A shard is read wherever it begins."""
        source, fragments = self._opened()
        for fragment in fragments:
            whole = list(source.read(fragment.name, 0, fragment.rows))
            for start, stop in (
                (1, fragment.rows),
                (0, fragment.rows - 1),
                (1, fragment.rows - 1),
                (fragment.rows - 1, fragment.rows),
            ):
                if not 0 <= start < stop <= len(whole):
                    continue
                found, wanted = list(source.read(fragment.name, start, stop)), whole[start:stop]
                if alike(found, wanted) or self._wavers(fragment):
                    continue
                if alike(found, whole[: stop - start]) or (start and alike(found, whole[:stop])):
                    raise AssertionError(f"read ignores start: rows {start} to {stop} begin with row 0")
                if len(found) > len(wanted) and alike(found[: len(wanted)], wanted):
                    raise AssertionError(f"read ignores stop: rows {start} to {stop} are {len(found)} rows")
                if len(found) != len(wanted):
                    count = "too few" if len(found) < len(wanted) else "too many"
                    raise AssertionError(f"read gives {count} rows: {len(found)} for rows {start} to {stop}")
                if not self._draws(fragment):
                    raise AssertionError(
                        f"read gives rows {start} to {stop} otherwise than as part of the whole fragment"
                    )

    def test_rows_are_the_same_whenever_they_are_read(self) -> None:
        """Again, after other rows, by another instance, and after somebody has written into them."""
        source, fragments = self._opened()
        other, again = self._opened()
        for fragment in reversed(again):
            list(other.read(fragment.name, 0, fragment.rows))
        for fragment in fragments:
            first = self._read(self.source(), fragment)
            for reader in (source, other, source):
                found = self._read(reader, fragment)
                if alike(found, first):
                    continue
                if len(found) == len(first) and all(any(alike(a, b) for b in first) for a in found):
                    raise AssertionError(
                        "read changes the order of rows from one reading to the next: a row's place is its name"
                    )
                raise AssertionError(
                    "read changes the content of rows from one reading to the next: a row must be the same whenever it is read"
                )
            seed_all((0, 0, 0))
            first = list(source.read(fragment.name, 0, fragment.rows))
            kept = copied(first)
            for item in first:
                if isinstance(item, dict):
                    for value in item.values():
                        if isinstance(value, np.ndarray) and value.flags.writeable:
                            value.fill(0)
                    item.clear()
            assert alike(self._read(source, fragment), kept), (
                "read gives out rows that it keeps: what is written into one changes the next reading; give copies"
            )

    def test_no_global_random_generator_is_used(self) -> None:
        """Of torch, numpy and random, seeded two ways."""
        for fragment in self._opened()[1]:
            name = self._draws(fragment)
            assert not name or self._wavers(fragment), (
                f"read draws from the global random generator of {name}: rows must follow from what is stored"
            )

    def test_ids_and_texts_are_those_of_the_rows(self) -> None:
        """They are short cuts, and must not lead elsewhere."""
        source, fragments = self._opened()
        seen: set[str] = set()
        for fragment in fragments:
            found = list(source.read(fragment.name, 0, fragment.rows))
            rows = [item if isinstance(item, Mapping) else None for item in found]
            texts = list(source.texts(fragment))
            if texts:
                wanted = [(row.get("prompt"), row.get("negative_prompt")) for row in rows if row]
                told = [text for text, row in zip(texts, rows) if row]
                assert len(texts) == len(rows) and told == wanted, (
                    "texts gives other prompts than read: one pair for each row, in order"
                )
            if source.id_column is not None:
                ids = list(source.ids(fragment))
                same = len(ids) == len(rows) and all(row is None or row["id"] == one for row, one in zip(rows, ids))
                assert same or self._wavers(fragment), (
                    "ids gives other ids than read: one for each row, in order, None for a row that has none"
                )
                twice = [name for name in ids if name is not None and name in seen]
                assert not twice, f"two rows have the id {twice[0] if twice else ''!r}: an id is one row's"
                seen |= {name for name in ids if name is not None}

    def test_sizes_are_those_of_the_pictures(self) -> None:
        """In each way in which the source can open them. They are a short cut, and buckets are counted by them."""
        for way in self.source().pixel_ways:
            source = self.source()
            source.pixels = way
            for fragment in source.fragments():
                told = list(source.sizes(fragment.name, 0, fragment.rows))
                rows = list(source.read(fragment.name, 0, fragment.rows)) if told else []
                assert len(told) == len(rows), "sizes gives other rows than read: one item for each, in order"
                for item, row in zip(told, rows):
                    if not isinstance(item, Mapping) or not isinstance(row, Mapping) or row.get("image") is None:
                        continue
                    height, width = row["image"].shape[:2]
                    assert tuple(item["image"]) == (width, height), (
                        f"sizes gives {tuple(item['image'])} for a picture of {width}x{height} pixels: width first, as read gives it"
                    )

    def test_rows_are_what_was_stored(self) -> None:
        """In order; needs ``expected()``."""
        expected = self.expected()
        if expected is None:
            return
        source, fragments = self._opened()
        found = [item for fragment in fragments for item in source.read(fragment.name, 0, fragment.rows)]
        picked = [
            None
            if isinstance(item, RowError)
            else item
            if wanted is None
            else {name: item.get(name) for name in wanted}
            for item, wanted in zip(found, expected)
        ]
        if len(found) != len(expected) or alike(picked, list(expected)) or self._explained():
            return
        if all(any(alike(a, b) for b in expected) for a in picked):
            raise AssertionError("read gives the rows in another order than they are stored in")
        at = next(i for i, (a, b) in enumerate(zip(picked, expected)) if not alike(a, b))
        raise AssertionError(
            f"read gives row {at} with other content than is stored\n{picked[at]!r}, and {expected[at]!r} was expected"
        )

    def test_the_fingerprint_follows_the_weights(self) -> None:
        """A fragment's, when what is stored changes; needs ``changed()``, which may write the same files anew."""
        before = list(self.source().fragments())
        other = self.changed()
        if other is None:
            super().test_the_fingerprint_follows_the_weights()
            return
        assert isinstance(other, Source)
        assert list(other.fragments()) != before or other.fingerprint() != self.source().fingerprint(), (
            "the fragments' fingerprints stay when their content changes: take the size and time of a file, or hash it; else a "
            "dataset is continued with other rows"
        )
        now = {fragment.name: fragment for fragment in other.fragments()}
        for fragment in before:
            if (found := now.get(fragment.name, fragment)) != fragment and found.rows == fragment.rows:
                assert not other.still(fragment, [(fragment.name, 0, fragment.rows)]), (
                    "still says that a fragment is what it was, whose content has changed: a dataset would grow beside rows that are no more"
                )

    def _wavers(self, fragment: Fragment) -> bool:
        """Whether rows differ from one reading to the next."""
        first, source = self._read(self.source(), fragment), self.source()
        return any(not alike(self._read(source, fragment), first) for _ in range(2))

    def _draws(self, fragment: Fragment) -> str:
        """The module whose random generator rows hang on, or ""."""
        wanted = self._read(self.source(), fragment)
        for at, name in enumerate(GENERATORS):
            if not alike(self._read(self.source(), fragment, [int(i == at) for i in range(3)]), wanted):
                return name
        return ""

    def _read(self, source: Source, fragment: Fragment, seeds: Sequence[int] = (0, 0, 0)) -> list[Any]:
        list(source.fragments())
        seed_all(seeds)
        return [copied(item) for item in source.read(fragment.name, 0, fragment.rows)]

    def _explained(self) -> bool:
        return any(self._wavers(fragment) or self._draws(fragment) for fragment in self._opened()[1])

    def _opened(self) -> tuple[Source, list[Fragment]]:
        source = self.source()
        return source, list(source.fragments())

    def _question(self) -> Callable[[Any], Mapping[str, Any]]:
        return asked

    def _work(self) -> Callable[[Any], Mapping[str, Any]]:
        return read_all


def asked(source: Source) -> dict[str, Any]:
    """What the driver asks a source."""
    return {
        **identity(source),
        "fragments": list(source.fragments()),
        "id_column": source.id_column,
        "latent_spec": source.latent_spec(),
        "notices": list(source.notices()),
    }


def read_all(source: Source) -> dict[str, Any]:
    """The rows of all fragments."""
    seed_all((0, 0, 0))
    return {f"read.{f.name}": copied(source.read(f.name, 0, f.rows)) for f in source.fragments()}


def _check_values(row: Mapping[str, Any]) -> None:
    """Fail unless pictures and texts are what the contract says."""
    image = row.get("image")
    if image is not None:
        right = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        assert right, "read gives an image that is no uint8 array [H, W, 3]"
        mask = row.get("mask")
        assert mask is None or np.shape(mask)[:2] == image.shape[:2], "read gives a mask of another size than its image"
    for name in ("prompt", "negative_prompt", "id", "warning"):
        value = row.get(name)
        assert value is None or isinstance(value, str), (
            f"read gives {name!r} as {type(value).__name__}: it is text, or None"
        )
