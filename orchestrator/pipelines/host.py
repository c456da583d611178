"""This machine, as a pipeline uses it: the folder of local state, and the environment variables that count.

A `Host` is a private copy of both. Nobody changes it, and nobody writes into `os.environ`: what a pipeline needs there besides (the
endpoint of its object store, where imports lie) is in the copy that its child processes are given.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import modules
from orchestrator.environment import unset_empty

if TYPE_CHECKING:
    from orchestrator.recipe.cluster_profile import ClusterProfile

DEFAULT_STORE = ".osctl/store"
SPELLINGS = {
    "OSCTL_S3_ENDPOINT": ("OSCTL_S3_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "AWS_REGION": ("AWS_REGION", "AWS_DEFAULT_REGION"),
}
"""What a cluster profile says of its object store, and the variables in which a person may have said otherwise."""


@dataclass(frozen=True)
class Host:
    home: Path
    """Folder of local state: store, run directories, MLflow's database. Absolute."""
    env: Mapping[str, str]
    folder: Path
    """What a relative path is relative to: the working folder, when this was made."""

    @classmethod
    def here(cls, env: Mapping[str, str] | None = None, home: Path | None = None) -> Host:
        """Of this process.

        Args:
            env: variables to go by. None: a copy of this process's.
            home: folder of local state. None: `OSCTL_HOME`, else ./.osctl.
        """
        variables = dict(os.environ if env is None else env)
        unset_empty(variables)
        place = Path(home if home is not None else variables.get("OSCTL_HOME") or ".osctl").absolute()
        return cls(place, variables | {"OSCTL_HOME": str(place)}, Path.cwd())

    def having(self, **variables: str) -> Host:
        """The same with these variables, too."""
        return replace(self, env={**self.env, **variables})

    def patient(self, seconds: str) -> Host:
        """The same with so much patience for an object store, unless the person's environment says another."""
        return self if "OSCTL_S3_PATIENCE_S" in self.env else self.having(OSCTL_S3_PATIENCE_S=seconds)

    def reaching(self, cluster: ClusterProfile | None) -> Host:
        """The same, that finds the object store as the cluster's pods do, where the person's environment does not say how."""
        said = cluster.store_env() if cluster is not None else {}
        return self.having(**{name: value for name, value in said.items() if not any(self.env.get(other) for other in SPELLINGS[name])})

    @property
    def latents(self) -> Path:
        """Folder of encoded clips that the attempts of this machine share. `OSCTL_LATENTS`, else `latents` in `home`."""
        return self.folder / (self.env.get("OSCTL_LATENTS") or self.home / "latents")

    @property
    def imports(self) -> Path:
        """Folder of imports that were brought here from a store, each under its digest."""
        return self.home / "imports"

    def store_url(self, configured: str) -> str:
        """A URL, with one spelling a place since names of cluster objects are made of it; a folder as an absolute path.

        The default folder follows `home`.
        """
        scheme, separator, rest = configured.partition("://")
        if separator:
            place, _, prefix = rest.partition("/")
            return f"{scheme}://{place}" + (f"/{prefix.strip('/')}" if prefix.strip("/") else "")
        return str(self.home / "store") if configured == DEFAULT_STORE else str(self.folder / configured)

    def told_of(self, places: Mapping[str, str]) -> Host:
        """The same, whose children know where imports lie (`opensora.imports`): these, and those that were told of before."""
        from opensora import imports

        file = self.home / "places.json"
        if not places and not file.exists():
            return self
        host = self.having(**{imports.VARIABLE: str(file)})
        if places:
            import json

            self.home.mkdir(parents=True, exist_ok=True)
            with (self.home / "places.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # another launch of this machine may add its own at the same moment
                content = {"schema": 1, "places": imports.places(host.env) | dict(places)}
                write_whole(file, (json.dumps(content, indent=1) + "\n").encode())
        return host

    def for_children(self) -> dict[str, str]:
        """The environment of a Python child of ours (`orchestrator.modules`)."""
        return modules.environment(self.env)


def write_whole(file: Path, content: bytes) -> None:
    """So that no reader sees a part of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}.partial")
    partial.write_bytes(content)
    partial.replace(file)
