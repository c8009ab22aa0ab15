"""What the commands share: wrong usage and every foreseen failure are one line."""
import argparse
import dataclasses
import io
import os
import re
import signal
import sys
from typing import Any, Callable, NoReturn, TextIO

import torch
from tqdm import tqdm

from ..config import SampleConfig
from ..errors import InputError, NumericalError

EXPECTED_ERRORS = (InputError, NumericalError, torch.OutOfMemoryError, MemoryError, KeyboardInterrupt)
NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"       # torch has no class for it


class Terminated(KeyboardInterrupt):
    """By a signal other than Ctrl-C's; what is unfinished is removed likewise."""


def install_signal_handlers() -> None:
    """Has this process end in order when it is told to, or when its terminal goes away."""
    def end(number: int, _: Any) -> NoReturn:
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)        # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:     # nohup's
            signal.signal(number, end)


class Patient(io.TextIOBase):
    """A standard stream that takes what is said even if nobody can hear it any more: closed, full,
    or a pipe whose reader is gone. The files matter more than what is said of them."""

    def __init__(self, stream: TextIO | None, fd: int):
        self.stream, self.fd, self.lost = stream, fd, stream is None
        self.inside = False                         # a line
        if isinstance(stream, io.TextIOWrapper):    # a name that it has no letters for is spelt out
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self.inside = not text.endswith("\n") if text else self.inside
        self.attempt("write", text)
        return len(text)

    def flush(self) -> None:
        self.attempt("flush")

    def attempt(self, action: str, *given: str) -> None:
        if self.stream is None or self.lost:
            return
        try:
            getattr(self.stream, action)(*given)
        except (OSError, ValueError):
            self.lost = True
            # What it still holds is written somewhere, or Python would complain at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fd)

    def isatty(self) -> bool:
        return self.stream is not None and not self.lost and self.stream.isatty()

    @property
    def encoding(self) -> str:      # type: ignore[override]
        return getattr(self.stream, "encoding", None) or "utf-8"


def run_main(main: Callable[[], int]) -> NoReturn:
    """The process of a command: heeds signals, bears streams that fail, exits with main's code, and
    says on stderr if what was to be said on stdout was lost."""
    install_signal_handlers()
    out, err = Patient(sys.stdout, 1), Patient(sys.stderr, 2)
    sys.stdout, sys.stderr = out, err       # type: ignore[assignment]
    code = main()
    out.flush()
    if out.lost:
        err.write("note: standard output could not be written; the exit code is right\n")
    err.flush()
    sys.exit(code)


def exit_code_of(action: Callable[[], int | None]) -> int:
    """The exit code of an action, 0 where it has none; what is foreseen to fail is one line."""
    try:
        return action() or 0
    except BaseException as error:
        if not is_expected(error):
            raise
        code, line = format_error(error)
    if getattr(sys.stderr, "inside", False):        # behind a bar that was cut off
        line = "\n" + line
    print(line, file=sys.stderr)
    return code


def is_expected(error: BaseException) -> bool:
    """Whether an error is one that the best of programs may end in."""
    return isinstance(error, EXPECTED_ERRORS) or NO_MEMORY in str(error)


class StoreOnce(argparse.Action):
    """Keeps a file that an option names; of a second one argparse would forget the first."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option: str | None = None) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option} is given twice, and takes one file")
        setattr(namespace, self.dest, values)


class OneLineErrorParser(argparse.ArgumentParser):
    """Wrong usage is one line, like every other wrong input."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does it, which would lose a value that is -- alone; a space before it says
        the same."""
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([re.sub("^(--[a-z-]+=)--$", r"\1 --", one)
                                         for one in given], namespace)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (python {self.prog} --help lists the options)")


def format_error(error: BaseException) -> tuple[int, str]:
    """The exit code and the line for what is foreseen.

    1 failed, 2 bad usage or input, 130 interrupted, 143 terminated.
    """
    if isinstance(error, InputError):
        return 2, f"error: {in_options(str(error))}"
    if isinstance(error, Terminated):
        return 143, "terminated; no file is left unfinished"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; no file is left unfinished"
    said = str(error).rpartition("] err == 0. ")[2] or "out of memory"     # torch's own lines first
    return 1, f"failed: {in_options(said.splitlines()[0])}"


def one_line_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    # On a line of its own, above any bar.
    tqdm.write(f"warning: {in_options(str(message))}", file=sys.stderr)


def in_options(message: str) -> str:
    """A message of the library, whose arguments are given here as options."""
    settings = "|".join((*(field.name for field in dataclasses.fields(SampleConfig)),
                         "duration", "stride"))
    message = re.sub(rf"\b({settings}) = ", lambda m: f"--{m[1].replace('_', '-')} ", message)
    for said, here in (("motion_weight", "--motion-weight"), ("cfg_scale", "--cfg-scale"),
                       ("dtype float32", "--dtype float32"),
                       ("shorter duration", "shorter --duration")):
        message = message.replace(said, here)
    return message
