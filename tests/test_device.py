"""Device, precision and memory of the machine, and when a guided step recomputes activations."""
import dataclasses
import os
import platform
import subprocess
import sys
import warnings

import pytest
import torch

from mcl import device
from mcl.clone import check_memory, feature_bytes, needs_checkpointing
from mcl.device import free_memory, offload_to_cpu, resolve_device, resolve_dtype
from mcl.errors import InputError
from mcl.motion import extract_motion
from mcl.networks import unet
from mcl.sampler import sample
from tests.conftest import randn


@pytest.fixture
def set_free(monkeypatch):
    """Return a function that sets the free bytes of every device."""
    return lambda free: monkeypatch.setattr(device, "free_memory", lambda _: free)


def test_activations_are_recomputed_if_they_do_not_fit(small, set_free):
    config = small.config.sample
    needed = device.GUIDED_STEP_FEATURES * feature_bytes(small.config, config, small.dtype)
    for free, memory, expected in ((needed, "auto", False), (needed - 1, "auto", True),
                                   (needed, "low", True), (0, "high", False),
                                   (None, "auto", False)):
        set_free(free)
        assert needs_checkpointing(small, dataclasses.replace(config, memory=memory)) == expected


def test_activations_grow_with_the_context_window_and_the_precision(small):
    config = small.config.sample
    size = feature_bytes(small.config, config, torch.float32)
    long = dataclasses.replace(config, num_frames=2 * config.num_frames)
    windows = dataclasses.replace(long, context_length=config.num_frames)
    assert feature_bytes(small.config, long, torch.float32) == 2 * size
    assert feature_bytes(small.config, windows, torch.float32) == size
    assert feature_bytes(small.config, config, torch.float16) == size / 2


def test_a_clip_that_cannot_fit_raises_memory_error(small, set_free):
    config, cpu = small.config.sample, torch.device("cpu")
    step = device.MIN_STEP_FEATURES * feature_bytes(small.config, config, small.dtype)
    for free in (step, None):
        set_free(free)
        check_memory(small.config, config, cpu, small.dtype)
    set_free(step - 1)
    with pytest.raises(MemoryError, match="4 frames of 32x32 need more than"):
        check_memory(small.config, config, cpu, small.dtype)


def test_free_memory_of_the_cpu_is_plausible():
    free = free_memory(torch.device("cpu"))
    assert free is None or 2 ** 20 < free < 2 ** 50


def test_automatic_device_and_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for is_available, expected in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda value=is_available: value)
        assert resolve_device("auto").type == expected
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.float16
    assert resolve_dtype("bf16", torch.device("cpu")) == torch.bfloat16
    assert resolve_dtype(torch.float16, torch.device("cpu")) == torch.float16


def test_an_unknown_device_or_precision_is_rejected():
    for name, message in (("gpu", "is not known"), ("meta", "is not available"),
                          ("cuda:99", "is not available")):
        with pytest.raises(InputError, match=f"device '{name}' {message}"):
            resolve_device(name)
    for dtype in ("float64", torch.int8):
        with pytest.raises(InputError, match="is not known: use auto, float32"):
            resolve_dtype(dtype, torch.device("cpu"))


def test_a_clip_is_the_same_with_and_without_recomputation(small, monkeypatch):
    config, calls = small.config.sample, []
    checkpoint = unet.checkpoint
    monkeypatch.setattr(unet, "checkpoint", lambda *arguments, **options: (
        calls.append(is_recomputed) or checkpoint(*arguments, **options)))
    latents = randn(1, 4, 4, 8, 8)
    motion = extract_motion(small, latents, noise=latents.flip(2))
    runs = []
    for is_recomputed in (False, True):
        runs.append(list(sample(small, "a star", motion, config, latents=latents,
                                gradient_checkpointing=is_recomputed)))
    expected, recomputed = (steps[-1].latents for steps in runs)
    assert (recomputed - expected).norm() < 1e-4 * expected.norm()
    assert set(calls) == {True} and len(calls) > 20 * config.guidance_steps
    assert runs[0][2].grad_norm == pytest.approx(runs[1][2].grad_norm, rel=1e-4)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is changed")
def test_freed_memory_is_kept_for_the_next_tensor(start, tmp_path):
    program = """
import torch
from mcl.device import disable_malloc_trimming

def pages():
    return int(open("/proc/self/statm").read().split()[1])

disable_malloc_trimming()
before = pages()
torch.zeros(2 ** 25)
print(pages() - before)"""
    with open(tmp_path / "pages.txt", "w") as stdout:
        process = start(["-c", program], tmp_path, stdout)
    assert process.stderr.read() == "" and process.wait() == 0
    assert int((tmp_path / "pages.txt").read_text()) > 32000    # of the 32768 pages of 128 MB


class RecordingLinear(torch.nn.Linear):
    """Records the devices that it is moved to."""

    def __init__(self):
        super().__init__(1, 1, device="meta")
        self.devices = []

    def to(self, target):
        self.devices.append(str(target))


def test_offloaded_modules_return_to_their_device_after_an_error():
    module = RecordingLinear()
    with pytest.raises(KeyError), offload_to_cpu(module):
        assert module.devices == ["cpu"]
        raise KeyError
    assert module.devices == ["cpu", "meta"]


@pytest.mark.parametrize("dtype, capabilities, is_slow", [
    ("float16", {"avx512_f": True, "avx512_bf16": True, "avx512_fp16": False}, True),
    ("bfloat16", {"avx512_f": True, "avx512_bf16": True}, False),
    ("bfloat16", {"avx2": True, "avx512_bf16": False}, True),
    ("bfloat16", {"neon": True, "bf16": True}, False), ("float16", {"neon": True}, True),
    ("float16", {"amx_fp16": True}, False), ("float16", {}, False),
    ("float32", {"avx2": True}, False)])
def test_type_without_instructions_of_the_processor_is_warned_of(
        dtype, capabilities, is_slow, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resolve_dtype(dtype, torch.device("cpu"))
        resolve_dtype(dtype, torch.device("cuda"))
    assert [str(w.message).partition(",")[0] for w in caught] == is_slow * [
        f"this processor has no instructions for torch.{dtype}"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_busy_machine_gets_an_idle_team_of_threads():
    script = """
import os, sys, time
from pathlib import Path
import torch
from mcl.device import share_cores
read_text = Path.read_text
Path.read_text = lambda path, *args: (f"9 9 9 {sys.argv[1]}/99 9" if str(path) == "/proc/loadavg"
                                      else read_text(path, *args))
torch.ones(1 << 20).add_(1)
before = len(os.listdir("/proc/self/task"))
share_cores()
end = time.monotonic() + float(sys.argv[2])
while (started := len(os.listdir("/proc/self/task")) - before) < 2 and time.monotonic() < end:
    time.sleep(0.1)
print(started)"""
    num_cores = os.cpu_count()
    started = [subprocess.Popen([sys.executable, "-c", script, str(runnable), str(seconds)],
                                text=True, stdout=subprocess.PIPE,
                                env={**os.environ, "OMP_NUM_THREADS": "3"})
               for runnable, seconds in ((num_cores + 1, 1), (num_cores + 2, 60))]
    quiet, busy = (int(process.communicate()[0]) for process in started)
    assert quiet == 1 and busy > 1
