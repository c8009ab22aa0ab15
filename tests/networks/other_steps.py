"""Steps of other projects' UNets with the size of a model, to compare their cost."""
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mcl import Model, SampleConfig

TIMESTEP, NUM_TOKENS = 800, 77          # all timesteps cost the same


def diffusers_steps(model: Model, config: SampleConfig, steps: dict[str, Any]) -> dict[str, Any]:
    """Return the forward pass of a model's UNet, and that of diffusers' UNetMotionModel."""
    from .diffusers_oracle import diffusers_noise, diffusers_unet

    with torch.device(model.device):
        oracle = diffusers_unet(model.unet, model.config.unet).to(model.dtype)
    z, text = inputs(model, config)
    passes = {"forward pass": lambda: model.unet(z, TIMESTEP, text),
              "diffusers' pass": lambda: diffusers_noise(oracle, z, TIMESTEP, text)}
    return {name: torch.no_grad()(action) for name, action in passes.items()}


def published_steps(folder: Path, model: Model, config: SampleConfig, steps: dict[str, Any]
                    ) -> dict[str, Any]:
    """Return a model's steps and those of the published code, a folder with motionclone/.

    As there, an unguided step is one pass with both texts, and a guided step two passes with one
    text each. Its attention is that of torch, not of xformers.
    """
    sys.path.insert(0, str(folder))
    from motionclone.models.unet import UNet3DConditionModel
    from motionclone.utils import motionclone_functions, xformer_attention

    blocks, levels = list(config.guidance_blocks), len(model.config.unet.block_out_channels) - 1
    with torch.device(model.device):
        unet = UNet3DConditionModel(
            **{name: getattr(model.config.unet, name) for name in (
                "block_out_channels", "layers_per_block", "norm_num_groups",
                "cross_attention_dim")},
            attention_head_dim=model.config.unet.num_attention_heads,
            down_block_types=("CrossAttnDownBlock3D",) * levels + ("DownBlock3D",),
            up_block_types=("UpBlock3D",) + ("CrossAttnUpBlock3D",) * levels,
            use_inflated_groupnorm=True, use_motion_module=True, motion_module_type="Vanilla",
            motion_module_resolutions=[1, 2, 4, 8], motion_module_kwargs={
                "num_attention_heads": model.config.unet.motion_num_attention_heads,
                "num_transformer_block": 1, "temporal_attention_dim_div": 1,
                "attention_block_types": ["Temporal_Self"] * 2, "temporal_position_encoding": True})
    unet = unet.to(model.dtype).requires_grad_(False).eval()
    xformer_attention.prep_unet_attention(unet, blocks)
    pipeline = SimpleNamespace(unet=unet, input_config=SimpleNamespace(
        motion_guidance_blocks=blocks))
    z, text = inputs(model, config)

    @torch.no_grad()
    def unguided() -> None:
        unet(z.expand(2, -1, -1, -1, -1), TIMESTEP, encoder_hidden_states=text.expand(2, -1, -1))

    def guided() -> None:
        with torch.no_grad():
            unet(z, TIMESTEP, encoder_hidden_states=text)
        x = z.clone().requires_grad_()
        unet(x, TIMESTEP, encoder_hidden_states=text)
        maps = motionclone_functions.get_temp_attn_prob(pipeline).values()
        torch.autograd.grad(sum(probs.amax(dim=-1).square().mean() for probs in maps), x)

    return {**steps, "published unguided step": unguided, "published guided step": guided}


def inputs(model: Model, config: SampleConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random latents (1, c, f, h, w) and text embeddings (1, 77, d)."""
    shapes = (model.config.latent_shape(config),
              (1, NUM_TOKENS, model.config.unet.cross_attention_dim))
    z, text = (torch.randn(shape, device=model.device, dtype=model.dtype) for shape in shapes)
    return z, text
