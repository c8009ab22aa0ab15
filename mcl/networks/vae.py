"""The autoencoder between pictures and latents (Stable Diffusion's AutoencoderKL).

It sees every frame by itself. Pixels in [-1, 1] and scaled latents meet the scale factor only in
`AutoencoderKL.encode` and `AutoencoderKL.decode`.
"""
import copy
import warnings
from typing import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import VAEConfig
from ..errors import InputError, NumericalError
from .attention import attention
from .layers import Downsample, ResnetBlock, Upsample
from .ops import Linear

EPS = 1e-6


class VAEAttention(nn.Module):
    """Single-head self-attention over the positions of one frame, with biases."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q = Linear(channels, channels)
        self.to_k = Linear(channels, channels)
        self.to_v = Linear(channels, channels)
        self.to_out = nn.ModuleList([Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        y = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        y, _ = attention(self.to_q(y), self.to_k(y), self.to_v(y), heads=1)
        return x + rearrange(self.to_out[0](y), "b (h w) c -> b c h w", h=x.shape[2])


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups, EPS)
                                      for _ in range(2)])
        self.attentions = nn.ModuleList([VAEAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class VAEBlock(nn.Module):
    """The residual blocks of one resolution, and the way to the next one."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int,
                 down: bool = False, up: bool = False):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c_in if i == 0 else c_out, c_out, groups, EPS)
                                      for i in range(layers)])
        self.downsamplers = nn.ModuleList([Downsample(c_out, pad_all_sides=False)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList([
            VAEBlock(widths[max(i - 1, 0)], width, config.layers_per_block, groups,
                  down=i + 1 < len(widths))
            for i, width in enumerate(widths)])
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList([
            VAEBlock(widths[max(i - 1, 0)], width, config.layers_per_block + 1, groups,
                  up=i + 1 < len(widths))
            for i, width in enumerate(widths)])
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        c = config.latent_channels
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)

    def moments(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (clamped to [-30, 20]) of the unscaled latents.

        pictures (b, 3, H, W) in [-1, 1] -> two tensors (b, c, H/s, W/s).
        """
        mean, logvar = self.quant_conv(self.encoder(pictures)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, frames: Tensor, noise: Tensor | None = None, slice_size: int = 4) -> Tensor:
        """Scaled latents (1, c, f, h, w) of frames (f, 3, H, W) in [-1, 1], of any float type and
        device, which are brought to the network's own.

        They are the posterior's mean, or, given standard normal noise (f, c, h, w), a sample of
        it. `slice_size` frames are encoded at a time. Raises InputError where H or W is not a
        multiple of the downsampling factor: padding in silence would shift the picture;
        NumericalError where the latents are not finite, in float32 as well.
        """
        s = self.config.downsampling
        if frames.shape[-2] % s or frames.shape[-1] % s:
            raise InputError(f"pictures of {frames.shape[-2]}x{frames.shape[-1]} cannot be encoded:"
                             f" height and width must be multiples of {s}")
        given = (frames,) if noise is None else (frames, noise)
        z = self.in_slices(AutoencoderKL.latents_of, given, slice_size) * self.config.scaling_factor
        return rearrange(z, "f c h w -> 1 c f h w")

    def decode(self, latents: Tensor, slice_size: int = 4) -> Tensor:
        """Frames (b*f, 3, H, W), clamped to [-1, 1], of scaled latents (b, c, f, h, w) of any float
        type and device. Raises NumericalError as `encode` does."""
        z = rearrange(latents, "b c f h w -> (b f) c h w")
        return self.in_slices(AutoencoderKL.frames_of, (z,), slice_size).clamp_(-1, 1)

    def latents_of(self, frames: Tensor, noise: Tensor | None = None) -> Tensor:
        mean, logvar = self.moments(frames)
        return mean if noise is None else mean + (logvar / 2).exp() * noise

    def frames_of(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents / self.config.scaling_factor))

    def in_slices(self, action: Callable[..., Tensor], given: tuple[Tensor, ...], slice_size: int
                  ) -> Tensor:
        """What an action of this network, or of a float32 copy, makes of the given, (f, ...) each.

        Many community VAEs overflow in float16. They are tried in it first, as most do not; the
        copy is made of one that does, and takes one frame at a time, which needs less memory.
        """
        dtype = self.quant_conv.weight.dtype
        done = []
        for parts in zip(*(tensor.split(slice_size) for tensor in given)):
            done.append(action(self, *(part.to(self.quant_conv.weight) for part in parts)))
            if torch.isfinite(done[-1]).all():
                continue
            if dtype in (torch.float32, torch.float64):
                raise NumericalError("the VAE's result is not finite, not even in float32: its "
                                     "weights, or what it was given, are damaged")
            warnings.warn(f"the VAE overflows in {str(dtype).removeprefix('torch.')}: this is done "
                          "again in float32", stacklevel=3)
            return copy.deepcopy(self).float().in_slices(action, given, slice_size=1)
        return torch.cat(done)
