"""Clips longer than a UNet can see at once: windows along time that overlap, and their blend.

Each step of sampling looks at every window by itself (MultiDiffusion, arXiv 2302.08113, section 4,
along time), so that what it needs of memory does not grow with the clip.
"""
from typing import NamedTuple, Sequence

import torch
from einops import rearrange
from torch import Tensor

from .config import SampleConfig
from .errors import InputError


class Windows(NamedTuple):
    """Stretches of a clip; those of a loop run on from its last frame into its first."""
    frames: int             # of the clip
    length: int             # of each window, in frames
    starts: tuple[int, ...]     # the first frame of each

    def at(self, start: int) -> Tensor:
        """The frames of the window that begins there, by their numbers: (length,) int64."""
        return (start + torch.arange(self.length, device="cpu")) % self.frames


def windows_of(frames: int, config: SampleConfig, longest: int) -> Windows:
    """The windows of a clip, evenly apart, whose neighbours share config.overlap or more.

    longest  frames that the UNet can see at once

    A clip that it sees whole, and that is no loop, is one window. Raises InputError where
    config.window is longer.
    """
    if config.window > longest:
        raise InputError(f"window = {config.window} is not possible: this model's motion modules "
                         f"know up to {longest} frames")
    length = min(frames, config.window or longest)
    stride = max(1, length - round(config.overlap * length))
    if config.loop:
        n = -(-frames // stride)
        return Windows(frames, length, tuple(i * frames // n for i in range(n)))
    n = -(-(frames - length) // stride)         # windows after the first
    return Windows(frames, length, (0, *(i * (frames - length) // n for i in range(1, n + 1))))


def blend(parts: Sequence[Tensor], windows: Windows) -> Tensor:
    """A clip (b, c, f, h, w) of what was found in each window, (b, c, windows.length, h, w).

    The weighted mean where windows overlap, by weights that fall linearly from the middle of a
    window to its edges, where it knows least of what comes before or after. A single window is
    returned as it is, to the bit.
    """
    rising = torch.arange(1.0, windows.length + 1)
    weight = torch.minimum(rising, rising.flip(0))
    total = torch.zeros(windows.frames)
    for start in windows.starts:
        total[windows.at(start)] += weight
    clip = parts[0].new_zeros(*parts[0].shape[:2], windows.frames, *parts[0].shape[3:])
    for start, part in zip(windows.starts, parts, strict=True):
        here = windows.at(start)
        share = rearrange((weight / total[here]).to(part.device), "f -> f 1 1")
        clip[:, :, here] += share * part
    return clip
