"""Tensors that are still on disk: a checkpoint is known completely before any of it is read."""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Shapes = Mapping[str, Sequence[int]]        # shapes of tensors by name

@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor that is read when its values are needed.

    Attributes:
        shape: Shape of the tensor.
        dtype: Data type in the file.
        read: Returns the values. Raises InputError, which names the file, if the file is damaged.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """The content of one file, or of one folder of diffusers.

    Attributes:
        tensors: Tensors by key. The keys of a pipeline's folder start with "unet.", "vae." or
            "text_encoder.".
        files: The files that hold the tensors; empty for tensors in memory.
        non_tensors: Keys of a pickle's entries that are not tensors.
        metadata: Metadata of a safetensors file.
        configs: Content of config.json by part; "" is the config in the file's own folder.
        version: Version of the motion modules, "v1", "v2" or "v3"; "" if it is not known.
        path: The file or folder, for error messages.
    """

    tensors: dict[str, LazyTensor]
    files: tuple[Path, ...]
    non_tensors: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    version: str = ""
    path: Path = Path()


def wrap_tensor(tensor: torch.Tensor) -> LazyTensor:
    """Return a tensor in memory as a LazyTensor."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, tensor.detach)
