"""Tone mapping of HDR video (HLG, PQ) to the standard dynamic range.

Light is relative to HDR reference white, which stays white: 203 cd/m2, 58 % of the PQ signal,
75 % of the HLG signal (ITU-R BT.2408).
"""
from functools import cache

import numpy as np
from av.video.reformatter import ColorTrc

TRANSFERS = (ColorTrc.ARIB_STD_B67, ColorTrc.SMPTE2084)     # HLG and PQ
REFERENCE_WHITE, HLG_PEAK = 203, 1000       # cd/m2; HLG_PEAK is the peak of HLG's nominal display
BT2020_LUMA = np.array([0.2627, 0.6780, 0.0593], np.float32)
# Linear RGB of the BT.2020 primaries to the BT.709 primaries (inverse of BT.2087).
BT2020_TO_BT709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083],
                            [-0.0182, -0.1006, 1.1187]], np.float32)
TONEMAP_KNEE = 0.9                          # brighter light is compressed to end below 1
DISPLAY_GAMMA = 2.4                         # of a standard display (BT.1886)


def tonemap_hdr_to_sdr(rgb: np.ndarray, transfer: int, is_bt2020: bool = True) -> np.ndarray:
    """Return an HDR image in the standard dynamic range of BT.709.

    The three channels of a bright pixel are scaled by the same factor, which keeps its hue.

    Args:
        rgb: Non-linear HDR signal (h, w, 3), uint16 over the full range.
        transfer: Transfer function, one of TRANSFERS.
        is_bt2020: Whether the color primaries are those of BT.2020, not BT.709.

    Returns:
        Image (h, w, 3), uint8.
    """
    light = eotf_table(transfer)[rgb]
    if transfer == ColorTrc.ARIB_STD_B67:       # scene light to display light: BT.2100's OOTF
        light *= HLG_PEAK / REFERENCE_WHITE * (light @ BT2020_LUMA)[..., None] ** 0.2
    if is_bt2020:
        light = (light @ BT2020_TO_BT709.T).clip(min=0)
    peak = light.max(axis=-1, keepdims=True)
    above_knee = peak.clip(min=TONEMAP_KNEE)
    compressed = 1 - (1 - TONEMAP_KNEE) ** 2 / (above_knee + 1 - 2 * TONEMAP_KNEE)
    light *= np.where(peak > TONEMAP_KNEE, compressed / above_knee, 1)
    return np.rint(light ** (1 / DISPLAY_GAMMA) * 255).astype(np.uint8)


@cache
def eotf_table(transfer: int) -> np.ndarray:
    """Return the linear light of each of the 65536 signal levels (BT.2100, tables 4 and 5).

    PQ gives the display's light, 1 for reference white. HLG gives the scene's light, up to 1.
    """
    signal = np.linspace(0, 1, 1 << 16)
    if transfer == ColorTrc.ARIB_STD_B67:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(signal <= 0.5, signal ** 2 / 3, (np.exp((signal - c) / a) + b) / 12)
    else:
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 107 / 128, 2413 / 128, 2392 / 128
        root = signal ** (1 / m2)
        light = ((root - c1).clip(min=0) / (c2 - c3 * root)) ** (1 / m1) * 10000 / REFERENCE_WHITE
    return light.astype(np.float32)
