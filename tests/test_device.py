"""What is decided by the machine: above all, when a guided step recomputes."""
import dataclasses
import platform
import subprocess
import sys

import pytest
import torch

from mcl import InputError, device as machine, extract_motion, sample
from mcl.networks import unet
from mcl.device import free_memory, guided_bytes, offload_to_cpu, use_checkpointing

from tests.conftest import randn


def test_activations_are_recomputed_when_they_would_not_fit(small, monkeypatch):
    config = small.config.sample
    needed = guided_bytes(small, config)
    for free, memory, expected in ((needed, "auto", False), (needed - 1, "auto", True),
                                   (needed, "low", True), (0, "high", False),
                                   (None, "auto", False)):
        monkeypatch.setattr(machine, "free_memory", lambda device, free=free: free)
        assert use_checkpointing(memory, small, config) == expected
    long = dataclasses.replace(config, num_frames=2 * config.num_frames)
    assert guided_bytes(small, long) == 2 * needed
    assert guided_bytes(small, dataclasses.replace(long, context_length=config.num_frames)) == needed
    with pytest.raises(InputError, match="memory 'some' is not known: auto, low, high"):
        use_checkpointing("some", small, config)


def test_free_memory_of_this_machine_is_told():
    free = free_memory(torch.device("cpu"))
    assert free is None or 2 ** 20 < free < 2 ** 50


def test_a_clip_is_the_same_with_and_without_recomputing(small, monkeypatch):
    config, recomputed = small.config.sample, []
    checkpoint = unet.checkpoint
    monkeypatch.setattr(unet, "checkpoint", lambda *given, **options: (
        recomputed.append(again) or checkpoint(*given, **options)))
    clip = randn(1, 4, 4, 8, 8)
    motion = extract_motion(small, clip, noise=clip.flip(2))
    ends = []
    for again in (False, True):
        ends.append(list(sample(small, "a star", motion, config, latents=clip, gradient_checkpointing=again)))
    expected, found = (states[-1].latents for states in ends)
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert set(recomputed) == {True} and len(recomputed) > 20 * config.guidance_steps
    assert ends[0][2].grad_norm == pytest.approx(ends[1][2].grad_norm, rel=1e-4)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries are left alone")
def test_freed_memory_is_kept_for_the_next_tensor():
    resident = """
import torch
from mcl.device import keep_freed_memory

def pages():
    return int(open("/proc/self/statm").read().split()[1])

keep_freed_memory()
before = pages()
torch.zeros(2 ** 25)
print(pages() - before)"""
    done = subprocess.run([sys.executable, "-c", resident], capture_output=True, text=True)
    assert int(done.stdout) > 32000, done.stderr    # of the 32768 pages of 128 MB


class Parked(torch.nn.Linear):
    """Remembers where it was sent."""
    sent: list[str] = []

    def to(self, device):
        self.sent.append(str(device))


def test_what_was_off_the_accelerator_comes_back_whatever_happens():
    module = Parked(1, 1, device="meta")
    with pytest.raises(KeyError), offload_to_cpu(module):
        assert module.sent == ["cpu"]
        raise KeyError
    assert module.sent == ["cpu", "meta"]
