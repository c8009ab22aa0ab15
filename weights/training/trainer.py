"""What every stage of the training shares: the steps, the running average, the checkpoints."""
import copy
import itertools
import math
import sys
import time
from pathlib import Path
from typing import Any, Callable

import torch
from torch import Tensor, nn

from mcl.files import atomic_write


class Muon(torch.optim.Muon):
    """torch's (from 2.9 on), with AdamW's rates, for convolutions as well: the weights of one count
    as one matrix, a row per output. BENCHMARKS.md has what it gains over AdamW."""

    def __init__(self, groups: list[dict[str, Any]]):
        self.pairs = [[(p, nn.Parameter(p.detach().flatten(1))) for p in group["params"]]
                      for group in groups]
        super().__init__([group | {"params": [matrix for _, matrix in pairs]}
                          for group, pairs in zip(groups, self.pairs)],
                         weight_decay=0.01, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self) -> None:     # type: ignore[override]
        for p, matrix in itertools.chain(*self.pairs):
            matrix.copy_(p.flatten(1))
            matrix.grad = p.grad.flatten(1)
        super().step()
        for p, matrix in itertools.chain(*self.pairs):
            p.copy_(matrix.view_as(p))


class Trainee:
    """Weights under training, with their running average, and where they are kept.

    `rate_of` gives the learning rate of a parameter by its name; with 0 it stays what it is.
    Matrices inside the networks are trained by Muon, all else by AdamW.
    """

    def __init__(self, module: nn.Module, rate_of: Callable[[str], float], file: Path, ema: float):
        self.module, self.file, self.ema = module, file, ema
        self.average = copy.deepcopy(module).requires_grad_(False)
        groups: tuple[dict[float, list[nn.Parameter]], ...] = ({}, {})  # of Muon, of AdamW
        for name, p in module.named_parameters():
            p.requires_grad_(rate_of(name) > 0)
            if p.requires_grad:
                edge = any(part in name for part in ("embedding.", "conv_in", "conv_out"))
                groups[p.ndim < 2 or edge].setdefault(rate_of(name), []).append(p)
        chosen: list[list[dict[str, Any]]] = [
            [{"params": params, "lr": rate} for rate, params in some.items()] for some in groups]
        self.optimizers = [Muon(chosen[0]),
                           torch.optim.AdamW(chosen[1], betas=(.9, .99), weight_decay=1e-3)]
        self.rates = [group["lr"] for groups in chosen for group in groups]
        self.step = 0
        if file.exists():
            state = torch.load(file, weights_only=True)
            self.module.load_state_dict(state["module"])
            self.average.load_state_dict(state["average"])
            for optimizer, its in zip(self.optimizers, state["optimizers"]):
                optimizer.load_state_dict(its)
            self.step = state["step"]

    def save(self) -> None:
        with atomic_write(self.file) as temporary:
            torch.save({"module": self.module.state_dict(), "average": self.average.state_dict(),
                        "optimizers": [o.state_dict() for o in self.optimizers],
                        "step": self.step}, temporary)

    def run(self, steps: int, loss_of: Callable[[int], tuple[Tensor, str]]) -> None:
        """Trains up to `steps`; the rate rises over 50 of them and falls by a cosine."""
        # Not before: loading an optimizer's state puts other groups in the place of its own.
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        began, first, mean = time.perf_counter(), self.step, math.nan
        while self.step < steps:
            cosine = (1 + math.cos(math.pi * self.step / steps)) / 2
            for group, rate in zip(groups, self.rates):
                group["lr"] = rate * min(1, (self.step + 1) / 50) * (.02 + .98 * cosine)
            loss, more = loss_of(self.step)
            self.module.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            keep = min(self.ema, (self.step + 1) / (self.step + 10))
            with torch.no_grad():
                for slow, fast in zip(self.average.parameters(), self.module.parameters()):
                    slow.lerp_(fast, 1 - keep)
            self.step += 1
            value = loss.item()
            mean = value if math.isnan(mean) else 0.98 * mean + 0.02 * value
            if self.step % 20 == 0:
                pace = (time.perf_counter() - began) / (self.step - first)
                print(f"{self.file.stem} {self.step}/{steps} loss {value:.4f} "
                      f"mean {mean:.4f} {more} {pace:.2f} s/step", file=sys.stderr, flush=True)
            if self.step % 100 == 0 or self.step == steps:
                self.save()


def autocast(device: str) -> torch.autocast:
    return torch.autocast(torch.device(device).type, torch.bfloat16)
