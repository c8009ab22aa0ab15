"""What is decided by the machine that runs: device, precision, and what is kept in memory."""
import contextlib
import ctypes
import re
import sys
from pathlib import Path
from typing import Iterator

import torch
from torch import nn

from .config import ModelConfig, SampleConfig
from .errors import InputError
from .model import Model
from .context_windows import windows_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
MEMORY = ("auto", "low", "high")
# Of the size of the top resolution, the features that a guided step of Stable Diffusion 1.5 keeps
# for its gradient (215, as BENCHMARKS.md has it measured), and those that it needs besides.
FEATURES_OF_A_GUIDED_STEP = 215 + 60
LEAST_FEATURES_OF_A_STEP = 30           # a third of what a step takes that keeps nothing
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4   # of glibc's malloc.h


def pick_device(wanted: str | torch.device) -> torch.device:
    """"auto" is cuda, then mps, then cpu. Raises InputError for a device that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if wanted == "auto":
        wanted = next(device for device, is_there in there.items() if is_there)
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise InputError(f"device {wanted!r} is not known: auto, {', '.join(there)}") from error
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if not there.get(device.type, False) or (device.index or 0) >= count:
        raise InputError(f"device {str(wanted)!r} is not there: this machine has "
                         f"{', '.join(d for d, is_there in there.items() if is_there)}")
    return device if device.type == "cuda" else torch.device(device.type)


def pick_dtype(wanted: str | torch.dtype, device: torch.device) -> torch.dtype:
    """"auto" is float32 on the cpu, else float16. Raises InputError for an unknown one."""
    if wanted == "auto":
        wanted = "float32" if device.type == "cpu" else "float16"
    chosen = DTYPES.get(SHORT.get(wanted, wanted)) if isinstance(wanted, str) else wanted
    if chosen is None or chosen not in DTYPES.values():
        raise InputError(f"dtype {str(wanted)!r} is not known: auto, "
                         f"{', '.join((*DTYPES, *SHORT))}")
    return chosen


def pick_recompute(memory: str, model: Model, config: SampleConfig) -> bool:
    """Whether a guided step computes its activations a second time rather than keep them.

    "low" always does, "high" never; "auto" does where they would not fit into free memory. Raises
    InputError for another name.
    """
    if memory not in MEMORY:
        raise InputError(f"memory {memory!r} is not known: {', '.join(MEMORY)}")
    free = free_memory(model.device)
    needed = guided_bytes(model, config)
    return memory == "low" or (memory == "auto" and free is not None and needed > free)


def guided_bytes(model: Model, config: SampleConfig) -> int:
    """About what a guided step needs beside the weights, if it keeps its activations."""
    s = model.config.vae.downsampling
    frames = windows_of(config.frames, config, model.config.unet.max_frames).length
    positions = frames * (config.height // s) * (config.width // s)
    width = model.config.unet.block_out_channels[0]
    return FEATURES_OF_A_GUIDED_STEP * positions * width * model.dtype.itemsize


def check_memory(model: ModelConfig, config: SampleConfig, device: torch.device,
                 dtype: torch.dtype) -> None:
    """Raises MemoryError for a clip that cannot fit, by the least that its pixels, the VAE at one
    of its frames and the UNet at a window take; what needs more is only seen while it runs."""
    pixels = config.height * config.width
    clip = 3 * 4 * config.frames * pixels
    decoded = 2 * model.vae.block_out_channels[0] * pixels * dtype.itemsize
    length = windows_of(config.frames, config, model.unet.max_frames).length
    seen = (LEAST_FEATURES_OF_A_STEP * model.unet.block_out_channels[0] * dtype.itemsize
            * length * pixels // model.vae.downsampling ** 2)
    for place, needed in ((torch.device("cpu"), clip), (device, max(decoded, seen))):
        free = free_memory(place)
        if free is not None and needed > free:
            raise MemoryError(f"{config.frames} frames of {config.width}x{config.height} take more "
                              f"than {needed / 1e9:.0f} GB of memory; {free / 1e9:.0f} are free")


def free_memory(device: torch.device) -> int | None:
    """In bytes; None where it cannot be told."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text("ascii"))
    except OSError:                     # not Linux
        return None
    return int(found[1]) * 1024 if found else None


def keep_freed_memory() -> None:
    """Has the C library keep what tensors free, for the next ones; for a process of our own that
    has memory to spare, as a fifth of what is kept lies between blocks too small to be used.

    Else glibc gives every block of 32 MB or more back to the system, which clears it page by page
    when it is wanted again: a tenth of the time of a step at Stable Diffusion's width, on the CPU.
    Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


@contextlib.contextmanager
def off_the_accelerator(*modules: nn.Module) -> Iterator[None]:
    """Keeps modules on the CPU meanwhile, to leave its memory to the UNet."""
    devices = [next(module.parameters()).device for module in modules]
    try:
        for module in modules:
            module.to("cpu")
        yield
    finally:
        for module, device in zip(modules, devices):
            module.to(device)
