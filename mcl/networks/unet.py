"""The 3-D UNet: Stable Diffusion 1.5 applied to every frame, with a motion module in each layer.

`UNet3D(z, t, text, request=AttentionRequest(temporal=("up_blocks.1",)))` returns the noise estimate
and the requested attention. Module names are those of AnimateDiff's checkpoints.
"""
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import UNetConfig
from ..errors import InputError
from .attention import NO_REQUEST, Attention, AttentionMaps, AttentionRequest, LayerOutput
from .layers import Downsample, InflatedGroupNorm, ResnetBlock, SpatialTransformer, Upsample
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

    def __init__(self, channels: int):
        """Create an embedding of `channels` sinusoids and four times as many outputs."""
        super().__init__()
        self.linear_1 = nn.Linear(channels, 4 * channels)
        self.linear_2 = nn.Linear(4 * channels, 4 * channels)

    def forward(self, t: Tensor | int, clip: Tensor) -> Tensor:
        """Return the embedding (b*f, time_channels) of timestep t for a clip (b, c, f, h, w)."""
        half = self.linear_1.in_features // 2
        rate = torch.exp(torch.arange(half, device=clip.device) * (-math.log(10000.0) / half))
        angle = torch.as_tensor(t, device=clip.device).float().expand(len(clip))[:, None] * rate
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.linear_1.weight.dtype)
        return repeat(self.linear_2(F.silu(self.linear_1(wave))), "b c -> (b f) c", f=clip.shape[2])


class BlockInputs(NamedTuple):
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

    def run(self, module: nn.Module, *args: Any) -> Any:
        """Return module(*args), with gradient checkpointing if it is enabled."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=False)
        return module(*args)


BlockOutput = tuple[Tensor, list[Tensor], AttentionMaps]    # features, skips, requested attention


def resnet_block(config: UNetConfig, c_in: int, c_out: int) -> ResnetBlock:
    """Return a residual block of the UNet, from `c_in` to `c_out` channels."""
    return ResnetBlock(c_in, c_out, config.norm_num_groups, EPS, 4 * config.block_out_channels[0],
                       config.inflated_groupnorm)


class Block(nn.Module):
    """One resolution of the UNet: layers of residual block, spatial transformer, motion module.

    Every block takes features x (b*f, c, h, w) and the open skip connections, and returns both and
    the requested attention.
    """

    def __init__(self, config: UNetConfig, level: int, c_ins: list[int], is_middle: bool = False):
        """Create a block of one resolution, with a layer for each number of input channels."""
        super().__init__()
        c = config.block_out_channels[level]
        has_cross = is_middle or level in config.cross_attention_levels
        has_motion = config.motion_mid_block if is_middle else config.motion_modules
        self.resnets = nn.ModuleList(resnet_block(config, c_in, c) for c_in in c_ins)
        self.attentions = nn.ModuleList(SpatialTransformer(c, config) for _ in c_ins if has_cross)
        self.motion_modules = nn.ModuleList(MotionModule(c, config) for _ in c_ins if has_motion)

    def run_layer(self, i: int, x: Tensor, inputs: BlockInputs) -> LayerOutput:
        """Apply the residual block, the spatial transformer and the motion module of layer i."""
        x = inputs.run(self.resnets[i], x, inputs.time, inputs.num_frames)
        attention = AttentionMaps()
        if self.attentions:
            x, attention = inputs.run(self.attentions[i], x, inputs.text, inputs.request)
        if self.motion_modules:
            x, temporal = inputs.run(self.motion_modules[i], x, inputs.num_frames, inputs.request)
            attention = attention | temporal
        return x, attention


class DownBlock(Block):
    """Block of the encoder; it adds one skip connection per layer."""

    def __init__(self, config: UNetConfig, level: int):
        """Create the block of one resolution; level 0 is the finest."""
        widths, num_layers = config.block_out_channels, config.layers_per_block
        c_in, c_out = (widths[0], *widths)[level:level + 2]
        super().__init__(config, level, [c_in] + [c_out] * (num_layers - 1))
        self.downsamplers = nn.ModuleList([Downsample(c_out)] if level + 1 < len(widths) else [])

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
        widths, num_layers = config.block_out_channels, config.layers_per_block + 1
        c_finer, c_out, c_coarser = (widths[0], *widths, widths[-1])[level:level + 3]
        # Each layer takes the features and a skip connection. The last one is of the finer level.
        c_ins = [c_coarser + c_out] + [c_out + c_out] * (num_layers - 2) + [c_out + c_finer]
        super().__init__(config, level, c_ins)
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
        super().__init__(config, -1, [c], is_middle=True)
        self.resnets.append(resnet_block(config, c, c))

    def forward(self, x: Tensor, skips: list[Tensor], inputs: BlockInputs) -> BlockOutput:
        """Return the features, the skip connections as they were, and the requested attention."""
        x, attention = self.run_layer(0, x, inputs)
        x = inputs.run(self.resnets[1], x, inputs.time, inputs.num_frames)
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
        self.time_embedding = TimestepEmbedding(widths[0])
        self.down_blocks = nn.ModuleList([DownBlock(config, level) for level in levels])
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList([UpBlock(config, level) for level in reversed(levels)])
        self.conv_norm_out = InflatedGroupNorm(config.norm_num_groups, widths[0], EPS,
                                               config.inflated_groupnorm)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

        self.block_names = tuple(name for name, m in self.named_modules() if isinstance(m, Block))
        self.layers = [(name, m) for name, m in self.named_modules() if isinstance(m, Attention)]
        for name, module in self.layers:
            module.name = name

    def resolve_layers(self, request: AttentionRequest) -> AttentionRequest:
        """Return the request with full layer names, in the order in which the layers run.

        Raises:
            InputError: If a name matches no attention layer of its kind.
        """
        temporal = [name for name, _ in self.layers if ".motion_modules." in name]
        cross = [name for name, _ in self.layers if name.endswith(".attn2")]
        kinds = ("temporal attention", "temporal attention", "cross-attention")
        return AttentionRequest(*map(self.match_layers, request, [temporal] * 2 + [cross], kinds))

    def match_layers(self, names: tuple[str, ...], layers: list[str], kind: str) -> tuple[str, ...]:
        """Return the layers that the names of blocks, modules or layers stand for, in order."""
        for name in names:
            if not any(f"{layer}.".startswith(f"{name}.") for layer in layers):
                blocks = [block for block in self.block_names
                          if any(layer.startswith(f"{block}.") for layer in layers)]
                raise InputError(f"{name!r} has no {kind} layers: choose from {', '.join(blocks)}")
        prefixes = tuple(f"{name}." for name in names)
        return tuple(layer for layer in layers if f"{layer}.".startswith(prefixes))

    def forward(self, z: Tensor, t: Tensor | int, text: Tensor, *,
                request: AttentionRequest = NO_REQUEST, gradient_checkpointing: bool = False,
                residuals: ControlNetResiduals | None = None) -> tuple[Tensor, AttentionMaps]:
        """Return the noise estimate and the requested attention.

        Gradients flow back from the requested attention. Blocks after the last requested one run
        without a graph, unless the UNet is in training mode.

        Args:
            z: Noisy latents (b, c, f, h, w).
            t: Timestep, one for all clips or (b,), 0 to 999.
            text: Text embeddings (b, 77, cross_attention_dim).
            request: Blocks, modules or layers whose attention is returned.
            gradient_checkpointing: Whether to store only the inputs of each module and recompute
                the rest in the backward pass: the same numbers with less memory.
            residuals: Output of SparseCtrl.

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
        needed = max([0, *(i + 1 for i, block in enumerate(self.block_names) for names in request
                           for layer in names if layer.startswith(block + "."))])
        time = self.time_embedding(t, z)
        x = self.conv_in(rearrange(z, "b c f h w -> (b f) c h w"))
        return BlockInputs(time, text, num_frames, request, gradient_checkpointing), x, needed

    def run_blocks(self, blocks: tuple[str, ...], x: Tensor, skips: list[Tensor],
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
