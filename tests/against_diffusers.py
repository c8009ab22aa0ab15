"""The time of one forward pass beside that of diffusers' UNetMotionModel, taken in turns.

    python -m tests.against_diffusers [--size 256] [--frames 16] [--repeat 3]

Both have the same random weights at Stable Diffusion 1.5's full width (10 GB of float32 together).
"""
import argparse
import statistics
import time

import torch

from mcl.bench import random_model
from mcl.config import SD15

from .test_oracles import diffusers_unet, oracle_noise


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--size", type=int, default=256)
    p.add_argument("--frames", type=int, default=16)
    p.add_argument("--repeat", type=int, default=3)
    args = p.parse_args()
    ours = random_model(SD15, torch.device("cpu"), torch.float32).unet
    theirs = diffusers_unet(ours, SD15.unet)
    side = args.size // SD15.vae.downsampling
    z = torch.randn(1, SD15.unet.in_channels, args.frames, side, side)
    text = torch.randn(1, SD15.text.max_length, SD15.unet.text_channels)
    passes = {"mcl": lambda: ours(z, 500, text)[0],
              "diffusers": lambda: oracle_noise(theirs, z, 500, text)}
    times = {name: [] for name in passes}
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
    main()
