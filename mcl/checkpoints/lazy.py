"""Tensors that are still on disk: a checkpoint is known whole before any of it is read."""
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, TypeVar

import torch
from torch import Tensor, nn

from .model_file import check_finite, check_names, check_shape, load_weights

N = TypeVar("N", bound=nn.Module)


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
    non_tensors: tuple[str, ...] = ()       # entries of a pickle that are not tensors
    metadata: dict[str, str] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)   # by part; "" a file's own


def filled(path: Path, network: N, tensors: Mapping[str, LazyTensor], device: torch.device | str
           ) -> N:
    """A network on the meta device with weights of a file, in float32.

    Raises InputError, naming the file, where one is missing, extra, mis-shaped or not finite.
    """
    shapes = {name: weight.shape for name, weight in network.state_dict().items()}
    check_names(path, set(tensors), shapes)

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            weight = tensors[name].read().to(device, torch.float32)
            check_shape(path, name, weight, shape)
            check_finite(path, name, weight)
            yield name, weight
    return load_weights(network, weights())
