"""Many clips in one run: a file of jobs, shared among processes, continued after a failure."""
import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed

from ..checkpoints.model_file import DEFAULT_WEIGHTS
from ..config import SampleConfig, short_repr
from ..errors import InputError
from ..files import check_readable, sha256_of
from ..video.read import read_image, read_video
from .arguments import parse_args, validate_args
from .outputs import OutputClip, check_jobs_io, input_files, scaled_loras

T = TypeVar("T")
cached_sha256 = functools.cache(sha256_of)
NO_TIMEOUT = datetime.timedelta(days=365)   # a process may wait for others for a long time


def parse_jobs(argv: Sequence[str]) -> list[argparse.Namespace]:
    """Return the options of one job, or with --jobs of each line of a file.

    Raises:
        InputError: If an option or a line is wrong; the message names the line.
    """
    common = parse_args(argv)
    path = common.jobs
    if path is None:
        return [common]
    check_readable(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a file of text lines ({error}). Give one JSON object per "
                         "line") from error
    jobs = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        source = f"{path}, line {number}"
        try:
            options = json.loads(line)
            if not isinstance(options, dict):
                raise ValueError("not an object of options")
            job = parse_args(to_argv(options), common)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source}: {error}") from error
        job.source = source
        jobs.append(job)
    if not jobs:
        raise InputError(f"{path}: has no jobs. Write one JSON object per line")
    return jobs


def to_argv(options: Mapping[str, Any]) -> list[str]:
    """Return a job's options as command-line arguments.

    {"top_k": 3, "compare": true, "subject": ["a", "b"]} becomes --top-k=3 --compare --subject=a
    --subject=b.

    Raises:
        ValueError: If a name is not an option of a job, or a value has a wrong type.
    """
    argv: list[str] = []
    for name, value in options.items():
        if name in ("help", "help_all", "help-all", "jobs") or not (
                re.fullmatch("[a-z][a-z_-]*", name)):
            raise ValueError(f"{short_repr(name)} is not an option of a job")
        option = "--" + name.replace("_", "-")
        for element in value if isinstance(value, list) else [value]:
            if element is True:
                argv.append(option)
            elif isinstance(element, (str, int, float)) and element is not False:
                argv.append(f"{option}={' --' if element == '--' else element}")    # argparse drops --
            elif element is not False and element is not None:
                raise ValueError(f"{name} = {short_repr(element)} is not valid: it must be text, "
                                 "a number, true, or a list of these")
    return argv


def validate_jobs(jobs: Sequence[argparse.Namespace]) -> list[SampleConfig]:
    """Return the settings of each job after checking everything that needs no weights.

    Raises:
        InputError: If anything is wrong; the message names the line of a file of jobs.
    """
    configs = []
    for args in jobs:
        try:
            configs.append(validate_args(args))
            if args.jobs is not None:   # a single job reads its files at once
                probe_inputs(args, configs[-1].num_frames)
        except InputError as error:
            raise InputError(f"{args.source}: {error}" if args.source else str(error)) from error
    check_jobs_io(list(jobs))
    return configs


def probe_inputs(args: argparse.Namespace, num_frames: int) -> None:
    """Raise InputError if a job's reference or an image cannot be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # they are shown when the file is really read
        if args.ref is not None:
            read_video(args.ref, num_frames, (8, 8), args.start, args.duration, stride=args.stride)
        for path, _ in args.image:
            read_image(path, (8, 8))


def job_fingerprint(clip: OutputClip, config: SampleConfig) -> dict[str, Any]:
    """Return everything that a clip depends on, except the device and the packages' versions."""
    args = clip.args
    return {
        "prompt": args.prompt, "reference": str(args.ref or args.motion), "seed": clip.seed,
        "settings": dataclasses.asdict(config), "start": args.start, "duration": args.duration,
        "stride": args.stride, "fit": args.fit, "fps": args.fps,
        "weights": str(args.weights or DEFAULT_WEIGHTS),
        "images": [(str(path), frame) for path, frame in args.image],
        "loras": [(str(path), scale) for _, path, scale in scaled_loras(args)],
        "ignore_alpha": args.ignore_alpha, "has_report": args.report,
        "requested_device_dtype": args.requested_device_dtype,
        "inputs": {str(path): cached_sha256(path) for _, path in input_files(args)
                   if path != args.jobs}}


def is_up_to_date(clip: OutputClip, config: SampleConfig) -> bool:
    """Return True if a clip's record has its fingerprint and all its files are unchanged."""
    try:
        record = json.loads(clip.record_path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    expected, paths = json.loads(json.dumps(job_fingerprint(clip, config))), clip.output_paths()
    return (isinstance(record, dict) and expected.items() <= record.items()
            and all(path.exists() for path in paths)
            and record.get("written") == sha256_by_path(paths))


def sha256_by_path(paths: Sequence[Path]) -> dict[str, str]:
    """Return the sha256 of files and folders by path."""
    return {str(path): sha256_of(path) for path in paths}


@dataclass(frozen=True)
class WorkerGroup:
    """Processes that share the work: this one alone, or those that torchrun started."""

    rank: int = 0
    size: int = 1

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's part of the items."""
        return items[self.rank::self.size]

    def all_gather(self, items: list[T]) -> list[T]:
        """Return the items of all processes, when the last one has called this method."""
        if self.size == 1:
            return items
        parts: list[list[T]] = [[]] * self.size
        distributed.all_gather_object(parts, items)
        return [item for part in parts for item in part]


@contextlib.contextmanager
def distributed_workers() -> Iterator[WorkerGroup]:
    """Return the worker group as a context; the processes share the machine's cores."""
    if not distributed.is_available() or not distributed.is_torchelastic_launched():
        yield WorkerGroup()
        return
    distributed.init_process_group("gloo", timeout=NO_TIMEOUT)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    try:
        yield WorkerGroup(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
