"""The variant with inversion: what is kept of the way back, and what is read there."""
import dataclasses
import itertools

import numpy as np
import pytest
import torch

from mcl import InputError, NumericalError, AttentionRequest, invert_reference, sample
from mcl.inversion import inversion_guidance, inversion_timesteps, ddim_invert

from tests.conftest import randn

CONFIG = dict(steps=6, guidance_steps=3, inversion_steps=5, top_k=2,
              blocks=("up_blocks.1", "up_blocks.2"), guidance_block_weights=(1.0, 0.5))


def latents(seed):
    return randn(1, 4, 4, 8, 8, seed=seed)


@pytest.fixture(scope="module")
def config(small):
    return dataclasses.replace(small.config.sample, **CONFIG)


def test_the_way_leads_through_every_guided_timestep(small, config):
    path = inversion_timesteps(small.schedule, config)
    assert path == sorted({0, 250, 500, 749, 999} | {999, 850, 700})
    motion = invert_reference(small, latents(0), "a ball", config)
    assert set(motion.latents) == {999, 850, 700}
    for t, z in ddim_invert(small, latents(0), "a ball", path):
        assert t not in motion.latents or torch.equal(motion.latents[t], z)


def test_the_motion_at_a_step_is_the_top_of_the_maps_of_its_own_latents(small, config):
    motion = invert_reference(small, latents(0), "a ball", config)
    text = small.encode_text(["a ball"])
    maps = small.unet(motion.latents[850], 850, text,
                      temporal=config.guidance_blocks)[1].temporal
    found = motion.motion(850, config)
    assert tuple(found.values) == tuple(maps) and len(maps) == 8
    for name, probs in maps.items():
        top = np.argsort(-probs.numpy(), axis=-1, kind="stable")[..., :2]
        assert np.array_equal(found.indices[name].numpy(), top)
    with pytest.raises(InputError, match="not inverted to timestep 400"):
        motion.attend(400, AttentionRequest())
    for change in ({"frames": 3}, {"guidance_span": .4}):
        with pytest.raises(InputError, match="not inverted to latents of .* at timestep"):
            inversion_guidance(motion, dataclasses.replace(config, **change))


def test_guidance_follows_the_motion_of_each_step_with_the_blocks_weights(small, config):
    motion = invert_reference(small, latents(0), "a ball", config)
    start, text = latents(3), small.encode_text(["a red star"])
    states = list(sample(small, "a red star", None, config, latents=start,
                         guides=[inversion_guidance(motion, config)]))
    z = start
    for state in states[:3]:
        maps = small.unet(z, state.t, text, temporal=config.guidance_blocks)[1].temporal
        expected, target = 0.0, motion.motion(state.t, config)
        for name, probs in maps.items():
            here = np.take_along_axis(probs.numpy(), target.indices[name].numpy(), axis=-1)
            square = (here - target.values[name].numpy()) ** 2
            expected += square.mean() * (1.0 if name.startswith("up_blocks.1.") else 0.5)
        assert state.loss == pytest.approx(expected, rel=1e-4)
        z = state.latents
    unguided = list(sample(small, "a red star", None, config, latents=start))
    assert not torch.allclose(unguided[-1].latents, states[-1].latents, atol=1e-3)


def test_latents_on_disk_are_those_in_memory_and_are_gone_on_from(small, config, tmp_path):
    expected = invert_reference(small, latents(0), "a ball", config)
    taken = []

    def counted(steps):
        for step in steps:
            taken.append(step[0])
            yield step

    def stopped(steps):
        return itertools.islice(counted(steps), 4)

    def into(folder, prompt="a ball", seed=0, progress=counted):
        return invert_reference(small, latents(seed), prompt, config, progress, folder)

    into(tmp_path / "a", progress=stopped)
    assert taken == [0, 250, 500, 700]
    kept = into(tmp_path / "a")
    assert taken == [0, 250, 500, 700, 749, 850, 999]
    assert list(kept.latents) == [700, 850, 999]
    for t, z in expected.latents.items():
        assert torch.equal(kept.latents[t], z)
    assert all(torch.equal(kept.motion(850, config).values[name], v)
               for name, v in expected.motion(850, config).values.items())
    (tmp_path / "a" / "9 of mine.safetensors").write_bytes(b"not its own")
    into(tmp_path / "a")
    assert len(taken) == 7                  # nothing was left to do
    for other in (dict(prompt="a star"), dict(seed=1)):
        with pytest.raises(InputError, match="of another reference"):
            into(tmp_path / "a", **other)
    (tmp_path / "a" / "0850.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="0850.safetensors: not inverted latents"):
        into(tmp_path / "a")
    with pytest.raises(NumericalError, match="not finite at timestep"):
        invert_reference(small, latents(0) * float("nan"), "a ring", config, folder=tmp_path / "nan")
    assert not any((tmp_path / "nan").iterdir())
