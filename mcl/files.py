"""Files and folders that are there whole or not at all."""
import contextlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Iterable, Iterator, Mapping, Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import InputError

SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """A path to write a file or a folder to, which replaces `path` on success and goes on failure.

    Raises InputError where it cannot be written: missing folder, no permission, full disk.
    """
    target = Path(path)
    target = target.resolve() if target.is_dir() else target        # a link to a folder stays
    temporary = target.with_name(f".{os.getpid()}.new.{target.name}")
    former = target.with_name(f".{os.getpid()}.old.{target.name}")
    try:
        yield temporary
        if target.is_dir():             # a folder that is not empty cannot be replaced in one step
            os.replace(target, former)
        os.replace(temporary, target)
        shutil.rmtree(former, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{target}: cannot be written: {reason}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)


def check_folder(path: Path) -> None:
    """Raises InputError if nothing could be written to `path` for want of a folder around it."""
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK | os.X_OK)):
        raise InputError(f"{path}: there is no folder {path.parent} that can be written to; "
                         "make it first, or choose another")


def check_file(path: Path) -> None:
    """Raises InputError if a file could not be written to `path`; touches nothing."""
    check_folder(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the name of a file")


def check_directory(path: Path) -> None:
    """Raises InputError if files could not be written into a folder `path`; touches nothing."""
    if path.exists() and not (path.is_dir() and os.access(path, os.W_OK | os.X_OK)):
        raise InputError(f"{path}: is not a folder that can be written to; choose another")
    if not path.exists():
        check_folder(path)


def save_safetensors(path: str | os.PathLike, tensors: dict[str, Tensor],
                     metadata: dict[str, str]) -> None:
    """Writes the tensors and the metadata, whole or not at all."""
    with atomic(path) as temporary:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata)
        mask = os.umask(0)              # it can only be read by setting it
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # safetensors makes files that only their owner can read


def stream_safetensors(path: str | os.PathLike, shapes: Mapping[str, Sequence[int]],
                       dtype: torch.dtype, tensors: Iterable[Tensor],
                       metadata: dict[str, str]) -> None:
    """Writes tensors of one dtype as they come, in the order of `shapes`, whole or not at all.

    Only one of them is in memory at a time, which safetensors' own writer cannot do.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)                     # the data begins on a multiple of 8
    with atomic(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape, tensor in zip(shapes.values(), tensors, strict=True):
            assert tensor.dtype == dtype and tensor.shape == tuple(shape)
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
