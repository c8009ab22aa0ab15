"""Atomic writes of files and folders, and checks of paths before any work."""
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from .errors import InputError

FOLDER_MARKER = ".motionclone"      # file in the folders that this program wrote and may replace
MARKER_TEXT = "Written by sample.py, which may replace this folder.\n"
RECORD_KEY = "motionclone"          # key of the JSON files that this program wrote
MAX_NAME_BYTES = 255 - len(f".{2 ** 22}.new.")      # leaves room for the prefix of temporary files
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class OutputFile(NamedTuple):
    """A file or folder that a run will write.

    Attributes:
        option: The option that names the output, for messages.
        path: Its path.
        is_folder: Whether it is a folder.
        is_replaceable: Function that tells whether an existing file may be replaced, for a path
            that the user did not name. None for a path that the user named.
    """

    option: str
    path: Path
    is_folder: bool = False
    is_replaceable: Callable[[], bool] | None = None


def check_io_conflicts(reads: Iterable[tuple[str, Path]], writes: Iterable[OutputFile]) -> None:
    """Check, before any work, that a run destroys no file. Changes nothing.

    Args:
        reads: Pairs of an option and the path that the run reads for it.
        writes: All outputs of the run.

    Raises:
        InputError: If an output cannot be written (`check_writable`), is an input or another
            output under any name, is inside a folder that is read or written, or exists and
            is not replaceable.
    """
    uses = {file_id(path): f"is read by {option}" for option, path in reads}
    for option, path, is_folder, is_replaceable in writes:
        check_writable(path, is_folder)
        for place in (path, folder := path.parent.resolve(), *folder.parents):
            if use := uses.get(file_id(place)):
                raise InputError(f"{place}: {use}. Give {option} another name")
        if is_replaceable is not None and os.path.lexists(path) and not is_replaceable():
            raise InputError(f"{path}: was not written by this program. Give {option} another name")
        uses[file_id(path)] = f"is also written by {option}"


def file_id(path: Path) -> Hashable:
    """Return a key that all names of one file share, whether or not the file exists."""
    return path.stat()[1:3] if path.exists() else os.path.realpath(path)    # inode, device


def check_writable(path: Path, is_folder: bool = False) -> None:
    """Raise InputError if a file or folder could not be written to `path`. Changes nothing.

    A file may replace a regular file. A folder may replace a folder that is empty or that this
    program wrote (FOLDER_MARKER).
    """
    kind, name = "folder" if is_folder else "file", b""
    with suppress(UnicodeEncodeError):      # a name that this system cannot store
        name = os.fsencode(path.name)
    if not name.strip(b".-") or "\0" in str(path) or len(name) > MAX_NAME_BYTES:
        raise InputError(f"{str(path)!r}: cannot be the name of a {kind}. Give another name")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK | os.X_OK)):
        raise InputError(f"{path}: there is no folder {path.parent} to write to. Make or name one")
    if path.exists() and not (path.is_dir() if is_folder else path.is_file()):
        raise InputError(f"{path}: exists and is not a {kind}. Give the name of a {kind}")
    if path.is_dir() and any(path.iterdir()) and not (path / FOLDER_MARKER).is_file():
        raise InputError(f"{path}: is a folder that this program did not write. Give a new name")


def check_readable(path: Path) -> None:
    """Raise InputError unless `path` is a readable file or folder."""
    if not (os.path.exists(path) and os.access(path, os.R_OK)):
        raise InputError(f"{path}: no such file or folder, or no permission to read it")
    if not (path.is_file() or path.is_dir()):
        raise InputError(f"{path}: is a device, a pipe or a socket. Give a file")


@contextmanager
def atomic_write(path: str | os.PathLike, is_folder: bool = False) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` on success and is deleted on failure.

    A temporary folder exists and holds only FOLDER_MARKER.

    Raises:
        InputError: If `path` cannot be written: no permission, a full disk, or what
            `check_writable` refuses, which is checked before and after the write.
    """
    target = Path(path).resolve() if os.path.isdir(path) else Path(path)    # keeps a link
    temporary = target.with_name(f".{os.getpid()}.new.{target.name}")
    previous = target.with_name(f".{os.getpid()}.old.{target.name}")
    try:
        check_writable(target, is_folder)
        remove_temporaries(target)
        if is_folder:
            temporary.mkdir()
            (temporary / FOLDER_MARKER).write_text(MARKER_TEXT)
        yield temporary
        check_writable(target, is_folder)
        if target.is_dir():         # one step cannot replace a folder that is not empty
            os.replace(target, previous)
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{target}: cannot be written ({reason})") from error
    finally:
        with suppress(OSError):
            remove_temporaries(target)


def remove_temporaries(target: Path) -> None:
    """Delete the temporary files for `target` of this process and of processes that have ended.

    A folder that was renamed for replacement is restored if `target` does not exist.
    """
    pattern = re.compile(rf"\.(\d+)\.(new|old)\.{re.escape(target.name)}")
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
    """Return whether a process other than this one has this identifier."""
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, PermissionError)       # a process of another user
    return pid != os.getpid()


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as strict JSON with RECORD_KEY. Numbers that are not finite become null."""
    text = json.dumps(nonfinite_to_none({RECORD_KEY: True, **record}), indent=2, allow_nan=False)
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def nonfinite_to_none(value: Any) -> Any:
    """Return a value as JSON stores it, with None for every number that JSON does not have."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


def is_mcl_record(path: Path) -> bool:
    """Return whether `write_json` wrote a file."""
    with suppress(OSError, ValueError, RecursionError):
        record = json.loads(path.read_text(encoding="utf-8"))
        return isinstance(record, dict) and RECORD_KEY in record
    return False


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, or of the names and contents of a folder's files."""
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for child in sorted(filter(Path.is_file, path.rglob("*"))):
        digest.update(f"{child.relative_to(path)}\0{sha256_of(child)}\n".encode(errors="replace"))
    return digest.hexdigest()


def save_safetensors(path: str | os.PathLike, tensors: dict[str, torch.Tensor],
                     metadata: dict[str, str]) -> None:
    """Write tensors and metadata to a safetensors file."""
    with atomic_write(path) as temporary:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata)
        os.umask(mask := os.umask(0))       # the mask can only be read by setting it
        temporary.chmod(0o666 & ~mask)      # safetensors gives permission to the owner only


def stream_safetensors(path: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype,
                       tensors: Iterable[torch.Tensor], metadata: dict[str, str]) -> None:
    """Write tensors to a safetensors file one at a time, so that only one is in memory.

    The safetensors package needs all of them at once.

    Args:
        path: The file.
        shapes: Shape of each tensor by name.
        dtype: Data type of all tensors.
        tensors: The tensors, in the order of `shapes`.
        metadata: Metadata of the file.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    end, dtype_name = 0, SAFETENSORS_DTYPES[dtype]
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": dtype_name, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)             # the data begins at a multiple of 8 bytes
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape, tensor in zip(shapes.values(), tensors, strict=True):
            assert tensor.dtype == dtype and tensor.shape == tuple(shape)
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
