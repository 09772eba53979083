"""What workers read of weights, held against what the dataset was begun with."""

from __future__ import annotations

import json
import re

from latentmill import registry
from latentmill.errors import PluginError
from latentmill.libraries import NOT_THERE
from latentmill.plan import Plan
from latentmill.plugin import Scheduler
from latentmill.storage import Storage
from latentmill.text import one_line
from latentmill.weights import Reading


def of_row(name: str) -> str:
    """What is known of a scheduler that a row names, and a plan doesn't: distribution, version and fingerprint."""
    try:
        found: Scheduler = registry.build("scheduler", {"name": name})
        return " ".join([*registry.provenance("scheduler", name).values(), found.fingerprint()]).strip()
    except PluginError:
        return NOT_THERE


class WeightsRead:
    """What the workers of a dataset have read, in all its runs, in ``weights/``: the first that reads for a plugin says what is right."""

    def __init__(self, plan: Plan, store: Storage) -> None:
        self.plan, self.store = plan, store
        self.known: dict[str, list[tuple[str, str]]] = {}

    def __call__(self, node: str, read: Reading) -> str:
        """Why rows of a worker that has read so would not be the dataset's, in a line; "" if they would."""
        for unit, files in read.items():
            if unit.startswith("scheduler "):  # that a row names
                (name, there), *_ = files
                if (here := of_row(name)) != there:
                    return f"{node}: scheduler {name}, which a row names, is {there}, and the driver's {here}. Install the same"
                if here == NOT_THERE:  # the row's own mistake
                    continue
            if unit not in self.known:
                try:
                    self.known[unit] = self._settled(unit, files)
                except (ValueError, KeyError, TypeError) as error:
                    return (
                        f"{self.store.url.rstrip('/')}/{self._name(unit)} can't be read ({one_line(error)}): it says which weights this dataset's rows "
                        "are of. Put a copy of it back; or delete it, if the weights are still those, and it is written anew"
                    )
            if files != self.known[unit]:
                return self._unlike(node, unit, files, self.known[unit])
        return ""

    def _settled(self, unit: str, files: list[tuple[str, str]]) -> list[tuple[str, str]]:
        name = self._name(unit)
        if self.store.create(name, (json.dumps({"read_for": unit, "files": files}, indent=1) + "\n").encode()):
            return files
        return [(str(file), str(content)) for file, content in json.loads(self.store.read(name))["files"]]

    def _name(self, unit: str) -> str:
        return f"weights/{re.sub(r'[^A-Za-z0-9_.-]+', '-', unit)}.json"

    def _unlike(self, node: str, unit: str, files: list[tuple[str, str]], known: list[tuple[str, str]]) -> str:

        def shown(content: str) -> str:
            return content[:16] if re.fullmatch("[0-9a-f]{64}", content) else content or "not there"

        plugin = f"{unit} {self.plan.plugins[unit]['name']}" if unit in self.plan.plugins else unit.partition(",")[0]
        (name, here), *_ = [entry for entry in files if entry not in known] or [(known[0][0], "")]
        before = ", ".join(shown(content) for file, content in known if file == name) or "no such file"
        return (
            f"{node}: {plugin} reads {name} ({shown(here)}), and this dataset's rows were begun with another "
            f"({before}; {self._name(unit)}). Put the file that was there back, or begin another dataset (--fork)"
        )
