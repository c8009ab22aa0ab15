"""The report's table and verdict, the unguided clip, and the suitability warning."""
import copy
import dataclasses
import math
import warnings

import pytest
import torch

from mcl import Motion, extract_motion, sample
from mcl.clone import make_generator
from mcl.evaluation.report import (
    DECISIVE_METRICS,
    METRICS,
    denoising_error,
    format_table,
    measure_clip,
    measure_clips,
    motion_magnitude,
    sample_unguided,
    verdict,
    warn_if_unsuitable,
)
from tests.conftest import randn
from tests.evaluation.test_metrics import make_clip, make_path

MOTION = Motion({"x": torch.ones(1, 1, 2, 1)}, {"x": torch.zeros(1, 1, 2, 1).long()})


def test_verdict_distinguishes_equal_from_other_motion():
    reference = make_clip(make_path("zigzag"))
    for kind, expected in (("zigzag", "follows"), ("spiral", "does not follow")):
        clip = make_clip(make_path(kind), color="blue", shape="cross")
        assert verdict(measure_clip(reference, clip, MOTION, MOTION)) == expected


@pytest.mark.parametrize("name", DECISIVE_METRICS)
def test_one_decisive_metric_at_the_threshold_is_enough(name):
    row = dict.fromkeys(METRICS, math.nan)
    assert verdict(row) == "cannot be measured"
    assert verdict(row | {name: 0.69}) == "does not follow"
    assert verdict(dict.fromkeys(METRICS, 0.0) | {name: 0.7}) == "follows"


def test_table_has_a_column_per_clip_and_a_dash_with_its_reason():
    moving = make_clip(make_path("zigzag"), 64)[:3]
    rows = {name: measure_clip(moving, frames, MOTION, MOTION)
            for name, frames in (("clone", moving), ("unguided", torch.zeros_like(moving)))}
    lines = format_table(rows).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["clone", "unguided"]
    cells = {line[:22].strip(): line[22:].split() for line in lines[1:8]}
    assert cells == {
        "motion fidelity ↑": ["1.000", "-"], "corrected fidelity ↑": ["1.000", "-"],
        "trajectory distance ↓": ["0.000", "-"], "camera curves ↑": ["1.000", "-"],
        "change centroids ↑": ["1.000", "-"], "top-1 agreement ↑": ["1.000", "1.000"],
        "flicker ↓": [f"{rows['clone']['flicker']:.3f}", "0.000"]}
    assert lines[8].split() == ["verdict", "follows", "cannot", "be", "measured"]
    assert lines[9:] == [
        f"- {name}: no point could be tracked in the clip or the reference"
        for name in ("motion fidelity", "corrected fidelity", "trajectory distance")] + [
        f"- {name}: nothing moves in the clip or the reference"
        for name in ("camera curves", "change centroids")]


def test_clips_are_measured_by_their_frames_and_their_top1_attention(small):
    config = dataclasses.replace(small.config.sample, top_k=0)
    reference, latents = randn(4, 3, 32, 32).clamp(-1, 1), randn(1, 4, 4, 8, 8, seed=1)
    motion, clip_motion = (extract_motion(small, z, dataclasses.replace(config, top_k=1))
                           for z in (small.vae.encode(reference), latents))
    row = measure_clip(reference, small.vae.decode(latents), motion, clip_motion)
    assert list(row) == list(METRICS)
    measured = measure_clips(small, config, reference, {"clone": latents})
    assert measured == {"clone": pytest.approx(row, nan_ok=True)}


def test_unguided_clip_has_the_noise_of_the_seed_and_no_guidance(small):
    config, bars = small.config.sample, []

    def progress(iterable, desc, total):
        bars.append((desc, total))
        return iterable

    latents = sample_unguided(small, "a star", config, 3, progress=progress)
    *_, last = sample(small, "a star", None, config, generator=make_generator(3))
    assert torch.equal(latents, last.latents)
    sample_unguided(small, "a star", config, 3, num_steps=2, progress=progress)
    sample_unguided(small, "a star", config, 3, num_steps=100, progress=progress)
    assert bars == [("unguided clip", n) for n in (config.steps, 2, config.steps)]


def test_motion_magnitude_is_the_change_of_a_tenth_of_the_positions():
    z = randn(1, 4, 1, 10, 10).repeat(1, 1, 16, 1, 1)
    assert motion_magnitude(z) < 1e-5 and motion_magnitude(torch.ones(z.shape)) == 0
    wave = torch.tensor([2.0, -2.0] * 8).reshape(16, 1)
    magnitudes = {}
    for positions in (9, 11, 30):
        clip = z.clone()
        clip.flatten(3)[0, :, :, :positions] += wave
        magnitudes[positions] = motion_magnitude(clip)
        assert motion_magnitude(7 * clip + 1) == pytest.approx(magnitudes[positions], abs=1e-4)
    assert magnitudes[9] < 0.01 and 1 < magnitudes[11] < 2 / z.std() and magnitudes[30] > 1


def test_limit_of_the_demo_model_separates_moving_from_still_clips(embedded):
    moving, still = (motion_magnitude(embedded.vae.encode(make_clip(path)))
                     for path in (make_path("figure eight"), None))
    assert moving > embedded.config.min_reference_motion > 2 * still


def test_denoising_error_is_low_for_clips_like_the_training_data(embedded):
    limit = embedded.config.max_denoising_error
    known = embedded.vae.encode(make_clip(make_path("figure eight")))
    assert denoising_error(embedded, known) < limit
    assert denoising_error(embedded, randn(*known.shape, seed=1)) > 2 * limit
    assert denoising_error(embedded, torch.cat([known, known], dim=2)) < limit  # several windows
    assert denoising_error(embedded, known[:, :, :3]) < 2 * limit


@pytest.mark.parametrize("motion_margin, error_margin, name, message", [
    (None, 0, "tiny", None), (0, 0, "tiny", None),
    (.01, 0, "tiny", "v.mp4 hardly moves (motion {motion:.2f}, at least {min_motion:.2f} needed): "
                     "there is little motion to clone."),
    (.01, -.01, "tiny", "v.mp4 hardly moves (motion {motion:.2f}, at least {min_motion:.2f} "
                        "needed): there is little motion to clone."),
    (0, -.01, "tiny", "The demo model was not trained on videos like v.mp4 (error {error:.3f}, "
                      "limit {max_error:.3f}): the clone will probably not follow it. Try a "
                      "shorter part with --duration, or Stable Diffusion weights."),
    (0, -.01, "mine", "The model mine was not trained on videos like v.mp4 (error {error:.3f}, "
                      "limit {max_error:.3f}): the clone will probably not follow it. Try a "
                      "shorter part with --duration, or Stable Diffusion weights.")])
def test_warning_names_what_makes_a_reference_unsuitable(
        small, motion_margin, error_margin, name, message):
    model, latents = copy.copy(small), randn(1, 4, 4, 8, 8)
    motion, error = motion_magnitude(latents), denoising_error(small, latents)
    min_motion = 0.0 if motion_margin is None else motion + motion_margin
    max_error = error + error_margin
    model.config = dataclasses.replace(small.config, name=name, min_reference_motion=min_motion,
                                       max_denoising_error=max_error)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        numbers = warn_if_unsuitable(model, "v.mp4", latents)
    assert numbers == ({} if motion_margin is None else {
        "motion_magnitude": motion, "denoising_error": error})
    assert [str(w.message) for w in caught] == ([] if message is None else [message.format(
        motion=motion, min_motion=min_motion, error=error, max_error=max_error)])
