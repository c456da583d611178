"""No command line, however odd, ends in a traceback. hypothesis draws them from the commands' own signatures: every command, every option
by its type, values that nobody should pass. The long version for scripts/prove draws 600.
"""

from __future__ import annotations

import enum
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from live_attempts import STAND_IN
from proofs import Proof
from tiny_recipe import OSCTL, write

from orchestrator.cli.commands import app

CODES = {0, 1, 2, 3, 4, 5, 130}
"""Of the documented ones: 6 would be a fault of osctl, 128 + n a signal that nobody sent."""
LIMIT_S = 120.0
ROOT: Any = typer.main.get_command(app)
AT_THE_END = {
    ("launch",): ["--dry-run"], ("mlflow",): ["--tracking", "none"], ("resume",): ["--stage", "stage1"], ("prepare", "run"): ["--dry-run"],
}  # fmt: skip
"""What keeps a command that happens to be right from training for minutes, or serving until it is ended."""

LONG = "n" * 10_000
TEXTS = [
    "", " ", ".", "..", "/", "~", "~nobody-here/x", "-", "--", "-x", "--nope", "=", "a=b", "=1", "stage1", "stage9", "tiny", "demo", "a/b",
    "stage1.steps=1e400", "stage1.steps=-1", "stage1.steps=.nan", "stage1.steps=" + "9" * 400, "stage1=1", "stages=1", "name=", "name=../x",
    "store=", "stage1.model.width=0", "stage1.prompts={}", "stage1.prompts=[a/b]", "stage1.data.frames=100000000", "&a [*a]",
    "!!python/x y", "{", "[", "]]", "'", '"', "`id`", "$(id)", "%s%d%n", "{0}", "\\", "a\nb", "\t", "\x01", "\x1b[31m", "\x7f",
    "é", "e\u0301", "箱", "लड़का",
    "👩‍👩‍👧", "\u202e", "\ufeff", "\udcff", "a\udc80b", LONG, LONG + "/x", "None", "null", "true", "0x10", "1_000", "NaN",
]  # fmt: skip
PATHS = [
    "recipe", "recipe/osctl.yaml", "osctl.yaml", "stage1.yaml", "file", "fifo", "loop", "bin.yaml", "empty.yaml", "big.yaml", "folder",
    "clips", "clips/captions.csv", "nope", "nope/x", "folder/new", "/dev/null",
    "/dev/full", "/dev/zero", "/proc/x", "/proc/self/mem", "/etc/passwd",
    "/nonexistent/a/b", "./.", "x.mp4", "x.png", "folder/x.mp4", "s3://", "s3://b/x", "s3:///x", "s3://B_/x", "ftp://x/y", "http://127.0.0.1:9",
    "http://[::1", "https://", "file:///x", "://", "sqlite", "sqlite:///nope/x.db", "none", ".osctl/store", "kind-cpu", "h800-64", "demo",
    "open-sora-1.0", *TEXTS[:6],
]  # fmt: skip
NUMBERS = [
    "0", "1", "-1", "2", "1.5", "1e3", "1e400", "-0.0", "nan", "inf", "-inf", "0x10",
    "1_0", "٣", "", " 1 ", "9" * 30, str(2**63), str(-(2**63)), "abc",
]  # fmt: skip
WORDS = st.one_of(st.sampled_from(TEXTS), st.sampled_from(PATHS), st.text(st.characters(exclude_characters="\0"), max_size=20))


VARIABLES = [
    "OSCTL_FILE", "OSCTL_STORE", "OSCTL_HOME", "OSCTL_TRACKING", "OSCTL_BACKEND", "OSCTL_CLUSTER", "OSCTL_NAME", "OSCTL_EXPERIMENT",
    "OSCTL_BUDGET_USD", "OSCTL_FLUSH_S", "OSCTL_LATENTS", "OSCTL_PRICES", "OSCTL_CALIBRATION", "OSCTL_PLACES", "OSCTL_S3_PATIENCE_S",
    "OSCTL_S3_ENDPOINT",
    "OSCTL_S3_PATH_STYLE", "OSCTL_S3_CA", "AWS_REGION", "AWS_PROFILE", "HOME", "TMPDIR", "USER", "KUBECONFIG", "COLUMNS",
    "LINES", "TERM", "NO_COLOR", "TZ", "CUDA_VISIBLE_DEVICES", "HF_HOME", "XDG_CACHE_HOME", "OMP_NUM_THREADS",
]  # fmt: skip


def commands(group: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name), command


def values(parameter: Any) -> st.SearchStrategy[str]:
    """Mostly of its type, which gets further into a command than what the parser refuses."""
    kind = getattr(getattr(parameter, "type_descriptor", None), "annotation", str)
    if kind in (int, float):
        return st.one_of(st.sampled_from(NUMBERS), st.integers(0, 3).map(str), WORDS)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return st.one_of(st.sampled_from([str(one.value) for one in kind]), WORDS)
    if kind is Path or parameter.name in ("file", "store", "data", "cluster", "tracking", "source"):
        return st.one_of(st.sampled_from(PATHS), WORDS)
    return st.one_of(st.sampled_from(["stage1", "tiny", "a box"]), WORDS)


@st.composite
def lines(draw: st.DrawFn) -> list[str]:
    words, command = draw(st.sampled_from(list(commands(ROOT))))
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name != "argument"]
    line = list(words)
    for option in draw(st.lists(st.sampled_from(options), max_size=4)) if options else []:
        name = draw(st.sampled_from(option.opts))
        if option.is_flag:
            line.append(name)
        elif name.startswith("--") and draw(st.booleans()):
            line.append(f"{name}={draw(values(option))}")
        else:
            line += [name, draw(values(option))]
    given_ = draw(st.integers(0, len(arguments)) if draw(st.integers(0, 4)) == 0 else st.just(len(arguments)))
    places = [draw(values(argument)) for argument in arguments[:given_]]
    line += AT_THE_END.get(words, [])
    return [*line, *(["--"] if draw(st.booleans()) else []), *places] if places else line


variables = st.one_of(
    st.just({}),
    st.dictionaries(st.sampled_from(VARIABLES), st.one_of(st.sampled_from(PATHS), st.sampled_from(NUMBERS), WORDS), max_size=2),
)


@dataclass
class Desk:
    """A folder with a launched pipeline and odd things beside it, made once; each command gets a copy of it."""

    made: Path
    server: subprocess.Popen[str]
    count: int = 0

    def run(self, line: list[str], variables: dict[str, str]) -> None:
        self.count += 1
        place = self.made.parent / f"try-{self.count}"
        shutil.copytree(self.made, place, symlinks=True, ignore=lambda _, names: [name for name in names if name == "fifo"])
        here = place / "here"
        os.mkfifo(here / "fifo")
        before = {path.name for path in here.iterdir()}
        outside = sorted(path.relative_to(place) for path in place.rglob("*") if here not in (path, *path.parents))
        out, err = place / "out", place / "err"
        request = {
            "words": line,
            "folder": str(here),
            "out": str(out),
            "err": str(err),
            "limit_s": LIMIT_S,
            "env": os.environ | self.env(place) | variables,
        }
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        code = json.loads(self.server.stdout.readline())["code"]
        said = out.read_bytes() + err.read_bytes()
        shown = f"{variables} osctl {line}\nexit {code}\n{said.decode(errors='replace')[-3000:]}"
        assert code is not None, f"ran longer than {LIMIT_S:g} s: {shown}"
        assert code in CODES, shown
        assert b"Traceback" not in said and b"internal" not in err.read_bytes().partition(b"error: ")[2][:9], shown
        told = [word.partition("=")[2] if word.startswith("-") else word for word in (*line, *variables.values())]
        leads_out = any(".." in word or "~" in word for word in told)  # there it was told to write
        leads_here = any(os.path.normpath(word.rpartition("=")[2] or "x") == "." for word in told)  # a store in the working folder
        new = {path.name for path in here.iterdir()} - before - {".osctl"}
        assert leads_here or all(any(name in word for word in (*line, *variables.values())) for name in new), (
            f"{new} in the working folder: {shown}"
        )
        after = sorted(path.relative_to(place) for path in place.rglob("*") if here not in (path, *path.parents))
        assert leads_out or [path for path in after if path not in outside and path.parts[0] not in ("out", "err", "tmp")] == [], shown
        shutil.rmtree(place)

    def env(self, place: Path) -> dict[str, str]:
        return {
            "HOME": str(place / "home"), "TMPDIR": str(place / "tmp"), "KUBECONFIG": str(place / "none"), "OMP_NUM_THREADS": "1",
            "OSCTL_S3_PATIENCE_S": "0", "OSCTL_S3_ENDPOINT": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_REGION": "us-east-1", "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1",
        }  # fmt: skip


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    made = tmp_path_factory.mktemp("arguments") / "made"
    here = made / "here"
    changes = {"steps": 20, "checkpoint": {"every_steps": 10, "keep_last": 2}}
    write(here, stages=1, devices=1, changes=changes, trainer=[sys.executable, STAND_IN, "{run_dir}", "{devices}"])
    shutil.copytree(here, here / "recipe")
    for name in ("home", "tmp"):
        (made / name).mkdir()
    (here / "folder").mkdir()
    (here / "clips").mkdir()
    (here / "clips/captions.csv").write_text("path,text\none.mp4,a box\n")
    (here / "clips/one.mp4").write_bytes(b"no video")
    (here / "file").touch()
    (here / "empty.yaml").touch()
    (here / "bin.yaml").write_bytes(b"\xff\xfe")
    (here / "big.yaml").write_bytes(bytes(2_000_000))
    (here / "loop").symlink_to("loop")
    subprocess.run([OSCTL, "launch", "-q"], cwd=here, check=True, capture_output=True, timeout=120)
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).parents[2] / "warm_osctl.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield Desk(made, server)
    assert server.stdin is not None and server.stdout is not None
    server.stdin.close()
    server.wait(30)
    server.stdout.close()


CALM = {"deadline": None, "suppress_health_check": list(HealthCheck), "phases": (Phase.explicit, Phase.reuse, Phase.generate)}


@pytest.mark.long
@settings(max_examples=30, derandomize=True, **CALM)  # type: ignore[arg-type]
@given(line=lines(), env=variables)
def test_no_command_line_ends_in_a_traceback(desk: Desk, line: list[str], env: dict[str, str]) -> None:
    desk.run(line, env)


@pytest.mark.prove("command-lines")
@settings(max_examples=600, **CALM)  # type: ignore[arg-type]
@given(line=lines(), env=variables)
def test_none_of_hundreds_of_command_lines_ends_in_a_traceback(desk: Desk, proof: Proof, line: list[str], env: dict[str, str]) -> None:
    desk.run(line, env)
    proof.count()
