"""Building blocks of Stable Diffusion's UNet and VAE.

Parameter names are those of the diffusers and AnimateDiff checkpoints.
"""
from collections import OrderedDict

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import UNetConfig
from .attention import Attention, AttentionMaps, AttentionRequest, LayerOutput
from .ops import Conv2d, GEGLUFunction


class GEGLU(nn.Module):
    """Gated input of a feed-forward layer, (..., c) -> (..., hidden).

    The projection holds [value | gate].
    """

    def __init__(self, channels: int, hidden: int):
        """Create a layer from `channels` to `hidden` channels."""
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return value * gelu(gate)."""
        (w_value, w_gate), (b_value, b_gate) = self.proj.weight.chunk(2), self.proj.bias.chunk(2)
        return GEGLUFunction.apply(F.linear(x, w_value, b_value), F.linear(x, w_gate, b_gate))


class FeedForward(nn.Sequential):
    """Feed-forward layer with GEGLU, (..., c) -> (..., c), four times as wide inside.

    `net.1` is a dropout in the checkpoints, which is not used at inference.
    """

    def __init__(self, channels: int):
        """Create a layer of `channels`."""
        hidden = 4 * channels
        net = nn.Sequential(GEGLU(channels, hidden), nn.Identity(), nn.Linear(hidden, channels))
        super().__init__(OrderedDict(net=net))


class InflatedGroupNorm(nn.GroupNorm):
    """Group norm of frames (b*f, c, h, w), over each frame or over whole clips.

    AnimateDiff's v2 and v3 modules were trained with statistics per frame ("inflated" group norm),
    its v1 modules with statistics over the whole clip.
    """

    def __init__(self, groups: int, channels: int, eps: float, per_frame: bool = True):
        """Create a group norm; `per_frame` selects the statistics."""
        super().__init__(groups, channels, eps=eps)
        self.per_frame = per_frame

    def forward(self, x: Tensor, num_frames: int = 1) -> Tensor:
        """Return the normalized x (b*f, c, h, w)."""
        if self.per_frame or num_frames == 1:
            return super().forward(x)
        clip = rearrange(x, "(b f) c h w -> b c f h w", f=num_frames)
        return rearrange(super().forward(clip), "b c f h w -> (b f) c h w")


class ResnetBlock(nn.Module):
    """Residual block: norm, SiLU, conv, + time embedding, norm, SiLU, conv, + shortcut."""

    def __init__(self, c_in: int, c_out: int, groups: int, eps: float,
                 time_channels: int | None = None, inflated_groupnorm: bool = True):
        """Create a block from `c_in` to `c_out` channels; the VAE has no time embedding."""
        super().__init__()
        self.norm1 = InflatedGroupNorm(groups, c_in, eps, inflated_groupnorm)
        self.conv1 = Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_channels, c_out) if time_channels else None
        self.norm2 = InflatedGroupNorm(groups, c_out, eps, inflated_groupnorm)
        self.conv2 = Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, time: Tensor | None = None, num_frames: int = 1) -> Tensor:
        """Return (b*f, c_out, h, w) for x (b*f, c_in, h, w) and time (b*f, time_channels)."""
        y = self.conv1(F.silu(self.norm1(x, num_frames)))
        if self.time_emb_proj is not None and time is not None:
            y = y + rearrange(self.time_emb_proj(F.silu(time)), "b c -> b c 1 1")
        y = self.conv2(F.silu(self.norm2(y, num_frames)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Strided convolution that halves height and width.

    The UNet pads all four sides. The VAE's encoder pads only right and bottom; symmetric padding
    there would shift the picture by half a pixel at every level.
    """

    def __init__(self, channels: int, pad_all_sides: bool = True):
        """Create a layer of `channels`."""
        super().__init__()
        self.pad_all_sides = pad_all_sides
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=1 if pad_all_sides else 0)

    def forward(self, x: Tensor) -> Tensor:
        """Return (b, c, h/2, w/2)."""
        return self.conv(x if self.pad_all_sides else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbor upsampling and a convolution."""

    def __init__(self, channels: int):
        """Create a layer of `channels`."""
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return x at twice its size, or at `size` (h, w), which odd latents need."""
        return self.conv(F.interpolate(x, size, scale_factor=None if size else 2.0, mode="nearest"))


class TransformerBlock(nn.Module):
    """Self-attention over the positions of a frame, cross-attention to the text, feed-forward."""

    def __init__(self, channels: int, config: UNetConfig):
        """Create a block of `channels`."""
        super().__init__()
        heads, text_channels = config.num_attention_heads, config.cross_attention_dim
        self.norm1, self.attn1 = nn.LayerNorm(channels), Attention(channels, heads)
        self.norm2, self.attn2 = nn.LayerNorm(channels), Attention(channels, heads, text_channels)
        self.norm3, self.ff = nn.LayerNorm(channels), FeedForward(channels)

    def forward(self, x: Tensor, text: Tensor, request: AttentionRequest) -> LayerOutput:
        """Return the output and the requested cross-attention.

        Args:
            x: Tokens (b*f, n, c).
            text: Text embeddings (b, m, cross_attention_dim).
            request: Attention to return, by full layer name.

        Returns:
            The output, like x, and the map (b*f, heads, n, m) if it is requested, without its grid.
        """
        attention, b, n = AttentionMaps(), text.shape[0], x.shape[1]
        x = x + self.attn1(self.norm1(x))[0]
        # All frames of a clip attend to one text: its keys and values are computed once.
        y = rearrange(self.norm2(x), "(b f) n c -> b (f n) c", b=b)
        y, _, attention_probs = self.attn2(y, text, self.attn2.name in request.cross)
        x = x + rearrange(y, "b (f n) c -> (b f) n c", n=n)
        if attention_probs is not None:
            attention.cross[self.attn2.name] = rearrange(
                attention_probs, "b heads (f n) m -> (b f) heads n m", n=n)
        return x + self.ff(self.norm3(x)), attention


class SpatialTransformer(nn.Module):
    """Transformer over the positions of each frame, with a residual connection."""

    def __init__(self, channels: int, config: UNetConfig):
        """Create a transformer of `channels`."""
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)
        self.proj_in = Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, config)])
        self.proj_out = Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, text: Tensor, request: AttentionRequest) -> LayerOutput:
        """Return the output, like x (b*f, c, h, w), and the requested cross-attention."""
        h, w = x.shape[-2:]
        y = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        y, attention = self.transformer_blocks[0](y, text, request)
        attention.grids.update(dict.fromkeys(attention.cross, (h, w)))
        return x + self.proj_out(rearrange(y, "b (h w) c -> b c h w", h=h)), attention
