"""Memory and time of converting and loading Stable Diffusion 1.5 at its full size.

    python -m tests.benchmarks.full_size FOLDER

Makes files of the real names, shapes and precision (5.9 GB of float32) with numbers of no meaning
in FOLDER, converts them, loads the result, and prints what each took.
"""
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mcl.checkpoints.model_file import build_on_meta
from mcl.cli import OneLineErrorParser, exit_code_of, run_main
from mcl.config import SD15
from mcl.files import atomic_write, check_writable, stream_safetensors

ROOT = Path(__file__).parent.parent.parent
LOAD = "from mcl import load_model; load_model({!r}, device='cpu', dtype='float16')"
FILES = {"unet": "unet/diffusion_pytorch_model.safetensors",
         "vae": "vae/diffusion_pytorch_model.safetensors",
         "text_encoder": "text_encoder/model.safetensors"}


def numbers(shapes: Mapping[str, Sequence[int]]) -> Iterator[Tensor]:
    """Random in a part of it, repeated: drawing a thousand million takes too long."""
    g = torch.Generator().manual_seed(0)
    for shape in shapes.values():
        some = 0.05 * torch.randn(min(math.prod(shape), 1 << 16), generator=g)
        copies = -(-math.prod(shape) // len(some))
        yield some.repeat(copies)[:math.prod(shape)].reshape(tuple(shape))


def measured(what: str, argv: Sequence[str]) -> None:
    """Runs a command; prints its time and the most memory that it held."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise MemoryError(f"to {what} failed with status {status}")
    print(f"{what}: {time.perf_counter() - began:.0f} s, {usage.ru_maxrss * 1024 / 1e9:.2f} GB "
          "of memory at most")


def main(argv: list[str] | None = None) -> int:
    p = OneLineErrorParser(prog="-m tests.benchmarks.full_size", description=__doc__.splitlines()[0])
    p.add_argument("folder", type=Path, help="empty or new, for 9 GB of files")
    return exit_code_of(lambda: run(p.parse_args(argv).folder.resolve()))


def run(folder: Path) -> None:
    check_writable(folder, folder=True)
    base, module, out = (folder / name for name in ("sd15", "v3_sd15_mm.ckpt", "out.safetensors"))
    model = build_on_meta(SD15)
    motion = {name: t.shape for name, t in model.unet.state_dict().items() if "motion_mod" in name}
    for part, file in FILES.items():
        shapes = {name: t.shape for name, t in getattr(model, part).state_dict().items()
                  if name not in motion}
        (base / file).parent.mkdir(parents=True, exist_ok=True)
        stream_safetensors(base / file, shapes, torch.float32, numbers(shapes), {})
    with atomic_write(module) as temporary:
        torch.save(dict(zip(motion, numbers(motion))), temporary)
    sizes = [sum((base / file).stat().st_size for file in FILES.values()), module.stat().st_size]
    print(" + ".join(f"{size / 1e9:.2f}" for size in sizes) + " GB")
    measured("convert to fp16", ["convert_weights.py", "--base", str(base), "--motion-module",
                                 str(module), "--out", str(out)])
    print(f"{out.stat().st_size / 1e9:.2f} GB")
    measured("load as float16", ["-c", LOAD.format(str(out))])


if __name__ == "__main__":
    run_main(main)
