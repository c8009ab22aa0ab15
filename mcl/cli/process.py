"""Process of a command: one-line errors, exit codes and signals."""
import argparse
import difflib
import io
import os
import re
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

import torch
from tqdm import tqdm

from ..errors import InputError, NumericalError, escape_control_characters

SIGNALS = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))


class Terminated(KeyboardInterrupt):
    """Raised by SIGTERM and SIGHUP."""


class TolerantFile(io.FileIO):
    """File that ignores failed writes: the reader of a pipe is gone, or the disk is full."""

    def write(self, data: Any) -> int:
        """Return the number of bytes that were written or dropped."""
        try:
            return super().write(data)
        except OSError:
            return len(data)


def run_main(main: Callable[[], int]) -> NoReturn:
    """Run a command as this process and exit with its code.

    Signals raise KeyboardInterrupt, so that unfinished files are deleted. The command goes on if
    its messages cannot be printed.
    """
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:          # nohup ignores SIGHUP
            signal.signal(number, interrupt)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)     # bytes do not reach the console of Windows in its encoding
        if stream is not None and not (sys.platform == "win32" and stream.isatty()):
            file = io.BufferedWriter(TolerantFile(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(file, stream.encoding, "backslashreplace",
                                                line_buffering=True))
    sys.exit(main())


def interrupt(number: int, _: Any) -> NoReturn:
    """Raise KeyboardInterrupt for a signal, once: a second signal would disturb the clean-up."""
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def exit_code_of(action: Callable[[], int | None]) -> int:
    """Run an action and return its exit code; expected errors become one line on stderr."""
    warnings.showwarning = lambda message, *_, **__: print_line(f"warning: {message}", sys.stderr)
    try:
        os.getcwd()                     # libraries that need it end the process without an error
        return action() or 0
    except BaseException as error:
        code, line = format_error(error)
    print_line(line, sys.stderr)
    return code


def format_error(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the line for an error of the user's input or machine.

    The codes are 1 for failed, 2 for bad usage or input, 130 for interrupted, 143 for terminated.
    Any other error is a bug and is raised again.
    """
    if isinstance(error, InputError):
        return 2, f"error: {error}"
    if isinstance(error, FileNotFoundError) and error.filename is None:     # os.getcwd
        return 2, "error: the current folder was deleted. Change to another folder"
    if isinstance(error, KeyboardInterrupt):
        code, word = (143, "terminated") if isinstance(error, Terminated) else (130, "interrupted")
        return code, f"{word}; no unfinished file is left"
    is_expected = isinstance(error, (NumericalError, torch.OutOfMemoryError, MemoryError))
    if not is_expected and "DefaultCPUAllocator: can't allocate memory" not in str(error):
        raise error                                 # PyTorch has no class for that message
    reason = str(error).rpartition("] err == 0. ")[2] or "out of memory"    # PyTorch's own prefix
    return 1, f"failed: {reason.splitlines()[0]}"


def print_line(text: object, file: TextIO | None = None) -> None:
    """Print text as one line, with its control characters escaped, above any progress bar."""
    tqdm.write(escape_control_characters(str(text)), file=file or sys.stdout)


class OneLineErrorParser(argparse.ArgumentParser):
    """Argument parser that reports wrong usage as an InputError, with the closest option."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments. No option is abbreviated, or given twice if it has one value."""
        self.allow_abbrev = False
        args = sys.argv[1:] if args is None else list(args)
        counts = Counter(word.partition("=")[0] for word in args if word.startswith("--"))
        for option, action in self._option_string_actions.items():
            is_repeatable = action.nargs == 0 or isinstance(action, argparse._AppendAction)
            if counts[option] > 1 and not is_repeatable:
                self.error(f"{option} is given twice: give it once")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise InputError."""
        unknown = re.match(r"unrecognized arguments: .*?(--[\w-]+)", message)
        close = unknown and difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"Run {self.prog} --help for the options"
        raise InputError(f"{message}. {hint}")
