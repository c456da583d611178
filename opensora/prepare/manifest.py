"""The rows of a data set as files: `manifest.parquet` (one row a clip), `captions.csv` as Open-Sora 1.2 has it, shards of WebDataset.

Owns the schema (`COLUMNS`, which docs/datasets.md shows), and the digest of a data set. Refuses to decide which clips are in it.
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora.dataset import prepared_rows
from opensora.dataset.prepared_rows import ROWS_A_GROUP
from opensora.dataset.rows import Clip
from opensora.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow

MANIFEST, CAPTIONS = "manifest.parquet", "captions.csv"
OPEN_SORA = ("path", "text", "num_frames", "width", "height", "aspect_ratio")


@dataclass(frozen=True)
class Column:
    name: str
    kind: str
    """string | int | float | bool"""
    unit: str
    about: str
    of: Callable[[Clip], Any]


def _caption(name: str) -> Callable[[Clip], Any]:
    return lambda clip: getattr(clip.caption, name) if clip.caption is not None else None


COLUMNS: tuple[Column, ...] = (
    Column("id", "string", "", "identity: source's content, bounds, and how it was cut", lambda clip: clip.id),
    Column("path", "string", "", "the clip's file, relative to the data set", lambda clip: clip.file and clip.file.path),
    Column("caption", "string", "", "", _caption("text")),
    Column("caption_by", "string", "", "`beside`, `digits`, `text`, or the model", _caption("by")),
    Column("caption_prompt", "string", "", "what the model was asked", _caption("prompt")),
    Column("caption_seed", "int", "", "of sampling", _caption("seed")),
    Column("caption_tokens_in", "int", "tokens", "", _caption("tokens_in")),
    Column("caption_tokens_out", "int", "tokens", "", _caption("tokens_out")),
    Column("language", "string", "ISO 639-1", "of the caption; empty: not told", _caption("language")),
    Column("frames", "int", "frames", "of the clip's file", lambda clip: clip.file.frames if clip.file else clip.shot.frames),
    Column("fps", "float", "frames/s", "of the clip's file", lambda clip: clip.file.fps if clip.file else clip.media.fps),
    Column("width", "int", "pixels", "of the clip's file", lambda clip: clip.file.width if clip.file else clip.media.width),
    Column("height", "int", "pixels", "of the clip's file", lambda clip: clip.file.height if clip.file else clip.media.height),
    Column("bytes", "int", "bytes", "of the clip's file", lambda clip: clip.file and clip.file.size),
    Column("sha256", "string", "", "of the clip's file", lambda clip: clip.file and clip.file.sha256),
    Column("start_pts", "int", "time base", "PTS of the first frame", lambda clip: clip.shot.start_pts),
    Column("end_pts", "int", "time base", "PTS at which the clip ends; its own frames lie before", lambda clip: clip.shot.end_pts),
    Column("time_base_num", "int", "seconds", "of one PTS unit: numerator", lambda clip: clip.shot.time_base[0]),
    Column("time_base_den", "int", "seconds", "denominator", lambda clip: clip.shot.time_base[1]),
    Column("start_s", "float", "seconds", "from PTS 0", lambda clip: clip.shot.start_s),
    Column("end_s", "float", "seconds", "from PTS 0", lambda clip: clip.shot.end_s),
    Column("start_frame", "int", "frames", "of the source", lambda clip: clip.shot.start_frame),
    Column("phash", "string", "", "perceptual hash of the middle frame, 64 bits", lambda clip: clip.shot.phash),
    Column("source", "string", "", "short name of the source in this data set", lambda clip: clip.source.name),
    Column("source_set", "string", "", "`name` in prepare.yaml", lambda clip: clip.source.provenance.set_name),
    Column("source_uri", "string", "", "as its list or the person has it", lambda clip: clip.source.provenance.uri or clip.source.uri),
    Column("source_sha256", "string", "", "of the whole source file", lambda clip: clip.source_sha256),
    Column("source_title", "string", "", "", lambda clip: clip.source.provenance.title),
    Column("licence", "string", "", "", lambda clip: clip.source.provenance.licence),
    Column("source_container", "string", "", "", lambda clip: clip.media.container),
    Column("source_codec", "string", "", "", lambda clip: clip.media.codec),
    Column("source_width", "int", "pixels", "as shown: turned and stretched", lambda clip: clip.media.width),
    Column("source_height", "int", "pixels", "", lambda clip: clip.media.height),
    Column("source_fps", "float", "frames/s", "mean", lambda clip: clip.media.fps),
    Column("source_rotation", "int", "degrees clockwise", "applied", lambda clip: clip.media.rotation),
    Column("source_hdr", "string", "", "`pq`, `hlg` or empty", lambda clip: clip.media.hdr),
    Column("source_bits", "int", "bits a sample", "", lambda clip: clip.media.bits),
)
"""Of manifest.parquet. After these come `detector` and `settings` (the cuts' detector and the digest of its settings), and the measures:
a column of floats for each, in order of their names."""


def described() -> str:
    """The schema as a table of Markdown."""
    lines = ["| column | type | unit | |", "|---|---|---|---|"]
    lines += [f"| `{one.name}` | {one.kind} | {one.unit} | {one.about} |" for one in COLUMNS]
    lines += [
        "| `detector` | string | | that found the cuts |",
        "| `settings` | string | | digest of what a clip's bounds and measures depend on |",
        "| each measure | float | see above | `motion`, `static`, `black`, `sharpness`, `text_area` …; those that are text are strings |",
    ]
    return "\n".join(lines)


def measures_of(clip: Clip) -> dict[str, float | str]:
    return {**clip.shot.measures, **clip.measures}


def digest_of(clips: Iterable[Clip]) -> str:
    """sha256 over id, caption and measures (3 significant digits) of each clip, in this order: equal data sets, on whatever machine."""
    return prepared_rows.digest_of((clip.id, clip.caption.text if clip.caption else "", measures_of(clip)) for clip in clips)


@dataclass
class Written:
    """What the rows add up to."""

    clips: int = 0
    seconds: float = 0.0
    frames: int = 0
    bytes: int = 0


def write_rows(
    clips: Iterable[Clip], folder: Path, columns: Sequence[tuple[str, type]], detector: str, settings: str, about: Mapping[str, str]
) -> Written:
    """Write manifest.parquet and captions.csv, row by row.

    Args:
        columns: names of all measures, each with float or str.
        about: goes into the metadata of the Parquet file.
    """
    import pyarrow
    from pyarrow import parquet

    schema = _schema(columns, about)
    names = [name for name, _ in columns]
    written = Written()
    with (
        parquet.ParquetWriter(folder / MANIFEST, schema) as table,
        (folder / CAPTIONS).open("w", encoding="utf-8", newline="") as file,
    ):
        rows = csv.writer(file)
        rows.writerow(OPEN_SORA)
        for some in _groups(clips, ROWS_A_GROUP):
            arrays = []
            for column in COLUMNS:
                values = [column.of(clip) for clip in some]
                if column.kind == "string":
                    values = [_text(value) for value in values]
                arrays.append(pyarrow.array(values, schema.field(column.name).type))
            arrays += [pyarrow.array([said] * len(some), pyarrow.string()) for said in (detector, settings)]
            measures = [measures_of(clip) for clip in some]
            arrays += [pyarrow.array([_text(one.get(name)) for one in measures], schema.field(name).type) for name in names]
            table.write_batch(pyarrow.record_batch(arrays, schema=schema))
            for clip in some:
                rows.writerow(_open_sora(clip))
                _add(written, clip)
    return written


def _schema(columns: Sequence[tuple[str, type]], about: Mapping[str, str]) -> pyarrow.Schema:
    import pyarrow

    kinds = {"string": pyarrow.string(), "int": pyarrow.int64(), "float": pyarrow.float64(), "bool": pyarrow.bool_()}
    fields = [
        pyarrow.field(one.name, kinds[one.kind], metadata={"unit": one.unit, "about": one.about} if one.unit or one.about else None)
        for one in COLUMNS
    ]
    fields += [pyarrow.field("detector", pyarrow.string()), pyarrow.field(prepared_rows.SETTINGS, pyarrow.string())]
    twice = {name for name, _ in columns} & {one.name for one in fields}
    assert not twice, f"measures {sorted(twice)} have the names of other columns, and would not be counted when a source is taken out"
    fields += [pyarrow.field(name, pyarrow.string() if kind is str else pyarrow.float64()) for name, kind in columns]
    return pyarrow.schema(fields, metadata={f"osctl.{name}": value for name, value in about.items()})


def _text(value: Any) -> Any:
    """Names of files may be no UTF-8, and Parquet has no other text."""
    return value if not isinstance(value, str) or value.isascii() else value.encode("utf-8", "backslashreplace").decode()


def _open_sora(clip: Clip) -> tuple[object, ...]:
    assert clip.file is not None and clip.caption is not None
    width, height = clip.file.width, clip.file.height
    return clip.file.path, clip.caption.text, clip.file.frames, width, height, f"{height / width:.6g}"


def _add(written: Written, clip: Clip) -> None:
    assert clip.file is not None
    written.clips += 1
    written.seconds += clip.shot.end_s - clip.shot.start_s
    written.frames += clip.file.frames
    written.bytes += clip.file.size


def _groups(clips: Iterable[Clip], size: int) -> Iterator[list[Clip]]:
    some: list[Clip] = []
    for clip in clips:
        some.append(clip)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some


# --- Exports ----------------------------------------------------------------------------------------------------------------------------


def rows_of(out: Path) -> Iterator[dict[str, Any]]:
    """Rows of a data set's manifest. Raises ConfigError."""
    from pyarrow import ArrowInvalid, parquet

    try:
        with parquet.ParquetFile(out / MANIFEST) as table:
            for batch in table.iter_batches(ROWS_A_GROUP):
                yield from batch.to_pylist()
    except FileNotFoundError:
        raise ConfigError(f"{out}: no {MANIFEST}. Give the folder of a finished data set") from None
    except (ArrowInvalid, OSError) as error:
        raise ConfigError(f"{out / MANIFEST}: cannot be read ({error}). Prepare it again") from None


def write_webdataset(out: Path, to: Path, per_shard: int = 1000) -> int:
    """Shards of WebDataset, `to/00000.tar` and on: of each clip ID.mp4, ID.txt (caption) and ID.json (the manifest's row).

    Equal data sets give equal bytes. Returns the number of shards. Raises ConfigError, OSError.
    """
    to.mkdir(parents=True, exist_ok=True)
    shards = 0
    for shards, rows in enumerate(_some(rows_of(out), per_shard), 1):
        shard = to / f"{shards - 1:05d}.tar"
        partial = shard.with_suffix(".partial")
        with tarfile.open(partial, "w") as tar:
            for row in rows:
                _into(tar, f"{row['id']}.mp4", _clip(out, str(row["path"])))
                _into(tar, f"{row['id']}.txt", str(row["caption"]).encode())
                _into(tar, f"{row['id']}.json", json.dumps(row, ensure_ascii=False, sort_keys=True).encode())
        partial.replace(shard)
    return shards


def write_open_sora(out: Path, to: Path) -> int:
    """`to/captions.csv` as Open-Sora 1.2 reads it, with absolute paths. Returns the number of clips. Raises ConfigError, OSError."""
    to.mkdir(parents=True, exist_ok=True)
    count = 0
    with (to / CAPTIONS).open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(OPEN_SORA)
        for row in rows_of(out):
            count += 1
            path = (out / row["path"]).resolve()
            size = row["width"], row["height"]
            lines.writerow((path, row["caption"], row["frames"], *size, f"{size[1] / size[0]:.6g}"))
    return count


def _clip(out: Path, path: str) -> bytes:
    try:
        return (out / path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{out / path}: {error.strerror}; {MANIFEST} names it. Prepare it again") from None


def _into(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def _some(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    some: list[dict[str, Any]] = []
    for row in rows:
        some.append(row)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some
