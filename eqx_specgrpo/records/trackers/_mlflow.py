"""MLflow: a server, a database, or files in the run's folder."""

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ._base import AbstractTracker, Begun, Outcome, Table, TrackedRun, TrackerKind

_LONGEST_PARAMETER = 500  # characters, which every store of MLflow takes
_AT_ONCE = 100  # parameters, which a server takes in one call
_STATUS = {Outcome.FINISHED: "FINISHED", Outcome.STOPPED: "KILLED", Outcome.FAILED: "FAILED"}


@dataclass(frozen=True)
class _Session:
    client: Any
    run_id: str


class MLflow(AbstractTracker[_Session]):
    """A run of MLflow, at `MLFLOW_TRACKING_URI` where that is set, else in `mlflow/` of the run's folder.

    The client alone is used: a run that other code has made the active one is left alone.
    """

    def begin(self, run: TrackedRun) -> Begun[_Session]:
        import mlflow

        own = (run.folder / "mlflow").as_uri()
        uri = run.kept.get("uri") or (mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else own)
        if uri == own:
            # Of late MLflow takes a folder only where it is told to; all else needs more than its small package.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        session = _Session(mlflow.MlflowClient(tracking_uri=uri), run.kept.get("run_id", ""))
        if session.run_id:
            session.client.update_run(session.run_id, status="RUNNING")
        else:
            session = _begin_new(session.client, run)
        session.client.log_dict(session.run_id, dict(run.config), "config.json")
        keep = {"run_id": session.run_id} | ({} if uri == own else {"uri": uri})
        shown = f"MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri {uri}" if uri == own else uri
        return Begun(session, keep, f"{shown}, run {run.name}")

    def step(self, session: _Session, step: int, metrics: Mapping[str, float | int]) -> None:
        _log(session, step, {name: value for name, value in metrics.items() if name != "step"})

    def completions(self, session: _Session, step: int, table: Table) -> None:
        # The layout in which MLflow's own tables are kept, and shown; its function for them wants pandas.
        rows = {"columns": list(table.columns), "data": [list(row) for row in table.rows]}
        session.client.log_dict(session.run_id, rows, f"completions/step-{step:06d}.json")

    def summary(self, session: _Session, values: Mapping[str, float | int]) -> None:
        _log(session, 0, values)

    def end(self, session: _Session, outcome: Outcome) -> None:
        session.client.set_terminated(session.run_id, status=_STATUS[outcome])


def _begin_new(client: Any, run: TrackedRun) -> _Session:
    from mlflow.entities import Param

    experiment = client.get_experiment_by_name(run.project)
    experiment_id = client.create_experiment(run.project) if experiment is None else experiment.experiment_id
    run_id = client.create_run(experiment_id, run_name=run.name).info.run_id
    parameters = [Param(_name(key), str(value)[:_LONGEST_PARAMETER]) for key, value in run.config.items()]
    for start in range(0, len(parameters), _AT_ONCE):
        client.log_batch(run_id, params=parameters[start : start + _AT_ONCE])
    return _Session(client, run_id)


def _log(session: _Session, step: int, values: Mapping[str, float | int]) -> None:
    from mlflow.entities import Metric

    now = int(1000 * time.time())
    metrics = [Metric(_name(name), float(value), now, step) for name, value in values.items()]
    session.client.log_batch(session.run_id, metrics=metrics)


def _name(name: str) -> str:
    """A name that MLflow takes: what rewards have logged may be called anything."""
    return re.sub(r"[^\w\-. :/]", "_", name)


TRACKER = TrackerKind(MLflow(), modules=("mlflow",), package="mlflow-skinny")
