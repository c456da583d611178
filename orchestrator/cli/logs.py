"""Commands that print what trainers and drivers wrote: logs, events. Both lie in the store, so they outlive pods, nodes and drivers."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli import options, output
from orchestrator.cli.subject import launched, launched_or_stage, say, snapshot
from orchestrator.cli.typed import expanded

if TYPE_CHECKING:
    from orchestrator.accounting.status import Snapshot
    from orchestrator.ledger.records import Event
    from orchestrator.ledger.store import Ledger, LogPiece

FOLLOW_S = 0.5
"""Seconds between two questions for new pieces; on S3 each is a request a node."""
RANK = re.compile(rb"^\[rank(\d+)\]")
"""How torchrun begins a line of one rank."""


def logs(
    pipeline: options.NamedOrStage = None,
    stage: Annotated[str | None, typer.Argument(help="Stage; default: the one that ran last.", autocompletion=options.stage_names)] = None,
    rank: Annotated[
        str | None, typer.Option("--rank", metavar="N,N-N", help="Lines of these global ranks alone, e.g. 0,8-15. Default: all lines.")
    ] = None,
    node: Annotated[int | None, typer.Option("--node", min=0, help="One node's output, counted from 0. Default: all, by time.")] = None,
    attempt: Annotated[int | None, typer.Option(min=1, help="Attempt number; default: the last.")] = None,
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="DURATION", help="What was written in the last 30s, 10m, 2h or 1d; to a piece of a few seconds."),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the attempt ends.")] = False,
    file: options.LongFile = None,
    store: options.Store = None,
    cluster: options.Cluster = None,
) -> None:
    """Print what the trainer of an attempt wrote. Logs lie in the store: they outlive the process and the pod that wrote them.

    Examples: osctl logs stage2 -f          osctl logs stage2 --rank 0,8 --since 10m          osctl logs demo stage2 --attempt 2
    """
    from orchestrator.errors import NotFound, Refused

    ranks = ranks_of(rank) if rank is not None else None
    after = time.time() - seconds_of(since) if since is not None else None
    workspace, stage = launched_or_stage(pipeline, stage, file, store=store, cluster=cluster)
    ledger = workspace.ledger.lenient()
    meant = chosen(ledger, snapshot(workspace), stage, attempt)
    if node is not None and node >= meant.nodes:
        from orchestrator.errors import UsageError

        raise UsageError(f"logs --node {node}: attempt {meant.attempt} of {meant.stage} has nodes 0 to {meant.nodes - 1}. Name one")
    unread = NewPieces(ledger, meant, range(meant.nodes) if node is None else [node])
    lines = Lines(ranks, lambda line: output.of_trainer(line.decode(errors="replace")))
    timeless, silent = False, True
    while True:
        ended = has_ended(ledger, meant)
        for piece in unread:
            if after is not None and piece.written is not None and piece.written < after:
                continue
            timeless = timeless or (after is not None and piece.written is None)
            try:
                lines.feed(piece.node, piece.text())
            except (Refused, NotFound) as error:  # the pieces after it are shown all the same
                say([f"{piece.key} cannot be read: {error}; it is left out"])
            silent = False
        if ended or not follow:
            break
        time.sleep(FOLLOW_S)
    lines.end()
    if silent:
        output.note(f"{meant.stage} attempt {meant.attempt}: nothing was written{' since then' if since else ' yet'}; see: osctl status")
    if timeless:
        output.note("pieces of an older version of osctl carry no time: they are shown whole")


@dataclass(frozen=True)
class Meant:
    """The attempt whose output is asked for."""

    stage: str
    inputs_digest: str
    attempt: int
    nodes: int


def has_ended(ledger: Ledger, meant: Meant) -> bool:
    """Whether the attempt has an outcome. One that cannot be read counts too: a driver has written it."""
    outcome = ledger.outcome(meant.stage, meant.inputs_digest, meant.attempt)
    return outcome is not None or ledger.keys.outcome(meant.stage, meant.inputs_digest, meant.attempt) in ledger.remarks


def chosen(ledger: Ledger, current: Snapshot, stage: str | None, attempt: int | None) -> Meant:
    """The attempt that is meant. Raises UsageError."""
    from orchestrator.errors import UsageError

    tried = [status for status in current.stages if status.attempts]
    named = [status for status in tried if stage in (None, status.name)]
    if not named:
        known = ", ".join(status.name for status in tried) or "none"
        raise UsageError(f"logs{f' {stage}' if stage else ''}: no attempt in the ledger; stages that ran: {known}. Run: osctl launch")
    selected = named[-1]
    numbers = [one.number for one in selected.attempts]
    number = attempt or numbers[-1]
    if number not in numbers:
        raise UsageError(
            f"logs {selected.name}: attempt {number} is not in the ledger; it has {numbers[0]} to {numbers[-1]}. Name one of those"
        )
    assert selected.inputs_digest is not None
    intent = ledger.intent(selected.name, selected.inputs_digest, number)
    # What was written outlives an intent that cannot be read.
    nodes = (
        intent.nodes if intent else 1 + max((piece.node for piece in ledger.log(selected.name, selected.inputs_digest, number)), default=0)
    )
    return Meant(selected.name, selected.inputs_digest, number, nodes)


class NewPieces:
    """Pieces of an attempt's logs that were not read yet, of several nodes, in the order in which they were written."""

    def __init__(self, ledger: Ledger, meant: Meant, nodes: range | list[int]):
        self.ledger, self.meant = ledger, meant
        self.last = dict.fromkeys(nodes, "")

    def __iter__(self) -> Iterator[LogPiece]:
        found: list[LogPiece] = []
        for node, last in self.last.items():
            pieces = list(self.ledger.log(self.meant.stage, self.meant.inputs_digest, self.meant.attempt, node=node, after=last))
            if pieces:
                self.last[node] = pieces[-1].key
                found += pieces
        yield from sorted(found, key=lambda piece: (piece.written or 0.0, piece.key))


class Lines:
    """Whole lines out of pieces that may end within a line, each node's by itself."""

    def __init__(self, ranks: set[int] | None, say: Callable[[bytes], None]):
        self.ranks, self.say = ranks, say
        self.rest: dict[int, bytes] = {}

    def feed(self, node: int, text: bytes) -> None:
        *whole, rest = (self.rest.get(node, b"") + text).split(b"\n")
        self.rest[node] = rest
        if wanted := [line for line in whole if self._wanted(line)]:
            self.say(b"\n".join(wanted) + b"\n")

    def end(self) -> None:
        """Print what was written without a last newline."""
        for rest in self.rest.values():
            if rest and self._wanted(rest):
                self.say(rest)

    def _wanted(self, line: bytes) -> bool:
        if self.ranks is None:
            return True
        found = RANK.match(line)
        return found is not None and int(found[1]) in self.ranks


def ranks_of(text: str) -> set[int]:
    """`0,8-11` → {0, 8, 9, 10, 11}. Raises UsageError."""
    from orchestrator.errors import UsageError

    ranks: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UsageError(f"--rank {text}: {part!r} is neither a rank nor a range of ranks. Example: --rank 0,8-15")
        ranks |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return ranks


def seconds_of(text: str) -> float:
    """`90s`, `10m`, `1h30m`, `2d` → seconds. Raises UsageError."""
    from orchestrator.errors import UsageError

    if re.fullmatch(r"(\d+(\.\d+)?[smhd])+", text) is None:
        raise UsageError(f"--since {text}: is no duration. Examples: --since 30s, --since 10m, --since 1h30m, --since 2d")
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
    return sum(float(number) * unit[letter] for number, letter in re.findall(r"([\d.]+)([smhd])", text))


def events(
    pipeline: options.Named = None,
    file: options.File = None,
    store: options.Store = None,
    cluster: options.Cluster = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until nobody drives the pipeline any more.")] = False,
    output_: options.Output = output.Format.table,
) -> None:
    """Show what drivers decided and saw, as a timeline.

    With --follow, json is one object a line.

    Examples: osctl events          osctl events --follow          osctl events -o json
    """
    workspace = launched(pipeline, file, store=store, cluster=cluster)
    if not follow:
        ledger = workspace.ledger.lenient()
        rows = [event_row(event) for event in ledger.events()]
        say([*workspace.remarks, *map(str, ledger.remarks.values())])
        shown = [{**row, "time": clock(row["time"])} for row in rows] if output_ is output.Format.table else rows
        output.emit(shown, output_, {"time": "time", "kind": "event", "stage": "stage", "attempt": "attempt", "detail": "what"})
        if not rows:
            output.note(f"{workspace.pipeline.name}: no events in {workspace.store_url}. Start with: osctl launch")
        return
    last: tuple[int, int] | None = None
    while True:
        driven = workspace.ledger.holder(time.time()) is not None
        for event in workspace.ledger.events(after=last):
            last = (event.epoch, event.seq)
            output.line(event_row(event), event_line(event), output_)
        if not driven:
            return
        time.sleep(FOLLOW_S)


def event_row(event: Event) -> dict[str, Any]:
    fields = ("time", "epoch", "seq", "kind", "stage", "attempt", "detail")
    row = {"name": f"{event.epoch}-{event.seq}", **{field: getattr(event, field) for field in fields}}
    return row | {"detail": expanded(event.detail)}


def event_line(event: Event) -> str:
    about = f" {event.stage}" if event.stage else ""
    about += f" attempt {event.attempt}" if event.attempt else ""
    return f"{clock(event.time)} {event.kind}{about}{': ' if event.detail else ''}{expanded(event.detail)}"


def clock(moment: float) -> str:
    """Local time, to the second."""
    try:
        return time.strftime("%m-%d %H:%M:%S", time.localtime(moment))
    except (OverflowError, ValueError, OSError):  # no calendar has this moment: somebody else wrote it
        return f"{moment:g} s"
