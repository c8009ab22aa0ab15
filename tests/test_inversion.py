"""The paper's first form: inverted latents, the motion at each step, and the cache on disk."""
import dataclasses
import itertools

import numpy as np
import pytest
import torch

from mcl import AttentionRequest, InputError, NumericalError, invert_reference, sample
from mcl.inversion import ddim_invert, inversion_guidance, inversion_timesteps
from tests.conftest import randn

SETTINGS = dict(steps=6, guidance_steps=3, inversion_steps=5, top_k=2,
                guidance_blocks=("up_blocks.1", "up_blocks.2"), guidance_block_weights=(1.0, 0.5))
REQUEST = AttentionRequest(temporal=SETTINGS["guidance_blocks"])


def latents(seed):
    return randn(1, 4, 4, 8, 8, seed=seed)


@pytest.fixture(scope="module")
def config(small):
    return dataclasses.replace(small.config.sample, **SETTINGS)


@pytest.fixture(scope="module")
def inverted(small, config):
    return invert_reference(small, latents(0), "a ball", config)


def test_inversion_passes_every_guided_timestep_and_keeps_its_latents(small, config, inverted):
    timesteps = inversion_timesteps(small.schedule, config)
    assert timesteps == sorted({0, 250, 500, 749, 999} | {999, 850, 700})
    assert set(inverted.latents) == {999, 850, 700}
    for t, z in ddim_invert(small, latents(0), "a ball", timesteps):
        assert t not in inverted.latents or torch.equal(inverted.latents[t], z)


def test_motion_at_a_step_is_the_top_k_of_the_maps_of_its_latents(small, config, inverted):
    text = small.encode_text(["a ball"])
    maps = small.unet(inverted.latents[850], 850, text, request=REQUEST)[1].temporal
    motion = inverted.motion_at(850, config)
    assert tuple(motion.values) == tuple(maps) and len(maps) == 8
    for name, probs in maps.items():
        top = np.argsort(-probs.numpy(), axis=-1, kind="stable")[..., :2]
        assert np.array_equal(motion.indices[name].numpy(), top)


def test_timestep_or_size_that_was_not_inverted_is_rejected(config, inverted):
    with pytest.raises(KeyError, match="400"):
        inverted.attention(400, AttentionRequest())
    for changes in ({"num_frames": 3}, {"guidance_noise_range": .4}):
        with pytest.raises(InputError, match=r"not inverted to \(1, 4, .* at t="):
            inversion_guidance(inverted, dataclasses.replace(config, **changes))


def test_guidance_follows_the_motion_of_each_step_with_the_weights_of_the_blocks(small, config,
                                                                                 inverted):
    text = small.encode_text(["a red star"])
    steps = list(sample(small, "a red star", None, config, latents=latents(3),
                        guidance=[inversion_guidance(inverted, config)]))
    z = latents(3)
    for state in steps[:3]:
        maps = small.unet(z, state.timestep, text, request=REQUEST)[1].temporal
        expected, motion = 0.0, inverted.motion_at(state.timestep, config)
        for name, probs in maps.items():
            gathered = np.take_along_axis(probs.numpy(), motion.indices[name].numpy(), axis=-1)
            square = (gathered - motion.values[name].numpy()) ** 2
            expected += square.mean() * (1.0 if name.startswith("up_blocks.1.") else 0.5)
        assert state.loss == pytest.approx(expected, rel=1e-4)
        z = state.latents
    unguided = list(sample(small, "a red star", None, config, latents=latents(3)))
    assert not torch.allclose(unguided[-1].latents, steps[-1].latents, atol=1e-3)


def test_cached_inversion_equals_the_one_in_memory_and_continues(small, config, inverted,
                                                                 tmp_path):
    timesteps = []

    def record(remaining, **_):
        for t in remaining:
            timesteps.append(t)
            yield t

    def invert(prompt="a ball", seed=0, progress=record):
        return invert_reference(small, latents(seed), prompt, config, progress, tmp_path / "a")

    invert(progress=lambda remaining, **_: itertools.islice(record(remaining), 4))
    assert timesteps == [0, 250, 500, 700]
    cached = invert()
    assert timesteps == [0, 250, 500, 700, 749, 850, 999]
    assert list(cached.latents) == [700, 850, 999]
    for t, z in inverted.latents.items():
        assert torch.equal(cached.latents[t], z)
    assert all(torch.equal(cached.motion_at(850, config).values[name], values)
               for name, values in inverted.motion_at(850, config).values.items())
    (tmp_path / "a" / "9 of mine.safetensors").write_bytes(b"a file of the user")
    invert()
    assert len(timesteps) == 7              # a finished inversion is used again
    for changes in (dict(prompt="a star"), dict(seed=1)):
        with pytest.raises(InputError, match="was made with other inputs"):
            invert(**changes)
    (tmp_path / "a" / "0850.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="0850.safetensors: .*Delete it"):
        invert()


def test_inversion_that_is_not_finite_stops_and_stores_nothing(small, config, tmp_path):
    with pytest.raises(NumericalError, match="not finite at timestep"):
        invert_reference(small, latents(0) * float("nan"), "a ring", config, cache_dir=tmp_path)
    assert not any(tmp_path.iterdir())
