"""The report of what a step costs."""
import pytest
import torch

from tests.benchmarks import step_cost as bench
from tests.benchmarks import growth


def test_products_and_their_gradients_are_counted():
    weight, x = torch.randn(5, 7), torch.randn(3, 7, requires_grad=True)

    with bench.Flops() as counter:
        torch.autograd.grad(torch.nn.functional.linear(x, weight).sum(), x)
    assert counter.total == 2 * (2 * 3 * 5 * 7)
    q, k, v = (torch.randn(2, 3, n, 16, requires_grad=True) for n in (5, 7, 7))
    with bench.Flops() as counter:
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert counter.total == 2 * (2 * 2 * 3 * 5 * 7 * 16)
    with bench.Flops() as counter:      # two products there, and five for the gradients
        torch.autograd.grad(torch.nn.functional.scaled_dot_product_attention(q, k, v).sum(), q)
    assert counter.total == 7 * (2 * 2 * 3 * 5 * 7 * 16)


def test_the_report_has_the_machine_the_model_and_each_kind_of_step(capsys):
    argv = ["--size", "64x64", "--frames", "4", "--repeat", "1", "--device", "cpu"]
    assert bench.main([*argv, "--memory", "low"]) == 0
    machine, model, _, *rows = capsys.readouterr().out.splitlines()
    assert "GFLOP/s in products of float32" in machine
    assert "12.4 M parameters, 4 frames of 64x64, activations recomputed" in model
    work = {row[:15].strip(): float(row[15:].split()[2]) for row in rows}
    assert list(work) == ["UNet, forward", "unguided step", "guided step"]
    assert work["UNet, forward"] < work["unguided step"] < work["guided step"]
    assert bench.main([*argv, "--dtype", "float8"]) == 2
    assert "invalid choice: 'float8'" in capsys.readouterr().err
    assert bench.main(["--repeat", "0"]) == 2
    assert "--repeat 0 is not possible: 1 or more" in capsys.readouterr().err


def test_random_models_are_of_the_size_that_is_asked_for(small):
    model = bench.random_model(small.config, torch.device("cpu"), torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.unet.config == small.config.unet
    assert next(model.vae.parameters()).is_meta


def test_growth_is_measured_where_it_is_quick_and_reckoned_beyond(capsys, tmp_path):
    argv = ["--frames", "8", "16", "--sizes", "64", "--plot", str(tmp_path / "a.png")]
    assert growth.main([*argv, "--seconds", "0"]) == 0
    *_, small, large = capsys.readouterr().out.splitlines()
    assert small.endswith("| measured |") and large.endswith("| reckoned |")
    rows = [row.split("|")[1:-1] for row in (small, large)]
    assert [row[0].strip() for row in rows] == ["8", "16"]
    flops, times = ([float(row[i]) for row in rows] for i in (3, 5))
    assert 1.9 < flops[1] / flops[0] < 2.1
    assert times[1] / times[0] == pytest.approx(flops[1] / flops[0], rel=0.02)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert growth.main(["--frames", "40"]) == 2
    assert "40 frames: this model's motion modules know up to 16" in capsys.readouterr().err
