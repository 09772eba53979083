"""The config of the job that a workflow becomes: its source and its rows around the recipe of its outputs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latentmill.comfy.graph import Graph, look
from latentmill.comfy.job import Recipe, recipe
from latentmill.comfy.options import Options, split
from latentmill.comfy.workflow import Workflow, read
from latentmill.errors import JobError
from latentmill.text import escaped
from latentmill.values import literal

logger = logging.getLogger("latentmill")

IN_ROWS = ("seed", "image", "mask")
"""What a job's ``sampling`` doesn't say: it stands in rows alone."""


def config_of(path: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The config of the job that a workflow becomes, as a job's file would have it; and the overrides that are the job's own.

    Raises JobError, which names the node.
    """
    workflow = read(path)
    options, rest = split(overrides, workflow)
    graph = look(workflow, options.columns, options.output)
    recipes = recipes_of(graph, options)
    if (
        options.models is None
        and not any(word.startswith("model.models=") for word in rest)
        and "model" in recipes[0].config
    ):
        raise JobError("where the model files are is not said: comfy.models=FOLDER, as in comfy.models=/ComfyUI/models")
    for notice in dict.fromkeys(notice for each in recipes for notice in each.notices):
        logger.warning(f"{path.name}: {notice}")
    config = _config(path.stem, recipes, options, rest)
    if options.metadata == "true":
        if recipes[1:]:
            raise JobError("comfy.metadata is for workflows with one output: comfy.output=ID says which")
        for (node, name), column in options.columns.items():
            if any(recipes[0].rows[of].place == (node, name) for of in ("image", "mask") if of in recipes[0].rows):
                raise JobError(
                    f"map.{node}.{name}={column}: with comfy.metadata=true each PNG would name the workflow's picture, and not the row's: leave one out"
                )
        config["sink"] = {"picture_text": {"prompt": _literal(_with_columns(workflow, recipes[0]))}}
    return config, rest


def recipes_of(graph: Graph, options: Options) -> list[Recipe]:
    """Of each output. Raises JobError unless one job makes them all."""
    for (node, name), column in options.columns.items():
        if node not in graph.found:
            raise JobError(f"map.{node}.{name}={column}: {graph.workflow.nodes[node]} has no part in what is saved")
    try:
        outputs = graph.outputs()
        recipes = [recipe(output) for output in outputs]
    except RecursionError as error:
        raise JobError("its nodes stand in too long a line") from error
    if any(each.fixed() != recipes[0].fixed() for each in recipes):
        ways = ",".join(each.node.id for each in outputs)
        raise JobError(
            f"its outputs are made in ways that no one job has: comfy.output={outputs[0].node.id} makes one of them, "
            f"and run -m comfy.output={ways} each as a job of its own"
        )
    return recipes


def _config(name: str, recipes: Sequence[Recipe], options: Options, rest: Sequence[str]) -> dict[str, Any]:
    first = recipes[0]
    given = any(word.partition("=")[0].split(".")[0] == "source" for word in rest)
    if given and recipes[1:]:
        raise JobError("it has several outputs, and each row of a source makes one of them: comfy.output=ID says which")
    source = _source(first, options, rest) if given else _rows(recipes, options)
    config: dict[str, Any] = {
        "defaults": [
            "job",
            {"source": source["name"]},
            {"sink": "parquet"},
            {"cluster": "local"},
            "_self_",
            {"override stages": "gpu"},
        ],
        "output": f"out/{name}",
        "source": {key: value for key, value in source.items() if key != "name"},
        **{key: value for key, value in first.config.items() if key not in ("sampling", "stages")},
    }
    if given and len(first.batch) > 1:
        config["samples_per_row"] = len(first.batch)
    if "model" in config:
        config["model"] = {**config["model"], "models": options.models}
    sampling, stages = dict(first.config.get("sampling", {})), dict(first.config.get("stages", {}))
    for key, setting in first.rows.items():
        stage, _, field = key.rpartition(".")
        if field not in IN_ROWS:
            (stages[stage]["sampling"] if stage else sampling)[field] = setting.value
    for stage in first.shared if given else ():
        stages[stage]["sampling"]["seed"] = "row"
    if options.tokenizers is not None:
        for each in (config, *stages.values()):
            if "text_encoder" in each:
                each["text_encoder"] = {**each["text_encoder"], "tokenizers": options.tokenizers}
    if sampling:
        config["sampling"] = sampling
    if stages:
        config["stages"] = stages
    written: dict[str, Any] = _literal(config)
    if "model" in written and options.models is None:
        written["model"]["models"] = "???"  # model.models=FOLDER says it
    return written


def _rows(recipes: Sequence[Recipe], options: Options) -> dict[str, Any]:
    """The source of what ComfyUI would make, once: a row for each picture, with what is not the same of all."""
    if wanted := [setting.column for each in recipes for setting in each.rows.values() if setting.column is not None]:
        raise JobError(f"which file has the column {escaped(wanted[0])} is not said: source.path=prompts.csv")
    values = [{name: setting.value for name, setting in each.rows.items()} for each in recipes]
    same = {name for name in values[0] if all(of.get(name) == values[0][name] for of in values)}
    rows = []
    for each, of in zip(recipes, values):
        told = {key: value for key, value in of.items() if key.rpartition(".")[2] in IN_ROWS or key not in same}
        numbered = each.batch != range(1)
        for k in each.batch:
            rows.append({**told, **({f"{stage}noise_index": k for stage in _noises(each)} if numbered else {})})
    pictures = {"path": options.input_folder(), **_opened(recipes[0])} if any("image" in row for row in rows) else {}
    return {"name": "rows", **pictures, "rows": rows}


def _opened(made: Recipe) -> dict[str, Any]:
    """How a source is told to open pictures, and where masks are."""
    return {"opened": "comfy", **({"masks": made.masks} if made.masks is not None else {})}


def _noises(made: Recipe) -> list[str]:
    """The stages that add noise, as ``refine.``, and the job's own, without a name."""
    drawn = [name.removesuffix("seed") for name in made.rows if name.rpartition(".")[2] == "seed"]
    of = {stage: made.config["stages"][stage.rstrip(".")] if stage else made.config for stage in drawn}
    return [stage for stage, config in of.items() if config["sampling"]["first_noise"] != "none"]


def _source(made: Recipe, options: Options, rest: Sequence[str]) -> dict[str, Any]:
    """The source of a file of rows: which of its columns give what, and what a row has where it says nothing."""
    told = {**made.rows, **made.texts}
    columns = {name: setting.column for name, setting in told.items() if setting.column is not None}
    given = [word.partition("=")[2] for word in rest if word.startswith(("source=", "source.name="))]
    if given and given[-1] != "prompts":
        if columns or options.seed == "workflow":
            raise JobError(f"source={given[-1]}: map and comfy.seed are for the columns of source prompts")
        if made.masks is not None:
            raise JobError(f"source={given[-1]}: a mask is known beside a picture of source prompts alone")
        return {"name": given[-1]}
    taken = [*columns.values()]
    columns = {name: column for name, column in columns.items() if column != name or taken.count(column) > 1}
    defaults: dict[str, Any] = {name: setting.value for name, setting in made.texts.items()}
    pictures = {name: made.rows[name] for name in ("image", "mask") if name in made.rows}
    defaults |= {name: f"{options.input_folder()}/{of.value}" for name, of in pictures.items() if of.column is None}
    if options.seed == "workflow":
        shared = [f"{stage}.seed" for stage in made.shared]
        seeds = {name: setting for name, setting in made.rows.items() if name.rpartition(".")[2] == "seed"}
        defaults |= {
            name: setting.value for name, setting in seeds.items() if setting.column is None and name not in shared
        }
    if made.batch.start:
        defaults |= {f"{stage}noise_index": made.batch.start for stage in _noises(made)}
    prompt = made.rows.get("prompt")
    if (
        options.columns and prompt is not None and prompt.column is None
    ):  # who says which columns count has not forgotten one
        defaults["prompt"] = prompt.value
    source = {"columns": columns, "defaults": defaults, **(_opened(made) if pictures else {})}
    return {"name": "prompts", **{key: value for key, value in source.items() if value}}


def _with_columns(workflow: Workflow, made: Recipe) -> dict[str, Any]:
    """The workflow as the file has it, with the row's columns where rows may differ."""
    found: dict[str, Any] = copy.deepcopy(dict(workflow.content))
    for name, places in made.places.items():
        for node, of in places:
            if name not in ("image", "mask"):  # which are no column of a dataset
                found[node]["inputs"][of] = {"column": name}
    return found


def _literal(value: Any) -> Any:
    """The config, with texts that stand for themselves."""
    if isinstance(value, Mapping):
        return {key: _literal(inside) for key, inside in value.items()}
    if isinstance(value, (list, tuple)):
        return [_literal(inside) for inside in value]
    ours = ("${model.models}", "${model.dtype}")
    return literal(value) if isinstance(value, str) and value not in ours else value
