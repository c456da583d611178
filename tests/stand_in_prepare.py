"""Obeys the contract of `python -m opensora.prepare RUN_DIR` and decodes nothing: each source file is cut into two "clips" of its bytes.

    stand_in_prepare.py RUN_DIR [--slow S] [--fail CLASS] [--parquet] [--packs] [--gpu NAME]

Results are kept in files of their own, as releases before 0.3.0 kept them, so a run that is killed and done again does what is missing
alone. With --packs all rows of a step become one pack at the end, as the real one makes them.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

from opensora.dataset.kept_packs import line_of, name_of
from opensora.dataset.prepared_rows import digest_of
from opensora.dataset.rows import (
    Captioned,
    Clip,
    ClipFile,
    Fetched,
    Looked,
    Media,
    Provenance,
    Shot,
    Source,
    clip_id,
    to_json,
)
from orchestrator.prepare.kept import key_of

EXIT = {"completed": 0, "config": 64, "data": 65, "disk": 69, "code": 1}


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.partial")
    draft.write_bytes(data)
    draft.replace(path)


COPY = "same file as another source"
FRAMES = "f" * 16
MEDIA = Media("mov", "h264", 64, 48, 0, (1, 1), "yuv420p", 8, "", False, False, (1, 8), 0, 16, 16, 8.0, False, "")
GREY = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAgGBgcGBQgHBwcJCQgKDBQNDAsLDBkSEw8UHRofHh0aHBwgJC4nICIsIxwcKDcpLDAxNDQ0Hyc5PTgyPC4zNDL/"
    "wAALCAABAAEBAREA/8QAFAABAAAAAAAAAAAAAAAAAAAACf/EABQQAQAAAAAAAAAAAAAAAAAAAAD/2gAIAQEAAD8AVN//2Q=="
)
"""A JPEG of one grey pixel."""


def written(name: str) -> str:
    """A byte of a file's name that is not UTF-8 is a question mark."""
    return name.encode(errors="replace").decode()


def shot(half: int, name: str) -> Shot:
    measures = {"motion": 0.5 + half, "static": 0.1 * len(name)}
    return Shot(8 * half, 8 * half + 8, (1, 8), 8 * half, 8, measures, f"{hash_of(name, half)}", GREY)


def hash_of(*words: object) -> str:
    return hashlib.sha256(repr(words).encode()).hexdigest()[:16]


def keep_row(run_dir: Path, step: str, digest: str, key: str, row: Any) -> None:
    kept(run_dir, f"{step}/{digest}/{key[:2]}/{key}.json", b'{"row":' + to_json(row) + b"}")


def kept(run_dir: Path, name: str, data: bytes) -> bytes:
    path = run_dir / "kept" / name
    if not path.is_file():
        put(path, data)
        with (run_dir / "made.txt").open("a") as file:
            file.write(f"{name}\n")
    return path.read_bytes()


def leave(run_dir: Path, kind: str, reason: str, digest: str = "") -> None:
    put(run_dir / "result.json", json.dumps({"class": kind, "reason": reason, "digest": digest, "counts": {}}).encode())
    sys.exit(143 if kind == "drained" else 0 if kind == "completed" else EXIT[reason.partition(":")[0]])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--slow", type=float, default=0)
    parser.add_argument("--fail", default="")
    parser.add_argument("--parquet", action="store_true", help="with manifest.parquet, whose library takes its time to be imported")
    parser.add_argument("--packs", action="store_true")
    parser.add_argument("--gpu", default="", help="holds this device for 4 s, as it says")
    options = parser.parse_args()
    run_dir = options.run_dir
    config = json.loads((run_dir / "prepare.yaml").read_text())  # JSON is YAML
    if options.fail:
        print("the last line that it says")
        leave(run_dir, "failed", f"{options.fail}: as the test asked")
    files = [(path, given["licence"] or "cc0") for given in config["sources"] for path in sorted(Path(given["path"]).rglob("*.mp4"))]
    seen: set[str] = set()
    clips: list[Clip] = []
    sources: list[dict[str, Any]] = []
    counts: dict[str, Any] = {"in": 0, "kept": 0, "dropped": {}, "quarantined": {}}
    for file, licence in files:
        counts["in"] += 1
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        if sha256 in config["exclude"]:
            counts["dropped"]["taken out on request"] = counts["dropped"].get("taken out on request", 0) + 1
            continue
        source = Source(str(file), file.name, Provenance("videos", str(file), licence))
        keep_row(run_dir, "download", "d" * 16, key_of(str(file)), Fetched(source, str(file), sha256, file.stat().st_size))
        if sha256 in seen:
            counts["dropped"][COPY] = counts["dropped"].get(COPY, 0) + 1
            continue
        seen.add(sha256)
        counts["kept"] += 1
        shots = tuple(shot(half, file.stem) for half in (0, 1))
        keep_row(run_dir, "probe", "a" * 16, sha256[:20], MEDIA)
        keep_row(run_dir, "frames", FRAMES, sha256[:20], Looked(MEDIA, (8,), shots, 1))
        sources.append({"name": written(file.name), "uri": written(str(file)), "sha256": sha256, "licence": licence, "clips": 2})
        for half, one in enumerate(shots):
            if (run_dir / "drain").exists():
                leave(run_dir, "drained", "asked to leave")
            name = clip_id(sha256, one.start_pts, one.end_pts, FRAMES)
            data = kept(run_dir, f"clips/{'c' * 16}/{name[:2]}/{name}.mp4", b"clip of " + file.read_bytes() + bytes([half]))
            clip_file = ClipFile(f"clips/{name}.mp4", hashlib.sha256(data).hexdigest(), len(data), 8, 64, 48, 8.0)
            caption = Captioned(f"half {half} of {written(file.stem)}", "text")
            keep_row(run_dir, "clips", "c" * 16, name, clip_file)
            keep_row(run_dir, "caption", "e" * 16, name, caption)
            clips.append(Clip(name, sha256, source, MEDIA, one, clip_file, caption))
            step = {**counts, "rate": 2.0, "eta_s": 1.0, "cpu_s": 0.5}
            if options.gpu:
                step |= {"device": options.gpu, "devices": 1, "held_s": {"cpu": 0.01, "cuda": 4.0}}
            status = {
                "schema": 1, "time": time.time(), "step": "download", "steps": {"download": step},
                "eta_s": 1.0, "tokens_in": 7, "tokens_out": 2, "usd": 0.25,
            }  # fmt: skip
            put(run_dir / "status.json", json.dumps(status).encode())
            time.sleep(options.slow)
    if options.packs:
        pack(run_dir / "kept")
    finish(run_dir, config, clips, sources, counts, options.parquet)


def pack(kept: Path) -> None:
    for folder in [one for one in kept.glob("*/*") if any(one.rglob("*.json"))]:
        files = sorted(folder.rglob("*.json"))
        data = b"".join(line_of(path.stem, path.read_bytes()) for path in files)
        put(folder / name_of(data), data)
        for path in files:
            path.unlink()


def finish(
    run_dir: Path, config: dict[str, Any], clips: list[Clip], sources: list[dict[str, Any]], counts: dict[str, Any], whole: bool
) -> None:
    out = run_dir / "out"
    (out / "clips").mkdir(parents=True, exist_ok=True)
    described: dict[str, Any] = {}

    def write(name: str, data: bytes) -> None:
        put(out / name, data)
        described[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    lines = ["path,text,num_frames,width,height,aspect_ratio"]
    rows = []
    for clip in clips:
        assert clip.file is not None and clip.caption is not None
        write(clip.file.path, (run_dir / f"kept/clips/{'c' * 16}/{clip.id[:2]}/{clip.id}.mp4").read_bytes())
        lines.append(f"{clip.file.path},{clip.caption.text},8,64,48,0.75")
        row = {"id": clip.id, "path": clip.file.path, "caption": clip.caption.text, "frames": 8, "start_s": clip.shot.start_s}
        row |= {"end_s": clip.shot.end_s, "source": written(clip.source.name), "source_sha256": clip.source_sha256, "settings": FRAMES}
        rows.append(row | clip.shot.measures)
    write("captions.csv", ("\n".join(lines) + "\n").encode())
    if whole:
        import pyarrow
        from pyarrow import parquet

        table = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(rows), table)
        write("manifest.parquet", table.getvalue())
    digest = digest_of((row["id"], row["caption"], {"motion": row["motion"], "static": row["static"]}) for row in rows)
    about = {
        "schema": 1, "name": config["name"], "digest": digest, "clips": len(clips), "seconds": 1.0 * len(clips), "frames": 8 * len(clips),
        "bytes": sum(clip.file.size for clip in clips if clip.file), "config": config, "code": "stand-in",
        "steps": {"download": counts}, "sources": sources, "files": described,
    }  # fmt: skip
    put(out / "DATASET.json", json.dumps(about).encode())
    leave(run_dir, "completed", f"{len(clips)} clips", digest)


if __name__ == "__main__":
    main()
