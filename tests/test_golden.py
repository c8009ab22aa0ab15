"""The README's first job against its stored result, which shows any change of a number.

After a change on purpose, `python -m tests.test_golden` writes the stored result again.
"""
import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F

from mcl import read_video
from mcl.cli.sample import main

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "data" / "golden_main_job.npz"
LEVELS = 16                 # the stored values are in 16ths of a gray level


def main_job(folder):
    """Return the frames of the job in 4 steps, as means (f, c, 16, 16), and the losses."""
    out = Path(folder) / "out.webp"         # lossless
    with warnings.catch_warnings():
        assert main(["--ref", str(ROOT / "examples" / "figure_eight.mp4"), "--prompt",
                     "a red star on a navy background", "--steps", "4", "--guidance-steps", "2",
                     "--device", "cpu", "--out", str(out)]) == 0
    frames = F.adaptive_avg_pool2d(read_video(out, 16, (128, 128)), 16)
    return ((frames + 1) * 127.5).numpy(), json.loads(Path(f"{out}.json").read_text())["loss"]


def test_first_job_of_the_readme_gives_the_stored_result(tmp_path):
    """Processors that sum in another order differ by 0.02 in the mean and by 0.07 at most."""
    frames, losses = main_job(tmp_path)
    golden = np.load(GOLDEN)
    difference = abs(frames - golden["frames"] / LEVELS)
    assert difference.mean() < 0.04 and difference.max() < 0.5
    assert losses == pytest.approx(golden["losses"].tolist(), rel=1e-3)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        means, loss = main_job(folder)
    np.savez_compressed(GOLDEN, frames=(means * LEVELS).round().astype(np.uint16), losses=loss)
