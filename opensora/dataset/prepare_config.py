"""What a data set is made of and how: the schema of `prepare.yaml`, frozen and validated, and the digest of each step.

Owns names, defaults, units and bounds. Refuses to know where it runs, in which store the result lies and who launches it, and imports
no torch, so that the control plane can plan a preparation without it.

A step's result is kept under the digest of what it depends on: its own part of this schema, its VERSION, and the results it was made from.
What is execution (workers, servers' addresses, limits of money and time) is in no digest.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from opensora.config import Fraction, Frozen, Unit
from opensora.dataset.languages import CODES

MOST_WORKERS = 1024


def _language(code: str) -> str:
    if code not in CODES:
        near = difflib.get_close_matches(code.lower()[:2], sorted(CODES), n=1, cutoff=0.9)
        hint = f"{near[0]}?" if near else "as en, de, zh"
        raise ValueError(f"{code[:40]!r} is no code of a language that captions are told in; give one of ISO 639-1, {hint}")
    return code


def _digest(text: str) -> str:
    if re.fullmatch(r"[0-9a-f]{64}", text) is None:
        raise ValueError(f"{text[:80]!r} is no sha256 of a file; give its 64 digits 0-9a-f, as sha256sum prints them")
    return text


Layout = Literal["auto", "hd-vg-130m", "panda-70m", "openvid", "webvid"]


class Given(Frozen):
    """Where raw videos come from."""

    path: str
    """A file, a folder with all below it, an address (https://, s3://, file://), or with `index` a table that lists addresses."""
    index: Layout | None = None
    """Format of a published list of videos; `auto`: told by its columns. None: `path` is a video or a folder of them."""
    licence: str = ""
    """Under which licence these videos are used; stands in every row. A list's own column comes first."""
    name: str = ""
    """How rows call this source set; empty: the path's last part."""


class Download(Frozen):
    """How addresses are fetched. Execution: nothing here changes a result."""

    per_host: Annotated[PositiveInt, Unit("connections")] = 4
    """Connections to one host at a time."""
    tries: Annotated[PositiveInt, Unit("tries")] = 5
    """Of one file, with a growing pause between them."""
    timeout_s: Annotated[PositiveFloat, Unit("seconds")] = 60
    """Without a byte for so long a try has failed."""
    robots: bool = True
    """Obey the hosts' robots.txt."""


class Limits(Frozen):
    """What is refused at the probe, before a decoder can hang or eat memory."""

    max_bytes: Annotated[PositiveInt, Unit("bytes")] = 64 << 30
    """Of a file."""
    max_hours: Annotated[PositiveFloat, Unit("hours")] = 12
    """Duration of a video."""
    max_side: Annotated[PositiveInt, Unit("pixels")] = 8192
    """Width or height."""
    max_frames: Annotated[PositiveInt, Unit("frames")] = 2_000_000
    """Frames of a video."""
    max_fps: Annotated[PositiveFloat, Unit("frames a second")] = 500
    """Mean rate: above it the file's times are wrong."""
    max_bits: Annotated[PositiveInt, Unit("bits a sample")] = 12
    """Bit depth."""
    min_side: Annotated[PositiveInt, Unit("pixels")] = 16
    """Width or height."""
    hdr: Literal["tonemap", "drop"] = "tonemap"
    """What becomes of HDR (PQ, HLG): tone-mapped to SDR, or dropped with a reason."""
    memory_gb: Annotated[PositiveFloat, Unit("GB")] = 4
    """Memory of one guard process; a row that needs more is put aside."""
    deadline_s: Annotated[PositiveFloat, Unit("seconds")] = 30
    """A row may take so long, and `deadline_per_s` more for each second of video."""
    deadline_per_s: Annotated[NonNegativeFloat, Unit("seconds a second of video")] = 4
    """See `deadline_s`."""

    @model_validator(mode="after")
    def _sides(self) -> Limits:
        if self.min_side > self.max_side:
            raise ValueError(f"min_side {self.min_side} is more than max_side {self.max_side}")
        return self


class Cut(Frozen):
    """How a video is cut into clips of one shot each."""

    detector: Literal["content", "adaptive", "transnetv2", "none"] = "content"
    """content, adaptive: as PySceneDetect's detectors of these names; transnetv2: the network (extra `shots`); none: one shot."""
    threshold: Annotated[PositiveFloat | None, Unit("score")] = None
    """Of the detector; none: 27 for content, 3 for adaptive, 0.5 for transnetv2."""
    min_scene_frames: Annotated[PositiveInt, Unit("frames")] = 15
    """Shortest scene that a detector makes (PySceneDetect's min_scene_len)."""
    min_s: Annotated[NonNegativeFloat, Unit("seconds")] = 0.5
    """Shorter clips are dropped."""
    max_s: Annotated[PositiveFloat, Unit("seconds")] = 10
    """Longer shots are split evenly."""
    trim_frames: Annotated[NonNegativeInt, Unit("frames")] = 0
    """Frames taken off at each side of a cut, where a fade may lie."""

    @model_validator(mode="after")
    def _bounds(self) -> Cut:
        if self.min_s > self.max_s:
            raise ValueError(f"min_s {self.min_s:g} is more than max_s {self.max_s:g}")
        return self


class Rule(Frozen):
    """One bound on one measured column. A clip outside is dropped, with the rule as its reason."""

    column: str
    """A measure (docs/datasets.md lists them): motion, brightness, sharpness, static, black, text_area, aesthetic, words …"""
    min: Annotated[float | None, Unit("as the column")] = None
    """Smallest value that is kept."""
    max: Annotated[float | None, Unit("as the column")] = None
    """Largest value that is kept."""
    any_of: tuple[str, ...] = ()
    """For a column of text (language, licence, source): the values that are kept."""

    @model_validator(mode="after")
    def _bounds(self) -> Rule:
        if self.min is None and self.max is None and not self.any_of:
            raise ValueError(f"rule on {self.column} has no bound; give min, max or any_of")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"rule on {self.column}: min {self.min:g} is more than max {self.max:g}")
        return self


DEFAULT_RULES = (Rule(column="black", max=0.5), Rule(column="static", max=0.9), Rule(column="sharpness", min=1.0))


class Filter(Frozen):
    """Which clips are kept."""

    rules: tuple[Rule, ...] = DEFAULT_RULES
    """All must hold."""
    duplicates: Annotated[NonNegativeInt | None, Unit("bits of 64")] = 4
    """Clips whose perceptual hashes differ in so few bits are one clip; the first in order stays. None: all stay."""
    text_area: bool = False
    """Measure the share of the picture that is text (OCR, extra `ocr`): some 1.5 s of CPU a frame."""
    scores: str | None = None
    """Folder of a CLIP model and an aesthetic head, for the columns `clip` and `aesthetic`."""


class CaptionBeside(Frozen):
    """Captions that are there already: of a table, a list, or text files beside the videos, in all layouts that `--data` reads."""

    kind: Literal["beside"]


class CaptionRule(Frozen):
    """The demo's rule: reads the moving digits that `opensora.data.digits` draws."""

    kind: Literal["digits"]


class CaptionText(Frozen):
    """One caption for all, or none: for trying out."""

    kind: Literal["text"]
    text: str = "a video"
    """The caption."""


PROMPT = "Describe this video in detail: the subjects, what they do, the setting, the light and how the camera moves. Answer in English."


class CaptionServer(Frozen):
    """Any server that speaks OpenAI's chat completions: vLLM, SGLang, LMDeploy, llama.cpp."""

    kind: Literal["server"]
    url: str
    """Base address, as `http://host:8000/v1`. Execution. A key comes from the variable OSCTL_CAPTION_KEY."""
    model: str
    """Name of the model at the server."""
    profile: Literal["images", "video_url", "input_video"] = "images"
    """How a clip is sent: frames as images (all servers), or a video (vLLM, SGLang, LMDeploy: video_url; llama.cpp: input_video)."""
    prompt: str = PROMPT
    """What is asked."""
    frames: Annotated[PositiveInt, Unit("frames")] = 3
    """Frames sent of a clip, evenly over it."""
    side: Annotated[PositiveInt, Unit("pixels")] = 448
    """Longer side of the frames sent."""
    max_tokens: Annotated[PositiveInt, Unit("tokens")] = 256
    """Of an answer."""
    temperature: Annotated[NonNegativeFloat, Unit("temperature")] = 0.2
    """Of sampling. An answer that repeats itself is asked for again with another seed and a higher one."""
    seed: Annotated[NonNegativeInt, Unit("seed")] = 0
    """Of sampling."""
    concurrency: Annotated[PositiveInt, Unit("requests")] = 8
    """Requests at a time; lowered where the server says 429. Execution."""
    timeout_s: Annotated[PositiveFloat, Unit("seconds")] = 120
    """Of one request. Execution."""
    tries: Annotated[PositiveInt, Unit("tries")] = 5
    """Of one clip. Execution."""
    budget_tokens: Annotated[PositiveInt | None, Unit("tokens")] = None
    """Tokens in and out that may be used in all; the run stops before it would pass them. Execution."""
    budget_usd: Annotated[PositiveFloat | None, Unit("US dollars")] = None
    """The same in dollars, at the two prices below. Execution."""
    usd_per_million_in: Annotated[NonNegativeFloat, Unit("US dollars a million tokens")] = 0.0
    """Price of what is sent. Execution."""
    usd_per_million_out: Annotated[NonNegativeFloat, Unit("US dollars a million tokens")] = 0.0
    """Price of what is answered. Execution."""

    @model_validator(mode="after")
    def _priced(self) -> CaptionServer:
        if self.budget_usd is not None and self.usd_per_million_in + self.usd_per_million_out == 0:
            raise ValueError(f"budget_usd {self.budget_usd:g} needs usd_per_million_in and usd_per_million_out")
        return self


class CaptionLlava(Frozen):
    """LLaVA in this process, through transformers."""

    kind: Literal["llava"]
    path: str
    """Folder of a LlavaForConditionalGeneration or LlavaNextForConditionalGeneration with its processor."""
    prompt: str = PROMPT
    """What is asked."""
    frames: Annotated[PositiveInt, Unit("frames")] = 3
    """Frames shown of a clip, at 20%, 50% and 80% where there are three (as Open-Sora 1.0 did)."""
    batch: Annotated[PositiveInt, Unit("clips")] = 8
    """Clips at a time. Execution."""
    max_tokens: Annotated[PositiveInt, Unit("tokens")] = 256
    """Of an answer."""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Type that it computes in on a GPU; fp32 on a CPU."""
    seed: Annotated[NonNegativeInt, Unit("seed")] = 0
    """Of sampling."""


Caption = Annotated[CaptionBeside | CaptionRule | CaptionText | CaptionServer | CaptionLlava, Field(discriminator="kind")]


class Clips(Frozen):
    """The clips' own files."""

    crf: Annotated[NonNegativeInt, Field(le=51), Unit("x264 rate factor")] = 12
    """Quality of the H.264 file: smaller is better and larger."""
    short_side: Annotated[PositiveInt | None, Unit("pixels")] = None
    """Scale down to so many pixels on the shorter side; none: as they are."""


EngineName = Literal["inline", "ray"]


class OnRay(Frozen):
    """How `engine: ray` runs. Execution: nothing here changes a result."""

    address: str = ""
    """Of a Ray cluster that runs, `auto` within one; empty: what RAY_ADDRESS says, or one is started on this machine for the run."""
    num_cpus: Annotated[PositiveFloat, Unit("cores")] = 1
    """Of each actor; it works on one row at a time. There are `workers` of them."""
    num_gpus: Annotated[NonNegativeFloat, Unit("GPUs")] = 0
    """Of each actor that holds models (LLaVA, `scores`); 0: it has `num_cpus` cores."""
    gpu_actors: Annotated[PositiveInt, Field(le=MOST_WORKERS), Unit("processes")] = 1
    """Actors that hold models, each of them all."""
    shared_files: bool | None = None
    """Whether all nodes see the sources and this run directory under the same names; none: only where Ray is started here. Where they do
    not, nodes fetch sources by their addresses, and clips' files travel through Ray."""
    scratch: str = ""
    """Folder of each node for sources that it fetched; empty: one in the system's folder for what is temporary."""
    scratch_gb: Annotated[PositiveFloat, Unit("GB")] = 20
    """Of sources kept there for further clips; those that are worked on come on top, one an actor."""
    object_store_gb: Annotated[PositiveFloat, Field(ge=0.1), Unit("GB")] = 0.25
    """Memory for rows on their way, of a Ray that is started here; what does not fit lies on disk for a while, and the log says so."""


class PrepareConfig(Frozen):
    """`prepare.yaml`."""

    name: str
    """Name of the data set."""
    sources: tuple[Given, ...] = Field(min_length=1)
    """Raw videos."""
    download: Download = Download()
    """How addresses are fetched."""
    limits: Limits = Limits()
    """What is refused at once, and what one row may take."""
    cut: Cut = Cut()
    """How videos become clips."""
    filter: Filter = Filter()
    """Which clips are kept."""
    caption: Caption = Field(default=CaptionBeside(kind="beside"))
    """Where captions come from."""
    caption_words: Annotated[tuple[NonNegativeInt, PositiveInt], Unit("words")] = (1, 512)
    """Fewest and most words of a caption; a clip with another one is dropped."""
    languages: tuple[Annotated[str, AfterValidator(_language)], ...] = ()
    """ISO 639-1 codes of captions that are kept; empty: all."""
    clips: Clips = Clips()
    """The clips' own files."""
    exclude: tuple[Annotated[str, AfterValidator(_digest)], ...] = ()
    """sha256 of source files that are dropped as soon as they are known, with the reason `taken out on request` (osctl data remove)."""
    encode: str | None = None
    """Recipe (name or path) whose stages the clips are encoded for; none: each training encodes for itself."""
    max_quarantined: Annotated[Fraction, Unit("fraction")] = 0.01
    """Above this share of rows that could not be worked on, the run stops with a summary. Execution."""
    workers: Annotated[PositiveInt | None, Field(le=MOST_WORKERS), Unit("processes")] = None
    """Guard processes; none: one a core. Execution."""
    engine: EngineName = "inline"
    """What calls the steps: guards of this machine, or Ray Data (extra `ray`). Execution."""
    ray: OnRay = OnRay()
    """How `engine: ray` runs."""

    @model_validator(mode="after")
    def _words(self) -> PrepareConfig:
        fewest, most = self.caption_words
        if fewest > most:
            raise ValueError(f"caption_words: {fewest} words at least are more than {most} at most")
        return self


EXECUTION: Mapping[str, frozenset[str]] = {
    "server": frozenset({
        "url", "concurrency", "timeout_s", "tries", "budget_tokens", "budget_usd", "usd_per_million_in", "usd_per_million_out",
    }),
    "llava": frozenset({"batch"}),
}  # fmt: skip
"""Fields of each kind of captions that change no result."""


def step_digest(version: int, part: Frozen | tuple[Any, ...] | None, *made_of: str) -> str:
    """16 hex digits over a step's version, what differs from the defaults in its part of the schema, and the digests it depends on.

    Only fields that differ from their default count, so that a new field with a default changes no old digest.
    """
    content: Any = part
    if isinstance(part, Frozen):
        content = part.model_dump(mode="json", exclude_defaults=True)
        kind = getattr(part, "kind", None)
        if kind is not None:
            content = {name: value for name, value in content.items() if name not in EXECUTION.get(kind, frozenset())} | {"kind": kind}
    return hashlib.sha256(json.dumps([version, content, *made_of], sort_keys=True).encode()).hexdigest()[:16]
