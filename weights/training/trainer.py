"""Parts that all stages of the training share: optimizer, running average, checkpoints."""
import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mcl.files import atomic_write

EMA_DECAY = 0.998


class Muon(torch.optim.Muon):
    """Muon of PyTorch 2.9 with the learning rates of AdamW, also for convolutions.

    The kernel of a convolution counts as one matrix with a row for each output channel.
    """

    def __init__(self, groups: list[dict[str, Any]]):
        """Create an optimizer of parameter groups {"params": [...], "lr": ...}."""
        self.matrices = {p: nn.Parameter(p.detach().flatten(1))
                         for group in groups for p in group["params"]}
        super().__init__([group | {"params": [self.matrices[p] for p in group["params"]]}
                          for group in groups], weight_decay=0.01, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self) -> None:     # type: ignore[override]
        """Update all parameters by their gradients."""
        for p, matrix in self.matrices.items():
            matrix.copy_(p.flatten(1))
            matrix.grad = p.grad.flatten(1)
        super().step()
        for p, matrix in self.matrices.items():
            p.copy_(matrix.view_as(p))


class TrainingRun:
    """One stage: the weights that it trains, their running average, and its checkpoint.

    Matrices inside the networks are trained by Muon, all other parameters by AdamW.
    """

    def __init__(self, module: nn.Module, lr_of: Callable[[str], float], file: Path):
        """Create a run, or resume it if its checkpoint exists.

        Args:
            module: The module.
            lr_of: Function of a parameter's name that returns its learning rate; 0 freezes it.
            file: The checkpoint.
        """
        self.module, self.file, self.step = module, file, 0
        self.average = copy.deepcopy(module).requires_grad_(False)
        by_lr: tuple[dict[float, list[nn.Parameter]], ...] = ({}, {})       # of Muon, of AdamW
        for name, p in module.named_parameters():
            p.requires_grad_(lr_of(name) > 0)
            if p.requires_grad:
                is_edge = any(part in name for part in ("embedding.", "conv_in", "conv_out"))
                by_lr[p.ndim < 2 or is_edge].setdefault(lr_of(name), []).append(p)
        muon, adam = ([{"params": params, "lr": lr} for lr, params in groups.items()]
                      for groups in by_lr)
        self.optimizers = [Muon(muon), torch.optim.AdamW(adam, betas=(.9, .99), weight_decay=1e-3)]
        self.lrs = [lr for groups in by_lr for lr in groups]
        if file.exists():
            state = torch.load(file, weights_only=True)
            parts: tuple[Any, ...] = (module, self.average, *self.optimizers)
            states = (state["module"], state["average"], *state["optimizers"])
            for part, part_state in zip(parts, states, strict=True):
                part.load_state_dict(part_state)
            self.step = state["step"]

    def save(self) -> None:
        """Write the checkpoint, atomically."""
        with atomic_write(self.file) as temporary:
            torch.save({"module": self.module.state_dict(), "average": self.average.state_dict(),
                        "optimizers": [o.state_dict() for o in self.optimizers],
                        "step": self.step}, temporary)

    def run(self, steps: int, loss_of: Callable[[int], Tensor]) -> None:
        """Train up to a number of steps, and load the running average into the module.

        The learning rate rises over the first 50 steps and falls by a cosine.

        Args:
            steps: Number of steps, including those that the checkpoint has.
            loss_of: Function of the step's index that returns its loss.
        """
        # Loading an optimizer's state replaces its groups, so they are read here.
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        progress, mean = tqdm(range(self.step, steps), self.file.stem, file=sys.stderr), math.nan
        for step in progress:
            cosine = (1 + math.cos(math.pi * step / steps)) / 2
            for group, lr in zip(groups, self.lrs, strict=True):
                group["lr"] = lr * min(1, (step + 1) / 50) * (.02 + .98 * cosine)
            loss = loss_of(step)
            self.module.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            for average, p in zip(self.average.parameters(), self.module.parameters(), strict=True):
                average.lerp_(p.detach(), 1 - min(EMA_DECAY, (step + 1) / (step + 10)))
            self.step = step + 1
            mean = loss.item() if math.isnan(mean) else 0.98 * mean + 0.02 * loss.item()
            progress.set_postfix(mean_loss=f"{mean:.4f}")
            if self.step % 100 == 0 or self.step == steps:
                self.save()
        self.module.load_state_dict(self.average.state_dict())


def autocast(device: torch.device | str) -> torch.autocast:
    """Return a bfloat16 autocast context."""
    return torch.autocast(torch.device(device).type, torch.bfloat16)
