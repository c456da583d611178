"""A person compares the three stages in MLflow: a real browser on a real server over a ledger that was written by hand."""

from __future__ import annotations

import getpass
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browsers
import pytest
from written_ledger import Writer, pipeline

from orchestrator.accounting.cost import account
from orchestrator.ledger.store import Ledger
from orchestrator.recipe.prices import load_prices
from orchestrator.stores import open_store
from orchestrator.tracking import ui as mlflow_ui
from orchestrator.tracking.client import open_tracker
from orchestrator.tracking.facts import Facts
from orchestrator.tracking.sync import Sync

pytestmark = [pytest.mark.long, pytest.mark.browser, pytest.mark.timeout(600)]

WAIT_S = 180
"""MLflow's pages are 10 MB of scripts; a machine that trains beside the test takes its time."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[mlflow_ui.Server, Facts]]:
    home = tmp_path_factory.mktemp("home")
    story = Writer(Ledger(open_store(str(home / "store")), "demo"), pipeline(steps=300), step_s=0.9)
    story.three_stages()
    tracker = open_tracker("sqlite", home)
    assert tracker is not None
    facts = Sync(story.ledger, tracker, load_prices).update()
    assert facts is not None
    with (home / "server.log").open("wb") as log:
        server = mlflow_ui.start(tracker.url, home / "mlartifacts", log=log)
        try:
            server.wait_until_up(WAIT_S)
            yield server, facts
        finally:
            server.stop()


@pytest.fixture
def browser(require: Any, tmp_path: Path) -> Iterator[Any]:
    with browsers.window(require, tmp_path / "profile") as window:
        yield window


class Page:
    """What a person does: look for something, and click on it."""

    def __init__(self, browser: Any):
        from selenium.webdriver.support.ui import WebDriverWait

        self.browser, self.patience = browser, WebDriverWait(browser, WAIT_S)

    def find(self, path: str) -> Any:
        from selenium.webdriver.common.by import By
        from selenium.webdriver.support import expected_conditions

        return self.patience.until(expected_conditions.element_to_be_clickable((By.XPATH, path)), f"no {path}")

    def click(self, path: str) -> Any:
        from selenium.common.exceptions import StaleElementReferenceException

        while True:
            element = self.find(path)
            try:
                element.click()
            except StaleElementReferenceException:
                continue  # the page drew it anew in between
            return element

    def close_assistant(self) -> None:
        """It opens by itself on a first visit, over a third of the page."""
        self.click("//button[@aria-label='Close']")

    def metrics(self) -> dict[str, list[str]]:
        """The table of metrics of the comparison, of which the page holds only the rows in sight: scrolled through and read."""
        script = """
            const header = [...document.querySelectorAll('[role=button]')].find(e => e.textContent.trim() === 'Metrics');
            const [names, values] = header.parentElement.querySelectorAll('[role=grid]');
            const found = {}, rest = () => new Promise(done => setTimeout(done, 150));
            const cell = e => [e.style.top, parseInt(e.style.left), e.textContent.trim()];
            const cells = grid => [...grid.firstElementChild.children].map(cell);
            for (let top = 0; top <= values.scrollHeight; top += 90) {
                values.scrollTop = top;
                await rest();
                for (const [at, _, name] of cells(names)) {
                    const line = cells(values).filter(cell => cell[0] === at).sort((a, b) => a[1] - b[1]).map(cell => cell[2]);
                    if (line.length) found[name] = line;
                }
            }
            return found;
        """
        found: dict[str, list[str]] = self.browser.execute_script(f"return (async () => {{ {script} }})()")
        return found


def row(name: str) -> str:
    return f"//div[@role='row'][.//a[normalize-space()='{name}']]"


def test_three_stages_are_selected_and_compared(served: tuple[mlflow_ui.Server, Facts], browser: Any, tmp_path: Path) -> None:
    server, facts = served
    number = mlflow_ui.experiment_id(server.url, facts.pipeline.experiment)
    assert number is not None
    page = Page(browser)
    browser.get(mlflow_ui.experiment_page(server.url, number))
    page.click(row("demo") + "//button")
    stages = ("stage1", "stage2", "stage3")
    for name in stages:
        page.click(row(name) + "//div[contains(@class, 'ag-checkbox-input-wrapper')]")
    page.close_assistant()
    page.click("//button[normalize-space()='Compare']")

    page.find("//*[self::h1 or self::h2][normalize-space()='Comparing 3 Runs from 1 Experiment']")
    names = page.find("//tr[th[normalize-space()='Run Name:']]").text
    assert names.split() == ["Run", "Name:", *stages]
    metrics = page.metrics()
    bills = [account([attempt.time for attempt in stage.attempts]) for stage in facts.stages]
    # The page shows three decimals.
    assert [float(shown) for shown in metrics["gpu_hours"]] == pytest.approx([bill.gpu_hours for bill in bills], abs=6e-4)
    assert [float(shown) for shown in metrics["usd"]] == pytest.approx([float(bill.usd) for bill in bills], abs=6e-4)
    assert len(set(metrics["usd"])) > 1
    assert {"goodput", "loss", "ratio_vs_reference", "usd_reference", "evaluation/digit_accuracy"} <= metrics.keys()

    picture = Path(os.environ.get("OSCTL_SCREENSHOT") or tmp_path / "mlflow-compare.png")
    draw(page, ("gpu_hours", "usd", "evaluation/digit_accuracy"))
    picture.parent.mkdir(parents=True, exist_ok=True)
    assert browser.save_screenshot(str(picture)) and picture.stat().st_size > 20_000


def draw(page: Page, metrics: tuple[str, ...]) -> None:
    """Put these on the axes of the plot above the tables."""
    from selenium.webdriver.common.keys import Keys

    page.browser.refresh()  # in MLflow 3.17 the names of a table that was rolled do not stand beside their values any more
    page.click("//div[@role='button'][normalize-space()='Parameters']")
    page.click("//button[normalize-space()='Clear All']")
    page.click("//div[normalize-space()='Metrics:']/following-sibling::div[1]")
    box = page.browser.switch_to.active_element
    for name in metrics:
        box.send_keys(name)
        page.click(f"//div[contains(@class, 'select-item-option')][@title='{name}' or normalize-space()='{name}']")
    box.send_keys(Keys.ESCAPE)
    for name in metrics:
        page.find(f"//*[name()='text'][normalize-space()='{name}']")


def test_the_page_of_a_run_says_who_made_it_from_what_and_what_it_is(
    served: tuple[mlflow_ui.Server, Facts], browser: Any, tmp_path: Path
) -> None:
    server, facts = served
    number = mlflow_ui.experiment_id(server.url, facts.pipeline.experiment)
    page = Page(browser)
    browser.get(f"{mlflow_ui.experiment_page(server.url, number or '')}")
    page.click(row("demo") + "//a[normalize-space()='demo']")
    page.find("//table[.//th[normalize-space()='stage']]//td[normalize-space()='stage3']")
    page.close_assistant()
    assert page.find(f"//*[normalize-space()='{getpass.getuser()}']") and page.find(
        "//*[contains(normalize-space(), 'osctl launch -f demo')]"
    )
    picture = Path(os.environ.get("OSCTL_SCREENSHOT_RUN") or tmp_path / "mlflow-run.png")
    assert browser.save_screenshot(str(picture)) and picture.stat().st_size > 20_000


def test_the_address_of_the_comparison_opens_it(served: tuple[mlflow_ui.Server, Facts], browser: Any) -> None:
    """What `osctl mlflow` prints."""
    server, facts = served
    said: list[str] = []
    mlflow_ui.show(server.url, facts.pipeline.experiment, open_browser=False, say=said.append)
    runs, stages = (line.partition(" ")[2].strip() for line in said)
    assert "/experiments/" in runs
    browser.get(stages)
    page = Page(browser)
    page.find("//*[self::h1 or self::h2][normalize-space()='Comparing 3 Runs from 1 Experiment']")
    assert page.find("//tr[th[normalize-space()='Run Name:']]").text.split()[2:] == ["stage1", "stage2", "stage3"]
