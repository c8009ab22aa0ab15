"""The autoencoder between pixels and latents (Stable Diffusion's AutoencoderKL).

Every frame is encoded by itself. Pixels are in [-1, 1]. The scale factor of the latents is used
only in `AutoencoderKL.encode` and `AutoencoderKL.decode`. Parameter names are those of diffusers.
"""
import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from ..config import VAEConfig
from ..errors import InputError, NumericalError
from .attention import attention
from .layers import Downsample, ResnetBlock, Upsample

EPS = 1e-6


class VAEAttention(nn.Module):
    """Single-head self-attention over the positions of one frame, with a residual connection."""

    def __init__(self, channels: int, groups: int):
        """Create a layer of `channels`."""
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, like x (b, c, h, w)."""
        y = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        y, _ = attention(self.to_q(y), self.to_k(y), self.to_v(y), heads=1)
        return x + rearrange(self.to_out[0](y), "b (h w) c -> b c h w", h=x.shape[2])


class MidBlock(nn.Module):
    """Attention between two residual blocks, at the lowest resolution."""

    def __init__(self, channels: int, groups: int):
        """Create a block of `channels`."""
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups, EPS) for _ in range(2))
        self.attentions = nn.ModuleList([VAEAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, like x (b, c, h, w)."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class VAEBlock(nn.Sequential):
    """Residual blocks of one resolution, and the layer that leads to the next resolution.

    It maps x (b, c_in, h, w) to (b, c_out, h', w').
    """

    def __init__(self, config: VAEConfig, i: int, is_decoder: bool):
        """Create block i of the encoder or the decoder, in the order in which the blocks run."""
        widths = config.block_out_channels[::-1] if is_decoder else config.block_out_channels
        groups, num_layers = config.norm_num_groups, config.layers_per_block + int(is_decoder)
        c_in, c_out = (widths[0], *widths)[i:i + 2]
        c_ins, has_next = [c_in] + [c_out] * (num_layers - 1), i + 1 < len(widths)
        super().__init__(OrderedDict(
            resnets=nn.Sequential(*(ResnetBlock(c, c_out, groups, EPS) for c in c_ins)),
            downsamplers=nn.Sequential(*([Downsample(c_out, pad_all_sides=False)]
                                         if has_next and not is_decoder else [])),
            upsamplers=nn.Sequential(*([Upsample(c_out)] if has_next and is_decoder else []))))


class Encoder(nn.Sequential):
    """Network from frames (b, 3, H, W) to the moments of the latents, (b, 2*c, H/s, W/s)."""

    def __init__(self, config: VAEConfig):
        """Create an encoder with random weights."""
        widths, groups = config.block_out_channels, config.norm_num_groups
        super().__init__(OrderedDict(
            conv_in=nn.Conv2d(3, widths[0], 3, padding=1),
            down_blocks=nn.Sequential(*(VAEBlock(config, i, False) for i in range(len(widths)))),
            mid_block=MidBlock(widths[-1], groups),
            conv_norm_out=nn.GroupNorm(groups, widths[-1], eps=EPS), conv_act=nn.SiLU(),
            conv_out=nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)))


class Decoder(nn.Sequential):
    """Network from latents (b, c, H/s, W/s) to frames (b, 3, H, W)."""

    def __init__(self, config: VAEConfig):
        """Create a decoder with random weights."""
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        super().__init__(OrderedDict(
            conv_in=nn.Conv2d(config.latent_channels, widths[0], 3, padding=1),
            mid_block=MidBlock(widths[0], groups),
            up_blocks=nn.Sequential(*(VAEBlock(config, i, True) for i in range(len(widths)))),
            conv_norm_out=nn.GroupNorm(groups, widths[-1], eps=EPS), conv_act=nn.SiLU(),
            conv_out=nn.Conv2d(widths[-1], 3, 3, padding=1)))


class AutoencoderKL(nn.Module):
    """Variational autoencoder of single frames; s is its downsampling factor."""

    def __init__(self, config: VAEConfig):
        """Create an autoencoder with random weights."""
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        c = config.latent_channels
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * c, 2 * c, 1), nn.Conv2d(c, c, 1)

    def moments(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of the unscaled latents, (b, c, H/s, W/s) each.

        Args:
            frames: Frames (b, 3, H, W) in [-1, 1].

        Returns:
            The mean, and the log-variance clamped to [-30, 20].
        """
        mean, logvar = self.quant_conv(self.encoder(frames)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, frames: Tensor, chunk_size: int = 4) -> Tensor:
        """Return the scaled latents (1, c, f, H/s, W/s) of a clip: the posterior's mean.

        Args:
            frames: Frames (f, 3, H, W) in [-1, 1], of any floating-point type and device.
            chunk_size: Number of frames that are encoded at a time.

        Raises:
            InputError: If H or W is not a multiple of s. Padding would shift the picture.
            NumericalError: If the latents are not finite, even in float32.
        """
        (h, w), s = frames.shape[-2:], self.config.downsampling
        if h % s or w % s:
            raise InputError(f"frames of {h}x{w} pixels: both sides must be multiples of {s}")
        z = self._map_chunks(lambda vae, chunk: vae.moments(chunk)[0], frames, chunk_size)
        return rearrange(z * self.config.scaling_factor, "f c h w -> 1 c f h w")

    def decode(self, latents: Tensor, chunk_size: int = 4) -> Tensor:
        """Return the frames (b*f, 3, H, W) of scaled latents, clamped to [-1, 1].

        Args:
            latents: Scaled latents (b, c, f, h, w), of any floating-point type and device.
            chunk_size: Number of frames that are decoded at a time.

        Raises:
            NumericalError: If the frames are not finite, even in float32.
        """
        scale, z = self.config.scaling_factor, rearrange(latents, "b c f h w -> (b f) c h w")
        return self._map_chunks(lambda vae, chunk: vae.decoder(vae.post_quant_conv(chunk / scale)),
                                z, chunk_size).clamp_(-1, 1)

    def _map_chunks(self, function: Callable[..., Tensor], x: Tensor, chunk_size: int) -> Tensor:
        """Return function(self, x), computed for a few frames at a time.

        Many community VAEs overflow in float16, but most do not. If one does, the function is
        computed again by a float32 copy of the network, one frame at a time to save memory.
        """
        dtype = self.quant_conv.weight.dtype
        outputs = []
        for chunk in x.split(chunk_size):
            outputs.append(function(self, chunk.to(self.quant_conv.weight)))
            if torch.isfinite(outputs[-1]).all():
                continue
            if dtype in (torch.float32, torch.float64):
                raise NumericalError("the result of the VAE is not finite, even in float32: its "
                                     "weights or its input are damaged")
            warnings.warn(f"the VAE overflows in {str(dtype).removeprefix('torch.')}: its work is "
                          "repeated in float32", stacklevel=3)
            return copy.deepcopy(self).float()._map_chunks(function, x, chunk_size=1)
        return torch.cat(outputs)
