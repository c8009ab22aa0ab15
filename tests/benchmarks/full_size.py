"""Convert and run Stable Diffusion 1.5 at full size on a CPU.

    python tests/benchmarks/full_size.py --folder FOLDER

Writes a base model, a motion module, a domain adapter and a LoRA with the names and shapes of the
real files and random numbers, in float16, into FOLDER. Converts them to one model, and makes clips
of two steps with it. Prints the time and the peak memory of each command, and checks its output.
Needs 7 GB of disk and less than 20 GB of memory; the clips take about fifteen minutes.
"""
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

if not __package__:     # run as a file
    sys.path.insert(0, str(Path(__file__).parents[2]))

from mcl import read_video
from mcl.cli.process import run_main
from mcl.files import stream_safetensors
from mcl.ownership import check_writable
from tests.foreign import listing, sinusoid
from weights.training.options import option, run_with_options

ROOT = Path(__file__).parents[2]
FILES = {"--base": "ldm_single_file", "--motion-module": "mm_v3", "--adapter": "v3_sd15_adapter",
         "--lora": "kohya_lora"}


def write_random(folder: Path, name: str, is_tiny: bool) -> Path:
    """Write a float16 file with the names and shapes of a listing in tests/data."""
    def size(text: str) -> int:
        n = int(text.replace("r", "16"))        # r is the rank of a LoRA
        return n // 10 if is_tiny and n % 320 == 0 else n // 64 if is_tiny and n % 768 == 0 else n

    like = {key: torch.empty([size(n) for n in shape.split("x") if n != "scalar"], device="meta",
                             dtype=torch.float16) for key, shape in listing(name).items()}
    weights = (sinusoid(*t.shape[1:]).half() if key.endswith(".pe") else
               torch.randn(t.shape).mul_(0.1).half() for key, t in like.items())
    stream_safetensors(path := folder / f"{name}.safetensors", like, weights, {})
    return path


def run_command(title: str, argv: Sequence[object]) -> None:
    """Run a Python command, and print its time and its peak memory."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, argv)], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise MemoryError(f"{title} failed with status {status}")
    print(f"{title}: {time.perf_counter() - start:.0f} s, {usage.ru_maxrss * 1024 / 1e9:.2f} GB")


@dataclasses.dataclass
class Options:
    """Convert and run Stable Diffusion 1.5 at full size on a CPU."""

    folder: Path = option(Path(), "empty or new folder for 7 GB of files", required=True)
    tiny: bool = option(False, "a tenth of the channels, and one clip")


def run(o: Options) -> None:
    """Write the files, convert them, and make and check the clips."""
    folder, side = o.folder.resolve(), 32 if o.tiny else 256
    check_writable(folder, "folder")
    folder.mkdir(exist_ok=True)
    files = [(key, write_random(folder, name, o.tiny)) for key, name in FILES.items()]
    model = folder / "model.safetensors"
    run_command("convert", ["convert_weights.py", *sum(files, ()), "--out", model])
    for dtype, length in (("float32", 16), ("bfloat16", 16), ("bfloat16", 24))[2 * o.tiny:]:
        clip = folder / f"{dtype}-{length}.mp4"
        run_command(f"{length} frames in {dtype}", [
            "sample.py", "--weights", model, "--ref", "examples/figure_eight.mp4", "--prompt", "a",
            "--steps", 2, "--guidance-steps", 1, "--num-frames", length, "--size", f"{side}x{side}",
            "--dtype", dtype, "--device", "cpu", "--out", clip])
        record = json.loads(Path(f"{clip}.json").read_text("utf-8"))
        frames = read_video(clip, length, (side, side))
        assert record["dtype"] == dtype and len(frames) == length and frames.std() > 0
        assert len(record["loss"]) == 1 and math.isfinite(record["loss"][0])
        print(f"  {record['seconds']} s, loss {record['loss'][0]:.3g}")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_with_options("tests/benchmarks/full_size.py", Options, run, argv)


if __name__ == "__main__":
    run_main(main)
