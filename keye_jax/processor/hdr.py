"""From HDR video to SDR: transfer functions PQ and HLG, and the primaries of BT.2020."""

from __future__ import annotations

import functools

import numpy as np

# Code points of ITU-T H.273, as decoders report them.
PQ, HLG = 16, 18
_BT2020 = 9

REFERENCE_WHITE = 203.0
"""cd/m2 of diffuse white in HDR (ITU-R BT.2408), which is white in SDR."""

# cd/m2. Brighter light becomes white. It is also the display's that HLG is converted for.
_PEAK = 1000.0
# Part of white up to which light stays as it is.
_KNEE = 0.75
# Power of the system gamma of HLG on a display of `_PEAK` (ITU-R BT.2100).
_HLG_GAMMA = 1.2

# To linear RGB of BT.709 from that of BT.2020 (ITU-R BT.2087).
_FROM_BT2020 = np.array(
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]], np.float32
)
_LUMA_BT2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)


def is_hdr(transfer: int) -> bool:
    """Whether a transfer function, a code point of H.273, is one of HDR."""
    return transfer in (PQ, HLG)


def to_sdr(pixels: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """SDR pixels, uint8 [H, W, 3] of BT.709, of HDR pixels.

    Dark and middle tones stay as the same scene has them in SDR. Highlights are bent into what is left of the range.
    The largest of the three components decides how much a pixel is darkened, so hues stay.

    Args:
      pixels: uint16 [H, W, 3], RGB in the transfer function `transfer`, as FFmpeg's `rgb48`.
      transfer: `PQ` or `HLG`.
      primaries: code point of H.273.
    """
    linear = _pq_table()[pixels] if transfer == PQ else _from_hlg(pixels)
    if primaries == _BT2020:
        linear = linear @ _FROM_BT2020.T
    linear = np.maximum(linear, 0.0)
    brightest = linear.max(axis=2, keepdims=True)
    scaled = linear * (_curve(brightest) / np.maximum(brightest, 1e-6))
    return _sdr_table()[(np.clip(scaled, 0.0, 1.0) * 65535 + 0.5).astype(np.uint16)]


@functools.cache
def _pq_table() -> np.ndarray:
    """cd/m2 of all 16-bit values of PQ (SMPTE ST 2084), float32 [65536]."""
    power = _signal() ** (1 / 78.84375)
    light = (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)
    return (10000 * light).astype(np.float32)


def _from_hlg(pixels: np.ndarray) -> np.ndarray:
    """cd/m2, float32 [H, W, 3], of a display of `_PEAK` (ARIB STD-B67, ITU-R BT.2100)."""
    scene = _hlg_table()[pixels]
    luma = np.maximum(scene @ _LUMA_BT2020, 1e-6)[..., None]
    return _PEAK * luma ** (_HLG_GAMMA - 1) * scene


@functools.cache
def _hlg_table() -> np.ndarray:
    """Scene light from 0 to 1 of all 16-bit values of HLG, float32 [65536]."""
    signal = _signal()
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12).astype(np.float32)


def _curve(light: np.ndarray) -> np.ndarray:
    """Light of SDR, 1 its white, of light in cd/m2: equal up to `_KNEE`, then a hyperbola up to 1 at `_PEAK`.

    The hyperbola a + b / (x + c) continues the line with the same slope.
    """
    x, peak = light / np.float32(REFERENCE_WHITE), _PEAK / REFERENCE_WHITE
    rise, run = 1 - _KNEE, peak - _KNEE
    c = run * rise / (run - rise) - _KNEE
    b = -((_KNEE + c) ** 2)
    a = _KNEE - b / (_KNEE + c)
    return np.where(x <= _KNEE, x, a + b / (np.maximum(np.minimum(x, peak), _KNEE) + c)).astype(np.float32)


@functools.cache
def _sdr_table() -> np.ndarray:
    """SDR values of 65,536 steps of light from 0 to 1, uint8, for a display of gamma 2.4 (ITU-R BT.1886)."""
    return ((np.arange(65536) / 65535) ** (1 / 2.4) * 255).round().astype(np.uint8)


@functools.cache
def _signal() -> np.ndarray:
    """Signal from 0 to 1 of all 16-bit values, float64 [65536]. FFmpeg's scaler makes 65,280 of the largest signal."""
    return np.minimum(np.arange(65536) / 65280, 1.0)
