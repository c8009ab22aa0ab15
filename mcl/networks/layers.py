"""The building blocks that Stable Diffusion's UNet and VAE are made of.

Letters used in every shape and einops string of this project:
    b batch    f frames    c channels    h w rows and columns of the latent (H W of the picture)
    n tokens   m tokens of the text      d width of one attention head
Attention itself is one free function, `attention`, which every block calls. Parameter names are
those of the diffusers / AnimateDiff checkpoints.
"""
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import ops as tuned


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, want_map: bool = False,
              causal: bool = False) -> tuple[Tensor, Tensor | None]:
    """Multi-head attention, softmax(q k^T / sqrt(d)) v.

    q (b, n, heads*d), k and v (b, m, heads*d) -> output (b, n, heads*d), and the map
    (b, heads, n, m), whose rows sum to 1, if it was asked for, else None. The map is float32 (or
    float64) also where q is not: half precision overflows in it and in the loss read from it.
    `causal` lets a token see itself and those before it; such a layer has no map to give.
    """
    q, k, v = (rearrange(x, "b n (heads d) -> b heads n d", heads=heads) for x in (q, k, v))
    if not want_map:
        mask = q.new_ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril() if causal else None
        return rearrange(tuned.attend(q, k, v, mask), "b heads n d -> b n (heads d)"), None
    wide = torch.promote_types(q.dtype, torch.float32)
    with tuned.without_autocast(q.device.type):
        probs = (q.to(wide) * q.shape[-1] ** -0.5 @ k.to(wide).transpose(-1, -2)).softmax(dim=-1)
        out = probs.to(v.dtype) @ v
    return rearrange(out, "b heads n d -> b n (heads d)"), probs


class Conv2d(nn.Conv2d):
    """x (b, c_in, h, w) -> (b, c_out, h', w')."""

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.padding, tuple)      # and not a word
        return tuned.convolution(x, self.weight, self.bias, self.stride, self.padding)


class Linear(nn.Linear):
    """A linear layer over the last axis, (..., c_in) -> (..., c_out)."""

    def forward(self, x: Tensor) -> Tensor:
        return tuned.linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Projections around `attention`; self-attention where no context is given.

    `name` is the layer's full name in a `UNet3D`, under which its map is asked for and returned.
    """
    name = ""

    def __init__(self, channels: int, heads: int, context_channels: int | None = None):
        super().__init__()
        self.heads = heads
        context_channels = context_channels or channels
        self.to_q = Linear(channels, channels, bias=False)
        self.to_k = Linear(context_channels, channels, bias=False)
        self.to_v = Linear(context_channels, channels, bias=False)
        self.to_out = nn.ModuleList([Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor | None = None, want_map: bool = False
                ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x (b, n, c) -> like x, the keys (b, m, c), and the map (b, heads, n, m) if wanted."""
        context = x if context is None else context
        keys = self.to_k(context)
        out, probs = attention(self.to_q(x), keys, self.to_v(context), self.heads, want_map)
        return self.to_out[0](out), keys, probs


class GEGLU(nn.Module):
    """Gated feed-forward input, (..., c) -> (..., hidden); the projection holds [value | gate]."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.proj = Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = (tuned.linear(x, weight, bias) for weight, bias in
                       zip(self.proj.weight.chunk(2), self.proj.bias.chunk(2)))
        return tuned.gated(value, gate)


class FeedForward(nn.Module):
    """GEGLU, four times as wide inside; `net.1` is where the checkpoints keep a dropout."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(),
                                  Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class FrameNorm(nn.GroupNorm):
    """Group norm of (b*f, c, h, w): of each frame by itself, or of all the frames of a clip.

    AnimateDiff's v2 and v3 modules were trained with per-frame statistics ("inflated" group
    norm), its v1 modules with statistics over the whole clip.
    """

    def __init__(self, groups: int, channels: int, eps: float, per_frame: bool = True):
        super().__init__(groups, channels, eps=eps)
        self.per_frame = per_frame

    def forward(self, x: Tensor, frames: int = 1) -> Tensor:
        if self.per_frame or frames == 1:
            return super().forward(x)
        clip = rearrange(x, "(b f) c h w -> b c f h w", f=frames)
        return rearrange(super().forward(clip), "b c f h w -> (b f) c h w")


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, + time embedding, norm, SiLU, conv, + shortcut; per frame.

    x (b*f, c, h, w), time embedding (b*f, time_channels) or None in the VAE.
    """

    def __init__(self, c_in: int, c_out: int, groups: int, eps: float,
                 time_channels: int | None = None, norm_per_frame: bool = True):
        super().__init__()
        self.norm1 = FrameNorm(groups, c_in, eps, norm_per_frame)
        self.conv1 = Conv2d(c_in, c_out, 3, padding=1)
        if time_channels is not None:
            self.time_emb_proj = Linear(time_channels, c_out)
        self.norm2 = FrameNorm(groups, c_out, eps, norm_per_frame)
        self.conv2 = Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, time: Tensor | None = None, frames: int = 1) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x, frames)))
        if time is not None:
            y = y + rearrange(self.time_emb_proj(F.silu(time)), "b c -> b c 1 1")
        y = self.conv2(F.silu(self.norm2(y, frames)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halves the size by a strided convolution.

    The UNet pads all four sides, the VAE's encoder only right and bottom; padding the VAE
    evenly would shift the picture by half a pixel at every level.
    """

    def __init__(self, channels: int, pad_all_sides: bool):
        super().__init__()
        self.pad_all_sides = pad_all_sides
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=1 if pad_all_sides else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.pad_all_sides else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the size, or brings it to `size` (of odd latents): nearest, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        scale = 2.0 if size is None else None
        return self.conv(F.interpolate(x, size=size, scale_factor=scale, mode="nearest"))


class TransformerBlock(nn.Module):
    """Self-attention over the positions of one frame, attention to the text, feed-forward."""

    def __init__(self, channels: int, heads: int, text_channels: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, text_channels)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, text: Tensor, want_map: bool = False
                ) -> tuple[Tensor, Tensor | None]:
        """x (b*f, n, c), text (b, m, text_channels) -> like x, and the map of the attention to the
        text (b*f, heads, n, m), if it is wanted."""
        b, n = text.shape[0], x.shape[1]
        x = x + self.attn1(self.norm1(x))[0]
        # All frames of a clip attend to one text: its keys and values are computed once.
        y = rearrange(self.norm2(x), "(b f) n c -> b (f n) c", b=b)
        y, _, probs = self.attn2(y, text, want_map)
        x = x + rearrange(y, "b (f n) c -> (b f) n c", n=n)
        if probs is not None:
            probs = rearrange(probs, "b heads (f n) m -> (b f) heads n m", n=n)
        return x + self.ff(self.norm3(x)), probs


class SpatialTransformer(nn.Module):
    """The transformer of one frame: x (b*f, c, h, w) and text (b, m, text_channels) -> like x, and
    the map of its attention to the text (b*f, heads, h*w, m), if it is wanted."""

    def __init__(self, channels: int, heads: int, text_channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, heads, text_channels)])
        self.proj_out = Conv2d(channels, channels, 1)

    @property
    def name(self) -> str:
        """Of the attention to the text."""
        return str(self.transformer_blocks[0].get_submodule("attn2").name)

    def forward(self, x: Tensor, text: Tensor, want_map: bool = False
                ) -> tuple[Tensor, Tensor | None]:
        h = x.shape[2]
        y = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        y, probs = self.transformer_blocks[0](y, text, want_map)
        return x + self.proj_out(rearrange(y, "b (h w) c -> b c h w", h=h)), probs
