"""The 3-D UNet: Stable Diffusion 1.5, frame by frame, with a motion module after every layer.

`UNet3D(z, t, text, temporal_maps=("up_blocks.1",))` returns the noise estimate and, as a second
value, the attention that was asked for. Names are those of AnimateDiff's checkpoints.
"""
import math
import re
from dataclasses import dataclass
from itertools import chain
from typing import Any, Callable, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import UNetConfig
from ..errors import InputError
from .layers import (Attention, Downsample, FrameNorm, Linear, ResnetBlock, SpatialTransformer,
                     Upsample)
from .temporal import Attended, MotionModule, Wanted

EPS = 1e-5


class Residuals(NamedTuple):
    """What SparseCtrl adds to the UNet: to each skip, (b*f, c, h, w), and to the middle."""
    skips: list[Tensor]
    middle: Tensor


class TimestepEmbedding(nn.Module):
    """Sinusoids of the timestep, [cos | sin], through two layers: t (b,) -> (b, time_channels)."""

    def __init__(self, channels: int, time_channels: int):
        super().__init__()
        self.channels = channels
        self.linear_1 = Linear(channels, time_channels)
        self.linear_2 = Linear(time_channels, time_channels)

    def forward(self, t: Tensor) -> Tensor:
        half = self.channels // 2
        rate = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000.0) / half))
        angle = t.float()[:, None] * rate
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.linear_2(F.silu(self.linear_1(wave.to(self.linear_1.weight.dtype))))


@dataclass(frozen=True)
class Conditioning:
    """What every block of the UNet is given beside its features."""
    time: Tensor                        # (b*f, time_channels)
    text: Tensor                        # (b, m, text_channels)
    frames: int
    wanted: Wanted = Wanted()           # by the layers' full names
    recompute: bool = False             # on the way back, rather than keep what is in a module

    def run(self, part: Callable[..., Any], *args: Any) -> Any:
        """part(*args), whose activations are kept, or computed again for the gradient."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(part, *args, use_reentrant=False, preserve_rng_state=False)
        return part(*args)


class Block(nn.Module):
    """One resolution of the UNet: layers of (resnet, spatial transformer, motion module).

    Which resolutions have spatial transformers is the config's choice: in Stable Diffusion all but
    the deepest. Every block takes features x (b*f, c, h, w) and the skips that lie open, returns
    both as they are after it, and what was wanted of its layers.
    """

    def __init__(self, config: UNetConfig, widths: list[tuple[int, int]], attends: bool,
                 motion: bool):
        super().__init__()
        c_out, groups = widths[0][1], config.norm_groups
        self.resnets = nn.ModuleList([
            ResnetBlock(c_in, c_out, groups, EPS, config.time_channels, config.norm_per_frame)
            for c_in, c_out in widths])
        layers = range(len(widths))
        self.attentions = nn.ModuleList([
            SpatialTransformer(c_out, config.heads, config.text_channels, groups)
            for _ in layers if attends])
        self.motion_modules = nn.ModuleList([
            MotionModule(c_out, config.motion_heads, groups, config.motion_attentions)
            for _ in layers if motion])

    def attend(self, i: int, x: Tensor, given: Conditioning) -> tuple[Tensor, Attended]:
        """The transformers of layer i, in space and in time."""
        seen = Attended()
        if self.attentions:
            name = str(self.attentions[i].name)
            x, probs = given.run(self.attentions[i], x, given.text, name in given.wanted.text_maps)
            seen = Attended(text_maps={} if probs is None else {name: probs})
        if self.motion_modules:
            x, temporal = given.run(self.motion_modules[i], x, given.frames, given.wanted)
            seen = seen | temporal
        return x, seen


class DownBlock(Block):
    def __init__(self, config: UNetConfig, level: int):
        widths, last = config.block_out_channels, len(config.block_out_channels) - 1
        c_in, c_out = widths[max(level - 1, 0)], widths[level]
        super().__init__(config, [(c_in, c_out)] + [(c_out, c_out)] * (config.layers_per_block - 1),
                         level in config.attention_levels, config.motion_modules)
        self.downsamplers = nn.ModuleList(
            [Downsample(c_out, pad_all_sides=True)] if level < last else [])

    def forward(self, x: Tensor, skips: list[Tensor], given: Conditioning
                ) -> tuple[Tensor, list[Tensor], Attended]:
        seen = Attended()
        for i, resnet in enumerate(self.resnets):
            x, more = self.attend(i, given.run(resnet, x, given.time, given.frames), given)
            skips, seen = [*skips, x], seen | more
        for downsample in self.downsamplers:
            x = downsample(x)
            skips = [*skips, x]
        return x, skips, seen


class UpBlock(Block):
    """Its layers take one skip each, beside the features."""

    def __init__(self, config: UNetConfig, level: int):
        widths = config.block_out_channels
        deepest, n = level + 1 == len(widths), config.layers_per_block + 1
        c_out = widths[level]
        skips = [c_out] * (n - 1) + [widths[max(level - 1, 0)]]
        inputs = [c_out if deepest else widths[level + 1]] + [c_out] * (n - 1)
        super().__init__(config, [(c_in + skip, c_out) for c_in, skip in zip(inputs, skips)],
                         level in config.attention_levels, config.motion_modules)
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if level > 0 else [])

    def forward(self, x: Tensor, skips: list[Tensor], given: Conditioning
                ) -> tuple[Tensor, list[Tensor], Attended]:
        seen = Attended()
        for i, resnet in enumerate(self.resnets):
            x, skips = torch.cat([x, skips[-1]], dim=1), skips[:-1]
            x, more = self.attend(i, given.run(resnet, x, given.time, given.frames), given)
            seen = seen | more
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[-2:])
        return x, skips, seen


class MidBlock(Block):
    """A resnet before and one after the transformers."""

    def __init__(self, config: UNetConfig):
        c = config.block_out_channels[-1]
        super().__init__(config, [(c, c)], attends=True, motion=config.motion_mid_block)
        self.resnets.append(
            ResnetBlock(c, c, config.norm_groups, EPS, config.time_channels, config.norm_per_frame))

    def forward(self, x: Tensor, skips: list[Tensor], given: Conditioning
                ) -> tuple[Tensor, list[Tensor], Attended]:
        x = given.run(self.resnets[0], x, given.time, given.frames)
        x, seen = self.attend(0, x, given)
        return given.run(self.resnets[1], x, given.time, given.frames), skips, seen


class UNet3D(nn.Module):
    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths, levels = config.block_out_channels, range(len(config.block_out_channels))
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], config.time_channels)
        self.down_blocks = nn.ModuleList([DownBlock(config, level) for level in levels])
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList([UpBlock(config, level) for level in reversed(levels)])
        self.conv_norm_out = FrameNorm(config.norm_groups, widths[0], EPS, config.norm_per_frame)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

        # In the order in which they run, the blocks, and the layers whose attention can be read.
        self.block_names = (*(f"down_blocks.{i}" for i in levels), "mid_block",
                            *(f"up_blocks.{i}" for i in levels))
        self.layers = [(name, module) for block in self.block_names
                       for name, module in self.get_submodule(block).named_modules(prefix=block)
                       if isinstance(module, Attention)]
        for name, module in self.layers:
            module.name = name

    def resolve(self, wanted: Wanted) -> Wanted:
        """The same request by the full names of the layers, in the order in which they run.

        A request names a block, a module or a single layer. Raises InputError, with the blocks
        there are, for a name under which there is no attention of its kind.
        """
        temporal = [name for name, _ in self.layers if ".motion_modules." in name]
        text = [name for name, _ in self.layers if name.endswith(".attn2")]
        return Wanted(layers_under(wanted.temporal_maps, temporal, "temporal attention"),
                      layers_under(wanted.temporal_keys, temporal, "temporal attention"),
                      layers_under(wanted.text_maps, text, "attention to the text"))

    def forward(self, z: Tensor, t: Tensor | int, text: Tensor, *,
                temporal_maps: Sequence[str] = (), temporal_keys: Sequence[str] = (),
                text_maps: Sequence[str] = (), residuals: Residuals | None = None,
                recompute: bool = False) -> tuple[Tensor, Attended]:
        """The noise in z, and the attention that was asked for.

        z          noisy latents (b, c, f, h, w)
        t          timestep, one for all or (b,), 0 to 999
        text       embeddings of the prompts (b, 77, text_channels)
        temporal_maps, temporal_keys, text_maps
                   blocks, modules or layers of which these are wanted, e.g. ("up_blocks.1",)
        residuals  SparseCtrl's, added to the skips and to what leaves the middle block
        recompute  keep only what enters each resnet, transformer and motion module, and compute
                   the rest again for the gradient: the same numbers in a fraction of the memory

        Returns eps, like z, and `Attended`. Gradient flows back from all that was asked for; past
        the last block of it values go on but no gradient does, so that the top of the UNet costs
        no graph, unless the UNet is in training mode. Raises InputError for a name under which
        there is no such attention, and for more frames than the positional encoding was trained on.
        """
        given, x, read = self.enter(z, t, text, Wanted(
            tuple(temporal_maps), tuple(temporal_keys), tuple(text_maps)), recompute)
        x, skips, seen = self.run(self.block_names[:read], x, [x], given, residuals)
        with torch.set_grad_enabled(torch.is_grad_enabled() and (not read or self.training)):
            x, skips, _ = self.run(self.block_names[read:], x, skips, given, residuals)
            eps = self.conv_out(F.silu(self.conv_norm_out(x, given.frames)))
        return rearrange(eps, "(b f) c h w -> b c f h w", f=given.frames), seen

    def attend(self, z: Tensor, t: Tensor | int, text: Tensor, wanted: Wanted,
               residuals: Residuals | None = None) -> Attended:
        """The attention that is wanted, as `forward` has it, by a pass that ends where it is."""
        given, x, read = self.enter(z, t, text, wanted, recompute=False)
        return self.run(self.block_names[:read], x, [x], given, residuals)[2]

    def enter(self, z: Tensor, t: Tensor | int, text: Tensor, wanted: Wanted, recompute: bool
              ) -> tuple[Conditioning, Tensor, int]:
        """What the blocks are given, the features (b*f, c, h, w) that enter the first of them, and
        how many blocks it takes to reach all that is wanted."""
        frames = z.shape[2]
        if self.config.motion_modules and frames > self.config.max_frames:
            raise InputError(f"{frames} frames: this model's motion modules know up to "
                             f"{self.config.max_frames}")
        wanted = self.resolve(wanted)
        read = max([0, *(i + 1 for i, block in enumerate(self.block_names)
                         for layer in chain(*wanted) if layer.startswith(block + "."))])
        t = torch.as_tensor(t, device=z.device).expand(z.shape[0])
        time = repeat(self.time_embedding(t), "b c -> (b f) c", f=frames)
        x = self.conv_in(rearrange(z, "b c f h w -> (b f) c h w"))
        return Conditioning(time, text, frames, wanted, recompute), x, read

    def run(self, blocks: Sequence[str], x: Tensor, skips: list[Tensor], given: Conditioning,
            residuals: Residuals | None) -> tuple[Tensor, list[Tensor], Attended]:
        seen = Attended()
        for name in blocks:
            x, skips, more = self.get_submodule(name)(x, skips, given)
            seen = seen | more
            if name == "mid_block" and residuals is not None:
                skips = [s + r for s, r in zip(skips, residuals.skips, strict=True)]
                x = x + residuals.middle
        return x, skips, seen


def layers_under(requests: Sequence[str], layers: list[str], kind: str) -> tuple[str, ...]:
    """The layers whose name is one of those asked for, or begins with it."""
    under = {request: [name for name in layers if f"{name}.".startswith(request + ".")]
             for request in requests}
    for request, names in under.items():
        if not names:
            blocks = dict.fromkeys(re.sub(r"\.(motion_modules|attentions)\..*", "", name)
                                   for name in layers)
            raise InputError(f"no {kind} under {request!r}: this model has it in "
                             f"{', '.join(blocks)}")
    return tuple(name for name in layers if any(name in names for names in under.values()))
