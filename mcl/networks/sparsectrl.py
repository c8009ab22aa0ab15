"""SparseCtrl (arXiv 2311.16933): what some frames are to show, as pictures or as sketches.

A copy of the UNet's way down that sees no noise, only the condition, and whose features are added
to the UNet's skips. Names are those of AnimateDiff's v3_sd15_sparsectrl files.
"""
import dataclasses

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from ..config import SparseCtrlConfig, UNetConfig
from ..errors import InputError
from .unet import Conditioning, DownBlock, MidBlock, Residuals, TimestepEmbedding


class SketchEmbedding(nn.Module):
    """A sketch and its mask, (b*f, 4, H, W), through eight convolutions to (b*f, c, h, w)."""

    def __init__(self, widths: tuple[int, ...], channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(4, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for narrow, wide in zip(widths, widths[1:]):
            self.blocks.append(nn.Conv2d(narrow, narrow, 3, padding=1))
            self.blocks.append(nn.Conv2d(narrow, wide, 3, padding=1, stride=2))
        self.conv_out = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv_in(x))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class SparseCtrl(nn.Module):
    """`config` is the UNet's, to whose features the residuals are added."""

    def __init__(self, config: UNetConfig, control: SparseCtrlConfig):
        super().__init__()
        config = dataclasses.replace(
            config, motion_modules=True, motion_mid_block=False, motion_attentions=1,
            norm_per_frame=True, motion_heads=control.motion_heads, max_frames=control.max_frames)
        self.config, self.kind = config, control.kind
        widths, levels = config.block_out_channels, range(len(config.block_out_channels))
        # Only the bias of conv_in acts: the noise that it was made for is left out.
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.controlnet_cond_embedding = (
            nn.Conv2d(config.in_channels + 1, widths[0], 3, padding=1) if control.kind == "rgb"
            else SketchEmbedding(control.sketch_channels, widths[0]))
        self.time_embedding = TimestepEmbedding(widths[0], config.time_channels)
        self.down_blocks = nn.ModuleList([DownBlock(config, level) for level in levels])
        self.mid_block = MidBlock(config)
        skips = [widths[0]] + [w for level, w in enumerate(widths)
                               for _ in range(config.layers_per_block + (level < levels[-1]))]
        self.controlnet_down_blocks = nn.ModuleList([nn.Conv2d(c, c, 1) for c in skips])
        self.controlnet_mid_block = nn.Conv2d(widths[-1], widths[-1], 1)

    def forward(self, condition: Tensor, t: Tensor | int, text: Tensor) -> Residuals:
        """What to add to the UNet's skips and middle.

        condition  (b, c, f, h, w) of the latents' size, or (b, 4, f, H, W) of the picture's for
                   sketches; the last channel is 1 in the frames that are given
        t, text    as the UNet takes them

        Raises InputError for more frames than the positional encoding was trained on.
        """
        b, frames = condition.shape[0], condition.shape[2]
        if frames > self.config.max_frames:
            raise InputError(f"{frames} frames: this model's SparseCtrl knows up to "
                             f"{self.config.max_frames}")
        t = torch.as_tensor(t, device=condition.device).expand(b)
        time = repeat(self.time_embedding(t), "b c -> (b f) c", f=frames)
        x = self.controlnet_cond_embedding(rearrange(condition, "b c f h w -> (b f) c h w"))
        x = x + rearrange(self.conv_in.bias, "c -> c 1 1")
        given, skips = Conditioning(time, text, frames), [x]
        for block in (*self.down_blocks, self.mid_block):
            x, skips, _ = block(x, skips, given)
        return Residuals([zero(s) for zero, s in zip(self.controlnet_down_blocks, skips)],
                         self.controlnet_mid_block(x))


def sparse_condition(given: Tensor, indices: list[int], frames: int) -> Tensor:
    """The condition of a clip in which only some frames are given.

    given    (n, c, h, w): latents of pictures, or sketches in [0, 1]
    indices  the frame that each belongs to; negative ones count from the end

    Returns (1, c + 1, frames, h, w): zeros but in those frames, whose mask, the last channel, is
    1. Raises InputError for a frame that the clip does not have.
    """
    for i in indices:
        if not -frames <= i < frames:
            raise InputError(f"frame {i} is not possible: the clip has {frames}, 0 to {frames - 1}")
    n, c, h, w = given.shape
    condition = given.new_zeros(1, c + 1, frames, h, w)
    for picture, i in zip(given, indices, strict=True):
        condition[0, :c, i], condition[0, c, i] = picture, 1
    return condition
