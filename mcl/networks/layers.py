"""Building blocks of Stable Diffusion's UNet and VAE.

Parameter names are those of the diffusers and AnimateDiff checkpoints.
"""
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .attention import Attention
from .ops import Conv2d, Linear, geglu, linear


class GEGLU(nn.Module):
    """Gated input of a feed-forward layer, (..., c) -> (..., hidden).

    The projection holds [value | gate].
    """

    def __init__(self, channels: int, hidden: int):
        """Create a layer from `channels` to `hidden` channels."""
        super().__init__()
        self.proj = Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return value * gelu(gate)."""
        value, gate = (linear(x, weight, bias) for weight, bias in
                       zip(self.proj.weight.chunk(2), self.proj.bias.chunk(2), strict=True))
        return geglu(value, gate)


class FeedForward(nn.Module):
    """Feed-forward layer with GEGLU, four times as wide inside.

    `net.1` is a dropout in the checkpoints, which is not used at inference.
    """

    def __init__(self, channels: int):
        """Create a layer of `channels`."""
        super().__init__()
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(),
                                  Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for x (..., c), like x."""
        return self.net[2](self.net[0](x))


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
        if time_channels is not None:
            self.time_emb_proj = Linear(time_channels, c_out)
        self.norm2 = InflatedGroupNorm(groups, c_out, eps, inflated_groupnorm)
        self.conv2 = Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, time: Tensor | None = None, num_frames: int = 1) -> Tensor:
        """Return (b*f, c_out, h, w) for x (b*f, c_in, h, w) and time (b*f, time_channels)."""
        y = self.conv1(F.silu(self.norm1(x, num_frames)))
        if time is not None:
            y = y + rearrange(self.time_emb_proj(F.silu(time)), "b c -> b c 1 1")
        y = self.conv2(F.silu(self.norm2(y, num_frames)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Strided convolution that halves height and width.

    The UNet pads all four sides. The VAE's encoder pads only right and bottom; symmetric padding
    there would shift the picture by half a pixel at every level.
    """

    def __init__(self, channels: int, pad_all_sides: bool):
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
        scale = 2.0 if size is None else None
        return self.conv(F.interpolate(x, size=size, scale_factor=scale, mode="nearest"))


class TransformerBlock(nn.Module):
    """Self-attention over the positions of a frame, cross-attention to the text, feed-forward."""

    def __init__(self, channels: int, heads: int, cross_attention_dim: int):
        """Create a block of `channels` for texts of width `cross_attention_dim`."""
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, cross_attention_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, text: Tensor, return_map: bool = False
                ) -> tuple[Tensor, Tensor | None]:
        """Return the output and, on request, the cross-attention map.

        Args:
            x: Tokens (b*f, n, c).
            text: Text embeddings (b, m, cross_attention_dim).
            return_map: Whether to return the map.

        Returns:
            The output, like x, and the map (b*f, heads, n, m) or None.
        """
        b, n = text.shape[0], x.shape[1]
        x = x + self.attn1(self.norm1(x))[0]
        # All frames of a clip attend to one text: its keys and values are computed once.
        y = rearrange(self.norm2(x), "(b f) n c -> b (f n) c", b=b)
        y, _, attention_probs = self.attn2(y, text, return_map)
        x = x + rearrange(y, "b (f n) c -> (b f) n c", n=n)
        if attention_probs is not None:
            attention_probs = rearrange(attention_probs, "b heads (f n) m -> (b f) heads n m", n=n)
        return x + self.ff(self.norm3(x)), attention_probs


class SpatialTransformer(nn.Module):
    """Transformer over the positions of each frame, with a residual connection."""

    def __init__(self, channels: int, heads: int, cross_attention_dim: int, groups: int):
        """Create a transformer of `channels` for texts of width `cross_attention_dim`."""
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([
            TransformerBlock(channels, heads, cross_attention_dim)])
        self.proj_out = Conv2d(channels, channels, 1)

    @property
    def name(self) -> str:
        """Name of the cross-attention layer."""
        return str(self.transformer_blocks[0].get_submodule("attn2").name)

    def forward(self, x: Tensor, text: Tensor, return_map: bool = False
                ) -> tuple[Tensor, Tensor | None]:
        """Return the output, like x (b*f, c, h, w), and the map (b*f, heads, h*w, m) or None."""
        h = x.shape[2]
        y = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        y, attention_probs = self.transformer_blocks[0](y, text, return_map)
        return x + self.proj_out(rearrange(y, "b (h w) c -> b c h w", h=h)), attention_probs
