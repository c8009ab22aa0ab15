"""Tests of the cost of a step: counted arithmetic, measured and extrapolated sizes."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.benchmarks.step_cost import FlopCounter, main, random_model

ROOT = Path(__file__).parents[2]


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


def costs(capsys, *options):
    """Return the rows of the table: frames, size, kind, TFLOP, seconds, GFLOP/s, GB, origin."""
    assert main(["--device", "cpu", "--repeat", "1", *options]) == 0
    return [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]


def test_table_has_each_kind_of_step_in_both_memory_modes(capsys):
    rows = costs(capsys, "--frames", "4", "--sizes", "64")
    assert [row[2] for row in rows] == ["forward pass", "unguided step", "guided step"]
    forward, unguided, guided = (float(row[3]) for row in rows)
    assert unguided == pytest.approx(2 * forward, rel=0.01) and guided > 1.2 * unguided
    low = costs(capsys, "--frames", "4", "--sizes", "64", "--memory", "low")
    assert float(low[2][3]) > 1.1 * guided              # activations are recomputed


def test_large_sizes_are_extrapolated_by_their_arithmetic(capsys):
    rows = costs(capsys, "--frames", "8", "16", "--sizes", "64", "128", "--max-seconds", "0")
    assert [(row[0], row[1], row[7]) for row in rows[::3]] == [
        ("8", "64x64", "measured"), ("16", "64x64", "extrapolated"),
        ("8", "128x128", "extrapolated")]
    flops, seconds, memory = ([float(row[i]) for row in (rows[2], rows[5])] for i in (3, 4, 6))
    assert 1.9 < flops[1] / flops[0] < 2.1
    assert seconds[1] / seconds[0] == pytest.approx(flops[1] / flops[0], rel=0.02)
    assert memory[1] == pytest.approx(2 * memory[0], abs=0.02)


@pytest.mark.parametrize("options, message", [
    (["--memory", "none"], "invalid choice: 'none'"),
    (["--frames", "40"], "--frames at most 16"),
    (["--repeat", "0"], "--repeat must be 1 or more"), (["--sizes", "63"], "multiples of 8")])
def test_wrong_options_are_reported_in_one_line(options, message, capsys):
    assert main(options) == 2
    error, = capsys.readouterr().err.splitlines()
    assert message in error


def test_random_model_has_the_requested_config_and_precision(small):
    model = random_model(small.config, torch.device("cpu"), torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.unet.config == small.config.unet
    assert next(model.vae.parameters()).is_meta


@pytest.mark.parametrize("name", ["step_cost", "paper_table", "full_size", "diffusers_comparison"])
def test_scripts_run_by_path_and_by_module_name(name, tmp_path):
    for argv, folder in (([ROOT / "tests" / "benchmarks" / f"{name}.py"], tmp_path),
                         (["-m", f"tests.benchmarks.{name}"], ROOT)):
        process = subprocess.run([sys.executable, *argv, "--help"], cwd=folder, capture_output=True,
                                 text=True)
        assert process.returncode == 0 and process.stdout.startswith("usage: "), process.stderr
