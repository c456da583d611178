"""Steps of a preparation over "videos" that are text files: small, quick, and each can be told to go wrong. The engine is the real one.

    python tests/prepare_steps.py RUN_DIR        a run with these steps, as `python -m opensora.prepare` does it with the real ones

A video is lines, each a shot: `START END MOTION CAPTION` (PTS of 1/10 s). A first line may say what happens to whoever opens it: `crash`,
`hang`, `memory`, `drop`, `bad`. Each call of a step leaves a line in `calls.txt` of a folder above, where there is one.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from opensora.dataset.left_out import LeftOut
from opensora.dataset.prepare_config import Download, Filter, Given, PrepareConfig
from opensora.dataset.rows import (
    Captioned,
    Clip,
    ClipFile,
    Drop,
    Fetched,
    Leaves,
    Looked,
    Media,
    Provenance,
    Quarantine,
    Shot,
    Source,
)  # fmt: skip
from opensora.errors import ConfigError
from opensora.prepare import guarded
from opensora.prepare.devices import Device
from opensora.prepare.steps import Captioning, CutOut, Inspect, Inspected, Judged, Measure, Spent, Steps


def called(step: str, what: str, near: Path | str) -> None:
    """Write the call down, and take as long as `slow.txt` says. Both files lie in a folder above: a guard has the environment of the time
    when its fork server was started."""
    place = next((folder for folder in Path(near).parents if (folder / "calls.txt").exists()), None)
    if place is None:
        return
    with (place / "calls.txt").open("a") as file:
        file.write(f"{step} {what}\n")
    if (place / "slow.txt").exists():
        time.sleep(float((place / "slow.txt").read_text() or 0))


def listed(given: Sequence[Given], left_out: LeftOut) -> Iterator[Source]:
    for one in given:
        folder = Path(one.path)
        if not folder.exists():
            raise ConfigError(f"sources: {folder}: no such file or folder")
        for path in sorted(folder.glob("*.txt")) if folder.is_dir() else [folder]:
            licence = one.licence or "cc0"
            yield Source(str(path), path.stem, Provenance(one.name or folder.name, str(path), licence, path.stem.title()))


def fetch(source: Source, _folder: Path, _settings: Download, _halt: Callable[[], bool], _most: int) -> Fetched:
    called("download", source.name, source.uri)
    try:
        data = Path(source.uri).read_bytes()
    except OSError as error:
        raise Quarantine("cannot be read", str(error)) from error
    return Fetched(source, source.uri, hashlib.sha256(data).hexdigest(), len(data))


def inspect(row: Inspect) -> Inspected:
    lines = Path(row.path).read_text().splitlines()
    if row.media is None:
        called("probe", Path(row.path).stem, row.path)
    if lines[:1] == ["bad"]:
        return Inspected(Quarantine("no video stream", "a text says so"), None)
    media = row.media or Media("txt", "text", 64, 48, 0, (1, 1), "yuv420p", 8, "", False, False, (1, 10), 0, 1000, 1000, 10.0, False, "")
    if lines[:1] == ["drop"]:
        return Inspected(media, Drop("interlaced", "a text says so"))
    called("frames", Path(row.path).stem, row.path)
    misbehave(lines[0])
    shots = []
    for line in lines:
        start, end, motion, *_ = line.split(maxsplit=3)
        measures = {"motion": float(motion), "black": 0.0, "static": 0.0, "sharpness": 10.0}
        name = hashlib.sha256(f"{row.content} {start}".encode()).hexdigest()[:16]
        shots.append(Shot(int(start), int(end), (1, 10), int(start), int(end) - int(start), measures, name, thumbnail="abcd"))
    return Inspected(media, Looked(media, tuple(shot.start_frame for shot in shots[1:]), tuple(shots), 0))


def misbehave(line: str) -> None:
    if line == "crash":
        ctypes.string_at(0)
    if line == "hang":
        while True:
            time.sleep(60)
    if line == "memory":
        kept = []
        while True:
            kept.append(os.urandom(1 << 20) * 20)
    if line == "full disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if line == "outside":
        os.kill(os.getpid(), signal.SIGKILL)


def cut_out(row: CutOut) -> ClipFile:
    called("clips", row.id, row.to)
    data = f"{row.id} {row.settings.crf}\n".encode() * row.shot.frames
    Path(row.to).write_bytes(data)
    return ClipFile("", hashlib.sha256(data).hexdigest(), len(data), row.shot.frames, 64, 48, 10.0)


def measure(row: Measure) -> dict[str, float]:
    called("score", row.id, row.path)
    found = {"text_area": int(row.id[0], 16) / 16} if row.text_area else {}
    found |= {"aesthetic": 5.0} if row.scores else {}
    return found | ({"clip": len(row.caption) / 100} if row.caption else {})


class Judgement:
    def __init__(self, dropped: dict[str, Drop], alone: dict[str, int]) -> None:
        self.dropped, self.alone = dropped, alone


def judge(clips: Sequence[Clip], settings: Filter, later: Sequence[str]) -> Judged:
    dropped: dict[str, Drop] = {}
    alone: dict[str, int] = {}
    for rule in settings.rules:
        if rule.column in later:
            continue
        for clip in clips:
            value = float({**clip.shot.measures, **clip.measures}[rule.column])
            if (rule.min is not None and value < rule.min) or (rule.max is not None and value > rule.max):
                dropped.setdefault(clip.id, Drop(f"{rule.column} out of bounds", str(value)))
                alone[rule.column] = alone.get(rule.column, 0) + 1
    return Judgement(dropped, alone)


class Used:
    tokens_in, tokens_out, dollars, stopped = 0, 0, 0.0, ""


def caption(work: Captioning) -> Spent:
    used = Used()
    for clip in work.clips:
        if work.halt():
            used.stopped = "halted"
            break
        called("caption", clip.id, work.folder)
        assert clip.file is not None
        assert (work.folder / clip.file.path).stat().st_size == clip.file.size
        words = Path(clip.source.uri).read_text().splitlines()
        text = next(line.split(maxsplit=3)[3] for line in words if line.startswith(f"{clip.shot.start_pts} "))
        used.tokens_in, used.tokens_out, used.dollars = used.tokens_in + 100, used.tokens_out + 10, used.dollars + 0.01
        outcome: Captioned | Leaves = Quarantine("server refused it", text) if "refused" in text else Captioned(
            text, "rule", "what is it?", 7, 100, 10, 0.1, "en"
        )  # fmt: skip
        work.on_done(clip.id, outcome)
        work.on_spent(used)
    return used


def check_caption(captioned: Captioned, config: PrepareConfig) -> None:
    if len(captioned.text.split()) < config.caption_words[0]:
        raise Drop("caption too short", captioned.text)


def words(captioned: Captioned) -> int:
    return len(captioned.text.split())


def encode(out: Path, stages: Mapping[str, Path], progress: Callable[[int, int], None]) -> None:
    for name, stage in stages.items():
        to = out / "latents" / f"{name}.bin"
        if to.exists():
            continue
        called("encode", name, out)
        to.parent.mkdir(exist_ok=True)
        misbehave(yaml.safe_load(stage.read_text()).get("then", ""))
        clips = sorted((out / "clips").iterdir())
        for _ in clips:
            progress(1, len(clips))
        to.write_bytes(b"".join(clip.read_bytes()[:8] for clip in clips))


class Cuda:
    """torch, as a process sees it that has put something on a GPU."""

    class cuda:
        is_initialized = is_available = staticmethod(lambda: True)
        get_device_name = staticmethod(lambda: "a GPU")


def encode_on_gpu(out: Path, stages: Mapping[str, Path], progress: Callable[[int, int], None]) -> None:
    """Until the engine has heard of the GPU."""
    sys.modules["torch"] = Cuda  # type: ignore[assignment]
    status, until = out.parent / "status.json", time.monotonic() + 60
    while time.monotonic() < until and json.loads(status.read_bytes())["steps"].get("encode", {}).get("device") != "a GPU":
        time.sleep(0.05)
    encode(out, stages, progress)


def measure_on_gpu(row: Measure) -> dict[str, float]:
    guarded.tell(Device("cuda", "a GPU"))
    return measure(row)


def caption_on_gpu(work: Captioning) -> Spent:
    work.on_device(Device("cuda", "a GPU"))
    return caption(work)


VERSIONS = dict.fromkeys(("download", "probe", "frames", "clips", "text_area", "scores", "caption"), 1)
STEPS = Steps(listed, fetch, inspect, cut_out, measure, judge, caption, check_caption, words, encode, lambda: VERSIONS, ("prepare_steps",))


def write_video(folder: Path, name: str, *shots: tuple[int, int, float, str], first: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    lines = [first] if first else []
    lines += [f"{start} {end} {motion} {text}" for start, end, motion, text in shots]
    path = folder / f"{name}.txt"
    path.write_text("\n".join(lines))
    return path


def told(step: str, function: Callable[..., Any], near: str) -> Callable[..., Any]:
    """The same function, which leaves a line in calls.txt first."""

    def call(*arguments: Any, **named: Any) -> Any:
        called(step, "", near)
        return function(*arguments, **named)

    return call


def asked_of_a_server(work: Captioning) -> Spent:
    """The real client; each clip looks like one small picture that names it."""
    from opensora.prepare import captions

    def frames_of(path: Path, shares: Sequence[float], _side: int) -> list[bytes]:
        return [b"\xff\xd8\xff" + path.stem.encode() for _ in shares]

    before = captions.Spent(**work.before)  # type: ignore[arg-type]
    return captions.caption_all(
        work.clips, work.folder, work.settings, on_done=work.on_done, halt=work.halt, on_spent=work.on_spent, frames_of=frames_of,
        before=before,
    )  # fmt: skip


def main(argv: Sequence[str], steps: Steps) -> int:
    """`filter` and `publish` leave a line in calls.txt, too; captions of kind `server` are asked of it."""
    from opensora.prepare import __main__ as command
    from opensora.prepare import publish

    near = str(Path(argv[0]) / "prepare.yaml")
    publish.begin = told("publish", publish.begin, near)
    steps = replace(steps, judge=told("filter", steps.judge, near))
    if Path(near).is_file() and b"kind: server" in Path(near).read_bytes():
        steps = replace(steps, caption=asked_of_a_server, check_caption=lambda captioned, config: None)
    return command.main(argv, steps)


if __name__ == "__main__":
    import prepare_steps  # by its own name, so that guards find its functions

    sys.exit(prepare_steps.main(sys.argv[1:], prepare_steps.STEPS))
