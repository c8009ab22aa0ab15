"""Metrics and tracking on rendered clips, whose motion is known."""
import math

import pytest
import torch
import torch.nn.functional as F

from mcl.evaluation.metrics import (
    camera_curves,
    camera_inliers,
    change_centroids,
    curve_correlation,
    flicker,
    tracklet_fidelity,
)
from mcl.evaluation.tracking import tracklets
from weights.training.held_out import held_out_path
from weights.training.scenes import BACKGROUNDS, COLORS, Scene, render

FRAMES = 8
STILL = torch.zeros(FRAMES)


def make_clip(path, size=128, color="red", ground="gray", shape="star", texture="plain", **camera):
    """Render a subject on a path (f, 2), or at rest in the center, and a camera motion."""
    return render(Scene(
        shape=shape, color=COLORS[color], texture=texture, background=BACKGROUNDS[ground],
        second_color=(0.8, 0.8, 0.8), cell_size=0.4, texture_angle=0.2,
        center=torch.zeros(FRAMES, 2) if path is None else path, radius=STILL + 0.35, angle=STILL,
        **{"pan": torch.zeros(FRAMES, 2), "zoom": STILL + 1, "roll": STILL} | camera), size)


def make_path(kind):
    return held_out_path(kind, FRAMES, 0.4)


def motion_fidelity(reference, clip):
    return tracklet_fidelity(tracklets(reference), tracklets(clip))


@pytest.mark.parametrize("kind", ["figure eight", "circle", "zigzag"])
def test_tracklets_follow_the_subject(kind):
    tracks, path = tracklets(make_clip(make_path(kind))), make_path(kind)
    assert len(tracks) >= 3
    error = (tracks - tracks[:, :1]) - (path - path[0])
    assert error.norm(dim=-1).mean() < 0.04


def test_fidelity_is_high_for_equal_motion_in_another_appearance():
    original = make_clip(make_path("figure eight"))
    assert motion_fidelity(original, original) == pytest.approx((1, 1), abs=1e-5)
    other = make_clip(make_path("figure eight"), color="cyan", ground="navy", shape="cross")
    fidelity, corrected = motion_fidelity(original, other)
    assert fidelity >= 0.95 and corrected >= 0.95


def test_fidelity_is_low_for_independent_motion():
    circle, zigzag = make_clip(make_path("circle")), make_clip(make_path("zigzag"))
    assert motion_fidelity(circle, zigzag)[1] < 0.2


def test_reversed_pan_has_opposite_motion():
    pan = torch.stack([torch.linspace(-.3, .3, FRAMES), STILL], dim=-1)
    forward = make_clip(None, texture="dotted", pan=pan)
    backward = make_clip(None, texture="dotted", pan=-pan, color="blue")
    assert motion_fidelity(forward, backward) == pytest.approx((-1, -1), abs=0.05)
    a, b = camera_curves(forward), camera_curves(backward)
    assert curve_correlation(a[:, :2], b[:, :2]) == pytest.approx(-1, abs=0.02)


def test_curves_of_other_sizes_have_no_correlation_if_the_ratio_is_limited():
    curves = torch.stack([torch.linspace(0, 1, 8), torch.linspace(1, 0, 8) ** 2], dim=-1)
    for ratio, expected in ((1.9, 1), (-1.9, -1), (2.1, 0), (1 / 1.9, 1), (1 / 2.1, 0)):
        assert curve_correlation(curves, 5 + ratio * curves, 2.0) == pytest.approx(expected)
        assert curve_correlation(curves, ratio * curves) == pytest.approx(1 if ratio > 0 else -1)
    assert curve_correlation(curves, torch.ones(8, 2)) == 0


def test_still_clips_give_numbers_and_blank_clips_nan():
    still, moving = make_clip(None), make_clip(make_path("circle"))
    assert motion_fidelity(still, still)[0] == pytest.approx(1)
    assert all(math.isfinite(x) for x in motion_fidelity(still, moving))
    assert flicker(still) == 0 and flicker(moving) > 0.01 and flicker(moving[:1]) == 0
    blank = torch.zeros(4, 3, 64, 64)
    assert all(map(math.isnan, motion_fidelity(blank, blank)))
    assert all(map(math.isnan, tracklet_fidelity(torch.zeros(0, 4, 2), torch.zeros(2, 4, 2))))


def test_change_centroids_are_at_the_subject():
    path, clip = make_path("circle"), make_clip(make_path("circle"))
    centroids, _ = change_centroids(clip)
    middle = (path[1:] + path[:-1]) / 2         # between its positions in two frames
    assert (centroids - middle).norm(dim=-1).max() < 0.1
    wide = F.pad(clip, (64, 64, 0, 0), value=0.0)
    assert torch.allclose(change_centroids(wide)[0] * 2, centroids, atol=1e-5)


def test_change_spread_is_one_for_change_everywhere_and_low_for_a_small_subject():
    everywhere = torch.tensor([-1.0, 1.0, -1.0]).reshape(3, 1, 1, 1)
    for size in ((64, 64), (36, 64)):
        assert change_centroids(everywhere.expand(3, 3, *size))[1] == pytest.approx(1, abs=0.01)
    clip = make_clip(make_path("circle"))
    assert change_centroids(clip)[1] < 0.5
    repeated = clip.repeat_interleave(3, dim=0)         # two of three frames do not change
    assert change_centroids(repeated)[1] == pytest.approx(change_centroids(clip)[1], abs=1e-5)
    assert math.isnan(change_centroids(make_clip(None))[1])


def test_camera_explains_the_points_that_it_moves():
    curve = torch.linspace(0, .4, FRAMES)
    camera = torch.stack([curve, -curve, curve / 2, curve], dim=-1)
    points = torch.tensor([[-.8, .5], [.4, .4], [.9, -.6]])
    tracks = [points]
    for pan_x, pan_y, log_zoom, roll in camera.diff(dim=0).tolist():
        # The frame before shows at p what is at zoom * rotation(-roll) * (p - pan) in the next one.
        cos, sin, zoom = math.cos(roll), math.sin(roll), math.exp(log_zoom)
        turn = torch.tensor([[cos, -sin], [sin, cos]])
        tracks.append(zoom * (tracks[-1] - torch.tensor([pan_x, pan_y])) @ turn)
    tracks = torch.stack(tracks, dim=1)
    assert camera_inliers(camera, tracks) == 1
    assert camera_inliers(camera, tracks.flip(1)) == 0
    still = tracks[:, :1].expand(-1, FRAMES, -1)
    assert camera_inliers(camera, torch.cat([tracks[:1], still])) == 0.25
    for step, share in ((0.002, 0), (0.02, 1)):         # half widths per frame
        pan = torch.arange(FRAMES)[:, None] * torch.tensor([step, 0, 0, 0])
        assert camera_inliers(pan, still - pan[:, :2]) == share
    assert math.isnan(camera_inliers(camera, tracks[:0]))


def test_chance_is_the_mean_of_quarter_turns_to_both_sides():
    """The points of one clip go right, those of the other up: one quarter turn aligns them."""
    right = torch.stack([torch.linspace(0, 1, 5), torch.zeros(5)], dim=-1)[None]
    for other in (right.flip(-1), -right.flip(-1)):
        assert tracklet_fidelity(right, other) == pytest.approx((0, 0), abs=1e-6)
    slanted = torch.stack([torch.linspace(0, 1, 5), torch.linspace(0, .5, 5)], dim=-1)[None]
    assert tracklet_fidelity(right, slanted) == pytest.approx((0.8 ** .5,) * 2, abs=1e-6)


def test_metrics_do_not_depend_on_the_resolution():
    results = []
    for size in (128, 256):
        a = make_clip(make_path("figure eight"), size)
        b = make_clip(make_path("circle"), size, color="blue")
        results.append(motion_fidelity(a, b))
    assert results[0] == pytest.approx(results[1], abs=0.05)


@pytest.mark.parametrize("kind, column", [("pan", 0), ("zoom", 2), ("roll", 3)])
def test_camera_curves_match_the_rendered_camera(kind, column):
    curve = 0.25 * (math.pi * torch.linspace(0, 1, FRAMES)).sin()
    camera = {"pan": torch.stack([curve, STILL], dim=-1), "zoom": curve.exp(), "roll": curve}[kind]
    expected = torch.zeros(FRAMES, 4)
    expected[:, column] = curve
    curves = camera_curves(make_clip(None, texture="checkered", **{kind: camera}))
    assert (curves - expected).abs().max() < 0.03



def test_resized_clip_has_the_same_motion():
    clip = make_clip(make_path("figure eight"), 256)
    resized = F.interpolate(clip, (96, 96), mode="bilinear", antialias=True)
    assert motion_fidelity(clip, resized)[1] > 0.95
