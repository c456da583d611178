"""A preparation as one HTML page: what each rule would keep before it is applied, counts by reason, pictures, captions.

One file that fetches nothing and runs no script; it can be mailed. Owns its words and drawings. Whatever people or models wrote is escaped.
"""

from __future__ import annotations

import base64
import binascii
import heapq
import html
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from opensora.dataset.prepare_config import Rule
from opensora.printable import several
from orchestrator.prepare.clip_rows import DUPLICATE, KEPT, ClipRow, Clips, broken
from orchestrator.prepare.watching import steps_of

PICTURES, BARS = 240, 40
"""Clips that are shown, and bars of a histogram. Arbitrary: 240 thumbnails of 5 KB are a page of 1.6 MB."""
STYLE = """
:root { color-scheme: light dark; --ink: #1b1d21; --soft: #667; --line: #d8dbe0; --bar: #5b8def; --out: #d9a0a0; --back: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e9ec; --soft: #99a; --line: #3a3d44; --back: #17181b; --out: #7a4444; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--back); margin: 2rem auto; max-width: 76rem;
padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; } p, .soft { color: var(--soft); margin: .2rem 0; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line);
vertical-align: top; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; } .wrap { overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(22rem, 1fr)); gap: 1.2rem; }
figure { margin: 0; } figcaption { font-weight: 600; } svg { width: 100%; height: 7rem; display: block; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: .8rem; }
.clip { border: 1px solid var(--line); border-radius: 6px; overflow: hidden; font-size: .8rem; } .clip.left { opacity: .6; }
.clip img { width: 100%; height: 6rem; object-fit: contain; background: #000; display: block; } .clip div { padding: .35rem .5rem; }
"""


@dataclass
class Seen:
    """What a page needs of all clips, read once."""

    values: dict[str, list[float]] = field(default_factory=dict)
    """Numbers by column."""
    alone: Counter[int] = field(default_factory=Counter)
    """By place of a rule, how many clips it alone would drop."""
    all_rules: int = 0
    """Clips that hold all rules."""
    verdicts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(step, verdict)."""
    clips: int = 0
    shown: list[tuple[str, ClipRow]] = field(default_factory=list)
    """Those with the smallest ids, which are drawn at random: ids are digests."""


def page(clips: Clips, status: Mapping[str, Any], place: str | None, now: float) -> str:
    """The whole page.

    Args:
        status: status.json.
        place: of the data set in its store; None: not published.
    """
    rules, seen = clips.config.filter.rules, _seen(clips)
    about = clips.directory.description()
    counts = about.get("steps") if about.get("steps") else status.get("steps", {})
    alone = about.get("alone") or status.get("alone") or {}
    twins = alone.get(DUPLICATE) if isinstance(alone, Mapping) else None
    parts = [_head(clips, about, seen, place, now), _steps({"steps": counts}), _rules(rules, seen, twins), _charts(rules, seen)]
    parts += [_verdicts(seen), _pictures(seen), _captions(seen)]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width"><title>{_text(clips.config.name)}: preparation</title>'
        f"<style>{STYLE}</style></head><body>\n{''.join(parts)}\n</body></html>\n"
    )


def _seen(clips: Clips) -> Seen:
    seen, rules = Seen(), clips.config.filter.rules
    for row in clips.rows():
        seen.clips += 1
        for name, value in row.columns.items():
            if isinstance(value, int | float) and math.isfinite(value):
                seen.values.setdefault(name, []).append(float(value))
        outside = [place for place, rule in enumerate(rules) if rule.column in row.columns and broken(rule, row.columns)]
        seen.alone.update(outside)
        seen.all_rules += not outside
        seen.verdicts[row.step, row.verdict] += 1
        seen.shown.append((row.id, row))
        if len(seen.shown) > 4 * PICTURES:
            seen.shown = heapq.nsmallest(PICTURES, seen.shown, key=lambda one: one[0])
    seen.shown = sorted(
        heapq.nsmallest(PICTURES, seen.shown, key=lambda one: one[0]), key=lambda one: (one[1].source, one[1].shot.start_pts)
    )
    return seen


def _head(clips: Clips, about: Mapping[str, Any], seen: Seen, place: str | None, now: float) -> str:
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime(now))
    made = (
        f"{about['clips']:,} clips, {about['seconds'] / 60:,.1f} minutes, digest {str(about['digest'])[:16]}"
        if about
        else "not complete yet"
    )
    where = f" at {_text(place)}" if place else ""
    cut = f"<p>{several(seen.clips, 'clip was', 'clips were')} cut; page of {written}</p>"
    return f'<h1>{_text(clips.config.name)}</h1><p class="wrap">{_text(made)}{where}</p>{cut}'


def _steps(status: Mapping[str, Any]) -> str:
    rows = []
    for row in steps_of(status):
        why = [
            f"{_text(reason)}: {count:,}" for kind in row["reasons"].values() for reason, count in sorted(kind.items(), key=lambda i: -i[1])
        ]
        rows.append([_text(row["name"]), *(f"{row[name]:,}" for name in ("in", "kept", "dropped", "quarantined")), "<br>".join(why)])
    return _section("Steps", _table(["step", "#in", "#kept", "#dropped", "#put aside", "why"], rows))


def _rules(rules: tuple[Rule, ...], seen: Seen, twins: object) -> str:
    """`twins`: how many clips are near duplicates, where the engine has counted them."""
    rows = [[_text(said(rule)), f"{seen.clips - seen.alone[place]:,}", f"{seen.alone[place]:,}"] for place, rule in enumerate(rules)]
    if isinstance(twins, int):
        rows.append([DUPLICATE, f"{seen.clips - twins:,}", f"{twins:,}"])
    rows.append(["all rules together", f"{seen.all_rules:,}", f"{seen.clips - seen.all_rules:,}"])
    note = "<p>What each rule would keep of all clips, were there no other. A column that is not measured yet counts as kept.</p>"
    return _section("Rules", note + _table(["rule", "#keeps", "#drops"], rows))


def _charts(rules: tuple[Rule, ...], seen: Seen) -> str:
    bounded = {rule.column for rule in rules}
    same = {name: values[0] for name, values in sorted(seen.values.items()) if min(values) == max(values) and name not in bounded}
    drawn = [(name, values) for name, values in sorted(seen.values.items()) if name not in same]
    figures = [_histogram(name, values, [rule for rule in rules if rule.column == name]) for name, values in drawn]
    alike = f"<p>The same for all clips: {', '.join(f'{_text(name)} {value:g}' for name, value in same.items())}</p>" if same else ""
    return _section("Columns", f'<div class="charts">{"".join(figures)}</div>{alike}')


def _histogram(name: str, values: list[float], rules: Iterable[Rule]) -> str:
    """Bars from the least to the largest value; those outside of a rule's bounds have another colour, and the bounds are lines."""
    bounds = [bound for rule in rules for bound in (rule.min, rule.max) if bound is not None]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    counts = Counter(min(BARS - 1, int((value - low) / span * BARS)) for value in values)
    tallest = max(counts.values())
    least = max((rule.min for rule in rules if rule.min is not None), default=-math.inf)
    most = min((rule.max for rule in rules if rule.max is not None), default=math.inf)
    width = 100 / BARS
    bars = []
    for bar in range(BARS):
        height = 100 * counts[bar] / tallest
        middle = low + (bar + 0.5) * span / BARS
        colour = "var(--bar)" if least <= middle <= most else "var(--out)"
        bars.append(f'<rect x="{bar * width:.2f}" y="{100 - height:.2f}" width="{0.9 * width:.2f}" height="{height:.2f}" fill="{colour}"/>')
    for bound in bounds:
        at = 100 * (bound - low) / span
        if 0 <= at <= 100:
            bars.append(
                f'<line x1="{at:.2f}" x2="{at:.2f}" y1="0" y2="100" stroke="var(--ink)" stroke-width="0.5" stroke-dasharray="2 2"/>'
            )
    inside = sum(least <= value <= most for value in values)
    limits = f"; the rule keeps {inside:,} of {len(values):,}" if bounds else ""
    return (
        f"<figure><figcaption>{_text(name)}</figcaption>"
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="histogram of {_text(name)}">{"".join(bars)}</svg>'
        f'<p class="soft">{low:.4g} to {high:.4g}, median {sorted(values)[len(values) // 2]:.4g}{limits}</p></figure>'
    )


def _verdicts(seen: Seen) -> str:
    rows = [[_text(step or "·"), _text(verdict), f"{count:,}"] for (step, verdict), count in seen.verdicts.most_common()]
    return _section("How clips fared", _table(["step", "reason", "#clips"], rows))


def _pictures(seen: Seen) -> str:
    cells = []
    for _, row in seen.shown:
        picture = f'<img alt="" src="data:image/jpeg;base64,{row.shot.thumbnail}">' if _is_base64(row.shot.thumbnail) else ""
        verdict = row.verdict if row.verdict == KEPT else f"{row.step}: {row.verdict}" if row.step else row.verdict
        about = f"{_text(row.source)} {row.shot.start_s:.1f} to {row.shot.end_s:.1f} s<br>"
        about += f"<b>{_text(verdict)}</b> <span>{_text(row.detail)}</span>"
        left = "" if row.verdict == KEPT else " left"
        cells.append(f'<div class="clip{left}" id="{_text(row.id)}">{picture}<div class="wrap">{about}<br>{_text(row.id)}</div></div>')
    more = f"<p>{len(seen.shown):,} of {seen.clips:,}, drawn at random.</p>" if len(seen.shown) < seen.clips else ""
    return _section("Clips", f'{more}<div class="clips">{"".join(cells)}</div>')


def _captions(seen: Seen) -> str:
    rows = [[_text(row.id), _text(row.source), _text(row.caption), _text(row.caption_by)] for _, row in seen.shown if row.caption]
    return _section("Captions", _table(["clip", "source", "caption", "by"], rows)) if rows else ""


def said(rule: Rule) -> str:
    """A rule in words: `static at most 0.9`."""
    bounds = [f"at least {rule.min:g}"] if rule.min is not None else []
    bounds += [f"at most {rule.max:g}"] if rule.max is not None else []
    bounds += [f"one of {', '.join(rule.any_of)}"] if rule.any_of else []
    return f"{rule.column} {' and '.join(bounds)}"


def _table(headings: list[str], rows: list[list[str]]) -> str:
    """Cells are HTML; a heading with # is of numbers."""
    numbers = [heading.startswith("#") for heading in headings]
    kind = [' class="n"' if number else ' class="wrap"' for number in numbers]
    head = "".join(f"<th{k}>{heading.lstrip('#')}</th>" for k, heading in zip(kind, headings, strict=True))
    body = "".join(f"<tr>{''.join(f'<td{k}>{cell}</td>' for k, cell in zip(kind, row, strict=True))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _section(title: str, body: str) -> str:
    return f"\n<section><h2>{title}</h2>{body}</section>"


def _text(value: object) -> str:
    """As text of a page, whatever it holds: half a surrogate pair, too."""
    return html.escape(str(value).encode("utf-8", "replace").decode())


def _is_base64(text: str) -> bool:
    try:
        return bool(text) and len(base64.b64decode(text, validate=True)) > 0
    except (binascii.Error, ValueError):
        return False
