"""Files that a job reads and writes."""
import argparse
import dataclasses
from functools import partial
from pathlib import Path

from ..checkpoints.detect import LORAS
from ..checkpoints.model_file import DEFAULT_WEIGHTS
from ..files import OutputFile, check_io_conflicts, is_mcl_record


@dataclasses.dataclass(frozen=True)
class OutputClip:
    """One clip of a job.

    Attributes:
        args: Options of the job.
        seed: Seed of the clip.
        out: The video file or folder.
        maps: Folder of the page with the attention maps, or None.
    """

    args: argparse.Namespace
    seed: int
    out: Path
    maps: Path | None

    @property
    def record_path(self) -> Path:
        """File that records all settings of the clip, such as out.mp4.json."""
        return self.out.with_name(self.out.name + ".json")

    @property
    def comparison_path(self) -> Path | None:
        """File of the comparison with the reference, or None."""
        return with_suffix(self.out, "-compare") if self.args.compare else None

    def outputs(self) -> list[OutputFile]:
        """Return all files that are written; those not named by the user must be our own."""
        is_folder = not self.out.suffix
        is_own = partial(is_mcl_record, self.record_path)
        is_named = self.out == self.args.out
        files = [OutputFile("--out", self.out, is_folder, None if is_named else is_own),
                 OutputFile("--out", self.record_path, is_replaceable=is_own)]
        if self.comparison_path is not None:
            files.append(OutputFile("--compare", self.comparison_path, is_folder, is_own))
        if self.maps is not None:
            files.append(OutputFile("--maps", self.maps, is_folder=True))
        return files

    def output_paths(self) -> list[Path]:
        """Return the files that are complete when the record exists, which is written last."""
        saved = [] if self.args.save_motion is None else [self.args.save_motion]
        return saved + [file.path for file in self.outputs() if file.path != self.record_path]


def output_clips(args: argparse.Namespace) -> list[OutputClip]:
    """Return the clips of a job: out.mp4, or out-0.mp4, out-1.mp4, ... by their seeds."""
    if args.num_samples == 1:
        return [OutputClip(args, args.seed, args.out, args.maps)]
    return [OutputClip(args, seed, with_suffix(args.out, f"-{seed}"),
                       None if args.maps is None else with_suffix(args.maps, f"-{seed}"))
            for seed in range(args.seed, args.seed + args.num_samples)]


def with_suffix(path: Path, suffix: str) -> Path:
    """Return a-suffix.mp4 for a.mp4."""
    return path.parent / (path.stem + suffix + path.suffix)


def input_files(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """Return all files that a job reads, each with its option."""
    files = [("--ref", args.ref), ("--motion", args.motion), ("--jobs", args.jobs),
             ("--weights", args.weights or DEFAULT_WEIGHTS),
             *(("--image", path) for path, _ in args.image), *lora_files(args)]
    return [(option, path) for option, path in files if path is not None]


def lora_files(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """Return the LoRA files of a job, each with its option."""
    return [(option, path) for option, path, _ in scaled_loras(args)]


def scaled_loras(args: argparse.Namespace) -> list[tuple[str, Path, float]]:
    """Return option, file and scale of each LoRA of a job."""
    return [(option, path, scale) for option in LORAS
            for path, scale in getattr(args, option[2:].replace("-", "_"))]


def output_files(args: argparse.Namespace) -> list[OutputFile]:
    """Return all files that a job writes."""
    saved = [] if args.save_motion is None else [OutputFile("--save-motion", args.save_motion)]
    return saved + [file for clip in output_clips(args) for file in clip.outputs()]


def check_jobs_io(jobs: list[argparse.Namespace]) -> None:
    """Raise InputError if a job would write over what it or another job reads or writes."""
    suffixes = [f" of {args.source}" if args.source else "" for args in jobs]
    check_io_conflicts(
        [(option + suffix, path) for args, suffix in zip(jobs, suffixes)
         for option, path in input_files(args)],
        [dataclasses.replace(file, option=file.option + suffix)
         for args, suffix in zip(jobs, suffixes) for file in output_files(args)])
