"""Tests of the optimizer, of resumed training and of the batches."""
import numpy as np
import torch
from torch import nn

from weights.training.data import NUM_FRAMES, LatentClips, random_crops
from weights.training.trainer import Muon, TrainingRun


def test_muon_steps_have_the_same_size_for_small_and_large_gradients():
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
        assert 0.6 < sizes.min() and sizes.max() < 1.3      # in all directions
        assert (step * layer.weight.grad.flatten(1)).sum() > 0


def test_resumed_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("weights.training.trainer.EMA_DECAY", 0.5)

    def new_run():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(32, 4))
        return TrainingRun(net, lambda name: 1e-2 if name.startswith("0") else 3e-3,
                       tmp_path / "net.pt")

    def loss_of(run, copy=None):
        def loss(step):
            if step == 3 and copy is not None:
                run.save()
                copy.write_bytes(run.file.read_bytes())
            x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(step))
            return run.module(x).square().mean()
        return loss

    first, stopped = new_run(), tmp_path / "stopped.pt"
    before = [p.clone() for p in first.module.parameters()]
    first.run(6, loss_of(first, stopped))
    expected = torch.load(first.file, weights_only=True)
    stopped.replace(first.file)
    resumed = new_run()
    assert resumed.step == 3
    resumed.run(6, loss_of(resumed))
    state = torch.load(resumed.file, weights_only=True)
    for name in ("module", "average"):
        assert all(w.equal(state[name][key]) for key, w in expected[name].items())
    assert all(map(torch.equal, resumed.module.parameters(), resumed.average.parameters()))
    assert not any(map(torch.equal, before, resumed.module.parameters()))


def test_frames_and_latents_have_the_same_crop_and_are_whole_at_the_end():
    x = torch.arange(7 * 64 * 64).view(7, 1, 64, 64)
    z, rng, corners = x[..., ::4, ::4], np.random.default_rng(0), set()
    for _ in range(40):
        crop, latents = random_crops(rng, 0.84, x, z)
        assert crop.shape == (7, 1, 32, 32) and crop[..., ::4, ::4].equal(latents)
        corners.add(int(latents[0, 0, 0, 0]))
    assert len(corners) > 20
    crop, latents = random_crops(rng, 0.85, x, z)
    assert crop.equal(x[::3]) and latents.equal(z[::3])


def test_rare_skills_are_sampled_more_often_and_photos_without_subject_less(tmp_path):
    captions = ["a red ring on a navy background", "a red star, navy ground",
                "a red cross on a striped navy background", "a photo", "a cat before a photo"]
    latents = torch.arange(5.)[:, None, None, None, None].expand(5, NUM_FRAMES, 2, 1, 1)
    torch.save({"latents": latents, "captions": [[caption] * 4 for caption in captions],
                "logvar": torch.zeros(2)}, tmp_path / "000000.pt")
    clips, rng = LatentClips(tmp_path), np.random.default_rng(0)
    for frames, odds in ((NUM_FRAMES, [1, 2, 4, 1, 1]), (1, [1, 2, 4, .25, 1])):
        latents, texts = clips.batch(rng, 20000, frames, p_empty=0.0)
        assert latents.shape == (20000, 2, frames, 1, 1)
        chosen = latents[:, 0, 0, 0, 0].long()
        assert texts == [captions[i] for i in chosen]
        share = torch.bincount(chosen) / 20000
        assert (share - torch.tensor(odds) / sum(odds)).abs().max() < 0.02
