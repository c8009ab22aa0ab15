"""SparseCtrl (arXiv 2311.16933): images or sketches that some frames of the clip show.

SparseCtrl is a copy of the UNet's encoder that sees no noise, only the condition. Its features are
added to the UNet's skip connections. Names are those of AnimateDiff's v3_sd15_sparsectrl files.
"""
import dataclasses
from itertools import pairwise

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import SparseCtrlConfig, UNetConfig
from ..errors import InputError
from .unet import BlockInputs, ControlNetResiduals, DownBlock, MidBlock, TimestepEmbedding


class ConditioningEmbedding(nn.Module):
    """Convolutions that reduce a sketch and its mask to the size of the latents."""

    def __init__(self, widths: tuple[int, ...], channels: int):
        """Create convolutions of these widths with `channels` outputs."""
        super().__init__()
        self.conv_in = nn.Conv2d(4, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Conv2d(narrow, c_out, 3, padding=1, stride=stride)
            for narrow, wide in pairwise(widths) for c_out, stride in ((narrow, 1), (wide, 2)))
        self.conv_out = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return features (b*f, c, h, w) of sketches with masks (b*f, 4, H, W)."""
        for conv in (self.conv_in, *self.blocks):
            x = F.silu(conv(x))
        return self.conv_out(x)


class SparseCtrl(nn.Module):
    """Encoder whose features are added to a UNet's."""

    def __init__(self, config: UNetConfig, control: SparseCtrlConfig):
        """Create the encoder for a UNet of the given config."""
        super().__init__()
        config = dataclasses.replace(
            config, motion_modules=True, motion_mid_block=False, motion_num_attention_blocks=1,
            inflated_groupnorm=True, motion_max_seq_length=control.motion_max_seq_length,
            motion_num_attention_heads=control.motion_num_attention_heads)
        self.config, self.kind = config, control.kind
        widths, levels = config.block_out_channels, range(len(config.block_out_channels))
        # Only the bias of conv_in is used, because SparseCtrl does not see the noise.
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.controlnet_cond_embedding = (
            nn.Conv2d(config.in_channels + 1, widths[0], 3, padding=1) if control.kind == "rgb"
            else ConditioningEmbedding(control.conditioning_embedding_channels, widths[0]))
        self.time_embedding = TimestepEmbedding(widths[0])
        self.down_blocks = nn.ModuleList([DownBlock(config, level) for level in levels])
        self.mid_block = MidBlock(config)
        skips = [widths[0]] + [w for level, w in enumerate(widths)
                               for _ in range(config.layers_per_block + (level < levels[-1]))]
        self.controlnet_down_blocks = nn.ModuleList([nn.Conv2d(c, c, 1) for c in skips])
        self.controlnet_mid_block = nn.Conv2d(widths[-1], widths[-1], 1)

    def forward(self, condition: Tensor, t: Tensor | int, text: Tensor) -> ControlNetResiduals:
        """Return the residuals for a condition.

        Args:
            condition: (b, c + 1, f, h, w) of the latents' size, or (b, 4, f, H, W) of the
                picture's for sketches. The last channel is 1 in the frames that have an image.
            t: Timestep, as for the UNet.
            text: Text embeddings, as for the UNet.

        Raises:
            InputError: If the clip has more frames than SparseCtrl was trained on.
        """
        num_frames = condition.shape[2]
        if num_frames > self.config.motion_max_seq_length:
            raise InputError(f"num_frames = {num_frames} is out of range: this model's SparseCtrl "
                             f"sees at most {self.config.motion_max_seq_length} frames")
        x = self.controlnet_cond_embedding(rearrange(condition, "b c f h w -> (b f) c h w"))
        x = x + rearrange(self.conv_in.bias, "c -> c 1 1")
        inputs, skips = BlockInputs(self.time_embedding(t, condition), text, num_frames), [x]
        for block in (*self.down_blocks, self.mid_block):
            x, skips, _ = block(x, skips, inputs)
        down = [conv(s) for conv, s in zip(self.controlnet_down_blocks, skips, strict=True)]
        return ControlNetResiduals(down, self.controlnet_mid_block(x))


def sparsectrl_condition(images: Tensor, frame_indices: list[int], num_frames: int) -> Tensor:
    """Return SparseCtrl's condition for a clip in which some frames have an image.

    Args:
        images: (n, c, h, w): latents of images, or sketches in [0, 1].
        frame_indices: Frame of each image; negative indices count from the end.
        num_frames: Frames of the clip.

    Returns:
        (1, c + 1, num_frames, h, w): the images in their frames, zeros elsewhere, and a mask as
        the last channel.

    Raises:
        InputError: If a frame index is out of range.
    """
    (_, c, h, w), last_frame = images.shape, num_frames - 1
    condition = images.new_zeros(1, c + 1, num_frames, h, w)
    for image, i in zip(images, frame_indices, strict=True):
        if not -num_frames <= i <= last_frame:
            raise InputError(f"frame {i} is out of range: the clip has frames 0 to {last_frame}")
        condition[0, :c, i], condition[0, c, i] = image, 1
    return condition
