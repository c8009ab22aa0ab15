"""Files that a job reads and writes."""
import argparse
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..checkpoints.detect import LORAS
from ..config import SampleConfig
from ..files import OutputFile, check_io_conflicts, is_mcl_record


class OutputClip(NamedTuple):
    """One clip of a job.

    Attributes:
        args: Options of the job.
        config: Settings of the job.
        seed: Seed of the clip.
        out: The video file or folder.
        record: File that records all settings of the clip, such as out.mp4.json.
        comparison: File or folder of the comparison with the reference, or None.
        maps: Folder of the page with the attention maps, or None.
    """

    args: argparse.Namespace
    config: SampleConfig
    seed: int
    out: Path
    record: Path
    comparison: Path | None
    maps: Path | None

    def outputs(self) -> list[OutputFile]:
        """Return all files that are written; those not named by the user must be our own."""
        is_folder, is_own = not self.out.suffix, partial(is_mcl_record, self.record)
        files = (("--out", self.out, is_folder, None if self.out == self.args.out else is_own),
                 ("--out", self.record, False, is_own),
                 ("--compare", self.comparison, is_folder, is_own),
                 ("--maps", self.maps, True, None),
                 ("--save-motion", self.args.save_motion, False, None))
        return [OutputFile(option, path, *kind) for option, path, *kind in files if path]

    def output_paths(self) -> list[Path]:
        """Return the files that are complete when the record exists, which is written last."""
        return [file.path for file in self.outputs() if file.path != self.record]


def output_clips(args: argparse.Namespace, config: SampleConfig) -> list[OutputClip]:
    """Return the clips of a job: out.mp4, or out-0.mp4, out-1.mp4, ... by their seeds."""
    clips = []
    for seed in range(args.seed, args.seed + args.num_samples):
        suffix = f"-{seed}" if args.num_samples > 1 else ""
        out = with_suffix(args.out, suffix)
        clips.append(OutputClip(args, config, seed, out, out.parent / f"{out.name}.json",
                                with_suffix(out, "-compare") if args.compare else None,
                                args.maps and with_suffix(args.maps, suffix)))
    return clips


def with_suffix(path: Path, suffix: str) -> Path:
    """Return a-suffix.mp4 for a.mp4."""
    return path.parent / (path.stem + suffix + path.suffix)


def input_files(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """Return all files that a job reads, each with its option."""
    files = [("--ref", args.ref), ("--motion", args.motion), ("--jobs", args.jobs),
             ("--weights", args.weights),
             *(("--image", path) for path, _ in args.image),
             *((option, path) for option, path, _ in scaled_loras(args))]
    return [(option, path) for option, path in files if path is not None]


def scaled_loras(args: argparse.Namespace) -> list[tuple[str, Path, float]]:
    """Return option, file and scale of each LoRA of a job."""
    return [(option, path, scale) for option in LORAS
            for path, scale in getattr(args, option[2:].replace("-", "_"))]


def check_jobs_io(clips: list[OutputClip]) -> None:
    """Raise InputError if a job would write over what it or another job reads or writes."""
    reads, writes = [], []
    for clip in clips:
        suffix = f" of {clip.args.source}" if clip.args.source else ""
        reads += [(option + suffix, path) for option, path in input_files(clip.args)]
        writes += [f._replace(option=f.option + suffix) for f in clip.outputs()]
    check_io_conflicts(dict.fromkeys(reads), dict.fromkeys(writes))     # clips share --save-motion
