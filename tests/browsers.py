"""A real browser without a screen: Debian's chromium, driven by selenium, which is told where everything is and so fetches nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def window(require: Callable[[str, str], Any], folder: Path, size: tuple[int, int] = (1500, 1750)) -> Iterator[Any]:
    """A window of this size in pixels. `folder`: of its profile. Skips where the browser is not installed."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        require("browser", "chromium and chromedriver are not installed: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(browser)
    size_flag = f"--window-size={size[0]},{size[1]}"
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", size_flag, f"--user-data-dir={folder}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(str(driver)))
    try:
        yield opened
    finally:
        opened.quit()
