"""Measure what one step of sampling costs on this machine, and how the cost scales.

    python tests/benchmarks/step_cost.py --model sd15 --frames 16 8 24 --sizes 256 384 512

Prints a Markdown table of arithmetic, time and memory for a forward pass of the UNet, a step
without guidance and a step with it. The weights are random, because the cost does not depend on
them. The first length is combined with every size, and the first size with every length. The
arithmetic is counted at every size on tensors without data. Steps that would take too long, or do
not fit into memory, are extrapolated from the largest that were measured: time by arithmetic,
memory by the number of latent elements.
"""
import argparse
import ctypes
import dataclasses
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

if not __package__:     # run as a file
    sys.path.insert(0, str(Path(__file__).parents[2]))

from mcl.checkpoints.model_file import build_on_meta
from mcl.cli.process import OneLineErrorParser, exit_code_of, run_main
from mcl.clone import needs_checkpointing
from mcl.config import ModelConfig, SampleConfig, UNetConfig
from mcl.device import DTYPES, disable_malloc_trimming, resolve_device, resolve_dtype
from mcl.errors import InputError
from mcl.guidance import motion_guidance
from mcl.model import Model
from mcl.motion import Motion
from mcl.networks.attention import AttentionRequest
from mcl.networks.ops import to_channels_last
from mcl.networks.unet import UNet3D
from mcl.sampler import Sampler
from weights.training.train import TINY

CONFIGS = {"tiny": TINY, "sd15": ModelConfig(),
           "sd15-v2": ModelConfig(unet=UNetConfig(motion_mid_block=True))}
TIMESTEP = 800                          # all timesteps cost the same
ATEN = torch.ops.aten
# PyTorch's own table of products and convolutions has no fused attention of CPUs.
FLOP_FORMULAS = {**flop_registry, **{
    getattr(ATEN, f"_scaled_dot_product_flash_attention_for_cpu{suffix}"): flop_registry[
        getattr(ATEN, f"_scaled_dot_product_flash_attention{suffix}")]
    for suffix in ("", "_backward")}}


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Cost of one kind of step; `peak_bytes` is beside the weights, None if unknown."""

    settings: SampleConfig
    kind: str
    flops: int
    seconds: float
    peak_bytes: float | None
    is_measured: bool = True


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Model:
    """Return a model whose UNet has random weights; the other networks have none."""
    model = build_on_meta(config)
    with torch.device(device):
        model.unet = UNet3D(config.unet).to(dtype)
    to_channels_last(model.unet)
    return model.requires_grad_(False).eval()


def benchmark_steps(model: Model, config: SampleConfig, gradient_checkpointing: bool
                    ) -> dict[str, Callable[[], object]]:
    """Return functions that take one step each, by the kind of the step."""
    z = torch.randn(model.config.latent_shape(config), device=model.device)
    embeds = torch.randn(2, model.config.text_encoder.max_position_embeddings,
                         model.config.unet.cross_attention_dim)
    sampler = Sampler(model, embeds, config, gradient_checkpointing=gradient_checkpointing)
    text, null_text = sampler.text, sampler.negative_embeds
    maps = model.unet.forward_to_attention(z.to(model.dtype), TIMESTEP, null_text,
                                           AttentionRequest(temporal=config.guidance_blocks))
    top = {name: probs.topk(1) for name, probs in maps.temporal.items()}
    sampler.guidance = [motion_guidance(Motion({name: t.values for name, t in top.items()},
                                               {name: t.indices for name, t in top.items()}))]

    def unguided() -> None:
        sampler.predict_noise(z, TIMESTEP, text)
        sampler.predict_noise(z, TIMESTEP, null_text)

    def guided() -> None:
        sampler.predict_noise_and_gradient(z, TIMESTEP)
        sampler.predict_noise(z, TIMESTEP, null_text)

    return {"forward pass": lambda: sampler.predict_noise(z, TIMESTEP, text),
            "unguided step": unguided, "guided step": guided}


class FlopCounter(TorchDispatchMode):
    """Counts floating-point operations. PyTorch's FlopCounterMode does not allow autograd.grad."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in FLOP_FORMULAS:
            self.total += FLOP_FORMULAS[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def count_step_flops(config: ModelConfig, settings: SampleConfig, gradient_checkpointing: bool
                     ) -> dict[str, int]:
    """Return the arithmetic of each kind of step, counted on tensors without data."""
    with FakeTensorMode():
        model = build_on_meta(config)
        model.unet = UNet3D(config.unet).requires_grad_(False).eval()
        steps = benchmark_steps(model, settings, gradient_checkpointing)
        flops = {}
        for kind, step in steps.items():
            with FlopCounter() as counter:
                step()
            flops[kind] = counter.total
    return flops


def time_call(action: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that an action takes on a device."""
    synchronize = getattr(torch, device.type).synchronize
    synchronize()
    start = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - start


def peak_memory(action: Callable[[], object], device: torch.device) -> int | None:
    """Return the bytes that an action allocates at its peak, or None if they are not known."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not Path("/proc/self/clear_refs").exists():
        action()
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:                # return freed memory, so that it counts when it is reused
        trim(0)
    Path("/proc/self/clear_refs").write_text("5", "ascii")          # resets the peak
    before = peak_rss()
    action()
    return peak_rss() - before


def peak_rss() -> int:
    """Return the largest resident size of the process, in bytes, since it was reset."""
    status = Path("/proc/self/status").read_text("ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def measure_steps(model: Model, settings: SampleConfig, flops: dict[str, int],
                  gradient_checkpointing: bool, repeat: int) -> list[StepCost]:
    """Return the cost of each kind of step: the median time of `repeat` steps after one."""
    steps = benchmark_steps(model, settings, gradient_checkpointing)
    peaks = {kind: peak_memory(step, model.device) for kind, step in steps.items()}
    # In turns, because a machine's speed may change from minute to minute.
    rounds = [{kind: time_call(step, model.device) for kind, step in steps.items()}
              for _ in range(repeat)]
    return [StepCost(settings, kind, flops[kind], statistics.median(r[kind] for r in rounds),
                     peaks[kind]) for kind in steps]


def extrapolate(cost: StepCost, settings: SampleConfig, flops: int) -> StepCost:
    """Return the estimated cost of a step at another size, from a measured one."""
    positions, known = (s.num_frames * s.height * s.width for s in (settings, cost.settings))
    peak = None if cost.peak_bytes is None else cost.peak_bytes * positions / known
    return StepCost(settings, cost.kind, flops, cost.seconds * flops / cost.flops, peak, False)


def format_row(cost: StepCost) -> str:
    """Return one row of the Markdown table."""
    config, peak = cost.settings, "?" if cost.peak_bytes is None else f"{cost.peak_bytes / 1e9:.2f}"
    return (f"| {config.num_frames} | {config.width}x{config.height} | {cost.kind} "
            f"| {cost.flops / 1e12:.3g} | {cost.seconds:.3g} "
            f"| {cost.flops / cost.seconds / 1e9:.0f} | {peak} "
            f"| {'measured' if cost.is_measured else 'extrapolated'} |")


def print_machine(model: Model) -> None:
    """Print the machine, its speed in matrix products, and the model."""
    device, n = model.device, 2048
    name = (torch.cuda.get_device_name(device) if device.type == "cuda" else
            f"{device.type}, {torch.get_num_threads()} threads")
    a, b = torch.randn(2, n, n, device=device, dtype=model.dtype)
    rate = 2 * n ** 3 / statistics.median(time_call(lambda: a @ b, device) for _ in range(5))
    parameters = sum(p.numel() for p in model.unet.parameters())
    print(f"{platform.platform()}, {name}, torch {torch.__version__}; {rate / 1e9:.0f} GFLOP/s in "
          f"matrix products of {str(model.dtype).removeprefix('torch.')}\n"
          f"{model.config.name}: UNet of {parameters / 1e6:.1f} M parameters\n")


def run(args: argparse.Namespace) -> None:
    """Measure and print all costs."""
    config, device = CONFIGS[args.model], resolve_device(args.device)
    limit, use_low_memory = config.unet.motion_max_seq_length, args.memory == "low"
    frames, sizes = args.frames or [config.sample.num_frames], args.sizes or [config.sample.width]
    if args.repeat < 1 or max(frames) > limit:
        raise InputError(f"--repeat must be 1 or more, --frames at most {limit} for this model")
    pairs = {(n, sizes[0]) for n in frames} | {(frames[0], size) for size in sizes}
    all_settings = [dataclasses.replace(config.sample, num_frames=n, height=size, width=size)
                    for n, size in sorted(pairs, key=lambda pair: pair[0] * pair[1] ** 2)]
    model = random_model(config, device, resolve_dtype(args.dtype, device))
    for settings in all_settings:
        model.config.latent_shape(settings)                        # rejects impossible sizes
    if not use_low_memory:
        disable_malloc_trimming()
    print_machine(model)
    print("| frames | size | | TFLOP | seconds | GFLOP/s | peak GB | |\n" + "|---" * 8 + "|")
    measured: list[StepCost] = []
    for settings in all_settings:
        flops = count_step_flops(config, settings, use_low_memory)
        costs = [extrapolate(cost, settings, flops[cost.kind]) for cost in measured]
        fits = use_low_memory or not needs_checkpointing(model, settings)
        if not costs or (fits and max(cost.seconds for cost in costs) < args.max_seconds):
            costs = measured = measure_steps(model, settings, flops, use_low_memory, args.repeat)
        print("\n".join(map(format_row, costs)), flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    p = OneLineErrorParser(prog="tests/benchmarks/step_cost.py",
                           description="Measure what one step of sampling costs here.")
    p.add_argument("--model", choices=CONFIGS, default="tiny")
    p.add_argument("--frames", type=int, nargs="+", help="lengths of the clip")
    p.add_argument("--sizes", type=int, nargs="+", help="sides of the square frames, in pixels")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    p.add_argument("--memory", default="high", choices=("low", "high"),
                   help="low recomputes activations for the gradient")
    p.add_argument("--repeat", type=int, default=3, help="number of steps for the median time")
    p.add_argument("--max-seconds", type=float, default=300,
                   help="steps that would take longer are extrapolated")
    return exit_code_of(lambda: run(p.parse_args(argv)))


if __name__ == "__main__":
    run_main(main)
