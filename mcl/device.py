"""Device, precision and memory of the machine."""
import contextlib
import ctypes
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from .errors import InputError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPE_ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# Ends of the names that torch.cpu.get_capabilities gives to instructions for a type.
HALF_SUFFIXES = {torch.bfloat16: ("bf16", "convert"), torch.float16: ("fp16", "arith", "convert")}
# Features that a guided step of Stable Diffusion 1.5 stores for its gradient, and those that it
# needs besides, in units of one feature map at the highest resolution (measured: BENCHMARKS.md).
GUIDED_STEP_FEATURES = 215 + 60
MIN_STEP_FEATURES = 30              # a third of what a step without a gradient needs
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4       # constants of glibc's malloc.h


def resolve_device(device: str | torch.device) -> torch.device:
    """Return an available device; "auto" takes cuda, then mps, then cpu.

    Raises:
        InputError: If the device is not known or not available.
    """
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    available = ["cuda"] * has_cuda + ["mps"] * has_mps + ["cpu"]
    try:
        resolved = torch.device(available[0] if device == "auto" else device)
    except RuntimeError as error:
        raise InputError(f"device {device!r} is not known: use auto, cuda, mps or cpu") from error
    count = torch.cuda.device_count() if resolved.type == "cuda" else 1
    if resolved.type not in available or (resolved.index or 0) >= count:
        raise InputError(f"device '{device}' is not available: use {' or '.join(available)}")
    return resolved if resolved.type == "cuda" else torch.device(resolved.type)


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return a data type; "auto" takes float32 on the CPU and float16 elsewhere.

    Warns of a type that is slow on the CPU, once per process.

    Raises:
        InputError: If the data type is not known.
    """
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "float16"
    resolved = DTYPES.get(DTYPE_ALIASES.get(dtype, dtype)) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in DTYPES.values():
        raise InputError(f"dtype '{dtype}' is not known: use auto, {', '.join(DTYPES)}")
    capabilities: dict = getattr(torch.cpu, "get_capabilities", dict)()     # not in old versions
    suffixes = HALF_SUFFIXES.get(resolved) if device.type == "cpu" and capabilities else None
    if suffixes and not any(has and name.endswith(suffixes) for name, has in capabilities.items()):
        warnings.warn(f"this processor has no instructions for {resolved}, which is several times "
                      "slower than float32 here: use float32", stacklevel=1)     # shown once
    return resolved


def free_memory(device: torch.device) -> int | None:
    """Return the free bytes on a device, or None if they are not known."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    with contextlib.suppress(OSError):          # not Linux
        if match := re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text("ascii")):
            return int(match[1]) * 1024
    return None


def disable_malloc_trimming() -> None:
    """Make the C library keep freed memory for the next tensors. For processes of our own.

    glibc normally returns every block of 32 MB or more to the system, which clears it page by
    page when it is allocated again: a tenth of a step at Stable Diffusion's width on the CPU. A
    fifth of the memory that is kept lies between blocks and cannot be used. Other C libraries stay
    as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def share_cores() -> None:
    """Make waiting threads sleep if other programs need a core. For processes of our own.

    After every operation, the threads of GNU OpenMP spin for milliseconds while they wait for each
    other. On a busy machine, a spinning thread occupies the core that the awaited thread needs: a
    clip took 40 times as long. GNU OpenMP lets waiting threads sleep soon if it has more threads
    than cores. This function adds an idle team of threads when more threads can run than the
    machine has cores. The clip stays the same, because the working threads do.
    """
    def watch() -> None:
        excess = 0
        while excess < 5:
            time.sleep(0.1)
            runnable = int(Path("/proc/loadavg").read_text("ascii").split()[3].partition("/")[0])
            excess = max(0, excess + (1 if runnable - 1 > (os.cpu_count() or 1) else -1))
        torch.ones(1 << 20).add_(1)             # large enough for a team of threads
        threading.Event().wait()

    if os.access("/proc/loadavg", os.R_OK):     # Linux
        threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def offload_to_cpu(*modules: torch.nn.Module) -> Iterator[None]:
    """Move modules to the CPU inside the context, to leave the accelerator's memory to the UNet."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(module.to, next(module.parameters()).device)
            module.to("cpu")
        yield
