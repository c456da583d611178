"""MLflow as a `Tracker`: runs, metrics, artifacts and registered models through its client.

The only importer of mlflow. Owns what MLflow needs to be quiet, quick to give up, and private (no telemetry, no `./mlruns`).
Refuses to know what the runs mean (`orchestrator.projection`) and to load a model: a registered version is a name for a checkpoint
in the store, never a pickle.

Not guaranteed: that a create whose answer was lost happened once. MLflow has no idempotency keys; `orchestrator.projection` looks for
twins by our own key and keeps the first.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import Unreachable, UsageError
from orchestrator.ports import ModelVersion, Point, RunStatus, TrackedRun
from orchestrator.redact import holds_credentials, redacted

if TYPE_CHECKING:
    from mlflow import MlflowClient

METRICS_A_CALL = 900
"""MLflow takes 1000 metrics, parameters and tags a call, together."""
PARAMS_A_CALL = 100
PAGE = 1000
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Without it MLflow's UI guesses, and shows its pages for language-model traces first."""

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # its default, 7 with backoff, notices a dead server after minutes
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # CVE-2026-0545: its job API has no authentication
}
"""Set before mlflow is imported, where the user has not set them."""
FIRST_ANSWER_S = 10.0
"""How long a server may take to answer at all, before mlflow is imported (seconds) and its client is patient (minutes)."""


def open_tracker(tracking: str, home: Path, artifacts: Path | None = None) -> MlflowTracker | None:
    """The tracker that a pipeline names: `sqlite`, a URI of MLflow, or `none`. Nothing is opened or imported yet.

    Args:
        home: folder of local state; `sqlite` lies there as mlflow.db beside mlartifacts/.
        artifacts: folder for the artifacts of a local database, in place of mlartifacts/.
    """
    if tracking == "none":
        return None
    url = tracking_url(tracking, home)
    local = (artifacts or home / "mlartifacts") if url.startswith("sqlite:") else artifacts
    return MlflowTracker(url, local)


def tracking_url(tracking: str, home: Path) -> str:
    """MLflow's own URI of `sqlite` or of a server. Raises UsageError for what it would turn into ./mlruns, and for credentials."""
    if holds_credentials(tracking, os.environ):
        hint = "put them into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        raise UsageError(f"tracking {redacted(tracking)}: holds credentials, which would be in logs and in names of processes; {hint}")
    if tracking == "sqlite":
        return f"sqlite:///{home.absolute() / 'mlflow.db'}"
    if tracking.startswith(("http://", "https://", "sqlite:", "postgresql", "mysql")):
        return tracking.rstrip("/")
    raise UsageError(
        f"tracking {redacted(tracking)}: is neither sqlite, none nor a URI of MLflow. Example: --tracking http://127.0.0.1:5000"
    )


class MlflowTracker:
    """`ports.Tracker` on an MLflow server or database."""

    def __init__(self, url: str, artifacts: Path | None = None):
        self.url = url
        self._artifacts = artifacts
        self._experiments: dict[str, str] = {}
        self._answers = False
        self.waits, self.answers = False, 0

    @cached_property
    def _client(self) -> MlflowClient:
        """Opening a database makes or checks its tables: 2.7 s for a new one, measured on 2 busy cores."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic", "urllib3.connectionpool"):
            logging.getLogger(name).setLevel(logging.ERROR)  # else each table that is made and each retry is announced
        if self.url.startswith("sqlite:///"):
            Path(self.url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        return MlflowClient(tracking_uri=self.url, registry_uri=self.url)

    def runs(self, experiment: str, tags: Mapping[str, str]) -> list[TrackedRun]:
        condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        with self._reach():
            self._experiments[experiment] = number = self.experiment(experiment)
            found = self._pages(
                lambda token: self._client.search_runs(
                    [number], condition, max_results=PAGE, order_by=["attributes.start_time ASC"], page_token=token
                )
            )
            return [
                TrackedRun(
                    run.info.run_id,
                    run.info.status,
                    dict(run.data.tags),
                    dict(run.data.params),
                    dict(run.data.metrics),
                    tuple((used.dataset.name, used.dataset.digest) for used in run.inputs.dataset_inputs),
                    # MLflow keeps the end of a run that goes on after all; there is no call that takes it back.
                    run.info.end_time / 1000 if run.info.end_time and run.info.status != "RUNNING" else None,
                )
                for run in found
            ]

    def experiment(self, name: str) -> str:
        """Its id. Makes it where it is missing; one that somebody deleted is taken back, since its name is ours."""
        with self._reach():
            from mlflow.exceptions import MlflowException

            found = self._client.get_experiment_by_name(name)
            if found is None:
                try:
                    location = (self._artifacts.absolute() / name).as_uri() if self._artifacts else None
                    return str(self._client.create_experiment(name, location, EXPERIMENT_TAGS))
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
                    found = self._client.get_experiment_by_name(name)  # another process was first
                    if found is None:
                        raise
            if found.lifecycle_stage == "deleted":
                self._client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)

    def create(self, experiment: str, name: str, tags: Mapping[str, str], start: float) -> str:
        with self._reach():
            number = self._experiments.get(experiment) or self.experiment(experiment)
            run = self._client.create_run(number, milliseconds(start), dict(tags), name)
            return str(run.info.run_id)

    def log(
        self, run: str, *, points: Sequence[Point] = (), params: Mapping[str, str] | None = None, tags: Mapping[str, str] | None = None
    ) -> None:
        with self._reach():
            from mlflow.entities import Metric, Param, RunTag

            metrics = [Metric(point.key, point.value, milliseconds(point.time), point.step) for point in points]
            parts: list[dict[str, Any]] = [{"metrics": metrics[at : at + METRICS_A_CALL]} for at in range(0, len(metrics), METRICS_A_CALL)]
            settings = [Param(key, value) for key, value in (params or {}).items()]
            parts += [{"params": settings[at : at + PARAMS_A_CALL]} for at in range(0, len(settings), PARAMS_A_CALL)]
            if tags:
                last = parts.pop() if parts else {}
                parts.append({**last, "tags": [RunTag(key, value) for key, value in tags.items()]})
            for part in parts:
                self._sends()
                self._client.log_batch(run, **part)

    def status(self, run: str, status: RunStatus, ended: float | None) -> None:
        with self._reach():
            if ended is None:
                self._client.update_run(run, status)
            else:
                self._client.set_terminated(run, status, milliseconds(ended))

    def delete(self, run: str) -> None:
        with self._reach():
            self._client.delete_run(run)

    def dataset(self, run: str, name: str, digest: str, source: str) -> None:
        with self._reach():
            from mlflow.entities import Dataset, DatasetInput, InputTag

            used = DatasetInput(Dataset(name, digest, "osctl", source), [InputTag("mlflow.data.context", "training")])
            self._client.log_inputs(run, [used])

    def artifacts(self, run: str, folder: str) -> dict[str, int]:
        with self._reach():
            found = self._client.list_artifacts(run, folder)
            return {file.path.removeprefix(f"{folder}/"): int(file.file_size or 0) for file in found if not file.is_dir}

    def attach(self, run: str, folder: str, path: Path) -> None:
        with self._reach():
            self._client.log_artifact(run, str(path), folder)

    def models(self, model: str) -> tuple[list[ModelVersion], dict[str, int]]:
        with self._reach():
            from mlflow.exceptions import MlflowException

            try:
                aliases = self._client.get_registered_model(model).aliases
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return [], {}
            found = self._pages(lambda token: self._client.search_model_versions(f"name='{model}'", max_results=PAGE, page_token=token))
            versions = [ModelVersion(int(version.version), dict(version.tags)) for version in found]
            return sorted(versions, key=lambda version: version.number), {alias: int(number) for alias, number in aliases.items()}

    def register(self, model: str, source: str, run: str, tags: Mapping[str, str]) -> int:
        with self._reach():
            from mlflow.exceptions import MlflowException

            try:
                self._client.create_registered_model(model)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            return int(self._client.create_model_version(model, source, run, dict(tags)).version)

    def alias(self, model: str, alias: str, version: int) -> None:
        with self._reach():
            self._client.set_registered_model_alias(model, alias, str(version))

    def unregister(self, model: str, version: int) -> None:
        with self._reach():
            self._client.delete_model_version(model, str(version))

    def _pages(self, ask: Any) -> Iterator[Any]:
        page = ask(None)
        yield from page
        while page.token:
            self._sends()
            page = ask(page.token)
            yield from page

    @contextlib.contextmanager
    def _reach(self) -> Iterator[None]:
        """Whatever MLflow, its database or the network says becomes Unreachable, in one line."""
        inside = self.waits
        try:
            if self.url.startswith("http") and not self._answers:
                self._ask_for_any_answer()
            self._client  # noqa: B018 - its import is nothing that a server owes
            from mlflow.exceptions import MlflowException
            from sqlalchemy.exc import SQLAlchemyError

            self._sends()
            try:
                yield
            except (MlflowException, SQLAlchemyError) as error:
                raise self._away(error) from error
            self._answers = True
            self.answers += 1
        except OSError as error:
            raise self._away(error) from error
        finally:
            self.waits = inside

    def _sends(self) -> None:
        """The next request goes out, so what was asked before has been answered."""
        self.answers += self.waits
        self.waits = self.url.startswith("http")

    def _ask_for_any_answer(self) -> None:
        """Raises OSError where a server is away, hangs or fails. What it means by another answer is for MLflow's client to find out."""
        self.waits, fact = True, ""
        try:
            with urllib.request.urlopen(f"{self.url}/api/2.0/mlflow/experiments/search?max_results=1", timeout=FIRST_ANSWER_S):
                pass
        except urllib.error.HTTPError as error:
            error.close()
            fact = f"answers {error.code}" if error.code >= 500 else ""
        except http.client.HTTPException as error:
            fact = f"does not speak HTTP ({type(error).__name__})"
        except OSError as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                fact = f"has not answered for {FIRST_ANSWER_S:g} s"
            elif not isinstance(reason, ssl.SSLError):  # then it is there; which authority signed for it is known to MLflow's client
                raise
        finally:
            self.waits = False
        if fact:
            raise OSError(fact)
        self.answers += 1

    def _away(self, error: Exception) -> Unreachable:
        self._answers = False
        said = f"MLflow {self.url}: {_first_line(error)}. Training does not wait for it; `osctl sync` brings it up to date"
        return Unreachable(redacted(said))


def milliseconds(time_s: float) -> int:
    return round(time_s * 1000)


def _first_line(error: BaseException) -> str:
    """What happened: where the network is at fault its own word, not the four that MLflow, requests and urllib3 wrapped around it."""
    root = error
    while (inner := root.__cause__ or root.__context__) is not None:
        root = inner
    lines = str(root if isinstance(root, OSError) else error).strip().splitlines()
    return lines[0][:300].rstrip(".") if lines else type(error).__name__
