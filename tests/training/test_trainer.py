"""What trains the embedded model: the optimizer, and going on where it was stopped."""
import numpy as np
import torch
from torch import nn

from weights.training.data import FRAMES, Clips, parts
from weights.training.trainer import Muon, Trainee


def test_matrices_and_kernels_take_steps_of_one_size_whatever_their_gradients_are():
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Linear(16, 24))
    net.to(memory_format=torch.channels_last)
    before = [net[i].weight.detach().clone() for i in (0, 1)]
    optimizer = Muon([{"params": [layer.weight], "lr": 1e-2} for layer in net])
    for layer, scale in zip(net, (1e-3, 1e3)):
        layer.weight.grad = scale * torch.randn_like(layer.weight)
    optimizer.step()
    for layer, old in zip(net, before):
        step = ((old * (1 - 1e-4) - layer.weight) / 2e-3).detach().flatten(1)
        sizes = torch.linalg.svdvals(step) / max(step.shape) ** 0.5
        assert 0.6 < sizes.min() and sizes.max() < 1.3      # of all directions alike
        assert (step * layer.weight.grad.flatten(1)).sum() > 0


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


def test_pictures_and_latents_are_cut_alike_and_whole_at_the_end():
    x = torch.arange(7 * 64 * 64).view(7, 1, 64, 64)
    z, rng, corners = x[..., ::4, ::4], np.random.default_rng(0), set()
    for _ in range(40):
        cut, latents = parts(rng, 0.84, x, z)
        assert cut.shape == (7, 1, 32, 32) and cut[..., ::4, ::4].equal(latents)
        corners.add(int(latents[0, 0, 0, 0]))
    assert len(corners) > 20
    cut, latents = parts(rng, 0.85, x, z)
    assert cut.equal(x[::3]) and latents.equal(z[::3])


def test_what_is_learnt_last_comes_oftener_and_photographs_seldom_alone(tmp_path):
    captions = ["a red ring on a navy background", "a red star, navy ground",
                "a red cross on a striped navy background", "a photo", "a cat before a photo"]
    torch.save({"latents": torch.arange(5.)[:, None, None, None, None].expand(5, FRAMES, 2, 1, 1),
                "captions": [[caption] * 4 for caption in captions], "logvar": torch.zeros(2)},
               tmp_path / "000000.pt")
    clips, rng = Clips(tmp_path), np.random.default_rng(0)
    for frames, odds in ((FRAMES, [1, 2, 4, 1, 1]), (1, [1, 2, 4, .25, 1])):
        latents, said = clips.batch(rng, 20000, frames, drop_caption=0.0)
        assert latents.shape == (20000, 2, frames, 1, 1)
        which = latents[:, 0, 0, 0, 0].long()
        assert said == [captions[i] for i in which]
        share = torch.bincount(which) / 20000
        assert (share - torch.tensor(odds) / sum(odds)).abs().max() < 0.02
