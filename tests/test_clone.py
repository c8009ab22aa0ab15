"""clone(): the whole method as one function, on small random models."""
import contextlib
import dataclasses
from pathlib import Path

import pytest
import torch

import mcl
from mcl import Clip, Guidance, InputError, InvertedReference, Motion, clone, read_reference
from mcl.clone import make_generator
from mcl.presets import build_config
from mcl.video.read import resize_frames
from tests.conftest import randn

PROMPT = "a red star"
FEW = {"steps": 2, "guidance_steps": 1, "motion_weight": 3e5}


def frames(num_frames=4, h=32, w=32, seed=0):
    return randn(num_frames, 3, h, w, seed=seed).tanh()


def clone_small(model, reference=None, **options):
    return clone(frames() if reference is None else reference, PROMPT, model=model,
                 **FEW | options)


@pytest.fixture(scope="module")
def expected(small):
    return clone_small(small)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Return the path of a lossless video of 8 different frames at 8 frames per second."""
    path = tmp_path_factory.mktemp("clone") / "reference.webp"
    mcl.write_video(path, frames(8), 8)
    return path


def test_clip_has_frames_latents_and_a_state_for_each_step(small, expected):
    assert isinstance(expected, Clip) and expected.fps == small.config.fps
    assert expected.frames.shape == (4, 3, 32, 32) and expected.frames.abs().max() <= 1
    assert torch.equal(expected.frames, small.vae.decode(expected.latents))
    assert [s.step for s in expected.steps] == [0, 1]
    assert [s.loss is not None for s in expected.steps] == [True, False]


def test_clone_equals_its_parts(small, expected):
    config = dataclasses.replace(small.config.sample, **FEW)
    motion = mcl.extract_motion(small, small.vae.encode(frames()), config)
    *_, last = mcl.sample(small, PROMPT, motion, config, latents=randn(1, 4, 4, 8, 8))
    assert torch.equal(last.latents, expected.latents)
    assert motion.metadata == expected.motion.metadata


def test_motion_or_reference_can_be_used_again(small, expected):
    config = dataclasses.replace(small.config.sample, **FEW)
    for reference in (expected.motion, read_reference(small, frames(), config)):
        clip = clone_small(small, reference)
        assert torch.equal(clip.latents, expected.latents)


def test_only_the_unet_stays_on_the_device_while_it_samples(small, monkeypatch):
    offloaded, while_sampling = [], []

    @contextlib.contextmanager
    def offload(*modules):
        offloaded.extend(type(module).__name__ for module in modules)
        yield
        offloaded.clear()

    monkeypatch.setattr("mcl.device.offload_to_cpu", offload)
    clone_small(small, callback=lambda step: while_sampling.append(tuple(offloaded)))
    assert while_sampling == [("AutoencoderKL", "TextEncoder")] * 2 and not offloaded


def test_saved_clips_of_one_seed_have_the_same_bytes(small, expected, tmp_path):
    clips = [expected, clone_small(small), clone_small(small, seed=1)]
    for i, clip in enumerate(clips):
        clip.save(tmp_path / f"{i}.mp4")
    first, again, other = ((tmp_path / f"{i}.mp4").read_bytes() for i in range(3))
    assert first == again != other


def test_frames_of_another_size_and_length_are_fitted(small, expected):
    longer = frames().repeat_interleave(2, dim=0)
    assert torch.equal(clone_small(small, longer).latents, expected.latents)
    larger = frames(8, 48, 80)
    fitted = clone_small(small, resize_frames(larger, 4, (32, 32)))
    assert torch.equal(clone_small(small, larger).latents, fitted.latents)


@pytest.mark.parametrize("options, selected", [
    ({}, [0, 2, 4, 6]), ({"start": 0.25}, [2, 3, 5, 6]), ({"duration": 0.5}, [0, 1, 2, 3]),
    ({"start": 0.25, "duration": 0.5}, [2, 3, 4, 5])])
def test_start_and_duration_select_a_part_of_a_video(small, video, options, selected):
    part = mcl.read_video(video, 8, (32, 32))[selected]
    settings = {"steps": 1, "guidance_steps": 1}
    assert torch.equal(clone_small(small, video, **settings, **options).latents,
                       clone_small(small, part, **settings).latents)


@pytest.mark.parametrize("options", [{"start": 0.5}, {"duration": 0.5}])
def test_start_and_duration_without_a_path_are_rejected(small, expected, options):
    for reference in (frames(), expected.motion):
        with pytest.raises(InputError, match="start and duration need the path of a video"):
            clone_small(small, reference, **options)


@pytest.mark.parametrize("kind", [str, Path])
def test_video_and_model_can_be_paths(small, video, tmp_path, kind):
    path = tmp_path / "model.safetensors"
    mcl.save_model(small, path, torch.float32, {})
    clip = clone_small(kind(path), kind(video))
    assert torch.equal(clip.latents, clone_small(mcl.load_model(path), video).latents)


def test_callback_receives_every_step_with_its_latents(small, expected):
    steps = []
    clip = clone_small(small, callback=steps.append)
    assert [s.timestep for s in steps] == [s.timestep for s in expected.steps]
    assert all(s.latents.shape == (1, 4, 4, 8, 8) for s in steps)
    assert torch.equal(steps[-1].latents, clip.latents)


def test_guidance_of_the_user_lowers_its_loss(small):
    losses = []

    def loss(maps, timestep):
        g = sum(keys.square().mean() for keys in maps.temporal_keys.values())
        losses.append(g.item())
        return g

    for weight in (1e-9, 10.0):
        clone_small(small, steps=6, guidance_steps=5, motion_weight=3e3,
                    guidance=[Guidance(loss, kind="temporal_keys", weight=weight)])
    assert len(losses) == 10 and losses[9] < 0.9 * losses[4]


@pytest.mark.parametrize("guidance, message", [
    (len, "guidance = <built-in function len> must be a list"),
    ([len], r"guidance = \[<built-in function len>\] must be a list"),
    ((len, "up_blocks.1"), r"guidance = \(<built-in function len>, .* must be a list"),
    ([Guidance(len, "up_block.1")], "'up_block.1' has no temporal attention"),
    ([Guidance(len, kind="cross", layers="up_blocks.1.motion_modules")],
     "'up_blocks.1.motion_modules' has no cross-attention")])
def test_wrong_guidance_is_rejected_before_the_reference_is_read(small, guidance, message):
    with pytest.raises(InputError, match=message):
        clone_small(small, "no such file", guidance=guidance)


@pytest.mark.parametrize("options, message", [
    ({"guidence_steps": 3}, "unknown setting 'guidence_steps': did you mean 'guidance_steps'"),
    ({"preset": "camra"}, "preset = 'camra' is not known"), ({"top_k": 5}, "top_k = 5"),
    ({"width": 33}, "size 33x32"), ({"seed": -1}, "seed = -1 is out of range"),
    ({"control": {0: frames(1)}, "method": "inversion"}, "control images need method single-step"),
    ({"control": {9: frames(1)}}, "frame 9 is out of range: the clip has frames 0 to 3")])
def test_wrong_option_is_rejected_before_the_reference_is_read(small_rgb, options, message):
    with pytest.raises(InputError, match=message):
        clone_small(small_rgb, "no such file", **options)


def test_wrong_frames_are_rejected(small):
    for reference in (frames()[:, :1], 2 * frames(), (127 * frames()).byte()):
        with pytest.raises(InputError, match="frames are"):
            clone_small(small, reference)


def test_preset_and_settings_give_the_settings_of_the_run(small):
    clip = clone(frames(), PROMPT, model=small, preset="lightning-2", motion_weight=1.0)
    config = build_config(small.config.sample, "lightning-2", motion_weight=1.0)
    assert [s.timestep for s in clip.steps] == small.schedule.timesteps(2, "trailing", 1, 0.3)
    assert len(clip.steps) == config.steps == 2
    assert clip.motion.metadata["extraction_timestep"] == config.extraction_timestep


def test_weight_of_zero_disables_the_motion(small, expected):
    clips = [clone_small(small, reference, motion_weight=0.0)
             for reference in (frames(), frames(seed=1))]
    assert torch.equal(clips[0].latents, clips[1].latents)
    assert not torch.equal(clips[0].latents, expected.latents)
    assert all(s.loss is None for s in clips[0].steps)


def test_control_images_can_be_paths_or_tensors(small_rgb, tmp_path):
    image = (frames(1, seed=5) * 127).round() / 127.5
    mcl.write_video(tmp_path / "images", image, 8)
    path, = (tmp_path / "images").glob("*.png")
    stored = mcl.read_image(path, (32, 32))
    by_path, by_tensor, negative, other, without = (
        clone_small(small_rgb, control=control).latents
        for control in ({2: path}, {2: stored[0]}, {-2: stored}, {1: stored}, None))
    assert torch.equal(by_path, by_tensor) and torch.equal(by_path, negative)
    assert not torch.equal(by_path, other) and not torch.equal(by_path, without)


def test_motion_under_control_is_read_with_the_references_own_frames(small_rgb):
    motions = [clone_small(small_rgb, control={2: frames(1, seed=seed)}).motion.values
               for seed in (5, 6)]
    without = clone_small(small_rgb).motion.values
    for name, values in motions[0].items():
        assert torch.equal(values, motions[1][name])
    assert any(not torch.equal(values, without[name]) for name, values in motions[0].items())


def test_control_needs_a_model_with_sparsectrl(small):
    with pytest.raises(InputError, match="no SparseCtrl"):
        clone_small(small, control={0: frames(1)})


def test_inversion_with_a_subject_gives_a_clip(small):
    options = {"method": "inversion", "inversion_steps": 4, "ref_prompt": "a ball",
               "subject": ("ball", "star"), "semantic_scale": 50.0}
    clip = clone_small(small, **options)
    assert isinstance(clip.motion, InvertedReference) and len(clip.motion.latents) == 1
    plain = clone_small(small, **options | {"subject": (), "semantic_scale": 0.0})
    assert not torch.equal(clip.latents, plain.latents)


def test_motion_without_frames_is_rejected_where_frames_are_needed(small, expected):
    for options in ({"method": "inversion"}, {"subject": ("ball", "star")}):
        with pytest.raises(InputError, match="a Motion has no frames"):
            clone_small(small, expected.motion, **options)
    foreign = Motion(expected.motion.values, expected.motion.indices,
                     expected.motion.metadata | {"model": "another"})
    with pytest.raises(InputError, match="another model"):
        clone_small(small, foreign)


def test_progress_wraps_the_steps(small):
    bars = []

    def progress(iterable, desc, total):
        bars.append((desc, total))
        return iterable
    clone_small(small, progress=progress, seed=7, method="inversion", inversion_steps=4)
    assert [desc for desc, _ in bars] == ["inversion", "seed 7"] and bars[1][1] == 2


def test_seeds_have_64_bits():
    seeds = (0, 1, (1 << 32) - 1, 1 << 32, (1 << 32) + 1, 1 << 63, (1 << 64) - 1)
    draws = [torch.randn(9, generator=make_generator(seed)).tolist() for seed in seeds]
    assert len({tuple(draw) for draw in draws}) == len(seeds)
    assert draws[1] == torch.randn(9, generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("seed", [-1, 1 << 64, 1.0, "1", True, None])
def test_seed_out_of_range_is_rejected(seed):
    with pytest.raises(InputError, match="seed = .* is out of range"):
        make_generator(seed)
