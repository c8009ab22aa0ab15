"""The 3-D UNet: Stable Diffusion 1.5 applied to every frame, with a motion module in each layer.

`UNet3D(z, t, text, request=AttentionRequest(temporal=("up_blocks.1",)))` returns the noise estimate
and the requested attention. Module names are those of AnimateDiff's checkpoints.
"""
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import UNetConfig
from ..errors import InputError
from .attention import NO_REQUEST, Attention, AttentionMaps, AttentionRequest
from .layers import Downsample, InflatedGroupNorm, ResnetBlock, SpatialTransformer, Upsample
from .ops import Linear
from .temporal import MotionModule

EPS = 1e-5


class ControlNetResiduals(NamedTuple):
    """Output of SparseCtrl that is added to the UNet.

    Attributes:
        down: For each skip connection, (b*f, c, h, w).
        mid: For the output of the middle block, (b*f, c, h, w).
    """

    down: list[Tensor]
    mid: Tensor


class TimestepEmbedding(nn.Module):
    """Sinusoids of the timestep, [cos | sin], and two linear layers."""

    def __init__(self, channels: int, time_channels: int):
        """Create an embedding of `channels` sinusoids and `time_channels` outputs."""
        super().__init__()
        self.channels = channels
        self.linear_1 = Linear(channels, time_channels)
        self.linear_2 = Linear(time_channels, time_channels)

    def forward(self, t: Tensor) -> Tensor:
        """Return the embedding (b, time_channels) of timesteps t (b,)."""
        half = self.channels // 2
        rate = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000.0) / half))
        angle = t.float()[:, None] * rate
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.linear_2(F.silu(self.linear_1(wave.to(self.linear_1.weight.dtype))))


@dataclass(frozen=True)
class BlockInputs:
    """Inputs that every block receives besides its features.

    Attributes:
        time: Timestep embedding (b*f, time_channels).
        text: Text embeddings (b, m, cross_attention_dim).
        num_frames: Frames of each clip.
        request: Attention to return, by full layer name.
        gradient_checkpointing: Whether to recompute activations in the backward pass.
    """

    time: Tensor
    text: Tensor
    num_frames: int
    request: AttentionRequest = NO_REQUEST
    gradient_checkpointing: bool = False

    def maybe_checkpoint(self, module: Callable[..., Any], *args: Any) -> Any:
        """Return module(*args), with gradient checkpointing if it is enabled."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=False)
        return module(*args)


BlockOutput = tuple[Tensor, list[Tensor], AttentionMaps]    # features, skips, requested attention


class Block(nn.Module):
    """One resolution of the UNet: layers of residual block, spatial transformer, motion module.

    Every block takes features x (b*f, c, h, w) and the open skip connections, and returns both and
    the requested attention.
    """

    def __init__(self, config: UNetConfig, widths: list[tuple[int, int]],
                 has_cross_attention: bool, has_motion_modules: bool):
        """Create a block with a layer for each (input, output) width."""
        super().__init__()
        c_out, groups, heads = widths[0][1], config.norm_num_groups, config.num_attention_heads
        self.resnets = nn.ModuleList([
            ResnetBlock(c_in, c_out, groups, EPS, config.time_channels, config.inflated_groupnorm)
            for c_in, c_out in widths])
        self.attentions = nn.ModuleList([
            SpatialTransformer(c_out, heads, config.cross_attention_dim, groups)
            for _ in widths if has_cross_attention])
        self.motion_modules = nn.ModuleList([
            MotionModule(c_out, config.motion_num_attention_heads, groups,
                         config.motion_num_attention_blocks)
            for _ in widths if has_motion_modules])

    def run_layer(self, i: int, x: Tensor, inputs: BlockInputs) -> tuple[Tensor, AttentionMaps]:
        """Apply the residual block, the spatial transformer and the motion module of layer i."""
        x = inputs.maybe_checkpoint(self.resnets[i], x, inputs.time, inputs.num_frames)
        attention = AttentionMaps()
        if self.attentions:
            name = str(self.attentions[i].name)
            x, attention_probs = inputs.maybe_checkpoint(self.attentions[i], x, inputs.text,
                                                         name in inputs.request.cross)
            if attention_probs is not None:
                attention = AttentionMaps(cross={name: attention_probs},
                                          grids={name: (x.shape[2], x.shape[3])})
        if self.motion_modules:
            x, temporal = inputs.maybe_checkpoint(self.motion_modules[i], x, inputs.num_frames,
                                                  inputs.request)
            attention = attention | temporal
        return x, attention


class DownBlock(Block):
    """Block of the encoder; it adds one skip connection per layer."""

    def __init__(self, config: UNetConfig, level: int):
        """Create the block of one resolution; level 0 is the finest."""
        widths, last = config.block_out_channels, len(config.block_out_channels) - 1
        c_in, c_out = widths[max(level - 1, 0)], widths[level]
        super().__init__(config, [(c_in, c_out)] + [(c_out, c_out)] * (config.layers_per_block - 1),
                         level in config.cross_attention_levels, config.motion_modules)
        self.downsamplers = nn.ModuleList(
            [Downsample(c_out, pad_all_sides=True)] if level < last else [])

    def forward(self, x: Tensor, skips: list[Tensor], inputs: BlockInputs) -> BlockOutput:
        """Return the features, the skip connections and the requested attention."""
        attention = AttentionMaps()
        for i in range(len(self.resnets)):
            x, layer_attention = self.run_layer(i, x, inputs)
            skips, attention = [*skips, x], attention | layer_attention
        for downsample in self.downsamplers:
            x = downsample(x)
            skips = [*skips, x]
        return x, skips, attention


class UpBlock(Block):
    """Block of the decoder; each of its layers takes one skip connection."""

    def __init__(self, config: UNetConfig, level: int):
        """Create the block of one resolution; level 0 is the finest."""
        widths = config.block_out_channels
        is_lowest, n = level + 1 == len(widths), config.layers_per_block + 1
        c_out = widths[level]
        skips = [c_out] * (n - 1) + [widths[max(level - 1, 0)]]
        inputs = [c_out if is_lowest else widths[level + 1]] + [c_out] * (n - 1)
        super().__init__(config, [(c_in + skip, c_out) for c_in, skip in zip(inputs, skips,
                                                                           strict=True)],
                         level in config.cross_attention_levels, config.motion_modules)
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if level > 0 else [])

    def forward(self, x: Tensor, skips: list[Tensor], inputs: BlockInputs) -> BlockOutput:
        """Return the features, the remaining skip connections and the requested attention."""
        attention = AttentionMaps()
        for i in range(len(self.resnets)):
            x, layer_attention = self.run_layer(i, torch.cat([x, skips[-1]], dim=1), inputs)
            skips, attention = skips[:-1], attention | layer_attention
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[-2:])
        return x, skips, attention


class MidBlock(Block):
    """Middle block: one residual block before and one after the transformers."""

    def __init__(self, config: UNetConfig):
        """Create the block at the lowest resolution."""
        c = config.block_out_channels[-1]
        super().__init__(config, [(c, c)], has_cross_attention=True,
                         has_motion_modules=config.motion_mid_block)
        self.resnets.append(ResnetBlock(c, c, config.norm_num_groups, EPS, config.time_channels,
                                        config.inflated_groupnorm))

    def forward(self, x: Tensor, skips: list[Tensor], inputs: BlockInputs) -> BlockOutput:
        """Return the features, the skip connections as they were, and the requested attention."""
        x, attention = self.run_layer(0, x, inputs)
        x = inputs.maybe_checkpoint(self.resnets[1], x, inputs.time, inputs.num_frames)
        return x, skips, attention


class UNet3D(nn.Module):
    """Noise predictor for clips.

    Attributes:
        block_names: Names of the blocks, in the order in which they run.
        layers: (full name, layer) of every attention layer, in the order in which they run.
    """

    def __init__(self, config: UNetConfig):
        """Create a UNet with random weights."""
        super().__init__()
        self.config = config
        widths, levels = config.block_out_channels, range(len(config.block_out_channels))
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], config.time_channels)
        self.down_blocks = nn.ModuleList([DownBlock(config, level) for level in levels])
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList([UpBlock(config, level) for level in reversed(levels)])
        self.conv_norm_out = InflatedGroupNorm(config.norm_num_groups, widths[0], EPS,
                                               config.inflated_groupnorm)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

        self.block_names = (*(f"down_blocks.{i}" for i in levels), "mid_block",
                            *(f"up_blocks.{i}" for i in levels))
        self.layers = [(name, module) for block in self.block_names
                       for name, module in self.get_submodule(block).named_modules(prefix=block)
                       if isinstance(module, Attention)]
        for name, module in self.layers:
            module.name = name

    def resolve_layers(self, request: AttentionRequest) -> AttentionRequest:
        """Return the request with full layer names, in the order in which the layers run.

        Raises:
            InputError: If a name matches no attention layer of its kind.
        """
        temporal = [name for name, _ in self.layers if ".motion_modules." in name]
        cross = [name for name, _ in self.layers if name.endswith(".attn2")]
        return AttentionRequest(
            match_layers(request.temporal, temporal, "temporal attention"),
            match_layers(request.temporal_keys, temporal, "temporal attention"),
            match_layers(request.cross, cross, "cross-attention"))

    def forward(self, z: Tensor, t: Tensor | int, text: Tensor, *,
                request: AttentionRequest = NO_REQUEST,
                residuals: ControlNetResiduals | None = None,
                gradient_checkpointing: bool = False) -> tuple[Tensor, AttentionMaps]:
        """Return the noise estimate and the requested attention.

        Gradients flow back from the requested attention. Blocks after the last requested one run
        without a graph, unless the UNet is in training mode.

        Args:
            z: Noisy latents (b, c, f, h, w).
            t: Timestep, one for all clips or (b,), 0 to 999.
            text: Text embeddings (b, 77, cross_attention_dim).
            request: Blocks, modules or layers whose attention is returned.
            residuals: Output of SparseCtrl.
            gradient_checkpointing: Whether to store only the inputs of each module and recompute
                the rest in the backward pass: the same numbers with less memory.

        Returns:
            The noise estimate, like z, and the attention maps.

        Raises:
            InputError: If a name of the request matches no layer, or the clip has more frames
                than the motion modules were trained on.
        """
        inputs, x, needed = self.embed_inputs(z, t, text, request, gradient_checkpointing)
        x, skips, attention = self.run_blocks(self.block_names[:needed], x, [x], inputs, residuals)
        with torch.set_grad_enabled(torch.is_grad_enabled() and (not needed or self.training)):
            x, skips, _ = self.run_blocks(self.block_names[needed:], x, skips, inputs, residuals)
            eps = self.conv_out(F.silu(self.conv_norm_out(x, inputs.num_frames)))
        return rearrange(eps, "(b f) c h w -> b c f h w", f=inputs.num_frames), attention

    def forward_to_attention(self, z: Tensor, t: Tensor | int, text: Tensor,
                             request: AttentionRequest,
                             residuals: ControlNetResiduals | None = None) -> AttentionMaps:
        """Return the requested attention from a pass that stops at the last requested block.

        Args and errors are those of `forward`.
        """
        inputs, x, needed = self.embed_inputs(z, t, text, request, gradient_checkpointing=False)
        return self.run_blocks(self.block_names[:needed], x, [x], inputs, residuals)[2]

    def embed_inputs(self, z: Tensor, t: Tensor | int, text: Tensor, request: AttentionRequest,
                     gradient_checkpointing: bool) -> tuple[BlockInputs, Tensor, int]:
        """Return the blocks' inputs, the first features and the number of blocks to be read."""
        num_frames = z.shape[2]
        if self.config.motion_modules and num_frames > self.config.motion_max_seq_length:
            raise InputError(f"num_frames = {num_frames} is out of range: this model's motion "
                             f"modules see at most {self.config.motion_max_seq_length} frames")
        request = self.resolve_layers(request)
        needed = max([0, *(i + 1 for i, block in enumerate(self.block_names)
                           for layer in chain(*request) if layer.startswith(block + "."))])
        t = torch.as_tensor(t, device=z.device).expand(z.shape[0])
        time = repeat(self.time_embedding(t), "b c -> (b f) c", f=num_frames)
        x = self.conv_in(rearrange(z, "b c f h w -> (b f) c h w"))
        return BlockInputs(time, text, num_frames, request, gradient_checkpointing), x, needed

    def run_blocks(self, blocks: Sequence[str], x: Tensor, skips: list[Tensor],
                   inputs: BlockInputs, residuals: ControlNetResiduals | None) -> BlockOutput:
        """Run consecutive blocks and return features, skip connections and attention."""
        attention = AttentionMaps()
        for name in blocks:
            x, skips, block_attention = self.get_submodule(name)(x, skips, inputs)
            attention = attention | block_attention
            if name == "mid_block" and residuals is not None:
                skips = [s + r for s, r in zip(skips, residuals.down, strict=True)]
                x = x + residuals.mid
        return x, skips, attention


def match_layers(requested: Sequence[str], layers: list[str], kind: str) -> tuple[str, ...]:
    """Return the layers whose names equal or start with a requested name."""
    matches = {name: [layer for layer in layers if f"{layer}.".startswith(name + ".")]
               for name in requested}
    for name, matched in matches.items():
        if not matched:
            blocks = dict.fromkeys(re.sub(r"\.(motion_modules|attentions)\..*", "", layer)
                                   for layer in layers)
            raise InputError(f"{name!r} has no {kind} layers: this model has them in "
                             f"{', '.join(blocks)}")
    return tuple(layer for layer in layers
                 if any(layer in matched for matched in matches.values()))
