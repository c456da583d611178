"""MLflow as a `Tracker`: runs, metrics, artifacts and registered models through its client.

The only module that imports mlflow. Owns what MLflow needs to be quiet, quick to give up, and private (no telemetry, no `./mlruns`).
Refuses to know what the runs mean (`orchestrator.tracking.runs`) and to load a model: a registered version is a name for a checkpoint in
the store, never a pickle.

If the answer of a create was lost, the object may be created twice, because MLflow has no idempotency keys. `orchestrator.tracking.sync`
finds such duplicates by our own key and keeps the first.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from orchestrator.effects import perform
from orchestrator.errors import Unreachable, UsageError
from orchestrator.labels import Tag
from orchestrator.ports import LoggedCheckpoint, ModelVersion, Point, RunStatus, TrackedRun
from orchestrator.redact import holds_credentials, redacted

if TYPE_CHECKING:
    from mlflow import MlflowClient

METRICS_A_CALL = 900
"""MLflow takes 1000 metrics, parameters and tags in a call, together."""
PARAMS_A_CALL = 100
PAGE = 1000
"""Results in an answer to a search, at most."""
EXPERIMENT_TAGS = {Tag.EXPERIMENT_KIND: "custom_model_development"}
"""Without this tag MLflow's pages guess the kind of experiment, and show the pages for language-model traces first."""

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # its default, 7 with backoff, notices a dead server after minutes
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # CVE-2026-0545: its job API has no authentication
}
"""Variables that are set before mlflow is imported, unless the user has set them."""
OLDEST = "2.14"
"""The oldest MLflow server that is tested. An older one may lack some calls; the others are still used."""
FIRST_ANSWER_S = 10.0
"""How long a server may take for its very first answer. The first request is sent without mlflow, whose client would wait for minutes."""
_PAGE = re.compile(r"<(!doctype|html|head)\b.*", re.I | re.S)


def open_tracker(tracking: str, home: Path, artifacts: Path | None = None) -> MlflowTracker | None:
    """The tracker that a pipeline names: `sqlite` or a URI of MLflow. Returns None for `none`. Nothing is opened or imported yet.

    Args:
        home: folder of local state; for `sqlite` it holds mlflow.db and mlartifacts/.
        artifacts: folder for the artifacts of a local database. None means mlartifacts/ in `home`.

    Raises:
        UsageError: see `tracking_url`.
    """
    if tracking == "none":
        return None
    url = tracking_url(tracking, home)
    local = (artifacts or home / "mlartifacts") if url.startswith("sqlite:") else artifacts
    return MlflowTracker(url, local)


def tracking_url(tracking: str, home: Path) -> str:
    """The URI for MLflow. Raises UsageError if it has credentials, or if MLflow would not take it for a URI and make a folder ./mlruns."""
    if holds_credentials(tracking, os.environ):
        hint = "put them into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        raise UsageError(f"tracking {redacted(tracking)}: holds credentials, which logs and lists of processes would show; {hint}")
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
        self._repositories: dict[str, Any] = {}
        self._answers = False
        self.waits, self.answers = False, 0

    @cached_property
    def _client(self) -> MlflowClient:
        """MLflow's own client. Opening a database makes or checks its tables: 2.7 s for a new one, measured on 2 busy cores."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic", "urllib3.connectionpool"):
            logging.getLogger(name).setLevel(logging.ERROR)  # otherwise they log each table and each retry
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
                    # MLflow keeps the end time of a run that was set to RUNNING again: no call removes it.
                    run.info.end_time / 1000 if run.info.end_time and run.info.status != "RUNNING" else None,
                )
                for run in found
            ]

    def experiment(self, name: str) -> str:
        """MLflow's id of the experiment. It is created if it is missing, and restored if it was deleted, since the name is ours."""
        with self._reach():
            from mlflow.exceptions import MlflowException

            found = self._client.get_experiment_by_name(name)
            if found is None:
                try:
                    # a person may choose any name; here it becomes one folder, and a plain name keeps its own name
                    folder = name if re.fullmatch(r"\w[\w. -]*", name) else f"_{quote(name, safe=' ')}"
                    location = (self._artifacts.absolute() / folder).as_uri() if self._artifacts else None
                    make = partial(self._client.create_experiment, name, location, EXPERIMENT_TAGS)
                    return str(perform("mlflow.create_experiment", name, make))
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
                    found = self._client.get_experiment_by_name(name)  # another process was first
                    if found is None:
                        raise
            if found.lifecycle_stage == "deleted":
                perform("mlflow.restore_experiment", name, partial(self._client.restore_experiment, found.experiment_id))
            return str(found.experiment_id)

    def create(self, experiment: str, name: str, tags: Mapping[str, str], start: float) -> str:
        with self._reach():
            number = self._experiments.get(experiment) or self.experiment(experiment)
            make = partial(self._client.create_run, number, milliseconds(start), dict(tags), name)
            run = perform("mlflow.create_run", name, make)
            return str(run.info.run_id)

    def log(
        self, run: str, *, points: Sequence[Point] = (), params: Mapping[str, str] | None = None, tags: Mapping[str, str] | None = None
    ) -> None:
        with self._reach():
            from mlflow.entities import Metric, Param, RunTag

            settings = [Param(key, value) for key, value in (params or {}).items()]
            parts: list[dict[str, Any]] = [{"params": settings[at : at + PARAMS_A_CALL]} for at in range(0, len(settings), PARAMS_A_CALL)]
            metrics = [Metric(point.key, point.value, milliseconds(point.time), point.step) for point in points]
            parts += [{"metrics": metrics[at : at + METRICS_A_CALL]} for at in range(0, len(metrics), METRICS_A_CALL)]
            if tags:  # with the last points, whose time or number they say: of a process that dies in between, points alone would stay
                last = parts.pop() if parts else {}
                parts.append({**last, "tags": [RunTag(key, value) for key, value in tags.items()]})
            for part in parts:
                self._sends()
                perform("mlflow.log_batch", run, partial(self._client.log_batch, run, **part))

    def status(self, run: str, status: RunStatus, ended: float | None) -> None:
        with self._reach():
            if ended is None:
                perform("mlflow.update_run", run, partial(self._client.update_run, run, status))
            else:
                perform("mlflow.end_run", run, partial(self._client.set_terminated, run, status, milliseconds(ended)))

    def delete(self, run: str) -> None:
        with self._reach():
            perform("mlflow.delete_run", run, partial(self._client.delete_run, run))

    def dataset(self, run: str, name: str, digest: str, source: str) -> None:
        with self._reach():
            from mlflow.entities import Dataset, DatasetInput, InputTag

            used = DatasetInput(Dataset(name, digest, "osctl", source), [InputTag(Tag.DATA_CONTEXT, "training")])
            perform("mlflow.log_inputs", run, partial(self._client.log_inputs, run, [used]))

    def artifacts(self, run: str, folder: str) -> dict[str, int]:
        with self._reach():
            found = self._repository(run).list_artifacts(folder)
            return {file.path.removeprefix(f"{folder}/"): int(file.file_size or 0) for file in found if not file.is_dir}

    def _repository(self, run: str) -> Any:
        """Where a run's artifacts lie. MLflow's own `list_artifacts` first asks for the run's models, which servers below 3 do not know."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        if run not in self._repositories:
            location = self._client.get_run(run).info.artifact_uri
            self._repositories[run] = get_artifact_repository(location, tracking_uri=self.url)
        return self._repositories[run]

    def attach(self, run: str, folder: str, path: Path) -> None:
        with self._reach():
            perform("mlflow.log_artifact", run, partial(self._client.log_artifact, run, str(path), folder))

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
                perform("mlflow.create_model", model, partial(self._client.create_registered_model, model))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            make = partial(self._client.create_model_version, model, source, run, dict(tags))
            return int(perform("mlflow.create_version", model, make).version)

    def alias(self, model: str, alias: str, version: int) -> None:
        with self._reach():
            perform("mlflow.set_alias", model, partial(self._client.set_registered_model_alias, model, alias, str(version)))

    def unregister(self, model: str, version: int) -> None:
        with self._reach():
            perform("mlflow.delete_version", model, partial(self._client.delete_model_version, model, str(version)))

    def log_checkpoint(self, experiment: str, run: str, checkpoint: LoggedCheckpoint, unique: Mapping[str, str]) -> str | None:
        with self._reach():
            from mlflow.entities import LoggedModelOutput, Metric

            number = self._experiments.get(experiment) or self.experiment(experiment)
            try:
                found = self._logged_models(number, unique)
            except _faults() as error:
                if _is_unknown_call(error):
                    return None
                raise
            if not found:
                make = partial(
                    self._client.create_logged_model, number, checkpoint.name, run, {**checkpoint.tags, **unique}, model_type="STDiT"
                )
                perform("mlflow.create_logged_model", checkpoint.name, make)
                found = self._logged_models(number, unique)  # another process may have been first
            for doubled in found[1:]:
                perform("mlflow.delete_logged_model", run, partial(self._client.delete_logged_model, doubled.model_id))
            model, (name, digest) = found[0], checkpoint.dataset or (None, None)
            there = {(metric.key, metric.timestamp) for metric in model.metrics or []}
            metrics = [
                Metric(point.key, point.value, milliseconds(point.time), 0, model.model_id, name, digest)
                for point in checkpoint.points
                if (point.key, milliseconds(point.time)) not in there
            ]
            if metrics:
                perform("mlflow.log_batch", run, partial(self._client.log_batch, run, metrics=metrics))
            if str(model.status) != "READY":
                known = self._client.get_run(run).outputs  # a database refuses an output that is there
                if not any(output.model_id == model.model_id for output in (known.model_outputs if known else [])):
                    output = LoggedModelOutput(model.model_id, checkpoint.step)
                    perform("mlflow.log_outputs", run, partial(self._client.log_outputs, run, [output]))
                perform("mlflow.finalize_logged_model", run, partial(self._client.finalize_logged_model, model.model_id, "READY"))
            return str(model.model_id)

    def _logged_models(self, experiment: str, tags: Mapping[str, str]) -> list[Any]:
        """The oldest first."""
        self._sends()
        condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found = self._client.search_logged_models([experiment], condition)
        return sorted(found, key=lambda model: (model.creation_timestamp, model.model_id))

    def _pages(self, ask: Any) -> Iterator[Any]:
        page = ask(None)
        yield from page
        while page.token:
            self._sends()
            page = ask(page.token)
            yield from page

    @contextlib.contextmanager
    def _reach(self) -> Iterator[None]:
        """Turn every error of MLflow, its database or the network into Unreachable, in one line. Every call is made within this."""
        inside = self.waits
        try:
            if self.url.startswith("http") and not self._answers:
                self._ask_for_any_answer()
            try:
                self._client  # noqa: B018 - import it before `_sends`, so that its import does not count as waiting for the server
                self._sends()
                yield
            except _faults() as error:
                raise self._away(error) from error
            self._answers = True
            self.answers += 1
        except OSError as error:
            raise self._away(error) from error
        finally:
            self.waits = inside

    def _sends(self) -> None:
        """Count requests: the next one is sent now, so the one before it has been answered."""
        self.answers += self.waits
        self.waits = self.url.startswith("http")

    def _ask_for_any_answer(self) -> None:
        """Raise OSError if a server is down, hangs or fails. Any other answer is accepted: MLflow's client finds out what it means."""
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
            elif not isinstance(reason, ssl.SSLError):  # an SSL error shows that a server is there; MLflow's client checks certificates
                raise
        finally:
            self.waits = False
        if fact:
            raise OSError(fact)
        self.answers += 1

    def _away(self, error: Exception) -> Unreachable:
        self._answers = False
        said = f"MLflow {self.url}: {_first_line(error)}"
        if _is_unknown_call(error) and (version := self._version()):
            return Unreachable(
                redacted(f"{said}. The server is MLflow {version}; {OLDEST} or newer is needed. Upgrade it, then: osctl sync")
            )
        if "file is not a database" in said:
            return Unreachable(redacted(f"{said}. Move it away; `osctl sync` makes it anew"))
        return Unreachable(redacted(f"{said}. Training does not wait for it; `osctl sync` brings it up to date"))

    def _version(self) -> str:
        """Version of the server. Empty means that it does not say."""
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            self.waits = True
            with urllib.request.urlopen(f"{self.url}/version", timeout=FIRST_ANSWER_S) as answer:
                said: str = answer.read(100).decode().strip()
                self.answers += 1
                return said if re.fullmatch(r"\d+(\.\w+)+", said) else ""
        return ""


def _faults() -> tuple[type[Exception], ...]:
    """The errors that MLflow and its database raise. Called only after an error, when `_client` has imported both."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError


def milliseconds(time_s: float) -> int:
    """MLflow's times are whole milliseconds."""
    return round(time_s * 1000)


def _first_line(error: BaseException) -> str:
    """The error in one line. For a network fault this is the innermost error's text, without what MLflow, requests and urllib3 add."""
    root = error
    while (inner := root.__cause__ or root.__context__) is not None:
        root = inner
    lines = _without_pages(str(root if isinstance(root, OSError) else error)).strip().splitlines()
    return lines[0][:300].rstrip(".") if lines else type(error).__name__


def _without_pages(text: str) -> str:
    """The text, with an HTML page (the answer of a proxy or an old server) replaced by the page's title."""
    page = _PAGE.search(text)
    if page is None:
        return text
    title = re.search(r"<title>\s*(.*?)\s*</title>", page[0], re.I | re.S)
    return text[: page.start()].rstrip("'\" :") + (f": {' '.join(title[1].split())}" if title else ": a page of HTML")


def _is_unknown_call(error: Exception) -> bool:
    """Whether the server says that it does not have this call."""
    return getattr(error, "error_code", "") == "ENDPOINT_NOT_FOUND" or bool(re.search(r"error code (404|405) != 200", str(error)))
