"""What the engine of a preparation costs: a row of no work, the memory of many rows, and short clips against one process a step and file.

Rows of no work go through the real phases (guards, counts, kept results, manifest) with step functions that return at once. Each way is a
process of its own, so that memory is its own. Time is CPU-seconds of the engine, its fork server and all guards.

- 400,000 rows through all steps with every result kept, published as a data set: CPU of a row, and the largest resident size of the engine.
  What of the CPU goes into keeping (results read and written, clips' files moved) and into publishing (links, manifest, DATASET.json) is
  counted apart, by a clock of the main thread around those calls; the rest is the engine's own: guards, phases, counts.
- Short clips (16 frames of 160x90, one shot each, x264) through probe, decode and measures, and their own files with 2 guards; the peer
  runs the same step functions in one Python process for each step and file, as curation scripts do; each imports what its step needs
  (nothing imports torch). The peer's processes are so slow that it gets fewer files; both are counted a clip. Floor 1.5x, goal 3x.

    OMP_NUM_THREADS=1 .venv/bin/python bench/prepare.py
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import harness
import yaml
from harness import Measured, Row

from opensora.dataset.left_out import LeftOut
from opensora.dataset.prepare_config import Download, Given
from opensora.dataset.rows import Captioned, ClipFile, Fetched, Looked, Media, Provenance, Shot, Source
from opensora.prepare import clip_phases, engine, run_state
from opensora.prepare.steps import Captioning, CutOut, Inspect, Inspected, Steps

MEASURES = ("black", "brightness", "contrast", "motion", "saturation", "sharpness", "static")
MEDIA = Media("mov", "h264", 1280, 720, 0, (1, 1), "yuv420p", 8, "", False, False, (1, 12800), 0, 64000, 125, 25.0, False, "aac")
CONTENT = b"no work"


def inspect(row: Inspect) -> Inspected:
    shot = Shot(0, 64000, (1, 12800), 0, 125, dict.fromkeys(MEASURES, 0.5), row.content[:16], thumbnail="A" * 3000)
    return Inspected(MEDIA, Looked(MEDIA, (), (shot,), 0))


def cut_out(row: CutOut) -> ClipFile:
    Path(row.to).write_bytes(CONTENT)
    return ClipFile("", "ab" * 32, len(CONTENT), 125, 1280, 720, 25.0)


def fetch(source: Source, _folder: Path, _settings: Download, _halt: Callable[[], bool], _most: int) -> Fetched:
    return Fetched(source, source.uri, hashlib.sha256(source.uri.encode()).hexdigest(), 1)


def listed(given: Sequence[Given], _left_out: LeftOut) -> Iterator[Source]:
    for number in range(int(given[0].path)):
        uri = f"https://videos.example/set/{number:08d}.mp4"
        yield Source(uri, f"{number:08d}", Provenance("set", uri, "cc-by-4.0", f"Film number {number}", "a film"))


class Nothing:
    tokens_in, tokens_out, dollars, stopped = 0, 0, 0.0, ""


def caption(work: Captioning) -> Nothing:
    for clip in work.clips:
        work.on_done(clip.id, Captioned("a film of some length, with a caption as models write them", "text", language="en"))
    return Nothing()


VERSIONS = dict.fromkeys(("download", "probe", "frames", "clips", "text_area", "scores", "caption"), 1)
NO_WORK = Steps(
    listed=listed, fetch=fetch, inspect=inspect, cut_out=cut_out, caption=caption,
    check_caption=lambda captioned, config: None, words=lambda captioned: 12, versions=lambda: VERSIONS, preload=("prepare",),
)  # fmt: skip


def configured(folder: Path, given: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"name": "bench", "sources": [{"path": given}], "workers": 2, "caption": {"kind": "text"}, "filter": {"rules": []}}
    (folder / "prepare.yaml").write_text(yaml.safe_dump(content))


def server_cpu_s() -> float:
    """CPU-seconds of the fork server and of all guards that have ended."""
    pid = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def clocked(owner: Any, names: Sequence[str], spent: dict[str, float], label: str) -> None:
    """Count the CPU-seconds of these functions, as far as the main thread calls them."""

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return function(*given, **named)
            began, before = time.thread_time(), sum(spent.values())
            try:
                return function(*given, **named)
            finally:  # less what calls within it have counted
                spent[label] += time.thread_time() - began - (sum(spent.values()) - before)

        return call

    for name in names:
        setattr(owner, name, wrapped(getattr(owner, name)))


def kept_rows(count: int) -> dict[str, float]:
    """A whole run over rows of no work."""
    spent = {"keeping_s": 0.0, "publishing_s": 0.0}
    clocked(run_state.Results, ("read", "write", "has", "finish"), spent, "keeping_s")
    clocked(clip_phases, ("move",), spent, "keeping_s")
    clocked(engine, ("_publish",), spent, "publishing_s")
    with tempfile.TemporaryDirectory() as name:
        configured(Path(name), str(count))
        began = time.process_time()
        ended = engine.run(Path(name), NO_WORK)
        assert ended.code == 0, ended.reason
        used = {"cpu_s": time.process_time() - began + server_cpu_s(), "rows": count}
        return used | spent | {"gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


def films(count: int, folder: Path) -> None:
    """Short films, no two alike."""
    import torch

    from opensora.evaluation.video_files import write_mp4

    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        coarse = torch.rand(1, 3, 8, 6, 10, generator=generator)
        film = torch.nn.functional.interpolate(coarse, (16, 90, 160), mode="trilinear")[0].permute(1, 2, 3, 0)
        write_mp4(folder / f"{number:04d}.mp4", (film * 255).byte().contiguous())


def of_folder(given: Sequence[Given], _left_out: LeftOut) -> Iterator[Source]:
    for path in sorted(Path(given[0].path).iterdir()):
        yield Source(str(path), path.stem, Provenance("films", str(path)))


def hashed(source: Source, _folder: Path, _settings: Download, _halt: Callable[[], bool], _most: int) -> Fetched:
    data = Path(source.uri).read_bytes()
    return Fetched(source, source.uri, hashlib.sha256(data).hexdigest(), len(data))


def whole_run(folder: str) -> dict[str, float]:
    """The real steps over a folder of films."""
    with tempfile.TemporaryDirectory() as name:
        configured(Path(name), folder)
        began = time.process_time()
        steps = Steps(listed=of_folder, fetch=hashed)
        ended = engine.run(Path(name), steps)
        assert ended.code == 0, ended.reason
        clips = json.loads((Path(name) / "out" / "DATASET.json").read_text())["clips"]
        return {"cpu_s": time.process_time() - began + server_cpu_s(), "rows": clips}


SCRIPT = """
import pickle, sys
from pathlib import Path
from opensora.dataset.prepare_config import Clips, Cut, Limits
step, film, to = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
if step == "probe":
    from opensora.prepare.probe import probe
    (to / "media").write_bytes(pickle.dumps(probe(film, Limits())))
elif step == "look":
    from opensora.prepare.look import look
    (to / "looked").write_bytes(pickle.dumps(look(film, pickle.loads((to / "media").read_bytes()), Cut())))
else:
    from opensora.prepare.clip_files import write
    looked = pickle.loads((to / "looked").read_bytes())
    for number, shot in enumerate(looked.shots):
        write(film, looked.media, shot, to / f"{number}.mp4", Clips())
"""


def one_process_each(folder: str, count: int) -> dict[str, float]:
    """The same step functions, a process for each step and file."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as name:
        for film in sorted(Path(folder).iterdir())[:count]:
            for step in ("probe", "look", "clip"):
                subprocess.run([sys.executable, "-c", SCRIPT, step, str(film), name], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, "rows": count}


PARTS: Mapping[str, Callable[..., dict[str, float]]] = {
    "kept": lambda count: kept_rows(int(count)), "run": whole_run,
    "each": lambda folder, count: one_process_each(folder, int(count)),
}  # fmt: skip


def part(name: str, *arguments: object) -> dict[str, float]:
    """In a process of its own."""
    code = "import sys, prepare; prepare.print_part(*sys.argv[1:])"  # a guard would import a script anew, and nothing of -c
    command = [sys.executable, "-c", code, name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def smallest(readings: Sequence[Mapping[str, float]]) -> float:
    """CPU-milliseconds a row, of the round that nobody disturbed."""
    return min(one["cpu_s"] / one["rows"] for one in readings) * 1e3


def measure(quick: bool) -> Measured:
    many, count, peers, rounds = (200, 4, 1, 1) if quick else (400_000, 1000, 20, 3)
    raw: dict[str, list[dict[str, float]]] = {name: [] for name in PARTS}
    raw["kept"].append(part("kept", many))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "films"
        films(count, folder)
        for _ in range(rounds):
            raw["run"].append(part("run", folder))
            raw["each"].append(part("each", folder, peers))
    ours, theirs = smallest(raw["run"]), smallest(raw["each"])
    whole = raw["kept"][0]
    own = (whole["cpu_s"] - whole["keeping_s"] - whole["publishing_s"]) / many * 1e3
    found = [
        Row("engine: CPU of a row of no work, all results kept, published", smallest(raw["kept"]), "ms", 1, 0.2, better="less"),
        Row("engine: of that, its own", own, "ms", better="less"),
        Row("engine: of that, results kept and read", whole["keeping_s"] / many * 1e3, "ms", better="less"),
        Row("engine: of that, published", whole["publishing_s"] / many * 1e3, "ms", better="less"),
        Row(f"engine: memory of {many:,} rows", whole["gb"], "GB", 1, better="less"),
        Row(f"{count:,} short clips, all CPU steps: against a process a step and file", theirs / ours, "x", 1.5, 3),
        Row(f"{count:,} short clips, all CPU steps: CPU of a clip", ours, "ms", better="less"),
    ]
    return found, {
        "ms_a_clip": {"ours": ours, "peer": theirs},
        "readings": raw,
        "libraries": harness.libraries("av", "opencv-python-headless", "pyarrow"),
    }


def print_part(name: str, *arguments: str) -> None:
    print(json.dumps(PARTS[name](*arguments)))


def main() -> None:
    harness.run("prepare", measure)


if __name__ == "__main__":
    main()
