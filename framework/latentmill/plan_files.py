"""``plan.json``, and behind it ``plan-1.json`` and so on of a dataset that has grown: reading, comparing and publishing them.

None ever changes. Each generation of rows has a file of its own, which names the hash of the one before and is created under the
first name that is free: so drivers that grow a dataset at the same time agree on what it is, and its history can be read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from latentmill.errors import PlanError, RunError
from latentmill.libraries import changed
from latentmill.plan import Generation, Plan, digest, hashed
from latentmill.plugin import Fragment
from latentmill.storage import Storage

FIRST_PLAN = "plan.json"


def changed_libraries(plan: Plan, store: Storage) -> list[str]:
    """In which libraries' versions a dataset goes on that was begun with others, a line each."""
    if not store.exists("plan.json"):
        return []
    begun = read(store).get("libraries", {})
    return [
        f"begun with {name} {was}, going on with {version}: its rows may differ a little from those that are there"
        for name, was, version in changed(begun, plan.libraries)
    ]


def name_of(generation: int) -> str:
    """The file of a generation, which are counted from 0 on."""
    return f"plan-{generation}.json" if generation else FIRST_PLAN


def is_name(name: str) -> bool:
    """Whether a file at the top of a dataset is one of these, if it is ours."""
    return re.fullmatch(r"plan(-[1-9]\d*)?\.json", name, re.ASCII) is not None


def next_name(plan: Plan) -> str:
    """The file that is there once a dataset has grown beyond ``plan``."""
    return name_of(max(1, len(plan.generations)))


def publish(plan: Plan, store: Storage) -> None:
    """Write ``plan.json`` if there is none; raise PlanError, with the differences, if another plan's is there.

    Of a plan that has grown, its last generation. Raises RunError if another driver has grown the dataset otherwise meanwhile.
    """
    if not plan.generations:
        if not store.create(FIRST_PLAN, plan.to_json().encode()):
            compare(plan, store)
        return
    name = name_of(len(plan.generations) - 1)
    if not store.create(name, _generation_to_json(plan).encode()) and _json(store, name).get("hash") != plan.hash:
        raise RunError(f"{store.url.rstrip('/')} has been grown by another driver, otherwise: the same command goes on")


def is_published(plan: Plan, store: Storage) -> bool:
    """Whether all of a plan is there to be read."""
    return store.exists(name_of(max(0, len(plan.generations) - 1)))


def compare(plan: Plan, store: Storage) -> None:
    """Raise PlanError if another plan's dataset is there. Writes nothing."""
    if not store.exists("plan.json"):
        return
    there = read(store)
    if there.get("hash") != plan.first_hash:
        try:
            shown = list(dict.fromkeys(differences(hashed(there), hashed(json.loads(plan.to_json())))))
        except (KeyError, TypeError, AttributeError):
            raise PlanError(f"{store.url}/plan.json can't be read as a plan: move the folder away") from None
        more = f" and {len(shown) - 6} more" if len(shown) > 6 else ""
        grows = "; --grow takes in rows that have come" if all(line.startswith("fragments: ") for line in shown) else ""
        raise PlanError(
            f"{store.url} holds another job's dataset: {'; '.join(shown[:6])}{more}. Choose another output; --fork begins one{grows}."
        )


def read(store: Storage) -> dict[str, Any]:
    """What ``plan.json`` says. Raises PlanError if there is none or it can't be read."""
    path = f"{store.url.rstrip('/')}/plan.json"
    try:
        found = json.loads(store.read("plan.json").decode())
    except (FileNotFoundError, NotADirectoryError):
        if store.exists(name_of(1)):
            raise PlanError(
                f"{path} is gone, and can't be made again, since the dataset has grown: it must come from a backup"
            ) from None
        shards = [name for name in store.names("data") if name[:5].isdecimal()]
        lost = (
            f"; data/{min(shards)} may be a shard of ours: the job that it is of, run again, puts plan.json back"
            if shards
            else ""
        )
        raise PlanError(f"{store.url} holds no dataset of ours: it has no plan.json{lost}") from None
    except ValueError as error:
        raise PlanError(f"{path} can't be read as a plan ({error}): move the folder away or choose another") from error
    if not isinstance(found, dict) or not {"hash", "name", "rows", "shards", "rows_per_shard"} <= found.keys():
        raise PlanError(f"{path} can't be read as a plan: move the folder away or choose another")
    return found


def load(store: Storage) -> Plan:
    """The plan of a dataset, without its job, as far as it has grown. Raises PlanError if there is none or it can't be read."""
    plan = first(store)
    while True:
        name = next_name(plan)
        try:
            found = _json(store, name)
        except FileNotFoundError:
            return plan
        plan = _grown(plan, found, f"{store.url.rstrip('/')}/{name}")


def first(store: Storage) -> Plan:
    """What a dataset was begun with. Raises PlanError."""
    found = read(store)
    try:
        plan = Plan.from_json(found)
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"{store.url}/plan.json can't be read as a plan: {error}") from error
    if plan.hash != found["hash"]:
        raise PlanError(
            f"{store.url}/plan.json was changed: its hash is {found['hash']}, and its contents' {plan.hash}"
        )
    return plan


def grown(plan: Plan, fragments: Sequence[Fragment], places: Sequence[tuple[int, int, int]], rows: int) -> Plan:
    """A plan with one generation more, of so many ``rows`` of the source, which lies as ``fragments`` and ``places`` say now."""
    after = plan.generations or (Generation(plan.hash, sum(fragment.rows for fragment in plan.fragments)),)
    plan = replace(plan, fragments=tuple(fragments), places=tuple(places))
    return replace(plan, generations=(*after, Generation(digest(_about_last(plan, after[-1].hash, rows)), rows)))


def _about_last(plan: Plan, after: str, rows: int) -> dict[str, Any]:
    fragments = [[each.name, each.rows, each.fingerprint] for each in plan.fragments]
    return {"after": after, "rows": rows, "fragments": fragments, "places": [list(place) for place in plan.places]}


def _generation_to_json(plan: Plan) -> str:
    *_, before, last = plan.generations
    return json.dumps({"hash": last.hash, **_about_last(plan, before.hash, last.rows)}) + "\n"


def _grown(plan: Plan, found: Mapping[str, Any], path: str) -> Plan:
    try:
        fragments = [Fragment(*fragment) for fragment in found["fragments"]]
        further = grown(plan, fragments, [(at, start, rows) for at, start, rows in found["places"]], found["rows"])
        lie = (0 <= start <= start + rows <= fragments[at].rows for at, start, rows in further.places)
        many = sum(rows for _, _, rows in further.places) == sum(each.rows for each in further.generations)
        if (found["hash"], found["after"]) == (further.hash, plan.hash) and many and all(lie):
            return further
    except (LookupError, TypeError, ValueError) as error:
        raise PlanError(f"{path} can't be read as a plan: {error}") from error
    raise PlanError(f"{path} was changed, or is of another dataset: it doesn't follow what is before it")


def _json(store: Storage, name: str) -> dict[str, Any]:
    """What a generation's file says. Raises FileNotFoundError, PlanError."""
    try:
        found = json.loads(store.read(name).decode())
    except NotADirectoryError as error:
        raise FileNotFoundError(name) from error
    except ValueError as error:
        raise PlanError(f"{store.url.rstrip('/')}/{name} can't be read as a plan: {error}") from error
    return found if isinstance(found, dict) else {}


def differences(old: Any, new: Any, at: str = "") -> Iterator[str]:
    """``key: old -> new`` for every leaf of two plans in which they differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            if key not in ("hash", "name"):
                yield from differences(old.get(key), new.get(key), f"{at}.{key}" if at else str(key))
    elif old != new:
        if isinstance(old, list) and isinstance(new, list) and len(str(old)) > 80:
            old, new = _unlike(old, new)
        yield f"{at.removeprefix('config.')}: {old} -> {new}"


def _unlike(old: list[Any], new: list[Any]) -> tuple[Any, Any]:
    for a, b in zip(old, new):
        if a != b:
            return a, b
    return f"{len(old)} items", f"{len(new)} items"
