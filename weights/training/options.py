"""Command lines of the training, the evaluation and the benchmarks, generated from dataclasses."""
import dataclasses
from collections.abc import Callable
from typing import Any, get_args, get_origin

from mcl.cli.process import OneLineErrorParser, exit_code_of


def option(default: Any, help: str, **kwargs: Any) -> Any:
    """Declare a field with its help text, and more keyword arguments of `add_argument`."""
    return dataclasses.field(default=default, metadata={"help": help, **kwargs})


def count(text: str) -> int:
    """Return a number of at least 0. Raises ValueError for other text."""
    return int(text if text.isdecimal() else "")


def run_with_options(prog: str, options: type[Any], run: Callable[[Any], None],
                     argv: list[str] | None) -> int:
    """Run a command and return its exit code.

    Args:
        prog: Name of the command.
        options: Dataclass whose fields are the options. A boolean option has no value, and a tuple
            has one or more.
        run: Function that runs the command with an instance of `options`.
        argv: The arguments; those of the process if None.
    """
    p = OneLineErrorParser(prog=prog, description=(options.__doc__ or "").partition("\n")[0])
    for f in dataclasses.fields(options):
        nargs, kind = "+" if get_origin(f.type) is tuple else None, (*get_args(f.type), f.type)[0]
        kind = count if kind is int else kind
        kwargs = {"action": "store_true"} if kind is bool else {"type": kind, "nargs": nargs}
        p.add_argument("--" + f.name.replace("_", "-"), **kwargs | dict(f.metadata))
    return exit_code_of(lambda: run(p.parse_args(argv, options())))
