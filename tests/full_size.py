"""Memory and time of converting and loading Stable Diffusion 1.5 at its full size.

    python -m tests.full_size FOLDER

Makes files of the real names, shapes and precision (5.9 GB of float32) with numbers of no meaning
in FOLDER, converts them, loads the result, and prints what each took.
"""
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from mcl.files import stream_safetensors

from .foreign import listing

ROOT = Path(__file__).parent.parent
LOAD = "from mcl import load_model; load_model({!r}, device='cpu', dtype='float16')"


def shapes(name):
    return {key: tuple(map(int, shape.split("x"))) for key, shape in listing(name).items()}


def numbers(shape, g):
    """Random in a part of it, repeated: drawing a thousand million takes too long."""
    some = 0.05 * torch.randn(min(math.prod(shape), 1 << 16), generator=g)
    return some.repeat(-(-math.prod(shape) // len(some)))[:math.prod(shape)].reshape(shape)


def measured(what, argv):
    """Runs a command; prints its time and the most memory that it held."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, what
    print(f"{what}: {time.perf_counter() - began:.0f} s, {usage.ru_maxrss * 1024 / 1e9:.2f} GB "
          "of memory at most")


def main():
    folder = Path(sys.argv[1])
    g = torch.Generator().manual_seed(0)
    base, module, out = (folder / name for name in
                         ("base.safetensors", "v3_sd15_mm.ckpt", "sd15.safetensors"))
    names = shapes("ldm_single_file")
    stream_safetensors(base, names, torch.float32, (numbers(s, g) for s in names.values()), {})
    state = {key: numbers(shape, g) for key, shape in shapes("mm_v3").items()
             if "pos_encoder" not in key}
    torch.save(state, module)
    del state
    print(f"{base.stat().st_size / 1e9:.2f} + {module.stat().st_size / 1e9:.2f} GB")
    measured("convert to fp16", ["convert_weights.py", "--base", base, "--motion-module", module,
                                 "--out", out])
    print(f"{out.stat().st_size / 1e9:.2f} GB")
    measured("load as float16", ["-c", LOAD.format(str(out))])


if __name__ == "__main__":
    main()
