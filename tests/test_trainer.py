"""What trains the embedded model: the optimizer, and going on where it was stopped."""
import pytest
import torch
from torch import nn

from mcl.tiny.trainer import Trainee, orthogonal


@pytest.mark.parametrize("shape", [(24, 24), (16, 80), (80, 16)])
def test_orthogonal_keeps_the_directions_and_evens_out_the_sizes(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    found = u.T @ orthogonal(x) @ vt.T
    assert s.max() / s.min() > 1.5
    assert 0.6 < found.diagonal().min() and found.diagonal().max() < 1.3
    assert (found - found.diagonal().diag()).abs().max() < 1e-3


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path):
    def trainee():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(32, 4))
        return Trainee(net, lambda name: 1e-2 if name.startswith("0") else 3e-3,
                       tmp_path / "net.pt", ema=0.5)

    def loss_of(one, copy=None):
        def loss(step):
            if step == 3 and copy is not None:
                one.save()
                copy.write_bytes(one.file.read_bytes())
            x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(step))
            return one.module(x).square().mean(), ""
        return loss

    first, stopped = trainee(), tmp_path / "stopped.pt"
    before = [p.clone() for p in first.module.parameters()]
    first.run(6, loss_of(first, stopped))
    stopped.replace(first.file)
    again = trainee()
    assert again.step == 3
    again.run(6, loss_of(again))
    for name in ("module", "average"):
        for a, b in zip(getattr(first, name).parameters(), getattr(again, name).parameters()):
            assert torch.equal(a, b)
    assert not any(map(torch.equal, before, again.module.parameters()))
