"""What a step of sampling costs on this machine: time, memory, arithmetic. Reports; judges nothing.

    python -m tests.benchmarks.step_cost [--config sd15] [--size 512x512] [--frames 16] [--dtype float16]

Weights are random, but for the embedded model's: times do not depend on them.
"""
import argparse
import ctypes
import dataclasses
import platform
import statistics
import time
from pathlib import Path
from typing import Any, Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mcl.checkpoints.model_file import load_model, build_on_meta
from mcl.cli import OneLineErrorParser, exit_code_of, run_main
from mcl.cli.arguments import parse_size
from mcl.config import SD15, SD15_V2, TINY, ModelConfig, SampleConfig
from mcl.errors import InputError
from mcl.device import DTYPES, MEMORY, disable_malloc_trimming, resolve_device, resolve_dtype, use_checkpointing
from mcl.model import Model
from mcl.motion import motion_guidance, top_k_motion
from mcl.sampler import Sampler, latent_shape, predict_noise_and_gradient, predict
from mcl.networks.temporal import AttentionRequest
from mcl.networks.ops import to_channels_last
from mcl.networks.unet import UNet3D

CONFIGS = {"tiny": TINY, "sd15": SD15, "sd15-v2": SD15_V2}
T = 800                                 # any timestep: they cost alike
ATEN = torch.ops.aten
# Of products and convolutions; torch's own table leaves out the fused attention of CPUs.
FORMULAS = {
    ATEN._scaled_dot_product_flash_attention_for_cpu:
        flop_registry[ATEN._scaled_dot_product_flash_attention],
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward:
        flop_registry[ATEN._scaled_dot_product_flash_attention_backward],
    **flop_registry}


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Model:
    """A model with a UNet alone; the other networks have no weights."""
    model = build_on_meta(config)
    with torch.device(device):
        model.unet = UNet3D(config.unet).to(dtype)
    to_channels_last(model.unet)
    return model.requires_grad_(False).eval()


def steps_of(model: Model, config: SampleConfig, gradient_checkpointing: bool
             ) -> dict[str, Callable[[], object]]:
    """A forward pass of the UNet, a step without guidance, and one with it."""
    z = torch.randn(latent_shape(model, config), device=model.device)
    text, null = torch.randn(2, 1, model.config.text_encoder.max_position_embeddings, model.config.unet.cross_attention_dim,
                             device=model.device, dtype=model.dtype)
    with torch.no_grad():
        seen = model.unet.attend(torch.randn_like(z).to(model.dtype), T, null,
                                 AttentionRequest(temporal=config.guidance_blocks))
    trajectory = Sampler(model, text, null, config)
    guides = [motion_guidance(top_k_motion([seen.temporal], config.top_k, trajectory.windows, {}))]

    def unguided() -> None:
        predict(model, z, T, text)
        predict(model, z, T, null)

    def guided() -> None:
        predict_noise_and_gradient(trajectory, z, T, guides, gradient_checkpointing)
        predict(model, z, T, null)

    return {"UNet, forward": lambda: predict(model, z, T, text), "unguided step": unguided,
            "guided step": guided}


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """That one run of the action takes, until the device has done it."""
    synchronize(device)
    began = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def peak_bytes(action: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that an action, now done, took beside what was taken before it.

    None where that cannot be told.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not Path("/proc/self/clear_refs").exists():
        action()
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:                # what is free is given back, to be counted when taken
        trim(0)
    Path("/proc/self/clear_refs").write_text("5", "ascii")      # the high-water mark is now's
    before = high_water()
    action()
    return high_water() - before


def high_water() -> int:
    """The most memory, in bytes, that was resident since it was last reset."""
    lines = dict(line.split(":", 1) for line in
                 Path("/proc/self/status").read_text("ascii").splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def matmul_rate(device: torch.device, dtype: torch.dtype, n: int = 2048) -> float:
    """FLOP/s of a product of square matrices."""
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / statistics.median(seconds(lambda: a @ b, device) for _ in range(5))


class Flops(TorchDispatchMode):
    """Counts those of FORMULAS. (FlopCounterMode refuses autograd.grad.)"""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in FORMULAS:
            self.total += FORMULAS[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def report(model: Model, config: SampleConfig, gradient_checkpointing: bool, repeat: int) -> None:
    device, dtype = model.device, model.dtype
    name = (torch.cuda.get_device_name(device) if device.type == "cuda"
            else f"{device.type}, {torch.get_num_threads()} threads")
    rate = matmul_rate(device, dtype)
    print(f"machine  {platform.platform()}, {name}, torch {torch.__version__}; "
          f"{rate / 1e9:.0f} GFLOP/s in products of {str(dtype).removeprefix('torch.')} matrices")
    parameters = sum(p.numel() for p in model.unet.parameters())
    print(f"model    {model.config.name}, UNet of {parameters / 1e6:.1f} M parameters, "
          f"{config.num_frames} frames of {config.width}x{config.height}, "
          f"{'activations recomputed' if gradient_checkpointing else 'activations kept'}")
    print(f"{'':15}  {'seconds':>8}  {'peak MB':>8}  {'GFLOP':>8}  {'GFLOP/s':>8}  of the rate")
    steps = steps_of(model, config, gradient_checkpointing)
    memory, works = {}, {}
    for what, action in steps.items():
        with Flops() as counter:        # the first time, which takes longer than the others
            memory[what] = peak_bytes(action, device)
        works[what] = counter.total
    # In turns, as a machine's rate may change between one and the next.
    rounds = [{what: seconds(action, device) for what, action in steps.items()}
              for _ in range(repeat)]
    for what, work in works.items():
        taken, most = statistics.median(r[what] for r in rounds), memory[what]
        peak = "?" if most is None else f"{most / 1e6:.0f}"
        print(f"{what:15}  {taken:8.3f}  {peak:>8}  {work / 1e9:8.1f}  {work / taken / 1e9:8.1f}  "
              f"{work / taken / rate:.2f}")


def main(argv: list[str] | None = None) -> int:
    p = OneLineErrorParser(prog="-m tests.benchmarks.step_cost", description="What a step of sampling costs here.")
    p.add_argument("--config", choices=CONFIGS, default="tiny")
    p.add_argument("--frames", type=int)
    p.add_argument("--size", type=parse_size, metavar="WIDTHxHEIGHT")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    p.add_argument("--memory", default="auto", choices=MEMORY)
    p.add_argument("--repeat", type=int, default=3, help="times of which the median is taken")
    return exit_code_of(lambda: run(p.parse_args(argv)))


def run(args: argparse.Namespace) -> None:
    if args.repeat < 1:
        raise InputError(f"--repeat {args.repeat} is not possible: 1 or more")
    device, config = resolve_device(args.device), CONFIGS[args.config]
    model = (load_model(None, args.device, args.dtype) if config is TINY
             else random_model(config, device, resolve_dtype(args.dtype, device)))
    given = {} if args.frames is None else {"frames": args.frames}
    if args.size:
        given |= dict(zip(("width", "height"), args.size))
    settings = dataclasses.replace(model.config.sample, **given)
    gradient_checkpointing = use_checkpointing(args.memory, model, settings)
    if not gradient_checkpointing:
        disable_malloc_trimming()
    report(model, settings, gradient_checkpointing, args.repeat)


if __name__ == "__main__":
    run_main(main)
