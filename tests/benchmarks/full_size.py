"""Measure memory and time of converting and loading Stable Diffusion 1.5 at full size.

    python tests/benchmarks/full_size.py FOLDER

Writes files with the names, shapes and precision of the real ones (5.9 GB of float32) and random
numbers into FOLDER, converts them, loads the result, and prints what each of the two took.
"""
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

if not __package__:     # run as a file
    sys.path.insert(0, str(Path(__file__).parents[2]))

from mcl.checkpoints.model_file import build_on_meta
from mcl.cli.process import OneLineErrorParser, exit_code_of, run_main
from mcl.config import ModelConfig
from mcl.files import atomic_write, check_writable, stream_safetensors

ROOT = Path(__file__).parents[2]
LOAD = "from mcl import load_model; load_model({!r}, device='cpu', dtype='float16')"


def measure_command(title: str, argv: Sequence[str]) -> None:
    """Run a Python command, and print its time and its peak memory."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise MemoryError(f"{title} failed with status {status}")
    print(f"{title}: {time.perf_counter() - start:.0f} s, {usage.ru_maxrss * 1024 / 1e9:.2f} GB")


def run(folder: Path) -> None:
    """Write the files, and measure both commands."""
    check_writable(folder, is_folder=True)
    base, module, out = (folder / name for name in ("sd15", "v3_sd15_mm.ckpt", "out.safetensors"))
    model = build_on_meta(ModelConfig())
    motion = {name: t.shape for name, t in model.unet.state_dict().items() if "motion_mod" in name}
    for part in ("unet", "vae", "text_encoder"):
        prefix = "" if part == "text_encoder" else "diffusion_pytorch_"
        file = base / part / f"{prefix}model.safetensors"
        shapes = {name: t.shape for name, t in getattr(model, part).state_dict().items()
                  if name not in motion}
        file.parent.mkdir(parents=True, exist_ok=True)
        stream_safetensors(file, shapes, torch.float32, map(torch.rand, shapes.values()), {})
    with atomic_write(module) as temporary:
        torch.save({name: torch.rand(shape) for name, shape in motion.items()}, temporary)
    sources = (*base.rglob("*.safetensors"), module)
    print(f"{sum(file.stat().st_size for file in sources) / 1e9:.2f} GB")
    measure_command("convert to fp16", ["convert_weights.py", "--base", str(base),
                                        "--motion-module", str(module), "--out", str(out)])
    print(f"{out.stat().st_size / 1e9:.2f} GB")
    measure_command("load as float16", ["-c", LOAD.format(str(out))])


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    p = OneLineErrorParser(prog="tests/benchmarks/full_size.py",
                           description="Measure converting and loading at full size.")
    p.add_argument("folder", type=Path, help="empty or new folder for 9 GB of files")
    return exit_code_of(lambda: run(p.parse_args(argv).folder.resolve()))


if __name__ == "__main__":
    run_main(main)
