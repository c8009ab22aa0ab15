"""diffusers' networks with this project's weights and AnimateDiff's group norms, for comparison."""
import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from mcl.config import UNetConfig
from mcl.networks.unet import UNet3D
from tests.lazy import LazyModule

motion_unet = LazyModule("diffusers.models.unets.unet_motion_model")


def max_error(actual, expected):
    """Return the largest difference, in standard deviations of the expected values."""
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.std())


def relative_error(actual, expected):
    """Return the norm of the difference, relative to the norm of the expected values."""
    return float((actual - expected).norm() / expected.norm())


class PerFrameNorm(nn.Module):
    """Group norm of each frame of x (b, c, f, h, w); diffusers' own normalizes whole clips."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return torch.stack([self.norm(frame) for frame in x.unbind(dim=2)], dim=2)


class WholeClipNorm(nn.Module):
    """Group norm of x (b*f, c, h, w) by its definition, with the statistics of each whole clip."""

    def __init__(self, norm, batch):
        super().__init__()
        self.norm, self.batch = norm, batch

    def forward(self, x):
        group_dims = dict(dim=(1, 3, 4, 5), keepdim=True)
        y = rearrange(x, "(b f) (g c) h w -> b f g c h w", b=self.batch, g=self.norm.num_groups)
        y = y - y.mean(**group_dims)
        y = y / (y.square().mean(**group_dims) + self.norm.eps).sqrt()
        y = rearrange(y, "b f g c h w -> (b f) (g c) h w")
        return y * self.norm.weight[:, None, None] + self.norm.bias[:, None, None]


def use_animatediff_norms(network, inflated_groupnorm=True, batch=2):
    """Give diffusers' network the group norms of AnimateDiff's v3 modules, or of its v1 modules."""
    for module in list(network.modules()):
        if isinstance(module, motion_unet.AnimateDiffTransformer3D):
            module.norm = PerFrameNorm(module.norm)
        elif isinstance(module, motion_unet.ResnetBlock2D) and not inflated_groupnorm:
            module.norm1 = WholeClipNorm(module.norm1, batch)
            module.norm2 = WholeClipNorm(module.norm2, batch)
    if not inflated_groupnorm:
        network.conv_norm_out = WholeClipNorm(network.conv_norm_out, batch)
    return network.requires_grad_(False).eval()


def diffusers_name(name: str) -> str:
    """Return diffusers' name of a weight."""
    renames = {".temporal_transformer": "", "attention_blocks.0": "attn1", "norms.0": "norm1",
               "attention_blocks.1": "attn2", "norms.1": "norm2", "ff_norm": "norm3"}
    for old, new in renames.items() if "motion_modules" in name else ():
        name = name.replace(old, new)
    return name


def load_into_diffusers(oracle: nn.Module, network: nn.Module) -> nn.Module:
    """Copy a network's weights to diffusers' network; its position tables stay as they are."""
    tables = {name: v for name, v in oracle.state_dict().items() if name.endswith("pos_embed.pe")}
    oracle.load_state_dict({diffusers_name(k): v for k, v in network.state_dict().items()} | tables)
    return oracle.requires_grad_(False).eval()


def diffusers_unet(unet: UNet3D, config: UNetConfig) -> nn.Module:
    """Return diffusers' UNetMotionModel with the weights of a UNet."""
    levels = len(config.block_out_channels) - 1             # with cross-attention
    oracle = motion_unet.UNetMotionModel(
        down_block_types=("CrossAttnDownBlockMotion",) * levels + ("DownBlockMotion",),
        up_block_types=("UpBlockMotion",) + ("CrossAttnUpBlockMotion",) * levels,
        use_motion_mid_block=config.motion_mid_block, **{name: getattr(config, name) for name in (
            "block_out_channels", "layers_per_block", "norm_num_groups", "cross_attention_dim",
            "num_attention_heads", "motion_num_attention_heads", "motion_max_seq_length")})
    return load_into_diffusers(oracle, unet)


def diffusers_noise(oracle: nn.Module, z: Tensor, t: int | Tensor, text: Tensor) -> Tensor:
    """Return the noise estimate of diffusers' UNet."""
    noise: Tensor = oracle(z, t, repeat(text, "b m c -> (b f) m c", f=z.shape[2])).sample
    return noise
