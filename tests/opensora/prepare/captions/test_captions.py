"""What all kinds of captions share: each clip is reported once, a halt leaves the rest, and nothing is imported that is not named."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import clip_rows
import yaml

from opensora.dataset.prepare_config import CaptionBeside, CaptionText, PrepareConfig
from opensora.dataset.rows import Captioned, Drop, Leaves, Provenance
from opensora.prepare.captions import Spent, caption_all

REPOSITORY = Path(__file__).parents[4]


def no_frames(path: Path, shares: Sequence[float], side: int) -> list[bytes]:
    raise AssertionError("nothing is shown to anybody")


def test_each_clip_is_reported_once_in_order_with_a_caption_or_a_reason() -> None:
    told = {"a": "a cat sleeps", "b": "", "c": "a dog runs"}
    clips = [clip_rows.clip(name, provenance=Provenance(caption=text)) for name, text in told.items()]
    said: list[tuple[str, Captioned | Leaves]] = []
    before = Spent(tokens_in=7, dollars=0.5)
    spent = caption_all(
        clips,
        Path(),
        CaptionBeside(kind="beside"),
        on_done=lambda name, result: said.append((name, result)),
        halt=lambda: False,
        frames_of=no_frames,
        before=before,
    )
    assert [name for name, _ in said] == ["a", "b", "c"]
    assert isinstance(said[1][1], Drop) and isinstance(said[2][1], Captioned) and said[2][1].text == "a dog runs"
    assert (spent.tokens, spent.dollars, spent.stopped) == (7, 0.5, "")


def test_after_a_halt_the_rest_is_not_reported() -> None:
    said: list[str] = []
    spent = caption_all(
        [clip_rows.clip(str(number)) for number in range(9)],
        Path(),
        CaptionText(kind="text", text=" a \n video "),
        on_done=lambda name, result: said.append(name),
        halt=lambda: len(said) == 4,
        frames_of=no_frames,
    )
    assert said == ["0", "1", "2", "3"] and spent.stopped == "halted"


def test_one_text_is_every_clip_s_and_tidied() -> None:
    said: dict[str, Captioned | Leaves] = {}
    clips = [clip_rows.clip("a"), clip_rows.clip("b")]
    text = CaptionText(kind="text", text=" a man \n walks home ")
    caption_all(clips, Path(), text, on_done=said.__setitem__, halt=lambda: False, frames_of=no_frames)
    assert said == {name: Captioned("a man walks home", "text", language="en") for name in "ab"}


def test_torch_and_transformers_are_imported_where_they_are_named_alone() -> None:
    code = (
        "import sys, opensora.prepare.captions; print([name for name in ('torch', 'transformers', 'sklearn', 'av') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_examples_of_the_page_are_valid() -> None:
    page = (REPOSITORY / "docs" / "datasets.md").read_text()
    section = page[page.index("## Captions") : page.index("## Formats")]
    examples = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", section, re.MULTILINE | re.DOTALL)]
    kinds = [
        PrepareConfig.model_validate({"name": "n", "sources": [{"path": "p"}]} | one).caption.kind for one in examples if "caption" in one
    ]
    assert {"llava", "server"} <= set(kinds)
