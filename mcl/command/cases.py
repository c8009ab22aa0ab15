"""The cases of a table of clones: jobs of one model, of which nothing is written but figures."""
import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import SampleConfig
from ..errors import InputError
from ..files import Write, check_plan, check_readable, read_lines
from .jobs import as_json, check_each, is_of, kept_digest, parse_jobs, requested
from .paths import clips_of, reads

FIGURES = ("clone", "unguided")         # of a record, by the names of what is measured


@dataclass(frozen=True)
class Case:
    """A reference, a prompt and a seed."""
    args: argparse.Namespace
    seed: int
    config: SampleConfig
    request: dict[str, Any]             # all that its figures depend on


def read_cases(path: Path, common: list[str], clip: Path, out: Path) -> list[Case]:
    """The cases in a file of jobs, with options common to all.

    clip, out   what the table will read besides, and write

    Raises InputError for all that can be wrong and can be known before weights are read, and for
    what the table is not of: other models than the first case's, and what else steers a clip.
    """
    jobs = parse_jobs([*common, "--report", f"--jobs={path}"])
    check_readable(clip)
    read = [*(one for job in jobs for one in reads(job)), ("--clip", clip), ("--cases", path)]
    check_plan(read, [Write("--out", out)])
    cases = []
    for args, (config, fps) in zip(jobs, check_each(jobs)):
        if args.method != "single-step" or config.semantic_scale:
            raise InputError(f"{args.where}: the table is of --method single-step without semantic "
                             "guidance")
        for one in clips_of(args):
            request = as_json({**requested(one, config, fps), "clip": kept_digest(clip)})
            if request["images"] or request["loras"]:
                raise InputError(f"{args.where}: the table is of one file of weights: leave out "
                                 "--image, and merge LoRAs into it by convert_weights.py")
            cases.append(Case(args, one.seed, config, request))
            if any(request[name] != cases[0].request[name] for name in ("weights", "asked")):
                raise InputError(f"{args.where}: a table is of one model: give all cases the same "
                                 "--weights, --device and --dtype")
    return cases


def read_records(path: Path, cases: list[Case]) -> tuple[list[dict[str, Any]], list[Case]]:
    """All records of a file, and the cases that it has none of. Raises InputError where it holds
    anything else."""
    records = read_lines(path, "a table", lambda record: isinstance(record, dict) and all(
        isinstance(figures, dict) and all(x is None or type(x) is float for x in figures.values())
        for figures in map(record.get, FIGURES)))
    return records, [case for case in cases
                     if not any(is_of(record, case.request) for record in records)]
