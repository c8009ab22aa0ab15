"""Context windows for clips longer than the motion modules can see at once.

Each sampling step runs the UNet on overlapping windows of frames and blends the results
(MultiDiffusion, arXiv 2302.08113, section 4, along time). The memory of a step does not grow with
the length of the clip.
"""
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .config import ModelConfig, SampleConfig


class ContextWindows(NamedTuple):
    """Windows of frames; in a closed loop they continue from the last frame to the first.

    Attributes:
        num_frames: Frames of the clip.
        length: Frames of each window.
        offsets: First frame of each window.
    """

    num_frames: int
    length: int
    offsets: tuple[int, ...]

    def frame_indices(self, offset: int) -> Tensor:
        """Return the frame indices (length,) of the window that starts at `offset`."""
        return (offset + torch.arange(self.length, device="cpu")) % self.num_frames


def make_context_windows(config: SampleConfig, model: ModelConfig, num_frames: int = 0
                         ) -> ContextWindows:
    """Return evenly spaced windows that overlap by config.context_overlap or more.

    A clip that fits into one window, and is not a closed loop, gets a single window.

    Args:
        config: Settings with num_frames, context_length, context_overlap and closed_loop.
        model: Config of the model, which knows how many frames the UNet can see at once.
        num_frames: Frames of a clip of another length than config.num_frames.

    Raises:
        InputError: If config.context_length is more than the UNet can see.
    """
    num_frames, limit = num_frames or config.num_frames, model.unet.motion_max_seq_length
    config.check("context_length", config.context_length <= limit, f"at most {limit} frames")
    length = min(num_frames, config.context_length or limit)
    stride = max(1, length - round(config.context_overlap * length))
    # Frames from the first offset to the last; in a closed loop, to the first one again.
    span = num_frames if config.closed_loop else num_frames - length
    intervals = -(-span // stride)
    offsets = range(intervals if config.closed_loop else intervals + 1)
    return ContextWindows(num_frames, length, tuple(i * span // max(1, intervals) for i in offsets))


def blend_windows(parts: Sequence[Tensor], windows: ContextWindows) -> Tensor:
    """Return the weighted mean of overlapping windows.

    The weights fall linearly from the middle of a window to its ends, where the UNet sees least of
    what comes before or after. A single window is returned unchanged, to the bit.

    Args:
        parts: One tensor (b, c, windows.length, h, w) for each window.
        windows: The windows.

    Returns:
        A tensor (b, c, windows.num_frames, h, w).
    """
    ramp = torch.arange(1.0, windows.length + 1)
    weight = torch.minimum(ramp, ramp.flip(0))
    total = torch.zeros(windows.num_frames)
    for offset in windows.offsets:
        total[windows.frame_indices(offset)] += weight
    clip = parts[0].new_zeros(*parts[0].shape[:2], windows.num_frames, *parts[0].shape[3:])
    for offset, part in zip(windows.offsets, parts, strict=True):
        indices = windows.frame_indices(offset)
        clip[:, :, indices] += (weight / total[indices]).to(part.device)[:, None, None] * part
    return clip
