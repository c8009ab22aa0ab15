"""Many clips in one run: a file of jobs, shared among processes, continued after a failure."""
import argparse
import atexit
import dataclasses
import datetime
import functools
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from .. import InputError, read_image, read_video
from ..config import short_repr
from ..files import check_readable, sha256_of
from .arguments import parse_args, validate_args
from .outputs import OutputClip, check_jobs_io, input_files, output_clips, scaled_loras

cached_sha256 = functools.cache(sha256_of)


def read_jobs(common: argparse.Namespace) -> list[OutputClip]:
    """Return the clips of a command line, or with --jobs of each line of a file.

    Everything that needs no weights is checked.

    Raises:
        InputError: If an option or a line is wrong; the message names the line.
    """
    if common.jobs is None:
        clips = output_clips(common, validate_args(common))
        check_jobs_io(clips)
        return clips
    check_readable(common.jobs)
    clips, lines = [], common.jobs.read_bytes().split(b"\n") if common.jobs.is_file() else []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            source = f"{common.jobs}, line {number}"
            try:
                args = parse_args(to_argv(json.loads(line)), vars(common))
                args.source = source
                config = validate_args(args)
                probe_inputs(args, config.num_frames)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{source}: {error}") from error
            clips += output_clips(args, config)
    if not clips:
        raise InputError(f"{common.jobs}: has no jobs. Write one JSON object of options per line")
    check_jobs_io(clips)
    return clips


def to_argv(options: Any) -> list[str]:
    """Return a job's options as command-line arguments.

    {"top_k": 3, "compare": true, "subject": ["a", "b"]} becomes --top-k=3 --compare --subject=a
    --subject=b.

    Raises:
        ValueError: If a name is not an option of a job, or a value has a wrong type.
    """
    if not isinstance(options, dict):
        raise ValueError(f"{short_repr(options)} is not a job: write an object of options")
    argv = []
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        if option in ("--help", "--help-all", "--jobs", "--list-words"):
            raise ValueError(f"{option} is not an option of a job. Remove it")
        for element in value if isinstance(value, list) else [value]:
            if isinstance(element, (dict, list)):
                raise ValueError(f"{name} = {short_repr(element)}: use text, numbers or true")
            if element is not None and element is not False:
                argv.append(option if element is True else f"{option}={element}")
    return argv


def probe_inputs(args: argparse.Namespace, num_frames: int) -> None:
    """Raise InputError if a job's reference or an image cannot be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # they are shown when the file is really read
        if args.ref is not None:
            read_video(args.ref, num_frames, (8, 8), args.start, args.duration, stride=args.stride)
        for path, _ in args.image:
            read_image(path, (8, 8))


def job_fingerprint(clip: OutputClip) -> dict[str, Any]:
    """Return everything that a clip depends on, except the device and the packages' versions."""
    args = clip.args
    names = ("prompt", "start", "duration", "stride", "fit", "fps", "ignore_alpha")
    return {name: getattr(args, name) for name in names} | {
        "reference": str(args.ref or args.motion), "seed": clip.seed,
        "settings": dataclasses.asdict(clip.config), "weights": str(args.weights),
        "images": [(str(path), frame) for path, frame in args.image],
        "loras": [(str(path), scale) for _, path, scale in scaled_loras(args)],
        "has_report": args.report, "requested_device_dtype": (args.device, args.dtype),
        "inputs": {str(path): cached_sha256(path) for _, path in input_files(args)
                   if path != args.jobs}}


def is_up_to_date(clip: OutputClip) -> bool:
    """Return True if a clip's record has its fingerprint and all its files are unchanged."""
    try:
        record = json.loads(clip.record.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    expected = job_fingerprint(clip) | {"written": sha256_by_path(clip.output_paths())}
    return isinstance(record, dict) and json.loads(json.dumps(expected)).items() <= record.items()


def sha256_by_path(paths: Sequence[Path]) -> dict[str, str]:
    """Return the sha256 of files and folders by path."""
    return {str(path): sha256_of(path) for path in paths}


def join_workers() -> tuple[int, int]:
    """Return this process's rank and the number of processes that torchrun started, or (0, 1).

    The processes share the machine's cores.
    """
    if not distributed.is_available() or not distributed.is_torchelastic_launched():
        return 0, 1
    distributed.init_process_group("gloo", timeout=datetime.timedelta(days=365))    # for long jobs
    atexit.register(distributed.destroy_process_group)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    return distributed.get_rank(), distributed.get_world_size()


def all_gather(items: list[str], num_workers: int) -> list[str]:
    """Return the items of all processes, when the last one has called this function."""
    parts = [items] * num_workers
    if num_workers > 1:
        distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]
