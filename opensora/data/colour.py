"""Convert HDR and wide-gamut colour codes to the codes of the same picture on an SDR screen with BT.709, which the model is trained on.

Owns the transfer curves, the tone curve and the primaries. Refuses to decode (`video`), to crop and to resize (`screen`). SDR pictures in
BT.709 or BT.601 are not converted.

HDR: codes become light in nits, by PQ (SMPTE ST 2084) or by HLG (ITU-R BT.2100, on a screen of 1,000 nits). SDR white is 203 nits, the
reference white of ITU-R BT.2408. Light up to 94 nits, mid grey included, is not changed; the tone curve of ITU-R BT.2390 (the EETF, a
Hermite spline in PQ) maps 94 … 1,000 nits to 94 … 203. It is applied to the largest of R, G and B, so that hues do not change. Then
BT.2020's primaries become BT.709's, and colours outside of BT.709 are clipped. Metadata of the mastering screen are not used: light above
1,000 nits is white.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PQ, HLG = 16, 18
"""Transfer characteristics of ITU-T H.273, as FFmpeg numbers them."""
BT2020, DISPLAY_P3 = 9, 12
"""Colour primaries of ITU-T H.273."""
UNSPECIFIED = 2
SDR_WHITE, HDR_PEAK = 203.0, 1000.0
"""White of SDR and the brightest light of HDR, in nits."""
SDR_GAMMA = 2.4
"""Gamma of a reference screen (ITU-R BT.1886)."""
HLG_GAMMA = 1.2
"""Gamma of a screen of 1,000 nits (ITU-R BT.2100)."""

_TO_BT709 = {
    BT2020: ((1.660491, -0.587641, -0.072850), (-0.124550, 1.132900, -0.008349), (-0.018151, -0.100579, 1.118730)),
    DISPLAY_P3: ((1.224940, -0.224940, 0.0), (-0.042057, 1.042057, 0.0), (-0.019638, -0.078636, 1.098274)),
}
_LUMINANCE = (0.2627, 0.6780, 0.0593)


def is_wide(transfer: int, primaries: int) -> bool:
    """Whether a picture with these characteristics has to be converted for an SDR screen with BT.709."""
    return transfer in (PQ, HLG) or primaries in _TO_BT709


def to_sdr(codes: Tensor, transfer: int, primaries: int) -> Tensor:
    """Convert R'G'B' in 0 … 1, (3, H, W), to SDR and BT.709."""
    import torch

    codes = codes.clamp(0, 1)
    if transfer in (PQ, HLG):
        nits = _pq_to_nits(codes) if transfer == PQ else _hlg_to_nits(codes)
        light = _tone_mapped(nits) / SDR_WHITE
        primaries = BT2020 if primaries == UNSPECIFIED else primaries
    else:
        light = codes**SDR_GAMMA
    if primaries in _TO_BT709:
        light = torch.einsum("ij,jhw->ihw", torch.tensor(_TO_BT709[primaries], dtype=light.dtype), light)
    return light.clamp(0, 1) ** (1 / SDR_GAMMA)


def _tone_mapped(nits: Tensor) -> Tensor:
    """Light of at most `SDR_WHITE`, by the EETF of BT.2390. Hues do not change."""
    import torch

    brightest = nits.amax(dim=0, keepdim=True).clamp(min=1e-6)
    peak, white = _nits_to_pq(torch.tensor(HDR_PEAK)), _nits_to_pq(torch.tensor(SDR_WHITE))
    most = white / peak
    knee = 1.5 * most - 0.5
    code = (_nits_to_pq(brightest) / peak).clamp(max=1)
    t = ((code - knee) / (1 - knee)).clamp(min=0)
    bent = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * most
    mapped = _pq_to_nits(torch.where(code < knee, code, bent) * peak)
    return nits * (mapped / brightest)


def _pq_to_nits(codes: Tensor) -> Tensor:
    power = codes ** (32 / 2523)
    return 10_000 * ((power - 107 / 128).clamp(min=0) / (2413 / 128 - 2392 / 128 * power)) ** (16384 / 2610)


def _nits_to_pq(nits: Tensor) -> Tensor:
    power = (nits / 10_000).clamp(min=0) ** (2610 / 16384)
    return ((107 / 128 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def _hlg_to_nits(codes: Tensor) -> Tensor:
    import torch

    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = torch.where(codes <= 0.5, codes**2 / 3, (torch.exp((codes - c) / a) + b) / 12)
    luminance = torch.einsum("i,ihw->hw", torch.tensor(_LUMINANCE, dtype=scene.dtype), scene)
    return HDR_PEAK * scene * luminance ** (HLG_GAMMA - 1)
