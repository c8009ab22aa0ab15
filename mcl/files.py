"""Files and folders that are there whole or not at all."""
import contextlib
import os
import shutil
from pathlib import Path
from typing import Iterator

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import InputError


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
    """Raises InputError if nothing could be written to `path` for want of a folder."""
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK | os.X_OK)):
        raise InputError(f"{path}: there is no folder {path.parent} that can be written to; "
                         "make it first, or choose another")


def check_file(path: Path) -> None:
    """Raises InputError if a file could not be written to `path`; touches nothing."""
    check_folder(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the name of a file")


def save_safetensors(path: str | os.PathLike, tensors: dict[str, Tensor],
                     metadata: dict[str, str]) -> None:
    """Writes the tensors and the metadata, whole or not at all."""
    with atomic(path) as temporary:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata)
        mask = os.umask(0)              # it can only be read by setting it
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # safetensors makes files that only their owner can read
