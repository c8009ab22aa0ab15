"""Files and folders that are there whole or not at all."""
import contextlib
import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Hashable, Iterable, Iterator, Mapping, Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import InputError

FOLDER_MARKER = ".motionclone"                   # in a folder that this program wrote and may replace
RECORD_KEY = "motionclone"                 # a key of its JSON
LONGEST_NAME = 255 - len(f".{2 ** 22}.new.")    # in bytes, so that there is room for what is before
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class OutputFile:
    """What a run will write. `ours` tells whether what stands there is of an earlier run, of what
    nobody named; None for what was named itself, whose replacement was asked for."""
    what: str                           # the option that it comes of
    path: Path
    folder: bool = False
    ours: Callable[[], bool] | None = None


def check_io_conflicts(reads: Iterable[tuple[str, Path]], writes: Iterable[OutputFile]) -> None:
    """Raises InputError, before any work, where a run would destroy or could not write something.

    reads    what the run will read, each with the option that names it
    writes   all that it will write

    No write may be a read or another write, by whatever name; nothing is replaced that is neither
    ours nor was named; the rest is `check_target`'s. Touches nothing.
    """
    taken = {key: f"is what {what} reads" for what, path in reads for key in file_ids(path)}
    for write in writes:
        check_writable(write.path, write.folder)
        for key in file_ids(write.path):
            if key in taken:
                raise InputError(f"{write.path}: {taken[key]}; give {write.what} another name")
        if write.ours is not None and os.path.lexists(write.path) and not write.ours():
            raise InputError(f"{write.path}: is there and was not written by this program; move "
                             f"it, or give {write.what} another name")
        taken |= {key: f"is written by {write.what} as well" for key in file_ids(write.path)}


def file_ids(path: Path) -> list[Hashable]:
    """What two names of one file share, be it there or not."""
    names: list[Hashable] = [os.path.realpath(path)]
    if path.exists():
        names.append((path.stat().st_dev, path.stat().st_ino))
    return names


def check_writable(path: Path, folder: bool = False) -> None:
    """Raises InputError where a file, or a folder, could not be written to `path`.

    A folder is replaced only if it is empty or carries our MARK, a file only if it is a regular
    one. Touches nothing.
    """
    try:
        name = os.fsencode(path.name)
    except UnicodeEncodeError as error:
        raise InputError(f"{path}: cannot be a name here; give another") from error
    if not name.strip(b".-") or b"\0" in bytes(path):
        raise InputError(f"{str(path)!r}: is no name of a {'folder' if folder else 'file'}")
    if len(name) > LONGEST_NAME:
        raise InputError(f"{path}: its name is too long; {LONGEST_NAME} bytes are possible")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK | os.X_OK)):
        raise InputError(f"{path}: there is no folder {path.parent} that can be written to; "
                         "make it first, or choose another")
    if path.is_dir() != folder and path.exists():
        what = ("a folder" if path.is_dir() else "a file" if path.is_file() else
                "a device, a pipe or a socket")
        raise InputError(f"{path}: is {what}; give the name of a {'folder' if folder else 'file'}")
    if not folder and path.exists() and not path.is_file():
        raise InputError(f"{path}: is a device, a pipe or a socket; give the name of a file")
    if path.is_dir() and any(path.iterdir()) and not (path / FOLDER_MARKER).is_file():
        raise InputError(f"{path}: is a folder that this program did not write; give a new or an "
                         "empty one")


def check_readable(path: Path) -> None:
    """Raises InputError for what is neither a file nor a folder that can be read."""
    try:
        there, readable = path.exists(), os.access(path, os.R_OK)
    except (OSError, ValueError) as error:      # too long, or with a NUL in it
        raise InputError(f"{path}: cannot be a name here") from error
    if there and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path}: is a device, a pipe or a socket; give a file")
    if not readable:
        raise InputError(f"{path}: no such file or folder, or no permission to read it")


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, folder: bool = False) -> Iterator[Path]:
    """A path to write a file or a folder to, which replaces `path` on success and goes on failure.

    A folder is there, empty but for our MARK. Raises InputError where it cannot be written: missing
    folder, no permission, full disk, and, looked at again before it is replaced, for what
    `check_target` refuses.
    """
    target = Path(path)
    target = target.resolve() if target.is_dir() else target        # a link to a folder stays
    temporary = target.with_name(f".{os.getpid()}.new.{target.name}")
    former = target.with_name(f".{os.getpid()}.old.{target.name}")
    try:
        check_writable(target, folder)
        remove_stale_temporaries(target)
        if folder:
            temporary.mkdir()
            (temporary / FOLDER_MARKER).write_text("Written by sample.py, which may replace this folder.\n")
        yield temporary
        check_writable(target, folder)
        if target.is_dir():             # a folder that is not empty cannot be replaced in one step
            os.replace(target, former)
            try:
                os.replace(temporary, target)
            except OSError:
                os.replace(former, target)
                raise
            shutil.rmtree(former, ignore_errors=True)
        else:
            os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{target}: cannot be written: {reason}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)


def remove_stale_temporaries(target: Path) -> None:
    """Removes what a process that was killed left while it wrote to a target; a folder that it had
    moved out of the way comes back, if nothing came in its place."""
    for left in target.parent.iterdir():
        pid, _, rest = left.name.removeprefix(".").partition(".")
        if not pid.isdigit() or rest not in (f"new.{target.name}", f"old.{target.name}"):
            continue
        if is_running(int(pid)):
            continue
        if rest.startswith("old.") and not target.exists():
            os.replace(left, target)
        elif left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:             # another user's
        return True
    return True


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Writes strict JSON, marked as ours; what is not finite is null."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(nonfinite_to_none({RECORD_KEY: True, **record}), indent=2,
                                        allow_nan=False) + "\n", encoding="utf-8")


def nonfinite_to_none(value: Any) -> Any:
    """The same with None for every number, however deep, that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: nonfinite_to_none(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [nonfinite_to_none(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_jsonl(path: Path, of: str, is_one: Callable[[Any], bool]) -> list[dict[str, Any]]:
    """The records of a file, one in each line; none if it is not there.

    A last line that was cut off is left out. Raises InputError for a file that cannot be read, and
    for another line that is not one `of` what the file is to hold.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line or "null")
        except (ValueError, RecursionError) as error:
            if number == len(lines) and line.startswith("{"):
                continue
            raise InputError(f"{path}, line {number}: is cut off or not JSON") from error
        if record is not None and not is_one(record):
            raise InputError(f"{path}, line {number}: has no figures of {of}; give another file")
        records += [] if record is None else [record]
    return records


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")


def is_mcl_record(path: Path) -> bool:
    """Whether `write_json` wrote a file."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and RECORD_KEY in record


def sha256_of(path: Path) -> str:
    """sha256 of a file, or of the names and the files of a folder."""
    if path.is_file():
        with open(path, "rb") as binary:
            return hashlib.file_digest(binary, "sha256").hexdigest()
    held = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            held.update(f"{file.relative_to(path)}\0{sha256_of(file)}\n".encode(errors="replace"))
    return held.hexdigest()


def save_safetensors(path: str | os.PathLike, tensors: dict[str, Tensor],
                     metadata: dict[str, str]) -> None:
    """Writes the tensors and the metadata, whole or not at all."""
    with atomic_write(path) as temporary:
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
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape, tensor in zip(shapes.values(), tensors, strict=True):
            assert tensor.dtype == dtype and tensor.shape == tuple(shape)
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
