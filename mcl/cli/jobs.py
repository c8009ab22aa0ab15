"""Many clips in one run: read from a file, shared among processes, gone on with after a failure."""
import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
import os
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence, TypeVar

import torch
from torch import distributed
from tqdm import tqdm

from ..checkpoints.model_file import DEFAULT_WEIGHTS
from ..config import SampleConfig, short_repr
from ..checkpoints.detect import LORAS
from ..errors import InputError
from ..files import sha256_of, nonfinite_to_none, write_jsonl
from ..video.read import read_image, read_video
from . import StoreOnce, OneLineErrorParser, format_error, is_expected
from .arguments import check, parse
from .outputs import Clip, check_files, reads

T = TypeVar("T")
kept_digest = functools.cache(sha256_of)   # of what is read, which one run finds as it is
FOREVER = datetime.timedelta(days=365)  # one process may have finished its share long before others


def parse_jobs(argv: list[str]) -> list[argparse.Namespace]:
    """One set of options, or with --jobs one for each line of its file, and where each stands.

    Raises InputError, with the file and line, for what no job can be made of.
    """
    first = OneLineErrorParser(prog="sample.py", add_help=False, allow_abbrev=False)
    first.add_argument("--jobs", type=Path, action=StoreOnce)
    known, common = first.parse_known_args(argv)
    if known.jobs is None:
        return [parse(argv)]
    if known.jobs.exists() and not known.jobs.is_file():
        raise InputError(f"{known.jobs}: is no file; give one with a JSON object in each line")
    try:
        lines = known.jobs.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{known.jobs}: cannot be read ({error}); give a file with one JSON "
                         "object in each line") from error
    jobs = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{known.jobs}, line {number}"
        try:
            options = json.loads(line)
            if not isinstance(options, dict):
                raise ValueError("not an object of options")
            job = parse([*common, *words(options)])
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: {error}") from error
        job.jobs, job.where = known.jobs, where
        jobs.append(job)
    if not jobs:
        raise InputError(f"{known.jobs}: holds no job; give one JSON object in each line")
    return jobs


def words(options: Mapping[str, Any]) -> list[str]:
    """{"top_k": 3, "compare": true, "subject": ["a", "b"]} as a command line would have it.

    Each value is bound to its name by =, so that none is taken for an option. Raises ValueError
    for what is no option of one job, or no value of one.
    """
    result: list[str] = []
    for name, value in options.items():
        if name in ("help", "jobs") or not re.fullmatch("[a-z][a-z_-]*", name):
            raise ValueError(f"{name!r} is no option of a job")
        option = "--" + name.replace("_", "-")
        for one in value if isinstance(value, list) else [value]:
            if one is True:
                result.append(option)
            elif isinstance(one, (str, int, float)) and one is not False:
                result.append(f"{option}={one}")
            elif one is not False and one is not None:
                raise ValueError(f"{name} is {short_repr(one)}, where text, a number, true or a list of "
                                 "these is wanted")
    return result


def check_all(jobs: list[argparse.Namespace]) -> list[tuple[SampleConfig, float]]:
    """The settings and the fps of each. Raises InputError for all that can be wrong and can be
    known before weights are read, with the line of the file where there is one."""
    checked = check_each(jobs)
    check_files(jobs)
    return checked


def check_each(jobs: list[argparse.Namespace]) -> list[tuple[SampleConfig, float]]:
    """`check_all`, whatever the jobs write."""
    checked = []
    for args in jobs:
        try:
            checked.append(check(args))
            if args.jobs is not None:   # else it is read at once
                try_reading(args, checked[-1][0].frames)
        except InputError as error:
            raise InputError(f"{args.where}: {error}" if args.where else str(error)) from error
    return checked


def try_reading(args: argparse.Namespace, frames: int) -> None:
    """Raises InputError for a reference or a picture that cannot be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # which is said when it is read in earnest
        if args.ref is not None:
            read_video(args.ref, frames, (8, 8), args.start, args.duration, stride=args.stride)
        for path, _ in args.image:
            read_image(path, (8, 8))


def requested(clip: Clip, config: SampleConfig, fps: float) -> dict[str, Any]:
    """All that a clip depends on, but for the versions of packages and the device."""
    args = clip.args
    return {
        "prompt": args.prompt, "method": args.method, "reference_prompt": args.ref_prompt,
        "subject": args.subject, "reference": str(args.ref or args.motion), "seed": clip.seed,
        "settings": dataclasses.asdict(config), "start": args.start, "duration": args.duration,
        "stride": args.stride, "fit": args.fit, "fps": fps,
        "weights": str(args.weights or DEFAULT_WEIGHTS),
        "images": [(str(path), frame) for path, frame in args.image],
        "loras": [(str(path), scale) for option in LORAS
                  for path, scale in getattr(args, option[2:].replace("-", "_"))],
        "ignore_alpha": args.ignore_alpha, "measured": args.report,
        "asked": args.asked,
        "read": {str(path): kept_digest(path) for _, path in reads(args) if path != args.jobs}}


def is_made(record: Path, request: Mapping[str, Any], written: Sequence[Path]) -> bool:
    """Whether a record says that the same was asked for, and all that it wrote is there unchanged.

    request    what a clip is made of (`requested`)
    written    the files and folders that are wanted
    """
    try:
        made = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return (isinstance(made, dict) and is_of(made, request)
            and all(path.exists() for path in written) and made.get("written") == digests(written))


def is_of(record: Mapping[str, Any], request: Mapping[str, Any]) -> bool:
    """Whether a record has all that a request has, as JSON gives both back."""
    return bool(as_json(request).items() <= record.items())


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives values back: tuples are lists there, and what is not finite is None."""
    read: dict[str, Any] = json.loads(json.dumps(nonfinite_to_none(values)))
    return read


def digests(paths: Sequence[Path]) -> dict[str, str]:
    """sha256 of what each of some paths holds."""
    return {str(path): sha256_of(path) for path in paths}


@dataclass(frozen=True)
class Crew:
    """The processes that share the work: this one alone, or those that torchrun started."""
    rank: int = 0
    size: int = 1

    def share(self, work: Sequence[T]) -> Sequence[T]:
        """This process's part."""
        return work[self.rank::self.size]

    def gather(self, found: list[T]) -> list[T]:
        """What all of them found, for each of them, when the last has come so far."""
        if self.size == 1:
            return found
        every: list[list[T]] = [[]] * self.size
        distributed.all_gather_object(every, found)
        return [one for part in every for one in part]


def failure(where: str, error: Exception) -> str:
    """What failed of a file of jobs, and where it stands, which is said at once; raises what is not
    foreseen, and all where there is no file."""
    if not where or not is_expected(error):
        raise error
    line = f"{where}: {format_error(error)[1]}"
    tqdm.write(line, file=sys.stderr)
    return line


def measure_each(crew: Crew, work: Sequence[tuple[str, T]], measure: Callable[[T], dict[str, Any]],
                 path: Path, records: list[dict[str, Any]]) -> list[str]:
    """Adds a record of each piece of work, which stands somewhere, and writes all to a file, as
    often as each process has measured one; returns what failed."""
    failed: list[str] = []
    for start in range(0, len(work), crew.size):
        found, lost = [], []
        for where, one in crew.share(work[start:start + crew.size]):        # one, or none
            try:
                found.append(measure(one))
            except Exception as error:
                lost.append(failure(where, error))
        records += crew.gather(found)
        failed += crew.gather(lost)
        if crew.rank == 0:
            write_jsonl(path, records)
    return failed


@contextlib.contextmanager
def assembled() -> Iterator[Crew]:
    """The crew, with the cores of the machine shared among its processes."""
    if not distributed.is_available() or not distributed.is_torchelastic_launched():
        yield Crew()
        return
    distributed.init_process_group("gloo", timeout=FOREVER)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    try:
        yield Crew(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
