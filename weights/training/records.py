"""Files of records in the JSON Lines format."""
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mcl.errors import InputError
from mcl.files import atomic_write


def read_jsonl(path: Path, content: str, is_record: Callable[[Any], bool]) -> list[dict[str, Any]]:
    """Return the records of a file with one per line, or none if the file does not exist.

    A last line that was cut off is ignored.

    Args:
        path: The file.
        content: What the file should hold, such as "an evaluation", for messages.
        is_record: Function that tells whether a line's value is a record of this kind.

    Raises:
        InputError: If the file cannot be read, or another line is not such a record.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}). Give another file") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line or "null")
        except (ValueError, RecursionError) as error:
            if number == len(lines) and line.startswith("{"):
                continue
            raise InputError(f"{path}, line {number}: is cut off or not JSON. Give another file"
                             ) from error
        if record is not None and not is_record(record):
            raise InputError(f"{path}, line {number}: is not a record of {content}. Give another "
                             "file")
        records += [] if record is None else [record]
    return records


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records to a file, one per line."""
    with atomic_write(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
