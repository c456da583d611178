"""What captioning may cost: tokens and dollars are set aside before a request is sent, and counted when its answer is there. Pure.

A budget is not passed, because a request is sent only where what it can use at most still fits:

- What comes out is at most `max_tokens`.
- What goes in is known after the first answer. Until then a bound is taken that is above what today's models make of a picture
  (`FIRST_IMAGE`, `FIRST_VIDEO`) and of the prompt (a token a byte). Afterwards: the largest prompt that any answer has counted, and for a
  clip with more pixels as many times more, and `MARGIN` on top, since models cut pictures into tiles and a tile is whole or not there.
- A request that broke off, or whose answer counts nothing, counts as if it had used all that was set aside: the server may have done it.

A server that counts more than was set aside (its prompt of one clip is over 1.25 times that of every clip before, at equal pixels) passes
the budget by that difference, once: the next estimate knows of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from opensora.dataset.prepare_config import CaptionServer

FIRST_IMAGE = 4096
"""Tokens of one picture, before any answer: LLaVA-NeXT takes up to 2,880, InternVL with 13 tiles 3,328."""
FIRST_VIDEO = 32_768
"""Tokens of one video, before any answer: Qwen2.5-VL's default bound is 24,576."""
TEMPLATE = 256
"""Tokens of a chat template around a prompt, before any answer."""
MARGIN = 1.25
"""Over what answers said so far."""


@dataclass(frozen=True)
class Spent:
    """What captioning used."""

    requests: int = 0
    """That were answered with text, or may have been."""
    tokens_in: int = 0
    tokens_out: int = 0
    presumed: int = 0
    """Tokens of requests that told nothing: all that was set aside for them. Not in the two above."""
    dollars: float = 0.0
    seconds: float = 0.0
    """From the first clip to the last, by the clock."""
    stopped: str = ""
    """Why clips were left that were never asked for: a sentence about the budget, or `halted`. Empty: all clips are done."""

    @property
    def tokens(self) -> int:
        """In, out and presumed: what counts against `budget_tokens`."""
        return self.tokens_in + self.tokens_out + self.presumed


@dataclass(frozen=True)
class SetAside:
    """For one request."""

    tokens_in: int
    tokens_out: int
    dollars: float
    pixels: int


class Budget:
    """Of one run. Tokens that earlier runs used count, by `before`."""

    def __init__(self, settings: CaptionServer, before: Spent = Spent()) -> None:
        self.spent = replace(before, stopped="", seconds=0.0)
        self._settings = settings
        self._tokens, self._dollars = 0, 0.0  # set aside for requests under way
        self._most, self._most_a_pixel = 0, 0.0  # prompt tokens that answers counted

    def set_aside(self, pixels: int) -> SetAside | None:
        """For a request that shows so many pixels; None: it does not fit, or not before those under way are counted."""
        wanted = self.estimate(pixels)
        tokens = self.spent.tokens + self._tokens + wanted.tokens_in + wanted.tokens_out
        dollars = self.spent.dollars + self._dollars + wanted.dollars
        limit, money = self._settings.budget_tokens, self._settings.budget_usd
        if (limit is not None and tokens > limit) or (money is not None and dollars > money):
            return None
        self._tokens += wanted.tokens_in + wanted.tokens_out
        self._dollars += wanted.dollars
        return wanted

    def estimate(self, pixels: int) -> SetAside:
        """The most that such a request uses."""
        settings = self._settings
        if self._most:
            tokens_in = math.ceil(MARGIN * max(self._most, self._most_a_pixel * pixels))
        else:
            shown = FIRST_IMAGE * settings.frames if settings.profile == "images" else FIRST_VIDEO
            tokens_in = shown + len(settings.prompt.encode()) + TEMPLATE
        return SetAside(tokens_in, settings.max_tokens, self._price(tokens_in, settings.max_tokens), pixels)

    def answered(self, given: SetAside, tokens_in: int, tokens_out: int) -> None:
        """The answer counted so many."""
        self.unused(given)
        self._most = max(self._most, tokens_in)
        self._most_a_pixel = max(self._most_a_pixel, tokens_in / max(given.pixels, 1))
        spent = self.spent
        self.spent = replace(
            spent,
            requests=spent.requests + 1,
            tokens_in=spent.tokens_in + tokens_in,
            tokens_out=spent.tokens_out + tokens_out,
            dollars=spent.dollars + self._price(tokens_in, tokens_out),
        )

    def untold(self, given: SetAside) -> None:
        """The server may have done the work, and nothing says how much."""
        self.unused(given)
        spent = self.spent
        presumed = spent.presumed + given.tokens_in + given.tokens_out
        self.spent = replace(spent, requests=spent.requests + 1, presumed=presumed, dollars=spent.dollars + given.dollars)

    def unused(self, given: SetAside) -> None:
        """The server did not do it: it could not be reached, or refused."""
        self._tokens -= given.tokens_in + given.tokens_out
        self._dollars -= given.dollars

    def told(self, pixels: int) -> str:
        """Why no further request is sent."""
        settings, wanted, spent = self._settings, self.estimate(pixels), self.spent
        limits = []
        if settings.budget_tokens is not None:
            limits.append(f"budget_tokens {settings.budget_tokens:,} ({spent.tokens:,} used)")
        if settings.budget_usd is not None:
            limits.append(f"budget_usd {settings.budget_usd:g} ({spent.dollars:.4f} used)")
        needs = f"{wanted.tokens_in:,} tokens in and {wanted.tokens_out:,} out"
        return (
            f"caption.{' and '.join(limits)}: the next request may take {needs}. "
            "What was captioned is kept; raise the budget and run the same command again"
        )

    def _price(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self._settings.usd_per_million_in + tokens_out * self._settings.usd_per_million_out) / 1e6
