"""`osctl weights`: imported weights and encoders, brought into the store by digest. add, list."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from opensora.printable import several
from orchestrator.cli import options, output
from orchestrator.cli.subject import opened
from orchestrator.cli.typed import Command

app = typer.Typer(no_args_is_help=True, help="Imported weights and encoders: in the store by digest, with their source and licence.")


@app.command(cls=Command)
def add(
    name: Annotated[
        str, typer.Argument(help="What to call it: lower-case letters, digits, '-' and '.'. A stage then says `weights: NAME`.")
    ],
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A file or folder, s3://bucket/…, https://…, or owner/name[@revision] of the hub.")
    ],
    licence: Annotated[str | None, typer.Option("--licence", metavar="TEXT", help="Default: what its model card says.")] = None,
    role: Annotated[
        str | None, typer.Option("--as", metavar="weights|autoencoder|text", help="As which part of a stage. Default: as its files say.")
    ] = None,
    sha256: Annotated[str | None, typer.Option("--sha256", metavar="HEX", help="What the one file must have.")] = None,
    file: options.File = None,
    store: options.Store = None,
    output_: options.Output = output.Format.table,
) -> None:
    """Bring weights or an encoder into the store: every file hashed, its source and licence noted. Repeating it sends nothing twice.

    Examples: osctl weights add pixart ./PixArt-XL-2-512x512.pth          osctl weights add t5 owner/t5@main --as text --licence apache-2.0
    """
    from orchestrator.errors import NotFound, Refused, UsageError
    from orchestrator.inputs import imports
    from orchestrator.inputs.import_sources import ImportSources
    from orchestrator.pipelines.host import Host
    from orchestrator.redact import holds_credentials, typed

    imports.check_name(name)
    if role not in (None, "weights", "autoencoder", "text"):
        raise UsageError(f"--as {typed(role or '')}: is none of weights, autoencoder, text. Name one of them")
    host = Host.here()
    env = host.env
    if holds_credentials(source, env) or holds_credentials(licence or "", env):
        raise UsageError(f"weights add {name}: holds credentials, and would be written into the store. Put them into the environment")
    store_ = opened(file, store=store, host=host).store
    try:
        found = ImportSources(host.home, env).fetch(source, role, renew=True)  # type: ignore[arg-type]
    except NotFound:
        raise Refused(f"weights add {name}: {typed(source)} is not there, as seen from this machine. Correct the source") from None
    if sha256 is not None and sha256.lower() not in (one.sha256 for one in found.imported.files.values()):
        digests = ", ".join(f"{each} {one.sha256}" for each, one in found.imported.files.items())
        raise Refused(f"weights add {name}: no file has sha256 {sha256}; found: {digests}. Nothing was written; check the source")
    store_.probe()
    digest = imports.put(store_, found.imported, found.files)
    origin = imports.Source(
        manifest=digest, role=found.role, source=found.source, licence=licence or found.licence, time=time.time(), holder=imports.holder()
    )
    imports.add_source(store_, origin)
    one = imports.add_source(store_, origin.model_copy(update={"name": name}))
    if one.licence is None:
        output.note(f"{name}: its source says no licence; note it with --licence")
    output.note(f"{name}: {several(len(found.files), 'file')}, {found.imported.size / 1e6:,.2f} MB, from {found.source}")
    output.emit(_row(one), output_, _COLUMNS)


@app.command("list", cls=Command)
def list_(file: options.File = None, store: options.Store = None, output_: options.Output = output.Format.table) -> None:
    """The imports that have a name in a store.

    Example: osctl weights list --store s3://bucket/runs
    """
    from orchestrator.inputs import imports

    store_ = opened(file, store=store).store
    rows = [_row(one) for one in imports.named(store_)]
    if not rows:
        output.note(f"no imports in {store_.url}. Bring one in with: osctl weights add NAME SOURCE")
    output.emit(rows, output_, _COLUMNS)


_COLUMNS = {"name": "name", "role": "as", "short": "digest", "licence": "licence", "source": "source"}


def _row(one: Any) -> dict[str, Any]:
    return {
        "name": one.name, "role": one.role, "digest": one.manifest, "short": one.manifest[:12], "licence": one.licence,
        "source": one.source, "time": one.time, "holder": one.holder,
    }  # fmt: skip
