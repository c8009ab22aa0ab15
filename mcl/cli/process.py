"""Process of a command: one-line errors, exit codes and signals."""
import argparse
import difflib
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from ..errors import InputError, NumericalError, escape_control_characters

EXPECTED_ERRORS = (InputError, NumericalError, torch.OutOfMemoryError, MemoryError,
                   KeyboardInterrupt)
NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"       # PyTorch has no class for it


class Terminated(KeyboardInterrupt):
    """Raised by SIGTERM and SIGHUP."""


def install_signal_handlers() -> None:
    """Make SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt, so that unfinished files go."""
    def interrupt(number: int, _: Any) -> NoReturn:
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)        # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:   # nohup ignores it
            signal.signal(number, interrupt)


def run_main(main: Callable[[], int]) -> NoReturn:
    """Run a command as this process and exit with its code; a closed pipe ends it quietly."""
    install_signal_handlers()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):          # names may hold characters it cannot encode
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:                         # Python would complain again at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
    sys.exit(code)


def exit_code_of(action: Callable[[], int | None]) -> int:
    """Run an action and return its exit code; expected errors become one line on stderr."""
    warnings.showwarning = one_line_warning
    try:
        return action() or 0
    except BaseException as error:
        if not is_expected(error):
            raise
        code, line = format_error(error)
    tqdm.write(line, file=sys.stderr)
    return code


def is_expected(error: BaseException) -> bool:
    """Return True for errors of the user's input or machine, reported without a traceback."""
    return isinstance(error, EXPECTED_ERRORS) or NO_MEMORY in str(error)


def format_error(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the line for an expected error.

    The codes are 1 for failed, 2 for bad usage or input, 130 for interrupted, 143 for terminated.
    """
    if isinstance(error, InputError):
        return 2, f"error: {error}"
    if isinstance(error, Terminated):
        return 143, "terminated; no unfinished file is left"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; no unfinished file is left"
    reason = str(error).rpartition("] err == 0. ")[2] or "out of memory"    # PyTorch's own prefix
    return 1, f"failed: {escape_control_characters(reason.splitlines()[0])}"


def one_line_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning as one line, above any progress bar."""
    tqdm.write(f"warning: {escape_control_characters(str(message))}", file=sys.stderr)


class StoreOnce(argparse.Action):
    """Stores a value; an option that is given twice is an error instead of losing the first."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option: str | None = None) -> None:
        """Store the value, or report the repeated option."""
        stored = vars(namespace).setdefault("stored_options", set())
        if self.dest in stored:
            parser.error(f"{option} is given twice: give it once")
        stored.add(self.dest)
        setattr(namespace, self.dest, values)


class OneLineErrorParser(argparse.ArgumentParser):
    """Argument parser that reports wrong usage as an InputError, with the closest option."""

    def __init__(self, *args: Any, **kwargs: Any):
        """Create a parser without abbreviated options; each option takes its value once."""
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.register("action", None, StoreOnce)
        self.register("action", "store", StoreOnce)

    def error(self, message: str) -> NoReturn:
        """Raise InputError."""
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        close = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1) if (
            unknown) else []
        hint = f"did you mean {close[0]}?" if close else f"{self.prog} --help lists the options"
        raise InputError(f"{message}. {hint[0].upper()}{hint[1:]}")
