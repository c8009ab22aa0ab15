"""Checks, before any work, that a run destroys no file: what may be replaced is decided here.

A file may be replaced if it is the very file that the user named as output, or if a record of an
earlier run lists its SHA-256. A folder may be replaced if its own record, FOLDER_MARKER, lists
every file in it. Nothing else is ever replaced or deleted.
"""
import hashlib
import json
import os
from collections.abc import Hashable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from .errors import InputError

FOLDER_MARKER = ".motionclone"      # the record of a folder that this program wrote
RECORD_KEY = "motionclone"          # key of a record's own hash, by which a record is recognized
MAX_NAME_BYTES = 255 - 2 * len(f".{2 ** 22}.new.")  # leaves room for prefixes of temporary files


class OutputFile(NamedTuple):
    """A file or folder that a run will write.

    Attributes:
        option: The option that names the output, for messages.
        path: Its path.
        kind: "file", "folder", or "cache": a folder that is extended, and that several jobs may
            share.
        record: The record that must list an existing file, for a path that the user did not name.
            None for a path that the user named.
    """

    option: str
    path: Path
    kind: str = "file"
    record: Path | None = None


def check_io_conflicts(reads: Iterable[tuple[str, Path]], writes: Iterable[OutputFile]) -> None:
    """Check, before any work, that a run destroys no file. Changes nothing.

    Args:
        reads: Pairs of an option and the path that the run reads for it.
        writes: All outputs of the run.

    Raises:
        InputError: If an output cannot be written (`check_writable`), is not this program's to
            replace, or is, contains or is inside an input or another output, under any name.
    """
    uses: dict[Hashable, str] = {}          # of every path that is read or written
    contents: dict[Hashable, str] = {}      # of every folder above such a path
    for option, path in reads:
        use = f"is read by {option}"
        for place in (path, *path.glob("*"), *path.glob("*/*")):    # links may lead to other files
            uses.setdefault(file_id(place), use)
        contents.update(dict.fromkeys(map(file_id, folders_above(path)), use))
    for output in writes:
        option, path, is_folder = output.option, output.path, output.kind != "file"
        check_writable(path, output.kind)
        use = f"is also written by {option}"
        for place in (path, *folders_above(path)):
            if uses.get(file_id(place), use) != use or (
                    place == path and output.kind != "cache" and file_id(place) in uses):
                raise InputError(f"{place}: {uses[file_id(place)]}. Give {option} another name")
        if is_folder and (other := contents.get(file_id(path), use)) != use:
            raise InputError(f"{path}: a file in it {other}. Give {option} another name")
        if output.record is not None and not is_folder and os.path.lexists(path) and not (
                is_recorded(path, output.record)):
            raise InputError(f"{path}: was not written by this program, or was changed since. Move "
                             f"it, or give {option} another name")
        uses[file_id(path)] = use
        contents.update(dict.fromkeys(map(file_id, folders_above(path)), use))


def folders_above(path: Path) -> Iterator[Path]:
    """Yield the folders that contain a path, both as it is written and without links."""
    yield from Path(os.path.abspath(path)).parents
    yield from Path(os.path.realpath(path)).parents


def file_id(path: Path) -> Hashable:
    """Return a key that all names of one file share, whether or not the file exists."""
    # Inode and device, or the path; the case of names does not count on Windows.
    return os.stat(path)[1:3] if os.path.exists(path) else os.path.normcase(os.path.realpath(path))


def check_writable(path: Path, kind: str = "file") -> None:
    """Raise InputError if a file or folder could not be written to `path`. Changes nothing.

    Args:
        path: The path.
        kind: "file", which may replace a regular file; "folder", which may replace a folder that is
            empty or that this program wrote; or "cache", a folder that is extended.
    """
    name, noun = b"", "file" if kind == "file" else "folder"
    with suppress(UnicodeEncodeError):      # a name that this system cannot store
        name = os.fsencode(path.name)
    if not name.strip(b".-") or "\0" in str(path) or len(name) > MAX_NAME_BYTES:
        raise InputError(f"{str(path)!r}: cannot be the name of a {noun}. Give another name")
    place = path if kind == "cache" and os.path.isdir(path) else path.parent
    if not (os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK)):
        raise InputError(f"{path}: there is no folder to write it to. Make it, or give another")
    is_noun = path.is_file() if kind == "file" else path.is_dir()
    if os.path.lexists(path) and (not is_noun or (kind == "folder" and os.path.ismount(path))):
        raise InputError(f"{path}: exists and is not a {noun} to replace. Give another name")
    for child in sorted(path.rglob("*")) if kind == "folder" else ():
        if child.is_symlink() or not (child.is_dir() or is_recorded(child, path / FOLDER_MARKER)):
            raise InputError(f"{child}: was not written by this program, or was changed since. "
                             "Move it, or give another folder")


def check_readable(path: Path) -> None:
    """Raise InputError unless `path` is a readable file or folder."""
    if not (os.path.exists(path) and os.access(path, os.R_OK)):
        raise InputError(f"{path}: no such file or folder, or no permission to read it")
    if not (path.is_file() or path.is_dir()):
        raise InputError(f"{path}: is a device, a pipe or a socket. Give a file")


def is_recorded(path: Path, record: Path) -> bool:
    """Return whether a record is intact and lists a file, or is that file."""
    files = recorded_files(record) if path.is_file() else set()
    return bool(files) and (path == record or (path.name, sha256_of(path)) in files)


def recorded_files(record: Path) -> set[tuple[str, str]]:
    """Return the name and the sha256 of all files that a record lists."""
    content = read_record(record)
    return {*((Path(path).name, sha256) for path, sha256 in content.get("written", {}).items()),
            *map(tuple, content.get("replacing", []))}


def seal_record(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record that `read_record` recognizes: with the hash of its content."""
    text = json.dumps(record, sort_keys=True)
    return {RECORD_KEY: hashlib.sha256(text.encode()).hexdigest(), **record}


def read_record(path: Path) -> dict[str, Any]:
    """Return the content of a record that this program wrote; empty for any other file."""
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and (digest := content.pop(RECORD_KEY, None)):
            return content if seal_record(content)[RECORD_KEY] == digest else {}
    return {}


def file_state(path: Path) -> Hashable:
    """Return a key that changes when a file, or a file in a folder, is changed or replaced."""
    stats = {file: file.stat() for file in (path, *sorted(path.rglob("*"))) if file.is_file()}
    return tuple((str(f), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for f, s in stats.items())


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, or of the names and contents of a folder's files.

    Raises:
        InputError: If the file cannot be read.
    """
    try:
        if path.is_dir():
            files = {file.relative_to(path): sha256_of(file)
                     for file in sorted(filter(Path.is_file, path.rglob("*")))}
            text = "".join(f"{name}\0{sha256}\n" for name, sha256 in files.items())
            return hashlib.sha256(text.encode(errors="replace")).hexdigest()
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Check the file") from error
