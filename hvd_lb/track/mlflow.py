"""MLflow: a server, or its local store."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from hvd_lb.track.tracker import Ending, Point, TrackedRun

_EXPERIMENT = "hvd-lb"
_STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
# Of one request.
_MOST_PARAMETERS, _MOST_METRICS = 100, 1000


class MlflowTracker:
    """A run of the experiment MLFLOW_EXPERIMENT_NAME, or hvd-lb; `uri` None leaves the store to MLFLOW_TRACKING_URI."""

    def __init__(self, uri: str | None):
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # what fails is tried again by us
        self._uri = uri
        self._run = ""

    def open(self, run: TrackedRun, identity: str | None) -> str:
        self._client = MlflowClient(self._uri)
        if identity and self._goes_on(identity):
            self._run = identity
            self._client.log_batch(identity, tags=_tags(run))
            return identity
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _EXPERIMENT)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._run = self._client.create_run(number, run_name=run.name).info.run_id
        parameters = [Param(name, value) for name, value in run.parameters.items()]
        for start in range(0, len(parameters), _MOST_PARAMETERS):
            part = parameters[start : start + _MOST_PARAMETERS]
            self._client.log_batch(self._run, params=part, tags=_tags(run))
        return self._run

    def _goes_on(self, identity: str) -> bool:
        """Whether that run is still there, which is under way again then."""
        try:
            self._client.update_run(identity, status="RUNNING")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        return True

    def numbers(self, points: Sequence[Point]) -> None:
        now = int(1000 * time.time())
        metrics = [
            Metric(name, value, now, step) for step, numbers in points for name, value in numbers.items()
        ]
        for start in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self._run, metrics[start : start + _MOST_METRICS])

    def text(self, name: str, text: str) -> None:
        self._client.log_text(self._run, text, name)

    def close(self, ending: Ending) -> None:
        self._client.set_terminated(self._run, _STATUS[ending])


def _tags(run: TrackedRun) -> list[Any]:
    facts = {"folder": run.folder, **run.facts}
    return [RunTag(f"hvd_lb.{name}", value) for name, value in facts.items()]
