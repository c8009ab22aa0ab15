"""What a job reads and writes, as its options name it, and that neither is lost."""
import argparse
import dataclasses
from functools import partial
from pathlib import Path

from ..checkpoint import EMBEDDED
from ..convert.formats import LORAS
from ..files import Write, check_plan, is_our_json


def check_files(jobs: list[argparse.Namespace]) -> None:
    """That no job destroys what it or another one reads, writes, or what is somebody else's."""
    of = [f" of job {i}" if len(jobs) > 1 else "" for i in range(1, len(jobs) + 1)]
    check_plan([(option + job, path) for args, job in zip(jobs, of)
                for option, path in reads(args)],
               [dataclasses.replace(write, what=write.what + job) for args, job in zip(jobs, of)
                for write in writes(args)])


def reads(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """All files that a job reads, each with its option."""
    named = [("--ref", args.ref), ("--motion", args.motion), ("--jobs", args.jobs),
             ("--weights", args.weights or EMBEDDED),
             *(("--image", path) for path, _ in args.image),
             *((option, path) for option in LORAS
               for path, _ in getattr(args, option[2:].replace("-", "_")))]
    return [(option, path) for option, path in named if path is not None]


def writes(args: argparse.Namespace) -> list[Write]:
    """All that a job writes. Its record tells whether what lies beside it is of an earlier run."""
    result = [] if args.save_motion is None else [Write("--save-motion", args.save_motion)]
    for out, maps in zip(outputs(args), maps_of(args)):
        ours = partial(is_our_json, sidecar_of(out))
        result += [Write("--out", out, not out.suffix, None if out == args.out else ours),
                   Write("--out", sidecar_of(out), ours=ours)]
        if args.compare:
            result.append(Write("--compare", beside(out), not out.suffix, ours))
        if maps is not None:
            result.append(Write("--maps", maps, folder=True))
    return result


def sidecar_of(out: Path) -> Path:
    """The record of a clip, out.mp4.json: all settings that it was made with."""
    return out.with_name(out.name + ".json")


def beside(out: Path) -> Path:
    """The clip beside its reference, out-compare.mp4."""
    return out.with_stem(out.stem + "-compare")


def maps_of(args: argparse.Namespace) -> list[Path | None]:
    """The folder of each sample's pictures, named as `outputs` are."""
    if args.num_samples == 1 or args.maps is None:
        return [args.maps] * args.num_samples
    return [args.maps.with_name(f"{args.maps.name}-{args.seed + i}")
            for i in range(args.num_samples)]


def outputs(args: argparse.Namespace) -> list[Path]:
    """Where each sample goes: out.mp4, or out-0.mp4, out-1.mp4, ... by their seeds."""
    if args.num_samples == 1:
        return [args.out]
    return [args.out.with_stem(f"{args.out.stem}-{args.seed + i}")
            for i in range(args.num_samples)]
