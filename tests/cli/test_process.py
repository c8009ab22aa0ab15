"""Exit codes, signals, and output streams that cannot be written."""
import contextlib
import os
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
    return [ROOT / "sample.py", "--weights", weights, "--ref", REFERENCE, "--prompt", "a star"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize("name, code, word", [
    ("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated"), ("SIGHUP", 143, "terminated")])
def test_signal_ends_in_one_line_and_leaves_no_file(start, argv, tmp_path, name, code, word):
    process = start([*argv, "--out", "a.mp4", "--steps", "1000", "--guidance-steps", "1000"],
                    tmp_path)
    output = ""
    while "loss=" not in output:
        output += process.stderr.read(20)
    os.kill(process.pid, getattr(signal, name))
    *_, last = process.stderr.read().splitlines()
    assert process.wait() == code and last == f"{word}; no unfinished file is left"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_second_signal_does_not_disturb_the_first(start, tmp_path):
    code = ("import os, signal, time; from mcl.cli.process import exit_code_of, run_main\n"
            "def action():\n    try:\n        os.kill(os.getpid(), signal.SIGINT)\n"
            "    finally:\n        os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.1)\n"
            "        print('cleaned up')\nrun_main(lambda: exit_code_of(action))")
    with open(tmp_path / "out.txt", "w") as stdout:
        process = start(["-c", code], tmp_path, stdout)
    assert process.stderr.read() == "interrupted; no unfinished file is left\n"
    assert process.wait() == 130 and (tmp_path / "out.txt").read_text() == "cleaned up\n"


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
    process = subprocess.Popen(         # pytest's parent may ignore the signal
        [sys.executable, ROOT / script], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "") and process.returncode == 130


def closed_pipe():
    """Return a file whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
@pytest.mark.parametrize("stdout, is_stderr_full", [
    (closed_pipe, False), (lambda: open(os.devnull, "w"), True),
    (lambda: open("/dev/full", "w"), False), (contextlib.nullcontext, False)],
    ids=["closed pipe", "full stderr", "full stdout", "closed stdout"])
def test_files_are_written_even_if_messages_cannot_be(start, argv, tmp_path, stdout,
                                                      is_stderr_full):
    with stdout() as file:
        process = start([*argv, "--steps", 1, "--guidance-steps", 0, "--num-samples", 2,
                         "--compare", "--out", "a.gif"], tmp_path, file, is_stderr_full)
    output = process.stderr.read()
    assert process.wait() == 0 and len(list(tmp_path.glob("*.gif"))) == 4
    assert "Traceback" not in output and "Exception" not in output


def test_wrong_usage_is_one_line_without_traceback(start, tmp_path):
    process = start([ROOT / "sample.py", "--prompt", "x"], tmp_path)
    assert process.stderr.read() == "error: sample.py needs --ref, a video with the motion\n"
    assert process.wait() == 2


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
