"""The page of a preparation: what each rule would keep, what became of clips; whatever people wrote is text on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import browsers
import pytest
from prepare_bench import Bench

from opensora.dataset.prepare_config import Filter, Rule
from orchestrator.prepare.clip_rows import Clips
from orchestrator.prepare.report import page

EVIL = "<script>document.title='owned'</script><img src=x onerror=alert(1)>"


def written(bench: Bench) -> str:
    directory = bench.directory()
    with Clips.of(directory) as clips:
        return page(clips, directory.status(), "s3://b/<place>", 1_800_000_000)


def prepared(bench: Bench, **settings: Any) -> Bench:
    (bench.videos / f"{EVIL.replace('/', chr(0x2215))}.mp4").write_bytes(b"film evil")
    bench.run(**settings)
    return bench


RULES = Filter(rules=(Rule(column="motion", max=1.0), Rule(column="static", min=0.0, max=50.0)), duplicates=None)


def test_the_page_says_what_each_rule_alone_would_keep(bench: Bench) -> None:
    bench.run(filter=RULES)
    shown = written(bench)
    assert "motion at most 1" in shown and '<td class="n">3</td><td class="n">3</td>' in shown, "every second half moves more"
    assert "all rules together" in shown and "the rule keeps 3 of 6" in shown and "the rule keeps 6 of 6" in shown
    assert "half 0 of a" in shown and shown.count('src="data:image/jpeg;base64,') == 6


def test_what_people_wrote_is_text_on_the_page(bench: Bench) -> None:
    shown = written(prepared(bench))
    assert "<script" not in shown and "<img src=x" not in shown and "&lt;script&gt;" in shown
    assert "s3://b/&lt;place&gt;" in shown and "default-src 'none'" in shown


def test_a_page_of_many_clips_shows_some_of_them(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.prepare import report

    monkeypatch.setattr(report, "PICTURES", 4)
    bench.run()
    shown = written(bench)
    assert shown.count('class="clip') - shown.count('class="clips') == 4 and "4 of 6, drawn at random" in shown


def test_a_page_of_a_preparation_that_has_just_begun_is_a_page(bench: Bench) -> None:
    directory = bench.directory()
    directory.path.mkdir()
    directory.lay_out(bench.asked().config, {})
    assert "not complete yet" in written(bench) and "0 clips were cut" in written(bench)


@pytest.mark.long
@pytest.mark.browser
def test_a_browser_shows_it_without_a_script_or_a_request(bench: Bench, tmp_path: Path, require: Any) -> None:
    from selenium.webdriver.common.by import By

    path = tmp_path / "report.html"
    path.write_text(written(prepared(bench, filter=RULES)), encoding="utf-8")
    with browsers.window(require, tmp_path / "u", (1200, 1600)) as window:
        window.get(path.as_uri())
        assert window.title == "mine: preparation"
        assert [one.text for one in window.find_elements(By.TAG_NAME, "h2")] == [
            "Steps", "Rules", "Columns", "How clips fared", "Clips", "Captions",
        ]  # fmt: skip
        pictures = window.find_elements(By.CSS_SELECTOR, ".clip img")
        assert len(pictures) == 8 and all(one.get_property("naturalWidth") == 1 for one in pictures)
        bars = window.find_elements(By.CSS_SELECTOR, "svg rect")
        assert any(bar.size["height"] > 50 for bar in bars)
        width = window.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert width[0] <= width[1], "nothing leaves the window, however long a name is"
        assert window.get_log("browser") == []
