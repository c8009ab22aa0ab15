"""Measure what one step of sampling costs on this machine, and how the cost scales.

    python tests/benchmarks/step_cost.py --model sd15 --frames 16 8 24 --sizes 256 384 512

Prints a Markdown table of arithmetic, time and memory for a forward pass of the UNet, a step
without guidance and a step with it. The weights are random, because the cost does not depend on
them. The first length is combined with every size, and the first size with every length. The
arithmetic is counted at every size on tensors without data. Steps that would take too long, or do
not fit into memory, are extrapolated from the largest that were measured: time by arithmetic,
memory by the number of latent elements.
"""
import ctypes
import dataclasses
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

if not __package__:     # run as a file
    sys.path.insert(0, str(Path(__file__).parents[2]))

from mcl.checkpoints.model_file import build_on_meta
from mcl.cli.process import run_main
from mcl.clone import needs_checkpointing
from mcl.config import ModelConfig, SampleConfig
from mcl.device import disable_malloc_trimming, resolve_device, resolve_dtype
from mcl.errors import InputError
from mcl.guidance import motion_guidance
from mcl.model import Model
from mcl.motion import Motion
from mcl.networks.attention import AttentionRequest
from mcl.networks.ops import to_channels_last
from mcl.networks.tokenizer import MAX_LENGTH
from mcl.networks.unet import UNet3D
from mcl.sampler import Sampler
from weights.training.options import option, run_with_options
from weights.training.train import TINY

CONFIGS = {"tiny": TINY, "sd15": ModelConfig()}
Steps = dict[str, Callable[[], object]]
TIMESTEP = 800                          # all timesteps cost the same
ATEN = torch.ops.aten
# PyTorch's own table of products and convolutions has no fused attention of CPUs.
FLOP_FORMULAS = {**flop_registry, **{
    getattr(ATEN, f"_scaled_dot_product_flash_attention_for_cpu{suffix}"): flop_registry[
        getattr(ATEN, f"_scaled_dot_product_flash_attention{suffix}")]
    for suffix in ("", "_backward")}}


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Cost of one kind of step; `peak_bytes` is beside the weights, nan if unknown."""

    settings: SampleConfig
    kind: str
    flops: int
    seconds: float
    peak_bytes: float
    is_measured: bool = True


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Model:
    """Return a model whose UNet has random weights; the other networks have none."""
    model = build_on_meta(config)
    with torch.device(device):
        model.unet = UNet3D(config.unet).to(dtype)
    to_channels_last(model.unet)
    return model.requires_grad_(False).eval()


def benchmark_steps(model: Model, config: SampleConfig, use_low_memory: bool) -> Steps:
    """Return functions that take one step each, by the kind of the step."""
    z = torch.randn(model.config.latent_shape(config), device=model.device)
    embeds = torch.randn(2, MAX_LENGTH, model.config.unet.cross_attention_dim)
    sampler = Sampler(model, embeds, config, gradient_checkpointing=use_low_memory)
    text, null_text = sampler.text, sampler.negative_embeds
    maps = model.unet.forward_to_attention(z.to(model.dtype), TIMESTEP, null_text,
                                           AttentionRequest(temporal=config.guidance_blocks))
    top = {name: probs.topk(1) for name, probs in maps.temporal.items()}
    values, indices = ({name: pair[i] for name, pair in top.items()} for i in (0, 1))
    sampler.guidance = [motion_guidance(Motion(values, indices))]
    forward = partial(sampler.predict_noise, z, TIMESTEP)
    guided = partial(sampler.predict_noise_and_gradient, z, TIMESTEP)
    return {"forward pass": lambda: forward(text),
            "unguided step": lambda: (forward(text), forward(null_text)),
            "guided step": lambda: (guided(), forward(null_text))}


class FlopCounter(TorchDispatchMode):
    """Counts floating-point operations. PyTorch's FlopCounterMode does not allow autograd.grad."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, formula = func(*args, **(kwargs or {})), FLOP_FORMULAS.get(func.overloadpacket)
        self.total += formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        return out


def count_step_flops(config: ModelConfig, settings: SampleConfig, use_low_memory: bool
                     ) -> dict[str, int]:
    """Return the arithmetic of each kind of step, counted on tensors without data."""
    with FakeTensorMode():
        model, flops = build_on_meta(config), {}
        model.unet = UNet3D(config.unet).requires_grad_(False).eval()
        for kind, step in benchmark_steps(model, settings, use_low_memory).items():
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


def peak_memory(action: Callable[[], object], device: torch.device) -> float:
    """Return the bytes that an action allocates at its peak, or nan if they are not known."""
    clear_refs, before, peak = Path("/proc/self/clear_refs"), 0, lambda: math.nan
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated
    elif device.type == "cpu" and clear_refs.exists():
        ctypes.CDLL(None).malloc_trim(0)    # return freed memory, so that it counts when reused
        clear_refs.write_text("5", "ascii")                                 # resets the peak
        before, peak = peak_rss(), peak_rss
    action()
    return peak() - before


def peak_rss() -> int:
    """Return the largest resident size of the process, in bytes, since it was reset."""
    status = Path("/proc/self/status").read_text("ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def median_seconds(actions: Steps, device: torch.device, repeat: int) -> dict[str, float]:
    """Return the median time of each action; the actions are repeated in turns."""
    # In turns, because a machine's speed may change from minute to minute.
    rounds = [{name: time_call(action, device) for name, action in actions.items()}
              for _ in range(repeat)]
    return {name: statistics.median(times[name] for times in rounds) for name in actions}


def measure_steps(model: Model, settings: SampleConfig, flops: dict[str, int],
                  use_low_memory: bool, repeat: int) -> list[StepCost]:
    """Return the cost of each kind of step: the median time of `repeat` steps after one."""
    steps = benchmark_steps(model, settings, use_low_memory)
    peaks = {kind: peak_memory(step, model.device) for kind, step in steps.items()}
    seconds = median_seconds(steps, model.device, repeat)
    return [StepCost(settings, kind, flops[kind], seconds[kind], peaks[kind]) for kind in steps]


def extrapolate(cost: StepCost, settings: SampleConfig, flops: int) -> StepCost:
    """Return the estimated cost of a step at another size, from a measured one."""
    positions, known = (s.num_frames * s.height * s.width for s in (settings, cost.settings))
    return StepCost(settings, cost.kind, flops, cost.seconds * flops / cost.flops,
                    cost.peak_bytes * positions / known, is_measured=False)


def format_row(cost: StepCost) -> str:
    """Return one row of the Markdown table."""
    config, origin = cost.settings, "measured" if cost.is_measured else "extrapolated"
    return (f"| {config.num_frames} | {config.width}x{config.height} | {cost.kind} | "
            f"{cost.flops / 1e12:.3g} | {cost.seconds:.3g} | {cost.flops / cost.seconds / 1e9:.0f}"
            f" | {cost.peak_bytes / 1e9:.2f} | {origin} |")


def print_machine(model: Model) -> None:
    """Print the machine, its speed in matrix products, and the model."""
    device, n = model.device, 2048
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    a, b = torch.randn(2, n, n, device=device, dtype=model.dtype)
    rate = 2 * n ** 3 / median_seconds({"product": lambda: a @ b}, device, 5)["product"]
    print(f"{platform.platform()}, {name}, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}; {rate / 1e9:.0f} GFLOP/s in matrix products of {model.dtype}\n")


@dataclasses.dataclass
class Options:
    """Measure what one step of sampling costs here."""

    model: str = option("tiny", "model of random weights", choices=CONFIGS)
    frames: tuple[int, ...] = option((16,), "lengths of the clip")
    sizes: tuple[int, ...] = option((), "sides of the square frames, in pixels")
    device: str = option("auto", "auto, cpu, cuda or mps")
    memory: str = option("high", "low recomputes activations", choices=("low", "high"))
    repeat: int = option(3, "number of steps for the median time")
    max_seconds: float = option(300.0, "steps that would take longer are extrapolated")


def run(options: Options) -> None:
    """Measure and print all costs."""
    config, device = CONFIGS[options.model], resolve_device(options.device)
    limit, use_low_memory = config.unet.motion_max_seq_length, options.memory == "low"
    frames, sizes = options.frames, options.sizes or (config.sample.width,)
    if options.repeat < 1 or max(frames) > limit:
        raise InputError(f"--repeat must be 1 or more, --frames at most {limit} for this model")
    pairs = {(n, sizes[0]) for n in frames} | {(frames[0], size) for size in sizes}
    all_settings = [dataclasses.replace(config.sample, num_frames=n, height=size, width=size)
                    for n, size in sorted(pairs, key=lambda pair: pair[0] * pair[1] ** 2)]
    for settings in all_settings:
        config.latent_shape(settings)                        # rejects impossible sizes
    model = random_model(config, device, resolve_dtype("auto", device))
    if not use_low_memory:
        disable_malloc_trimming()
    print_machine(model)
    print("| frames | size | | TFLOP | seconds | GFLOP/s | peak GB | |\n" + "|---" * 8 + "|")
    measured: list[StepCost] = []
    for settings in all_settings:
        flops = count_step_flops(config, settings, use_low_memory)
        costs = [extrapolate(cost, settings, flops[cost.kind]) for cost in measured]
        fits = use_low_memory or not needs_checkpointing(model, settings)
        if not costs or (fits and max(cost.seconds for cost in costs) < options.max_seconds):
            costs = measured = measure_steps(model, settings, flops, use_low_memory, options.repeat)
        print("\n".join(map(format_row, costs)), flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_with_options("tests/benchmarks/step_cost.py", Options, run, argv)


if __name__ == "__main__":
    run_main(main)
