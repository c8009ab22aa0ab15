"""The measures, on motion whose truth is known because it was drawn."""
import copy
import dataclasses
import math
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mcl.files import finite
from mcl.evaluation.suitability import warn_if_unsuitable, denoising_error, motion_magnitude
from mcl.evaluation.metrics import (camera_curves, change_centroids, curve_correlation, fidelity,
                                 flicker, motion_fidelity, top1_agreement, trajectory_distance)
from mcl.evaluation.report import measure, table, verdict
from mcl.evaluation.tracking import tracklets
from mcl.motion import Motion
from weights.training.held_out import held_out_path
from weights.training.scenes import COLORS, GROUNDS, Scene, render

FRAMES = 16
STILL = torch.zeros(FRAMES)


def scene(path, color="red", ground="gray", shape="star", texture="plain", **more):
    center = path if path is not None else torch.zeros(FRAMES, 2)
    return Scene(shape=shape, color=COLORS[color], texture=texture, ground=GROUNDS[ground],
                 second=(0.8, 0.8, 0.8), cell=0.4, texture_angle=0.2, center=center,
                 radius=STILL + 0.35, angle=STILL, **({
                     "pan": torch.zeros(FRAMES, 2), "zoom": STILL + 1, "roll": STILL} | more))


def clip(path, size=128, **more):
    return render(scene(path, **more), size)


def path(kind):
    return held_out_path(kind, FRAMES, 0.6)


@pytest.mark.parametrize("kind", ["figure eight", "circle", "zigzag"])
def test_tracklets_stay_on_the_subject(kind):
    found, truth = tracklets(clip(path(kind))), path(kind)
    assert len(found) >= 3
    off = (found - found[:, :1]) - (truth - truth[0])
    assert off.norm(dim=-1).mean() < 0.04


def test_a_clip_is_wholly_like_itself_and_its_recoloured_self():
    original = clip(path("figure eight"))
    assert motion_fidelity(original, original) == pytest.approx((1, 1), abs=1e-5)
    other = clip(path("figure eight"), color="cyan", ground="navy", shape="cross")
    raw, corrected = motion_fidelity(original, other)
    assert raw >= 0.95 and corrected >= 0.95
    assert trajectory_distance(original, other) < 0.05


def test_independent_motion_is_not_alike():
    raw, corrected = motion_fidelity(clip(path("circle")), clip(path("zigzag")))
    assert corrected < 0.2
    assert trajectory_distance(clip(path("circle")), clip(path("zigzag"))) > 0.3


def test_a_reversed_pan_is_the_opposite():
    pan = torch.stack([torch.linspace(-.3, .3, FRAMES), STILL], dim=-1)
    there = clip(None, texture="dotted", pan=pan)
    back = clip(None, texture="dotted", pan=-pan, color="blue")
    assert motion_fidelity(there, back) == pytest.approx((-1, -1), abs=0.05)
    a, b = camera_curves(there), camera_curves(back)
    assert curve_correlation(a[:, :2], b[:, :2]) == pytest.approx(-1, abs=0.02)


def test_a_still_clip_gives_numbers():
    still, moving = clip(None), clip(path("circle"))
    assert motion_fidelity(still, still)[0] == pytest.approx(1)
    assert all(math.isfinite(x) for x in motion_fidelity(still, moving))
    assert flicker(still) == 0 and flicker(moving) > 0.01 and flicker(moving[:1]) == 0
    blank = torch.zeros(4, 3, 64, 64)
    assert motion_fidelity(blank, blank) == (0, 0)
    assert trajectory_distance(blank, blank) == math.inf
    assert fidelity(torch.zeros(0, 4, 2), torch.zeros(2, 4, 2)) == (0, 0)


def test_what_changes_is_where_the_subject_is():
    found = change_centroids(clip(path("circle")))
    truth = (path("circle")[1:] + path("circle")[:-1]) / 2      # between two places of it
    assert (found - truth).norm(dim=-1).max() < 0.1
    wide = F.pad(clip(path("circle")), (64, 64, 0, 0), value=0.0)
    assert torch.allclose(change_centroids(wide) * 2, found, atol=1e-5)


def test_a_clip_is_said_to_follow_what_moves_alike_and_nothing_else():
    reference = clip(path("zigzag"))
    for other, said in ((path("zigzag"), "follows"), (path("spiral"), "does not follow")):
        row = measure(reference, clip(other, color="blue", shape="cross"), None, None)
        assert verdict(row) == said


def test_what_could_not_be_measured_is_a_dash_with_its_reason():
    moving = clip(path("zigzag"), 64)[:3]
    rows = {name: measure(moving, frames, None, None)
            for name, frames in (("result", moving), ("unguided", torch.zeros_like(moving)))}
    _, result, unguided = table(rows).splitlines()
    assert result.split()[:3] == ["result", "1.000", "1.000"] and result.endswith("  follows")
    cells, _, why = unguided.partition("  (-: ")
    assert cells.split() == ["unguided", *"-----", "0.000", "cannot", "be", "told"]
    assert why.count("no point of it") == why.count("does not move at all") == 1
    assert finite(rows)["unguided"]["trajectory distance"] is None


def test_chance_is_a_quarter_turn_to_either_side():
    """The points of one clip go right, those of the other up: a turn one way makes them alike."""
    right = torch.stack([torch.linspace(0, 1, 5), torch.zeros(5)], dim=-1)[None]
    for other in (right.flip(-1), -right.flip(-1)):
        assert fidelity(right, other) == pytest.approx((0, 0), abs=1e-6)
    slanted = torch.stack([torch.linspace(0, 1, 5), torch.linspace(0, .5, 5)], dim=-1)[None]
    assert fidelity(right, slanted) == pytest.approx((0.8 ** .5,) * 2, abs=1e-6)


def test_figures_do_not_depend_on_the_resolution():
    results = []
    for size in (128, 256):
        a, b = clip(path("figure eight"), size), clip(path("circle"), size, color="blue")
        results.append((*motion_fidelity(a, b), trajectory_distance(a, b)))
    assert results[0] == pytest.approx(results[1], abs=0.05)


@pytest.mark.parametrize("kind, column", [("pan", 0), ("zoom", 2), ("roll", 3)])
def test_camera_curves_are_the_camera_s(kind, column):
    t = torch.linspace(0, 1, FRAMES)
    curve = 0.25 * (math.pi * t).sin()
    truth = {"pan": {"pan": torch.stack([curve, STILL], dim=-1)}, "zoom": {"zoom": curve.exp()},
             "roll": {"roll": curve}}[kind]
    found = camera_curves(clip(None, texture="checkered", **truth))
    expected = torch.zeros(FRAMES, 4)
    expected[:, column] = curve
    assert (found - expected).abs().max() < 0.03


def test_agreement_counts_the_rows_that_point_alike():
    indices = torch.tensor([0, 1, 2, 3]).reshape(1, 2, 2, 1)
    a = Motion({"x": torch.ones(1, 2, 2, 1)}, {"x": indices})
    b = dataclasses.replace(a, indices={"x": torch.tensor([0, 1, 2, 9]).reshape(1, 2, 2, 1)})
    assert top1_agreement(a, a) == 1 and top1_agreement(a, b) == 0.75


def test_half_the_size_by_interpolation_keeps_the_tracks():
    big = clip(path("figure eight"), 256)
    small = F.interpolate(big, (96, 96), mode="bilinear", antialias=True)
    assert motion_fidelity(big, small)[1] > 0.95


def test_movement_is_how_far_a_tenth_of_the_places_change():
    z = torch.randn(1, 4, 1, 10, 10, generator=torch.Generator().manual_seed(0)).repeat(
        1, 1, 16, 1, 1)
    assert motion_magnitude(z) < 1e-5 and motion_magnitude(torch.ones(z.shape)) == 0
    wave = torch.tensor([2.0, -2.0] * 8).reshape(16, 1)
    moved = {}
    for places in (9, 11, 30):
        clip_ = z.clone()
        clip_.flatten(3)[0, :, :, :places] += wave
        moved[places] = motion_magnitude(clip_)
        assert motion_magnitude(7 * clip_ + 1) == pytest.approx(moved[places], abs=1e-4)
    assert moved[9] < 0.01 and 1 < moved[11] < 2 / z.std() and moved[30] > 1


def test_a_clip_in_which_something_moves_passes_and_one_at_rest_does_not(embedded):
    moves, still = (motion_magnitude(embedded.vae.encode(clip(p))) for p in (path("figure eight"), None))
    assert moves > embedded.config.min_reference_motion > 2 * still


def test_what_the_model_will_hardly_follow_is_told(small):
    model, latents = copy.copy(small), torch.randn(
        1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = {"movement": motion_magnitude(latents), "denoising_error": denoising_error(small, latents)}
    moved, error = found.values()
    for least, most, why in ((0.0, 0.0, ""), (moved, error, ""), (moved + .01, error, "moves"),
                             (moved, error - .01, "looks"), (moved + .01, 0.0, "moves")):
        model.config = dataclasses.replace(small.config, min_reference_motion=least, max_denoising_error=most)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert warn_if_unsuitable(model, Path("v.mp4"), latents) == (found if least else {})
        said = [str(w.message) for w in caught]
        assert [text.startswith("v.mp4: ") and why in text for text in said] == [True] * bool(why)


def test_what_a_model_knows_is_denoised_better_than_what_it_does_not(embedded):
    known = embedded.vae.encode(clip(path("figure eight")))
    strange = torch.randn(known.shape, generator=torch.Generator().manual_seed(1))
    assert denoising_error(embedded, known) < embedded.config.max_denoising_error
    assert denoising_error(embedded, strange) > 2 * embedded.config.max_denoising_error
    longer = torch.cat([known, known], dim=2)               # read in windows
    assert denoising_error(embedded, longer) < embedded.config.max_denoising_error
