"""From what a person typed to what the library wants: the resolved pipeline, its store and ledger, the price list, the local folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import UsageError

if TYPE_CHECKING:
    from orchestrator.config import Pipeline
    from orchestrator.history import History
    from orchestrator.ledger import Ledger
    from orchestrator.ports import Store
    from orchestrator.prices import Prices


def home() -> Path:
    """Folder of local state: store, run directories, MLflow's database. `OSCTL_HOME`, else ./.osctl."""
    return Path(os.environ.get("OSCTL_HOME", ".osctl")).absolute()


def latents() -> Path:
    """Folder of encoded clips that the attempts of this machine share. `OSCTL_LATENTS`, else `latents` in `home()`."""
    return Path(os.environ.get("OSCTL_LATENTS") or home() / "latents").absolute()


@dataclass(frozen=True)
class Workspace:
    """One pipeline and everything beside it, opened only where asked for: `plan` needs no store, `list` no pipeline."""

    pipeline: Pipeline
    remarks: tuple[str, ...] = ()
    """What the store holds of its launches and cannot be read (`look.launched`)."""

    @classmethod
    def open(
        cls,
        file: str | None,
        *,
        settings: Sequence[str] | None = None,
        store: str | None = None,
        tracking: str | None = None,
        data: str | None = None,
        backend: str | None = None,
        cluster: str | None = None,
        prices: Path | None = None,
    ) -> Workspace:
        """Raises UsageError."""
        from orchestrator import config
        from orchestrator.adapters.local import cuda_devices

        overrides = dict(split(setting) for setting in settings or ())
        if cluster is not None and backend is None and "backend" not in overrides and not os.environ.get("OSCTL_BACKEND"):
            backend = "kubernetes"
        for name, value in (("store", store), ("tracking", tracking), ("backend", backend), ("cluster", cluster)):
            if value is not None:
                overrides[name] = value
        pipeline = config.load(config.find(file), overrides=overrides, env=os.environ)
        if data:
            pipeline = config.with_data(pipeline, data)
        if prices is not None:
            os.environ["OSCTL_PRICES"] = str(prices.absolute())  # MLflow's projection, a process beside this one, goes by the same
        if pipeline.cluster is not None and os.environ.get("OSCTL_PRICES"):
            from orchestrator.prices import with_named_price

            pipeline = pipeline.model_copy(update={"cluster": with_named_price(pipeline.cluster)})
        return cls(config.on_devices(pipeline, cuda_devices()))

    @classmethod
    def at(cls, file: str | None, *, store: str | None = None, cluster: str | None = None) -> Workspace:
        """For commands about what was launched: OSCTL_CLUSTER is where to look, whatever backend the file names. See `launched`."""
        return cls.open(file, store=store, cluster=cluster or os.environ.get("OSCTL_CLUSTER") or None)

    @cached_property
    def store(self) -> Store:
        from orchestrator.adapters import open_store

        self.lend_environment()
        return open_store(self.store_url)

    def lend_environment(self) -> None:
        """Let this process and its children find the object store as the cluster's pods do, where the person's environment is silent."""
        if self.pipeline.cluster is None or not self.store_url.startswith("s3://"):
            return
        spoken = {
            "OSCTL_S3_ENDPOINT": ("OSCTL_S3_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
            "AWS_REGION": ("AWS_REGION", "AWS_DEFAULT_REGION"),
        }
        for name, value in self.pipeline.cluster.store_env().items():
            if not any(os.environ.get(other) for other in spoken[name]):
                os.environ[name] = value

    @property
    def store_url(self) -> str:
        return store_url(self.pipeline.store)

    @cached_property
    def ledger(self) -> Ledger:
        from orchestrator.ledger import Ledger

        return Ledger(self.store, self.pipeline.name)

    @cached_property
    def prices(self) -> Prices:
        """Of what is about to be made. What was made has its own in the ledger: see `history`."""
        from orchestrator.prices import named_prices

        return named_prices().at(self.pipeline.cluster)

    @cached_property
    def history(self) -> History:
        from orchestrator.history import History
        from orchestrator.prices import named_prices

        return History(self.ledger, named_prices)


def store_url(configured: str) -> str:
    """A URL, with one spelling a place since names of cluster objects are made of it; a folder as an absolute path.

    The default folder follows OSCTL_HOME.
    """
    scheme, separator, rest = configured.partition("://")
    if separator:
        place, _, prefix = rest.partition("/")
        return f"{scheme}://{place}" + (f"/{prefix.strip('/')}" if prefix.strip("/") else "")
    return str(home() / "store") if configured == ".osctl/store" else str(Path(configured).absolute())


def split(setting: str) -> tuple[str, str]:
    key, equals, value = setting.partition("=")
    if not equals or not key:
        from orchestrator.redact import typed

        raise UsageError(f"--set {typed(setting)}: is not KEY=VALUE. Example: --set stage2.steps=500")
    return key.strip(), value
