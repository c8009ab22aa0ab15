"""Atomic writes of files and folders, records as JSON, and safetensors files."""
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from .errors import InputError
from .ownership import FOLDER_MARKER, check_writable, seal_record, sha256_of

SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
                      torch.int8: "I8", torch.uint8: "U8"}


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
    end = 0
    for name, tensor in like.items():
        start, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)             # the data begins at a multiple of 8 bytes
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for expected, tensor in zip(like.values(), tensors, strict=True):
            assert tensor.dtype == expected.dtype and tensor.shape == expected.shape
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
