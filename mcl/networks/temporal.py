"""AnimateDiff's motion module: attention along time, at every position by itself.

Its attention maps are what MotionClone reads: how much each frame, at one place, looks at each
other frame of the clip.
"""
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from .layers import Attention, FeedForward, Linear


class Wanted(NamedTuple):
    """The attention that is asked for, each kind by the names of blocks or of single layers."""
    temporal_maps: tuple[str, ...] = ()
    temporal_keys: tuple[str, ...] = ()
    text_maps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Attended:
    """The attention that was asked for, each kind by the layers' full names.

    temporal_maps  (b*h*w, heads, f, f) float32: how much each frame looks at each other one
    temporal_keys  (b*h*w, f, c), before they are divided among the heads
    text_maps      (b*f, heads, h*w, m) float32: how much each place looks at each token
    start          the frame of the clip that their first frame is, in a window of a long one
    """
    temporal_maps: dict[str, Tensor] = field(default_factory=dict)
    temporal_keys: dict[str, Tensor] = field(default_factory=dict)
    text_maps: dict[str, Tensor] = field(default_factory=dict)
    start: int = 0

    def only(self, wanted: Wanted) -> "Attended":
        """What was wanted of it, by the layers' full names."""
        maps, keys, text_maps = ({name: tensors[name] for name in names} for tensors, names in zip(
            (self.temporal_maps, self.temporal_keys, self.text_maps), wanted))
        return Attended(maps, keys, text_maps, self.start)

    def __or__(self, other: "Attended") -> "Attended":
        return Attended(self.temporal_maps | other.temporal_maps,
                        self.temporal_keys | other.temporal_keys, self.text_maps | other.text_maps)


def position_encoding(frames: int, channels: int) -> Tensor:
    """The plain table of sines and cosines, interleaved: (frames, channels), float32.

    Computed to the needed length; the copies of it that checkpoints carry are dropped.
    """
    position = torch.arange(frames, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, channels, 2) * (-math.log(10000.0) / channels))
    table = torch.stack([(position * rate).sin(), (position * rate).cos()], dim=-1)
    return rearrange(table, "f half two -> f (half two)")[:, :channels]


class TemporalBlock(nn.Module):
    """Self-attentions along time (two of them) and a feed-forward, each added to its input.

    x (b*h*w, f, c) -> like x, and what was wanted of its layers.
    """

    def __init__(self, channels: int, heads: int, attentions: int):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(channels) for _ in range(attentions)])
        self.attention_blocks = nn.ModuleList([Attention(channels, heads)
                                               for _ in range(attentions)])
        self.ff_norm = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, wanted: Wanted) -> tuple[Tensor, Attended]:
        maps: dict[str, Tensor] = {}
        keys: dict[str, Tensor] = {}
        position = position_encoding(x.shape[1], x.shape[2]).to(x)
        for norm, attend in zip(self.norms, self.attention_blocks):
            name = str(attend.name)
            # Queries, keys and values all see the position; the residual does not.
            y, key, probs = attend(norm(x) + position, want_map=name in wanted.temporal_maps)
            x = x + y
            if probs is not None:
                maps[name] = probs
            if name in wanted.temporal_keys:
                keys[name] = key
        return x + self.ff(self.ff_norm(x)), Attended(maps, keys)


class TemporalTransformer(nn.Module):
    """norm, proj_in, block, proj_out, residual: x (b*f, c, h, w) -> like x, and what was wanted."""

    def __init__(self, channels: int, heads: int, groups: int, attentions: int = 2):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([TemporalBlock(channels, heads, attentions)])
        self.proj_out = Linear(channels, channels)

    def forward(self, x: Tensor, frames: int, wanted: Wanted) -> tuple[Tensor, Attended]:
        h, w = x.shape[-2:]
        y = rearrange(self.norm(x), "(b f) c h w -> (b h w) f c", f=frames)
        y, seen = self.transformer_blocks[0](self.proj_in(y), wanted)
        return x + rearrange(self.proj_out(y), "(b h w) f c -> (b f) c h w", h=h, w=w), seen


class MotionModule(nn.Module):
    """The name under which AnimateDiff's checkpoints keep a temporal transformer."""

    def __init__(self, channels: int, heads: int, groups: int, attentions: int = 2):
        super().__init__()
        self.temporal_transformer = TemporalTransformer(channels, heads, groups, attentions)

    def forward(self, x: Tensor, frames: int, wanted: Wanted) -> tuple[Tensor, Attended]:
        return self.temporal_transformer(x, frames, wanted)
