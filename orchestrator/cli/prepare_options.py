"""Options and arguments of `osctl prepare`, and what they mean: which data set, which store, which cluster.

Owns the words of these options. Refuses to do what a command is for.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli import options
from orchestrator.cli.typed import typed

if TYPE_CHECKING:
    from opensora.dataset.prepare_config import PrepareConfig
    from orchestrator.cli.prepare_there import Wanted
    from orchestrator.pipelines.host import Host
    from orchestrator.ports import Store
    from orchestrator.recipe.cluster_profile import ClusterProfile


class Engine(enum.StrEnum):
    inline = "inline"
    ray = "ray"


EngineOf = Annotated[
    Engine | None,
    typer.Option(
        "--engine",
        help="What calls the steps: guards of one machine or pod (inline), or Ray Data; with --cluster a RayJob. Default: inline.",
    ),
]
Given = Annotated[
    str | None,
    typer.Argument(
        metavar="[PATH|URL|prepare.yaml]",
        help="A folder or a file of videos, an address, a list of videos (CSV, Parquet), or a prepare.yaml (osctl explain prepare). "
        "Default: ./prepare.yaml.",
    ),
]
Name = Annotated[str | None, typer.Option("--name", metavar="NAME", help="What to call the data set. Default: the folder's name.")]
Recipe = Annotated[
    str | None,
    typer.Option(
        "--file", "-f", metavar="PATH|NAME", help="Encode the clips for this recipe's stages, too, so that no training waits for it."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set one field of prepare.yaml, e.g. --set cut.max_s=5. Repeatable. It wins."),
]
Licence = Annotated[
    str | None, typer.Option("--licence", metavar="TEXT", help="Under which licence the videos are used; stands in every row.")
]

Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="NAME|FILE",
        help="Prepare in this cluster: a shipped profile or a file. Sources are addresses, the store is a bucket. "
        "OSCTL_CLUSTER names one only to find the bucket.",
        autocompletion=options.cluster_names,
    ),
]
There = Annotated[
    str | None,
    typer.Option("--cluster", metavar="NAME|FILE", help="The cluster in which it is prepared.", autocompletion=options.cluster_names),
]
Gpus = Annotated[
    int | None,
    typer.Option("--gpus", min=0, max=1024, help="With --cluster: GPUs for models that caption, score or encode. Default: the profile's."),
]
MOST_PODS = 1024
PodsOf = Annotated[
    int | None,
    typer.Option(
        "--pods",
        min=1,
        max=MOST_PODS,
        help="With --cluster: pods that decode. Default: 1; with --engine ray what the profile says (prepare.ray_pods).",
    ),
]
Named = Annotated[
    str | None, typer.Argument(metavar="[NAME]", help="A data set that is, or was, prepared. Default: the only one of this machine.")
]


def meant(name: str | None, store: Store, host: Host) -> str:
    """The data set that a command is about. Raises UsageError where it is not clear which."""
    from orchestrator.errors import UsageError
    from orchestrator.inputs.datasets import check_name
    from orchestrator.prepare.run_directory import RunDirectory
    from orchestrator.prepare.watching import names_in

    if name is not None:
        return check_name(name)
    here = host.home / "prepare"
    folders = sorted(one for one in here.iterdir() if (one / "prepare.yaml").is_file()) if here.is_dir() else []
    tries = [RunDirectory(one) for one in folders]
    useful = [one for one in tries if one.description() or one.result().get("class") != "failed"]  # of only failed ones each may be meant
    names = [one.path.name for one in useful or tries] or names_in(store)
    if len(names) != 1:
        known = f"there are: {', '.join(names)}" if names else "there is none"
        raise UsageError(f"prepare: which data set is meant? {known[0].upper()}{known[1:]} in {host.home} and {store.url}. Name one")
    return names[0]


def encoding(config: PrepareConfig, recipe: str | None, encode: bool | None) -> PrepareConfig:
    """Raises UsageError."""
    from orchestrator.pipelines.preparing import encoding_for

    return encoding_for(config, recipe, encode)


def store_of(store: str | None, host: Host, recipe: str | None, cluster: str | None = None) -> Store:
    """The store that is named, else OSCTL_STORE, else the recipe's; a bucket is reached as the cluster says. Raises UsageError."""
    from orchestrator.pipelines.workspace import reached, store_at
    from orchestrator.stores import open_store

    url = store_at(store, host, recipe)
    typed().store = url
    return open_store(url, reached(url, host, cluster, file=recipe).env)


def wanted_of(
    config: PrepareConfig, store: Store, host: Host, cluster: str, gpus: int | None, *, pods: int | None = None, replace: bool, retry: bool
) -> Wanted:
    """Raises UsageError."""
    from orchestrator.cli.prepare_there import Wanted
    from orchestrator.errors import UsageError
    from orchestrator.recipe.prices import with_named_price

    profile = with_named_price(site_at(cluster), host.env)
    gpus = profile.prepare.gpus if gpus is None else gpus
    if config.engine != "ray" and gpus and (pods or 1) > 1:
        raise UsageError(
            f"--pods {pods} with --gpus {gpus}: pods that divide the sources have no GPU, since one alone would use it. Leave one of them "
            "out, or ask for both with --engine ray"
        )
    many = profile.prepare.ray_pods if config.engine == "ray" else 1
    return Wanted(config, store, host, profile, gpus, pods or many, replace, retry)


def site_at(cluster: str) -> ClusterProfile:
    """Raises UsageError."""
    from orchestrator.pipelines.prepare_in_cluster import site_of
    from orchestrator.recipe.files import cluster_profile

    return site_of(cluster_profile(cluster))
