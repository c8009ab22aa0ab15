"""The report's table and verdict, the unguided clip, and the suitability warning."""
import copy
import dataclasses
import math
import warnings
from types import SimpleNamespace

import pytest
import torch

from mcl import sample
from mcl.clone import make_generator
from mcl.evaluation.report import (
    CAMERA_ERROR_FACTOR,
    DECISIVE_METRICS,
    FOLLOW_MARGIN,
    METRICS,
    MIN_POINTS,
    camera_or_subject,
    denoising_error,
    format_table,
    measure_clips,
    motion_magnitude,
    result_line,
    sample_unguided,
    verdict,
    warn_if_unsuitable,
)
from mcl.evaluation.tracking import tracklets
from tests.conftest import randn
from tests.evaluation.test_metrics import FRAMES, STILL, make_clip, make_path

NOTHING = dict.fromkeys(METRICS, math.nan)


def measure(reference, clip):
    """Return the metrics of one clip, given as frames."""
    model = SimpleNamespace(vae=SimpleNamespace(decode=lambda frames: frames))
    return measure_clips(model, reference, {"clip": clip})["clip"]


def test_verdict_distinguishes_equal_from_other_motion():
    reference, other = make_clip(make_path("zigzag")), make_clip(make_path("circle"))
    for kind, expected in (("zigzag", "follows (corrected fidelity, change centroids)"),
                           ("spiral", "does not follow")):
        clip = make_clip(make_path(kind), color="blue", shape="cross")
        rows = {"clone": measure(reference, clip), "unguided": measure(reference, other)}
        assert verdict(rows) == expected


def test_result_line_has_the_verdict_and_the_decisive_metrics_with_two_digits():
    clone = NOTHING | {"corrected fidelity": -0.168, "change centroids": 0.876}
    rows = {"clone": clone, "unguided": NOTHING | {"change centroids": -0.2}}
    assert result_line(rows) == (
        "Verdict: follows (change centroids). corrected fidelity -0.17 (unguided -), camera curves "
        "- (unguided -), change centroids 0.88 (unguided -0.20).")
    assert result_line({}) == ""


@pytest.mark.parametrize("name, threshold", DECISIVE_METRICS.items())
def test_a_metric_decides_at_its_threshold_and_if_it_is_better_than_without_guidance(
        name, threshold):
    assert verdict({"clone": NOTHING, "unguided": NOTHING}) == "cannot be measured"
    zeros = dict.fromkeys(METRICS, 0.0)
    for value, unguided, follows in ((threshold, 0.0, True), (threshold - 0.01, 0.0, False),
                                     (threshold, math.nan, True), (1.0, 1.0, False),
                                     (1.0, 1 - FOLLOW_MARGIN, True), (0.9, 0.7, False)):
        rows = {"clone": zeros | {name: value}, "unguided": NOTHING | {name: unguided}}
        assert verdict(rows) == (f"follows ({name})" if follows else "does not follow")


def test_still_camera_with_one_moving_subject_gets_no_camera_verdict():
    """The camera fit follows the subject: its curves of a clip and its copy are equal."""
    for texture in ("plain", "dotted"):
        clip = make_clip(make_path("circle"), texture=texture)
        row = measure(clip, clip)
        assert math.isnan(row["camera curves"]) and row["change centroids"] == pytest.approx(1)


def test_path_of_another_size_is_not_followed_but_a_camera_may_move_farther():
    circle = make_path("circle")
    center = circle.mean(dim=0)
    reference, near, far = (make_clip(center + size * (circle - center), 64)
                            for size in (1, 0.7, 0.3))
    assert measure(reference, near)["change centroids"] > 0.9
    for a, b in ((reference, far), (far, reference)):
        assert measure(a, b)["change centroids"] == 0
    assert measure(make_pan(), make_pan(0.15))["camera curves"] > 0.9


def make_pan(distance=0.4):
    """Render six frames of a camera that pans over a texture."""
    pan = torch.stack([torch.linspace(-distance, distance, FRAMES), STILL], dim=-1)
    return make_clip(None, 64, texture="checkered", pan=pan)[:6]


def test_moving_camera_is_compared_only_with_a_moving_camera():
    camera, subject = make_pan(), make_clip(make_path("circle"), 64)[:6]
    assert measure(camera, camera)["camera curves"] == pytest.approx(1)
    row = measure(camera, subject)
    assert row["camera curves"] == 0 and math.isnan(row["change centroids"])
    row = measure(subject, camera)
    assert row["change centroids"] == 0 and math.isnan(row["camera curves"])


@pytest.mark.parametrize("texture", ["plain", "checkered"])
def test_still_reference_has_no_motion_to_compare(texture):
    still, subject = (make_clip(path, 64, texture=texture)[:4]
                      for path in (None, make_path("hops")))
    row = measure(still, subject)
    assert math.isnan(row["camera curves"]) and math.isnan(row["change centroids"])
    assert measure(subject, still)["change centroids"] == 0
    row = measure(subject[:1], subject[:1])
    assert verdict({"clone": row, "unguided": row}) == "cannot be measured"


def test_camera_of_a_reference_must_explain_its_points():
    camera = make_pan()
    tracks, (curves, _) = tracklets(camera)[:4], camera_or_subject(camera)
    assert len(tracks) == 4 and torch.equal(camera_or_subject(camera, tracks)[0], curves)
    half, fewer = (torch.cat([tracks[:n], tracks[n:].flip(-1)]) for n in (2, 1))
    assert camera_or_subject(camera, half)[0] is not None
    for wrong in (fewer, tracks[:0]):
        assert camera_or_subject(camera, wrong) == (None, None)


def test_corrected_fidelity_needs_enough_points(monkeypatch):
    clip = make_clip(make_path("zigzag"))
    tracks = tracklets(clip)
    for number, is_known in ((MIN_POINTS, True), (MIN_POINTS - 1, False)):
        monkeypatch.setattr("mcl.evaluation.report.tracklets", lambda _, n=number: tracks[:n])
        assert math.isnan(measure(clip, clip)["corrected fidelity"]) is not is_known


def test_table_has_a_column_per_clip_the_verdict_and_a_dash_with_its_reason():
    moving = make_clip(make_path("zigzag"), 64)[:3]
    rows = {name: measure(moving, frames)
            for name, frames in (("clone", moving), ("unguided", torch.zeros_like(moving)))}
    lines = format_table(rows).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["clone", "unguided"]
    cells = {line[:22].strip(): line[22:].split() for line in lines[1:6]}
    assert cells == {
        "motion fidelity ↑": ["1.000", "-"], "corrected fidelity ↑": ["1.000", "-"],
        "camera curves ↑": ["-", "-"], "change centroids ↑": ["1.000", "0.000"],
        "flicker ↓": [f"{rows['clone']['flicker']:.3f}", "0.000"]}
    assert lines[6] == "verdict: follows (corrected fidelity, change centroids)"
    assert lines[7:] == [
        "- motion fidelity: no point could be tracked in the clip or the reference",
        "- corrected fidelity: fewer than 4 points could be tracked",
        "- camera curves: no camera motion explains the points of the reference"]
    assert format_table({name: NOTHING for name in rows}).splitlines()[-2] == (
        "- change centroids: the reference has no subject in front of a still background")


def test_clips_are_measured_by_their_frames(small):
    reference, latents = randn(4, 3, 32, 32).clamp(-1, 1), randn(1, 4, 4, 8, 8, seed=1)
    row = measure(reference, small.vae.decode(latents))
    assert list(row) == list(METRICS)
    measured = measure_clips(small, reference, {"clone": latents})
    assert measured == {"clone": pytest.approx(row, nan_ok=True)}


def test_unguided_clip_has_the_noise_of_the_seed_and_no_guidance(small):
    config, bars = small.config.sample, []

    def progress(iterable, desc, total):
        bars.append((desc, total))
        return iterable

    latents = sample_unguided(small, "a star", config, 3, progress=progress)
    *_, last = sample(small, "a star", None, config, generator=make_generator(3))
    assert torch.equal(latents, last.latents)
    assert bars == [("unguided clip", config.steps)]


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


@pytest.mark.parametrize("is_camera", [True, False])
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
        small, motion_margin, error_margin, name, message, is_camera):
    model, latents = copy.copy(small), randn(1, 4, 4, 8, 8)
    if not is_camera:           # only a corner changes
        latents[..., 4:], latents[..., 4:, :] = latents[:, :, :1, :, 4:], latents[:, :, :1, 4:]
    motion, error = motion_magnitude(latents), denoising_error(small, latents)
    min_motion = 0.0 if motion_margin is None else motion + motion_margin
    max_error = error + error_margin
    model.config = dataclasses.replace(
        small.config, name=name, min_reference_motion=min_motion,
        max_denoising_error=max_error / (CAMERA_ERROR_FACTOR if is_camera else 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        numbers = warn_if_unsuitable(model, "v.mp4", latents)
    assert numbers == ({} if motion_margin is None else {
        "motion_magnitude": motion, "denoising_error": error})
    assert [str(w.message) for w in caught] == ([] if message is None else [message.format(
        motion=motion, min_motion=min_motion, error=error, max_error=max_error)])
