"""Compare the time of one forward pass with that of diffusers' UNetMotionModel.

    python tests/benchmarks/diffusers_comparison.py --size 256 --frames 16 --repeat 3

Both have the same random weights at the width of Stable Diffusion 1.5 (together 10 GB of float32),
and run in turns.
"""
import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import UNetMotionModel
from einops import repeat
from torch import Tensor

if not __package__:     # run as a file
    sys.path.insert(0, str(Path(__file__).parents[2]))

from mcl.cli.process import OneLineErrorParser, exit_code_of, run_main
from mcl.config import ModelConfig, SampleConfig, UNetConfig
from mcl.networks.unet import UNet3D
from tests.benchmarks.step_cost import TIMESTEP, random_model, time_call


def diffusers_name(name: str) -> str:
    """Return diffusers' name of a weight."""
    renames = {".temporal_transformer": "", "attention_blocks.0": "attn1", "norms.0": "norm1",
               "attention_blocks.1": "attn2", "norms.1": "norm2", "ff_norm": "norm3"}
    for old, new in renames.items() if "motion_modules" in name else ():
        name = name.replace(old, new)
    return name


def diffusers_unet(unet: UNet3D, config: UNetConfig) -> Any:
    """Return diffusers' UNet with the weights of a UNet."""
    levels = len(config.block_out_channels) - 1             # with cross-attention
    oracle: Any = UNetMotionModel(
        down_block_types=("CrossAttnDownBlockMotion",) * levels + ("DownBlockMotion",),
        up_block_types=("UpBlockMotion",) + ("CrossAttnUpBlockMotion",) * levels,
        use_motion_mid_block=config.motion_mid_block, **{name: getattr(config, name) for name in (
            "block_out_channels", "layers_per_block", "norm_num_groups", "cross_attention_dim",
            "num_attention_heads", "motion_num_attention_heads", "motion_max_seq_length")})
    tables = {name: v for name, v in oracle.state_dict().items() if name.endswith("pos_embed.pe")}
    oracle.load_state_dict({diffusers_name(k): v for k, v in unet.state_dict().items()} | tables)
    return oracle.requires_grad_(False).eval()


@torch.no_grad()
def diffusers_noise(oracle: Any, z: Tensor, t: int, text: Tensor) -> Tensor:
    """Return diffusers' noise estimate for latents z (b, c, f, h, w) and text (b, n, d)."""
    noise: Tensor = oracle(z, t, repeat(text, "b n d -> (b f) n d", f=z.shape[2])).sample
    return noise


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    """Measure both UNets and print their times."""
    config, device = ModelConfig(), torch.device("cpu")
    settings = SampleConfig(num_frames=args.frames, height=args.size, width=args.size)
    model = random_model(config, device, torch.float32)
    z = torch.randn(model.latent_shape(settings))
    oracle = diffusers_unet(model.unet, config.unet)
    text = torch.randn(1, config.text_encoder.max_position_embeddings,
                       config.unet.cross_attention_dim)
    passes = {"mcl": lambda: model.unet(z, TIMESTEP, text),
              "diffusers": lambda: diffusers_noise(oracle, z, TIMESTEP, text)}
    rounds = [{name: time_call(action, device) for name, action in passes.items()}
              for _ in range(args.repeat + 1)][1:]          # the first is slower
    medians = {name: statistics.median(times[name] for times in rounds) for name in passes}
    print(f"seconds in turns: {rounds}\nmedians: {medians}\n"
          f"ratio: {medians['mcl'] / medians['diffusers']:.2f}")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    p = OneLineErrorParser(prog="tests/benchmarks/diffusers_comparison.py",
                           description="Compare the time of a forward pass with diffusers.")
    for name, default in (("--size", 256), ("--frames", 16), ("--repeat", 3)):
        p.add_argument(name, type=int, default=default)
    return exit_code_of(lambda: run(p.parse_args(argv)))


if __name__ == "__main__":
    run_main(main)
