"""Tensors that are still on disk: a checkpoint is known whole before any of it is read."""
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """Its shape and dtype, and `read`, which brings the values into memory.

    `read` raises InputError, with the file's name, where the file is damaged.
    """
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """What one file, or one folder of diffusers', holds."""
    tensors: dict[str, LazyTensor]          # of a pipeline's folder: "unet.", "vae.", ... before
    files: tuple[Path, ...]
    others: tuple[str, ...] = ()            # entries of a pickle that are not tensors
    metadata: dict[str, str] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)   # by part; "" a file's own
