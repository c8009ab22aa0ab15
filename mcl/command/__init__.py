"""What the commands share: wrong usage and every foreseen failure are one line."""
import argparse
import dataclasses
import re
import signal
from typing import Any, NoReturn

import torch

from ..config import SampleConfig
from ..errors import InputError, NumericalError

FORESEEN = (InputError, NumericalError, torch.OutOfMemoryError, MemoryError, KeyboardInterrupt)


class Terminated(KeyboardInterrupt):
    """By a signal other than Ctrl-C's; what is unfinished is removed likewise."""


def heed_signals() -> None:
    """Has this process end in order when it is told to, or when its terminal goes away."""
    def end(*_: Any) -> NoReturn:
        raise Terminated

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)        # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:     # nohup's
            signal.signal(number, end)


class Parser(argparse.ArgumentParser):
    """Wrong usage is one line, like every other wrong input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (python {self.prog} --help lists the options)")


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code and the line for one of FORESEEN.

    1 failed, 2 bad usage or input, 130 interrupted, 143 terminated.
    """
    if isinstance(error, InputError):
        return 2, f"error: {in_options(str(error))}"
    if isinstance(error, Terminated):
        return 143, "terminated; no file is left unfinished"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; no file is left unfinished"
    return 1, f"failed: {in_options((str(error) or 'out of memory').splitlines()[0])}"


def in_options(message: str) -> str:
    """A message of the library, whose arguments are given here as options."""
    settings = "|".join(field.name for field in dataclasses.fields(SampleConfig))
    message = re.sub(rf"\b({settings}) = ", lambda m: f"--{m[1].replace('_', '-')} ", message)
    for said, here in (("motion_scale", "--motion-scale"), ("dtype float32", "--dtype float32"),
                       ("shorter duration", "shorter --duration")):
        message = message.replace(said, here)
    return message
