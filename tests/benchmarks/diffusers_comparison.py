"""The time of one forward pass beside that of diffusers' UNetMotionModel, taken in turns.

    python -m tests.benchmarks.diffusers_comparison [--size 256] [--frames 16] [--repeat 3]

Both have the same random weights at Stable Diffusion 1.5's full width (10 GB of float32 together).
"""
import argparse
import statistics
import time
from typing import Any

import torch
from diffusers import UNetMotionModel
from einops import repeat
from torch import Tensor

from mcl.cli import OneLineErrorParser, exit_code_of, run_main
from mcl.config import SD15, SampleConfig, UNetConfig
from mcl.errors import InputError
from mcl.networks.unet import UNet3D
from tests.benchmarks.step_cost import random_model


def diffusers_name(name: str) -> str:
    """What diffusers calls a weight of ours."""
    renames = {".temporal_transformer": "", "attention_blocks.0": "attn1", "norms.0": "norm1",
               "attention_blocks.1": "attn2", "norms.1": "norm2", "ff_norm": "norm3"}
    for old, new in renames.items() if "motion_modules" in name else ():
        name = name.replace(old, new)
    return name


def diffusers_unet(ours: UNet3D, config: UNetConfig) -> Any:
    """diffusers' own, with our weights."""
    attending = len(config.block_out_channels) - 1
    oracle: Any = UNetMotionModel(
        down_block_types=("CrossAttnDownBlockMotion",) * attending + ("DownBlockMotion",),
        up_block_types=("UpBlockMotion",) + ("CrossAttnUpBlockMotion",) * attending,
        block_out_channels=config.block_out_channels, layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups, cross_attention_dim=config.cross_attention_dim,
        num_attention_heads=config.num_attention_heads, motion_num_attention_heads=config.motion_num_attention_heads,
        motion_max_seq_length=config.motion_max_seq_length, use_motion_mid_block=config.motion_mid_block)
    tables = {name: v for name, v in oracle.state_dict().items() if name.endswith("pos_embed.pe")}
    oracle.load_state_dict({diffusers_name(k): v for k, v in ours.state_dict().items()} | tables)
    return oracle.requires_grad_(False).eval()


def oracle_noise(oracle: Any, z: Tensor, t: int, text: Tensor) -> Tensor:
    noise: Tensor = oracle(z, t, repeat(text, "b m c -> (b f) m c", f=z.shape[2])).sample
    return noise


def main(argv: list[str] | None = None) -> int:
    p = OneLineErrorParser(prog="-m tests.benchmarks.diffusers_comparison", description=__doc__.splitlines()[0])
    p.add_argument("--size", type=int, default=256)
    p.add_argument("--frames", type=int, default=16)
    p.add_argument("--repeat", type=int, default=3)
    return exit_code_of(lambda: run(p.parse_args(argv)))


def run(args: argparse.Namespace) -> None:
    SampleConfig(num_frames=args.frames, height=args.size)      # refuses what is below 1
    if args.repeat < 1 or args.size % SD15.vae.downsampling or (
            args.frames > SD15.unet.motion_max_seq_length):
        raise InputError(f"--size is a multiple of {SD15.vae.downsampling}, --frames at most "
                         f"{SD15.unet.motion_max_seq_length}, --repeat 1 or more")
    ours = random_model(SD15, torch.device("cpu"), torch.float32).unet
    theirs = diffusers_unet(ours, SD15.unet)
    side = args.size // SD15.vae.downsampling
    z = torch.randn(1, SD15.unet.in_channels, args.frames, side, side)
    text = torch.randn(1, SD15.text_encoder.max_position_embeddings, SD15.unet.cross_attention_dim)
    passes = {"mcl": lambda: ours(z, 500, text)[0],
              "diffusers": lambda: oracle_noise(theirs, z, 500, text)}
    times: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(args.repeat + 1):
        for name, run in passes.items():
            began = time.perf_counter()
            with torch.no_grad():
                run()
            if turn:                    # the first is warm-up
                times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    for name, taken in times.items():
        print(f"{name}: {medians[name]:.2f} s, of {', '.join(f'{s:.2f}' for s in taken)}")
    print(f"ratio {medians['mcl'] / medians['diffusers']:.2f}")


if __name__ == "__main__":
    run_main(main)
