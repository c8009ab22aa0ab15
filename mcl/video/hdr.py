"""HDR video, of HLG or PQ, as a screen of the usual range shows it.

Light is relative to HDR reference white, which stays white: 203 cd/m2, 58 % of PQ, 75 % of HLG
(ITU-R BT.2408).
"""
from functools import cache

import numpy as np
from av.video.reformatter import ColorTrc

TRANSFERS = (ColorTrc.ARIB_STD_B67, ColorTrc.SMPTE2084)     # HLG and PQ
WHITE, HLG_PEAK = 203, 1000             # cd/m2, of reference white and of the screen HLG is made on
LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)      # of BT.2020's red, green and blue
# From BT.2020's primaries to BT.709's (BT.2087, inverted).
TO_BT709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083],
                     [-0.0182, -0.1006, 1.1187]], np.float32)
KNEE = 0.9                              # above which light is pressed together, to end below 1
GAMMA = 2.4                             # of the usual screen (BT.1886)


def tonemap_hdr_to_sdr(rgb: np.ndarray, transfer: int, wide: bool = True) -> np.ndarray:
    """(h, w, 3) uint16 of an HDR signal -> (h, w, 3) uint8 of BT.709.

    transfer  one of TRANSFERS; wide: of BT.2020's primaries, not BT.709's

    All three channels are dimmed alike where one is bright, so that hues stay.
    """
    light = linear(transfer)[rgb]
    if transfer == ColorTrc.ARIB_STD_B67:       # its light is the scene's: BT.2100's OOTF
        light *= HLG_PEAK / WHITE * (light @ LUMINANCE)[..., None] ** 0.2
    if wide:
        light = (light @ TO_BT709.T).clip(min=0)
    top = light.max(axis=-1, keepdims=True)
    pressed = 1 - (1 - KNEE) ** 2 / (top.clip(min=KNEE) + 1 - 2 * KNEE)
    light *= np.where(top > KNEE, pressed / top.clip(min=KNEE), 1)
    return np.rint(light ** (1 / GAMMA) * 255).astype(np.uint8)


@cache
def linear(transfer: int) -> np.ndarray:
    """The light of each of the 65536 levels of a signal (BT.2100, tables 4 and 5): of the screen,
    1 for reference white, from PQ; of the scene, up to 1, from HLG."""
    signal = np.linspace(0, 1, 1 << 16)
    if transfer == ColorTrc.ARIB_STD_B67:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(signal <= 0.5, signal ** 2 / 3, (np.exp((signal - c) / a) + b) / 12)
    else:
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 107 / 128, 2413 / 128, 2392 / 128
        root = signal ** (1 / m2)
        light = 10000 / WHITE * ((root - c1).clip(min=0) / (c2 - c3 * root)) ** (1 / m1)
    return light.astype(np.float32)
