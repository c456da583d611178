"""Captions of clips: those that came along, the demo's, one text for all, LLaVA's, or a server's.

`caption_all` reports each clip as soon as it is done, so that a run that is killed asks no clip twice but those under way: at most
`concurrency` requests of a server, one batch of LLaVA.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from opensora.dataset.prepare_config import (
    Caption,
    CaptionBeside,
    CaptionLlava,
    CaptionRule,
    CaptionServer,
    CaptionText,
)
from opensora.dataset.rows import Captioned, Clip, Leaves
from opensora.prepare.captions import beside, server
from opensora.prepare.captions.budget import Spent
from opensora.prepare.captions.clean import tidy
from opensora.prepare.captions.connection import KEY_VARIABLE
from opensora.prepare.captions.language import language_of
from opensora.prepare.captions.server import FIRST_PAUSE_S, OnDone
from opensora.prepare.captions.shown import FramesOf
from opensora.prepare.captions.wanted import wanted, word_count
from opensora.prepare.devices import Device

__all__ = ["VERSION", "OnDone", "Spent", "caption_all", "wanted", "word_count"]

VERSION = 1
"""Raised whenever the same clip, settings and model would give another caption."""
HALTED = "halted"


def caption_all(
    clips: Sequence[Clip],
    folder: Path,
    settings: Caption,
    *,
    on_done: OnDone,
    halt: Callable[[], bool],
    frames_of: FramesOf,
    before: Spent = Spent(),  # noqa: B008 - frozen
    on_spent: Callable[[Spent], None] = lambda spent: None,
    first_pause_s: float = FIRST_PAUSE_S,
    on_device: Callable[[Device], None] = lambda device: None,
) -> Spent:
    """Caption clips.

    Args:
        folder: each clip's file is `folder / clip.file.path`.
        on_done: called once for each clip that is done, with its id and its caption, or the reason why it has none, in this thread.
            Clips that were not asked when the run ended are not reported.
        halt: asked often; true: no new request, those under way finish within their time limit.
        before: what earlier runs of this preparation used; counts against the budget, and is part of what is returned.
        on_spent: told of what was used so far after each request (of LLaVA: each clip), with `before`.
        first_pause_s: of the pauses between tries, which double.
        on_device: told what LLaVA is put on, just before it is. On return it is let go.

    Returns:
        What was used. Its `stopped` says why clips were left, where some were.

    Raises:
        ConfigError: the server or the model cannot be used; what was reported stays.
        OutOfMemory: LLaVA does not fit.
    """
    began = time.monotonic()
    if isinstance(settings, CaptionServer):
        run = server.Run(folder, on_done, on_spent, halt, frames_of, first_pause_s)
        return server.caption(clips, settings, run, key=os.environ.get(KEY_VARIABLE, "").strip(), before=before)
    spent = replace(before, stopped="")
    if isinstance(settings, CaptionLlava):
        from opensora.prepare.captions import llava

        def on_tokens(tokens_in: int, tokens_out: int) -> None:
            nonlocal spent
            spent = replace(spent, tokens_in=spent.tokens_in + tokens_in, tokens_out=spent.tokens_out + tokens_out)
            on_spent(spent)

        whole = llava.caption(
            clips, folder, settings, on_done=on_done, on_tokens=on_tokens, halt=halt, frames_of=frames_of, on_device=on_device
        )
    else:
        whole = _one_by_one(clips, _captioner(settings, folder), on_done, halt)
    return replace(spent, seconds=time.monotonic() - began, stopped="" if whole else HALTED)


def _captioner(settings: CaptionBeside | CaptionRule | CaptionText, folder: Path) -> Callable[[Clip], Captioned]:
    if isinstance(settings, CaptionBeside):
        return beside.caption
    if isinstance(settings, CaptionText):
        text = tidy(settings.text)
        captioned = Captioned(text, "text", language=language_of(text))
        return lambda clip: captioned
    from opensora.prepare.captions import digits  # torch and scikit-learn

    return lambda clip: digits.caption(clip, folder)


def _one_by_one(clips: Sequence[Clip], caption: Callable[[Clip], Captioned], on_done: OnDone, halt: Callable[[], bool]) -> bool:
    """Whether all clips were done."""
    for clip in clips:
        if halt():
            return False
        try:
            result: Captioned | Leaves = caption(clip)
        except Leaves as leaves:
            result = leaves
        on_done(clip.id, result)
    return True
