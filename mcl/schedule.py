"""The noise schedule and the DDIM step (arXiv 2010.02502). This module knows nothing of motion."""
import numpy as np
import torch
from torch import Tensor

from .config import LCM_STEPS

NUM_TRAIN_TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012       # AnimateDiff's: linear in beta itself


class NoiseSchedule:
    """Noise levels of the diffusion process: alpha_bar_t, the cumulative product of 1 - beta."""

    def __init__(self) -> None:
        """Compute alpha_bar for all training timesteps."""
        betas = torch.linspace(BETA_START, BETA_END, NUM_TRAIN_TIMESTEPS, device="cpu")
        self.alphas_cumprod = (1 - betas).cumprod(dim=0)

    def alpha_bar(self, t: int | Tensor) -> Tensor:
        """Return alpha_bar at t, a float32 scalar, or (b,) for timesteps (b,).

        t = -1 stands for the clean clip, where alpha_bar is 1.
        """
        if isinstance(t, Tensor):
            return self.alphas_cumprod.to(t.device)[t]
        return self.alphas_cumprod[t] if t >= 0 else torch.ones(())

    def add_noise(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """Return sqrt(alpha_bar) * x0 + sqrt(1 - alpha_bar) * noise (DDIM, eq. 4).

        Args:
            x0: Clean clips (b, ...).
            noise: Standard normal noise, like x0.
            t: One timestep for all clips, or (b,).
        """
        alpha_bar = self.alpha_bar(t)
        alpha_bar = alpha_bar.reshape(-1, *[1] * (x0.ndim - 1)) if alpha_bar.ndim else alpha_bar
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise

    def timesteps(self, steps: int, spacing: str, guidance_steps: int, noise_range: float
                  ) -> list[int]:
        """Return `steps` timesteps in falling order; each step leads to the next, the last to -1.

        Args:
            steps: Number of timesteps.
            spacing: "motionclone" spreads the first `guidance_steps` evenly over the noisiest
                `noise_range` of the schedule and the rest over the remainder. "linspace" spreads
                all evenly, both ends included. "leading" is AnimateDiff's: multiples of
                1000 // steps, plus one. "trailing" is even from the noisiest timestep on
                (arXiv 2305.08891, table 2). "lcm" takes even steps of the 50 timesteps that
                consistency models are distilled on.
            guidance_steps: Number of guided steps.
            noise_range: Fraction of the schedule that the guided steps cover, 0 to 1.
        """
        if spacing == "leading":
            ascending = np.arange(steps) * float(NUM_TRAIN_TIMESTEPS // steps) + 1
        elif spacing == "trailing":
            ascending = (np.arange(1, steps + 1) * (NUM_TRAIN_TIMESTEPS / steps)).round() - 1
        elif spacing == "lcm":
            grid = np.arange(1.0, LCM_STEPS + 1) * (NUM_TRAIN_TIMESTEPS // LCM_STEPS) - 1
            ascending = grid[-1 - np.arange(steps)[::-1] * LCM_STEPS // steps]
        elif spacing == "linspace" or guidance_steps == 0:
            ascending = np.linspace(0, NUM_TRAIN_TIMESTEPS - 1, steps).round()
        else:
            border = int((1 - noise_range) * NUM_TRAIN_TIMESTEPS)
            noisy = np.linspace(border, NUM_TRAIN_TIMESTEPS - 1, guidance_steps)
            ascending = np.append(np.linspace(0, border - 1, steps - guidance_steps), noisy).round()
        # Only extreme settings leave the range, such as 1000 leading steps.
        return [int(t) for t in ascending[::-1].clip(0, NUM_TRAIN_TIMESTEPS - 1)]


def ddim_step(z: Tensor, eps: Tensor, direction: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor
              ) -> Tensor:
    """Return z_{t-1} after one DDIM step with eta = 0 (DDIM, eq. 12).

    Without guidance, `direction` is `eps`. Guidance changes only the direction: a guided noise in
    both places would cancel most of the guidance and reverse the rest. With new noise as the
    direction this is the step of a consistency model (arXiv 2310.04378, algorithm 3) without its
    boundary condition, which changes less than one part in 100,000 at the timesteps of its grid.

    Args:
        z: Latents z_t.
        eps: Noise estimate that the clean clip x0 is predicted with.
        direction: Noise that is added again at the level of t-1.
        alpha_bar: alpha_bar_t.
        alpha_bar_prev: alpha_bar_{t-1}.
    """
    x0 = (z - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    return alpha_bar_prev.sqrt() * x0 + (1 - alpha_bar_prev).sqrt() * direction
