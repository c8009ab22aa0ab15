"""The noise schedule, and DDIM over it (arXiv 2010.02502). Knows nothing of motion."""
import numpy as np
import torch
from torch import Tensor

from .config import LCM_STEPS, ScheduleConfig


class Schedule:
    """`abar[t]`, the cumulative product of 1 - beta, for t = 0 ... 999, and 1 beyond the end."""

    def __init__(self, config: ScheduleConfig):
        self.config = config
        betas = torch.linspace(config.beta_start, config.beta_end, config.train_steps, device="cpu")
        self.alphas_cumprod = (1 - betas).cumprod(dim=0)

    def abar(self, t: int | Tensor) -> Tensor:
        """A float32 scalar, or (b,) of timesteps (b,). t = -1, to which the last step leads, is the
        clean picture: 1."""
        if isinstance(t, Tensor):
            return self.alphas_cumprod.to(t.device)[t]
        return self.alphas_cumprod[t] if t >= 0 else torch.ones(())

    def add_noise(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """q(z_t | x0): sqrt(abar) x0 + sqrt(1 - abar) noise (DDIM eq. 4), of clips (b, ...) at one
        timestep, or each at its own."""
        abar = self.abar(t)
        abar = abar.reshape(-1, *[1] * (x0.ndim - 1)) if abar.ndim else abar
        return abar.sqrt() * x0 + (1 - abar).sqrt() * noise

    def timesteps(self, steps: int, spacing: str, guidance_steps: int, guidance_span: float
                  ) -> list[int]:
        """`steps` timesteps, descending; each step leads to the next one, the last to -1.

        uneven    MotionClone's: the first `guidance_steps` evenly over the noisiest
                  `guidance_span` of the range, ends included, the rest over what is left
        linspace  evenly over the whole range, ends included
        leading   AnimateDiff's: multiples of 1000 // steps, plus one
        trailing  evenly from the noisiest on, without the other end (arXiv 2305.08891, table 2)
        lcm       evenly, from the noisiest on, of the 50 that consistency models are distilled on
        """
        total = self.config.train_steps
        if spacing == "leading":
            ascending = np.arange(steps) * float(total // steps) + 1
        elif spacing == "trailing":
            ascending = (np.arange(1, steps + 1) * (total / steps)).round() - 1
        elif spacing == "lcm":
            grid = np.arange(1.0, LCM_STEPS + 1) * (total // LCM_STEPS) - 1
            ascending = grid[-1 - np.arange(steps)[::-1] * LCM_STEPS // steps]
        elif spacing == "linspace" or guidance_steps == 0:
            ascending = np.linspace(0, total - 1, steps).round()
        else:
            border = int((1 - guidance_span) * total)
            ascending = np.concatenate([
                np.linspace(0, border - 1, steps - guidance_steps).round(),
                np.linspace(border, total - 1, guidance_steps).round()])
        # Leaves the range only in extreme settings, as 1000 leading steps.
        return [int(t) for t in ascending[::-1].clip(0, total - 1)]


def ddim_step(z: Tensor, eps: Tensor, direction: Tensor, abar: Tensor, abar_prev: Tensor
              ) -> Tensor:
    """One step of DDIM with eta = 0 (eq. 12): z_t -> z_{t-1}.

    The clean picture is predicted with `eps`, and noise of the next level is put back with
    `direction`. They are the same but under guidance, which moves only the direction: a guided
    noise in both places would cancel most of the guidance and turn the rest around. Along evenly
    trailing timesteps this is Euler's step in sigma; with fresh noise as the direction it is that
    of a consistency model (arXiv 2310.04378, algorithm 3), whose boundary condition is left out: at
    the timesteps of its grid it changes less than one part in 100,000.
    """
    x0 = (z - (1 - abar).sqrt() * eps) / abar.sqrt()
    return abar_prev.sqrt() * x0 + (1 - abar_prev).sqrt() * direction
