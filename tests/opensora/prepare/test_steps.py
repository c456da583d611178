"""Laws of the seam between engine and steps: what a guard loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import raw_videos as raw

GUARDS_LIFE = """
import importlib, sys
from pathlib import Path
from opensora.dataset.prepare_config import Clips, Cut, Limits
from opensora.prepare.guard import PRELOADED
from opensora.prepare.steps import CutOut, Inspect, Steps

film, to = sys.argv[1:]
steps = Steps()
for name in (*PRELOADED, *steps.preload):
    importlib.import_module(name)
before = {name.partition(".")[0] for name in sys.modules}
found = steps.inspect(Inspect("a", film, (), None, Cut(min_s=0), Limits()))
for number, shot in enumerate(found.looked.shots):
    steps.cut_out(CutOut(str(number), film, found.looked.media, shot, f"{to}/{number}.mp4", Clips()))
assert found.looked.shots
after = {name.partition(".")[0] for name in sys.modules}
print(*sorted(after - before | {"torch", "transformers"} & after))
"""


def test_a_guard_that_probes_looks_and_cuts_loads_no_torch_and_nothing_that_its_fork_server_has_not(tmp_path: Path) -> None:
    film = raw.written(tmp_path / "a.mp4", raw.any_video(1))
    done = subprocess.run([sys.executable, "-c", GUARDS_LIFE, str(film), str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
