"""AnimateDiff's motion module: attention along time, at every position by itself.

Its attention maps are what MotionClone reads: how much each frame, at one place, looks at each
other frame of the clip.
"""
import math

import torch
from einops import rearrange
from torch import Tensor, nn

from .layers import Attention, FeedForward, Linear

Maps = dict[str, Tensor]


def below(maps_of: tuple[str, ...], child: str) -> tuple[str, ...]:
    """Of the layers whose maps are wanted, those inside one child, named from there.

    An empty name stands for everything: ("up_blocks.1", "mid_block") below "up_blocks.1" is ("",).
    """
    inside = [name[len(child) + 1:] for name in maps_of if name.startswith(child + ".")]
    whole = [name for name in maps_of if f"{child}.".startswith(name + ".") or not name]
    return (*inside, *(("",) if whole else ()))


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

    x (b*h*w, f, c) -> like x, and the asked-for maps (b*h*w, heads, f, f).
    """

    def __init__(self, channels: int, heads: int, attentions: int):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(channels) for _ in range(attentions)])
        self.attention_blocks = nn.ModuleList([Attention(channels, heads)
                                               for _ in range(attentions)])
        self.ff_norm = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, maps_of: tuple[str, ...] = ()) -> tuple[Tensor, Maps]:
        maps: Maps = {}
        position = position_encoding(x.shape[1], x.shape[2]).to(x)
        for i, (norm, attend) in enumerate(zip(self.norms, self.attention_blocks)):
            name = f"attention_blocks.{i}"
            # Queries, keys and values all see the position; the residual does not.
            y, found = attend(norm(x) + position, want=below(maps_of, name))
            x = x + y
            maps.update({f"{name}.{key}".rstrip("."): m for key, m in found.items()})
        return x + self.ff(self.ff_norm(x)), maps


class TemporalTransformer(nn.Module):
    """norm, proj_in, block, proj_out, residual: x (b*f, c, h, w) -> like x, and the maps."""

    def __init__(self, channels: int, heads: int, groups: int, attentions: int = 2):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([TemporalBlock(channels, heads, attentions)])
        self.proj_out = Linear(channels, channels)

    def forward(self, x: Tensor, frames: int, maps_of: tuple[str, ...] = ()
                ) -> tuple[Tensor, Maps]:
        h, w = x.shape[-2:]
        y = rearrange(self.norm(x), "(b f) c h w -> (b h w) f c", f=frames)
        y, maps = self.transformer_blocks[0](self.proj_in(y),
                                             below(maps_of, "transformer_blocks.0"))
        y = rearrange(self.proj_out(y), "(b h w) f c -> (b f) c h w", h=h, w=w)
        return x + y, {f"transformer_blocks.0.{name}": m for name, m in maps.items()}


class MotionModule(nn.Module):
    """The name under which AnimateDiff's checkpoints keep a temporal transformer."""

    def __init__(self, channels: int, heads: int, groups: int, attentions: int = 2):
        super().__init__()
        self.temporal_transformer = TemporalTransformer(channels, heads, groups, attentions)

    def forward(self, x: Tensor, frames: int, maps_of: tuple[str, ...] = ()
                ) -> tuple[Tensor, Maps]:
        name = "temporal_transformer"
        x, maps = self.temporal_transformer(x, frames, below(maps_of, name))
        return x, {f"{name}.{key}": m for key, m in maps.items()}
