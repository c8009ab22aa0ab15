"""Compare the time of one forward pass with that of diffusers' UNetMotionModel.

    python tests/benchmarks/diffusers_comparison.py --repeat 3

Both have the same random weights at the width of Stable Diffusion 1.5 (together 10 GB of float32),
and run in turns on 16 frames of 256x256 pixels.
"""
import argparse
import sys
from pathlib import Path

import torch

if not __package__:     # run as a file
    sys.path.insert(0, str(Path(__file__).parents[2]))

from mcl.cli.process import OneLineErrorParser, exit_code_of, run_main
from mcl.config import ModelConfig, SampleConfig
from tests.benchmarks.step_cost import TIMESTEP, median_seconds, random_model
from tests.networks.diffusers_oracle import diffusers_noise, diffusers_unet


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    """Measure both UNets and print their times."""
    config, device = ModelConfig(), torch.device("cpu")
    model = random_model(config, device, torch.float32)
    z = torch.randn(config.latent_shape(SampleConfig(height=256, width=256)))
    oracle = diffusers_unet(model.unet, config.unet)
    text = torch.randn(1, 77, config.unet.cross_attention_dim)
    passes = {"mcl": lambda: model.unet(z, TIMESTEP, text),
              "diffusers": lambda: diffusers_noise(oracle, z, TIMESTEP, text)}
    median_seconds(passes, device, 1)                       # the first is slower
    medians = median_seconds(passes, device, args.repeat)
    print(f"medians: {medians}\nratio: {medians['mcl'] / medians['diffusers']:.2f}")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    p = OneLineErrorParser(prog="tests/benchmarks/diffusers_comparison.py",
                           description="Compare the time of a forward pass with diffusers.")
    p.add_argument("--repeat", type=int, default=3, help="number of passes for the median time")
    return exit_code_of(lambda: run(p.parse_args(argv)))


if __name__ == "__main__":
    run_main(main)
