"""AnimateDiff's motion module: attention over the frames, at every position by itself.

MotionClone reads the attention maps of these layers: how much each frame attends to each other
frame of the clip, at one position.
"""
import math

import torch
from einops import rearrange
from torch import Tensor, nn

from ..config import UNetConfig
from .attention import Attention, AttentionMaps, AttentionRequest, LayerOutput
from .layers import FeedForward


def sinusoidal_positional_encoding(num_frames: int, channels: int) -> Tensor:
    """Return the table (num_frames, channels) of interleaved sines and cosines, in float32.

    The copies of this table in checkpoints are not used.
    """
    rate = torch.exp(torch.arange(0, channels, 2) * (-math.log(10000.0) / channels))
    angle = torch.arange(num_frames, dtype=torch.float32)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :channels]


class TemporalBlock(nn.Module):
    """Self-attention layers over the frames and a feed-forward layer, each with a residual."""

    def __init__(self, channels: int, config: UNetConfig):
        """Create a block of `channels` with `motion_num_attention_blocks` attention layers."""
        super().__init__()
        heads, layers = config.motion_num_attention_heads, range(config.motion_num_attention_blocks)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in layers)
        self.attention_blocks = nn.ModuleList(Attention(channels, heads) for _ in layers)
        self.ff_norm, self.ff = nn.LayerNorm(channels), FeedForward(channels)

    def forward(self, x: Tensor, request: AttentionRequest) -> LayerOutput:
        """Return the output, like x (b*h*w, f, c), and the requested attention."""
        attention = AttentionMaps()
        position = sinusoidal_positional_encoding(x.shape[1], x.shape[2]).to(x)
        for norm, layer in zip(self.norms, self.attention_blocks, strict=True):
            name = str(layer.name)
            # Queries, keys and values all get the position; the residual does not.
            y, key, attention_probs = layer(norm(x) + position, return_map=name in request.temporal)
            x = x + y
            if attention_probs is not None:
                attention.temporal[name] = attention_probs
            if name in request.temporal_keys:
                attention.temporal_keys[name] = key
        return x + self.ff(self.ff_norm(x)), attention


class TemporalTransformer(nn.Module):
    """Transformer over the frames, with a residual connection."""

    def __init__(self, channels: int, config: UNetConfig):
        """Create a transformer of `channels`."""
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([TemporalBlock(channels, config)])
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, num_frames: int, request: AttentionRequest) -> LayerOutput:
        """Return the output, like x (b*f, c, h, w), and the requested attention."""
        h, w = x.shape[-2:]
        y = rearrange(self.norm(x), "(b f) c h w -> (b h w) f c", f=num_frames)
        y, attention = self.transformer_blocks[0](self.proj_in(y), request)
        attention.grids.update(dict.fromkeys(attention.temporal | attention.temporal_keys, (h, w)))
        return x + rearrange(self.proj_out(y), "(b h w) f c -> (b f) c h w", h=h, w=w), attention


class MotionModule(nn.Module):
    """Wrapper that gives a temporal transformer its name in AnimateDiff's checkpoints."""

    def __init__(self, channels: int, config: UNetConfig):
        """Create a motion module of `channels`."""
        super().__init__()
        self.temporal_transformer = TemporalTransformer(channels, config)

    def forward(self, x: Tensor, num_frames: int, request: AttentionRequest) -> LayerOutput:
        """Return the output, like x (b*f, c, h, w), and the requested attention."""
        return self.temporal_transformer(x, num_frames, request)
