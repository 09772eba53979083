"""What a run tells Prometheus, metric by metric, and the dashboard that Grafana draws of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from latentmill import tally
from latentmill.progress import Shown, StageView
from latentmill.usage import GroupUsage

JOB, RUN, STAGE = "latentmill_job", "latentmill_run", "stage"
"""Labels. ``job`` alone is Prometheus' own; of what workers use, the stage is all that they host: ``encode+denoise``."""
RAY_PREFIX = "ray_"
"""How Ray begins the names of all that it exports."""


@dataclass(frozen=True)
class RunMetric:
    """A number of a run, or of each stage."""

    name: str
    kind: Literal["counter", "gauge"]
    about: str
    values: Callable[[Shown], Mapping[str, float]]
    """By stage; "" for the run's."""


def _of_stages(value: Callable[[StageView], float]) -> Callable[[Shown], Mapping[str, float]]:
    return lambda shown: {stage.name: value(stage) for stage in shown.view.stages}


def _of_counts(what: str) -> Callable[[Shown], Mapping[str, float]]:
    return lambda shown: {stage: counts[what] for stage, counts in shown.counts.items() if what in counts}


def _of_groups(value: Callable[[GroupUsage], float | None]) -> Callable[[Shown], Mapping[str, float]]:
    def found(shown: Shown) -> Mapping[str, float]:
        return {group.stages: used for group in shown.usage if (used := value(group)) is not None}

    return found


METRICS = (
    RunMetric("latentmill_rows_total", "counter", "Rows that have left a stage", _of_stages(lambda s: s.done)),
    RunMetric("latentmill_failed_rows_total", "counter", "Rows that failed in it", _of_stages(lambda s: s.failed)),
    RunMetric(
        "latentmill_evaluations_total", "counter", "Evaluations of the network by rows", _of_counts(tally.EVALUATIONS)
    ),
    RunMetric(
        "latentmill_oom_halvings_total",
        "counter",
        "How often fewer rows were given to a stage since memory ran out",
        _of_counts(tally.HALVINGS),
    ),
    RunMetric("latentmill_worker_deaths_total", "counter", "Workers that were gone", _of_counts("deaths")),
    RunMetric("latentmill_queue_rows", "gauge", "Rows that wait for a stage", _of_stages(lambda s: s.queued)),
    RunMetric("latentmill_queue_bytes", "gauge", "Bytes of these", _of_stages(lambda s: s.queued_bytes)),
    RunMetric("latentmill_workers", "gauge", "Workers that host a stage", _of_stages(lambda s: s.workers)),
    RunMetric("latentmill_busy_workers", "gauge", "Of these, those that work for it", _of_stages(lambda s: s.busy)),
    RunMetric("latentmill_cores_busy", "gauge", "Cores that workers keep busy", _of_groups(lambda g: g.cpu)),
    RunMetric("latentmill_memory_bytes", "gauge", "Memory that workers hold", _of_groups(lambda g: g.memory)),
    RunMetric("latentmill_gpu_busy_ratio", "gauge", "Share of the time of their GPUs", _of_groups(lambda g: g.gpu)),
    RunMetric("latentmill_gpu_memory_bytes", "gauge", "What they hold on GPUs", _of_groups(lambda g: g.gpu_memory)),
    RunMetric("latentmill_rows_planned", "gauge", "Rows of the plan", lambda shown: {"": shown.view.planned}),
    RunMetric("latentmill_rows_finished", "gauge", "Rows in committed shards", lambda s: {"": s.view.finished}),
    RunMetric(
        "latentmill_left_seconds",
        "gauge",
        "Seconds to go",
        lambda shown: {} if shown.left is None else {"": shown.left},
    ),
)

# ------------------------------------------------------------------------------------------------------- Grafana

PANELS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Rows a second", "short", (("sum by (stage) (rate(latentmill_rows_total[]))", "{{stage}}"),)),
    ("Evaluations a second", "short", (("sum by (stage) (rate(latentmill_evaluations_total[]))", "{{stage}}"),)),
    ("Rows waiting", "short", (("sum by (stage) (latentmill_queue_rows{})", "{{stage}}"),)),
    ("Bytes waiting", "bytes", (("sum by (stage) (latentmill_queue_bytes{})", "{{stage}}"),)),
    (
        "Workers busy",
        "percentunit",
        (("sum by (stage) (latentmill_busy_workers{}) / (sum by (stage) (latentmill_workers{}) > 0)", "{{stage}}"),),
    ),
    ("Workers", "short", (("sum by (stage) (latentmill_workers{})", "{{stage}}"),)),
    ("GPUs busy", "percentunit", (("avg by (stage) (latentmill_gpu_busy_ratio{})", "{{stage}}"),)),
    ("GPU memory", "bytes", (("sum by (stage) (latentmill_gpu_memory_bytes{})", "{{stage}}"),)),
    ("Cores busy", "short", (("sum by (stage) (latentmill_cores_busy{})", "{{stage}}"),)),
    ("Memory", "bytes", (("sum by (stage) (latentmill_memory_bytes{})", "{{stage}}"),)),
    ("Failed rows", "short", (("sum by (stage) (latentmill_failed_rows_total{})", "{{stage}}"),)),
    (
        "Out of memory, and workers gone",
        "short",
        (
            ("sum by (stage) (latentmill_oom_halvings_total{})", "{{stage}} halved"),
            ("sum by (stage) (latentmill_worker_deaths_total{})", "{{stage}} gone"),
        ),
    ),
    (
        "Done",
        "percentunit",
        (("max by (latentmill_job) (latentmill_rows_finished{} / latentmill_rows_planned{})", "{{latentmill_job}}"),),
    ),
    ("Time left", "s", (("max by (latentmill_job) (latentmill_left_seconds{})", "{{latentmill_job}}"),)),
)
"""Title, unit, and queries with their legends: ``{}`` and ``[]`` are filled in."""


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it; it asks for the data source."""
    chosen = f'{{{JOB}=~"$job"}}'

    def query(text: str) -> str:
        filled = text.replace("[]", f"{chosen}[$__rate_interval]").replace("{}", chosen)
        return filled.replace("latentmill_", f"{RAY_PREFIX}latentmill_").replace(f"{RAY_PREFIX}{JOB}", JOB)

    source = {"type": "prometheus", "uid": "${datasource}"}
    panels = [
        {
            "id": number + 1,
            "type": "timeseries",
            "title": title,
            "datasource": source,
            "gridPos": {"h": 8, "w": 12, "x": 12 * (number % 2), "y": 8 * (number // 2)},
            "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
            "targets": [
                {"refId": chr(ord("A") + at), "expr": query(text), "legendFormat": legend, "datasource": source}
                for at, (text, legend) in enumerate(queries)
            ],
        }
        for number, (title, unit, queries) in enumerate(PANELS)
    ]
    jobs = f"label_values({RAY_PREFIX}latentmill_rows_planned, {JOB})"
    return {
        "title": "latentmill",
        "uid": "latentmill",
        "schemaVersion": 39,
        "time": {"from": "now-3h", "to": "now"},
        "refresh": "10s",
        "templating": {
            "list": [
                {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
                {
                    "name": "job",
                    "type": "query",
                    "datasource": source,
                    "query": {"query": jobs, "refId": "jobs"},
                    "definition": jobs,
                    "includeAll": True,
                    "multi": True,
                    "allValue": ".*",
                    "refresh": 2,
                },
            ]
        },
        "panels": panels,
    }
