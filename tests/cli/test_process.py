"""Signals and closed streams end the command in order."""
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARGV = [sys.executable, ROOT / "sample.py", "--ref", ROOT / "examples" / "figure_eight.mp4",
        "--prompt", "a star"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize("number, code, word", [
    (signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"),
    (getattr(signal, "SIGHUP", None), 143, "terminated")])
def test_a_signal_ends_in_one_line_and_leaves_no_file(tmp_path, number, code, word):
    process = subprocess.Popen(
        [*ARGV, "--out", "a.mp4"], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))   # the tests may ignore it
    output = ""
    while "seed 0" not in output:
        output += process.stderr.read(20)
    process.send_signal(number)
    *_, last = process.communicate()[1].splitlines()
    assert process.returncode == code and last == f"{word}; no unfinished file is left"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
@pytest.mark.parametrize("streams", ["| head -c0", "2>/dev/full"])
def test_files_are_written_even_if_the_output_cannot_be_printed(tmp_path, streams):
    argv = [*ARGV, "--steps", "2", "--guidance-steps", "1", "--size", "64x64", "--num-samples", "2",
            "--out", "a.gif"]
    line = " ".join(shlex.quote(str(argument)) for argument in argv)
    process = subprocess.run(["bash", "-c", f"{line} {streams}"], cwd=tmp_path,
                             capture_output=True, text=True)
    assert "Traceback" not in process.stderr + process.stdout
    assert "Exception" not in process.stderr and len(list(tmp_path.glob("*.gif"))) == 2
