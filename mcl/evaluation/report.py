"""Measures how well a clip follows its reference, and whether a model can follow it at all."""
import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..clone import make_generator
from ..config import SampleConfig
from ..model import Model
from ..sampler import Progress, Sampler, no_progress, sample
from . import metrics
from .tracking import tracklets

# Names of the metrics, and the direction of better values.
METRICS = {"motion fidelity": "↑", "corrected fidelity": "↑", "camera curves": "↑",
           "change centroids": "↑", "flicker": "↓"}
# A clone follows if one of these metrics reaches its threshold and is better than the unguided
# clip's by the margin. Chosen on clones of real videos, labeled by eye: tests/data/real_clones.csv
FOLLOW_THRESHOLD, FOLLOW_MARGIN = 0.8, 0.25
DECISIVE_METRICS = {"corrected fidelity": FOLLOW_THRESHOLD, "camera curves": 0.9,
                    "change centroids": 0.5}
# Tracked points that the corrected fidelity needs; share of them that a camera must explain.
MIN_POINTS, MIN_CAMERA_INLIERS = 4, 0.5
# A wider change is that of a camera, for which the limit of the denoising error is lower.
MAX_SUBJECT_SPREAD, CAMERA_ERROR_FACTOR = 0.7, 0.65
# Largest ratio of the sizes at which two camera curves, and two paths, can still agree.
MAX_RATIOS = math.inf, 2.0
NAN_REASONS = dict.fromkeys(METRICS, "no point could be tracked in the clip or the reference")
NAN_REASONS |= {"corrected fidelity": f"fewer than {MIN_POINTS} points could be tracked",
                "camera curves": "no camera motion explains the points of the reference",
                "change centroids": "the reference has no subject in front of a still background"}


def motion_magnitude(latents: Tensor) -> float:
    """Return how much a clip changes over time, relative to the spread of its latents.

    It is the 0.9 quantile over positions of the standard deviation in time, divided by the standard
    deviation of all latents. It is small if hardly anything moves, or if a camera passes over a
    uniform background: there is no motion to clone.

    Args:
        latents: Latents (1, c, f, h, w).
    """
    z = latents.float()
    change = (z - z.mean(dim=2, keepdim=True)).square().mean(dim=(0, 1, 2)).sqrt()
    return float(change.quantile(0.9) / z.std().clamp(min=1e-6))


def denoising_error(model: Model, latents: Tensor) -> float:
    """Return the model's denoising error on a clip: the mean squared error of its noise prediction.

    The prediction is made without a prompt, at the model's own extraction_timestep, in the context
    windows of the clip. The error is 0 for a perfect model and about 1 for clips unlike those that
    the model was trained on; it can clone no motion from these.

    Args:
        model: The model.
        latents: Scaled latents (1, c, f, h, w).
    """
    config = dataclasses.replace(model.config.sample, num_frames=latents.shape[2], top_k=1)
    t, z, null_text = config.extraction_timestep, latents.float(), model.encode_text([""])
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
    eps = Sampler(model, null_text, config).predict_noise(
        model.schedule.add_noise(z, noise, t).to(model.device), t, null_text)
    return float((eps.to(z) - noise).square().mean())


def warn_if_unsuitable(model: Model, name: str, latents: Tensor) -> dict[str, float]:
    """Warn if the model is unlikely to follow a reference.

    Args:
        model: The model, whose config has the limits.
        name: Name of the reference, for the warning.
        latents: Scaled latents (1, c, f, h, w) of the reference.

    Returns:
        The "motion_magnitude" and the "denoising_error"; empty for a model without limits.
    """
    min_motion, max_error = model.config.min_reference_motion, model.config.max_denoising_error
    if not min_motion:
        return {}
    motion, error = motion_magnitude(latents), denoising_error(model, latents)
    if metrics.change_centroids(latents[0].float().cpu().transpose(0, 1))[1] > MAX_SUBJECT_SPREAD:
        max_error *= CAMERA_ERROR_FACTOR
    if motion < min_motion:
        warnings.warn(f"{name} hardly moves (motion {motion:.2f}, at least {min_motion:.2f} "
                      "needed): there is little motion to clone.", stacklevel=2)
    elif error > max_error:
        warnings.warn(f"The {model.description} was not trained on videos like {name} (error "
                      f"{error:.3f}, limit {max_error:.3f}): the clone will probably not follow "
                      "it. Try a shorter part with --duration, or Stable Diffusion weights.",
                      stacklevel=2)
    return {"motion_magnitude": motion, "denoising_error": error}


def sample_unguided(model: Model, prompt: str, config: SampleConfig, seed: int,
                    control: Tensor | None = None, progress: Progress = no_progress) -> Tensor:
    """Return the latents (1, c, f, h, w) of a clip without guidance, from the noise of a seed.

    Args:
        model: The model.
        prompt: What the clip shows.
        config: Settings of the guided clip.
        seed: Seed of the guided clip.
        control: Condition of SparseCtrl, as for `sample`.
        progress: As for `clone`.
    """
    states = sample(model, prompt, None, config, control=control, generator=make_generator(seed))
    for state in progress(states, desc="unguided clip", total=config.steps):
        latents: Tensor = state.latents
    return latents


def measure_clips(model: Model, reference: Tensor, latents_by_name: Mapping[str, Tensor]
                  ) -> dict[str, dict[str, float]]:
    """Return the metrics of clips by name.

    Args:
        model: The model that sampled the clips.
        reference: Frames (f, 3, H, W) of the reference in [-1, 1].
        latents_by_name: Scaled latents (1, c, f, h, w) of the clips.
    """
    curves = camera_or_subject(reference, tracks := tracklets(reference))
    return {name: measure_clip(tracks, curves, model.vae.decode(latents).float().cpu())
            for name, latents in latents_by_name.items()}


def measure_clip(tracks: Tensor, curves: tuple[Tensor | None, ...], clip: Tensor
                 ) -> dict[str, float]:
    """Return all METRICS of a clip; nan for those that cannot be measured (NAN_REASONS).

    Args:
        tracks: Tracklets (n, f, 2) of the reference.
        curves: Camera motion or path of the subject of the reference (`camera_or_subject`).
        clip: Frames (f, 3, H, W) of the clip in [-1, 1].
    """
    clip_tracks = tracklets(clip)
    fidelity, corrected = metrics.tracklet_fidelity(tracks, clip_tracks)
    pairs = zip(curves, camera_or_subject(clip), MAX_RATIOS, strict=True)
    return dict(zip(METRICS, (
        fidelity, corrected if min(len(tracks), len(clip_tracks)) >= MIN_POINTS else math.nan,
        *(math.nan if x is None else 0.0 if y is None else metrics.curve_correlation(x, y, ratio)
          for x, y, ratio in pairs), metrics.flicker(clip)), strict=True))


def camera_or_subject(frames: Tensor, tracks: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """Return the camera motion or the path of the subject of a clip, whichever the clip shows.

    Args:
        frames: Frames (f, 3, H, W) in [-1, 1].
        tracks: Tracklets (n, f, 2) of the clip that a camera motion must explain; None to accept
            every camera motion.

    Returns:
        `camera_curves` (f, 4), or None unless the picture changes everywhere and the camera
        explains the tracks. `change_centroids` (f - 1, 2), or None unless the picture changes at
        one place.
    """
    centroids, spread = metrics.change_centroids(frames)
    if not spread > MAX_SUBJECT_SPREAD:         # nan for a still clip
        return None, centroids if centroids.any() else None
    curves = metrics.camera_curves(frames)
    is_camera = tracks is None or metrics.camera_inliers(curves, tracks) >= MIN_CAMERA_INLIERS
    return curves if is_camera else None, None


def verdict(report: Mapping[str, Mapping[str, float]]) -> str:
    """Return whether a clone follows its reference, in words that name the deciding metrics.

    A metric decides if it reaches its threshold (DECISIVE_METRICS) and is better than the unguided
    clip's by FOLLOW_MARGIN.

    Args:
        report: Metrics of the clips "clone" and "unguided" (`measure_clips`).
    """
    clone, unguided = report["clone"], report["unguided"]
    known = [name for name in DECISIVE_METRICS if not math.isnan(clone[name])]
    deciding = [name for name in known if clone[name] >= DECISIVE_METRICS[name]
                and not clone[name] - unguided[name] < FOLLOW_MARGIN]  # unguided may be nan
    return (f"follows ({', '.join(deciding)})" if deciding else
            "does not follow" if known else "cannot be measured")


def result_line(report: Mapping[str, Mapping[str, float]]) -> str:
    """Return the verdict and decisive metrics of a report in one sentence; "" without a report."""
    values = [f"{name} {report['clone'][name]:.2f} (unguided {report['unguided'][name]:.2f})"
              for name in DECISIVE_METRICS if report]
    return f"Verdict: {verdict(report)}. {', '.join(values)}.".replace("nan", "-") if report else ""


def format_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Return the metrics of clips and the verdict as text, 80 columns wide for up to three clips.

    Args:
        rows: Metrics of each clip (`measure_clip`) by its name, "clone" and "unguided" among them.
    """
    def line(title: str, cells: Iterable[str]) -> str:
        return f"{title:22}" + "".join(f"{cell:>19}" for cell in cells)

    return "\n".join([line("", rows), *(
        line(f"{name} {arrow}", (f"{r[name]:z.3f}".replace("nan", "-") for r in rows.values()))
        for name, arrow in METRICS.items()), f"verdict: {verdict(rows)}", *(
        f"- {name}: {NAN_REASONS[name]}" for name in METRICS
        if any(math.isnan(row[name]) for row in rows.values()))])
