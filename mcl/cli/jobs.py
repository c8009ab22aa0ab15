"""Many clips in one run: a file of jobs, shared among processes, continued after a failure."""
import argparse
import atexit
import dataclasses
import datetime
import functools
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from .. import InputError, read_image, read_video
from ..config import short_repr
from ..ownership import check_readable, file_state, read_record, sha256_of
from .arguments import parse_args, validate_args
from .outputs import OutputClip, check_jobs_io, input_files, output_clips, scaled_loras

cached_sha256 = functools.cache(lambda path, state: sha256_of(path))


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
    probe = functools.cache(probe_inputs)       # many jobs may share a reference
    try:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                source = f"{common.jobs}, line {number}"
                options = json.loads(line, object_pairs_hook=unique_options)
                args = parse_args(to_argv(options), vars(common))
                args.source = source
                clips += output_clips(args, validate_args(args))
        source = str(common.jobs)
        if not clips:
            raise InputError("has no jobs. Write one JSON object of options per line")
        check_jobs_io(clips)
        for clip in clips:                      # after all checks that open no video
            args, source = clip.args, clip.args.source
            probe(args.ref, clip.config.num_frames, args.start or 0.0, args.duration, args.stride,
                  tuple(path for path, _ in args.image))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: {error}") from error
    return clips


def unique_options(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Raises ValueError for a name that is given twice, in any spelling."""
    options = {name.replace("_", "-"): value for name, value in pairs}
    if len(options) < len(pairs):
        raise ValueError("an option is given twice. Give each once")
    return options


def to_argv(options: Any) -> list[str]:
    """Return a job's options as command-line arguments.

    {"top-k": 3, "compare": true, "subject": ["a", "b"]} becomes --top-k=3 --compare --subject=a
    --subject=b.

    Raises:
        ValueError: If a name is not an option of a job, or a value has a wrong type.
    """
    if not isinstance(options, dict):
        raise ValueError(f"{short_repr(options)} is not a job: write an object of options")
    argv = []
    for name, value in options.items():
        option = f"--{name}"
        if option in ("--help", "--help-all", "--jobs", "--list-words"):
            raise ValueError(f"{option} is not an option of a job. Remove it")
        for element in value if isinstance(value, list) else [value]:
            if isinstance(element, (dict, list)):
                raise ValueError(f"{name} = {short_repr(element)}: use text, numbers or true")
            if element is not None and element is not False:
                argv.append(option if element is True else f"{option}={element}")
    return argv


def probe_inputs(reference: Path | None, num_frames: int, start: float, duration: float | None,
                 stride: int | None, images: tuple[Path, ...]) -> None:
    """Raise InputError if a job's reference or an image cannot be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # they are shown when the file is really read
        if reference is not None:
            read_video(reference, num_frames, (8, 8), start, duration, stride=stride)
        for path in images:
            read_image(path, (8, 8))


def hash_inputs(args: argparse.Namespace) -> dict[str, str]:
    """Return the sha256 of each file that a job reads, by path."""
    return {str(path): cached_sha256(path, file_state(path)) for _, path in input_files(args)
            if path != args.jobs}


def job_fingerprint(clip: OutputClip, inputs: dict[str, str]) -> dict[str, Any]:
    """Return everything that a clip depends on, except the device and the packages' versions.

    `inputs` is what `hash_inputs` returned before the files were read.
    """
    args = clip.args
    names = ("prompt", "start", "duration", "stride", "fit", "fps", "ignore_alpha")
    return {name: getattr(args, name) for name in names} | {
        "reference": str(args.ref or args.motion), "seed": clip.seed,
        "settings": dataclasses.asdict(clip.config), "weights": str(args.weights),
        "images": [(str(path), frame) for path, frame in args.image],
        "loras": [(str(path), scale) for _, path, scale in scaled_loras(args)],
        "has_report": args.report, "requested_device_dtype": (args.device, args.dtype),
        "embeddings": [(str(path), word) for word, path in args.embedding], "inputs": inputs}


def is_up_to_date(clip: OutputClip) -> bool:
    """Return True if a clip's record has its fingerprint and all its files are unchanged."""
    record, paths = read_record(clip.record), clip.output_paths()
    if not record or not all(path.exists() for path in paths):
        return False
    written = {str(path): sha256_of(path) for path in paths}
    expected = json.loads(json.dumps(job_fingerprint(clip, hash_inputs(clip.args))))
    return expected.items() <= record.items() and written.items() <= record["written"].items()


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
