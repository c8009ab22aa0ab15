"""Compare the time of one forward pass with that of diffusers' UNetMotionModel.

    python tests/benchmarks/diffusers_comparison.py --size 256 --frames 16 --repeat 3

Both have the same random weights at the width of Stable Diffusion 1.5 (together 10 GB of float32),
and run in turns.
"""
import argparse
import statistics
import sys
from pathlib import Path

import torch

if not __package__:     # run as a file
    sys.path.insert(0, str(Path(__file__).parents[2]))

from mcl.cli.process import OneLineErrorParser, exit_code_of, run_main
from mcl.config import ModelConfig, SampleConfig
from tests.benchmarks.step_cost import TIMESTEP, random_model, time_call
from tests.networks.diffusers_oracle import diffusers_noise, diffusers_unet


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    """Measure both UNets and print their times."""
    config, device = ModelConfig(), torch.device("cpu")
    settings = SampleConfig(num_frames=args.frames, height=args.size, width=args.size)
    model = random_model(config, device, torch.float32)
    z = torch.randn(model.config.latent_shape(settings))
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
