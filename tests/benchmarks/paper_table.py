"""Print the paper's table from the records of many clones.

    python sample.py --jobs cases.jsonl --report --preset camera
    python tests/benchmarks/paper_table.py --clip clip-vit-large-patch14/model.safetensors *.json

Every record is a file CLIP.mp4.json that `sample.py --report` wrote beside its clip CLIP.mp4. The
table has the metrics of the paper, computed here by OpenAI's CLIP (arXiv 2103.00020), and the
metrics of the report.
"""
import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

if not __package__:     # run as a file
    sys.path.insert(0, str(Path(__file__).parents[2]))

from mcl import InputError, read_video
from mcl.cli.process import OneLineErrorParser, exit_code_of, run_main
from mcl.networks.tokenizer import Tokenizer
from mcl.video.write import to_uint8
from weights.training.evaluate import mean_ci95

# Results of MotionClone, arXiv 2406.05338.
PAPER_RESULTS = {"CLIP text alignment": 0.3187, "CLIP temporal consistency": 0.9621}
Record = dict[str, Any]


def load_clip(path: Path) -> "transformers.CLIPModel":
    """Load CLIP, in float32, from local files only.

    Args:
        path: Folder with config.json and model.safetensors, or this file in such a folder.

    Raises:
        InputError: If the files are missing, damaged, incomplete or of another kind.
    """
    loader: Any = transformers.CLIPModel         # its type hints do not know output_loading_info
    try:
        model, info = loader.from_pretrained(
            path if path.is_dir() else path.parent, local_files_only=True, use_safetensors=True,
            dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"{min(info['missing_keys'])} is missing")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path}: not a CLIPModel ({error}). Give the model.safetensors of "
                         "openai/clip-vit-large-patch14, beside its config.json") from error
    return model.eval()


@torch.no_grad()
def clip_scores(clip: "transformers.CLIPModel", prompt: str, frames: Tensor) -> tuple[float, float]:
    """Return CLIP's text alignment and temporal consistency of a clip.

    They are the mean cosine similarity of the frames with the prompt, and of each frame with the
    next; the latter is nan for one frame.

    Args:
        clip: The CLIP model.
        prompt: Prompt of the clip.
        frames: Frames (f, 3, H, W) in [-1, 1].
    """
    size = clip.vision_model.config.image_size
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size)
    output = clip(input_ids=Tokenizer()(prompt),
                  **processor(list(to_uint8(frames)), return_tensors="pt"))
    images, text = output.image_embeds, output.text_embeds          # unit vectors (b, d)
    consistency = (images[1:] * images[:-1]).sum(dim=1).mean()
    return float((images @ text.T).mean()), float(consistency)


def read_record(path: Path, clip: "transformers.CLIPModel") -> Record:
    """Return the record of a clip, with the paper's metrics among those of its report.

    Raises:
        InputError: If the file is not a record with a report, or its clip cannot be read.
    """
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
        settings = record["settings"]
        frames = read_video(path.with_suffix(""), settings["num_frames"],
                            (settings["height"], settings["width"]))
        scores = clip_scores(clip, record["prompt"], frames)
        record["report"]["clone"].update(zip(PAPER_RESULTS, scores, strict=True))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as a record with its clip ({error}). Give files "
                         "that sample.py --report wrote") from error
    return record


def format_table(records: Sequence[Record]) -> str:
    """Return the table in Markdown: means with 95 % confidence intervals.

    The mean is over references and prompts, after the seeds of each of them are averaged.
    """
    names = dict.fromkeys(name for r in records for name in r["report"]["clone"])
    lines = ["| | clone | unguided | paper |", "|---|---|---|---|"]
    for name in sorted(names, key=lambda name: name not in PAPER_RESULTS):
        cells = [metric_cell(records, kind, name) for kind in ("clone", "unguided")]
        lines.append(f"| {name} | {' | '.join(cells)} | {PAPER_RESULTS.get(name, '')} |")
    return "\n".join(lines)


def metric_cell(records: Iterable[Record], kind: str, name: str) -> str:
    """Return the mean of a metric and its interval; "(of n)" if it is not known for all cases."""
    groups: dict[tuple[str, str], list[float]] = {}
    for record in records:
        value = record["report"][kind].get(name)
        values = groups.setdefault((record["reference"], record["prompt"]), [])
        values += [] if value is None or math.isnan(value) else [value]
    known = [values for values in groups.values() if values]
    return mean_ci95(known, 4) + (f" (of {len(known)})" if len(known) < len(groups) else "")


def run(args: argparse.Namespace) -> None:
    """Read all records and print their table."""
    clip = load_clip(args.clip)
    print(format_table([read_record(path, clip) for path in tqdm(args.records, file=sys.stderr)]))


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    p = OneLineErrorParser(prog="tests/benchmarks/paper_table.py",
                           description="Print the paper's table from records of sample.py.")
    p.add_argument("--clip", type=Path, required=True, help="model.safetensors of OpenAI's CLIP")
    p.add_argument("records", type=Path, nargs="+", metavar="RECORD.json")
    return exit_code_of(lambda: run(p.parse_args(argv)))


if __name__ == "__main__":
    run_main(main)
