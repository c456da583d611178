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
    from orchestrator.cost import Prices
    from orchestrator.ledger import Ledger
    from orchestrator.ports import Store


def home() -> Path:
    """Folder of local state: store, run directories, MLflow's database. `OSCTL_HOME`, else ./.osctl."""
    return Path(os.environ.get("OSCTL_HOME", ".osctl")).absolute()


@dataclass(frozen=True)
class Workspace:
    """One pipeline and everything beside it, opened only where asked for: `plan` needs no store, `list` no pipeline."""

    pipeline: Pipeline

    @classmethod
    def open(
        cls,
        file: str | None,
        *,
        settings: Sequence[str] | None = None,
        store: str | None = None,
        tracking: str | None = None,
        data: str | None = None,
    ) -> Workspace:
        from orchestrator import config
        from orchestrator.adapters.local import cuda_devices

        overrides = dict(split(setting) for setting in settings or ())
        for name, value in (("store", store), ("tracking", tracking)):
            if value is not None:
                overrides[name] = value
        pipeline = config.load(config.find(file), overrides=overrides, env=os.environ)
        if data:
            pipeline = config.with_data(pipeline, data)
        return cls(config.on_devices(pipeline, cuda_devices()))

    @cached_property
    def store(self) -> Store:
        from orchestrator.adapters import open_store

        return open_store(self.store_url)

    @property
    def store_url(self) -> str:
        return store_url(self.pipeline.store)

    @cached_property
    def ledger(self) -> Ledger:
        from orchestrator.ledger import Ledger

        return Ledger(self.store, self.pipeline.name)

    @cached_property
    def prices(self) -> Prices:
        from orchestrator.cost import load_prices

        return load_prices().at(self.pipeline.cluster)


def store_url(configured: str) -> str:
    """A URL as it is; a folder as an absolute path. The default folder follows OSCTL_HOME."""
    if "://" in configured:
        return configured
    return str(home() / "store") if configured == ".osctl/store" else str(Path(configured).absolute())


def split(setting: str) -> tuple[str, str]:
    key, equals, value = setting.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {setting}: is not KEY=VALUE. Example: --set stage2.steps=500")
    return key.strip(), value
