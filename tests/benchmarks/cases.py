"""The cases of a table of clones: jobs of one model, of which nothing is written but figures."""
import argparse
import functools
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Sequence, TypeVar

from torch import nn

from mcl.checkpoints.model_file import load_model
from mcl.config import SampleConfig
from mcl.errors import InputError
from mcl.files import OutputFile, check_io_conflicts, check_readable, read_jsonl
from mcl.model import Model
from mcl.cli import StoreOnce, OneLineErrorParser, exit_code_of, one_line_warning
from mcl.cli.jobs import (as_json, assembled, check_each, is_of, kept_digest, measure_each, parse_jobs,
                   requested)
from mcl.cli.outputs import clips_of, reads

FIGURES = ("clone", "unguided")         # of a record, by the names of what is measured
Record = dict[str, Any]
N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True)
class Case:
    """A reference, a prompt and a seed."""
    args: argparse.Namespace
    seed: int
    config: SampleConfig
    request: Record                     # all that its figures depend on


def read_cases(path: Path, common: list[str], clip: Path, out: Path) -> list[Case]:
    """The cases in a file of jobs, with options common to all.

    clip, out   what the table will read besides, and write

    Raises InputError for all that can be wrong and can be known before weights are read, and for
    what the table is not of: other models than the first case's, and what else steers a clip.
    """
    jobs = parse_jobs([*common, "--report", f"--jobs={path}"])
    check_readable(clip)
    read = [*(one for job in jobs for one in reads(job)), ("--clip", clip), ("--cases", path)]
    check_io_conflicts(read, [OutputFile("--out", out)])
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


def read_records(path: Path, cases: list[Case]) -> tuple[list[Record], list[Case]]:
    """All records of a file, and the cases that it has none of. Raises InputError where it holds
    anything else."""
    records = read_jsonl(path, "a table", lambda record: isinstance(record, dict) and all(
        isinstance(figures, dict) and all(x is None or type(x) is float for x in figures.values())
        for figures in map(record.get, FIGURES)))
    return records, [case for case in cases
                     if not any(is_of(record, case.request) for record in records)]


def main(argv: list[str] | None, description: str, load_clip: Callable[[Path], N],
         measure: Callable[[Model, N, Case], Record], table: Callable[[Sequence[Record]], str]
         ) -> int:
    """Measures cases and prints their table: 0 done, 1 some failed, 2 bad input, 130 or 143
    interrupted."""
    warnings.showwarning = one_line_warning
    p = OneLineErrorParser(prog="-m tests.benchmarks.paper_table", description=description, allow_abbrev=False,
               epilog="All other options are those of sample.py, for all cases.")
    p.add_argument("--cases", type=Path, required=True, action=StoreOnce, metavar="FILE",
                   help='a line of JSON for each, {"ref": "a.mp4", "prompt": "a star", "seed": 1}')
    p.add_argument("--clip", type=Path, required=True, action=StoreOnce, metavar="FILE",
                   help="model.safetensors of openai/clip-vit-large-patch14 or -base-patch32")
    p.add_argument("--out", type=Path, default=Path("table.jsonl"), metavar="FILE",
                   help="the figures of each case, gone on with (default: %(default)s)")
    return exit_code_of(lambda: run(load_clip, measure, table, *p.parse_known_args(argv)))


def run(load_clip: Callable[[Path], N], measure: Callable[[Model, N, Case], Record],
        table: Callable[[Sequence[Record]], str], args: argparse.Namespace, common: list[str]
        ) -> int:
    failed: list[str] = []
    with assembled() as crew:
        try:
            cases = read_cases(args.cases, common, args.clip, args.out)
            records, left = read_records(args.out, cases)
            clip = load_clip(args.clip) if left else None
        except InputError:
            if crew.rank:               # which the first of them says
                return 2
            raise
        crew.gather([])                 # before anybody writes, all have seen what is left
        if clip is not None:
            first = cases[0].args
            model = load_model(first.weights, first.device, first.dtype)
            one = functools.partial(measure, model, clip.to(model.device))
            failed = measure_each(crew, [(case.args.where, case) for case in left], one, args.out,
                                  records)
        if crew.rank == 0:
            print(f"{args.cases}: {len(cases)} cases, {len(cases) - len(left)} of them measured "
                  f"before; {len(failed)} failed", file=sys.stderr)
            print(table([r for r in records if any(is_of(r, case.request) for case in cases)]))
    return 1 if failed else 0
