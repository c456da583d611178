"""Every command that the README's table names is executed, word by word, on a small recipe. `.ci/run` executes the two set-up commands,
tests/cluster/test_pipelines.py those of the section on Kubernetes.
"""

from __future__ import annotations

import re
import shlex
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from tiny_recipe import OSCTL, Osctl, write

README = (Path(__file__).parents[2] / "README.md").read_text()
TABLE = README.split("## What one types")[1].split("\n## ")[0]


def named(text: str) -> list[str]:
    return re.findall(r"`(osctl [^`]+)`", "\n".join(line for line in text.splitlines() if line.startswith("|")))


COMMANDS = named(TABLE.split("### On Kubernetes")[0])


@pytest.fixture(scope="module")
def osctl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Osctl]:
    folder = tmp_path_factory.mktemp("readme")
    clips = folder / "home/clips"
    clips.mkdir(parents=True)
    (clips / "captions.csv").write_text("path,text\none.mp4,a grey square\n")
    with av.open(str(clips / "one.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for level in range(8):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * level, np.uint8), format="rgb24")))
        out.mux(stream.encode())
    (folder / "home/weights").mkdir()
    (folder / "home/weights/model.safetensors").write_bytes(b"of somebody")
    changes = {"steps": 2, "batch_size": 1, "checkpoint": {"every_steps": 2}}
    yield Osctl(write(folder / "recipe", devices=1, tracking="sqlite", changes=changes), env={"HOME": str(folder / "home")})


def test_the_readme_names_every_command(osctl: Osctl) -> None:
    listing = osctl("--help").stdout.split("Commands:")[1]
    names = {line.split()[0] for line in listing.splitlines() if line.startswith("  ") and not line.startswith("   ")}
    assert {command.split()[1] for command in named(TABLE)} == names


def place(command: str) -> int:
    """The launch first, since the others look at what it made; the one on other data last, since it is what they would look at then."""
    return 0 if command == "osctl launch" else 2 if "--data" in command else 1


@pytest.mark.long
@pytest.mark.parametrize("command", sorted(COMMANDS, key=place))
def test_a_command_of_the_readme_does_what_it_says(osctl: Osctl, command: str) -> None:
    arguments = [word.replace("~", str(osctl.folder.parent / "home")) for word in shlex.split(command)[1:]]
    if arguments == ["mlflow"]:
        mlflow_opens(osctl)
        return
    done = osctl(*arguments)
    if arguments[0] in ("plan", "compare", "cost", "lineage", "list", "explain"):
        assert done.stdout.strip(), "a result on stdout"
    if arguments[0] == "sample":
        assert (osctl.folder / "three.mp4").stat().st_size > 0
    if arguments[0] == "init":
        assert (osctl.folder / "my-model/osctl.yaml").exists()


def mlflow_opens(osctl: Osctl) -> None:
    """It says where the stages stand side by side, and ends on Ctrl-C."""
    import subprocess

    server = subprocess.Popen(
        [OSCTL, "mlflow", "--no-open", "--port", "0"], cwd=osctl.folder, env=osctl.environment(), stderr=subprocess.PIPE, text=True
    )
    assert server.stderr is not None
    said, deadline = "", time.monotonic() + 150
    while "stages:" not in said and time.monotonic() < deadline and (line := server.stderr.readline()):
        said += line
    try:
        assert "compare-runs" in said, said
        server.send_signal(signal.SIGINT)
        assert server.wait(30) in (0, 130)
    finally:
        server.terminate()
        server.wait(30)
        server.stderr.close()
