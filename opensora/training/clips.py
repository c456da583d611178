"""The clips of a stage, encoded once on each node, and the checks that they are the right ones.

Owns who encodes (the first rank of each node), where the encoders come from, and the refusals: other clips than before a resume, other
clips on two nodes, too many clips left out. `opensora.latents.cache` owns the encoded files.
"""

from __future__ import annotations

from pathlib import Path

from opensora.config import StageConfig
from opensora.data.source import open_clips
from opensora.distributed.ranks import Ranks
from opensora.encoders import protocol as encoders
from opensora.errors import DataError, ParentError
from opensora.latents.cache import encoders_of, prepare
from opensora.latents.prepared import Prepared
from opensora.training.run_directory import RunDirectory
from opensora.training.start import Start


def encoded_clips(run: RunDirectory, stage: StageConfig, ranks: Ranks, start: Start) -> Prepared:
    """The stage's encoded clips, opened. All ranks call this; the first rank of each node encodes what is not encoded yet.

    Raises:
        ConfigError: the data or the encoders cannot be used as configured.
        DataError: the nodes have different clips, too many clips are left out, or the data are not those that the launch recorded.
        ParentError: the clips are not those of the run that is resumed, or the carried encoders are not whole.
        DiskFull: the encoded clips cannot be written.
    """
    carried = start.encoders
    if carried is None and ranks.nodes > 1:
        carried = _encoders_for_all(run, stage, ranks)

    def beat() -> None:
        run.heartbeat(start.step, "init")

    # a new stage checks its prompts before it trains; a resumed one does not: they must not stand in the way of weights that are trained
    begins = start.step == 0
    asked = stage if begins else stage.model_copy(update={"prompts": (), "evaluate": None})
    directory: Path | str = ""
    if ranks.is_first_here:
        directory = prepare(asked, run.latents, carried, progress=lambda _done, _of: beat(), recorded=run.recorded_data())
    prepared = Prepared.open(Path(ranks.share(str(directory), beat)), stage)
    refuse_other_clips(prepared, ranks, start)
    run.tell_usage(prepared.usage, prepared.skipped)
    if begins:
        prepared.refuse_if_too_few(stage)
    return prepared


def refuse_other_clips(prepared: Prepared, ranks: Ranks, start: Start) -> None:
    """Compare this node's clips with the first node's, and with those of the run that is resumed.

    With other clips the same position in the stream would mean other clips, and nobody would notice.

    Raises:
        DataError: this node can use other clips than the first one.
        ParentError: the run before had other clips.
    """
    if start.clips is not None and prepared.clips != start.clips:
        raise ParentError(  # not a DataError: to encode the clips again would not bring the others back
            f"data.source: step {start.step} was trained on other clips than the {len(prepared)} that can be used now "
            f"({len(prepared.skipped)} are left out); put the clips and captions of then in their place and remove the cache "
            f"{prepared.directory}, or start the stage anew"
        )
    first = ranks.broadcast(prepared.clips.encode()).decode() if ranks.nodes > 1 else prepared.clips
    if prepared.clips != first:
        raise DataError(
            f"data.source: node {ranks.node} could read {len(prepared)} clips and left out {len(prepared.skipped)}, the first node others; "
            f"mend the files or the access to them, remove the cache {prepared.directory} on each node, and launch again"
        )


def _encoders_for_all(run: RunDirectory, stage: StageConfig, ranks: Ranks) -> Path:
    """Directory of encoders with equal bytes on every node: those of the cache that lies beside the clips, else made by global rank 0.

    If each node made its own, two machines could round differently.
    """
    folder = run.path / "encoders"
    if ranks.is_first_here:
        folder.mkdir(exist_ok=True)
    if ranks.is_first:
        recorded = run.recorded_data()
        clips = open_clips(stage.data, stage.seed, recorded)
        ready = encoders_of(stage, clips, run.latents, recorded)
        if ready is not None:
            encoders.copy_encoders(ready, folder)
        else:
            for encoder in encoders.build(stage, clips, None):
                encoder.save(folder)
    ranks.barrier(lambda: run.heartbeat(0, "init"))
    for name in (encoders.AUTOENCODER_FILE, encoders.TEXT_FILE):
        content = ranks.broadcast((folder / name).read_bytes() if ranks.is_first else b"")
        if ranks.is_first_here:
            (folder / name).write_bytes(content)
    return folder
