"""Make the schemas here anew: ``python tests/schemas/make.py rayjobs CRD.yaml``, or, where SkyPilot is installed, ``... skypilot``.

What KubeRay and SkyPilot publish under the Apache License 2.0, without descriptions, as JSON Schema (2020-12); README.md has the versions.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
NESTED = ("items", "additionalProperties")
LONG = 150
"""Characters from which on a part that comes again is said once."""


def rayjobs(crd: str) -> dict[str, Any]:
    """``spec.versions[v1]`` of the CRD. A key that it does not name is wrong here: kubectl refuses it, too, unless told not to."""
    versions = yaml.load(Path(crd).read_text(encoding="utf-8"), yaml.CSafeLoader)["spec"]["versions"]
    schema = next(version for version in versions if version["name"] == "v1")["schema"]["openAPIV3Schema"]
    del schema["properties"]["status"]
    return said_once(schema)


def said_once(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with its long parts in ``$defs``: a pod stands in a RayJob three times."""
    parts: dict[str, Any] = {}

    def short(part: dict[str, Any]) -> dict[str, Any]:
        new: dict[str, Any] = {}
        for key, value in part.items():
            if key == "properties":
                new[key] = {name: short(each) for name, each in value.items()}
            elif key in NESTED and isinstance(value, dict):
                new[key] = short(value)
            elif key in ("anyOf", "oneOf", "allOf"):
                new[key] = [short(each) for each in value]
            elif key != "description" and not key.startswith("x-"):
                new[key] = value
        if "properties" in new and "x-kubernetes-preserve-unknown-fields" not in part:
            new.setdefault("additionalProperties", False)
        text = json.dumps(new, sort_keys=True)
        if len(text) <= LONG:
            return new
        name = hashlib.sha256(text.encode()).hexdigest()[:6]
        parts[name] = new
        return {"$ref": f"#/$defs/{name}"}

    whole = short(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": parts, **whole}


def skypilot() -> dict[str, Any]:
    """A task's, with that of its resources in it, as SkyPilot's server has it: keys that nobody knows are wrong."""
    from sky.utils import schemas

    schemas._allow_additional_properties = lambda: False
    task, resources = schemas.get_task_schema(), schemas._get_single_resources_schema()
    task["properties"]["resources"] = {key: value for key, value in resources.items() if key != "$schema"}
    del task["properties"]["config"]  # of SkyPilot itself, and most of the schema
    return task


if __name__ == "__main__":
    made = rayjobs(sys.argv[2]) if sys.argv[1] == "rayjobs" else skypilot()
    (HERE / f"{sys.argv[1]}.json").write_text(json.dumps(made, separators=(",", ":"), sort_keys=True) + "\n")
