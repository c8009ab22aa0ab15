"""How the cost of a step grows with frames and size: measured where that is quick, else reckoned.

    python -m tests.benchmarks.growth [--config sd15] [--frames 8 16 24 32] [--sizes 256 384 512 768]

Frames are varied at the first size, sizes at 16 frames. The arithmetic is counted at every size,
without doing it; what would take longer than --seconds, or would not fit, is reckoned from the
largest that was measured: time by the arithmetic, memory by the number of latent elements.
"""
import argparse
import dataclasses
import importlib.util
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.benchmarks.step_cost import CONFIGS, Flops, peak_bytes, random_model, seconds, steps_of
from mcl.checkpoints.model_file import build_on_meta
from mcl.cli import OneLineErrorParser, exit_code_of, run_main
from mcl.config import ModelConfig, SampleConfig
from mcl.errors import InputError
from mcl.files import atomic_write, check_writable
from mcl.device import (DTYPES, free_memory, guided_bytes, disable_malloc_trimming, resolve_device,
                       resolve_dtype)
from mcl.model import Model
from mcl.networks.unet import UNet3D

KINDS = ("unguided step", "guided step")
FRAMES = 16                             # at which sizes are varied


@dataclasses.dataclass(frozen=True)
class Cost:
    frames: int
    size: int                           # of the square picture, in pixels
    flops: dict[str, int]               # of each of KINDS, as all that follows
    seconds: dict[str, float]
    peak: dict[str, float | None]       # bytes beside the weights; None where it cannot be told
    measured: bool

    @property
    def elements(self) -> int:
        return self.frames * self.size ** 2


def counted(config: ModelConfig, settings: SampleConfig) -> dict[str, int]:
    """The arithmetic of each kind of step, by tensors that have shapes but no values."""
    totals = {}
    with FakeTensorMode():
        model = build_on_meta(config)
        model.unet = UNet3D(config.unet).requires_grad_(False).eval()
        steps = steps_of(model, settings, gradient_checkpointing=False)
        for kind in KINDS:
            with Flops() as counter:
                steps[kind]()
            totals[kind] = counter.total
    return totals


def fits(model: Model, settings: SampleConfig) -> bool:
    free = free_memory(model.device)
    return free is None or guided_bytes(model, settings) < 0.9 * free


def measured(model: Model, settings: SampleConfig, flops: dict[str, int]) -> Cost:
    steps = steps_of(model, settings, gradient_checkpointing=False)
    peak = {kind: peak_bytes(steps[kind], model.device) for kind in KINDS}      # and warm
    taken = {kind: seconds(steps[kind], model.device) for kind in KINDS}
    return Cost(settings.num_frames, settings.width, flops, taken, dict(peak), True)


def reckoned(settings: SampleConfig, flops: dict[str, int], by: Cost) -> Cost:
    more = settings.num_frames * settings.width ** 2 / by.elements
    peak = {kind: None if had is None else had * more for kind, had in by.peak.items()}
    taken = {kind: by.seconds[kind] * flops[kind] / by.flops[kind] for kind in KINDS}
    return Cost(settings.num_frames, settings.width, flops, taken, peak, False)


def cost_table(costs: list[Cost]) -> str:
    lines = ["| frames | size | TFLOP, unguided | guided | seconds, unguided | guided | ratio | "
             "peak GB, unguided | guided | |", "|---" * 10 + "|"]
    for c in costs:
        plain, guided = (c.seconds[kind] for kind in KINDS)
        peaks = ["?" if p is None else f"{p / 1e9:.2f}" for p in (c.peak[kind] for kind in KINDS)]
        cells = [str(c.frames), f"{c.size}x{c.size}",
                 *(f"{c.flops[kind] / 1e12:.3g}" for kind in KINDS), f"{plain:.3g}",
                 f"{guided:.3g}", f"{guided / plain:.2f}", *peaks,
                 "measured" if c.measured else "reckoned"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(costs: list[Cost], first_size: int, path: Path) -> None:
    """Seconds over frames and over pixels; hollow marks are reckoned. Needs matplotlib."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots(1, 2)
    over_frames = [c for c in costs if c.size == first_size]
    over_pixels = [c for c in costs if c.frames == FRAMES]
    for axis, some, xs, label in (
            (axes[0], over_frames, [c.frames for c in over_frames],
             f"frames, {first_size}x{first_size}"),
            (axes[1], over_pixels, [c.size ** 2 / 1e6 for c in over_pixels],
             f"megapixels, {FRAMES} frames")):
        for kind, color in zip(KINDS, ("C0", "C1")):
            ys = [c.seconds[kind] for c in some]
            axis.plot(xs, ys, color=color, label=kind)
            for x, y, c in zip(xs, ys, some):
                axis.plot(x, y, "o", color=color, mfc=color if c.measured else "white")
        axis.set_xlabel(label)
        axis.set_ylabel("seconds")
        axis.set_ylim(bottom=0)
        axis.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def run(args: argparse.Namespace) -> None:
    if args.plot is not None:
        check_writable(args.plot)
        if importlib.util.find_spec("matplotlib") is None:
            raise InputError("--plot needs matplotlib: pip install -e '.[maps]'")
    disable_malloc_trimming()
    config, device = CONFIGS[args.config], resolve_device(args.device)
    model = random_model(config, device, resolve_dtype(args.dtype, device))
    lengths = args.frames or [n for n in (8, 16, 24, 32) if n <= config.unet.motion_max_seq_length]
    wanted = {(frames, args.sizes[0]) for frames in lengths} | {
        (FRAMES, size) for size in args.sizes}
    longest = max(frames for frames, _ in wanted)
    if longest > config.unet.motion_max_seq_length:
        raise InputError(f"{longest} frames: this model's motion modules know up to "
                         f"{config.unet.motion_max_seq_length}")
    costs: list[Cost] = []
    for frames, size in sorted(wanted, key=lambda pair: pair[0] * pair[1] ** 2):
        settings = dataclasses.replace(config.sample, num_frames=frames, height=size, width=size,
                                       top_k=1)
        flops = counted(config, settings)
        guess = None
        if costs:
            guess = reckoned(settings, flops, [c for c in costs if c.measured][-1])
        if guess is None or (max(guess.seconds.values()) < args.seconds and fits(model, settings)):
            guess = measured(model, settings, flops)
        costs.append(guess)
        print(f"{frames} frames of {size}x{size}", file=sys.stderr, flush=True)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {model.device}, "
          f"{str(model.dtype).removeprefix('torch.')}, {config.name}")
    print(cost_table(costs))
    if args.plot is not None:
        plot(costs, args.sizes[0], args.plot)


def main(argv: list[str] | None = None) -> int:
    p = OneLineErrorParser(prog="-m tests.benchmarks.growth",
               description="How a step's cost grows with frames and size.")
    p.add_argument("--config", choices=CONFIGS, default="tiny")
    p.add_argument("--frames", type=int, nargs="+", help="up to 32, as far as the model goes")
    p.add_argument("--sizes", type=int, nargs="+", default=[256, 384, 512, 768])
    p.add_argument("--seconds", type=float, default=300, help="the longest step that is measured")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    p.add_argument("--plot", type=Path, metavar="PNG", help="draw it too; needs matplotlib")
    return exit_code_of(lambda: run(p.parse_args(argv)))


if __name__ == "__main__":
    run_main(main)
