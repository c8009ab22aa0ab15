"""What every stage of the training shares: the steps, the running average, the checkpoints."""
import copy
import math
import sys
import time
from pathlib import Path
from typing import Any, Callable

import torch
from torch import Tensor, nn


class Trainee:
    """Weights under training, with their running average, and where they are kept."""

    def __init__(self, module: nn.Module, groups: list[dict[str, Any]], file: Path, ema: float):
        self.module, self.file, self.ema = module, file, ema
        self.average = copy.deepcopy(module).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(groups, betas=(.9, .99), weight_decay=1e-3)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.step = 0
        if file.exists():
            state = torch.load(file, weights_only=True)
            self.module.load_state_dict(state["module"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def save(self) -> None:
        temporary = self.file.with_suffix(".tmp")
        torch.save({"module": self.module.state_dict(), "average": self.average.state_dict(),
                    "optimizer": self.optimizer.state_dict(), "step": self.step}, temporary)
        temporary.replace(self.file)

    def run(self, steps: int, loss_of: Callable[[int], tuple[Tensor, str]]) -> None:
        """Trains up to `steps`; the rate rises over 50 of them and falls by a cosine."""
        began, first, mean = time.perf_counter(), self.step, math.nan
        while self.step < steps:
            cosine = (1 + math.cos(math.pi * self.step / steps)) / 2
            for group, rate in zip(self.optimizer.param_groups, self.rates):
                group["lr"] = rate * min(1, (self.step + 1) / 50) * (.02 + .98 * cosine)
            loss, more = loss_of(self.step)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizer.step()
            keep = min(self.ema, (self.step + 1) / (self.step + 10))
            with torch.no_grad():
                for slow, fast in zip(self.average.parameters(), self.module.parameters()):
                    slow.lerp_(fast, 1 - keep)
            self.step += 1
            mean = float(loss) if math.isnan(mean) else 0.98 * mean + 0.02 * float(loss)
            if self.step % 20 == 0:
                pace = (time.perf_counter() - began) / (self.step - first)
                print(f"{self.file.stem} {self.step}/{steps} loss {float(loss):.4f} "
                      f"mean {mean:.4f} {more} {pace:.2f} s/step", file=sys.stderr, flush=True)
            if self.step % 100 == 0 or self.step == steps:
                self.save()


def autocast(device: str) -> torch.autocast:
    return torch.autocast(torch.device(device).type, torch.bfloat16)
