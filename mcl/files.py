"""Atomic writes of files and folders, records as JSON, and safetensors files.

Safetensors files are read with plain reads. A file that is mapped into memory would end the process
when another program cuts it.
"""
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from .errors import InputError
from .ownership import FOLDER_MARKER, check_readable, check_writable, seal_record, sha256_of

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


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


@contextmanager
def atomic_write(path: str | os.PathLike, is_folder: bool = False) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` on success and is deleted on failure.

    A temporary folder exists and is empty. It gets a record of its files, FOLDER_MARKER.

    Raises:
        InputError: If `path` cannot be written: no permission, a full disk, or what
            `check_writable` refuses, which is checked before and after the write.
    """
    target = Path(path).resolve() if os.path.isdir(path) else Path(path)    # keeps a link
    temporary = target.with_name(f".{os.getpid()}.new.{target.name}")
    previous = target.with_name(f".{os.getpid()}.old.{target.name}")
    kind = "folder" if is_folder else "file"
    try:
        check_writable(target, kind)
        remove_temporaries(target)
        if is_folder:
            temporary.mkdir()
        yield temporary
        if is_folder:
            names = sorted(path.relative_to(temporary) for path in temporary.rglob("*"))
            write_record(temporary / FOLDER_MARKER, {
                "written": {name.as_posix(): sha256_of(temporary / name) for name in names}})
        check_writable(target, kind)
        if target.is_dir():         # one step cannot replace a folder that is not empty
            os.replace(target, previous)
        os.replace(temporary, target)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{target}: cannot be written ({reason})") from error
    finally:
        with suppress(OSError):
            remove_temporaries(target)


def remove_temporaries(target: Path) -> None:
    """Delete the temporary files for `target` of this process and of processes that have ended.

    A folder that was renamed for replacement is restored if `target` does not exist.
    """
    pattern = re.compile(rf"(?:\.([0-9]{{1,7}})\.(new|old))+\.{re.escape(target.name)}")
    for path in target.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match is None or is_other_process(int(match[1])):
            continue
        if match[2] == "old" and not target.exists():
            os.replace(path, target)
        else:
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)


def is_other_process(pid: int) -> bool:
    """Return whether a process other than this one has this identifier; on Windows it may have."""
    if os.name == "nt":         # os.kill(pid, 0) sends Ctrl-C to all processes of the console there
        return pid != os.getpid()
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, PermissionError)       # a process of another user
    return pid != os.getpid()


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as strict JSON (`ownership.seal_record`).

    Numbers that are not finite become null.
    """
    text = json.dumps(seal_record(nonfinite_to_none(record)), indent=2, allow_nan=False)
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def nonfinite_to_none(value: Any) -> Any:
    """Return a value as JSON stores it, with None for every number that JSON does not have."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


@contextmanager
def report_corruption(path: Path) -> Iterator[None]:
    """Return a context in which every exception means that a file is damaged.

    Raises:
        InputError: In place of any other exception. Reading a damaged file may cause any.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: the file is truncated or damaged ({error!s:.200}). Delete it, "
                         "and download or make it again") from error


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Raises ValueError if two of its values have the same name."""
    if doubles := [a for a, b in pairwise(sorted(name for name, _ in pairs)) if a == b]:
        raise ValueError(f"two values have the name {doubles[0]!r:.99}")
    return dict(pairs)


def open_safetensors(path: Path) -> tuple[dict[str, str], dict[str, LazyTensor]]:
    """Return the metadata and the tensors of a safetensors file.

    Raises:
        InputError: If the file is missing or damaged, or has tensors of an unknown type.
    """
    check_readable(path)
    with report_corruption(path), open(path, "rb") as file:
        safe_open(path, framework="pt")         # checks the header
        start = int.from_bytes(file.read(8), "little") + 8
        header = json.loads(file.read(start - 8), object_pairs_hook=unique_names)
    metadata = header.pop("__metadata__", {})
    return metadata, {n: lazy_tensor(path, n, start, **entry) for n, entry in header.items()}


def lazy_tensor(path: Path, name: str, start: int, dtype: str, shape: Sequence[int],
                data_offsets: Sequence[int]) -> LazyTensor:
    """Return a tensor of a safetensors file whose data begin at `start`."""
    if dtype not in SAFETENSORS_DTYPES:
        raise InputError(f"{path}: the tensor {name} is {dtype}, not a known type. Use float32")

    torch_dtype, size = SAFETENSORS_DTYPES[dtype], data_offsets[1] - data_offsets[0]

    def read() -> torch.Tensor:
        with report_corruption(path):
            data = torch.from_numpy(np.fromfile(path, np.uint8, size, "", start + data_offsets[0]))
            return (data.view(torch_dtype) if size else data.to(torch_dtype)).reshape(tuple(shape))
    return LazyTensor(tuple(shape), torch_dtype, read)


def save_safetensors(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor],
                     metadata: dict[str, str]) -> None:
    """Write tensors and metadata to a safetensors file. The same content gives the same bytes."""
    aligned = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
    stream_safetensors(path, aligned, aligned.values(), metadata)


def stream_safetensors(path: str | os.PathLike, like: Mapping[str, torch.Tensor],
                       tensors: Iterable[torch.Tensor], metadata: dict[str, str]) -> None:
    """Write tensors to a safetensors file one at a time, so that only one is in memory.

    The safetensors package needs all of them at once, and writes the metadata in random order.

    Args:
        path: The file.
        like: Tensors of the same shapes and data types by name; they may be on the meta device.
        tensors: The tensors, in the order of `like`.
        metadata: Metadata of the file.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    codes, end = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}, 0
    for name, t in like.items():
        start, end = end, end + t.numel() * t.itemsize
        span = [start, end]
        header[name] = {"dtype": codes[t.dtype], "shape": list(t.shape), "data_offsets": span}
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)             # the data begins at a multiple of 8 bytes
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for expected, tensor in zip(like.values(), tensors, strict=True):
            assert tensor.dtype == expected.dtype and tensor.shape == expected.shape
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
