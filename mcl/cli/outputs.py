"""Files that a job reads and writes."""
import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..checkpoints.detect import LORAS
from ..config import SampleConfig
from ..files import atomic_write, write_record
from ..ownership import OutputFile, check_io_conflicts, read_record, recorded_files, sha256_of
from ..video.write import write_video


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
        """Return all files that are written; the record lists those not named by the user."""
        kind = "file" if self.out.suffix else "folder"
        files = (("--out", self.out, kind, None if self.out == self.args.out else self.record),
                 ("--out", self.record, "file", self.record),
                 ("--compare", self.comparison, kind, self.record), ("--maps", self.maps, "folder"),
                 ("--save-motion", self.args.save_motion, "file"),
                 ("--inversion-dir", self.args.inversion_dir, "cache"))
        return [OutputFile(option, path, *rest) for option, path, *rest in files if path]

    def output_paths(self) -> list[Path]:
        """Return the files that are complete when the record exists, which is written last."""
        return [f.path for f in self.outputs() if f.path != self.record and f.kind != "cache"]

    def write_video(self, path: Path, frames: Tensor, fps: float) -> str:
        """Write a video of this clip and return its sha256.

        The record lists the new file before it replaces an earlier one, and still lists the earlier
        one, so that an interrupted run leaves no file that the next run does not know.
        """
        if not path.suffix:             # a folder has a record of its own
            write_video(path, frames, fps)
            return sha256_of(path)
        with atomic_write(path) as temporary:
            write_video(temporary, frames, fps)
            sha256, earlier = sha256_of(temporary), sorted(recorded_files(self.record))
            self.write_record({"replacing": earlier}, {path: sha256})
        return sha256

    def write_record(self, content: Mapping[str, Any], written: Mapping[Path, str]) -> None:
        """Write the record of this clip, which lists the files of earlier runs as well."""
        new = {str(path): sha256 for path, sha256 in written.items()}
        earlier = read_record(self.record).get("written", {})
        write_record(self.record, {**content, "written": earlier | new})


def output_clips(args: argparse.Namespace, config: SampleConfig) -> list[OutputClip]:
    """Return the clips of a job: out.mp4, or out-0.mp4, out-1.mp4, ... by their seeds."""
    clips = []
    for seed in range(args.seed, args.seed + args.num_samples):
        suffix = f"-{seed}" if args.num_samples > 1 else ""
        out = with_suffix(args.out, suffix)
        comparison = with_suffix(out, "-compare") if args.compare else None
        maps = args.maps and with_suffix(args.maps, suffix)
        clips.append(OutputClip(args, config, seed, out, Path(f"{out}.json"), comparison, maps))
    return clips


def with_suffix(path: Path, suffix: str) -> Path:
    """Return a-suffix.mp4 for a.mp4."""
    return path.parent / (path.stem + suffix + path.suffix)


def input_files(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """Return all files that a job reads, each with its option."""
    files = [("--ref", args.ref), ("--motion", args.motion), ("--jobs", args.jobs),
             ("--weights", args.weights), *(("--image", path) for path, _ in args.image),
             *(("--embedding", path) for _, path in args.embedding),
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
        writes += [f if f.kind == "cache" else f._replace(option=f.option + suffix)
                   for f in clip.outputs()]
    check_io_conflicts(dict.fromkeys(reads), dict.fromkeys(writes))     # clips share --save-motion
