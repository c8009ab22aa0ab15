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
from ..motion import Motion, extract_motion
from ..sampler import Progress, Sampler, no_progress, sample
from . import metrics
from .tracking import tracklets

# Names of the metrics, and the direction of better values.
METRICS = {"motion fidelity": "↑", "corrected fidelity": "↑", "trajectory distance": "↓",
           "camera curves": "↑", "change centroids": "↑", "flicker": "↓", "top-1 agreement": "↑"}
# A clip follows if one of these metrics reaches the threshold. All held-out clips that follow their
# reference reach it, and one in twelve unguided clips.
DECISIVE_METRICS = ("corrected fidelity", "camera curves", "change centroids")
FOLLOW_THRESHOLD = 0.7
NAN_REASONS = dict.fromkeys(METRICS, "no point could be tracked in the clip or the reference")
NAN_REASONS |= dict.fromkeys(DECISIVE_METRICS[1:], "nothing moves in the clip or the reference")
PREVIEW_STEPS = 8               # steps of an unguided clip that is only shown, not measured


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
                    control: Tensor | None = None, num_steps: int | None = None,
                    progress: Progress = no_progress) -> Tensor:
    """Return the latents (1, c, f, h, w) of a clip without guidance, from the noise of a seed.

    Args:
        model: The model.
        prompt: What the clip shows.
        config: Settings of the guided clip.
        seed: Seed of the guided clip.
        control: Condition of SparseCtrl, as for `sample`.
        num_steps: Most steps, for a quick preview; None for all steps of the guided clip.
        progress: As for `clone`.
    """
    if num_steps is not None:
        config = dataclasses.replace(config, steps=min(num_steps, config.steps), guidance_steps=0)
    states = sample(model, prompt, None, config, control=control, generator=make_generator(seed))
    for state in progress(states, desc="unguided clip", total=config.steps):
        latents: Tensor = state.latents
    return latents


def measure_clips(model: Model, config: SampleConfig, reference_frames: Tensor,
                  latents_by_name: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return the metrics of clips by name.

    Args:
        model: The model that sampled the clips.
        config: Settings of the clips.
        reference_frames: Frames (f, 3, H, W) of the reference in [-1, 1].
        latents_by_name: Scaled latents (1, c, f, h, w) of the clips.
    """
    top1 = dataclasses.replace(config, top_k=1)
    motion = extract_motion(model, model.vae.encode(reference_frames), top1)
    return {name: measure_clip(reference_frames, model.vae.decode(latents).float().cpu(), motion,
                               extract_motion(model, latents, top1))
            for name, latents in latents_by_name.items()}


def measure_clip(reference: Tensor, clip: Tensor, motion: Motion, clip_motion: Motion
                 ) -> dict[str, float]:
    """Return all METRICS of a clip; nan for those that cannot be measured (NAN_REASONS).

    Args:
        reference: Frames (f, 3, H, W) of the reference in [-1, 1].
        clip: Frames of the clip, of the same shape.
        motion: Motion of the reference.
        clip_motion: Motion of the clip, extracted with the same settings.
    """
    a, b = tracklets(reference), tracklets(clip)
    curves = [(f(clip), f(reference)) for f in (metrics.camera_curves, metrics.change_centroids)]
    return dict(zip(METRICS, (
        *metrics.tracklet_fidelity(a, b), metrics.tracklet_distance(a, b),
        *(metrics.curve_correlation(*x) if x[0].any() and x[1].any() else math.nan for x in curves),
        metrics.flicker(clip), metrics.top1_agreement(motion, clip_motion)), strict=True))


def verdict(row: Mapping[str, float]) -> str:
    """Return whether a clip with these metrics follows its reference, in words."""
    known = [row[name] for name in DECISIVE_METRICS if not math.isnan(row[name])]
    if not known:
        return "cannot be measured"
    return "follows" if max(known) >= FOLLOW_THRESHOLD else "does not follow"


def result_line(report: Mapping[str, Mapping[str, float]]) -> str:
    """Return the verdict and decisive metrics of a report in one sentence; "" without a report."""
    values = [f"{name} {report['clone'][name]:.2f} (unguided {report['unguided'][name]:.2f})"
              for name in DECISIVE_METRICS if report]
    return f"Verdict: {verdict(report['clone'])}. {', '.join(values)}." if report else ""


def format_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Return the metrics of clips as a table of text, 80 columns wide for up to three clips.

    Args:
        rows: Metrics of each clip (`measure_clip`), by its name.
    """
    def line(title: str, cells: Iterable[str]) -> str:
        return f"{title:22}" + "".join(f"{cell:>19}" for cell in cells)

    return "\n".join([
        line("", rows),
        *(line(f"{name} {arrow}", (f"{row[name]:z.3f}".replace("nan", "-") for row in
                                   rows.values())) for name, arrow in METRICS.items()),
        line("verdict", map(verdict, rows.values())),
        *(f"- {name}: {NAN_REASONS[name]}" for name in METRICS
          if any(math.isnan(row[name]) for row in rows.values()))])
