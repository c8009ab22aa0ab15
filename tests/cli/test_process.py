"""Exit codes, signals, and output streams that cannot be written."""
import os
import shlex
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from mcl.cli import convert
from mcl.cli.process import exit_code_of, print_line
from mcl.errors import InputError
from tests.cli.conftest import REFERENCE, ROOT


@pytest.fixture(scope="module")
def argv(weights):
    return [sys.executable, ROOT / "sample.py", "--weights", weights, "--ref", REFERENCE,
            "--prompt", "a star"]


def start(argv, number, folder, **options):
    """Start a process that handles a signal in the default way, which pytest's parent may not."""
    return subprocess.Popen(argv, cwd=folder, stderr=subprocess.PIPE, text=True, **options,
                            preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize("name, code, word", [
    ("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated"), ("SIGHUP", 143, "terminated")])
def test_signal_ends_in_one_line_and_leaves_no_file(argv, tmp_path, name, code, word):
    number = getattr(signal, name)
    process = start([*argv, "--out", "a.mp4", "--steps", "1000", "--guidance-steps", "1000"],
                    number, tmp_path)
    output = ""
    while "loss=" not in output:
        output += process.stderr.read(20)
    process.send_signal(number)
    *_, last = process.communicate()[1].splitlines()
    assert process.returncode == code and last == f"{word}; no unfinished file is left"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_second_signal_does_not_disturb_the_first(tmp_path):
    code = ("import os, signal, time; from mcl.cli.process import exit_code_of, run_main\n"
            "def action():\n    try:\n        os.kill(os.getpid(), signal.SIGINT)\n"
            "    finally:\n        os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.1)\n"
            "        print('cleaned up')\nrun_main(lambda: exit_code_of(action))")
    process = start([sys.executable, "-c", code], signal.SIGINT, ROOT, stdout=subprocess.PIPE)
    assert process.communicate() == ("cleaned up\n", "interrupted; no unfinished file is left\n")
    assert process.returncode == 130


@pytest.mark.skipif(os.name != "posix", reason="the folder of a process cannot be deleted")
def test_deleted_current_folder_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert exit_code_of(lambda: 0) == 2
    assert capsys.readouterr().err == (
        "error: the current folder was deleted. Change to another folder\n")


def test_messages_are_single_lines_without_control_characters(capsys):
    def action():
        warnings.warn("a\nb\x1b[2J" + "x" * 10 ** 5, stacklevel=1)
        print_line("c\nd")
        raise InputError("e\x1b[31m" + "y" * 10 ** 5)

    assert exit_code_of(action) == 2
    captured = capsys.readouterr()
    assert captured.out == "c\\nd\n" and captured.err.startswith("warning: a\\nb\\x1b[2J")
    assert "\x1b" not in captured.err and captured.err.count("\n") == 2
    assert len(captured.err) < 5000


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize("script", ["sample.py", "convert_weights.py"])
def test_interrupt_while_pytorch_is_imported_prints_no_traceback(tmp_path, script):
    """A module that takes long stands in for PyTorch."""
    (tmp_path / "torch.py").write_text("import time\nprint(flush=True)\ntime.sleep(60)\n")
    process = start([sys.executable, ROOT / script], signal.SIGINT, tmp_path,
                    stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "") and process.returncode == 130


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
@pytest.mark.parametrize("streams", ["| head -c0", "2>/dev/full", ">/dev/full", ">&-"])
def test_files_are_written_even_if_messages_cannot_be(argv, tmp_path, streams):
    command = shlex.join(map(str, [*argv, "--steps", 1, "--guidance-steps", 0, "--num-samples", 2,
                                   "--compare", "--out", "a.gif"]))
    process = subprocess.run(["bash", "-c", f"set -o pipefail; {command} {streams}"], cwd=tmp_path,
                             capture_output=True, text=True)
    assert process.returncode == 0 and len(list(tmp_path.glob("*.gif"))) == 4
    assert "Traceback" not in process.stderr and "Exception" not in process.stderr


def test_wrong_usage_is_one_line_without_traceback(argv):
    process = subprocess.run([sys.executable, ROOT / "sample.py", "--prompt", "x"],
                             capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr == "error: sample.py needs --ref, a video with the motion\n"


@pytest.mark.parametrize("error, line", [
    (MemoryError("too large"), "failed: too large"), (MemoryError(), "failed: out of memory"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:1] err == 0. DefaultCPUAllocator: can't allocate "
                  "memory: 9 bytes\nmore"),
     "failed: DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_lack_of_memory_is_one_line(error, line, capsys):
    def action():
        raise error

    assert exit_code_of(action) == 1 and capsys.readouterr().err == line + "\n"


def test_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_code_of(lambda: 1 // 0)


@pytest.mark.parametrize("option", [
    "--sparsectrl", "--base", "--motion-module", "--vae", "--text-encoder"])
def test_an_option_that_is_given_twice_is_rejected(option, capsys):
    assert convert.main([option, "a", option, "b", "--out", "c.safetensors"]) == 2
    assert f"error: {option} is given twice: give it once" in capsys.readouterr().err
