"""The report of what a step costs."""
import torch

from mcl import bench


def test_products_and_their_gradients_are_counted():
    weight, x = torch.randn(5, 7), torch.randn(3, 7, requires_grad=True)

    with bench.Flops() as counter:
        torch.autograd.grad(torch.nn.functional.linear(x, weight).sum(), x)
    assert counter.total == 2 * (2 * 3 * 5 * 7)


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


def test_random_models_are_of_the_size_that_is_asked_for(small):
    model = bench.random_model(small.config, torch.device("cpu"), torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.unet.config == small.config.unet
    assert next(model.vae.parameters()).is_meta
