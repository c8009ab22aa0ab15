"""Code for Windows and for Apple's GPUs, run here with a pretended system."""
import io
import os
import signal
import sys

import pytest
import torch

from mcl.cli.process import run_main
from mcl.files import is_other_process
from mcl.networks.ops import scaled_dot_product_attention
from mcl.ownership import file_id


class MpsTensor(torch.Tensor):
    """Tensor that says that it is on an Apple GPU."""

    device = torch.device("mps")


def test_long_sequences_take_turns_on_apple_gpus(monkeypatch):
    q, k, v = torch.randn(3, 2, 2, 256, 8).unbind(0)
    expected, calls = scaled_dot_product_attention(q, k, v), []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda *args: calls.append(args[0].shape) or fused(*args))
    output = scaled_dot_product_attention(*(x.as_subclass(MpsTensor) for x in (q, k, v)))
    assert calls == [(2, 256, 8)] * 2
    assert torch.allclose(output.as_subclass(torch.Tensor), expected, atol=1e-6)
    calls.clear()
    scaled_dot_product_attention(*(x[..., :16, :].as_subclass(MpsTensor) for x in (q, k, v)))
    assert calls == [(2, 2, 16, 8)]


def test_no_signal_is_sent_on_windows_to_see_whether_a_process_runs(monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(os, "name", "nt")
        context.setattr(os, "kill", lambda *_: pytest.fail("Ctrl-C was sent"))
        results = is_other_process(2 ** 22 + 1), is_other_process(os.getpid())
    assert results == (True, False)


def test_names_that_differ_in_case_are_one_file_on_windows(monkeypatch, tmp_path):
    names = tmp_path / "a.mp4", tmp_path / "A.MP4"
    assert file_id(names[0]) != file_id(names[1])
    monkeypatch.setattr(os.path, "normcase", str.lower)
    assert file_id(names[0]) == file_id(names[1])


class Console(io.StringIO):
    """A terminal."""

    def isatty(self):
        return True

    def fileno(self):
        return os.open(os.devnull, os.O_WRONLY)


@pytest.mark.parametrize("platform", ["win32", "linux"])
def test_the_console_of_windows_encodes_text_itself(platform, monkeypatch):
    consoles = Console(), Console()
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with monkeypatch.context() as context, pytest.raises(SystemExit):
        context.setattr(sys, "platform", platform)
        for name, console in zip(("stdout", "stderr"), consoles, strict=True):
            context.setattr(sys, name, console)
        run_main(lambda: print("█") or (sys.stdout is consoles[0]))
    assert consoles[0].getvalue() == "█\n" * (platform == "win32")
