"""A run's metrics, given to Ray, whose agent on the driver's node shows them to Prometheus."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.metrics import Counter, Gauge

from latentmill.metrics import JOB, METRICS, RUN, STAGE
from latentmill.progress import Shown


class RayMetrics:
    """Tells Ray how a run stands, each time that it is called."""

    def __init__(self, job: str, run: str) -> None:
        self.tags = {JOB: job, RUN: run}
        self.made: dict[str, Any] = {}
        self.told: dict[tuple[str, str], float] = {}
        """Counters, as they were told: Ray is told by how much they have grown."""

    def __call__(self, shown: Shown) -> None:
        """Tell of all of ``METRICS`` that there is something to say of; nothing while there is no Ray."""
        if not ray.is_initialized():
            return
        for metric in METRICS:
            if metric.name not in self.made:
                kind: Any = Counter if metric.kind == "counter" else Gauge
                self.made[metric.name] = kind(metric.name, metric.about, (JOB, RUN, STAGE))
            made = self.made[metric.name]
            for stage, value in metric.values(shown).items():
                tags = {**self.tags, STAGE: stage}
                if metric.kind == "gauge":
                    made.set(value, tags)
                elif (more := value - self.told.get((metric.name, stage), 0)) > 0:
                    made.inc(more, tags)
                    self.told[metric.name, stage] = value
