"""Tests of the benchmark of steps and clips, on the CPU at a small size."""
import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import mcl
from tests.benchmarks import gpu
from tests.benchmarks.gpu import FlopCounter, main, random_model, run_alone
from tests.conftest import SMALL
from tests.foreign import MINI
from tests.networks.other_steps import diffusers_steps

ROOT = Path(__file__).parents[2]
OPTIONS = {"--device": "cpu", "--model": "tiny", "--sizes": "64", "--frames": "4",
           "--dtypes": "float32", "--repeat": "1", "--steps": "2"}
STEPS = ["forward pass", "unguided step", "guided step"]
# Stands in for the published code: modules of the same names, with the same arguments.
PUBLISHED = """
import torch
class VersatileAttention(torch.nn.Module):
    pass
class UNet3DConditionModel(torch.nn.Module):
    def __init__(self, block_out_channels, down_block_types, motion_module_kwargs, **config):
        super().__init__()
        assert len(block_out_channels) == len(down_block_types)
        self.layer, self.passes = torch.nn.Linear(1, 4), []
    def forward(self, z, t, encoder_hidden_states):
        assert len(z) == len(encoder_hidden_states)
        self.passes.append((len(z), z.requires_grad))
        self.probs = self.layer(z[..., :1])
"""
FUNCTIONS = """
def get_temp_attn_prob(pipeline):
    print(pipeline.unet.passes, pipeline.input_config.motion_guidance_blocks)
    return {"name": pipeline.unet.probs}
"""


def test_products_and_their_gradients_are_counted():
    weight, x = torch.randn(5, 7), torch.randn(3, 7, requires_grad=True)
    with FlopCounter() as counter:
        torch.autograd.grad(F.linear(x, weight).sum(), x)
    assert counter.total == 2 * (2 * 3 * 5 * 7)
    q, k, v = (torch.randn(2, 3, n, 16, requires_grad=True) for n in (5, 7, 7))
    with FlopCounter() as counter:
        F.scaled_dot_product_attention(q, k, v)
    assert counter.total == 2 * (2 * 2 * 3 * 5 * 7 * 16)
    with FlopCounter() as counter:      # two products forward, five for the gradients
        torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).sum(), q)
    assert counter.total == 7 * (2 * 2 * 3 * 5 * 7 * 16)


@pytest.fixture(autouse=True)
def smaller_model(monkeypatch):
    """Replace the demo model's config, except in processes of their own."""
    monkeypatch.setitem(gpu.CONFIGS, "tiny", dataclasses.replace(SMALL, unet=dataclasses.replace(
        SMALL.unet, block_out_channels=(16, 24), cross_attention_levels=(1,))))


def argv(**options):
    """Return a command line at a small size, with other values of some options."""
    values = OPTIONS | {f"--{name}": str(value) for name, value in options.items()}
    return [word for pair in values.items() for word in pair]


def result(capsys, name, **options):
    """Return the result of one measurement."""
    assert main(argv(only=name, **options)) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_steps_are_measured_in_both_memory_modes(capsys):
    for memory in ("high", "low"):
        steps = result(capsys, f"64, float32, {memory} memory")
        assert list(steps) == [f"{kind}, s" for kind in STEPS] + [f"{kind}, GB" for kind in STEPS]
        assert all(value > 0 for value in steps.values())
        assert steps["guided step, s"] > steps["forward pass, s"]


def test_the_arithmetic_of_steps_is_counted(capsys):
    tflops = result(capsys, "64, TFLOP")
    assert list(tflops) == STEPS
    assert tflops["unguided step"] == pytest.approx(2 * tflops["forward pass"], rel=0.01)
    assert tflops["guided step"] > 1.2 * tflops["unguided step"]


def test_the_clone_on_the_device_is_compared_with_the_cpu(capsys, small, monkeypatch):
    monkeypatch.setattr(mcl, "load_model", lambda path, device, dtype: (
        copy.deepcopy(small).to(device, getattr(torch, dtype))))
    assert 20 < result(capsys, "built-in model, bfloat16", dtypes="bfloat16")["PSNR, dB"] < 80


def test_a_whole_clip_is_measured(capsys):
    assert result(capsys, "clip, float32")["2 steps, s"] > 0


def test_the_unguided_step_of_a_compiled_unet_is_measured(capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: calls.append(self))
    values = result(capsys, "64, float32, compiled")
    assert list(values) == ["unguided step, s", "unguided step, GB"]
    assert [type(module).__name__ for module in calls] == ["UNet3D"]


def test_published_steps_are_measured_beside_ours(capsys, tmp_path, monkeypatch):
    for name, text in (("models/unet", PUBLISHED), ("utils/motionclone_functions", FUNCTIONS), (
            "utils/xformer_attention", "def prep_unet_attention(unet, blocks): pass")):
        path = tmp_path / "motionclone" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(sys, "path", sys.path[:])
    assert main(argv(published=tmp_path, only="64, float32, published")) == 0
    *passes, line = capsys.readouterr().out.splitlines()
    kinds = [*STEPS, "published unguided step", "published guided step"]
    assert [name for name in json.loads(line) if name.endswith(", s")] == [f"{k}, s" for k in kinds]
    blocks = ["up_blocks.1"]
    assert passes[0] == f"{[(2, False), (1, False), (1, True)]} {blocks}"


def test_diffusers_pass_is_measured_beside_ours():
    model = random_model(MINI, torch.device("cpu"), torch.float32)
    config = gpu.Options(frames=2).settings(64)
    passes = diffusers_steps(model, config, {})
    first, second = (action() for action in passes.values())
    assert list(passes) == ["forward pass", "diffusers' pass"]
    assert first[0].shape == second.shape        # diffusers' group norms differ (diffusers_oracle)
    assert torch.corrcoef(torch.stack([first[0].flatten(), second.flatten()]))[0, 1] > 0.9


def test_a_failed_measurement_loses_no_other(tmp_path, monkeypatch, capsys):
    name, out = "64, float32, high memory", tmp_path / "gpu.json"
    monkeypatch.setattr(gpu, "measurements", lambda options: {"unknown": None, name: None})
    assert main(argv(out=out)) == 0
    record = json.loads(out.read_text())
    assert record["results"]["unknown"] == {"error": "KeyError: 'unknown'"}
    assert record["results"][name]["forward pass, s"] > 0
    assert record["machine"].endswith(f", torch {torch.__version__}")
    lines = capsys.readouterr().out.splitlines()
    assert "| | error |" in lines and "| unknown | KeyError: 'unknown' |" in lines
    assert lines[-3].startswith("| | forward pass, s |") and lines[-1].startswith(f"| {name} | ")


def test_a_measurement_without_time_is_left_out(monkeypatch):
    def run(command, timeout, **options):
        assert timeout == 1
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    assert run_alone("64, float32, high memory", argv(), -5) == {"error": "no time was left"}


@pytest.mark.parametrize("options, message", [
    ({"dtypes": "float8"}, "invalid choice: 'float8'"), ({"steps": "x"}, "invalid count value"),
    ({"device": "none"}, "device 'none' is not known"),
    ({"out": "no/folder/a.json"}, "there is no folder")])
def test_wrong_options_are_reported_in_one_line(options, message, capsys):
    assert main(argv(**options)) == 2
    error, = capsys.readouterr().err.splitlines()
    assert message in error


def test_random_model_has_the_requested_config_and_precision(small):
    model = random_model(small.config, torch.device("cpu"), torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.unet.config == small.config.unet
    assert next(model.vae.parameters()).is_meta


@pytest.mark.parametrize("name", ["gpu", "paper_table", "full_size"])
def test_scripts_run_by_path(name, start, tmp_path):
    with open(tmp_path / "help.txt", "w") as stdout:
        process = start([ROOT / "tests" / "benchmarks" / f"{name}.py", "--help"], tmp_path, stdout)
    assert process.wait() == 0, process.stderr.read()
    assert (tmp_path / "help.txt").read_text().startswith("usage: ")
