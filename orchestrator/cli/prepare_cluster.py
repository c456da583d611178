"""Commands about preparations in a cluster: cancel, render, and drive, which their pods run. `osctl prepare run --cluster` starts one."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli import options
from orchestrator.cli.prepare_options import (
    MOST_PODS,
    Cluster,
    EngineOf,
    Given,
    Gpus,
    Name,
    Named,
    PodsOf,
    Recipe,
    Set,
    There,
    encoding,
    meant,
    site_at,
    store_of,
    wanted_of,
)


def cancel(
    name: Named = None,
    store: options.Store = None,
    cluster: There = None,
    now: Annotated[bool, typer.Option("--now", help="Do not finish the videos at hand: they are begun anew by the next run.")] = False,
) -> None:
    """Ask whoever prepares it, here or elsewhere, to save and stop. It goes on with the command that began it.

    Examples: osctl prepare cancel mine          osctl prepare cancel mine --store s3://bucket/runs --cluster my-pool.yaml
    """
    from orchestrator.cli import prepare_there
    from orchestrator.pipelines.host import Host

    host = Host.here()
    opened = store_of(store, host, None, cluster)
    prepare_there.cancel(opened, meant(name, opened, host), host, site_at(cluster) if cluster is not None else None, now=now)


def render(
    given: Given = None,
    name: Name = None,
    file: Recipe = None,
    changes: Set = None,
    store: options.Store = None,
    cluster: Cluster = None,
    gpus: Gpus = None,
    engine: EngineOf = None,
    pods: PodsOf = None,
) -> None:
    """Print what run --cluster would send, as kubectl apply takes it. Needs no cluster.

    Examples: osctl prepare render prepare.yaml --cluster h800-64 --store s3://bucket/runs

    osctl prepare render s3://bucket/films --cluster my-pool.yaml --store s3://bucket/runs | kubectl apply --dry-run=server -f -
    """
    from orchestrator.cli import prepare_there
    from orchestrator.errors import UsageError
    from orchestrator.pipelines.host import Host
    from orchestrator.recipe.preparation import of_typed

    host = Host.here()
    own = {} if engine is None else {"engine": engine.value}
    config = encoding(of_typed(given, name=name, settings=changes or (), own=own, env=host.env), file, None)
    named = cluster or host.env.get("OSCTL_CLUSTER")
    if named is None:
        raise UsageError(f"prepare render {config.name}: no manifest is written for this machine. Name a --cluster")
    opened = store_of(store, host, config.encode, named)
    prepare_there.render(wanted_of(config, opened, host, named, gpus, pods=pods, replace=True, retry=False))


def drive(
    store: Annotated[str, typer.Option(help="Object store.")],
    name: Annotated[str, typer.Option(help="Name of the data set.")],
    order: Annotated[str, typer.Option(help="Digest of the order in the store.")],
    shards: Annotated[int, typer.Option(min=1, max=MOST_PODS, help="Pods among which the sources are divided. Default: 1.")] = 1,
) -> None:
    """Prepare as an order in the store says, from inside a cluster. People type osctl prepare run --cluster.

    Example: osctl prepare drive --store s3://bucket/runs --name mine --order 0123456789abcdef
    """
    from orchestrator.cli import prepare_there
    from orchestrator.pipelines.host import Host
    from orchestrator.stores import open_store

    prepare_there.drive(open_store(store), name, order, Host.here(), shards)
