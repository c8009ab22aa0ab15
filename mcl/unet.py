"""The 3-D UNet: Stable Diffusion 1.5, frame by frame, with a motion module after every layer.

`UNet3D(z, t, text, maps_of=...)` returns the noise estimate and, as a second value, the temporal
attention maps that were asked for. Names are those of AnimateDiff's checkpoints.
"""
import contextlib
import math
from dataclasses import dataclass
from typing import Any, Callable, Iterable, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import UNetConfig
from .errors import InputError
from .layers import Downsample, FrameNorm, Linear, ResnetBlock, SpatialTransformer, Upsample
from .temporal import Maps, MotionModule, below

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
class Call:
    """What every block of the UNet is given beside its features."""
    time: Tensor                        # (b*f, time_channels)
    text: Tensor                        # (b, m, text_channels)
    frames: int
    maps_of: tuple[str, ...] = ()       # names within the block
    recompute: bool = False             # on the way back, rather than keep what is in a module

    def run(self, part: Callable[..., Any], *args: Any) -> Any:
        """part(*args), whose activations are kept, or computed again for the gradient."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(part, *args, use_reentrant=False, preserve_rng_state=False)
        return part(*args)


class Block(nn.Module):
    """One resolution of the UNet: layers of (resnet, spatial transformer, motion module).

    The layers of the way up take one skip tensor each, beside the features. Which resolutions
    have spatial transformers is the config's choice: in Stable Diffusion all but the deepest.
    """

    def __init__(self, config: UNetConfig, widths: list[tuple[int, int]], attends: bool):
        super().__init__()
        c_out, groups = widths[0][1], config.norm_groups
        self.resnets = nn.ModuleList([
            ResnetBlock(c_in, c_out, groups, EPS, config.time_channels, config.norm_per_frame)
            for c_in, c_out in widths])
        self.attentions = nn.ModuleList([
            SpatialTransformer(c_out, config.heads, config.text_channels, groups)
            for _ in widths if attends])
        self.motion_modules = nn.ModuleList([
            MotionModule(c_out, config.motion_heads, groups, config.motion_attentions)
            for _ in widths if config.motion_modules])

    def layer(self, i: int, x: Tensor, call: Call) -> tuple[Tensor, Maps]:
        """Layer i: x (b*f, c, h, w) -> (b*f, c_out, h, w), and its maps."""
        maps: Maps = {}
        x = call.run(self.resnets[i], x, call.time, call.frames)
        if self.attentions:
            x = spatial(self.attentions, i, x, call, maps)
        if self.motion_modules:
            x = temporal(self.motion_modules, i, x, call, maps)
        return x, maps


def spatial(transformers: nn.ModuleList, i: int, x: Tensor, call: Call, maps: Maps) -> Tensor:
    """The i-th spatial transformer. Its map is wanted where it is named, and not where a whole
    block is, which stands for temporal attention."""
    named = below(tuple(filter(None, call.maps_of)), f"attentions.{i}")
    x, probs = call.run(transformers[i], x, call.text, bool(named))
    if probs is not None:
        maps[f"attentions.{i}"] = probs
    return x


def temporal(modules: nn.ModuleList, i: int, x: Tensor, call: Call, maps: Maps) -> Tensor:
    """The i-th motion module, whose maps are added to `maps`."""
    name = f"motion_modules.{i}"
    x, found = call.run(modules[i], x, call.frames, below(call.maps_of, name))
    maps.update({f"{name}.{key}": m for key, m in found.items()})
    return x


class DownBlock(Block):
    def __init__(self, config: UNetConfig, level: int):
        widths, last = config.block_out_channels, len(config.block_out_channels) - 1
        c_in, c_out = widths[max(level - 1, 0)], widths[level]
        super().__init__(config, [(c_in, c_out)] + [(c_out, c_out)] * (config.layers_per_block - 1),
                         attends=level in config.attention_levels)
        self.downsamplers = nn.ModuleList(
            [Downsample(c_out, pad_all_sides=True)] if level < last else [])

    def forward(self, x: Tensor, call: Call) -> tuple[Tensor, list[Tensor], Maps]:
        skips: list[Tensor] = []
        maps: Maps = {}
        for i in range(len(self.resnets)):
            x, found = self.layer(i, x, call)
            maps |= found
            skips.append(x)
        if self.downsamplers:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips, maps


class UpBlock(Block):
    def __init__(self, config: UNetConfig, level: int):
        widths = config.block_out_channels
        deepest, n = level + 1 == len(widths), config.layers_per_block + 1
        c_out = widths[level]
        skips = [c_out] * (n - 1) + [widths[max(level - 1, 0)]]
        inputs = [c_out if deepest else widths[level + 1]] + [c_out] * (n - 1)
        super().__init__(config, [(c_in + skip, c_out) for c_in, skip in zip(inputs, skips)],
                         attends=level in config.attention_levels)
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if level > 0 else [])

    def forward(self, x: Tensor, skips: list[Tensor], call: Call) -> tuple[Tensor, Maps]:
        maps: Maps = {}
        for i in range(len(self.resnets)):
            x, found = self.layer(i, torch.cat([x, skips.pop()], dim=1), call)
            maps |= found
        if self.upsamplers:
            x = self.upsamplers[0](x, skips[-1].shape[-2:])
        return x, maps


class MidBlock(nn.Module):
    def __init__(self, config: UNetConfig):
        super().__init__()
        c, groups = config.block_out_channels[-1], config.norm_groups
        self.resnets = nn.ModuleList([
            ResnetBlock(c, c, groups, EPS, config.time_channels, config.norm_per_frame)
            for _ in range(2)])
        self.attentions = nn.ModuleList([
            SpatialTransformer(c, config.heads, config.text_channels, groups)])
        self.motion_modules = nn.ModuleList(
            [MotionModule(c, config.motion_heads, groups, config.motion_attentions)]
            if config.motion_mid_block else [])

    def forward(self, x: Tensor, call: Call) -> tuple[Tensor, Maps]:
        maps: Maps = {}
        x = call.run(self.resnets[0], x, call.time, call.frames)
        x = spatial(self.attentions, 0, x, call, maps)
        if self.motion_modules:
            x = temporal(self.motion_modules, 0, x, call, maps)
        return call.run(self.resnets[1], x, call.time, call.frames), maps


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

    def block_names(self) -> list[str]:
        """The blocks in the order in which they run."""
        levels = range(len(self.down_blocks))
        return ([f"down_blocks.{i}" for i in levels] + ["mid_block"]
                + [f"up_blocks.{i}" for i in levels])

    def temporal_layers(self, maps_of: Iterable[str]) -> list[str]:
        """The temporal attention layers that a request names, in the order in which they run.

        A request names a block, a motion module or a single layer. Raises InputError, with the
        blocks there are, for a name under which there is no temporal attention.
        """
        order = {name: i for i, name in enumerate(self.block_names())}
        layers = [name for name, _ in self.named_modules()
                  if name.rpartition(".")[0].endswith("attention_blocks")]
        layers.sort(key=lambda name: next(i for block, i in order.items()
                                          if name.startswith(block + ".")))
        maps_of = tuple(maps_of)
        for request in maps_of:
            if not any(below((layer,), request) for layer in layers):
                blocks = [b for b in order if any(name.startswith(b + ".") for name in layers)]
                raise InputError(f"no temporal attention under {request!r}: "
                                 f"this model has it in {', '.join(blocks)}")
        return [layer for layer in layers if any(below((layer,), r) for r in maps_of)]

    def blocks_of(self, maps_of: Iterable[str]) -> list[str]:
        """The blocks in which a request's maps are. Raises InputError as `forward` does."""
        spatial = [name for name in maps_of if ".attentions" in name]
        there = [name for name, module in self.named_modules()
                 if isinstance(module, SpatialTransformer)]
        for request in spatial:
            if not any(below((name,), request) for name in there):
                raise InputError(f"no spatial attention under {request!r}: this model has it in "
                                 f"{', '.join(there)}")
        layers = self.temporal_layers(name for name in maps_of if name not in spatial)
        return [name.split(".motion_modules")[0].split(".attentions")[0]
                for name in (*spatial, *layers)]

    def forward(self, z: Tensor, t: Tensor | int, text: Tensor,
                maps_of: Iterable[str] = (), need_eps: bool = True,
                residuals: Residuals | None = None, recompute: bool = False
                ) -> tuple[Tensor | None, Maps]:
        """The noise in z, and the temporal attention maps that were asked for.

        z       noisy latents (b, c, f, h, w)
        t       timestep, one for all or (b,), 0 to 999
        text    embeddings of the prompts (b, 77, text_channels)
        maps_of blocks, motion modules or layers whose temporal maps are wanted, e.g.
                ("up_blocks.1",); with ".to_k" after a layer's name, its keys; with ".attentions"
                after a block's, the maps of its attention to the text
        residuals  SparseCtrl's, added to the skips and to what leaves the middle block
        recompute  keep only what enters each resnet, transformer and motion module, and compute
                the rest again for the gradient: the same numbers in a fraction of the memory

        Returns eps, like z, and {layer's name: (b*h*w, heads, f, f) float32}; keys are
        (b*h*w, f, c), maps of the attention to the text (b*f, heads, h*w, 77). Gradient flows back
        from all of them; past the last block that was asked, values go on but no gradient does, so
        that the top of the UNet costs no graph. With `need_eps` false the pass ends after that
        block and eps is None. Raises InputError for a name under which there is no attention, and
        for more frames than the positional encoding was trained on.
        """
        frames, maps_of = z.shape[2], tuple(maps_of)
        if self.config.motion_modules and frames > self.config.max_frames:
            raise InputError(f"{frames} frames: this model's motion modules know up to "
                             f"{self.config.max_frames}")
        names = self.block_names()
        last = max((names.index(block) for block in self.blocks_of(maps_of)), default=len(names))
        t = torch.as_tensor(t, device=z.device).expand(z.shape[0])
        time = repeat(self.time_embedding(t), "b c -> (b f) c", f=frames)
        x = self.conv_in(rearrange(z, "b c f h w -> (b f) c h w"))

        maps: Maps = {}
        skips = [x]
        grad: contextlib.AbstractContextManager = contextlib.nullcontext()
        for i, name in enumerate(names):
            block = self.get_submodule(name)
            call = Call(time, text, frames, below(maps_of, name), recompute)
            with grad:
                if name.startswith("down"):
                    x, new, found = block(x, call)
                    skips += new
                elif name.startswith("mid"):
                    x, found = block(x, call)
                    if residuals is not None:
                        skips = [s + r for s, r in zip(skips, residuals.skips, strict=True)]
                        x = x + residuals.middle
                else:
                    x, found = block(x, skips, call)
            maps.update({f"{name}.{key}": m for key, m in found.items()})
            if i == last:
                if not need_eps:
                    return None, maps
                x, skips, grad = x.detach(), [s.detach() for s in skips], torch.no_grad()
        with grad:
            eps = self.conv_out(F.silu(self.conv_norm_out(x, frames)))
        return rearrange(eps, "(b f) c h w -> b c f h w", f=frames), maps
