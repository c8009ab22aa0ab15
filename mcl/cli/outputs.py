"""What a job reads and writes, as its options name it, and that neither is lost."""
import argparse
import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..checkpoints.model_file import DEFAULT_WEIGHTS
from ..checkpoints.detect import LORAS
from ..files import OutputFile, check_io_conflicts, is_mcl_record


def check_files(jobs: list[argparse.Namespace]) -> None:
    """That no job destroys what it or another one reads, writes, or what is somebody else's."""
    of = [f" of {args.where}" if args.where else "" for args in jobs]
    check_io_conflicts([(option + job, path) for args, job in zip(jobs, of)
                for option, path in reads(args)],
               [dataclasses.replace(write, what=write.what + job) for args, job in zip(jobs, of)
                for write in writes(args)])


def reads(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """All files that a job reads, each with its option."""
    named = [("--ref", args.ref), ("--motion", args.motion), ("--jobs", args.jobs),
             ("--weights", args.weights or DEFAULT_WEIGHTS),
             *(("--image", path) for path, _ in args.image),
             *((option, path) for option in LORAS
               for path, _ in getattr(args, option[2:].replace("-", "_")))]
    return [(option, path) for option, path in named if path is not None]


def writes(args: argparse.Namespace) -> list[OutputFile]:
    """All files that a job writes."""
    kept = [] if args.save_motion is None else [OutputFile("--save-motion", args.save_motion)]
    return kept + [write for clip in clips_of(args) for write in clip.writes()]


@dataclass(frozen=True)
class Clip:
    """One clip of a job, by its seed, and where it goes."""
    args: argparse.Namespace
    seed: int
    out: Path
    maps: Path | None                   # the folder of its pictures

    @property
    def record(self) -> Path:
        """out.mp4.json: all settings that it was made with."""
        return self.out.with_name(self.out.name + ".json")

    @property
    def compared(self) -> Path | None:
        """The clip beside its reference, out-compare.mp4."""
        return named(self.out, "-compare") if self.args.compare else None

    def writes(self) -> list[OutputFile]:
        """All that is written. The record tells whether what stands there is of an earlier run."""
        ours, folder = partial(is_mcl_record, self.record), not self.out.suffix
        result = [OutputFile("--out", self.out, folder, None if self.out == self.args.out else ours),
                  OutputFile("--out", self.record, ours=ours)]
        if self.compared is not None:
            result.append(OutputFile("--compare", self.compared, folder, ours))
        if self.maps is not None:
            result.append(OutputFile("--maps", self.maps, folder=True))
        return result

    def made(self) -> list[Path]:
        """What is whole if the record, which is written last, is of it."""
        kept = [] if self.args.save_motion is None else [self.args.save_motion]
        return kept + [write.path for write in self.writes() if write.path != self.record]


def clips_of(args: argparse.Namespace) -> list[Clip]:
    """out.mp4, or out-0.mp4, out-1.mp4, ... by their seeds; likewise their folders of pictures."""
    if args.num_samples == 1:
        return [Clip(args, args.seed, args.out, args.maps)]
    return [Clip(args, seed, named(args.out, f"-{seed}"),
                 None if args.maps is None else named(args.maps, f"-{seed}"))
            for seed in range(args.seed, args.seed + args.num_samples)]


def named(path: Path, more: str) -> Path:
    """a.mp4 -> a-more.mp4."""
    return path.parent / (path.stem + more + path.suffix)
