"""A person types a prompt into the page of `osctl ui` and sees a video of each stage: a real browser, real stages, real gradio."""

from __future__ import annotations

import json
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import browsers
import pytest
from tiny_recipe import Osctl, warm_trainer, write

pytestmark = [pytest.mark.long, pytest.mark.browser]

PATIENCE_S = 120
PROMPT = "a digit 3 moving left"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def osctl(tmp_path_factory: pytest.TempPathFactory) -> Osctl:
    """Two committed stages."""
    osctl = Osctl(write(tmp_path_factory.mktemp("ui") / "recipe", stages=2, devices=1, trainer=warm_trainer()))
    osctl("launch", "-q")
    return osctl


@pytest.fixture
def page(osctl: Osctl) -> Iterator[str]:
    """Address of the page, served as a person serves it."""
    port = free_port()
    process = osctl.start("ui", "--no-open", "--port", str(port))
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (osctl.folder / "launch.log").read_text()
            try:
                urllib.request.urlopen(address, timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        yield address
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(address, timeout=5)
    finally:
        process.kill()
        process.wait()


def test_each_stage_draws_the_prompt_beside_what_it_cost(osctl: Osctl, page: str, require: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    with browsers.window(require, tmp_path / "profile", (1300, 1100)) as window:
        wait = WebDriverWait(window, PATIENCE_S)
        window.get(page)
        box = wait.until(lambda _: window.find_element(By.CSS_SELECTOR, "#prompt textarea"))
        text = window.find_element(By.TAG_NAME, "body").text
        for row in osctl.json("compare"):
            assert row["name"] in text and f"step {row['steps']} · " in text
        box.send_keys("a zebra")  # a word that the model does not know
        window.find_element(By.ID, "draw").click()
        wait.until(lambda _: "zebra" in window.find_element(By.CSS_SELECTOR, ".toast-body").text)
        box.clear()
        box.send_keys(PROMPT)
        window.find_element(By.ID, "draw").click()
        sources = [
            wait.until(lambda _, name=name: window.find_element(By.CSS_SELECTOR, f"#video-{name} video").get_attribute("src"))
            for name in ("stage1", "stage2")
        ]
        wait.until(lambda _: window.execute_script("return [...document.querySelectorAll('video')].every(one => one.readyState >= 1)"))
        window.save_screenshot(str(tmp_path / "page.png"))
    for number, source in enumerate(sources, start=1):
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(urllib.request.urlopen(source, timeout=10).read())
        with av.open(str(path)) as video:
            said = json.loads(video.metadata["comment"])
            assert len(list(video.decode(video=0))) == {1: 1, 2: 4}[number]
        assert (said["prompt"], said["seed"]) == (PROMPT, 0) and said["model"].startswith(f"tiny/stage{number}@")
    with pytest.raises(urllib.error.HTTPError):  # no file of this machine but the videos
        urllib.request.urlopen(f"{page}/gradio_api/file={osctl.folder / 'osctl.yaml'}", timeout=10)


def test_a_port_that_is_taken_is_said(osctl: Osctl) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        said = osctl("ui", "--no-open", "--port", str(port), expect=2).stderr
    assert said.startswith(f"error: --port {port}: cannot be listened on at 127.0.0.1"), said


def test_without_a_committed_stage_there_is_no_page(tmp_path: Path) -> None:
    said = Osctl(write(tmp_path / "recipe", stages=1))("ui", "--no-open", expect=4).stderr
    assert "osctl launch" in said
