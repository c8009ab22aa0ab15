"""Files of records, one JSON object in each line."""
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mcl.errors import InputError
from mcl.files import atomic_write


def read_jsonl(path: Path, keys: set[str]) -> list[dict[str, Any]]:
    """Return the records of a file, or an empty list if the file does not exist.

    A last line that was cut off is ignored.

    Args:
        path: The file.
        keys: Keys that every record must have.

    Raises:
        InputError: If the file cannot be read, or another line is not such a record.
    """
    records: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        for number, line in enumerate(lines, start=1):
            is_cut_off = number == len(lines) and line.startswith("{") and not line.endswith("}")
            records += [] if is_cut_off or not line else [json.loads(line)]
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}). Give another file") from error
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict) or not keys <= set(record):
            raise InputError(f"{path}, record {number}: has no {', '.join(sorted(keys))}. "
                             "Give another file")
    return records


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records, one in each line, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
