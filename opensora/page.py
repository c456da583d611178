"""A page on which a person types a prompt and sees what each stage makes of it: `python -m opensora.page MODELS.json`.

Owns the page and its server on this machine. `opensora.api` draws. Refuses to know where models come from and what they cost: the file says
it. gradio is an extra, imported here alone.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from opensora import api, last_resort
from opensora.errors import ConfigError, TrainerError
from opensora.printable import printable

MOST_STEPS = 1000
"""The end of the slider of steps; the published sampler takes 100."""
MOST_GUIDANCE = 20.0


@dataclass(frozen=True)
class Shown:
    """A model of the page."""

    name: str
    """Of its stage."""
    folder: Path
    about: str
    """One line for people: step and cost."""
    facts: dict[str, Any]
    """What each file that it draws says of it besides."""

    @cached_property
    def model(self) -> api.Model:
        """It is opened with the first video that it draws. Raises ConfigError, ParentError."""
        return api.load(self.folder)


def read_models(path: Path) -> list[Shown]:
    """The models of a file: a JSON list of objects with `name`, `folder`, `about` and `facts`, the last one last. Raises ConfigError."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        shown = [Shown(row["name"], Path(row["folder"]), row["about"], row["facts"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"models {path}: cannot be read ({type(error).__name__}: {error}); `osctl ui` writes this file") from error
    if not shown:
        raise ConfigError(f"models {path}: there is none in it; name at least one")
    return shown


def draw(
    shown: Shown, prompt: str, seed: int, steps: int, guidance: float, negative: str, on_step: Callable[[int, int], None], folder: Path
) -> Path:
    """Draw a prompt with one model into an .mp4 of `folder`. Returns the file.

    Args:
        negative: what the video should not show. Empty means nothing is said.
        on_step: as for `api.generate_many`.

    Raises:
        ConfigError, ParentError: as `api.generate`.
        OSError: the file cannot be written.
    """
    unwanted = negative or None
    (clip,) = api.generate_many([prompt], shown.model, seeds=[seed], steps=steps, guidance=guidance, on_step=on_step, negative=unwanted)
    return clip.save(Path(tempfile.mkdtemp(dir=folder)) / f"{shown.name}-seed-{seed}.mp4", shown.facts)


def build(models: Sequence[Shown], title: str, folder: Path) -> Any:
    """The page, as gradio's Blocks. The last model gives the first values of steps and guidance; videos are written below `folder`."""
    import gradio as gr

    sampling = models[-1].model.stage.sampling
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(f"# {title}\nOne prompt and one seed, drawn by each stage.")
        prompt = gr.Textbox(label="Prompt", placeholder="a digit 3 moving left", elem_id="prompt", autofocus=True)
        with gr.Row():
            seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, elem_id="seed")
            steps = gr.Slider(1, MOST_STEPS, value=sampling.steps, step=1, label="Sampling steps")
            guidance = gr.Slider(0, MOST_GUIDANCE, value=sampling.guidance, step=0.1, label="Guidance scale (1: off)")
        negative = gr.Textbox(label="Negative prompt", placeholder="what no video should show")
        names = [shown.name for shown in models]
        chosen = gr.CheckboxGroup(names, value=names, label="Stages")
        button = gr.Button("Draw", variant="primary", elem_id="draw")
        with gr.Row():
            videos = [_video(gr, shown) for shown in models]

        def on_draw(
            wanted: list[str],
            text: str,
            number: float,
            count: float,
            scale: float,
            unwanted: str,
            progress: gr.Progress = gr.Progress(),  # noqa: B008 - how gradio hands it over
        ) -> Iterator[list[Any]]:
            if not wanted:
                raise gr.Error("No stage is chosen; tick at least one", print_exception=False)
            for place, shown in enumerate(models):
                if shown.name not in wanted:
                    continue

                def on_step(done: int, total: int, name: str = shown.name) -> None:
                    progress((done, total), desc=name)

                try:
                    path = draw(shown, text, int(number), int(count), scale, unwanted, on_step, folder)
                except (TrainerError, OSError) as error:
                    raise gr.Error(f"{shown.name}: {printable(str(error))}", print_exception=False) from error
                yield [gr.update(value=str(path)) if place == other else gr.skip() for other in range(len(models))]

        inputs = [chosen, prompt, seed, steps, guidance, negative]
        for event in (button.click, prompt.submit):
            # One at a time: two drawings at once would share the device, and both would take as long.
            event(on_draw, inputs, videos, concurrency_limit=1, concurrency_id="draw", api_visibility="private")
    return page


def _video(gr: Any, shown: Shown) -> Any:
    with gr.Column(min_width=240):
        gr.Markdown(f"### {shown.name}\n{shown.about}")
        return gr.Video(label=shown.name, height=320, autoplay=True, loop=True, interactive=False, elem_id=f"video-{shown.name}")


def serve(models: Sequence[Shown], title: str, host: str, port: int, on_start: Callable[[str], None]) -> None:
    """Serve the page until SIGINT or SIGTERM. `on_start` gets its address.

    Raises:
        ConfigError: gradio is not installed, or the port is taken.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("the page: the package gradio is not installed. Run: pip install 'osctl[ui]'")
    with tempfile.TemporaryDirectory(prefix="osctl-page-") as folder:
        # gradio reads them when it is imported: files of requests lie where they are removed, and nobody is told that a page was opened.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        page = build(models, title, Path(folder))
        try:
            _, address, _ = page.launch(
                server_name=host,
                server_port=port,
                share=False,
                ssr_mode=False,
                quiet=True,
                prevent_thread_lock=True,
                footer_links=[],
                enable_monitoring=False,
            )
        except OSError as error:
            raise ConfigError(f"--port {port}: cannot be listened on at {host} ({error}); name another one") from error
        on_start(address)
        try:
            page.block_thread()
        finally:
            page.close()


def main(argv: Sequence[str] | None = None) -> int:
    """0 ended by a signal · 1 it failed · 2 the command is wrong."""
    parser = argparse.ArgumentParser(prog="python -m opensora.page", description="A page that draws prompts with several models.")
    parser.add_argument("models", type=Path, metavar="MODELS.json", help="list of models: name, folder, about, facts")
    parser.add_argument("--title", default="osctl")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on [127.0.0.1: this machine alone]")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on [7860]")
    args = parser.parse_args(argv)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the server is closed, and its files are removed
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: so it ends with an `osctl ui` that was killed

    def on_start(address: str) -> None:
        sys.stdout.write(f"{address}\n")
        sys.stdout.flush()

    try:
        serve(read_models(args.models), args.title, args.host, args.port, on_start)
    except TrainerError as error:
        sys.stderr.write(f"error: {printable(str(error))}\n")
        return 2 if error.kind == "config" else 1
    return 0


if __name__ == "__main__":
    sys.exit(last_resort.run("page", main))
